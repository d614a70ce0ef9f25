"""APET: arbitrary few parameters, at positions drawn at random (Su et al. 2023, arXiv:2306.02320)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy, Site
from core.data import seed_of
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.sparse import SparseGraft


def distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct numbers below ``total``, ascending, every set of them equally likely."""
    if 3 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < count:  # never more than are missing, so that none has to be dropped again
        found = torch.cat([found, torch.randint(total, (count - len(found),), generator=generator)]).unique()
    return found


class APET(PEFTMethod):
    """Trains exactly N entries of the blocks' weights, wherever they happen to lie.

    Equation: W' = W + scatter(I, v), v = 0 at the start; I over all targets together: N entries drawn uniformly without
        repetition
    Trains: N numbers, and stores their positions; ViT-B/16 at 0.3 %: 257,395
    Merges: W with its changed entries
    Source: Su et al. 2023, arXiv:2306.02320, whose trained set is an arbitrary one of a given size; the authors'
        release draws whole tensors and modules instead, so that it meets sizes only about. Learning rate of its raw
        budgets

    Args:
        density: share of the model's parameters to train, in (0, 1]; 0.003 where nothing else is given.
        count: alternative: how many to train.
        targets: roles to draw from; None is every linear map of the blocks.
    """

    mergeable = True
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, density: float | None = None, count: int | None = None, targets: Sequence[str] | None = None,
                 **common: Any) -> None:
        super().__init__(**common)
        if density is not None and count is not None:
            raise ScionError(f"APET: give density ({density}) or count ({count}), not both")
        if (density is not None and not 0 < density <= 1) or (count is not None and count < 1):
            raise ScionError(f"APET: density {density} must lie in (0, 1], count {count} be at least 1")
        self.density, self.count = 0.003 if density is None and count is None else density, count
        self.targets = None if targets is None else tuple(targets)
        self.positions: dict[str, Tensor] = {}

    def check(self, anatomy: Anatomy) -> None:
        self.positions = {}
        self.need_linear(anatomy)
        sites = super().sites(anatomy)
        sizes = [site.in_features * site.out_features for site in sites]
        everything = sum(p.numel() for name, p in anatomy.root.named_parameters() if not name.startswith("peft."))
        count = self.count or int((self.density or 0) * everything)
        if not 0 < count <= sum(sizes):
            raise ScionError(f"{self.name}: {count} entries are not between 1 and the {sum(sizes)} of the targets")
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, "positions"))
        drawn = distinct(sum(sizes), count, generator)
        ends = torch.tensor(sizes).cumsum(0)
        parts = drawn.tensor_split(torch.searchsorted(drawn, ends[:-1]))
        self.positions = {site.name: part - (end - size) for site, part, end, size in zip(
            sites, parts, ends.tolist(), sizes, strict=True) if len(part)}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = super().sites(anatomy)
        return [site for site in found if site.name in self.positions] if self.positions else found

    def build(self, site: Site) -> Graft:
        return SparseGraft(site, self.positions[site.name])

    def structure(self) -> dict[str, Any]:
        return {"shapes": self.shapes()}

    def restructure(self, structure: dict[str, Any]) -> None:
        self.check_shapes(structure.get("shapes", {}))
