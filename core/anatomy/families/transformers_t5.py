"""T5 of transformers: an encoder, a decoder with cross-attention, and one table of relative positions for each."""

from __future__ import annotations

from typing import Any

from core.anatomy.description import BlockDescription, Description, Where, family

MODULE = "transformers.models.t5.modeling_t5"

# The paths of a block's sublayers: the first is attention, the last the MLP, cross-attention is between the two.
_SELF = "layer.0.SelfAttention"
_CROSS = "layer.1.EncDecAttention"
_TABLE = f"{_SELF}.relative_attention_bias"


@family(f"{MODULE}:T5Model", f"{MODULE}:T5EncoderModel", f"{MODULE}:T5ForConditionalGeneration")
def t5(model: Any) -> Description:
    """Encoder and decoder are stages. A sublayer holds norm and residual; what it adds is its inner module's output."""
    blocks, embeds = [], []
    norms: dict[str, str] = {}
    for stage in ("encoder", "decoder"):
        stack = getattr(model, stage, None)
        if stack is None:  # T5EncoderModel
            continue
        blocks += _blocks(stack, stage)
        norms[stage] = f"{stage}.final_layer_norm"
        embeds.append(f"{stage}.embed_tokens")
    stem: dict[str, str | list[str]] = {"embed": embeds}
    stem["norm"] = list(norms.values())
    stem["final_norm"] = list(norms.values())
    if hasattr(model, "lm_head"):
        stem["lm_head"] = "lm_head"
    text = {stage: stage for stage in norms}
    return Description(blocks, stem, final=norms, text=text)


def _blocks(stack: Any, stage: str) -> list[BlockDescription]:
    roles = _roles(stack)
    blocks = []
    for i in range(len(stack.block)):
        block = _block(stack, stage, i, roles)
        if i == 0:
            # The first block holds the stack's table of relative positions and hands the bias on to those behind it.
            block.roles = {**roles, "position_bias": (_TABLE, "weight")}
            block.leads = {_TABLE: f"{_SELF}.has_relative_attention_bias"}
        blocks.append(block)
    return blocks


def _block(stack: Any, stage: str, index: int, roles: dict[str, Where]) -> BlockDescription:
    config = stack.config
    heads = config.num_heads
    widths: dict[str, float] = {}
    for path in [_SELF, _CROSS] if stack.is_decoder else [_SELF]:
        widths |= {f"{path}.key_value_proj_dim": 1, f"{path}.inner_dim": 1}
    per_token = {"attention_mask": "none", "position_bias": "none", "encoder_decoder_position_bias": "none"}
    per_token |= {"encoder_attention_mask": "last", "past_key_values": "none"}
    return BlockDescription(
        path=f"{stage}.block.{index}",
        dim=config.d_model,
        roles=roles,
        stage=stage,
        heads=(heads, heads, config.d_kv),
        widths=widths,
        passes={1: "position_bias", 2: "encoder_decoder_position_bias"},
        memory="encoder_hidden_states",
        cache="past_key_values",
        causal=stack.is_decoder,
        per_token=per_token,
    )


def _roles(stack: Any) -> dict[str, Where]:
    """The roles in every block of a stack."""
    roles = _attention(_SELF)
    roles["norm1"] = "layer.0.layer_norm"
    if stack.is_decoder:
        for role, where in _attention(_CROSS).items():
            roles[f"cross.{role}"] = where
        roles["cross.norm"] = "layer.1.layer_norm"
    last = 2 if stack.is_decoder else 1
    mlp = f"layer.{last}.DenseReluDense"
    if stack.config.is_gated_act:
        roles |= {"mlp.gate": f"{mlp}.wi_0", "mlp.up": f"{mlp}.wi_1"}
    else:
        roles["mlp.up"] = f"{mlp}.wi"
    roles |= {"mlp.down": f"{mlp}.wo", "mlp": mlp, "norm2": f"layer.{last}.layer_norm"}
    if stack.config._attn_implementation == "sdpa":
        return roles
    # The verb `attend` rewrites the call of torch's attention, which other implementations do not make.
    return {role: where for role, where in roles.items() if not role.endswith("attend")}


def _attention(path: str) -> dict[str, Where]:
    """The roles of an attention, whose maps are named as our roles are."""
    roles: dict[str, Where] = {}
    for role in "qkvo":
        roles[role] = f"{path}.{role}"
    roles |= {"attend": path, "attention": path}
    return roles
