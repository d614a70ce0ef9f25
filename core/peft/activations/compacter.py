"""Compacter: bottleneck adapters of Kronecker products (Karimi Mahabadi et al. 2021, arXiv:2106.04647)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod


class Rule(nn.Module):
    """The matrices A_i of a sum of Kronecker products, [n, n, n]."""

    def __init__(self, n: int, std: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n).normal_(std=std))


class PHMLinear(nn.Module):
    """y = x H + b, H = sum_i A_i (x) B_i [in, out], B_i = s_i t_i of rank ``rank``, or whole where that is None."""

    def __init__(self, inputs: int, outputs: int, n: int, rank: int | None, rule: Rule) -> None:
        super().__init__()
        self.rule = [rule]  # in a list: the method registers a shared one, once
        rows, columns = inputs // n, outputs // n

        def glorot(*shape: int) -> nn.Parameter:
            bound = math.sqrt(2) * math.sqrt(6 / (shape[-2] + shape[-1]))
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        if rank is None:
            self.B = glorot(n, rows, columns)
        else:
            self.s, self.t = glorot(n, rows, rank), glorot(n, rank, columns)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.kept: tuple[Any, Tensor] | None = None
        """H, and the state of what it was made from, where it is kept between forwards."""

    @property
    def matrix(self) -> Tensor:
        """H [in, out]; where it is kept, made again when a factor has changed or a gradient is wanted."""
        if self.kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.made()
        state = tuple((tensor.data_ptr(), tensor._version) for tensor in (self.rule[0].A, *self.parameters()))
        if self.kept[0] != state:
            self.kept = state, self.made()
        return self.kept[1]

    def made(self) -> Tensor:
        """H from its factors."""
        factors = self.B if "B" in self._parameters else self.s @ self.t
        return torch.einsum("nab,ncd->acbd", self.rule[0].A, factors).flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.t(), self.bias)


class CompacterGraft(Graft):
    """y + Up(gelu(Down(y))), both maps sums of Kronecker products"""

    def __init__(self, site: Site, bottleneck: int, n: int, rank: int | None, rules: Sequence[Rule]) -> None:
        super().__init__(site)
        self.down = PHMLinear(site.width, bottleneck, n, rank, rules[0])
        self.up = PHMLinear(bottleneck, site.width, n, rank, rules[-1])
        self.own = nn.ModuleList(rules if len(rules) > 1 else [])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.gelu(self.down(y.to(self.down.bias.dtype)), approximate="tanh")
        return y + self.up(hidden).to(y.dtype)


class Compacter(PEFTMethod):
    """Bottlenecks after attention and after the MLP whose maps are sums of Kronecker products, partly shared.

    Equation: h <- h + Up(gelu(Down(h))), each map x H + b with H = sum_{i=1..n} A_i (x) s_i t_i; A_i [n, n] are the
        model's, s_i [in / n, rank] and t_i [rank, out / n] the layer's
    Trains: n^3, and 2 rank (dim + bottleneck) + bottleneck + dim a site; BERT-base, n = 4, reduction 32: 57,088
    Merges: no, the bottleneck is not linear
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3, and the authors' configurations (A from a normal
        of 1e-4). They also train the norms: norms=("norm1", "norm2", "cross.norm", "norm"). PHM-Adapter is rank=None,
        shared=False, n=12, std=0.01. No adapter stands at cross-attention. ``materialise()`` keeps each H for inference

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width; None leaves it to ``reduction``. n divides it and the block's width.
        n: number and size of the A_i.
        rank: of s_i t_i; None trains B_i [in / n, out / n] in their place.
        shared: one set of A_i for the whole model; else one for each map.
        std: of A's start.
        targets: sublayer outputs to adapt.
    """

    tags = ("additive", ("block", "shared"))
    identity_at_start = False
    inference_cost = "bottlenecks stay, their activation is not linear"
    recommended = {"lr": 3e-3, "weight_decay": 0.0}

    def __init__(self, reduction: float = 32, bottleneck: int | None = None, n: int = 4, rank: int | None = 1,
                 shared: bool = True, std: float = 1e-4, targets: Sequence[str] = ("attention", "mlp"), **common: Any
                 ) -> None:
        super().__init__(**common)
        name = type(self).__name__
        if reduction <= 0 or (bottleneck is not None and bottleneck < 1):
            raise ScionError(f"{name}: reduction {reduction} must be positive, bottleneck {bottleneck} at least 1")
        if n < 1 or (rank is not None and rank < 1) or std <= 0:
            raise ScionError(f"{name}: n {n} and rank {rank} must be at least 1, std {std} positive")
        self.reduction, self.bottleneck, self.n, self.rank = reduction, bottleneck, n, rank
        self.is_shared, self.std, self.targets = shared, std, tuple(targets)

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck or max(1, round(dim / self.reduction))

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role not in ("attention", "mlp", "cross.attention", "block"):
                raise ScionError(f"{self.name}: {site.name} is no hidden state of a block; take 'attention' or 'mlp'")
            if site.width % self.n or self.width(site.width) % self.n:
                raise ScionError(f"{self.name}: n {self.n} must divide the width {site.width} of {site.name} and the "
                                 f"bottleneck {self.width(site.width)}")

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self.rule = Rule(self.n, self.std) if self.is_shared else None
        if self.rule is not None:
            module.rule = self.rule

    def materialise(self, on: bool = True) -> None:
        """Keep each H between forwards without gradients instead of making it in each; ``on=False`` ends it."""
        for module in self.module.modules():
            if isinstance(module, PHMLinear):
                module.kept = ((), torch.empty(0)) if on else None

    def build(self, site: Site) -> Graft:
        rules = [Rule(self.n, self.std), Rule(self.n, self.std)] if self.rule is None else [self.rule]
        return CompacterGraft(site, self.width(site.width), self.n, self.rank, rules)


class CompacterPlusPlus(Compacter):
    """Compacter after the MLPs alone.

    Equation: h <- h + Up(gelu(Down(h))) on the MLP's output, with Compacter's maps
    Trains: n^3, and 2 rank (dim + bottleneck) + bottleneck + dim a block; BERT-base, n = 4, reduction 32: 28,576
    Merges: no, the bottleneck is not linear
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, section 3.2, called Compacter++ there

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width; None leaves it to ``reduction``. n divides it and the block's width.
        n: number and size of the A_i.
        rank: of s_i t_i; None trains B_i [in / n, out / n] in their place.
        shared: one set of A_i for the whole model; else one for each map.
        std: of A's start.
        targets: sublayer outputs to adapt.
    """

    tags = ("additive", ("block", "shared"))

    def __init__(self, reduction: float = 32, bottleneck: int | None = None, n: int = 4, rank: int | None = 1,
                 shared: bool = True, std: float = 1e-4, targets: Sequence[str] = ("mlp",), **common: Any) -> None:
        super().__init__(reduction, bottleneck, n, rank, shared, std, targets, **common)
