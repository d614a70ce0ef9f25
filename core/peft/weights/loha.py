"""LoHa: the entrywise product of two low-rank maps (Hyeon-Woo et al. 2021, arXiv:2108.06098; LyCORIS)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.graft import Graft
from core.method import PEFTMethod
from core.method.options import at_least, positive


class LoHaGraft(Graft):
    """W + scale (B_1 A_1) * (B_2 A_2), entry by entry."""

    remade = True

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__(site)
        self.B_1 = nn.Parameter(0.1 * torch.randn(site.out_features, rank))
        self.A_1 = nn.Parameter(torch.randn(rank, site.in_features))
        self.B_2 = nn.Parameter(torch.zeros(site.out_features, rank))
        self.A_2 = nn.Parameter(torch.randn(rank, site.in_features))
        self.scale = scale

    def weight(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * (self.B_1 @ self.A_1) * (self.B_2 @ self.A_2)).to(weight.dtype)


class LoHa(PEFTMethod):
    """A change of rank up to rank^2: the entrywise product of two of rank ``rank``.

    Equation: y = (W + (alpha / rank) (B_1 A_1) * (B_2 A_2)) x + b; A_1, A_2 normal (1), B_1 normal (0.1), B_2 zeros
    Trains: 2 rank (in + out) a target; BERT-base, q and v, rank 8: 589,824
    Merges: W + (alpha / rank) (B_1 A_1) * (B_2 A_2)
    Source: Hyeon-Woo et al. 2021, arXiv:2108.06098 (FedPara), proposition 1; start and scale as in LyCORIS; the
        learning rate is LoRA's here, divided by five

    Args:
        rank: rank of each of the two, at least 1.
        alpha: numerator of the scale, positive; None is the rank.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, rank: int = 8, alpha: float | None = None, targets: Sequence[str] | None = ("q", "v"),
                 **common: Any) -> None:
        super().__init__(**common)
        at_least(1, "LoHa", rank=rank)
        positive("LoHa", alpha=alpha)
        self.rank, self.alpha = rank, rank if alpha is None else alpha
        self.targets = None if targets is None else tuple(targets)

    def build(self, site: Site) -> Graft:
        return LoHaGraft(site, self.rank, self.alpha / self.rank)
