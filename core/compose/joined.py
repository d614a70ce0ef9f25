"""Methods whose grafts are joined at their common sites."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from core.anatomy import Anatomy, Site
from core.compose.side_by_side import SideBySide
from core.errors import ScionError
from core.graft import Graft
from core.method import key_of


class Joined(Graft):
    """The grafts of several methods at one site, which stands there for all of them."""

    def __init__(self, site: Site, parts: Sequence[Graft]) -> None:
        super().__init__(site)
        self.parts = list(parts)  # in a list: their tensors belong to the methods' branches

    @property
    def verbs(self) -> tuple[str, ...]:
        return self.parts[0].verbs


class JoinedMethods(SideBySide):
    """Methods whose grafts are joined site by site."""

    refusal: ClassVar[str] = ""
    """What is said of a graft that does not fit."""

    def build(self, site: Site) -> Graft:
        return self.join(site, self._parts[site.name])

    @abstractmethod
    def join(self, site: Site, parts: list[Graft]) -> Joined:
        """One graft for those that the methods have at ``site``."""

    @abstractmethod
    def fits(self, part: Graft) -> bool:
        """Whether this can join grafts of this kind at this site."""

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        self._parts: dict[str, list[Graft]] = {}
        for method in self.methods:
            for part in self.branch(method):
                if part.tap is not None:
                    raise ScionError(f"{self.name}: what {method.name} does at {part.site.name} reads "
                                     f"{part.tap.site.name} too; only what reads its own site can be joined")
                if len(part.verbs) != 1 or part.verbs[0] not in ("before", "after") or not self.fits(part):
                    raise ScionError(f"{self.name}: what {method.name} does at {part.site.name} ({type(part).__name__})"
                                     f" {self.refusal}")
                self._parts.setdefault(part.site.name, []).append(part)
        for name, parts in self._parts.items():
            ways = {part.verbs for part in parts}
            if len(parts) != len(self.methods) or len(ways) > 1:
                raise ScionError(f"{self.name}: its methods must stand at the same sites in the same way, and do not "
                                 f"at {name}")
            module.add_module(key_of(name), self.make_graft(parts[0].site, anatomy))
        self._parts = {}  # needed only by `build`, and what they hold belongs to the branches

    def standing(self, module: nn.Module) -> list[Graft]:
        return [child for child in module.children() if isinstance(child, Graft)]
