"""The model that peft wraps: which of its modules a site is, and which roles and layers a set of modules is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from core.anatomy import Anatomy, Site, dissect
from core.errors import ScionError


class WrappedModel:
    """The model that peft wraps, inside the root of our methods, and its modules' names there."""

    def __init__(self, root: nn.Module, where: str = "") -> None:
        self.anatomy: Anatomy = dissect(root)
        self.root, self.where = root, where
        inner = self.anatomy.inputs.path
        parts = inner.split(".") if inner else []
        self.chain = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        """Paths of the modules from the root to the described backbone."""
        library = [path for path in self.chain if self._of_library(root.get_submodule(path))]
        self.base = library[0] if library else ""
        """Path of what the library made: what is around it is a wrapper of this project."""
        self.model: Any = root.get_submodule(self.base)
        self.modules = {name for name, _ in root.named_modules(remove_duplicate=False)}

    @staticmethod
    def _of_library(module: nn.Module) -> bool:
        return hasattr(module, "save_pretrained") or hasattr(module, "pretrained_cfg")

    def name(self, path: str) -> str:
        """A path in the root as a name in the wrapped model."""
        return path.removeprefix(f"{self.base}.") if self.base else path

    def pattern(self, names: Iterable[str]) -> list[str] | str:
        """``target_modules`` for exactly these modules: peft takes every module that ends like a name in a list."""
        names = sorted(names)
        everything = {self.name(path) for path in self.modules} - set(names)
        if any(other.endswith(f".{name}") for name in names for other in everything):
            return "|".join(re.escape(name) for name in names)
        return names

    def paths(self, names: Iterable[str]) -> dict[str, str]:
        """The root's paths of modules that an adapter names, which may have been made with more or fewer wrappers."""
        names = list(names)
        for cut in range(3):
            rest = [name.split(".", cut)[-1] for name in names]
            if len({tuple(name.split(".")[:cut]) for name in names}) > 1:
                break
            for start in dict.fromkeys([self.base, *self.chain]):
                found = {name: f"{start}.{short}".lstrip(".") for name, short in zip(names, rest, strict=True)}
                if self.modules.issuperset(found.values()):
                    return found
        at_home = {f"{self.base}.{name}".lstrip("."): name for name in names}
        missing = [name for path, name in at_home.items() if path not in self.modules]
        raise ScionError(f"{self.where}: the adapter's module {(missing or names)[0]} does not exist in "
                         f"{type(self.model).__name__}; load it onto the model that it was made for")

    def cover(self, names: dict[str, str], fits: Callable[[Site], bool]
              ) -> list[tuple[list[int] | None, list[tuple[Site, str]]]]:
        """Roles and layers that are exactly the modules at these paths: for each set of layers, sites with names."""
        chosen: dict[str, Site] = {}
        for site in self.anatomy.all_sites():
            if site.rows is None and site.path in names and fits(site):
                chosen.setdefault(site.path, site)
        left = [name for path, name in names.items() if path not in chosen]
        if left:
            raise ScionError(f"{self.where}: {left[0]} plays no role in {self.anatomy.family} that the method can have")
        layers: dict[str, set[int | None]] = {}
        for site in chosen.values():
            layers.setdefault(site.role, set()).add(site.block)
        groups: dict[tuple[int, ...] | None, list[tuple[Site, str]]] = {}
        for path, site in chosen.items():
            groups.setdefault(self._layers(site.role, layers[site.role], chosen), []).append((site, names[path]))
        return [(None if group is None else list(group), sites) for group, sites in groups.items()]

    def _layers(self, role: str, blocks: set[int | None], chosen: dict[str, Site]) -> tuple[int, ...] | None:
        if role in self.anatomy.stem:
            absent = [site.path for site in self.anatomy.stem[role] if site.path not in chosen]
            if absent:
                raise ScionError(f"{self.where}: adapts some modules of the role {role!r} and not {absent[0]}; here a "
                                 "role outside the blocks is adapted as a whole")
            return None
        having = {block.index for block in self.anatomy.blocks if role in block.sites}
        return None if blocks == having else tuple(sorted(block for block in blocks if block is not None))

    def task(self) -> str | None:
        """peft's name of the task, where the model's class says it."""
        known = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
        return next((task for end, task in known.items() if type(self.model).__name__.endswith(end)), None)
