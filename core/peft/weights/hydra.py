"""Hydra: a parallel and a sequential low-rank branch on one linear map (Kim et al. 2023, arXiv:2309.06922)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.method.options import at_least, probability


class Branch(nn.Module):
    """B (A x + a) + c, with A [rank, in] Xavier-uniform and the rest zeros; a and c may be left out."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, in_features)))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        self.a = nn.Parameter(torch.zeros(rank)) if bias else None
        self.c = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.dropout = nn.Dropout(dropout)

    def finish(self, site: Site, hidden: Tensor) -> Tensor:
        """B dropout(hidden + a) + c, from hidden = A x."""
        hidden = hidden if self.a is None else hidden + site.per_channel(self.a)
        out = site.mix(self.dropout(hidden), self.B)
        return out if self.c is None else out + site.per_channel(self.c)

    def shift(self) -> Tensor:
        """B a + c: the output at A x = 0."""
        zero = self.B.new_zeros(len(self.B))
        return zero if self.a is None or self.c is None else self.B @ self.a + self.c


class HydraGraft(Graft):
    """y + s P(x) + s S(y), for the site's input x and output y = W x + b."""

    reads_output = True

    def __init__(self, site: Site, parallel: Branch, sequential: Branch, scale: float) -> None:
        super().__init__(site)
        self.parallel, self.sequential, self.scale = parallel, sequential, scale
        self.adds_bias = parallel.c is not None and site.takes_bias

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        one, other, out = self.parallel, self.sequential, self.site.take(y)
        wide = out.to(other.A.dtype)
        change = one.finish(self.site, self.site.project(x.to(one.A.dtype), one.A))
        change = change + other.finish(self.site, self.site.mix(wide, other.A))
        return self.site.put(y, out + self.scale * change)

    def merged(self, weight: Tensor) -> Tensor:
        one, other = self.parallel, self.sequential
        return weight + self.scale * (one.B @ one.A + other.B @ (other.A @ weight.to(other.A.dtype))).to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        other = self.sequential
        shift = self.parallel.shift() + other.B @ (other.A @ bias.to(other.A.dtype)) + other.shift()
        return bias + self.scale * shift.to(bias.dtype)


class Hydra(PEFTMethod):
    """Two low-rank branches on a linear map: one reads its input, one its output.

    Equation: y = W x + b + s (B_p (A_p x + a_p) + c_p) + s (B_s (A_s (W x + b) + a_s) + c_s); A Xavier-uniform, the
        rest zeros
    Trains: rank (in + out) + rank + out for each branch, out + out for the sequential one; ViT-B/16, o and mlp.down,
        ranks 2: 239,712
    Merges: W + s (B_p A_p + B_s A_s W), b + s (B_p a_p + c_p + B_s A_s b + B_s a_s + c_s)
    Source: Kim et al. 2023, arXiv:2309.06922, section 3; settings of its VTAB-1k runs. Its released merge takes the
        attention's weights from the MLP's; here each site has its own. GLUE in the paper: targets=("mlp.down",),
        rank=4, sequential_rank=8, bias=False

    Args:
        rank: rank of the parallel branch, at least 1.
        sequential_rank: rank of the sequential branch, at least 1.
        scale: factor s of both branches (the paper takes 0.1 to 4.5 for each task).
        bias: whether the branches have the shifts a and c; None is where the linear map has a bias, into which
            they merge. With true, merging makes one where there is none.
        dropout: probability of dropping a hidden value, in [0, 1).
        targets: roles to adapt.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}

    def __init__(self, rank: int = 2, sequential_rank: int = 2, scale: float = 1.0, bias: bool | None = None,
                 dropout: float = 0.0, targets: Sequence[str] = ("o", "mlp.down"), **common: Any) -> None:
        super().__init__(**common)
        at_least(1, "Hydra", rank=rank, sequential_rank=sequential_rank)
        if scale == 0:
            raise ScionError(f"Hydra: scale {scale} must not be zero")
        probability("Hydra", dropout=dropout)
        self.rank, self.sequential_rank, self.scale, self.dropout = rank, sequential_rank, scale, dropout
        self.bias, self.targets = bias, tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if getattr(site.module, "groups", 1) > 1:
                raise ScionError(f"{self.name}: {site.name} is a grouped convolution, which has no low-rank branch")

    def build(self, site: Site) -> Graft:
        width, bias = site.out_features, site.bias is not None if self.bias is None else self.bias
        return HydraGraft(site, Branch(site.in_features, width, self.rank, bias, self.dropout),
                          Branch(width, width, self.sequential_rank, bias, self.dropout), self.scale)
