"""Families of torch itself: its transformer's encoder and decoder (`core.anatomy.torch_attention` says how they come to
call their parts)."""

from __future__ import annotations

from typing import Any

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Rows
from core.errors import ScionError

MODULE = "torch.nn.modules.transformer"

# All of these are None when a layer is called once more on other tokens: torch has no caches and no positions.
_MASKS = ("src_mask", "src_key_padding_mask", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
          "memory_key_padding_mask", "is_causal", "tgt_is_causal", "memory_is_causal")


@family(f"{MODULE}:TransformerEncoder", f"{MODULE}:TransformerDecoder")
def torch_stack(model: Any) -> Description:
    """An encoder or a decoder that is used without the other."""
    norms = ["norm"] if model.norm is not None else []
    return Description(_blocks(model, ""), {"norm": norms, "final_norm": norms}, final="".join(norms))


@family(f"{MODULE}:Transformer")
def torch_transformer(model: Any) -> Description:
    """Encoder and decoder are stages."""
    blocks, norms = [], {}
    for stage in ("encoder", "decoder"):
        stack = getattr(model, stage)
        blocks += _blocks(stack, stage)
        norms[stage] = f"{stage}.norm" if stack.norm is not None else ""
    found = [norm for norm in norms.values() if norm]
    return Description(blocks, {"norm": found, "final_norm": found}, final=norms)


def _blocks(stack: Any, stage: str) -> list[BlockDescription]:
    found = []
    for i, layer in enumerate(stack.layers):
        if not layer.self_attn.batch_first:
            raise ScionError(f"{type(stack).__name__} has its samples on the second axis, where methods would take "
                             "them for tokens: build its layers with batch_first=True")
        path = f"{stage}.layers.{i}".lstrip(".")
        found.append(_block(layer, path, stage))
    return found


def _block(layer: Any, path: str, stage: str) -> BlockDescription:
    attention = layer.self_attn
    heads = attention.num_heads
    decodes = hasattr(layer, "multihead_attn")
    return BlockDescription(
        path=path,
        dim=attention.embed_dim,
        roles=_roles(attention.embed_dim, decodes),
        stage=stage,
        heads=(heads, heads, attention.head_dim),
        pre_norm=layer.norm_first,
        per_token=dict.fromkeys(_MASKS, "none"),
        causal=decodes,
        memory="memory" if decodes else "",
    )


def _roles(dim: int, decodes: bool) -> dict[str, Where]:
    """The roles in a layer of an encoder or a decoder, whose norms and dropouts are numbered differently."""
    roles = _attention("self_attn", dim)
    # A layer adds what leaves its dropouts to the residual: these are the outputs of its sublayers.
    roles |= {"attention": "dropout1", "norm1": "norm1", "mlp.up": "linear1", "mlp.down": "linear2"}
    if not decodes:
        return roles | {"mlp": "dropout2", "norm2": "norm2"}
    for role, where in _attention("multihead_attn", dim).items():
        if role != "qkv":  # queries and keys are made of different states, so the fused map is never one map
            roles[f"cross.{role}"] = where
    roles |= {"cross.attention": "dropout2", "cross.norm": "norm2", "mlp": "dropout3", "norm2": "norm3"}
    return roles


def _attention(path: str, dim: int) -> dict[str, Where]:
    """The roles of one of torch's attentions; queries, keys and values lie in one parameter."""
    roles: dict[str, Where] = {"qkv": path}
    for i, role in enumerate("qkv"):
        roles[role] = (path, Rows(i * dim, (i + 1) * dim))
    roles["o"] = f"{path}.out_proj"
    roles["attend"] = path
    return roles
