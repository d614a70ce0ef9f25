"""Further encoders of transformers: of text DistilBERT, MPNet, ELECTRA, DeBERTa and ModernBERT, of images DINOv2."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from core.anatomy.description import Description, Where, family, language_head, reads_parameter
from core.anatomy.families.transformers import MODELS, bert_blocks, blocks_of
from core.anatomy.layout import Grid, Rows
from core.anatomy.torch_attention import written_attention

# ------------------------------------------------------------------------------------------------- DistilBERT

_DISTILBERT = f"{MODELS}.distilbert.modeling_distilbert"

language_head(f"{_DISTILBERT}:DistilBertForMaskedLM", "vocab_transform", "vocab_layer_norm", "vocab_projector")


@family(f"{_DISTILBERT}:DistilBertModel")
def distilbert(model: Any) -> Description:
    """DistilBERT: BERT's blocks in half their number, without a pooler."""
    roles: dict[str, Where] = {"q": "attention.q_lin", "k": "attention.k_lin", "v": "attention.v_lin"}
    roles |= {"o": "attention.out_lin", "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2"}
    roles |= {"attend": "attention", "attention": "attention", "mlp": "ffn"}
    roles |= {"norm1": "sa_layer_norm", "norm2": "output_layer_norm"}
    widths = {"attention.attention_head_size": 1, "attention.dim": 1, "attention.scaling": -0.5}
    blocks = blocks_of(model, "transformer.layer", roles, pre_norm=False, widths=widths)
    return Description(blocks, {"embed": "embeddings", "norm": "embeddings.LayerNorm"}, text="")


# ------------------------------------------------------------------------------------------------- ELECTRA

_ELECTRA = f"{MODELS}.electra.modeling_electra"

language_head(f"{_ELECTRA}:ElectraForMaskedLM", "generator_predictions", "generator_lm_head")
language_head(f"{_ELECTRA}:ElectraForCausalLM", "generator_predictions", "generator_lm_head")


@family(f"{_ELECTRA}:ElectraModel")
def electra(model: Any) -> Description:
    """ELECTRA, generator and discriminator: BERT's blocks, often behind narrower embeddings."""
    # Where the embeddings have a width of their own, the hidden state begins behind the map from it.
    embed = "embeddings_project" if hasattr(model, "embeddings_project") else "embeddings"
    return Description(bert_blocks(model), {"embed": embed, "norm": "embeddings.LayerNorm"}, text="")


# ------------------------------------------------------------------------------------------------- MPNet


@family(f"{MODELS}.mpnet.modeling_mpnet:MPNetModel")
def mpnet(model: Any) -> Description:
    """MPNet: one table of relative positions, beside the blocks, of which each adds the same bias to its scores."""
    own = "attention.attn"
    roles: dict[str, Where] = {role: f"{own}.{role}" for role in "qkvo"}
    roles |= {"mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    # As in BERT, what is added to the residual leaves a dropout.
    roles |= {"attend": own, "attention": "attention.dropout", "mlp": "output.dropout"}
    roles |= {"norm1": "attention.LayerNorm", "norm2": "output.LayerNorm"}
    widths = {f"{own}.attention_head_size": 1, f"{own}.all_head_size": 1}
    blocks = blocks_of(model, "encoder.layer", roles, pre_norm=False, widths=widths)
    for block, layer in zip(blocks, model.encoder.layer, strict=True):
        block.per_token["position_bias"] = "none"
        # Its attention is written out as products and a softmax: a call is put there for `attend` to rewrite.
        as_one_call = functools.partial(_mpnet_attention, layer.attention.attn)
        block.while_active = {"attend": {f"{own}.forward": as_one_call}}
    stem: dict[str, str | list[str]] = {"embed": "embeddings", "norm": "embeddings.LayerNorm"}
    stem["position_bias"] = "encoder.relative_attention_bias"
    if model.pooler is not None:
        stem["pool"] = "pooler.dense"
    return Description(blocks, stem, text="")


def _mpnet_attention(attention: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
                     position_bias: Tensor | None = None, output_attentions: bool = False, **rest: Any
                     ) -> tuple[Tensor, ...]:
    """What MPNetSelfAttention.forward computes, with its attention as one call.

    Args:
        hidden_states: [batch, tokens, dim].
        attention_mask: added to the scores, [batch, 1, 1 or tokens, tokens].
        position_bias: added to the scores, [batch, heads, tokens, tokens].
    """
    if output_attentions:  # the call does not give its weights
        return type(attention).forward(attention, hidden_states, attention_mask, position_bias, True, **rest)
    shape = (attention.num_attention_heads, attention.attention_head_size)
    maps = (attention.q, attention.k, attention.v)
    q, k, v = (torch.unflatten(linear(hidden_states), -1, shape).transpose(1, 2) for linear in maps)
    mask = position_bias if attention_mask is None else attention_mask
    if position_bias is not None and attention_mask is not None:
        mask = position_bias + attention_mask
    rate = attention.dropout.p if attention.dropout.training else 0.0
    mixed = written_attention(q, k, v, mask, rate)
    joined = mixed.transpose(1, 2).flatten(2)  # [batch, tokens, heads * width]
    return (attention.o(joined),)


# ------------------------------------------------------------------------------------------------- DeBERTa


_DEBERTA = f"{MODELS}.deberta_v2.modeling_deberta_v2"


def _relative_embeddings(encoder: Any) -> Tensor:
    """What DebertaV2Encoder.get_rel_embedding gives, with the embedding called as a module."""
    table = encoder.rel_embeddings
    places = torch.arange(table.num_embeddings, device=table.weight.device)
    embedded = table(places)
    return encoder.LayerNorm(embedded) if "layer_norm" in encoder.norm_rel_ebd else embedded


# The published heads are `cls`; the later form has no map to the vocabulary, but multiplies by the embedding itself.
language_head(f"{_DEBERTA}:DebertaV2ForMaskedLM", "cls", "lm_predictions")
reads_parameter(f"{_DEBERTA}:DebertaV2Encoder", "rel_embeddings",
                lambda encoder: {"get_rel_embedding": functools.partial(_relative_embeddings, encoder)})


@family(f"{_DEBERTA}:DebertaV2Model")
def deberta(model: Any) -> Description:
    """DeBERTa, second and third version. Its scores have terms for relative positions, which are embedded as wide as
    the hidden state; a key that has no position has no score, so that the role `attend` is not there."""
    roles: dict[str, Where] = {}
    for role, name in {"q": "query", "k": "key", "v": "value"}.items():
        roles[role] = f"attention.self.{name}_proj"
    roles["o"] = "attention.output.dense"
    roles |= {"mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    roles |= {"attention": "attention.output.dropout", "mlp": "output.dropout"}
    roles |= {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    blocks = blocks_of(model, "encoder.layer", roles, pre_norm=False)
    norms = ["embeddings.LayerNorm"]
    encoder = model.encoder
    if hasattr(encoder, "LayerNorm"):
        norms.append("encoder.LayerNorm")  # of the relative positions
    if encoder.conv is not None:  # beside the first block, in the largest models
        norms.append("encoder.conv.LayerNorm")
    stem: dict[str, str | list[str]] = {"embed": "embeddings", "norm": norms}
    if encoder.relative_attention:
        stem["position_bias"] = "encoder.rel_embeddings"
    return Description(blocks, stem, text="")


# ------------------------------------------------------------------------------------------------- ModernBERT

_MODERNBERT = f"{MODELS}.modernbert.modeling_modernbert"

language_head(f"{_MODERNBERT}:ModernBertForMaskedLM", "head", "decoder")


@family(f"{_MODERNBERT}:ModernBertModel")
def modernbert(model: Any) -> Description:
    """ModernBERT: queries, keys and values are one map, and so are gate and MLP. Most blocks see a window around each
    token, with rotary positions of their own."""
    config = model.config
    dim, hidden = config.hidden_size, config.intermediate_size
    roles: dict[str, Where] = {"qkv": "attn.Wqkv"}
    for i, role in enumerate("qkv"):
        roles[role] = ("attn.Wqkv", Rows(i * dim, (i + 1) * dim))
    roles |= {"o": "attn.Wo", "mlp.down": "mlp.Wo"}
    # The library calls the half that is not activated the gate; the gate is the one that is.
    roles |= {"mlp.gate": ("mlp.Wi", Rows(0, hidden)), "mlp.up": ("mlp.Wi", Rows(hidden, 2 * hidden))}
    roles |= {"attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "attn_norm", "norm2": "mlp_norm"}
    blocks = blocks_of(model, "layers", roles, rotary="position_embeddings", widths={"attn.head_dim": 1})
    # The embeddings end with a norm, and the first block has none at its attention.
    blocks[0].roles = {role: where for role, where in blocks[0].roles.items() if role != "norm1"}
    norms: str | list[str] = ["embeddings.norm", "final_norm"]
    stem: dict[str, str | list[str]] = {"embed": "embeddings", "norm": norms, "final_norm": "final_norm"}
    return Description(blocks, stem, final="final_norm", text="")


# ------------------------------------------------------------------------------------------------- DINOv2


@family(f"{MODELS}.dinov2.modeling_dinov2:Dinov2Model",
        f"{MODELS}.dinov2_with_registers.modeling_dinov2_with_registers:Dinov2WithRegistersModel")
def dinov2(model: Any) -> Description:
    """DINOv2, with or without registers. As in timm's, what attention and MLP give is scaled channel by channel before
    it is added, and methods at their outputs stand before that."""
    roles: dict[str, Where] = {role: f"attention.{role}_proj" for role in "qkvo"}
    if model.config.use_swiglu_ffn:
        roles |= {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
    else:
        roles |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    roles |= {"attend": "attention", "attention": "attention", "mlp": "mlp", "norm1": "norm1", "norm2": "norm2"}
    patches = model.embeddings.patch_embeddings
    (height, width), (patch_height, patch_width) = patches.image_size, patches.patch_size
    registers = getattr(model.config, "num_register_tokens", 0)
    grid = Grid(height // patch_height, width // patch_width, special=1 + registers)
    widths = {"attention.head_dim": 1, "attention.scaling": -0.5}
    blocks = blocks_of(model, "encoder.layer", roles, grid=grid, widths=widths)
    stem: dict[str, str | list[str]] = {"patch_embed": "embeddings.patch_embeddings.projection", "embed": "embeddings"}
    stem |= {"norm": "layernorm", "final_norm": "layernorm"}
    return Description(blocks, stem, final="layernorm")
