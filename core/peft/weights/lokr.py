"""LoKr: a Kronecker product as the change of a weight (Yeh et al. 2023, arXiv:2309.14859, LyCORIS)."""

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
from core.method.options import positive


def split(width: int, factor: int = -1) -> tuple[int, int]:
    """``width`` as a product (a, b), a <= b: of the pairs nearest to a square, or with a at most ``factor``."""
    bound = math.isqrt(width) if factor < 1 else min(factor, math.isqrt(width))
    small = next(a for a in range(bound, 0, -1) if width % a == 0)
    return small, width // small


class LoKrGraft(Graft):
    """W + scale C (x) (B A), the Kronecker product of C [out_1, in_1] and B A [out_2, in_2]; B A is one matrix where
    that is smaller."""

    remade = True

    def __init__(self, site: Site, rank: int, scale: float, factor: int) -> None:
        super().__init__(site)
        (out_1, out_2), (in_1, in_2) = split(site.out_features, factor), split(site.in_features, factor)
        self.C = nn.Parameter(torch.zeros(out_1, in_1))
        if rank < max(out_2, in_2) / 2:
            self.B = nn.Parameter(torch.empty(out_2, rank))
            self.A = nn.Parameter(torch.empty(rank, in_2))
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        else:
            self.B, self.A = None, nn.Parameter(torch.empty(out_2, in_2))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale

    def weight(self, weight: Tensor) -> Tensor:
        inner = self.A if self.B is None else self.B @ self.A
        return weight + (self.scale * torch.kron(self.C, inner)).to(weight.dtype)


class LoKr(PEFTMethod):
    """A change that is the Kronecker product of a small matrix and a low-rank one.

    Equation: y = (W + (alpha / rank) C (x) (B A)) x + b, C [out_1, in_1] zeros, B [out_2, rank] and A [rank, in_2]
        Kaiming-uniform (a = sqrt 5), out = out_1 out_2 and in = in_1 in_2, nearest to squares
    Trains: out_1 in_1 + rank (out_2 + in_2) a target; BERT-base, q and v, rank 8: 26,112
    Merges: W + (alpha / rank) C (x) (B A)
    Source: Yeh et al. 2023, arXiv:2309.14859, section 3 (LyCORIS); where B A would not be smaller than one matrix
        [out_2, in_2], it is that; the learning rate is LoRA's here, divided by five

    Args:
        rank: rank of the inner matrix, at least 1.
        alpha: numerator of the scale, positive; None is the rank.
        factor: largest small factor of a width; -1 splits as near to a square as can be.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    structure_types = {"scales_whole": bool}
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, rank: int = 8, alpha: float | None = None, factor: int = -1,
                 targets: Sequence[str] | None = ("q", "v"), **common: Any) -> None:
        super().__init__(**common)
        if rank < 1 or (factor < 1 and factor != -1):
            raise ScionError(f"LoKr: rank {rank} must be at least 1, factor {factor} at least 1 or -1")
        positive("LoKr", alpha=alpha)
        self.rank, self.alpha, self.factor = rank, rank if alpha is None else alpha, factor
        self.targets = None if targets is None else tuple(targets)
        self.scales_whole = True
        """Whether whole inner matrices are multiplied by alpha / rank too; not so in files of earlier versions."""

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"scales_whole": True}

    def structure(self) -> dict[str, Any]:
        return {"scales_whole": True} if self.scales_whole else {}

    def restructure(self, structure: dict[str, Any]) -> None:
        self.scales_whole = structure.get("scales_whole", False)
        for graft in self.grafts:
            if isinstance(graft, LoKrGraft) and graft.B is None:
                graft.scale = self.alpha / self.rank if self.scales_whole else 1.0

    def build(self, site: Site) -> Graft:
        return LoKrGraft(site, self.rank, self.alpha / self.rank, self.factor)
