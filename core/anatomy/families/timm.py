"""Families of timm."""

from __future__ import annotations

from typing import Any

from torch import nn

from core.anatomy.description import BlockDescription, Description, Where, family
from core.anatomy.layout import Grid, Rows

MODELS = "timm.models"


def thirds(path: str, width: int) -> dict[str, Where]:
    """A fused projection: whole as ``qkv``, and q, k, v as its contiguous thirds."""
    return {"qkv": path, **{role: (path, Rows(i * width, (i + 1) * width)) for i, role in enumerate(("q", "k", "v"))}}


def head(model: nn.Module, *paths: str) -> dict[str, str | list[str]]:
    """The task heads at these paths, those that there are."""
    found = [path for path in paths if with_tensors(model, path)]
    return {"head": found} if found else {}


def with_tensors(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` has parameters (an identity has none)."""
    return any(True for _ in model.get_submodule(path).parameters())


@family(f"{MODELS}.vision_transformer:VisionTransformer")
def timm_vit(model: Any) -> Description:
    """ViT, and what timm builds of it: DeiT, CLIP's and SigLIP's towers, DINOv2, AugReg."""
    blocks = []
    for i, block in enumerate(model.blocks):
        attention = block.attn
        roles: dict[str, Where] = {
            **thirds("attn.qkv", attention.attn_dim), "o": "attn.proj", **mlp_of(block.mlp),
            "attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "norm1", "norm2": "norm2",
        }
        blocks.append(BlockDescription(
            path=f"blocks.{i}", dim=attention.qkv.in_features, roles=roles,
            heads=(attention.num_heads, attention.num_heads, attention.head_dim),
            while_active={"attend": {"attn.fused_attn": True}}, per_token={"attn_mask": "none"},
            widths={"attn.head_dim": 1, "attn.attn_dim": 1, "attn.scale": -0.5}, grid=grid_of(model),
        ))
    heads = [name for name in ("head", "head_dist") if hasattr(model, name)]
    norms = [name for name in ("norm_pre", "norm", "fc_norm") if with_tensors(model, name)]
    return Description(blocks, {"patch_embed": "patch_embed.proj", "embed": "norm_pre", "norm": norms,
                                "final_norm": norms[-1:], **head(model, *heads)}, final="norm")


@family(f"{MODELS}.eva:Eva")
def timm_eva(model: Any) -> Description:
    """EVA, EVA-02 and the ViTs with rotary positions that timm builds on the same class."""
    blocks = []
    for i, block in enumerate(model.blocks):
        attention = block.attn
        width = attention.proj.in_features
        fused = attention.qkv is not None
        roles: dict[str, Where] = {
            **(thirds("attn.qkv", width) if fused else {role: f"attn.{role}_proj" for role in "qkv"}),
            "o": "attn.proj", **mlp_of(block.mlp),
            "attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "norm1", "norm2": "norm2",
        }
        # With biases of their own, the forward reads qkv's weight and never calls qkv, unless this is set.
        called = {"attn.qkv_bias_separate": True} if getattr(attention, "q_bias", None) is not None else {}
        blocks.append(BlockDescription(
            path=f"blocks.{i}", dim=attention.proj.out_features, roles=roles,
            heads=(attention.num_heads, getattr(attention, "num_kv_heads", attention.num_heads),
                   width // attention.num_heads),
            pre_norm=type(block).__name__ != "EvaBlockPostNorm",
            while_active={"attend": {"attn.fused_attn": True}, **dict.fromkeys(("qkv", "q", "k", "v"), called)},
            per_token={"attn_mask": "none", "rope": "last"}, grid=grid_of(model),
        ))
    norms = [name for name in ("norm_pre", "norm", "fc_norm") if with_tensors(model, name)]
    return Description(blocks, {"patch_embed": "patch_embed.proj", "embed": "norm_pre", "norm": norms,
                                "final_norm": norms[-1:], **head(model, "head")},
                       final="norm" if with_tensors(model, "norm") else "")


def grid_of(model: Any) -> Grid:
    """The patches, behind the class token and its like."""
    return Grid(*model.patch_embed.grid_size, special=model.num_prefix_tokens)


def mlp_of(mlp: Any) -> dict[str, Where]:
    """The roles in one of timm's MLPs: plain, gated with maps of their own, or gated with one map for both."""
    down: dict[str, Where] = {"mlp.down": "mlp.fc2"}
    if hasattr(mlp, "fc1_g"):
        return {"mlp.gate": "mlp.fc1_g", "mlp.up": "mlp.fc1_x", **down}
    if hasattr(mlp, "gate_last"):
        half = mlp.fc1.out_features // 2
        halves = Rows(0, half), Rows(half, 2 * half)
        gate, up = reversed(halves) if mlp.gate_last else halves
        return {"mlp.gate": ("mlp.fc1", gate), "mlp.up": ("mlp.fc1", up), **down}
    return {"mlp.up": "mlp.fc1", **down}


@family(f"{MODELS}.swin_transformer:SwinTransformer")
def timm_swin(model: Any) -> Description:
    blocks, downsamples, norms = [], [], ["patch_embed.norm"]
    for s, stage in enumerate(model.layers):
        if hasattr(stage.downsample, "reduction"):
            downsamples.append(f"layers.{s}.downsample.reduction")
            norms.append(f"layers.{s}.downsample.norm")
        for b, block in enumerate(stage.blocks):
            attention = block.attn
            width = attention.qkv.out_features // 3
            roles: dict[str, Where] = {
                **thirds("attn.qkv", width), "o": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
                "attend": "attn", "attention": "attn", "mlp": "mlp", "norm1": "norm1", "norm2": "norm2",
                "attention.branch": "drop_path1",
                "position_bias": ("attn", "relative_position_bias_table"),
            }
            blocks.append(BlockDescription(
                path=f"layers.{s}.blocks.{b}", dim=attention.dim, roles=roles, stage=f"stage{s}",
                heads=(attention.num_heads, attention.num_heads, width // attention.num_heads),
                while_active={"attend": {"attn.fused_attn": True}}, windows=True, widths={"attn.scale": -0.5},
                grid=Grid(*block.input_resolution),
                entry=f"layers.{s}.downsample" if b == 0 and hasattr(stage.downsample, "reduction") else "",
            ))
    norms = [name for name in [*norms, "norm"] if with_tensors(model, name)]
    return Description(blocks, {"patch_embed": "patch_embed.proj", "embed": "patch_embed", "downsample": downsamples,
                                "norm": norms, "final_norm": "norm", **head(model, "head")}, final="norm")


@family(f"{MODELS}.convnext:ConvNeXt")
def timm_convnext(model: Any) -> Description:
    """ConvNeXt and its second version: no attention. A block's states are [batch, channels, height, width], its MLP's
    have their channels last; where they have not (``conv_mlp``) the MLP as a whole plays no role."""
    blocks, downsamples = [], []
    norms = [f"stem.{name}" for name, child in model.stem.named_children() if "Norm" in type(child).__name__]
    for s, stage in enumerate(model.stages):
        entry = f"stages.{s}.downsample" if with_tensors(model, f"stages.{s}.downsample") else ""
        if entry:
            norms.append(f"{entry}.0")
            downsamples.append(f"{entry}.1")
        for b, block in enumerate(stage.blocks):
            roles: dict[str, Where] = {"conv": "conv_dw", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2", "norm2": "norm",
                                       **({} if block.use_conv_mlp else {"mlp": "mlp"})}
            blocks.append(BlockDescription(
                path=f"stages.{s}.blocks.{b}", dim=block.conv_dw.out_channels, heads=None, roles=roles,
                stage=f"stage{s}", entry=entry if b == 0 else "", grid=Grid(0, 0),
            ))
    norms += [name for name in ("norm_pre", "head.norm") if with_tensors(model, name)]
    stem: dict[str, str | list[str]] = {"patch_embed": "stem.0", "downsample": downsamples,
                                        "norm": norms, "final_norm": norms[-1:]}
    return Description(blocks, {**stem, **head(model, "head.fc")})
