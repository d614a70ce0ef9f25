"""SVFit: train the largest singular values (Sun et al. 2024, arXiv:2409.05926)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod


class SVFitGraft(Graft):
    """y + U_r ((sigma - S_r) (V_r^T x)), for W = U S V^T."""

    U: Tensor
    V: Tensor
    S: Tensor

    def __init__(self, site: Site, rank: int | None) -> None:
        super().__init__(site)
        weight = site.matrix(site.full_weight.detach())
        wide = torch.promote_types(weight.dtype, torch.float32)
        u, s, v = torch.linalg.svd(weight.to(wide), full_matrices=False)
        rank = len(s) if rank is None else rank
        for name, basis in (("U", u[:, :rank]), ("V", v[:rank]), ("S", s[:rank])):
            self.register_buffer(name, basis.contiguous())
        self.sigma = nn.Parameter(s[:rank].clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.U * (self.sigma - self.S), self.V

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        up, down = self.factors()
        return self.site.put(y, self.site.take(y) + self.site.low_rank(x.to(down.dtype), down, up))

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)


class SVFit(PEFTMethod):
    """The weight's largest singular values are trained, its singular vectors stay.

    Equation: y = W x + b + U_r diag(sigma - S_r) V_r^T x, W = U S V^T; sigma starts as S_r
    Trains: rank a target; BERT-base, q and v, full rank: 18,432
    Merges: W + U_r diag(sigma - S_r) V_r^T
    Source: Sun et al. 2024, arXiv:2409.05926, section 3. The file holds U_r, V_r and S_r too: singular vectors are not
        unique, so that another machine might not find the same ones. sigma is not decayed, which would shrink the
        weight. The learning rate is from memory

    Args:
        rank: number of singular values; None is all of them.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    mergeable = True
    recommended = {"lr": 1e-2, "weight_decay": 0.0}

    def __init__(self, rank: int | None = None, targets: Sequence[str] | None = ("q", "v"), **common: Any) -> None:
        super().__init__(**common)
        if rank is not None and rank < 1:
            raise ScionError(f"SVFit: rank {rank} must be at least 1, or None")
        self.rank = rank
        self.targets = None if targets is None else tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        self.need_linear(anatomy)
        for site in self.sites(anatomy):
            if self.rank is not None and self.rank > min(site.in_features, site.out_features):
                raise ScionError(f"{self.name}: rank {self.rank} is more than the {site.out_features} x "
                                 f"{site.in_features} weight at {site.name} has")

    def build(self, site: Site) -> Graft:
        return SVFitGraft(site, self.rank)
