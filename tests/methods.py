"""The methods of the matrix, each with its row (tests/papers), and the cells in which they meet the families."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from zlib import crc32

from torch import nn

from core import peft
from core.anatomy import dissect
from core.method import PEFTMethod
from tests.models import EVERY_FAMILY, FAMILIES, make
from tests.rows import Config, Row

PAPERS = Path(__file__).parent / "papers"


def collect() -> dict[str, Row]:
    """The rows of all files in tests/papers."""
    found: dict[str, Row] = {}
    for file in sorted(PAPERS.glob("test_*.py")):
        found |= getattr(import_module(f"tests.papers.{file.stem}"), "ROWS", {})
    return found


METHODS = collect()
REFUSED = {(name, family): reason for name, row in METHODS.items() for family, reason in row.refused.items()}
"""Cells that cannot exist, each with the mathematical reason: at most a tenth of all."""


@cache
def roles(family: str) -> tuple[str, ...]:
    """The roles of a family's parts."""
    return tuple(dissect(make(family)).roles)


@dataclass(frozen=True)
class Cell:
    """A method in one variant on one family."""

    method: str
    variant: str
    family: str

    def __str__(self) -> str:
        return f"{self.method}[{self.variant}]-{self.family}".replace(", ", ",")

    @property
    def row(self) -> Row:
        return METHODS[self.method]

    @property
    def cls(self) -> type[PEFTMethod]:
        return peft.method_class(self.method)

    @property
    def refused(self) -> str | None:
        """Why this cell cannot exist."""
        return REFUSED.get((self.method, self.family)) or self.row.variants[self.variant].refused.get(self.family)

    @property
    def mergeable(self) -> bool:
        return self.cls.mergeable

    def new(self, **changes: Any) -> PEFTMethod:
        """The method, not attached."""
        return self.cls(**{**self.row.variants[self.variant].config, **self.elsewhere, **changes})

    @property
    def quiet(self) -> Config:
        """Arguments with which a forward in training is not random."""
        return {name: value for name, value in (("dropout", 0.0), ("draw", False)) if name in self.new().config}

    @property
    def elsewhere(self) -> Config:
        """Arguments that the family asks for: of the variant's norms those that it has, of its targets, where there is
        no attention, those of the MLP."""
        config, attention = self.row.variants[self.variant].config, EVERY_FAMILY[self.family].attention
        chosen = {name: tuple(role for role in config[name] if role in roles(self.family))
                  for name in ("norms", *(() if attention else ("targets",))) if name in config}
        if attention:
            return chosen
        return {**chosen, **({"targets": ("mlp.up", "mlp.down")} if self.row.weights else {}),
                **self.row.without_attention}

    @property
    def learns(self) -> Config:
        """Arguments for invariant 16, beside the variant's; without any it is at the recommended settings."""
        variant = self.row.variants[self.variant]
        return {**variant.learns, **variant.learns_on.get(self.family, {})}

    @property
    def random(self) -> bool:
        """Whether start values depend on the seed."""
        own = self.row.variants[self.variant].random
        return self.row.random if own is None else own

    def attach(self, model: nn.Module, **changes: Any) -> PEFTMethod:
        """The method on ``model``, in the variant's stage."""
        method = self.new(**changes).attach(model)
        self.make_ready(method)
        return method

    def make_ready(self, method: PEFTMethod) -> None:
        ready = self.row.variants[self.variant].ready
        if ready is not None:
            ready(method)

    @property
    def trains(self) -> bool:
        """Whether the method has tensors in the backbone at all."""
        return self.row.variants[self.variant].trains

    @property
    def moves_base(self) -> bool:
        """Whether it trains the backbone's own tensors in this stage."""
        declared = self.row.variants[self.variant].moves_base
        return self.cls.moves_base if declared is None else declared


SHARE_OF_ALL = 1 if os.environ.get("SCION_ALL") == "whole" else 12
"""In the long tier each variant meets every twelfth of all families, which ones turning likewise; or all of them."""


def cells(everything: bool, number: int = 0, families: Sequence[str] = ()) -> list[Cell]:
    """The cells of invariant ``number``: each method on one family, which turns with the number.

    Args:
        everything: all variants, on a share of all families.
        number: shifts the rotation, so that one method does not meet the same family in every invariant.
        families: through which the quick tier turns, where not all have the same share.
    """
    families = list(families or FAMILIES)
    found = []
    for method, row in METHODS.items():
        for v, (name, variant) in enumerate(row.variants.items()):
            turn = crc32(method.encode()) + v + number  # by its name: a new method does not shift the others
            if everything:
                share = list(EVERY_FAMILY)[turn % SHARE_OF_ALL::SHARE_OF_ALL]
                found += [Cell(method, name, family) for family in share]
            elif v == 0 or variant.everywhere:
                first = turn % len(families)
                turned = families[first:] + families[:first]
                found.append(next(cell for f in turned if not (cell := Cell(method, name, f)).refused))
    return found
