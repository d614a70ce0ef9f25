"""TriAdaptLoRA: a low-rank change whose rank grows where its core matrix grows (Liang et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.json_types import Few
from core.method import AddsLoss, PEFTMethod, Scheduled, home_of
from core.method.low_rank import LowRankMethod
from core.optim import steps_of
from core.peft.weights._orthogonality import orthogonality
from core.random_state import seeded

Scale = Literal["alpha/rank", "alpha/reference"]


class TriAdaptLoRAGraft(AdditiveGraft):
    """y + s B C A x, with A [R, in], B [out, R] and C [R, R] kept in blocks, so that growing only appends.

    Block i of width b, with s ranks up to its end, has L [b, s], the rows of C as far as its diagonal, and U [s, b],
    the columns; on the diagonal the two add up.
    """

    def __init__(self, site: Site, alpha: float, reference: int, scale: Scale, dropout: float) -> None:
        super().__init__(site)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.L, self.U = nn.ParameterList(), nn.ParameterList()
        self.alpha, self.reference, self.kind = alpha, reference, scale
        self.dropout = nn.Dropout(dropout)

    @property
    def blocks(self) -> list[int]:
        """Widths of the blocks, in the order in which they came."""
        return [len(block) for block in self.A]

    @property
    def scale(self) -> float:
        return self.alpha / ((sum(self.blocks) + 1e-5) if self.kind == "alpha/rank" else self.reference)

    def append(self, width: int) -> list[nn.Parameter]:
        """A new block: A and B normal with 0.02, C zero, so that the change stays what it was (but for the scale)."""
        device, dtype = home_of(self.site.full_weight)
        total = sum(self.blocks) + width
        made = {"A": torch.empty(width, self.site.in_features).normal_(std=0.02),
                "B": torch.empty(self.site.out_features, width).normal_(std=0.02),
                "L": torch.zeros(width, total), "U": torch.zeros(total, width)}
        for name, tensor in made.items():
            getattr(self, name).append(nn.Parameter(tensor.to(device, dtype)))
        return [getattr(self, name)[-1] for name in made]

    def core(self) -> Tensor:
        """C [R, R]."""
        total = sum(self.blocks)
        core = torch.zeros(total, total, dtype=self.L[0].dtype, device=self.L[0].device)
        for rows, columns in zip(self.L, self.U, strict=True):
            width, end = rows.shape
            lower = nn.functional.pad(rows, (0, total - end, end - width, total - end))
            core = core + lower + nn.functional.pad(columns, (end - width, total - end, 0, total - end))
        return core

    def delta(self, x: Tensor) -> Tensor:
        down, up = torch.cat(list(self.A)), torch.cat(list(self.B), dim=1)
        return self.site.low_rank(self.dropout(x.to(down.dtype)), self.core() @ down, up, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * torch.cat(list(self.B), dim=1), self.core() @ torch.cat(list(self.A))


class TriAdaptLoRA(Scheduled, AddsLoss, LowRankMethod, PEFTMethod):
    """A low-rank change with a dense core, which starts at rank 1 and grows at the sites whose core grows fastest.

    Equation: y = W x + b + s B (C_low + C_up) A x, s = alpha / (R + 1e-5), C triangular in blocks. At a check, a site's
        score is the growth of |C| / (number of blocks) since the last one; m = (t - warmup) / (T - warmup),
        n = (budget - sum R) m, and every site with at least the n-th largest score gains ``growth`` ranks.
        Loss + gamma / (2 sites) sum (|A A^T - I| + |B^T B - I|)
    Trains: R (in + out) + the blocks of C; at the start, six linear maps of BERT-base: 166,032
    Merges: W + s B C A
    Source: Liang et al. 2025, arXiv:2501.08008 (number from memory), and a public implementation, which starts with C
        and all but the first A at zero, where no gradient is left: here A and B are normal with 0.02 and C is zero. Its
        scale divides by the present rank, so that growth shrinks what is there by R / (R + growth): "alpha/reference"
        does not. Learning rate as LoRA's here, without weight decay

    Args:
        rank: reference rank: the budget is this times the number of sites.
        init_rank: rank of every site at the start.
        growth: ranks that a site gains; None is half the reference rank.
        warmup: share of all steps (below 1), or their number, before the first check.
        interval: share of all steps, or their number, between two checks.
        nonlinear: n = exp(m ln(budget - sum R)) instead.
        scale: what alpha is divided by.
        gamma: weight of the orthogonality term.
        alpha: numerator of the scale; None is the reference rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear", "optimizer"))
    recommended = {"lr": 5e-3, "weight_decay": 0.0}
    structure_types = {"blocks": dict[str, Few]}

    def __init__(self, rank: int = 8, init_rank: int = 1, growth: int | None = None, warmup: float = 0.05,
                 interval: float = 0.02, nonlinear: bool = False, scale: Scale = "alpha/rank", gamma: float = 0.5,
                 alpha: float | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None,
                 **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, **common)
        self.growth = max(1, rank // 2) if growth is None else growth
        if not 1 <= init_rank <= rank or self.growth < 1:
            raise ScionError(f"TriAdaptLoRA: init_rank {init_rank} must lie between 1 and rank {rank}, growth "
                             f"{self.growth} must be at least 1")
        if warmup < 0 or interval <= 0 or gamma < 0:
            raise ScionError(f"TriAdaptLoRA: warmup {warmup} and gamma {gamma} must not be negative, interval "
                             f"{interval} must be positive")
        if scale not in ("alpha/rank", "alpha/reference"):
            raise ScionError(f"TriAdaptLoRA: scale {scale!r} is neither 'alpha/rank' nor 'alpha/reference'")
        self.init_rank, self.warmup, self.interval, self.nonlinear = init_rank, warmup, interval, nonlinear
        self.scale: Scale = scale
        self.gamma = gamma
        self.norms_before: list[float] = []

    def build(self, site: Site) -> Graft:
        graft = TriAdaptLoRAGraft(site, self.alpha, self.rank, self.scale, self.dropout)
        graft.append(self.init_rank)
        return graft

    @property
    def _grafts(self) -> list[TriAdaptLoRAGraft]:
        return [graft for graft in self.grafts if isinstance(graft, TriAdaptLoRAGraft)]

    @property
    def adds_loss(self) -> bool:
        return self.gamma > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        if not self.gamma:
            return None
        rows = [torch.cat(parts) for graft in self._grafts for parts in (list(graft.A), [b.t() for b in graft.B])]
        return self.gamma * orthogonality(rows).mean()

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        first = steps_of(self.warmup, self.total)
        every = max(1, round(steps_of(self.interval, self.total)))
        if self.steps <= first or self.steps % every:
            return
        left = self.rank * len(self.grafts) - sum(sum(graft.blocks) for graft in self._grafts)
        if left <= 0:
            return
        norms = [float(graft.core().norm()) / len(graft.blocks) for graft in self._grafts]
        scores = [now - before for now, before in zip(norms, self.norms_before or [0.0] * len(norms), strict=True)]
        self.norms_before = norms
        share = (self.steps - first) / max(1.0, self.total - first)
        count = int(math.exp(share * math.log(left)) if self.nonlinear else left * share)
        threshold = sorted(scores, reverse=True)[min(max(count, 1), len(scores)) - 1]
        for graft, score in zip(self._grafts, scores, strict=True):
            if score >= threshold:
                self.enter_optimizer(optimizer, self.grow(graft))

    def grow(self, graft: TriAdaptLoRAGraft, width: int | None = None) -> list[nn.Parameter]:
        """Append a block to ``graft``; its values follow the seed, the site and the number of blocks."""
        with seeded(self.seed, self.name, graft.site.name, len(graft.blocks)):
            fresh = graft.append(width or self.growth)
        for tensor in fresh:
            tensor.requires_grad_(self.is_trained)
        return fresh

    def structure(self) -> dict[str, Any]:
        return {"blocks": {graft.site.name: graft.blocks for graft in self._grafts}}

    def restructure(self, structure: dict[str, Any]) -> None:
        for graft in self._grafts:
            for width in structure.get("blocks", {}).get(graft.site.name, [])[len(graft.blocks):]:
                self.grow(graft, width)

    def training_state(self) -> dict[str, Any]:
        return {"norms": list(self.norms_before)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.norms_before = list(state["norms"])
