"""VeRA: one random low-rank map for all layers, scaled by small vectors (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.method import PEFTMethod


class Projections(nn.Module):
    """A [rank, widest in] and B [widest out, rank], random and frozen; no file holds them, since the seed does."""

    A: Tensor
    B: Tensor

    def __init__(self, rank: int, inputs: int, outputs: int) -> None:
        super().__init__()
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = nn.init.kaiming_uniform_(torch.empty(shape), nonlinearity="relu")
            self.register_buffer(name, values, persistent=False)
        self.stored = False


    def store(self) -> None:
        """Let files hold the values, which are not those of the seed."""
        self.stored = True
        for name in ("A", "B"):
            self.register_buffer(name, getattr(self, name), persistent=True)


class VeRAGraft(AdditiveGraft):
    """y + b (B (d (A x))), with the first `in` columns of A and the first `out` rows of B."""

    def __init__(self, site: Site, projections: Projections, start: float) -> None:
        super().__init__(site)
        self.projections = [projections]  # in a list: the method registers them, once
        self.d = nn.Parameter(torch.full((len(projections.A),), start))
        self.b = nn.Parameter(torch.zeros(site.out_features))

    def factors(self) -> tuple[Tensor, Tensor]:
        shared, site = self.projections[0], self.site
        up = self.b[:, None] * shared.B[:site.out_features].to(self.b)
        return up, self.d[:, None] * shared.A[:, :site.in_features].to(self.d)

    def delta(self, x: Tensor) -> Tensor:
        shared, site = self.projections[0], self.site
        if site.kind == "conv":
            up, down = self.factors()
            return site.low_rank(x.to(down.dtype), down, up)
        hidden = self.d * (x.to(self.d.dtype) @ shared.A[:, :site.in_features].to(self.d).t())
        change = self.b * (hidden @ shared.B[:site.out_features].to(self.b).t())
        return change

    def merged(self, weight: Tensor) -> Tensor:
        up, down = self.factors()
        return weight + (up @ down).to(weight.dtype)


class VeRA(PEFTMethod):
    """Two trained vectors a layer, around a random low-rank map that all layers share.

    Equation: y = W x + bias + diag(b) B diag(d) A x; A and B Kaiming-uniform (gain sqrt 2), frozen; d starts as
        ``start``, b as zeros. Narrower layers take the first columns of A and the first rows of B
    Trains: rank + out a target; BERT-base, q and v, rank 256: 24,576
    Merges: W + diag(b) B diag(d) A
    Source: Kopiczko et al. 2023, arXiv:2310.11454, section 3; the learning rates are from memory

    Args:
        rank: rank of the shared map, at least 1.
        start: of d.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear", "shared"))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-2, "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"stored": bool}

    def __init__(self, rank: int = 256, start: float = 0.1, targets: Sequence[str] | None = ("q", "v"), **common: Any
                 ) -> None:
        super().__init__(**common)
        if rank < 1 or start == 0:
            raise ScionError(f"VeRA: rank {rank} must be at least 1, start {start} not zero")
        self.rank, self.first = rank, start
        self.targets = None if targets is None else tuple(targets)

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        widths = max(site.in_features for site in sites), max(site.out_features for site in sites)
        self.projections = Projections(self.rank, *widths)
        module.projections = self.projections

    def build(self, site: Site) -> Graft:
        return VeRAGraft(site, self.projections, self.first)

    def structure(self) -> dict[str, Any]:
        projections = getattr(self, "projections", None)  # none before it has been attached
        return {"stored": True} if projections is not None and projections.stored else {}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("stored"):
            self.projections.store()
