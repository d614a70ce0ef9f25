"""LoRA: a low-rank change beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod


class LoRAGraft(Graft):
    """y + (alpha / rank) B A dropout(x), with A [rank, in] and B [out, rank]."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.site.low_rank(self.dropout(x.to(self.A.dtype)), self.A, self.B, self.scale)
        return self.site.put(y, self.site.take(y) + delta)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ self.A).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.scale * self.B, self.A


class LoRA(PEFTMethod):
    """A low-rank change beside a frozen weight: linear maps, Conv1D, convolutions, and parts of a fused projection.

    Equation: y = W x + b + (alpha / rank) B A dropout(x); A [rank, in] Kaiming-uniform (a = sqrt 5), B [out, rank]
        zeros
    Trains: rank (in + out) a target; ViT-B/16 or BERT-base, q and v, rank 8: 294,912
    Merges: W + (alpha / rank) B A
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks. q, k, v of a fused projection get a change of
            their own each; ``qkv`` gets one.
    """

    mergeable = True
    recommended = {"lr": 5e-3, "weight_decay": 0.1}

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), **common: Any) -> None:
        super().__init__(**common)
        if rank < 1:
            raise ScionError(f"{type(self).__name__}: rank {rank} must be at least 1")
        if not 0 <= dropout < 1:
            raise ScionError(f"{type(self).__name__}: dropout {dropout} must lie in [0, 1)")
        self.rank, self.dropout = rank, dropout
        self.targets = None if targets is None else tuple(targets)
        self.alpha = rank if alpha is None else alpha

    def check(self, anatomy: Anatomy) -> None:
        self.need_linear(anatomy)

    def build(self, site: Site) -> Graft:
        return LoRAGraft(site, self.rank, self.alpha / self.rank, self.dropout)


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """|M M^T - I| of each matrix M: how far its rows are from orthonormal ones."""
    grams = [m @ m.t() for m in matrices]
    return torch.stack([(gram - torch.eye(len(gram)).to(gram)).norm() for gram in grams])
