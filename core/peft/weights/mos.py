"""MoS: low-rank changes assembled from shards that all layers share (Wang et al. 2025, arXiv:2410.00938)."""

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
from core.method.low_rank import LowRankMethod
from core.peft.weights.lora import LoRAGraft
from core.random_state import seeded


class Pool(nn.Module):
    """Shards of A [budget L n, in / n] and of B [budget L n, out / n] for the L layers of one role, cut in n."""

    def __init__(self, site: Site, rows: int, shards: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rows, site.in_features // shards))
        self.B = nn.Parameter(torch.zeros(rows, site.out_features // shards))
        bound = 1 / math.sqrt(site.in_features)  # fan-in of the assembled row, not of the shard
        nn.init.uniform_(self.A, -bound, bound)


class MoSGraft(LoRAGraft):
    """LoRA with A = pool.A[index_A] as [rank, in] and B = pool.B[index_B] as [rank, out], transposed."""

    index_A: Tensor
    index_B: Tensor

    def __init__(self, site: Site, pool: Pool, index_A: Tensor, index_B: Tensor, rank: int, scale: float,
                 dropout: float) -> None:
        Graft.__init__(self, site)
        self.pool = [pool]  # in a list: the method registers it, once
        self.register_buffer("index_A", index_A.to(torch.int32))  # [rank n]
        self.register_buffer("index_B", index_B.to(torch.int32))
        self.rank, self.scale, self.dropout = rank, scale, nn.Dropout(dropout)

    def limits(self) -> dict[str, int]:
        return {"index_A": len(self.pool[0].A), "index_B": len(self.pool[0].B)}

    @property
    def A(self) -> Tensor:  # type: ignore[override]
        return self.pool[0].A[self.index_A].view(self.rank, -1)

    @property
    def B(self) -> Tensor:  # type: ignore[override]
        return self.pool[0].B[self.index_B].view(self.rank, -1).t()


class MoS(LowRankMethod, PEFTMethod):
    """Low-rank changes whose vectors are put together, by frozen random indices, from shards shared by all layers.

    Equation: y = W x + b + (alpha / rank) B_l A_l dropout(x); A_l = P_A[i_l] as [rank, in], B_l = P_B[j_l] as
        [rank, out] transposed; P_A uniform (1 / sqrt in), P_B zeros; i_l and j_l without repetition, drawn apart, and
        ``private`` ranks of each layer in no other
    Trains: budget L (in + out) a role, whatever the rank; LLaMA-2-7B, all linear maps, budget 2: 4,997,120;
        ViT-B/16: 294,912
    Merges: W + (alpha / rank) B_l A_l
    Source: Wang et al. 2025, arXiv:2410.00938, section 3; learning rate as LoRA's here (the paper tunes it per run).
        The released code's gates are frozen at 1 and cancel: left out. A role of several shapes (Swin) has a pool for
        each. Rows that no layer has drawn stay at their start: keep weight decay 0

    Args:
        rank: rank of each layer's change, at least 1.
        budget: the rank that LoRA would have with as many parameters.
        private: ranks of each layer's own, at most the budget.
        shards: pieces into which a vector is cut; it divides both widths.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear", "shared"))
    recommended = {"lr": 5e-3, "weight_decay": 0.0}

    def __init__(self, rank: int = 4, budget: int = 2, private: int = 1, shards: int = 2, alpha: float | None = None,
                 dropout: float = 0.0, targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, **common)
        if budget < 1 or shards < 1 or not 0 <= private <= min(budget, rank):
            raise ScionError(f"MoS: budget {budget} and shards {shards} must be at least 1, private {private} between "
                             "0 and budget and rank")
        if private == budget != rank:
            raise ScionError(f"MoS: with private {private} = budget {budget} nothing is shared, and rank {rank} must "
                             "be the same")
        self.budget, self.private, self.shards = budget, private, shards

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        for sites in groups(self.sites(anatomy)).values():
            site, layers = sites[0], len(sites)
            if site.in_features % self.shards or site.out_features % self.shards:
                raise ScionError(f"{self.name}: shards {self.shards} does not divide the widths {site.in_features} and "
                                 f"{site.out_features} of {site.name}")
            if self.rank - self.private > (self.budget - self.private) * layers:
                raise ScionError(f"{self.name}: rank {self.rank} less private {self.private} is more than the {layers} "
                                 f"layers of {site.role!r} share with budget {self.budget}: at most "
                                 f"{self.private + (self.budget - self.private) * layers}")

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self.places: dict[str, tuple[Pool, Tensor, Tensor]] = {}
        module.pools = nn.ModuleDict()
        for (role, *_), group in groups(sites).items():
            private, layers = self.private * self.shards, len(group)
            common = (self.budget - self.private) * layers * self.shards
            drawn = (self.rank - self.private) * self.shards
            pool = Pool(group[0], self.budget * layers * self.shards, self.shards)
            key = role.replace(".", "-")
            module.pools[f"{key}-{sum(name.startswith(f'{key}-') for name in module.pools)}"] = pool
            for layer, site in enumerate(group):
                own = torch.arange(common + layer * private, common + (layer + 1) * private)
                with seeded(self.seed, self.name, site.name):
                    one, other = (torch.cat([torch.randperm(common)[:drawn], own]) for _ in "AB")
                self.places[site.name] = (pool, one, other)

    def build(self, site: Site) -> Graft:
        return MoSGraft(site, *self.places[site.name], self.rank, self.alpha / self.rank, self.dropout)


def groups(sites: list[Site]) -> dict[tuple[str, int, int], list[Site]]:
    """Sites of one role and one shape."""
    found: dict[tuple[str, int, int], list[Site]] = {}
    for site in sites:
        found.setdefault((site.role, site.in_features, site.out_features), []).append(site)
    return found
