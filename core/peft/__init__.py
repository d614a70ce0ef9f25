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
from core.source_index import SourceClass, derived_from, public_classes

if TYPE_CHECKING:
    from core.method import PEFTMethod


COMPOSITIONS = ("Route", "Fuse", "Split", "Average")
"""Classes in ``core.compose`` that stand where a method can stand."""


@functools.cache
def _sources() -> dict[str, SourceClass]:
    """Every public class in the folder."""
    return public_classes(Path(__file__).parent, __name__)


@functools.cache
def registry() -> dict[str, str]:
    """Method name -> the module that defines it."""
    sources = _sources()
    found = {name: sources[name].module for name in derived_from(["PEFTMethod"], sources)}
    for point in entry_points(group="scion.methods"):
        found.setdefault(point.name, point.value.partition(":")[0])
    return dict(sorted(found.items()))


def options(name: str) -> list[str]:
    """Names of a method's arguments, read from the source where it lies in this folder.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    if name not in _sources() or name not in registry():
        from core.record import signature  # start-up time

        return [*signature(method_class(name)).parameters]
    found: list[str] = []
    source: SourceClass | None = _sources()[name]
    while source is not None:
        init = next((n for n in source.node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            found += [a.arg for a in [*init.args.args[1:], *init.args.kwonlyargs] if a.arg not in found]
            if init.args.kwarg is None:
                return found
        source = next((_sources()[base] for base in source.bases if base in _sources()), None)
    return [*found, *(option for option in _common() if option not in found)]


@functools.cache
def _common() -> list[str]:
    source = Path(__file__).parent.parent / "method" / "definition.py"
    base = next(node for node in ast.parse(source.read_text(encoding="utf-8")).body
                if isinstance(node, ast.ClassDef) and node.name == "MethodDefinition")
    init = next(n for n in base.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    return [argument.arg for argument in init.args.kwonlyargs]


def method_class(name: str) -> type[PEFTMethod]:
    """The class of a method.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    module = registry().get(name)
    if module is not None:
        return getattr(importlib.import_module(module), name)
    if name in COMPOSITIONS:
        return getattr(importlib.import_module("core.compose"), name)
    raise ScionError(f"peft: no method is called {name!r}{nearest(name, registry())}; "
                     f"there are {listed(registry(), 100)}")


def make(name: str, config: dict[str, Any]) -> PEFTMethod:
    """A method from its name and arguments, as an adapter's record or a configuration gives them.

    Raises:
        ScionError: no such method, an argument that it does not have, or a value of another type.
    """
    from core.record import check_arguments  # start-up time

    cls = method_class(name)
    config = present_options(cls, config)
    check_arguments(cls, config, "peft")
    return cls(**config)


def present_options(cls: type[PEFTMethod], config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without options that the class had once, where they hold the only value that they could have."""
    return {key: value for key, value in config.items()
            if key not in cls.former_options or value != cls.former_options[key]}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [*registry(), "PEFTMethod"]
    if name == "PEFTMethod":
        from core.method import PEFTMethod  # start-up time

        return PEFTMethod
    if name in registry():
        return method_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, registry())}")


def __dir__() -> list[str]:
    return [*registry(), "PEFTMethod", "make", "method_class", "registry"]
