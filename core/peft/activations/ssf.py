"""SSF: scale and shift what every operator gives (Lian et al. 2022, arXiv:2210.08823)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import NORMS, Anatomy, Site, renamed
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod

Shift = bool | Literal["possible"] | None


class SSFGraft(Graft):
    """gamma * y + beta, along the channels"""

    reads_output = True

    def __init__(self, site: Site, shift: bool, spread: float) -> None:
        super().__init__(site)
        self.gamma = nn.Parameter(1 + spread * torch.randn(site.out_features))
        self.beta = nn.Parameter(spread * torch.randn(site.out_features)) if shift else None
        self.adds_bias = shift and site.takes_bias

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        shape = [1] * y.dim()
        shape[self.site.channel_axis] = -1
        gamma = self.gamma.view(shape)
        scaled = y * gamma if self.beta is None else torch.addcmul(self.beta.view(shape), y.to(gamma.dtype), gamma)
        return scaled.to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        gamma = self.gamma.to(weight.dtype)
        if weight.dim() > 1:
            return gamma[:, None] * weight
        return gamma * (weight + self.site.offset) - self.site.offset  # a norm's gain

    def merged_bias(self, bias: Tensor) -> Tensor:
        scaled = self.gamma.to(bias.dtype) * bias
        return scaled if self.beta is None else scaled + self.beta.to(bias.dtype)


class SSF(PEFTMethod):
    """A scale and a shift for every channel behind every linear map, convolution and norm.

    Equation: y <- gamma * y + beta; gamma normal (1, 0.02), beta normal (0, 0.02)
    Trains: 2 out an operator, 22 dim a block of a ViT; ViT-B/16: 205,824, Swin-B: 267,264
    Merges: gamma W, gamma b + beta, which makes a bias where there is none; a norm's gain and shift alike
    Source: Lian et al. 2022, arXiv:2210.08823, section 3.2, and the learning rate of most of its VTAB-1k runs. The
        released code never builds the scales behind Swin's patch-merging norms: patch_merging=True does

    Args:
        targets: roles to scale; None is the patch embedding, every norm, and every linear map and convolution of the
            blocks.
        shift: where there is a beta: ``possible`` is everywhere but behind norms that know no bias (by root mean
            square), so that all can be merged; True is there too, None where the operator has a bias, False nowhere.
        init: ``normal`` as published, or ``identity``: ones and zeros.
        patch_merging: whether norms in front of a linear map between two stages are scaled too.
    """

    tags = ("additive", ("scale",))
    identity_at_start = False
    mergeable = True
    recommended = {"lr": 5e-3, "weight_decay": 0.0}

    def __init__(self, targets: Sequence[str] | None = None, shift: Shift = "possible",
                 init: Literal["normal", "identity"] = "normal", patch_merging: bool = False, **common: Any) -> None:
        super().__init__(**common)
        if init not in ("normal", "identity"):
            raise ScionError(f"SSF: init {init!r} must be 'normal' or 'identity'")
        if shift not in (True, False, None, "possible"):
            raise ScionError(f"SSF: shift {shift!r} must be 'possible', true, false or null")
        self.targets = None if targets is None else tuple(targets)
        self.shift, self.init, self.patch_merging = shift, init, patch_merging
        self.identity_at_start = init == "identity"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        roles = self.targets
        if roles is None:
            known = ("patch_embed", *NORMS, *anatomy.linear_roles())
            roles = [role for role in known if role in anatomy.roles]
            if any(site.kind == "conv" for site in anatomy.stem.get("downsample", [])):
                roles.append("downsample")
        found = {site.path: site for site in anatomy.sites(roles, self.layers, self.name)}  # a norm may play two roles
        merging = [block.entry.path for block in anatomy.blocks if block.entry is not None]
        linear = [path for path in merging if not any(
            site.kind == "conv" and site.path.startswith(f"{path}.") for site in anatomy.stem.get("downsample", []))]
        if self.targets is not None:
            return list(found.values())
        left_out = () if self.patch_merging else tuple(f"{start}." for start in linear)
        return [renamed(site, rows=None) for path, site in found.items() if not path.startswith(left_out or ("-",))]

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if getattr(site.module, site.parameter, None) is None:
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) has no weight of its own to "
                                 "scale")
            if site.rows is not None:
                raise ScionError(f"{self.name}: {site.name} is a part of a fused projection; take 'qkv'")

    def shifts(self, site: Site) -> bool:
        """Whether there is a beta at a site."""
        if self.shift == "possible":
            return site.takes_bias
        return site.bias is not None if self.shift is None else bool(self.shift)

    def build(self, site: Site) -> Graft:
        return SSFGraft(site, self.shifts(site), 0.02 if self.init == "normal" else 0.0)
