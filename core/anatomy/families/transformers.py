"""Families of transformers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Grid, Rows

MODELS = "transformers.models"


def blocks_of(model: Any, layers: str, roles: dict[str, Where], dim: int = 0, **rest: Any) -> list[BlockDescription]:
    """Blocks that are all alike, with what transformers' configurations say of them."""
    config = model.config
    if config._attn_implementation != "sdpa" and model._supports_sdpa:  # the verb `attend` rewrites that call
        roles = {role: where for role, where in roles.items() if role != "attend"}
    query, dim = config.num_attention_heads, dim or config.hidden_size
    heads = (query, getattr(config, "num_key_value_heads", None) or query,
             getattr(config, "head_dim", None) or dim // query)
    per_token = {"attention_mask": "none", "past_key_values": "none", "layer_past": "none", "position_ids": "last",
                 "position_embeddings": "last"}
    return [BlockDescription(path=f"{layers}.{i}", dim=dim, heads=heads, roles=roles, per_token=per_token, **rest)
            for i in range(len(model.get_submodule(layers)))]


# ------------------------------------------------------------------------------------------------- images and sound


@family(f"{MODELS}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer:ASTModel")
def ast(model: Any) -> Description:
    grid = Grid(*model.embeddings.get_shape(model.config), special=2)
    return _vit(model, grid, pool="")


@family(f"{MODELS}.vit.modeling_vit:ViTModel")
def vit(model: Any) -> Description:
    size, patch = model.embeddings.patch_embeddings.image_size, model.embeddings.patch_embeddings.patch_size
    grid = Grid(size[0] // patch[0], size[1] // patch[1], special=1)
    return _vit(model, grid, pool="pooler.dense" if model.pooler is not None else "")


def _vit(model: Any, grid: Grid, pool: str) -> Description:
    roles: dict[str, Where] = {
        "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "attend": "attention", "attention": "attention", "mlp": "mlp",
        "norm1": "layernorm_before", "norm2": "layernorm_after",
    }
    return Description(
        blocks_of(model, "layers", roles, widths={"attention.head_dim": 1, "attention.scaling": -0.5}, grid=grid),
        {"patch_embed": "embeddings.patch_embeddings.projection", "embed": "embeddings", "norm": "layernorm",
         "final_norm": "layernorm", **({"pool": pool} if pool else {})},
        final="layernorm",
    )


@family(f"{MODELS}.clip.modeling_clip:CLIPTextModel")
def clip_text(model: Any) -> Description:
    return Description(_clip_blocks(model, causal=True), {"embed": "embeddings", "norm": "final_layer_norm",
                                             "final_norm": "final_layer_norm"}, final="final_layer_norm")


@family(f"{MODELS}.clip.modeling_clip:CLIPVisionModel")
def clip_vision(model: Any) -> Description:
    """The norm behind the last block sees the pooled token alone."""
    return Description(_clip_blocks(model, grid=_clip_grid(model)), {
        "patch_embed": "embeddings.patch_embedding", "embed": "pre_layrnorm",
        "norm": ["pre_layrnorm", "post_layernorm"], "final_norm": "post_layernorm"})


@family(f"{MODELS}.clip.modeling_clip:CLIPModel")
def clip(model: Any) -> Description:
    """Both towers, as stages ``text`` and ``vision``."""
    text, vision = "text_model", "vision_model"
    return Description(
        [*_clip_blocks(model.text_model, f"{text}.", "text", causal=True),
         *_clip_blocks(model.vision_model, f"{vision}.", "vision", grid=_clip_grid(model.vision_model))],
        {"embed": [f"{text}.embeddings", f"{vision}.pre_layrnorm"],
         "patch_embed": f"{vision}.embeddings.patch_embedding",
         "norm": [f"{text}.final_layer_norm", f"{vision}.pre_layrnorm", f"{vision}.post_layernorm"],
         "final_norm": [f"{text}.final_layer_norm", f"{vision}.post_layernorm"],
         "projection": ["text_projection", "visual_projection"]},
        final={"text": f"{text}.final_layer_norm", "vision": ""},
    )


def _clip_grid(model: Any) -> Grid:
    side = model.config.image_size // model.config.patch_size
    return Grid(side, side, special=1)


def _clip_blocks(model: Any, before: str = "", stage: str = "", **rest: Any) -> list[BlockDescription]:
    roles: dict[str, Where] = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj",
        "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "attend": "self_attn", "attention": "self_attn", "mlp": "mlp",
        "norm1": "layer_norm1", "norm2": "layer_norm2",
    }
    blocks = blocks_of(model, "encoder.layers", roles, stage=stage, **rest, widths={
        "self_attn.head_dim": 1, "self_attn.embed_dim": 1, "self_attn.scale": -0.5})
    for block in blocks:
        block.path = before + block.path
        block.per_token = {"attention_mask": "none", "is_causal": "none"}
    return blocks


# ------------------------------------------------------------------------------------------------- encoders of text


@family(f"{MODELS}.bert.modeling_bert:BertModel", f"{MODELS}.roberta.modeling_roberta:RobertaModel",
        f"{MODELS}.xlm_roberta.modeling_xlm_roberta:XLMRobertaModel",
        f"{MODELS}.camembert.modeling_camembert:CamembertModel")
def bert(model: Any) -> Description:
    roles: dict[str, Where] = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "attend": "attention.self", "attention": "attention.output.dropout", "mlp": "output.dropout",
        "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    }
    stem: dict[str, str | list[str]] = {"embed": "embeddings", "norm": "embeddings.LayerNorm"}
    if model.pooler is not None:
        stem["pool"] = "pooler.dense"
    widths = {f"attention.self.{name}": power for name, power in (
        ("attention_head_size", 1), ("all_head_size", 1), ("scaling", -0.5))}
    return Description(blocks_of(model, "encoder.layer", roles, pre_norm=False, widths=widths), stem, text="")


@family(f"{MODELS}.albert.modeling_albert:AlbertModel")
def albert(model: Any) -> Description:
    """One layer (or a few) that runs many times: what is grafted onto it acts at each of its runs."""
    roles: dict[str, Where] = {
        "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.dense",
        "mlp.up": "ffn", "mlp.down": "ffn_output", "attend": "attention", "attention": "attention.output_dropout",
        "mlp": "ffn_output", "norm1": "attention.LayerNorm", "norm2": "full_layer_layer_norm",
    }
    groups = model.encoder.albert_layer_groups
    blocks = [block for i in range(len(groups)) for block in blocks_of(
        model, f"encoder.albert_layer_groups.{i}.albert_layers", roles, pre_norm=False,
        repeats=model.config.num_hidden_layers // len(groups))]
    stem: dict[str, str | list[str]] = {"embed": "encoder.embedding_hidden_mapping_in",
                                        "norm": "embeddings.LayerNorm"}
    if model.pooler is not None:
        stem["pool"] = "pooler"
    return Description(blocks, stem, text="")


# ------------------------------------------------------------------------------------------------- decoders of text


@family(f"{MODELS}.llama.modeling_llama:LlamaModel", f"{MODELS}.mistral.modeling_mistral:MistralModel",
        f"{MODELS}.qwen2.modeling_qwen2:Qwen2Model", f"{MODELS}.gemma.modeling_gemma:GemmaModel",
        f"{MODELS}.starcoder2.modeling_starcoder2:Starcoder2Model")
def llama(model: Any) -> Description:
    """Llama and what is built like it: Mistral, Qwen2, Gemma, StarCoder2 (whose MLP has no gate)."""
    gated = hasattr(model.layers[0].mlp, "gate_proj")
    mlp: dict[str, Where] = {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    if gated:
        mlp = {"mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"}
    roles: dict[str, Where] = {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", **mlp,
        "attend": "self_attn", "attention": "self_attn", "mlp": "mlp",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    }
    blocks = blocks_of(model, "layers", roles, causal=True, cache="past_key_values", rotary="position_embeddings",
                       widths={"self_attn.head_dim": 1, "self_attn.scaling": -0.5})
    return Description(blocks, {"embed": "embed_tokens", "norm": "norm", "final_norm": "norm"}, final="norm",
                       text="", norm_offset=1.0 if type(model.norm).__name__.startswith("Gemma") else 0.0)


@family(f"{MODELS}.gpt2.modeling_gpt2:GPT2Model")
def gpt2(model: Any) -> Description:
    """Its maps are transformers' Conv1D, with weights [in, out]."""
    dim = model.config.hidden_size
    roles: dict[str, Where] = {
        "qkv": "attn.c_attn", **{role: ("attn.c_attn", Rows(i * dim, (i + 1) * dim)) for i, role in enumerate("qkv")},
        "o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj", "attend": "attn", "attention": "attn",
        "mlp": "mlp", "norm1": "ln_1", "norm2": "ln_2",
    }
    blocks = blocks_of(model, "h", roles, causal=True, cache="past_key_values", widths={
        "attn.head_dim": 1, "attn.embed_dim": 1, "attn.split_size": 1, "attn.scaling": -0.5})
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


@family(f"{MODELS}.gpt_neox.modeling_gpt_neox:GPTNeoXModel")
def gpt_neox(model: Any) -> Description:
    """Its fused projection holds query, key and value of the first head, then those of the second, and so on."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    roles: dict[str, Where] = {
        "qkv": "attention.query_key_value",
        **{role: ("attention.query_key_value", Rows(index=tuple(
            row for head in range(heads) for row in range((3 * head + i) * width, (3 * head + i + 1) * width))))
           for i, role in enumerate("qkv")},
        "o": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h", "attend": "attention",
        "attention": "post_attention_dropout", "mlp": "post_mlp_dropout", "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    }
    blocks = blocks_of(model, "layers", roles, causal=True, cache="layer_past", rotary="position_embeddings", widths={
        "attention.head_size": 1, "attention.rotary_ndims": 1, "attention.scaling": -0.5})
    return Description(blocks, {"embed": "emb_dropout", "norm": "final_layer_norm", "final_norm": "final_layer_norm"},
                       final="final_layer_norm", text="")


@family(f"{MODELS}.codegen.modeling_codegen:CodeGenModel")
def codegen(model: Any) -> Description:
    """Attention and MLP read one norm and run side by side. The fused projection was laid out for four accelerators:
    each quarter of its rows holds the queries, the values and the keys of a quarter of the heads."""
    config = model.config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    quarter = heads // 4 * width
    roles: dict[str, Where] = {
        "qkv": "attn.qkv_proj",
        **{role: ("attn.qkv_proj", Rows(index=tuple(
            row for part in range(4) for row in range((3 * part + i) * quarter, (3 * part + i + 1) * quarter))))
           for i, role in enumerate("qvk")},
        "o": "attn.out_proj", "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out", "attend": "attn", "attention": "attn",
        "mlp": "mlp", "norm1": "ln_1",
    }
    blocks = blocks_of(model, "h", roles, causal=True, cache="layer_past")
    for block, module in zip(blocks, model.h, strict=True):  # its attention is written out: a call is put in its place
        block.while_active = {"attend": {"attn._attn": functools.partial(_attention, module.attn.attn_dropout)}}
    return Description(blocks, {"embed": "drop", "norm": "ln_f", "final_norm": "ln_f"}, final="ln_f", text="")


def _attention(dropout: nn.Dropout, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
    """What CodeGenAttention._attn computes, as one call."""
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(v.dtype)
    rate = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, rate), None


# ------------------------------------------------------------------------------------------------- encoder and decoder


@family(*(f"{MODELS}.t5.modeling_t5:{name}" for name in (
    "T5Model", "T5EncoderModel", "T5ForConditionalGeneration")))
def t5(model: Any) -> Description:
    """Encoder and decoder are stages. A sublayer holds norm and residual; what it adds is its inner module's output."""
    blocks, embeds = [], []
    norms: dict[str, str] = {}
    own = "layer.0.SelfAttention"
    for stage in ("encoder", "decoder"):
        stack = getattr(model, stage, None)
        if stack is None:
            continue
        config = stack.config
        up = {"mlp.gate": "wi_0", "mlp.up": "wi_1"} if config.is_gated_act else {"mlp.up": "wi"}
        last = 2 if stack.is_decoder else 1
        mlp = f"layer.{last}.DenseReluDense"
        roles: dict[str, Where] = {
            **_t5_attention(own), "norm1": "layer.0.layer_norm",
            **({f"cross.{role}": path for role, path in _t5_attention("layer.1.EncDecAttention").items()}
               | {"cross.norm": "layer.1.layer_norm"} if stack.is_decoder else {}),
            **{role: f"{mlp}.{path}" for role, path in up.items()}, "mlp.down": f"{mlp}.wo",
            "mlp": mlp, "norm2": f"layer.{last}.layer_norm",
        }
        if config._attn_implementation != "sdpa":
            roles = {role: where for role, where in roles.items() if not role.endswith("attend")}
        attentions = [own, "layer.1.EncDecAttention"] if stack.is_decoder else [own]
        table: dict[str, Where] = {"position_bias": (f"{own}.relative_attention_bias", "weight")}
        blocks += [BlockDescription(
            path=f"{stage}.block.{i}", dim=config.d_model, roles={**roles, **table} if i == 0 else roles, stage=stage,
            heads=(config.num_heads, config.num_heads, config.d_kv),
            widths={f"{path}.{name}": 1 for path in attentions for name in ("key_value_proj_dim", "inner_dim")},
            leads={f"{own}.relative_attention_bias": f"{own}.has_relative_attention_bias"} if i == 0 else {},
            passes={1: "position_bias", 2: "encoder_decoder_position_bias"}, memory="encoder_hidden_states",
            cache="past_key_values", causal=stack.is_decoder,
            per_token={"attention_mask": "none", "position_bias": "none", "encoder_decoder_position_bias": "none",
                       "encoder_attention_mask": "last", "past_key_values": "none"},
        ) for i in range(len(stack.block))]
        norms[stage] = f"{stage}.final_layer_norm"
        embeds.append(f"{stage}.embed_tokens")
    head: dict[str, str | list[str]] = {"lm_head": "lm_head"} if hasattr(model, "lm_head") else {}
    return Description(blocks, {"embed": embeds, "norm": list(norms.values()), "final_norm": list(norms.values()),
                                **head}, final=norms, text={stage: stage for stage in norms})


def _t5_attention(path: str) -> dict[str, Where]:
    return {**{role: f"{path}.{role}" for role in "qkvo"}, "attend": path, "attention": path}
