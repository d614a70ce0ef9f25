"""Bone and Bat: block affine changes of a weight (Kang 2024, arXiv:2409.15371)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.json_types import Shapes
from core.method import PEFTMethod, check_shapes, shapes_by_site
from core.method.options import at_least


class BoneGraft(AdditiveGraft):
    """y + D^T (x summed over its chunks of `rank` channels), with D [rank, columns] tiled along the outputs."""

    def __init__(self, site: Site, rank: int, columns: int) -> None:
        super().__init__(site)
        self.D = nn.Parameter(torch.zeros(rank, columns))

    def factors(self) -> tuple[Tensor, Tensor]:
        rank, columns = self.D.shape
        up = self.D.t().repeat(self.site.out_features // columns, 1)
        down = torch.eye(rank).to(self.D).repeat(1, -(-self.site.in_features // rank))
        return up, down[:, :self.site.in_features]

    def delta(self, x: Tensor) -> Tensor:
        site, rank = self.site, len(self.D)
        if site.kind == "conv":
            up, down = self.factors()
            change = site.low_rank(x.to(self.D.dtype), down, up)
        else:
            x, short, times = x.to(self.D.dtype), -x.shape[-1] % rank, site.out_features // self.D.shape[1]
            x = F.pad(x, (0, short)) if short else x  # it copies also where there is nothing to add, as `repeat` does
            change = torch.unflatten(x, -1, (-1, rank)).sum(-2) @ self.D
            change = change if times == 1 else change.repeat(*[1] * (change.dim() - 1), times)
        return change

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)


class Bone(PEFTMethod):
    """One trained block, tiled over the weight: the input is summed over its chunks before a single small map.

    Equation: y = W x + b + D^T sum_j x_[j rank : (j + 1) rank], D [rank, out] zeros, the last chunk padded with zeros
    Trains: rank out a target (rank ``columns`` where they are given); LLaMA-2-7B, all linear maps, rank 64: 87,031,808;
        ViT-B/16, rank 64: 5,308,416
    Merges: W + [D^T D^T ...]
    Source: Kang 2024, arXiv:2409.15371, section 3; ``columns`` is its "mini" form. No scale belongs to it. The learning
        rate is LoRA's here, divided by five

    Args:
        rank: width of a chunk, at most the inputs.
        columns: columns of D, which are repeated along the outputs; None is one for each.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 0.0}
    structure_types = {"shapes": Shapes}

    def __init__(self, rank: int = 64, columns: int | None = None, targets: Sequence[str] | None = None, **common: Any
                 ) -> None:
        super().__init__(**common)
        at_least(1, "Bone", rank=rank, columns=columns)
        self.rank, self.columns = rank, columns
        self.targets = None if targets is None else tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if self.rank > site.in_features:
                raise ScionError(f"{self.name}: rank {self.rank} is more than the {site.in_features} inputs of "
                                 f"{site.name}")
            if self.columns is not None and site.out_features % self.columns:
                raise ScionError(f"{self.name}: columns {self.columns} does not divide the {site.out_features} outputs "
                                 f"of {site.name}")

    def build(self, site: Site) -> Graft:
        return BoneGraft(site, self.rank, self.columns or site.out_features)

    def structure(self) -> dict[str, Any]:
        return {} if self.columns is None else {"shapes": shapes_by_site(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        check_shapes(self, structure.get("shapes", {}))


class BatGraft(Graft):
    """W_ac (I + Q) + Q for the blocks W_ac of W, with Q_a (grouped by outputs) or Q_c (by inputs)."""

    remade = True
    reads_weight = True

    def __init__(self, site: Site, rank: int, group: str) -> None:
        super().__init__(site)
        count = (site.out_features if group == "outputs" else site.in_features) // rank
        self.Q = nn.Parameter(torch.zeros(count, rank, rank))
        self.group = group

    def weight(self, weight: Tensor) -> Tensor:
        rank = self.Q.shape[-1]
        columns = torch.unflatten(weight.to(self.Q.dtype), 1, (-1, rank))
        blocks = torch.unflatten(columns, 0, (-1, rank)).transpose(1, 2)
        q = self.Q[:, None] if self.group == "outputs" else self.Q[None]
        changed = blocks + blocks @ q + q  # [out blocks, in blocks, rank, rank]
        return changed.transpose(1, 2).flatten(2).flatten(0, 1).to(weight.dtype)


class Bat(PEFTMethod):
    """Bone whose block also multiplies the weight, block by block.

    Equation: y = W' x + b, W'_ac = W_ac (I + Q_a) + Q_a for blocks of rank x rank, Q [out / rank, rank, rank] zeros;
        grouped by inputs: Q_c in place of Q_a
    Trains: out rank a target (in rank by inputs); ViT-B/16, rank 64, all linear maps: 5,308,416 (4,128,768)
    Merges: W'
    Source: Kang 2024, arXiv:2409.15371, section 3.3: "outputs" is its column grouping, "inputs" its row grouping. The
        learning rate is LoRA's here, divided by five

    Args:
        rank: width of a block; it divides inputs and outputs.
        group: ``outputs`` or ``inputs``.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, rank: int = 64, group: Literal["outputs", "inputs"] = "outputs",
                 targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if rank < 1 or group not in ("outputs", "inputs"):
            raise ScionError(f"Bat: rank {rank} must be at least 1, group {group!r} 'outputs' or 'inputs'")
        self.rank, self.group = rank, group
        self.targets = None if targets is None else tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.in_features % self.rank or site.out_features % self.rank:
                raise ScionError(f"{self.name}: rank {self.rank} does not divide the {site.out_features} x "
                                 f"{site.in_features} weight at {site.name}")

    def build(self, site: Site) -> Graft:
        return BatGraft(site, self.rank, self.group)
