"""The start that `LoRA` takes with ``start="principal"``, as PiSSA does (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.graft import AdditiveGraft


class PrincipalGraft(AdditiveGraft):
    """y + s (B A - B_0 A_0) dropout(x); W = U S V^T gives A_0 = sqrt(S_r / s) V_r^T and B_0 = U_r sqrt(S_r / s)."""

    A_0: Tensor
    B_0: Tensor

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        weight = site.matrix(site.full_weight.detach())
        wide = torch.promote_types(weight.dtype, torch.float32)
        u, s, v = torch.linalg.svd(weight.to(wide), full_matrices=False)
        root = (s[:rank] / scale).sqrt()
        self.A = nn.Parameter(root[:, None] * v[:rank])
        self.B = nn.Parameter((u[:, :rank] * root).contiguous())
        self.register_buffer("A_0", self.A.detach().clone())
        self.register_buffer("B_0", self.B.detach().clone())
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def delta(self, x: Tensor) -> Tensor:
        # One mask and two calls: at the start they cancel to the last bit.
        x = self.dropout(x.to(self.A.dtype))
        change = self.site.low_rank(x, self.A, self.B, self.scale)
        change.sub_(self.site.low_rank(x, self.A_0, self.B_0, self.scale))
        return change

    def merged(self, weight: Tensor) -> Tensor:
        change = self.scale * (self.B @ self.A - self.B_0 @ self.A_0)
        return weight + change.to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        up = torch.cat([self.B, -self.B_0], 1)  # [out, 2 rank]
        return self.scale * up, torch.cat([self.A, self.A_0])
