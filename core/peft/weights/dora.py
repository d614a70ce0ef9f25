"""DoRA: magnitude and direction of a weight apart (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.graft import Graft
from core.method import PEFTMethod
from core.method.low_rank import LowRankMethod
from core.peft.weights.lora import LoRAGraft


class DoRAGraft(LoRAGraft):
    """t + (g - 1) (t - b), with t = W x + b + s B A x, and g = m / ||W + s B A|| for each output.

    The same function as m (W + s B A) x / ||W + s B A|| + b, written so that W x is not computed again and an unchanged
    weight gives y to the last bit. Its strength multiplies s: the magnitude stays.
    """

    reads_weight = True
    heeds_strength = True

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale, dropout)
        self.magnitude = nn.Parameter(self._norm())

    @property
    def s(self) -> float:
        """The scale of B A."""
        return self.strength * self.scale

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """||W + s B A|| of each row; it counts as a constant in backward (section 4.3)."""
        weight = self.site.matrix(self.site.full_weight)
        wide = torch.promote_types(weight.dtype, self.A.dtype)
        return torch.addmm(weight.to(wide), self.B.to(weight.device, wide), self.A.to(weight.device, wide),
                           alpha=self.s).norm(dim=1)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.site.take(y) + self.site.low_rank(self.dropout(x.to(self.A.dtype)), self.A, self.B, self.s)
        mapped = out if self.site.bias is None else out - self.site.per_channel(self.site.bias)
        gain = self.site.per_channel(self.magnitude / self._norm() - 1).to(out.dtype)
        return self.site.put(y, torch.addcmul(out, gain, mapped))

    def merged(self, weight: Tensor) -> Tensor:
        return (self.magnitude / self._norm()).to(weight.dtype)[:, None] * super().merged(weight)

    def factors(self) -> None:
        return None


class DoRA(LowRankMethod, PEFTMethod):
    """LoRA on the direction of a weight, and a trained magnitude for each output.

    Equation: y = m (W + s B A) x / ||W + s B A|| + b, norm of each row, constant in backward; m starts as ||W||
    Trains: rank (in + out) + out a target; BERT-base, q and v, rank 8: 313,344
    Merges: m (W + s B A) / ||W + s B A||
    Source: Liu et al. 2024, arXiv:2402.09353, equations 5, 6 and 11

    Args:
        rank: rank of the change of direction, at least 1.
        alpha: numerator of the scale s = alpha / rank; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt.
    """

    tags = ("reparameterised", ("linear",))


    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, **common)

    def build(self, site: Site) -> Graft:
        return DoRAGraft(site, self.rank, self.alpha / self.rank, self.dropout)
