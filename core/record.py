"""Objects that remember how they were made: their ``repr`` rebuilds them, and so does their JSON."""

from __future__ import annotations

import functools
import inspect
import math
from typing import Any, get_type_hints

from core.errors import ScionError, listed, nearest
from core.json_types import check

LONGEST_LIST = 2000
"""Entries that a list among the arguments of a constructor may have: roles, layers, names."""


class Recorded:
    """Remembers the arguments of its construction in ``config``, defaults included.

    Numbers that are not finite are refused: no argument means anything by them, and JSON has none.
    """

    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # In __new__ and not in __init__, so that a subclass's own __init__ need not pass its arguments on.
        self = super().__new__(cls)
        try:
            bound = signature(cls).bind_partial(*args, **kwargs)
        except TypeError:  # __init__ reports it better
            return self
        for name, value in bound.arguments.items():
            if not is_finite(value):
                raise ScionError(f"{cls.__name__}: {name} {value!r:.60} is not a finite number")
        bound.apply_defaults()
        self.config = dict(bound.arguments)
        return self

    @property
    def changed(self) -> dict[str, Any]:
        """The arguments that differ from their defaults."""
        empty = inspect.Parameter.empty
        parameters = signature(type(self)).parameters
        changed: dict[str, Any] = {}
        for key, value in self.config.items():
            default = parameters[key].default if key in parameters else empty
            if default is empty or default != value:
                changed[key] = value
        return changed

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.changed.items())
        return f"{type(self).__name__}({arguments})"


def is_finite(value: Any) -> bool:
    """Whether all numbers in plain data are finite."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(is_finite(one) for one in value.values())
    return not isinstance(value, (list, tuple)) or all(is_finite(one) for one in value)


@functools.cache  # asked at every construction
def signature(cls: type) -> inspect.Signature:
    """The signature of ``cls.__init__`` without ``self``, ``**common`` resolved to the arguments of those classes to
    which ``super().__init__(**common)`` leads, in the order of ``cls``'s own ancestors."""
    kept: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        passed_on = any(p.kind is p.VAR_KEYWORD for p in own)
        first = not kept
        for p in own:
            if passed_on and p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                continue
            # What an ancestor takes reaches it through **common, so it can be given only by name.
            kept.setdefault(p.name, p if first else p.replace(kind=p.KEYWORD_ONLY))
        if not passed_on:
            break
    ordered = sorted(kept.values(), key=lambda p: p.kind)  # Signature refuses another order
    return inspect.Signature(ordered)


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of the arguments of ``cls``'s constructor, as `signature` gives them; `Any` where that is unknown."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):  # so that the nearer class has the last word
        if "__init__" not in vars(base) or base is object:
            continue
        try:
            found |= get_type_hints(vars(base)["__init__"], include_extras=True)
        except NameError:  # a name that is imported only for type checkers
            continue
    return {name: found.get(name, Any) for name in signature(cls).parameters}


def check_arguments(cls: type, arguments: dict[str, Any], where: str) -> None:
    """Refuse arguments that ``cls``'s constructor does not have, that are of another type, or that it lacks.

    Raises:
        ScionError: begins with ``where`` and names the argument.
    """
    known = signature(cls).parameters
    owner = cls.__name__
    for name in arguments:
        if name not in known:
            hint = nearest(name, known)
            raise ScionError(f"{where}: {owner} has no option {name!r}{hint}; it has {listed(known, 40)}")
    for name, parameter in known.items():
        if name in arguments:
            value = arguments[name]
            if isinstance(value, (list, tuple, range)) and len(value) > LONGEST_LIST:
                raise ScionError(f"{where}: {owner}.{name} has {len(value):,} entries, more than {LONGEST_LIST}")
            check(value, types_of(cls)[name], where, f"{owner}.{name}")
        elif parameter.default is parameter.empty:
            raise ScionError(f"{where}: {owner} needs {name}")


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tuples become lists, recorded objects ``{"class": ..., **config}``."""
    if isinstance(value, Recorded):
        record: dict[str, Any] = {"class": type(value).__name__}
        for key, argument in value.config.items():
            record[key] = plain(argument)
        return record
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
