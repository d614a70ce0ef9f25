"""DoRA: magnitude and direction of a weight apart (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.graft import Graft
from core.peft.weights.lora import LoRA, LoRAGraft


class DoRAGraft(LoRAGraft):
    """y + s B A x + (g - 1) (W x + s B A x), with g = m / ||W + s B A|| for each output.

    The same function as m (W + s B A) x / ||W + s B A|| + b, written so that W x is not computed again and an unchanged
    weight gives y to the last bit.
    """

    reads_weight = True

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site, rank, scale, dropout)
        weight = site.matrix(site.full_weight.detach())
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        self.magnitude = nn.Parameter(self._norm(wide, self.A.to(wide), self.B.to(wide)))

    def _norm(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Row norms of W + s B A, without forming B A: ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>."""
        cross = (weight @ down.t() * up).sum(1)
        square = (up @ (down @ down.t()) * up).sum(1)
        return (weight.square().sum(1) + 2 * self.scale * cross + self.scale**2 * square).clamp_min(0).sqrt()

    def _gain(self) -> Tensor:
        with torch.no_grad():  # the norm counts as a constant in backward (section 4.3)
            weight = self.site.matrix(self.site.full_weight).to(self.A.dtype)
            norm = self._norm(weight, self.A, self.B)
        return self.magnitude / norm

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        delta = self.site.low_rank(self.dropout(x.to(self.A.dtype)), self.A, self.scale * self.B)
        out, bias = self.site.take(y), self.site.bias
        mapped = out + delta if bias is None else out - self.site.per_channel(bias) + delta
        return self.site.put(y, out + delta + self.site.per_channel(self._gain() - 1) * mapped)

    def merged(self, weight: Tensor) -> Tensor:
        return self._gain().to(weight.dtype)[:, None] * super().merged(weight)


class DoRA(LoRA):
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

    def build(self, site: Site) -> Graft:
        return DoRAGraft(site, self.rank, self.alpha / self.rank, self.dropout)
