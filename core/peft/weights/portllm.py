"""PortLLM: what a method has learned on one base, carried to another (Khan et al. 2024, arXiv:2410.10870)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy, Site, parameter_sites
from core.errors import ScionError
from core.graft import Graft
from core.json_types import Count
from core.method import PEFTMethod
from core.patch import Change, Patch


class PatchGraft(Graft):
    """W + scale U D, with U [out, rank] and D [rank, in], or W + scale U where the change is dense; all frozen."""

    up: Tensor
    down: Tensor | None

    def __init__(self, site: Site, up: Tensor, down: Tensor | None, scale: float) -> None:
        super().__init__(site)
        self.register_buffer("up", up)
        self.register_buffer("down", down)
        self.scale = scale

    def weight(self, weight: Tensor) -> Tensor:
        change = self.up if self.down is None else self.up @ self.down
        return weight + (self.scale * change).view_as(weight).to(weight.dtype)


class PortLLM(PEFTMethod):
    """A patch, taken from a model with trained methods, beside the frozen weights of another base; nothing is trained.

    Equation: W'_i = W' + scale dW_i, dW_i = W_i - W as it was learned on the old base (s B A, if that was LoRA)
    Trains: nothing (a head may be trained beside it). LoRA of rank 8 on all linear maps of Mistral-7B: 20,971,520
        numbers to carry
    Merges: W' + scale dW
    Source: Khan et al. 2024, arXiv:2410.10870. ``core.Patch`` takes, adds, subtracts, scales and applies patches;
        that the new base would have learned much the same change is the paper's observation, not a theorem

    Args:
        patch: folder that ``Patch.save`` wrote.
        scale: factor of the patch.
    """

    tags = ("reparameterised", ("linear", "composition"))
    mergeable = True
    trains_backbone = False
    recommended = {"lr": 1e-3, "weight_decay": 0.1}
    structure_types = {"changes": dict[str, list[list[Count]]]}
    start_only = ("patch",)  # the adapter holds the numbers, wherever the folder is by then

    changes: dict[str, Change]
    """Those of the patch, by their names on this model."""

    def __init__(self, patch: str = "", scale: float = 1.0, **common: Any) -> None:
        super().__init__(**common)
        self.patch, self.scale = patch, scale
        try:
            self.taken = Patch.load(patch) if patch else Patch({})
        except ScionError as error:
            raise ScionError(f"PortLLM: {error}") from None

    def check(self, anatomy: Anatomy) -> None:
        self.taken.on(anatomy.root).check(anatomy.root)
        self.taken.warn_of_head()
        if self.taken.head:
            raise ScionError(f"{self.name}: {self.patch} brings a task head of its own; apply it with Patch.apply")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"changes": self.taken.on(anatomy.root).changes}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return parameter_sites(anatomy.root, self.taken.on(anatomy.root).changes)

    def build(self, site: Site) -> Graft:
        change = self.changes[site.name]
        return PatchGraft(site, change.up.clone(), None if change.down is None else change.down.clone(), self.scale)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.grafts:
            raise ScionError(f"{self.name}: give the folder of a patch (patch=...), as Patch.save writes it")
        super().on_fit_start(trainer, pl_module)

    def structure(self) -> dict[str, Any]:
        return {"changes": {graft.site.name: [list(part.shape) for part in (graft.up, graft.down) if part is not None]
                            for graft in self.grafts if isinstance(graft, PatchGraft)}}

    def restructure(self, structure: dict[str, Any]) -> None:
        root = self.need_root()
        parameters = dict(root.named_parameters())
        present = {graft.site.name for graft in self.grafts}
        fresh: dict[str, list[Tensor]] = {}
        for name, shapes in structure.get("changes", {}).items():
            if name in present:
                continue
            shape = [shapes[0][0], shapes[-1][-1]] if len(shapes) == 2 else shapes[0]
            here = list(parameters[name].shape) if name in parameters else []
            if (list(parameters[name].flatten(1).shape) if len(shapes) == 2 and here else here) != shape:
                raise ScionError(f"{self.name}: {name} is {shape} in the file, {here or 'absent'} here")
            fresh[name] = [torch.zeros(part) for part in shapes]
        for site in parameter_sites(root, fresh):
            up, *down = fresh[site.name]
            self.add_graft(PatchGraft(site, up, down[0] if down else None, self.scale))
