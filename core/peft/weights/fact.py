"""FacT: the changes of all weights as one tensor in factors (Jie and Deng 2023, arXiv:2212.03145)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.method import PEFTMethod
from core.method.options import probability
from core.random_state import dropout_for_all


class Factors(nn.Module):
    """What all slices of one width share: U [rank, dim], V [dim, rank], and in the Tucker form C [rank, rank, rank]."""

    def __init__(self, dim: int, rank: int, tucker: bool) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.empty(rank, dim).uniform_(-1, 1) / math.sqrt(dim))
        self.V = nn.Parameter(torch.zeros(dim, rank))
        self.C = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank))) if tucker else None


class FacTGraft(AdditiveGraft):
    """W + s dW, whose slice [j, i], of dim x dim, is V S_ji U; the last slices may be cut at the weight's edge."""

    def __init__(self, site: Site, factors: Factors, slices: tuple[int, int], total: int, scale: float, dropout: float
                 ) -> None:
        super().__init__(site)
        self.shared = [factors]  # in a list: the method registers them, once
        self.out, self.inputs = slices
        self.scale = scale
        rank = len(factors.U)
        # S [out rank, inputs rank], or its coordinates P [out, inputs, rank] in C
        bound = math.sqrt(6 / (rank + total)) if factors.C is not None else 1 / math.sqrt(self.inputs * rank)
        shape = (*slices, rank) if factors.C is not None else (self.out * rank, self.inputs * rank)
        self.middle = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    @property
    def S(self) -> Tensor:
        """All slices' middle factors as one matrix [out rank, inputs rank]."""
        [shared] = self.shared
        if shared.C is None:
            return self.middle
        return torch.einsum("abk,ojk->oajb", shared.C, self.middle).reshape(self.out * len(shared.C), -1)

    def factors(self) -> tuple[Tensor, Tensor]:
        [shared], site = self.shared, self.site
        up = torch.block_diag(*[shared.V] * self.out)[:site.out_features]
        down = torch.block_diag(*[shared.U] * self.inputs)[:, :site.in_features]
        return self.scale * up @ self.S, down

    def delta(self, x: Tensor) -> Tensor:
        [shared], site = self.shared, self.site
        x = x.to(shared.U.dtype)
        if site.kind == "conv":
            up, down = self.factors()
            return site.low_rank(x, down, dropout_for_all(self.dropout, up))
        # The last slice may be cut at the weight's edge: there the input goes on as zeros.
        beyond = self.inputs * shared.U.shape[1] - site.in_features
        padded = F.pad(x, (0, beyond)) if beyond else x
        slices = torch.unflatten(padded, -1, (self.inputs, -1))  # [..., inputs, dim]
        reduced = F.linear(slices, shared.U).flatten(-2)  # [..., inputs rank]
        hidden = self.dropout(F.linear(reduced, self.S))  # [..., out rank]
        split = torch.unflatten(hidden, -1, (self.out, -1))  # [..., out, rank]
        outputs = self.scale * F.linear(split, shared.V).flatten(-2)  # [..., out dim]
        return outputs[..., :site.out_features]

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)


class FacT(PEFTMethod):
    """The changes of all linear maps, cut into square slices, are one tensor, of which two factors are shared by all.

    Equation: y = (W + scale dW) x + b; each slice [dim, dim] of dW is V S U. form="tt" (tensor train): S [rank, rank]
        is the slice's own. form="tk" (Tucker): S = sum_k C_k p_k, C [rank, rank, rank] shared, p [rank] the slice's
        own. U uniform (1 / sqrt dim), V zeros, S uniform (1 / sqrt of its inputs), C and all p together Xavier-uniform
    Trains: tt: 2 dim rank + slices rank^2; tk: 2 dim rank + slices rank + rank^3; on ViT-B/16 12 slices a block: rank
        16: 61,440; form="tk", rank 32: 86,528
    Merges: W + scale dW
    Source: Jie and Deng 2023, arXiv:2212.03145 (number from memory); dropout, start and recipe of the released code.
        There every width is a multiple of dim; elsewhere (grouped queries, gated MLPs) the last slice is cut at the
        edge. Where stages differ in width (Swin), each width has U, V and C of its own; dim is the block's width,
        outside blocks the smaller side of the weight. A convolution is cut as the matrix [out, in x kernel], and its
        dropout is of V's entries

    Args:
        rank: of the factors.
        form: ``tt`` or ``tk``; the paper takes ranks up to 16 and 32.
        scale: of the change; the paper tries 0.01, 0.1, 1, 10 and 100.
        dropout: behind S, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear", "shared"))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}

    def __init__(self, rank: int = 16, form: Literal["tt", "tk"] = "tt", scale: float = 1.0, dropout: float = 0.1,
                 targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if rank < 1 or scale == 0:
            raise ScionError(f"FacT: rank {rank} must be at least 1, scale {scale} not zero")
        if form not in ("tt", "tk"):
            raise ScionError(f"FacT: form {form!r} must be 'tt' (tensor train) or 'tk' (Tucker)")
        probability("FacT", dropout=dropout)
        self.rank, self.form, self.scale, self.dropout = rank, form, scale, dropout
        self.targets = None if targets is None else tuple(targets)

    @staticmethod
    def cut(site: Site) -> tuple[int, int, int]:
        """Width of a slice, and how many stand in a column and in a row of the site's weight."""
        dim = site.width or min(site.in_features, site.out_features)
        return dim, math.ceil(site.out_features / dim), math.ceil(site.in_features / dim)

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self._totals: dict[int, int] = {}
        for site in sites:
            dim, rows, columns = self.cut(site)
            self._totals[dim] = self._totals.get(dim, 0) + rows * columns
        self._factors = {dim: Factors(dim, self.rank, self.form == "tk") for dim in self._totals}
        module.factors = nn.ModuleList(self._factors.values())

    def build(self, site: Site) -> Graft:
        dim, *slices = self.cut(site)
        return FacTGraft(site, self._factors[dim], (slices[0], slices[1]), self._totals[dim], self.scale, self.dropout)
