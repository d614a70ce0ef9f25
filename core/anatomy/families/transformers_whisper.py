"""Whisper of transformers: an encoder of sound, and a decoder of text with cross-attention."""

from __future__ import annotations

from typing import Any

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Grid

MODULE = "transformers.models.whisper.modeling_whisper"

Stem = dict[str, str | list[str]]


@family(f"{MODULE}:WhisperModel")
def whisper(model: Any) -> Description:
    """Encoder and decoder are stages."""
    blocks = _blocks(model.encoder, "encoder.", "encoder") + _blocks(model.decoder, "decoder.", "decoder")
    norms = {"encoder": "encoder.layer_norm", "decoder": "decoder.layer_norm"}
    stem: Stem = {"patch_embed": ["encoder.conv1", "encoder.conv2"], "embed": "decoder.embed_tokens"}
    stem |= {"norm": list(norms.values()), "final_norm": list(norms.values())}
    return Description(blocks, stem, final=norms, text={"decoder": "decoder"})


@family(f"{MODULE}:WhisperEncoder")
def whisper_encoder(model: Any) -> Description:
    """The encoder of sound [batch, mels, frames] alone, as classifiers of sound have it."""
    stem: Stem = {"patch_embed": ["conv1", "conv2"], "norm": "layer_norm", "final_norm": "layer_norm"}
    return Description(_blocks(model), stem, final="layer_norm")


@family(f"{MODULE}:WhisperDecoder")
def whisper_decoder(model: Any) -> Description:
    """The decoder alone, as the language model has it; without states of an encoder it leaves cross-attention out."""
    stem: Stem = {"embed": "embed_tokens", "norm": "layer_norm", "final_norm": "layer_norm"}
    return Description(_blocks(model), stem, final="layer_norm", text="")


def _blocks(stack: Any, before: str = "", stage: str = "") -> list[BlockDescription]:
    """The blocks of one stack, whose path begins with ``before``."""
    is_decoder = hasattr(stack, "embed_tokens")
    # Two convolutions make the frames half as many tokens: a grid of one row.
    grid = None if is_decoder else Grid(1, stack.max_source_positions)
    roles = _roles(stack.config, is_decoder)
    widths: dict[str, float] = {}
    for path in ["self_attn", "encoder_attn"] if is_decoder else ["self_attn"]:
        widths |= {f"{path}.head_dim": 1, f"{path}.embed_dim": 1, f"{path}.scaling": -0.5}
    per_token = {"attention_mask": "none", "past_key_values": "none"}
    blocks = []
    for i, layer in enumerate(stack.layers):
        heads, width = layer.self_attn.num_heads, layer.self_attn.head_dim
        block = BlockDescription(
            path=f"{before}layers.{i}",
            dim=layer.embed_dim,
            heads=(heads, heads, width),
            roles=roles,
            stage=stage,
            per_token=per_token,
            widths=widths,
            memory="encoder_hidden_states" if is_decoder else "",
            cache="past_key_values" if is_decoder else "",
            grid=grid,
            causal=is_decoder,
        )
        blocks.append(block)
    return blocks


def _roles(config: Any, is_decoder: bool) -> dict[str, Where]:
    """The roles in every block of a stack."""
    roles = _attention("self_attn")
    roles["norm1"] = "self_attn_layer_norm"
    if is_decoder:
        for role, where in _attention("encoder_attn").items():
            roles[f"cross.{role}"] = where
        roles["cross.norm"] = "encoder_attn_layer_norm"
    # The MLP is no module, but its last map's output is what is added.
    roles |= {"mlp.up": "fc1", "mlp.down": "fc2", "mlp": "fc2", "norm2": "final_layer_norm"}
    if config._attn_implementation == "sdpa":
        return roles
    # The verb `attend` rewrites the call of torch's attention, which other implementations do not make.
    return {role: where for role, where in roles.items() if not role.endswith("attend")}


def _attention(path: str) -> dict[str, Where]:
    """The roles of an attention."""
    roles: dict[str, Where] = {role: f"{path}.{role}_proj" for role in "qkv"}
    return {**roles, "o": f"{path}.out_proj", "attend": path, "attention": path}
