"""Methods side by side, one at a time or each for its own rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from core import graft as grafts
from core.anatomy import Anatomy
from core.compose.side_by_side import SideBySide
from core.errors import ScionError, nearest
from core.graft import Graft, route_rows
from core.method import key_of, methods_on


class Route(SideBySide):
    """Several variants of the same backbone, of which one is in the forward, or each row of a batch has its own.

    Equation: f(x_i) = f_{r(i)}(x_i), for the route r of the batch
    Trains: the sum of its methods
    Merges: no, it has several weights
    Source: batch splitting as in AdapterHub's Parallel and in S-LoRA

    Args:
        methods: the variants, each with a name of its own; the first is active until ``route`` says otherwise.
    """

    tags = ("unified", ("routing", "composition"))
    inference_cost = "each variant computes its own rows"

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        first = self.methods[0]
        for method in self.methods:
            for graft in self.branch(method):
                graft.active = method is first

    def standing(self, module: nn.Module) -> list[Graft]:
        children = dict(module.named_children())
        found: list[Graft] = []
        for method in self.methods:
            branch = children.get(key_of(method.name))
            if branch is not None:
                found += method.standing(branch)
        return found

    @contextlib.contextmanager
    def route(self, variant: str | Tensor | Sequence[int]) -> Iterator[None]:
        """Within this context the named variant is in the forward, or row i of a batch sees variant ``variant[i]``.

        Raises:
            ScionError: no such variant.
        """
        root = self.need_root()
        names = [method.name for method in self.methods]
        states = [graft.active for graft in self.grafts]
        route = None
        if isinstance(variant, str):
            if variant not in names:
                raise ScionError(f"{self.name}: no variant is called {variant!r}{nearest(variant, names)}; there are "
                                 f"{names}")
        else:
            device = next(self.module.parameters()).device
            route = torch.as_tensor(variant, device=device).long()
            if route.dim() != 1 or (route.numel() and not 0 <= int(route.min()) <= int(route.max()) < len(names)):
                raise ScionError(f"{self.name}: a route is one index a row, 0 to {len(names) - 1}")
            for other in methods_on(root):
                if any(graft.folds for graft in other.grafts):
                    raise ScionError(f"{self.name}: {other.name} lets several streams ride in the batch, whose rows "
                                     "are then no samples to route; route the whole batch by name")
        try:
            # with a route all variants take part, each for its own rows; with a name only that variant
            for i, method in enumerate(self.methods):
                branch = self.branch(method)
                for graft in branch:
                    graft.active = route is not None or method.name == variant
                route_rows(branch, route, i)
            self._refresh()
            yield
        finally:
            route_rows(self.grafts, None)
            for graft, state in zip(self.grafts, states, strict=True):
                graft.active = state
            self._refresh()

    def _refresh(self) -> None:
        for graft in self.grafts:
            grafts.refresh(graft)
