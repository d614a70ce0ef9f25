"""HFT: half fine-tuning, a drawn half of the weights at a time (Hui et al. 2024, arXiv:2404.18466)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy, Block, Site, dissect
from core.errors import ScionError
from core.json_types import Count
from core.method import NORMS, Home, PEFTMethod, Scheduled
from core.random_state import seed_of

CATEGORIES = (("q", "k", "v", "o"), ("cross.q", "cross.k", "cross.v", "cross.o"), ("mlp.up", "mlp.gate", "mlp.down"),
              ("conv",), tuple(role for role in NORMS if role != "norm"))
"""Roles in a block, half of each of which is trained."""

Units = dict[str, list[Site]]
"""What can be trained or frozen: the path of a module, and the sites of a category that it holds."""


class HalfFineTuning(Scheduled, PEFTMethod):
    """Trains half of the blocks' weights in a round, the other half stays; each round draws anew.

    Equation: theta <- theta - lr g(theta) for theta in the round's half: 2 of {W_q, W_k, W_v, W_o}, 1 of 2 norms and of
        2 maps of the MLP. Where nothing is exactly half (3 maps of a gated MLP; q, k and v fused into one weight, which
        counts as three), the larger part in half of the layers and the smaller in the others
    Trains: half of the blocks; LLaMA-2-7B: 3,238,133,760 of 6,476,267,520
    Merges: the weights are the base's own
    Source: Hui et al. 2024, arXiv:2404.18466, section 3.2 (number and rule from memory). Biases go with their weights.
        Embeddings, what stands outside the blocks, and tables of positions stay frozen. The optimizer holds the round's
        half alone: what is frozen loses its state. Learning rate as FullFineTuning's here

    Args:
        interval: optimizer steps of a round; None is one round, the whole run.
        whole: roles that are trained in every round besides (``("embed",)``).
    """

    tags = ("partial", ("linear", "optimizer"))
    mergeable = True
    moves_base = True
    inference_cost = "none"
    recommended = {"lr": 5e-5, "weight_decay": 0.1, "head_lr": 1e-3}
    structure_types = {"round": Count}
    mode = "train"

    def __init__(self, interval: int | None = None, whole: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        if interval is not None and interval < 1:
            raise ScionError(f"HalfFineTuning: interval {interval} must be at least 1, or None")
        self.interval, self.whole = interval, tuple(whole)
        self.round = 0
        self.chosen: set[str] = set()  # names of the parameters of this round
        self._unmoved: dict[str, Tensor] = {}  # start values of what no round has trained yet

    # --------------------------------------------------------------------------------- the draw

    def units(self, anatomy: Anatomy) -> list[list[Units]]:
        """What there is to draw from, by category and layer."""
        blocks = [anatomy.blocks[i] for i in sorted(anatomy.layer_indices(self.layers, self.name))]
        return [[units for block in blocks if (units := _units(block, roles))] for roles in CATEGORIES]

    def draw(self, anatomy: Anatomy, number: int) -> set[str]:
        """Names of the parameters that round ``number`` trains."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, "round", number))
        found: set[str] = set()
        for layers in self.units(anatomy):
            larger = torch.randperm(len(layers), generator=generator, device="cpu") + int(
                torch.randint(2, (), generator=generator, device="cpu"))
            for units, place in zip(layers, larger.tolist(), strict=True):
                parts = halves(units, larger=place % 2 == 0)
                part = parts[int(torch.randint(len(parts), (), generator=generator, device="cpu"))]
                found |= {name for path in part for name in units[path][0].parameter_names}
        for site in anatomy.sites(self.whole, self.layers, self.name) if self.whole else ():
            found |= set(site.parameter_names)
        return found - anatomy.head_names()

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        chosen = self.draw(anatomy, 0)
        return [name for name, _ in anatomy.root.named_parameters() if name in chosen]

    def attach(self, model: Any) -> PEFTMethod:
        if self.root is not None:
            return super().attach(model)
        super().attach(model)
        self.round, self.chosen = 0, set(self.base_at_start)
        parameters = dict(self.need_root().named_parameters())
        self.base_at_start = {name: self.base_at_start[name] for name in parameters if name in self.base_at_start}
        every = {name for layers in self.units(dissect(self.need_root())) for units in layers
                 for sites in units.values() for name in sites[0].parameter_names}
        self._unmoved = {name: p.detach() if p.is_meta else p.detach().to("cpu", copy=True)
                         for name, p in parameters.items()
                         if self.interval is not None and name in every and name not in self.base_at_start}
        return self

    def trainable(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in super().trainable().items() if name in self.chosen}

    def unmerge(self) -> None:
        super().unmerge()
        self._choose(self.chosen)

    def _choose(self, chosen: set[str]) -> None:
        """Train these of the method's tensors."""
        self.chosen = chosen
        parameters = dict(self.need_root().named_parameters())
        for name in self.base_at_start:
            parameters[name].requires_grad_(self.is_trained and name in chosen)
            if name not in chosen:
                parameters[name].grad = None

    def next_round(self) -> set[str]:
        """Draw the next half; returns what was trained until now. The optimizer is the caller's to mend."""
        root, before = self.need_root(), self.chosen
        chosen = self.draw(dissect(root), self.round + 1) | set(self.norm_names)
        chosen &= self.base_at_start.keys() | self._unmoved.keys()
        home: Home = root.peft  # type: ignore[assignment]
        others = {name: method for method in home.methods.values() if method is not self
                  for name in method.base_at_start}
        for name in sorted(chosen & others.keys()):
            raise ScionError(f"{self.name}: {name} of the next half is trained by {others[name].name}")
        self.round += 1
        values = dict(self.base_at_start)
        for name in [name for name in self._unmoved if name in chosen]:
            values[name] = self._unmoved.pop(name)
        # In the order in which a new optimizer would have them, so that its state can be loaded.
        self.base_at_start = {name: values[name] for name, _ in root.named_parameters() if name in values}
        self._choose(chosen)
        return before

    # --------------------------------------------------------------------------------- in training

    @property
    def is_scheduled(self) -> bool:
        return self.interval is not None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.interval is None or self.steps % self.interval or self.steps >= self.total:
            return
        before = self.next_round()
        parameters: dict[str, Any] = dict(self.need_root().named_parameters())
        fresh = [parameters[name] for name in self.base_at_start if name in self.chosen - before]
        self.enter_optimizer(optimizer, fresh, beside=[parameters[name] for name in before])
        self.leave_optimizer(optimizer, [parameters[name] for name in before - self.chosen])

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        options = getattr(trainer.strategy, "_ddp_kwargs", {})
        if self.interval is not None and trainer.world_size > 1 and not options.get("find_unused_parameters"):
            raise ScionError(f"{self.name} freezes tensors in mid-run: use --trainer.strategy "
                             "ddp_find_unused_parameters_true")
        super().on_fit_start(trainer, pl_module)

    def structure(self) -> dict[str, Any]:
        return {"round": self.round}

    def restructure(self, structure: dict[str, Any]) -> None:
        last = structure.get("round", 0)
        heads = dissect(self.need_root()).head_names()
        while self.round < last:
            if self._unmoved.keys() <= heads:  # no round adds anything any more
                self.round = last - 1
            self.next_round()


def _units(block: Block, roles: Sequence[str]) -> Units:
    """The block's modules that play these roles; parts of a fused one go together."""
    found: Units = {}
    for role in roles:
        if role in block.sites and any(True for _ in block.sites[role].module.parameters()):
            found.setdefault(block.sites[role].path, []).append(block.sites[role])
    return found


def halves(units: Units, larger: bool) -> list[tuple[str, ...]]:
    """The parts of ``units`` that come nearest to half of their sites; where none is half, those above or below."""
    total = sum(len(sites) for sites in units.values())
    parts = [part for size in range(len(units) + 1) for part in itertools.combinations(units, size)]
    sizes = [sum(len(units[path]) for path in part) for part in parts]
    best = min(size for size in sizes if 2 * size >= total)
    best = best if larger else total - best
    return [part for part, size in zip(parts, sizes, strict=True) if size == best]
