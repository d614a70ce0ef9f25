"""Compositions of methods. A list of methods is a stack; here is what a list cannot say.

``Route`` holds methods side by side, one at a time or each for its own rows of a batch::

    languages = Route([LoRA(name="en"), LoRA(name="sw")]).attach(model)
    with languages.route("sw"):                     # the whole batch
        model(x)
    with languages.route([0, 1, 1, 0]):             # each row its own
        model(x)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy
from core.errors import ScionError, nearest
from core.graft import Graft, route_rows
from core.method import PEFTMethod, key_of, methods_on

__all__ = ["Route"]


class Route(PEFTMethod):
    """Several variants of the same backbone, of which one is in the forward, or each row of a batch has its own.

    Equation: f(x_i) = f_{r(i)}(x_i), for the route r of the batch
    Trains: the sum of its methods
    Merges: no, it has several weights
    Source: batch splitting as in AdapterHub's Parallel and in S-LoRA

    Args:
        methods: the variants, each with a name of its own; the first is active until ``route`` says otherwise.
    """

    inference_cost = "each variant computes its own rows"

    def __init__(self, methods: Sequence[Any], **common: Any) -> None:
        super().__init__(**common)
        from core import peft

        self.methods: list[PEFTMethod] = []
        for method in methods:
            if isinstance(method, dict):
                rest = {key: value for key, value in method.items() if key not in ("class", "class_path")}
                arguments = method.get("init_args", rest)
                method = peft.make(method.get("class") or method.get("class_path", ""), arguments)
            self.methods.append(method)
        names = [method.name for method in self.methods]
        if not names or len(set(names)) < len(names):
            raise ScionError(f"Route: the methods need names of their own, got {names}; give name=... to each")
        for method in self.methods:
            if method.moves_base or method.norms:
                raise ScionError(f"Route: {method.name} trains the backbone itself, which all rows of a batch share")
            if method.prepares:
                raise ScionError(f"Route: {method.name} computes start values from data, alone on its backbone")
        self.config["methods"] = self.methods
        self.identity_at_start = all(method.identity_at_start for method in self.methods)

    def check(self, anatomy: Anatomy) -> None:
        for method in self.methods:
            for role in method.needs:
                if role not in anatomy.roles:
                    raise ScionError(f"{method.name} needs the role {role!r}, which {anatomy.family} does not have")
            method.check(anatomy)

    def feature_dim(self, dim: int, anatomy: Anatomy) -> int:
        widths = {method.name: method.feature_dim(dim, anatomy) for method in self.methods}
        if len(set(widths.values())) > 1:
            raise ScionError(f"{self.name}: one head cannot read features of different widths: {widths}")
        return widths[self.methods[0].name]

    def foresee(self, roles: Sequence[str], blocks: int, family: str) -> None:
        for method in self.methods:
            method.foresee(roles, blocks, family)

    def _fill(self, module: nn.Module, anatomy: Anatomy) -> None:
        for i, method in enumerate(self.methods):
            branch = nn.Module()
            method._fill(branch, anatomy)
            module.add_module(key_of(method.name), branch)
            for graft in _grafts(branch):
                graft.active = i == 0

    def _branch(self, method: PEFTMethod) -> list[Graft]:
        return _grafts(self.module.get_submodule(key_of(method.name)))

    @contextlib.contextmanager
    def route(self, variant: str | Tensor | Sequence[int]) -> Iterator[None]:
        """Within this context the named variant is in the forward, or row i of a batch sees variant ``variant[i]``.

        Raises:
            ScionError: no such variant.
        """
        root = self._need_root()
        names = [method.name for method in self.methods]
        states = [graft.active for graft in self.grafts]
        route = None
        if isinstance(variant, str):
            if variant not in names:
                raise ScionError(f"{self.name}: no variant is called {variant!r}{nearest(variant, names)}; there are "
                                 f"{names}")
        else:
            route = torch.as_tensor(variant, device=next(self.module.parameters()).device).long()
            if route.dim() != 1 or (route.numel() and not 0 <= int(route.min()) <= int(route.max()) < len(names)):
                raise ScionError(f"{self.name}: a route is one index a row, 0 to {len(names) - 1}")
            for other in methods_on(root):
                if any(graft.folds for graft in other.grafts):
                    raise ScionError(f"{self.name}: {other.name} lets several streams ride in the batch, whose rows "
                                     "are then no samples to route; route the whole batch by name")
        try:
            for i, method in enumerate(self.methods):
                branch = self._branch(method)
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
        from core import graft as grafts

        for graft in self.grafts:
            grafts.refresh(graft)


def _grafts(module: nn.Module) -> list[Graft]:
    return [child for child in module.modules() if isinstance(child, Graft)]
