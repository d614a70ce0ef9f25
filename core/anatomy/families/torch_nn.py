"""Families of torch itself: its transformer's encoder and decoder (`core.anatomy.torch_attention` says how they come to
call their parts)."""

from __future__ import annotations

from typing import Any

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Rows
from core.errors import ScionError

MODULE = "torch.nn.modules.transformer"


@family(f"{MODULE}:TransformerEncoder", f"{MODULE}:TransformerDecoder")
def torch_stack(model: Any) -> Description:
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
        attention, decodes = layer.self_attn, hasattr(layer, "multihead_attn")
        if not attention.batch_first:
            raise ScionError(f"{type(stack).__name__} has its samples on the second axis, where methods would take "
                             "them for tokens: build its layers with batch_first=True")
        heads = attention.num_heads
        roles = {**_attention("self_attn", attention.embed_dim), "attention": "dropout1", "norm1": "norm1",
                 "mlp.up": "linear1", "mlp.down": "linear2"}
        if decodes:
            cross = _attention("multihead_attn", attention.embed_dim)
            roles |= {f"cross.{role}": where for role, where in cross.items() if role != "qkv"}
            roles |= {"cross.attention": "dropout2", "cross.norm": "norm2", "mlp": "dropout3", "norm2": "norm3"}
        else:
            roles |= {"mlp": "dropout2", "norm2": "norm2"}
        masks = ("src_mask", "src_key_padding_mask", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
                 "memory_key_padding_mask", "is_causal", "tgt_is_causal", "memory_is_causal")
        found.append(BlockDescription(
            path=f"{stage}.layers.{i}".lstrip("."), dim=attention.embed_dim, roles=roles, stage=stage,
            heads=(heads, heads, attention.head_dim), pre_norm=layer.norm_first, per_token=dict.fromkeys(masks, "none"),
            causal=decodes, memory="memory" if decodes else ""))
    return found


def _attention(path: str, dim: int) -> dict[str, Where]:
    """The roles of one of torch's attentions; queries, keys and values lie in one parameter."""
    thirds: dict[str, Where] = {role: (path, Rows(i * dim, (i + 1) * dim)) for i, role in enumerate("qkv")}
    return {"qkv": path, **thirds, "o": f"{path}.out_proj", "attend": path}
