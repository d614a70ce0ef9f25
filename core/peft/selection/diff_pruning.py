"""Diff pruning: a change of all parameters under masks that are learned to be sparse (Guo et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, parameter_sites, renamed
from core.errors import ScionError
from core.graft import Graft
from core.graft.sparse import DESCRIBED, SparseGraft, check_budget, described, entries_of
from core.method import AddsLoss, PEFTMethod, Staged, check_shapes, shapes_by_site
from core.peft.selection.full import all_parameters
from core.random_state import draw_for_all

LOW, HIGH, EDGE = -1.5, 1.5, 1e-4
LEARNING_RATES = {"masks": 1e-5, "fixed": 5e-5}


def gate(a: Tensor, noise: bool) -> Tensor:
    """Hard concrete gates in [0, 1]: clip(sigmoid(a + log u - log(1 - u)) (HIGH - LOW) + LOW, 0, 1); u = 1/2 without
    noise."""
    if noise:
        u = draw_for_all(lambda: torch.empty_like(a).uniform_(EDGE, 1 - EDGE), a.device)
        a = a + u.log() - (1 - u).log()
    return (torch.sigmoid(a) * (HIGH - LOW) + LOW).clamp(0, 1)


def open_share(a: Tensor) -> Tensor:
    """The probability that a gate is not zero."""
    return torch.sigmoid(a - math.log(-LOW / HIGH))


class MaskedChange(Graft):
    """theta + z * w for one parameter; z is drawn in each forward of training."""

    def __init__(self, site: Site, structured: bool, start: float, draw: bool) -> None:
        super().__init__(site)
        shape = site.full_weight.shape
        self.w = nn.Parameter(torch.zeros(shape))
        self.a = nn.Parameter(torch.full(shape, start))
        self.shared = nn.Parameter(torch.full((), start)) if structured else None
        self.draw = draw

    def change(self, noise: bool = False) -> Tensor:
        """z * w"""
        z = gate(self.a, noise)
        return (z if self.shared is None else z * gate(self.shared, noise)) * self.w

    def weight(self, weight: Tensor) -> Tensor:
        return weight + self.change(self.training and self.draw)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.change().to(weight.dtype)

    def expected(self) -> Tensor:
        """The number of entries that the gates let through, in the mean."""
        share = open_share(self.a).sum()
        return share if self.shared is None else share * open_share(self.shared)


class DiffPruning(Staged, AddsLoss, PEFTMethod):
    """Trains a change of every parameter and how much of it to let through, keeps the largest, and trains those on.

    Equation: theta = theta_0 + z * w; z = clip(3 s - 1.5, 0, 1), s = sigmoid(a + log u - log(1 - u)), u uniform (1/2
        outside training); loss + l0 sum sigmoid(a), which is the probability of z > 0. w = 0 and a = 5 at the start.
        ``structured``: z times a gate of each tensor. Second stage: the K entries with the largest |z w| begin with
        that value and are trained alone
    Trains: two numbers a parameter (ViT-B/16: 171,597,312), then K; stored at the end: K and their positions
        (BERT-base: 547,411)
    Merges: theta_0 + z * w
    Source: Guo et al. 2021, arXiv:2012.07463, section 3, and the authors' code. Single numbers (CLIP's logit scale)
        stay frozen. Two stages: the command runs both; elsewhere fit, call ``advance()``, and fit again with a new
        optimizer

    Args:
        density: share of the parameters to keep, of those that are not excluded, in (0, 1]; 0.005 where nothing else is
            given.
        count: alternative to ``density``: how many to keep.
        l0: weight of the expected number of changed entries.
        structured: whether each tensor has a gate of its own besides.
        start: of a.
        mask_lr: learning rate of a, whatever that of w is.
        draw: whether training draws u; else it is 1/2 there too.
        exclude: roles that stay frozen.
    """

    tags = ("partial", ("entries",))
    mergeable = True
    by_rows = False
    inference_cost = "none once merged"
    recommended = {"lr": LEARNING_RATES["masks"], "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"stage": Literal["masks", "fixed"], **DESCRIBED}
    stages = ("masks", "fixed")
    mode = "train"

    keep: int
    """Entries to keep, on this model."""

    def __init__(self, density: float | None = None, count: int | None = None, l0: float = 1.25e-7,
                 structured: bool = False, start: float = 5.0, mask_lr: float = 0.1, draw: bool = True,
                 exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        check_budget("DiffPruning", density, count)
        if l0 < 0 or mask_lr <= 0:
            raise ScionError(f"DiffPruning: l0 {l0} must not be negative, mask_lr {mask_lr} positive")
        self.density, self.count = 0.005 if density is None and count is None else density, count
        self.l0, self.structured, self.first, self.mask_lr = l0, structured, start, mask_lr
        self.draw, self.exclude = draw, tuple(exclude)
        self.stage = "masks"

    def sites(self, anatomy: Anatomy) -> list[Site]:
        wanted = {id(site.module): site.while_active for site in anatomy.all_sites()
                  if site.while_active and site.role != "attend"}
        found = parameter_sites(anatomy.root, all_parameters(anatomy, self.layers, self.exclude, self.name))
        return [renamed(site, while_active=wanted.get(id(site.module), ())) for site in found
                if site.full_weight.dim()]

    def check(self, anatomy: Anatomy) -> None:
        total = sum(site.full_weight.numel() for site in self.sites(anatomy))
        if self.count is not None and self.count > total:
            raise ScionError(f"{self.name}: count {self.count} is more than the {total} parameters to choose from")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        total = sum(site.full_weight.numel() for site in self.sites(anatomy))
        return {"stage": "masks", "keep": self.count or max(1, round((self.density or 0) * total))}

    def build(self, site: Site) -> Graft:
        return MaskedChange(site, self.structured, self.first, self.draw)

    @torch.no_grad()
    def advance(self, module: nn.Module | None = None) -> None:
        """Keep the largest changes of all, and leave these alone to train."""
        if self.stage == "fixed":
            raise ScionError(f"{self.name}: the stage 'fixed' is the last one")
        changes = {graft.site.name: graft.change().flatten() for graft in self.grafts
                   if isinstance(graft, MaskedChange)}
        best = torch.cat([change.abs() for change in changes.values()]).topk(self.keep).indices.sort().values
        kept: dict[str, Tensor] = {}
        offset = 0
        for name, change in changes.items():
            kept[name] = best[(best >= offset) & (best < offset + len(change))] - offset
            offset += len(change)
        self._fix({name: index for name, index in kept.items() if len(index)})
        for graft in self.grafts:
            assert isinstance(graft, SparseGraft)
            graft.values.copy_(changes[graft.site.name][kept[graft.site.name]])

    def _fix(self, kept: dict[str, Tensor]) -> None:
        self.identity_at_start = False  # of this stage
        for graft in self.grafts:
            self.drop_graft(graft)
            if graft.site.name in kept:
                self.add_graft(SparseGraft(graft.site, kept[graft.site.name]))
        self.stage = "fixed"
        if self.config.get("lr") is None:
            self.suggested["lr"] = LEARNING_RATES["fixed"]

    # --------------------------------------------------------------------------------- in training

    def may_lack_gradient(self) -> set[str]:  # a gate that is fully open or closed in a draw has no gradient
        return {name for name in self.trainable() if name.endswith((".a", ".shared"))}

    def param_groups(self) -> list[dict[str, Any]]:
        masks = self.may_lack_gradient()
        groups = [{"params": [t for name, t in self.trainable().items() if name not in masks], "weight_decay": 0.0},
                  {"params": [t for name, t in self.trainable().items() if name in masks], "weight_decay": 0.0,
                   "lr": self.mask_lr}]
        return [group for group in groups if group["params"]]

    @property
    def adds_loss(self) -> bool:
        return self.stage == "masks" and self.l0 > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        if not self.adds_loss:
            return None
        return self.l0 * torch.stack([graft.expected() for graft in self.grafts
                                      if isinstance(graft, MaskedChange)]).sum()

    def structure(self) -> dict[str, Any]:
        if self.stage == "fixed":
            return {"stage": self.stage, "entries": described(self.grafts)}
        return {"stage": self.stage, "shapes": shapes_by_site(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        entries = entries_of(structure) if structure.get("stage") == "fixed" else {}
        check_shapes(self, structure.get("shapes", {}) | {name: shape for name, (_, *shape) in entries.items()})
        if entries and self.stage == "masks":
            self._fix({name: torch.zeros(count) for name, (count, *_) in entries.items()})
