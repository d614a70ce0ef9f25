"""LoFiT: offsets of a few attention heads, chosen by scales of all (Yin et al. 2024, arXiv:2406.01563)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.json_types import Count
from core.method import AddsLoss, PEFTMethod, Staged
from core.method.options import not_negative
from core.random_state import seeded

LEARNING_RATES = {"heads": 5e-3, "offsets": 1e-2}


class ScaledHeads(Graft):
    """(1 + A) * z for the heads' outputs z [..., heads x width], which attention's output projection reads."""

    reads_weight = True  # what else stands here sees the scaled input, so that it must be merged first

    def __init__(self, site: Site, spread: float) -> None:
        super().__init__(site)
        assert site.heads is not None
        self.A = nn.Parameter(spread * torch.randn(site.heads.query, site.heads.width))

    def before(self, x: Tensor) -> Tensor:
        return (x * (1 + self.A.flatten())).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * (1 + self.A.flatten()).to(weight.dtype)


class ShiftedHeads(Graft):
    """z + v for the heads at ``index`` [k], with v [k, width]; merged it is a bias W v."""

    reads_weight = True
    adds_bias = True
    index: Tensor

    def __init__(self, site: Site, index: Tensor, spread: float) -> None:
        super().__init__(site)
        assert site.heads is not None
        self.register_buffer("index", index.to(torch.int32))
        self.v = nn.Parameter(spread * torch.randn(len(index), site.heads.width))

    def limits(self) -> dict[str, int]:
        assert self.site.heads is not None
        return {"index": self.site.heads.query}

    @property
    def offset(self) -> Tensor:
        """v of all heads [heads x width]: zeros for those that were not chosen."""
        assert self.site.heads is not None
        heads = self.v.new_zeros(self.site.heads.query, self.site.heads.width)
        return heads.index_add(0, self.index, self.v).flatten()

    def before(self, x: Tensor) -> Tensor:
        return (x + self.offset).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias + self.site.matrix(self.site.full_weight).to(bias.dtype) @ self.offset.to(bias.dtype)


class LoFiT(Staged, AddsLoss, PEFTMethod):
    """Learns which attention heads matter, then an offset for each of the best, the same at every token.

    Equation: z_h = softmax(q k^T) v of head h, as attention's output projection reads it. First stage: z_h <- (1 + A_h)
        * z_h in all heads, and l1 sum |A| added to the loss. The K heads with the largest |A_h|_2 are kept, A is
        dropped. Second stage: z_h <- z_h + v_h in these alone. A and v start as N(0, spread^2)
    Trains: heads x width a block, then width a chosen head; BERT-base: 9,216, then 4 x 64
    Merges: columns of W_o, then b_o + W_o v, which makes a bias where there is none
    Source: Yin et al. 2024, arXiv:2406.01563, section 3, and the authors' code, whose first stage has an offset frozen
        at zero as well. They keep 32 of Llama-2-7B's 1,024 heads, l1 from 5e-4 to 5e-3 and learning rates from 5e-4 to
        5e-3 in the first stage, 8e-3 to 2e-2 in the second. Two stages: the command runs both; elsewhere fit, call
        ``advance()``, and fit again with a new optimizer

    Args:
        heads: how many heads to keep; None is 3 % of them, at least one.
        l1: weight of the scales' absolute values in the first stage.
        spread: standard deviation of the start values; 0 is the identity.
        targets: attention's output projections: "o", "cross.o".
    """

    tags = ("additive", ("scale",))
    identity_at_start = False
    mergeable = True
    needs = ("o",)
    recommended = {"lr": LEARNING_RATES["heads"], "weight_decay": 0.0}
    stages = ("heads", "offsets")
    structure_types = {"stage": Literal["heads", "offsets"], "heads": dict[str, Count]}

    count: int
    """Heads to keep, on this model."""

    def __init__(self, heads: int | None = None, l1: float = 5e-4, spread: float = 1e-3,
                 targets: Sequence[str] = ("o",), **common: Any) -> None:
        super().__init__(**common)
        if heads is not None and heads < 1:
            raise ScionError(f"LoFiT: heads {heads} must be at least 1, or None")
        not_negative("LoFiT", l1=l1, spread=spread)
        self.heads, self.l1, self.spread = heads, l1, spread
        self.targets = tuple(targets)
        self.identity_at_start = spread == 0
        self.stage = "heads"

    def check(self, anatomy: Anatomy) -> None:
        total = 0
        for site in self.sites(anatomy):
            if site.role not in ("o", "cross.o") or site.heads is None:
                raise ScionError(f"{self.name}: {site.name} does not read heads; targets may be 'o' and 'cross.o'")
            total += site.heads.query
        if self.heads is not None and self.heads > total:
            raise ScionError(f"{self.name}: heads {self.heads} is more than the {total} of the targets")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        total = sum(site.heads.query for site in self.sites(anatomy) if site.heads is not None)
        return {"stage": "heads", "count": self.heads or math.ceil(0.03 * total)}

    def build(self, site: Site) -> Graft:
        return ScaledHeads(site, self.spread)

    @torch.no_grad()
    def best(self) -> list[tuple[str, int]]:
        """The heads to keep, as (site, head), the largest |A_h| first; of equal ones those of lower layers."""
        found = [(graft.site.name, head) for graft in self.grafts if isinstance(graft, ScaledHeads)
                 for head in range(len(graft.A))]
        norms = torch.cat([graft.A.norm(dim=1) for graft in self.grafts if isinstance(graft, ScaledHeads)])
        return [found[i] for i in norms.sort(descending=True, stable=True).indices[:self.count].tolist()]

    def advance(self, module: nn.Module | None = None) -> None:
        """From scales of all heads to offsets of the best."""
        if self.stage == "offsets":
            raise ScionError(f"{self.name}: the stage 'offsets' is the last one")
        chosen: dict[str, list[int]] = {}
        for name, head in self.best():
            chosen.setdefault(name, []).append(head)
        self._shift({name: torch.tensor(sorted(heads)) for name, heads in chosen.items()})

    def _shift(self, chosen: dict[str, Tensor]) -> None:
        """Put offsets of the chosen heads in the scales' place."""
        for graft in self.grafts:
            self.drop_graft(graft)
            if graft.site.name in chosen:
                with seeded(self.seed, self.name, graft.site.name, "offsets"):
                    self.add_graft(ShiftedHeads(graft.site, chosen[graft.site.name], self.spread))
        self.stage = "offsets"
        if self.config.get("lr") is None:
            self.suggested["lr"] = LEARNING_RATES["offsets"]

    @property
    def adds_loss(self) -> bool:
        return self.stage == "heads" and self.l1 > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        if not self.adds_loss:
            return None
        return self.l1 * torch.stack([p.abs().sum() for p in self.module.parameters()]).sum()

    def structure(self) -> dict[str, Any]:
        return {"stage": self.stage, "heads": {graft.site.name: len(graft.index) for graft in self.grafts
                                               if isinstance(graft, ShiftedHeads)}}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("stage") == "offsets" and self.stage == "heads":
            self._shift({name: torch.zeros(count) for name, count in structure["heads"].items()})
