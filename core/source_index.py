"""Classes in a folder of source files, found without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple


class SourceClass(NamedTuple):
    """A class as its file defines it."""

    module: str
    node: ast.ClassDef

    @property
    def bases(self) -> set[str]:
        """Names of its parents, without the modules that they are written with."""
        found = set()
        for base in self.node.bases:
            if isinstance(base, ast.Name):
                found.add(base.id)
            elif isinstance(base, ast.Attribute):
                found.add(base.attr)
        return found


def public_classes(folder: Path, package: str) -> dict[str, SourceClass]:
    """Every public class in a folder by its name; files that begin with an underscore are left out."""
    found = {}
    for file in sorted(folder.rglob("[!_]*.py")):
        module = ".".join((package, *file.relative_to(folder).with_suffix("").parts))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] = SourceClass(module, node)
    return found


def derived_from(bases: Iterable[str], classes: Mapping[str, SourceClass]) -> list[str]:
    """The classes that derive from one of ``bases``, directly or by others of them."""
    known = set(bases)
    while more := {name for name, one in classes.items() if one.bases & known} - known:
        known |= more
    return sorted(known & classes.keys())
