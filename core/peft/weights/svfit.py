"""SVFit: train the largest singular values (Sun et al. 2024, arXiv:2409.05926)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.json_types import Count, Shapes
from core.method import PEFTMethod, check_shapes, shapes_by_site

TOLERANCE = 1e-2
"""How far the two probes of a basis may lie apart, for each root of its rank."""


class SVFitGraft(AdditiveGraft):
    """y + U_r ((sigma - S_r) (V_r^T x)), for W = U S V^T."""

    U: Tensor
    V: Tensor
    S: Tensor

    def __init__(self, site: Site, rank: int | None, energy: float | None, stored: bool) -> None:
        super().__init__(site)
        weight = site.matrix(site.full_weight.detach())
        # In double precision on the CPU, so that the same weight has the same basis on every machine.
        exact = weight.to("cpu" if not weight.is_meta else "meta", torch.float64)
        u, s, v = torch.linalg.svd(exact, full_matrices=False)
        rank = len(s) if rank is None else rank
        if energy is not None and not s.is_meta:
            rank = 1 + int((s.square().cumsum(0) < energy * s.square().sum()).sum())
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        self.probes = [] if s.is_meta else _probes(u, v)
        """What tells this basis from another one of the same weight."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        for name, basis in (("U", u), ("V", v), ("S", s)):
            self.register_buffer(name, basis.to(weight.device, kind).contiguous(), persistent=stored)
        self.sigma = nn.Parameter(self.S.clone())

    def store(self) -> None:
        """Let files hold the basis."""
        for name in "UVS":
            self.register_buffer(name, getattr(self, name), persistent=True)

    def resize(self, rank: int) -> None:
        """Room for a basis of another rank; its values come from a file."""
        m, n = self.site.out_features, self.site.in_features
        for name, shape in (("U", (m, rank)), ("V", (rank, n)), ("S", (rank,))):
            self.register_buffer(name, getattr(self, name).new_zeros(shape), persistent=True)
        self.sigma = nn.Parameter(self.S.clone(), requires_grad=self.sigma.requires_grad)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.U * (self.sigma - self.S), self.V

    def delta(self, x: Tensor) -> Tensor:
        up, down = self.factors()
        return self.site.low_rank(x.to(down.dtype), down, up)

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)


def _probes(u: Tensor, v: Tensor) -> list[float]:
    """Two numbers that a pair of vectors and their opposites have in common, and other bases have not: the values of
    a^T U diag(c) V^T b for normal a, b and c of a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        a, c, b = (torch.randn(size, dtype=u.dtype, generator=generator) for size in (len(u), len(v), v.shape[1]))
        found.append(round(float((a @ u * c) @ (v @ b)), 6))
    return found


class SVFit(PEFTMethod):
    """The weight's largest singular values are trained, its singular vectors stay.

    Equation: y = W x + b + U_r diag(sigma - S_r) V_r^T x, W = U S V^T; sigma starts as S_r
    Trains: rank a target; BERT-base, q and v, full rank: 18,432
    Merges: W + U_r diag(sigma - S_r) V_r^T
    Source: Sun et al. 2024, arXiv:2409.05926, section 3. sigma is not decayed, which would shrink the weight. Learning
        rates are from memory. The file holds sigma alone: the basis is decomposed again from the base, in double
        precision, and must be the one that sigma was trained with, which repeated singular values or a base in another
        precision may prevent; ``save_basis`` stores it. To another base the change goes as a patch (``core.Patch``)

    Args:
        rank: number of singular values; None is all of them.
        targets: roles to adapt; None is every linear map of the blocks.
        energy: alternative to ``rank``: as many of the largest as hold this share of the sum of all squares, in (0, 1].
        save_basis: whether files hold U_r, V_r and S_r too, (in + out + 1) numbers for each of sigma's.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    structure_types = {"shapes": Shapes, "ranks": dict[str, Count], "stored": bool, "basis": dict[str, list[float]]}
    recommended = {"lr": 1e-2, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, rank: int | None = None, targets: Sequence[str] | None = ("q", "v"),
                 energy: float | None = None, save_basis: bool = False, **common: Any) -> None:
        super().__init__(**common)
        if rank is not None and rank < 1:
            raise ScionError(f"SVFit: rank {rank} must be at least 1, or None")
        if energy is not None and not 0 < energy <= 1:
            raise ScionError(f"SVFit: energy {energy} must lie in (0, 1]")
        if rank is not None and energy is not None:
            raise ScionError(f"SVFit: give rank ({rank}) or energy ({energy}), not both")
        self.rank, self.energy, self.save_basis = rank, energy, save_basis
        self.targets = None if targets is None else tuple(targets)
        self.stored = save_basis

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if self.rank is not None and self.rank > min(site.in_features, site.out_features):
                raise ScionError(f"{self.name}: rank {self.rank} is more than the {site.out_features} x "
                                 f"{site.in_features} weight at {site.name} has")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"stored": self.save_basis}

    def build(self, site: Site) -> Graft:
        return SVFitGraft(site, self.rank, self.energy, self.stored)

    @property
    def _grafts(self) -> list[SVFitGraft]:
        return [graft for graft in self.grafts if isinstance(graft, SVFitGraft)]

    def structure(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shapes": shapes_by_site(self)}
        if self.energy is not None:
            found["ranks"] = {graft.site.name: len(graft.S) for graft in self._grafts}
        if self.stored:
            return {**found, "stored": True}
        return {**found, "basis": {graft.site.name: graft.probes for graft in self._grafts}}

    def restructure(self, structure: dict[str, Any]) -> None:
        check_shapes(self, structure.get("shapes", {}))
        basis: dict[str, list[float]] | None = structure.get("basis")
        if basis is None:  # so do all files of earlier versions
            self.stored = True
            for graft in self._grafts:
                graft.store()
                rank = structure.get("ranks", {}).get(graft.site.name, len(graft.S))
                if rank != len(graft.S):
                    graft.resize(rank)
            return
        for graft in self._grafts:
            near, saved = TOLERANCE * max(1, len(graft.S)) ** 0.5, basis.get(graft.site.name, graft.probes)
            if any(abs(one - other) > near for one, other in zip(saved, graft.probes, strict=False)):
                raise ScionError(f"{self.name}: the singular vectors of {graft.site.weight_name} here are not those "
                                 "that sigma was trained with: save it with save_basis=True, or carry its change to "
                                 "another base as a patch (core.patch.Patch.take)")
