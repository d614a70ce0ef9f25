"""Every method by its name: ``from core.peft import LoRA``.

The registry is the folder: a class in any file below that derives from ``PEFTMethod`` is a method. Names are read from
the source without importing it; a file is imported when one of its methods is first asked for. Other distributions add
methods by the entry-point group ``scion.methods``.
"""

from __future__ import annotations

import ast
import functools
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError, listed, nearest

if TYPE_CHECKING:
    from core.method import PEFTMethod


@functools.cache
def registry() -> dict[str, str]:
    """Method name -> the module that defines it."""
    here = Path(__file__).parent
    bases: dict[str, set[str]] = {}
    homes: dict[str, str] = {}
    for file in sorted(here.rglob("[!_]*.py")):
        module = ".".join((__name__, *file.relative_to(here).with_suffix("").parts))
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                homes[node.name] = module
    methods = {"PEFTMethod"}
    while more := {name for name, parents in bases.items() if parents & methods} - methods:
        methods |= more
    found = {name: homes[name] for name in methods if name in homes}
    for point in entry_points(group="scion.methods"):
        found.setdefault(point.name, point.value.partition(":")[0])
    return dict(sorted(found.items()))


def method_class(name: str) -> type[PEFTMethod]:
    """The class of a method.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    from core import compose

    module = registry().get(name)
    if module is not None:
        return getattr(importlib.import_module(module), name)
    if name in compose.__all__:
        return getattr(compose, name)
    raise ScionError(f"peft: no method is called {name!r}{nearest(name, registry())}; "
                     f"there are {listed(registry(), 100)}")


def make(name: str, config: dict[str, Any]) -> PEFTMethod:
    """A method from its name and arguments, as an adapter's record or a configuration gives them."""
    from core.spec import signature

    cls = method_class(name)
    known = signature(cls).parameters
    for key in config:
        if key not in known:
            raise ScionError(f"peft: {name} has no option {key!r}{nearest(key, known)}; it has {listed(known, 40)}")
    return cls(**config)


def __getattr__(name: str) -> Any:
    if name == "PEFTMethod":
        from core.method import PEFTMethod

        return PEFTMethod
    if name in registry():
        return method_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, registry())}")


def __dir__() -> list[str]:
    return [*registry(), "PEFTMethod", "make", "method_class", "registry"]
