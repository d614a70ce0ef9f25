"""Families of transformers whose blocks are all alike: images, sound, encoders of text. Causal language models are in
`core.anatomy.families.transformers_decoders`, T5 is in `core.anatomy.families.transformers_t5`."""

from __future__ import annotations

from typing import Any

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Grid

MODELS = "transformers.models"


def blocks_of(model: Any, layers: str, roles: dict[str, Where], dim: int = 0, **rest: Any) -> list[BlockDescription]:
    """Blocks that are all alike, with what transformers' configurations say of them."""
    config = model.config
    if config._attn_implementation != "sdpa" and model._supports_sdpa:
        # The verb `attend` rewrites the call of torch's attention, which other implementations do not make.
        roles = {role: where for role, where in roles.items() if role != "attend"}
    dim = dim or config.hidden_size
    query_heads = config.num_attention_heads
    # Not every configuration has these two, and some have them as None.
    key_heads = getattr(config, "num_key_value_heads", None) or query_heads
    width = getattr(config, "head_dim", None) or dim // query_heads
    per_token = {"attention_mask": "none", "past_key_values": "none", "layer_past": "none"}
    per_token |= {"position_ids": "last", "position_embeddings": "last"}
    blocks = []
    for i in range(len(model.get_submodule(layers))):
        block = BlockDescription(
            path=f"{layers}.{i}",
            dim=dim,
            heads=(query_heads, key_heads, width),
            roles=roles,
            per_token=per_token,
            **rest,
        )
        blocks.append(block)
    return blocks


# ------------------------------------------------------------------------------------------------- images and sound


@family(f"{MODELS}.audio_spectrogram_transformer.modeling_audio_spectrogram_transformer:ASTModel")
def ast(model: Any) -> Description:
    """AST, a ViT on spectrograms."""
    shape = model.embeddings.get_shape(model.config)
    grid = Grid(*shape, special=2)  # a class token and a distillation token, as in DeiT
    return _vit(model, grid, pool="")


@family(f"{MODELS}.vit.modeling_vit:ViTModel")
def vit(model: Any) -> Description:
    """ViT of transformers, with or without a pooler."""
    patches = model.embeddings.patch_embeddings
    size, patch = patches.image_size, patches.patch_size
    grid = Grid(size[0] // patch[0], size[1] // patch[1], special=1)
    pool = "pooler.dense" if model.pooler is not None else ""
    return _vit(model, grid, pool)


def _vit(model: Any, grid: Grid, pool: str) -> Description:
    roles: dict[str, Where] = {}
    roles |= {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"}
    roles |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    roles |= {"attend": "attention", "attention": "attention", "mlp": "mlp"}
    roles |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
    widths = {"attention.head_dim": 1, "attention.scaling": -0.5}
    blocks = blocks_of(model, "layers", roles, widths=widths, grid=grid)
    stem: dict[str, str | list[str]] = {"patch_embed": "embeddings.patch_embeddings.projection"}
    stem |= {"embed": "embeddings", "norm": "layernorm", "final_norm": "layernorm"}
    if pool:
        stem["pool"] = pool
    return Description(blocks, stem, final="layernorm")


@family(f"{MODELS}.clip.modeling_clip:CLIPTextModel")
def clip_text(model: Any) -> Description:
    """CLIP's text tower by itself."""
    blocks = _clip_blocks(model, causal=True)
    norm = "final_layer_norm"
    return Description(blocks, {"embed": "embeddings", "norm": norm, "final_norm": norm}, final=norm)


@family(f"{MODELS}.clip.modeling_clip:CLIPVisionModel")
def clip_vision(model: Any) -> Description:
    """CLIP's image tower by itself. The norm behind the last block sees only the pooled token."""
    blocks = _clip_blocks(model, grid=_clip_grid(model))
    # transformers spells this norm without its "e", and checkpoints hold it by that name.
    stem: dict[str, str | list[str]] = {"patch_embed": "embeddings.patch_embedding", "embed": "pre_layrnorm"}
    stem["norm"] = ["pre_layrnorm", "post_layernorm"]
    stem["final_norm"] = "post_layernorm"
    return Description(blocks, stem)


@family(f"{MODELS}.clip.modeling_clip:CLIPModel")
def clip(model: Any) -> Description:
    """Both towers, as stages ``text`` and ``vision``."""
    grid = _clip_grid(model.vision_model)
    blocks = _clip_blocks(model.text_model, "text_model.", "text", causal=True)
    blocks += _clip_blocks(model.vision_model, "vision_model.", "vision", grid=grid)
    text_norm = "text_model.final_layer_norm"
    first_norm = "vision_model.pre_layrnorm"
    last_norm = "vision_model.post_layernorm"
    stem: dict[str, str | list[str]] = {"embed": ["text_model.embeddings", first_norm]}
    stem["patch_embed"] = "vision_model.embeddings.patch_embedding"
    stem["norm"] = [text_norm, first_norm, last_norm]
    stem["final_norm"] = [text_norm, last_norm]
    stem["projection"] = ["text_projection", "visual_projection"]
    return Description(blocks, stem, final={"text": text_norm, "vision": ""})


def _clip_grid(model: Any) -> Grid:
    side = model.config.image_size // model.config.patch_size
    return Grid(side, side, special=1)


def _clip_blocks(model: Any, before: str = "", stage: str = "", **rest: Any) -> list[BlockDescription]:
    """The blocks of one of CLIP's towers, whose path begins with ``before``."""
    roles: dict[str, Where] = {}
    roles |= {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
    roles |= {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    roles |= {"attend": "self_attn", "attention": "self_attn", "mlp": "mlp"}
    roles |= {"norm1": "layer_norm1", "norm2": "layer_norm2"}
    widths = {"self_attn.head_dim": 1, "self_attn.embed_dim": 1, "self_attn.scale": -0.5}
    blocks = blocks_of(model, "encoder.layers", roles, stage=stage, **rest, widths=widths)
    for block in blocks:
        block.path = before + block.path
        block.per_token = {"attention_mask": "none", "is_causal": "none"}
    return blocks


# ------------------------------------------------------------------------------------------------- encoders of text


@family(f"{MODELS}.bert.modeling_bert:BertModel", f"{MODELS}.roberta.modeling_roberta:RobertaModel",
        f"{MODELS}.xlm_roberta.modeling_xlm_roberta:XLMRobertaModel",
        f"{MODELS}.camembert.modeling_camembert:CamembertModel")
def bert(model: Any) -> Description:
    """BERT and what is built like it: RoBERTa, XLM-RoBERTa, CamemBERT."""
    stem: dict[str, str | list[str]] = {"embed": "embeddings", "norm": "embeddings.LayerNorm"}
    if model.pooler is not None:
        stem["pool"] = "pooler.dense"
    return Description(bert_blocks(model), stem, text="")


def bert_blocks(model: Any) -> list[BlockDescription]:
    """The blocks of BERT, which other models have as well."""
    roles: dict[str, Where] = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"}
    roles["o"] = "attention.output.dense"
    roles |= {"mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    # The modules named "output" add the residual and apply the norm themselves; what they add leaves their dropout.
    roles |= {"attend": "attention.self", "attention": "attention.output.dropout", "mlp": "output.dropout"}
    roles |= {"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"}
    own = "attention.self"
    widths = {f"{own}.attention_head_size": 1, f"{own}.all_head_size": 1, f"{own}.scaling": -0.5}
    return blocks_of(model, "encoder.layer", roles, pre_norm=False, widths=widths)


@family(f"{MODELS}.albert.modeling_albert:AlbertModel")
def albert(model: Any) -> Description:
    """One layer (or a few) that runs many times: what is grafted onto it acts at each of its runs."""
    roles: dict[str, Where] = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
    roles["o"] = "attention.dense"
    roles |= {"mlp.up": "ffn", "mlp.down": "ffn_output"}
    roles |= {"attend": "attention", "attention": "attention.output_dropout", "mlp": "ffn_output"}
    roles |= {"norm1": "attention.LayerNorm", "norm2": "full_layer_layer_norm"}
    groups = model.encoder.albert_layer_groups
    # The layers of the whole model are shared out among the groups, and a group runs once for each of its share.
    repeats = model.config.num_hidden_layers // len(groups)
    blocks = []
    for i in range(len(groups)):
        layers = f"encoder.albert_layer_groups.{i}.albert_layers"
        blocks += blocks_of(model, layers, roles, pre_norm=False, repeats=repeats)
    # Its embeddings are narrower than its hidden state; the hidden state begins behind this map.
    stem: dict[str, str | list[str]] = {"embed": "encoder.embedding_hidden_mapping_in"}
    stem["norm"] = "embeddings.LayerNorm"
    if model.pooler is not None:
        stem["pool"] = "pooler"
    return Description(blocks, stem, text="")
