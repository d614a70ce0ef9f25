"""Changes of a tensor at some of its positions, and how the positions move with their optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import Graft
from core.json_types import Count, Shapes


def check_budget(method: str, density: float | None, count: int | None) -> None:
    """Refuse what is not one of a share and a number of parameters (neither is the method's own default)."""
    if density is not None and count is not None:
        raise ScionError(f"{method}: give density ({density}) or count ({count}), not both")
    if density is not None and not 0 < density <= 1:
        raise ScionError(f"{method}: density {density} must lie in (0, 1]")
    if count is not None and count < 1:
        raise ScionError(f"{method}: count {count} must be at least 1")


class SparseGraft(Graft):
    """theta + scatter(index, values): a site's weight, or one parameter, changed at k flat positions.

    The changed weight lives only while it is multiplied: neither forward nor backward keeps it.

    Args:
        site: a linear map, part of a fused one, or a parameter.
        index: distinct flat positions [k] in the site's matrix; stored in 4 bytes each where that suffices.
    """

    remade = True
    entries = True
    index: Tensor

    def __init__(self, site: Site, index: Tensor) -> None:
        super().__init__(site)
        wide = site.full_weight.numel() >= 2**31
        self.register_buffer("index", index.to(torch.int64 if wide else torch.int32))  # [k]
        self.values = nn.Parameter(torch.zeros(index.numel()))  # [k]
        self.watch: Callable[[SparseGraft, Tensor], None] | None = None
        """Called in backward with this graft and the gradient of the whole weight, flat; it is not kept."""

    def weight(self, weight: Tensor) -> Tensor:
        changed = weight.flatten().index_add(0, self.index, self.values.to(weight.dtype))
        if self.watch is not None and changed.requires_grad:
            watch = self.watch
            changed.register_hook(lambda gradient: watch(self, gradient))
        return changed.view_as(weight)

    @property
    def places(self) -> int:
        """How many positions the site has."""
        site = self.site
        return site.full_weight.numel() if site.role == "parameter" else site.in_features * site.out_features

    def limits(self) -> dict[str, int]:
        return {"index": self.places}

    def delta(self) -> Tensor:
        """The change as a flat tensor of the site's whole size."""
        size = self.site.in_features * self.site.out_features
        return self.values.new_zeros(size).index_add(0, self.index, self.values)

    @torch.no_grad()
    def move(self, index: Tensor, values: Tensor) -> None:
        """Other positions, as many as before, with these values."""
        self.index.copy_(index)
        self.values.copy_(values)


DESCRIBED = {"entries": Shapes, "counts": dict[str, Count], "shapes": Shapes}
"""Types of what `entries_of` reads, for a method's ``structure_types``."""


def described(grafts: Iterable[Graft]) -> dict[str, list[int]]:
    """{site: [its number of entries, the shape of its weight ...]}, for a method's `structure`."""
    return {graft.site.name: [graft.values.numel(), *graft.site.full_weight.shape] for graft in grafts
            if isinstance(graft, SparseGraft)}


def entries_of(structure: dict[str, Any]) -> dict[str, list[int]]:
    """What `described` wrote; files from before it hold counts and shapes apart."""
    apart = {name: [count, *structure["shapes"][name]] for name, count in structure.get("counts", {}).items()}
    return structure.get("entries", apart)


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """An optimizer's state of a parameter (also within `core.optim.Together`); empty before its first step."""
    for one in getattr(optimizer, "optimizers", [optimizer]):
        if parameter in one.state:
            return one.state[parameter]
    return {}


def state_vectors(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Those parts of the state that hold one number for each of the parameter's."""
    return {name: value for name, value in state_of(optimizer, parameter).items()
            if isinstance(value, Tensor) and value.shape == parameter.shape}
