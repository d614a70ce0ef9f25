"""The model that peft wraps: how sites are named there, and which roles and layers a set of its modules is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from core.anatomy import Anatomy, Site, dissect
from core.errors import ScionError

Sited = list[tuple[Site, str]]
"""Sites, each with its module's name in the adapter."""


class WrappedModel:
    """The model that peft wraps, inside the root of our methods, and its modules' names there."""

    def __init__(self, root: nn.Module, where: str = "") -> None:
        self.anatomy: Anatomy = dissect(root)
        self.root = root
        self.where = where
        inner = self.anatomy.inputs.path
        parts = inner.split(".") if inner else []
        self.chain = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        """Paths of the modules from the root to the described backbone."""
        self.base = next((path for path in self.chain if self._of_library(root.get_submodule(path))), "")
        """Path of the library's own model; everything around it is a wrapper of this project."""
        self.model: Any = root.get_submodule(self.base)
        self.modules = {name for name, _ in root.named_modules(remove_duplicate=False)}

    @staticmethod
    def _of_library(module: nn.Module) -> bool:
        # transformers' models have the first, timm's the second.
        return hasattr(module, "save_pretrained") or hasattr(module, "pretrained_cfg")

    def name(self, path: str) -> str:
        """A path in the root as a name in the wrapped model."""
        return path.removeprefix(f"{self.base}.") if self.base else path

    def pattern(self, names: Iterable[str]) -> list[str] | str:
        """``target_modules`` for exactly these modules."""
        names = sorted(names)
        others = {self.name(path) for path in self.modules} - set(names)
        # peft takes every module that ends like a name in a list, and with a pattern only those that it matches whole.
        for name in names:
            if any(other.endswith(f".{name}") for other in others):
                return "|".join(re.escape(name) for name in names)
        return names

    def paths(self, names: Iterable[str]) -> dict[str, str]:
        """The root's paths of modules that an adapter names, which may have been made with more or fewer wrappers."""
        names = list(names)
        # Fewer wrappers here: drop up to two first parts, which all names must share. More: try every path as a start.
        for cut in range(3):
            beginnings = {tuple(name.split(".")[:cut]) for name in names}
            if len(beginnings) > 1:
                break
            rest = [name.split(".", cut)[-1] for name in names]
            for start in dict.fromkeys([self.base, *self.chain]):
                found = {name: _joined(start, short) for name, short in zip(names, rest, strict=True)}
                if self.modules.issuperset(found.values()):
                    return found
        at_home = {_joined(self.base, name): name for name in names}
        missing = next((name for path, name in at_home.items() if path not in self.modules), names[0])
        raise ScionError(f"{self.where}: the adapter's module {missing} does not exist in "
                         f"{type(self.model).__name__}; load it onto the model that it was made for")

    def cover(self, names: dict[str, str], fits: Callable[[Site], bool]
              ) -> list[tuple[list[int] | None, Sited]]:
        """Roles and layers that are exactly the modules at these paths: for each set of layers, sites with names."""
        chosen = self._chosen_sites(names, fits)
        layers: dict[str, set[int | None]] = {}
        for site in chosen.values():
            layers.setdefault(site.role, set()).add(site.block)
        groups: dict[tuple[int, ...] | None, Sited] = {}
        for path, site in chosen.items():
            group = self._layers(site.role, layers[site.role], chosen)
            groups.setdefault(group, []).append((site, names[path]))
        found: list[tuple[list[int] | None, Sited]] = []
        for group, sites in groups.items():
            found.append((None if group is None else list(group), sites))
        return found

    def _chosen_sites(self, names: dict[str, str], fits: Callable[[Site], bool]) -> dict[str, Site]:
        """The site at each of the paths; a module without one is refused."""
        chosen: dict[str, Site] = {}
        for site in self.anatomy.all_sites():
            # Sites of some rows share their module with others; peft adapts modules as a whole.
            if site.rows is None and site.path in names and fits(site):
                chosen.setdefault(site.path, site)
        for path, name in names.items():
            if path not in chosen:
                raise ScionError(f"{self.where}: {name} plays no role in {self.anatomy.family} that the method can "
                                 "have")
        return chosen

    def _layers(self, role: str, blocks: set[int | None], chosen: dict[str, Site]) -> tuple[int, ...] | None:
        """The layers to name for a role that is chosen in these blocks; None where it is chosen wherever it occurs."""
        if role in self.anatomy.stem:
            for site in self.anatomy.stem[role]:
                if site.path not in chosen:
                    raise ScionError(f"{self.where}: adapts some modules of the role {role!r} and not {site.path}; "
                                     "here a role outside the blocks is adapted as a whole")
            return None
        having = {block.index for block in self.anatomy.blocks if role in block.sites}
        if blocks == having:
            return None
        return tuple(sorted(block for block in blocks if block is not None))

    def task(self) -> str | None:
        """peft's name of the task, where the model's class says it."""
        known = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
        name = type(self.model).__name__
        return next((task for end, task in known.items() if name.endswith(end)), None)


def _joined(start: str, name: str) -> str:
    """A name behind a path, which is empty for the root."""
    return f"{start}.{name}".lstrip(".")
