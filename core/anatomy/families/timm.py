"""Families of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Grid, Rows

MODELS = "timm.models"

_SUBLAYERS: dict[str, Where] = {"attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "norm1", "norm2": "norm2"}
"""What timm's transformers call the sublayers of a block and their norms."""


def thirds(path: str, width: int) -> dict[str, Where]:
    """A fused projection: whole as ``qkv``, and q, k, v as its contiguous thirds."""
    found: dict[str, Where] = {"qkv": path}
    for i, role in enumerate(("q", "k", "v")):
        found[role] = (path, Rows(i * width, (i + 1) * width))
    return found


def head(model: nn.Module, *paths: str) -> dict[str, str | list[str]]:
    """The task heads at these paths, those that there are."""
    found = [path for path in paths if with_tensors(model, path)]
    return {"head": found} if found else {}


def with_tensors(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` has parameters (an identity has none)."""
    module = model.get_submodule(path)
    return next(module.parameters(), None) is not None


def grid_of(model: Any) -> Grid:
    """The patches, behind the class token and its like."""
    return Grid(*model.patch_embed.grid_size, special=model.num_prefix_tokens)


def _plain_stem(model: nn.Module) -> dict[str, str | list[str]]:
    """The embedding and the norms of a model whose tokens keep their number from the first block to the last."""
    # timm builds every norm that a variant may have, and an identity where this variant has none.
    norms = [name for name in ("norm_pre", "norm", "fc_norm") if with_tensors(model, name)]
    stem: dict[str, str | list[str]] = {"patch_embed": "patch_embed.proj", "embed": "norm_pre"}
    stem["norm"] = norms
    stem["final_norm"] = norms[-1:]
    return stem


# ------------------------------------------------------------------------------------------------- vision transformers


def _fused() -> dict[str, dict[str, Any]]:
    """What must be set while a graft is active at an attention call."""
    # Otherwise the scores are multiplied out, and there is no call that the verb `attend` could rewrite.
    return {"attend": {"attn.fused_attn": True}}


@family(f"{MODELS}.vision_transformer:VisionTransformer")
def timm_vit(model: Any) -> Description:
    """ViT, and what timm builds of it: DeiT, CLIP's and SigLIP's towers, DINOv2, AugReg."""
    blocks = [_vit_block(model, i, block) for i, block in enumerate(model.blocks)]
    heads = [name for name in ("head", "head_dist") if hasattr(model, name)]  # a distilled DeiT has both
    stem = _plain_stem(model)
    stem |= head(model, *heads)
    return Description(blocks, stem, final="norm")


def _vit_block(model: Any, index: int, block: Any) -> BlockDescription:
    attention = block.attn
    heads = attention.num_heads
    roles = thirds("attn.qkv", attention.attn_dim)
    roles["o"] = "attn.proj"
    roles |= mlp_of(block.mlp)
    roles |= _SUBLAYERS
    widths = {"attn.head_dim": 1, "attn.attn_dim": 1, "attn.scale": -0.5}
    return BlockDescription(
        path=f"blocks.{index}",
        dim=attention.qkv.in_features,
        roles=roles,
        heads=(heads, heads, attention.head_dim),
        while_active=_fused(),
        per_token={"attn_mask": "none"},
        widths=widths,
        grid=grid_of(model),
    )


@family(f"{MODELS}.eva:Eva")
def timm_eva(model: Any) -> Description:
    """EVA, EVA-02 and the ViTs with rotary positions that timm builds on the same class."""
    blocks = [_eva_block(model, i, block) for i, block in enumerate(model.blocks)]
    stem = _plain_stem(model)
    stem |= head(model, "head")
    # A model that averages its tokens has fc_norm behind the average instead, outside the sequence.
    final = "norm" if with_tensors(model, "norm") else ""
    return Description(blocks, stem, final=final)


def _eva_block(model: Any, index: int, block: Any) -> BlockDescription:
    attention = block.attn
    width = attention.proj.in_features
    query_heads = attention.num_heads
    key_heads = getattr(attention, "num_kv_heads", query_heads)
    roles = _eva_projections(attention, width)
    roles["o"] = "attn.proj"
    roles |= mlp_of(block.mlp)
    roles |= _SUBLAYERS
    return BlockDescription(
        path=f"blocks.{index}",
        dim=attention.proj.out_features,
        roles=roles,
        heads=(query_heads, key_heads, width // query_heads),
        pre_norm=type(block).__name__ != "EvaBlockPostNorm",
        while_active=_eva_settings(attention),
        per_token={"attn_mask": "none", "rope": "last"},
        grid=grid_of(model),
    )


def _eva_projections(attention: Any, width: int) -> dict[str, Where]:
    """The maps of queries, keys and values: one fused map, or three."""
    if attention.qkv is not None:
        return thirds("attn.qkv", width)
    return {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj"}


def _eva_settings(attention: Any) -> dict[str, dict[str, Any]]:
    """The attributes of EVA's attention that must be set while a graft is active, by role."""
    settings = _fused()
    called: dict[str, Any] = {}
    if getattr(attention, "q_bias", None) is not None:
        # With biases of their own, the forward reads qkv's weight and never calls qkv, unless this is set.
        called = {"attn.qkv_bias_separate": True}
    for role in ("qkv", "q", "k", "v"):
        settings[role] = called
    return settings


def mlp_of(mlp: Any) -> dict[str, Where]:
    """The roles in one of timm's MLPs: plain, gated with maps of their own, or gated with one map for both."""
    down: dict[str, Where] = {"mlp.down": "mlp.fc2"}
    if hasattr(mlp, "fc1_g"):
        return {"mlp.gate": "mlp.fc1_g", "mlp.up": "mlp.fc1_x", **down}
    if hasattr(mlp, "gate_last"):
        half = mlp.fc1.out_features // 2
        gate, up = Rows(0, half), Rows(half, 2 * half)
        if mlp.gate_last:
            gate, up = up, gate
        return {"mlp.gate": ("mlp.fc1", gate), "mlp.up": ("mlp.fc1", up), **down}
    return {"mlp.up": "mlp.fc1", **down}


# ------------------------------------------------------------------------------------------------- models with stages


@family(f"{MODELS}.swin_transformer:SwinTransformer")
def timm_swin(model: Any) -> Description:
    """Swin, whose attention sees shifted windows; between two stages its tokens become a quarter as many."""
    blocks, downsamples = [], []
    norms = ["patch_embed.norm"]
    for s, stage in enumerate(model.layers):
        entry = f"layers.{s}.downsample" if hasattr(stage.downsample, "reduction") else ""
        if entry:
            downsamples.append(f"{entry}.reduction")
            norms.append(f"{entry}.norm")
        for b, block in enumerate(stage.blocks):
            described = _swin_block(block, f"layers.{s}.blocks.{b}", f"stage{s}")
            described.entry = entry if b == 0 else ""
            blocks.append(described)
    norms.append("norm")
    found = [name for name in norms if with_tensors(model, name)]
    stem: dict[str, str | list[str]] = {"patch_embed": "patch_embed.proj", "embed": "patch_embed"}
    stem |= {"downsample": downsamples, "norm": found, "final_norm": "norm"}
    stem |= head(model, "head")
    return Description(blocks, stem, final="norm")


def _swin_block(block: Any, path: str, stage: str) -> BlockDescription:
    attention = block.attn
    heads = attention.num_heads
    width = attention.qkv.out_features // 3
    roles = thirds("attn.qkv", width)
    roles |= {"o": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    roles |= _SUBLAYERS
    # Attention's output still lies window by window; behind this module the windows are one map again.
    roles["attention.branch"] = "drop_path1"
    roles["position_bias"] = ("attn", "relative_position_bias_table")
    return BlockDescription(
        path=path,
        dim=attention.dim,
        roles=roles,
        stage=stage,
        heads=(heads, heads, width // heads),
        while_active=_fused(),
        windows=True,
        widths={"attn.scale": -0.5},
        grid=Grid(*block.input_resolution),
    )


@family(f"{MODELS}.convnext:ConvNeXt")
def timm_convnext(model: Any) -> Description:
    """ConvNeXt and its second version: no attention. A block's states are [batch, channels, height, width], its MLP's
    have their channels last; where they have not (``conv_mlp``) the MLP as a whole plays no role."""
    blocks, downsamples = [], []
    norms = [f"stem.{name}" for name, child in model.stem.named_children() if "Norm" in type(child).__name__]
    for s, stage in enumerate(model.stages):
        entry = f"stages.{s}.downsample" if with_tensors(model, f"stages.{s}.downsample") else ""
        if entry:
            # The downsampling is a sequence of a norm and a convolution.
            norms.append(f"{entry}.0")
            downsamples.append(f"{entry}.1")
        for b, block in enumerate(stage.blocks):
            described = _convnext_block(block, f"stages.{s}.blocks.{b}", f"stage{s}")
            described.entry = entry if b == 0 else ""
            blocks.append(described)
    norms += [name for name in ("norm_pre", "head.norm") if with_tensors(model, name)]
    stem: dict[str, str | list[str]] = {"patch_embed": "stem.0", "downsample": downsamples}
    stem |= {"norm": norms, "final_norm": norms[-1:]}
    stem |= head(model, "head.fc")
    return Description(blocks, stem)


def _convnext_block(block: Any, path: str, stage: str) -> BlockDescription:
    roles: dict[str, Where] = {"conv": "conv_dw", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "norm2": "norm"}
    if not block.use_conv_mlp:
        roles["mlp"] = "mlp"
    dim = block.conv_dw.out_channels
    # Its states are maps already, so the grid's numbers are never read.
    return BlockDescription(path=path, dim=dim, heads=None, roles=roles, stage=stage, grid=Grid(0, 0))
