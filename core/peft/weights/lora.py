"""LoRA: a low-rank change beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.method import PEFTMethod
from core.method.low_rank import LowRankMethod
from core.peft.weights._principal import PrincipalGraft


class LoRAGraft(AdditiveGraft):
    """y + (alpha / rank) B A dropout(x), with A [rank, in] and B [out, rank]."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self, x: Tensor) -> Tensor:
        return self.site.low_rank(self.dropout(x.to(self.A.dtype)), self.A, self.B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.scale * self.B, self.A


class LoRA(LowRankMethod, PEFTMethod):
    """A low-rank change beside a frozen weight: linear maps, Conv1D, convolutions, and parts of a fused projection.

    Equation: y = W x + b + (alpha / rank) B A dropout(x); A [rank, in] Kaiming-uniform (a = sqrt 5), B [out, rank]
        zeros
    Trains: rank (in + out) a target; ViT-B/16 or BERT-base, q and v, rank 8: 294,912
    Merges: W + (alpha / rank) B A
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; learning rate of Cappellazzo et al. 2024 (PETL-AST).
        ``rsLoRA``, ``LoRAPlus`` and ``PiSSA`` are this method with other defaults

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale, positive; None is the rank.
        dropout: probability of dropping an input of the change, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks. q, k, v of a fused projection get a change of
            their own each; ``qkv`` gets one.
        root: whether the scale is alpha / sqrt(rank).
        start: ``random``, or ``principal``: A_0 and B_0 are the first singular directions of W, and the change is
            B A - B_0 A_0.
        lr_ratio: learning rate of B as a multiple of A's.
    """

    tags = ("reparameterised", ("linear",))
    former_options = {}

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), root: bool = False,
                 start: Literal["random", "principal"] = "random", lr_ratio: float = 1.0, **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, **common)
        if start not in ("random", "principal") or lr_ratio <= 0:
            raise ScionError(f"{type(self).__name__}: start {start!r} must be 'random' or 'principal', lr_ratio "
                             f"{lr_ratio} positive")
        self.scale = self.alpha / (math.sqrt(rank) if root else rank)
        self.is_principal, self.lr_ratio = start == "principal", lr_ratio

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy) if self.is_principal else ():
            if self.rank > min(site.in_features, site.out_features):
                raise ScionError(f"{self.name}: rank {self.rank} is more than the {site.out_features} x "
                                 f"{site.in_features} weight at {site.name} has")

    def build(self, site: Site) -> Graft:
        graft = PrincipalGraft if self.is_principal else LoRAGraft
        return graft(site, self.rank, self.scale, self.dropout)

    def param_groups(self) -> list[dict[str, Any]]:
        groups = super().param_groups()
        if self.lr_ratio == 1:
            return groups
        up = {id(tensor) for name, tensor in self.trainable().items() if name.endswith(".B")}
        found = []
        for group in groups:
            slow = {**group, "params": [p for p in group["params"] if id(p) not in up]}
            fast = {**group, "params": [p for p in group["params"] if id(p) in up], "lr_factor": self.lr_ratio}
            found += [part for part in (slow, fast) if part["params"]]
        return found
