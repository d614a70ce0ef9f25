"""LIFT: training the weights that are largest after a low-rank approximation (Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Site
from core.errors import ScionError
from core.graft import Graft
from core.graft.sparse import SparseGraft, state_vectors
from core.json_types import Count
from core.method import PEFTMethod, Scheduled


def principal(weight: Tensor, rank: int, count: int) -> Tensor:
    """Flat positions [count], ascending, of the largest entries of the best approximation of ``weight`` of a rank."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ v[:rank]
    return near.flatten().abs().topk(count).indices.sort().values


class LIFTGraft(SparseGraft):
    """W + scatter(index, values) + scatter(left_index, left_values): what is trained now, and what was and stays."""

    left_index: Tensor
    left_values: Tensor

    def __init__(self, site: Site, index: Tensor) -> None:
        super().__init__(site, index)
        self.register_buffer("left_index", self.index[:0].clone())
        self.register_buffer("left_values", self.values.detach()[:0].clone())

    def limits(self) -> dict[str, int]:
        return {"index": self.places, "left_index": self.places}

    def weight(self, weight: Tensor) -> Tensor:
        if len(self.left_index):
            left = self.left_values.to(weight.dtype)
            weight = weight.flatten().index_add(0, self.left_index, left).view_as(weight)
        return super().weight(weight)

    @torch.no_grad()
    def refresh(self, rank: int, vectors: Sequence[Tensor]) -> None:
        """Select anew from the weight as it is now; ``vectors`` [k] move along, and new entries find zeros there."""
        matrix = self.site.matrix(self.site.full_weight.detach())
        change = self.delta().index_add(0, self.left_index, self.left_values)
        index = principal(matrix.float() + change.view(matrix.shape).float(), rank, len(self.index))
        for vector in vectors:
            vector.copy_(change.new_zeros(len(change)).index_copy(0, self.index.long(), vector.to(change))[index])
        self.move(index, change[index])
        change[index] = 0
        left = change.nonzero().flatten()
        self.left_index, self.left_values = left.to(self.index.dtype), change[left]


class LIFT(Scheduled, PEFTMethod):
    """Adam on the principal weights alone: those that are largest in a low-rank approximation of their matrix.

    Equation: W' = U_r S_r V_r^T, the best approximation of W [m, n] of rank ``filter_rank``; I = positions of the
        k = min((m + n) rank, m n) largest |W'|; Adam on W[I], nothing else moves. Every ``interval`` steps I is
        selected anew from the present W; an entry that stays keeps its moments, a new one starts at 0, one that leaves
        keeps its value
    Trains: (m + n) rank a target; BERT-base, six linear maps, rank 8: 1,327,104
    Merges: W with its changed entries
    Source: Liu et al. 2025, LIFT (ICML). Learning rate, betas and eps of the authors' scripts; their rank is 128. Their
        released configurations select the smallest entries: here the largest are selected, as in the paper. Adam is
        torch's: eps is added to the root of the corrected second moment, where the paper adds it before the correction.
        The change stands beside the frozen weight, so that memory and files grow with k alone. Left out: masks that
        accumulate, and blocks of entries, whose rules the paper does not spell out

    Args:
        rank: the budget is that of LoRA with this rank.
        filter_rank: rank of the approximation; None is ``rank``.
        interval: steps between two selections; None keeps the first one.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("partial", ("entries", "optimizer"))
    linear_only = True
    mergeable = True
    recommended = {"lr": 2e-4, "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"left": dict[str, Count]}

    def __init__(self, rank: int = 8, filter_rank: int | None = None, interval: int | None = 400,
                 targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.rank, self.filter_rank, self.interval = rank, rank if filter_rank is None else filter_rank, interval
        if rank < 1 or self.filter_rank < 1 or (interval is not None and interval < 1):
            raise ScionError(f"LIFT: rank {rank}, filter_rank {filter_rank} and interval {interval} must be at least 1")
        self.targets = None if targets is None else tuple(targets)

    def build(self, site: Site) -> Graft:
        matrix = site.matrix(site.full_weight.detach())
        count = min(sum(matrix.shape) * self.rank, matrix.numel())
        if matrix.is_meta:
            return LIFTGraft(site, torch.zeros(count, dtype=torch.int64, device="meta"))
        return LIFTGraft(site, principal(matrix, self.filter_rank, count))

    def param_groups(self) -> list[dict[str, Any]]:
        return [{**group, "betas": (0.9, 0.95), "eps": 1e-6} for group in super().param_groups()]

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.interval is None or self.steps % self.interval:
            return
        for graft in self.grafts:
            assert isinstance(graft, LIFTGraft)
            graft.refresh(self.filter_rank, [*state_vectors(optimizer, graft.values).values()])

    def structure(self) -> dict[str, Any]:
        return {"left": {graft.site.name: len(graft.left_index) for graft in self.grafts
                         if isinstance(graft, LIFTGraft)}}

    def restructure(self, structure: dict[str, Any]) -> None:
        for graft in self.grafts:
            assert isinstance(graft, LIFTGraft)
            count = structure.get("left", {}).get(graft.site.name, 0)
            graft.left_index = graft.index.new_zeros(count)
            graft.left_values = graft.values.new_zeros(count)
