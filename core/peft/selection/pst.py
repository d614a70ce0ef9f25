"""PST: pruning while fine-tuning, with few trained numbers (Li et al. 2022, arXiv:2205.11005)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import Graft
from core.json_types import Share
from core.method import PEFTMethod, Scheduled
from core.method.options import not_negative
from core.optim import steps_of


def smallest(scores: Tensor, count: int) -> Tensor:
    """Which ``count`` entries are the smallest; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    edge = scores.flatten().kthvalue(count).values
    below, equal = scores < edge, scores == edge
    return below | (equal & (equal.flatten().cumsum(0).view_as(equal) <= count - below.sum()))


class PSTGraft(Graft):
    """M * W', W' = W + beta U V, M = 0 where |W'| + alpha1 A B + alpha2 (R 1^T + 1 C^T) is smallest."""

    reads_weight = True
    remade = True

    def __init__(self, site: Site, rank: int, score_rank: int, scales: tuple[float, float, float], spread: float
                 ) -> None:
        super().__init__(site)
        rows, columns = site.out_features, site.in_features
        self.U = nn.Parameter(spread * torch.randn(rows, rank))
        self.V = nn.Parameter(torch.zeros(rank, columns))
        self.A = nn.Parameter(spread * torch.randn(rows, score_rank))
        self.B = nn.Parameter(torch.zeros(score_rank, columns))
        self.R = nn.Parameter(torch.zeros(rows))
        self.C = nn.Parameter(torch.zeros(columns))
        self.beta, self.alpha1, self.alpha2 = scales
        self.sparsity = 0.0

    def weight(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # half precision would make ties
            changed = weight + self.beta * (self.U @ self.V)
            scores = changed.abs() + self.alpha1 * (self.A @ self.B) + self.alpha2 * (self.R[:, None] + self.C)
            pruned = smallest(scores.detach(), int(self.sparsity * scores.numel()))
            # The mask's gradient is that of the scores, as if it were these.
            return ((~pruned).to(scores.dtype) + (scores - scores.detach())) * changed


class PST(Scheduled, PEFTMethod):
    """Prunes each weight to a given share while a low-rank change of it and scores of its entries are trained.

    Equation: y = (M * W') x + b; W' = W + beta U V; S = |W'| + alpha1 A B + alpha2 (R 1^T + 1 C^T); M = 0 for the
        floor(s m n) smallest entries of S, else 1, and dL/dS = dL/dM = dL/d(M * W') * W'. U and A start as N(0, 1), the
        rest at zero. s stays at ``initial`` in the first steps, is ``sparsity`` in the last ones, and between them
        sparsity + (initial - sparsity) (1 - t)^3, t from 0 to 1
    Trains: (rank + score_rank + 1) (in + out) a target; ViT-B/16: 2,506,752, BERT-base: 2,820,096
    Merges: M * W', a matrix of the old shape with zeros
    Source: Li et al. 2022, arXiv:2205.11005 (number from memory), and the authors' code; learning rate of its BERT
        runs, which take 20 epochs. The mask is made in each forward and again in backward. A best checkpoint is to be
        taken from the last steps, when s is reached

    Args:
        sparsity: share of each weight that is zero in the end, in [0, 1).
        initial: share at the start.
        warmup: share of all steps (below 1), or their number, before pruning begins.
        cooldown: share of all steps, or their number, at the end with the final sparsity.
        rank: of the change U V.
        score_rank: of the scores A B.
        alpha1: weight of the scores' low-rank part.
        alpha2: weight of the scores of rows and columns.
        beta: weight of the change.
        spread: standard deviation of the start values of U and A.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("partial", ("entries", "linear"))
    linear_only = True
    mergeable = True
    recommended = {"lr": 3e-5, "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"sparsity": Share}
    settles_late = True

    def __init__(self, sparsity: float = 0.9, initial: float = 0.0, warmup: float = 0.1, cooldown: float = 0.3,
                 rank: int = 8, score_rank: int = 8, alpha1: float = 1.0, alpha2: float = 1.0, beta: float = 1.0,
                 spread: float = 1.0, targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= initial <= sparsity < 1:
            raise ScionError(f"PST: initial {initial} and sparsity {sparsity} must lie in [0, 1), the first not above "
                             "the second")
        if warmup < 0 or cooldown < 0 or warmup < 1 and cooldown < 1 <= warmup + cooldown:
            raise ScionError(f"PST: warmup {warmup} and cooldown {cooldown} must not be negative, and leave steps "
                             "between them")
        if rank < 1 or score_rank < 1 or spread <= 0:
            raise ScionError(f"PST: rank {rank} and score_rank {score_rank} must be at least 1, spread {spread} "
                             "positive")
        not_negative("PST", alpha1=alpha1, alpha2=alpha2, beta=beta)
        self.final, self.initial, self.warmup, self.cooldown = sparsity, initial, warmup, cooldown
        self.rank, self.score_rank, self.scales, self.spread = rank, score_rank, (beta, alpha1, alpha2), spread
        self.targets = None if targets is None else tuple(targets)
        self.identity_at_start = initial == 0
        self.sparsity = initial

    def build(self, site: Site) -> Graft:
        graft = PSTGraft(site, self.rank, self.score_rank, self.scales, self.spread)
        graft.sparsity = self.initial
        return graft

    def sparsity_at(self, step: int) -> float:
        """The share that is zero after ``step`` steps."""
        start, end = steps_of(self.warmup, self.total), self.total - steps_of(self.cooldown, self.total)
        if step <= start:
            return self.initial
        return self.final + (self.initial - self.final) * max(0.0, 1 - (step - start) / max(end - start, 1)) ** 3

    def prune(self, sparsity: float) -> None:
        """Set the share of zeros."""
        self.sparsity = sparsity
        for graft in self.grafts:
            assert isinstance(graft, PSTGraft)
            graft.sparsity = sparsity

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.prune(self.sparsity_at(self.steps))

    @property
    def settled(self) -> bool:
        return self.sparsity == self.final

    def figures(self) -> dict[str, Any]:
        """The share of each target's weights that is zero."""
        return {"sparsity": self.sparsity}

    def structure(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity}

    def restructure(self, structure: dict[str, Any]) -> None:
        self.prune(structure.get("sparsity", self.sparsity))
