"""Values from outside, checked against types before anything is made of them.

A type is written as an annotation: ``int``, ``Literal["a", "b"]``, ``dict[str, list[int]]``, ``float | None``, a
``TypedDict``. ``Annotated[int, Rule(...)]`` adds a condition.
"""

from __future__ import annotations

import functools
import math
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from core.errors import ScionError, listed, nearest, printable

LONGEST = 1000
"""Letters that a text may have: names and paths are shorter, and finding the nearest name takes the square of it."""
MOST = 1_000_000
"""Entries that a list or a mapping may have."""
LARGEST = 2**63
"""What a whole number must lie below, as those of torch do."""


@dataclass(frozen=True)
class Rule:
    """A condition on a value of the right type, and what it says of values that hold it: ``a number above 0``."""

    holds: Callable[[Any], bool]
    wanted: str


Count = Annotated[int, Rule(lambda value: value >= 0, "a whole number, 0 or more")]
Share = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a share, 0 to 1")]
Word = Annotated[str, Rule(lambda text: text.isidentifier(), "a plain word")]
Name = Annotated[str, Rule(lambda text: bool(text) and text.isprintable() and "." not in text,
                           "a name of printable letters without dots")]
Digest = Annotated[str, Rule(lambda text: len(text) <= 100 and set(text) <= set("0123456789abcdef-"),
                             "a number in hexadecimal digits")]
Few = Annotated[list[Count], Rule(lambda items: len(items) <= 2000, "a list of at most 2000")]
"""A list of numbers of which each is worked on."""
Shapes = dict[str, list[Count]]
"""Shapes of tensors by name."""

Fields = Mapping[str, Any]
"""Keys of a mapping with their types; all of them may be left out."""


@dataclass
class Mismatch(Exception):
    """A value that is not of its type: where it is in the whole, what is wanted there, and what is there."""

    place: str
    wanted: str
    value: Any


@dataclass
class UnknownKey(Mismatch):
    """A mapping with a key too many."""

    key: str
    known: tuple[str, ...]


def mismatch(value: Any, kind: Any) -> Mismatch | None:
    """What in a value is not of the type ``kind``, the innermost part that is wrong; None where all is right."""
    try:
        _check(value, kind, "")
    except Mismatch as found:
        return found
    return None


def check(value: Any, kind: Any, where: str, name: str = "") -> None:
    """Refuse a value that is not of the type ``kind``.

    Args:
        value: anything.
        kind: a type, as annotations are.
        where: the file or the like, with which the message begins.
        name: what the value is called there.

    Raises:
        ScionError: says which place in the value is wrong, and what is wanted there.
    """
    found = mismatch(value, kind)
    if found is not None:
        place = f"{name}{found.place}".lstrip(".")
        raise ScionError(f"{where}: {place}{': ' if place else ''}{shown(found.value)} is not {found.wanted}")


def check_fields(value: Any, fields: Fields, where: str, name: str = "") -> None:
    """Refuse what is no mapping with some of these keys and values of their types; see `check`."""
    check(value, dict[str, Any], where, name)
    for key, item in value.items():
        if key not in fields:
            raise ScionError(f"{where}: {name}{' ' if name else ''}has the unknown key {shown(key)}"
                             f"{nearest(key, fields)}; there are {listed(fields, 40) or 'none'}")
        check(item, fields[key], where, f"{name}.{key}")


_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlevel, _SHORT.maxlong = 60, 60, 2, 40


def shown(value: Any) -> str:
    """A value in a few printable letters, for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to print"


# ------------------------------------------------------------------------------------------------- kinds


def _check(value: Any, kind: Any, place: str) -> None:
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin in (Required, NotRequired):
        _check(value, parts[0], place)
    elif origin is Annotated:
        _check(value, parts[0], place)
        for rule in parts[1:]:
            if not rule.holds(value):
                raise Mismatch(place, rule.wanted, value)
    elif origin in (Union, types.UnionType):
        _check_union(value, kind, place)
    elif is_typeddict(kind):
        _check_typed_dict(value, kind, place)
    elif kind in (dict, Mapping) or origin in (dict, Mapping):
        _check_mapping(value, kind, parts or (str, Any), place)
    elif kind in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        _check_sequence(value, kind, origin, parts or (Any,), place)
    elif not _is(value, kind, origin):
        raise Mismatch(place, wanted(kind), value)


def _is(value: Any, kind: Any, origin: Any) -> bool:
    """Whether a value is of a type without parts."""
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < LARGEST
    if kind is float:
        if isinstance(value, Integral):
            return not isinstance(value, bool) and abs(int(value)) < LARGEST
        return isinstance(value, Real) and math.isfinite(value)
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    return isinstance(value, kind) if isinstance(kind, type) else True


def _check_union(value: Any, kind: Any, place: str) -> None:
    deepest: Mismatch | None = None
    for option in get_args(kind):
        try:
            return _check(value, option, place)
        except Mismatch as found:
            if len(found.place) > len(place):  # the right kind of thing, with something wrong inside it
                deepest = found
    raise deepest or Mismatch(place, wanted(kind), value)


def _check_sequence(value: Any, kind: Any, origin: Any, parts: tuple[Any, ...], place: str) -> None:
    if not isinstance(value, (list, tuple, range)) or len(value) > MOST:
        raise Mismatch(place, wanted(kind), value)
    if origin is tuple and not (len(parts) == 2 and parts[1] is Ellipsis):
        if len(value) != len(parts):
            raise Mismatch(place, wanted(kind), value)
        for index, (item, part) in enumerate(zip(value, parts, strict=True)):
            _check(item, part, f"{place}[{index}]")
        return
    for index, item in enumerate(value):
        _check(item, parts[0], f"{place}[{index}]")


def _check_mapping(value: Any, kind: Any, parts: tuple[Any, ...], place: str) -> None:
    if not isinstance(value, dict) or len(value) > MOST:
        raise Mismatch(place, wanted(kind), value)
    for key, item in value.items():
        _check(key, parts[0], f"{place}: the key")
        _check(item, parts[1], f"{place}.{printable(key)}")


@functools.cache
def fields_of(kind: Any) -> dict[str, Any]:
    """The keys of a TypedDict with their types."""
    return get_type_hints(kind, include_extras=True)


def _check_typed_dict(value: Any, kind: Any, place: str) -> None:
    fields = fields_of(kind)
    if not isinstance(value, dict):
        raise Mismatch(place, f"a mapping with the keys {listed(fields)}", value)
    for key in value:
        if key not in fields:
            raise UnknownKey(place, f"a mapping with the keys {listed(fields)} alone", value, key, tuple(fields))
    for key, part in fields.items():
        if key in value:
            _check(value[key], part, f"{place}.{key}")
        elif kind.__total__ and get_origin(part) is not NotRequired:  # __required_keys__ does not tell of texts
            raise Mismatch(place, f"a mapping with the key {key!r}", value)


def wanted(kind: Any) -> str:
    """What a type asks for, in words."""
    origin = get_origin(kind)
    parts: tuple[Any, ...] = get_args(kind)
    if origin in (Required, NotRequired):
        return wanted(parts[0])
    if origin is Annotated:
        return parts[1].wanted
    if origin is Literal:
        return f"{'one of ' * (len(parts) > 1)}{', '.join(map(repr, parts))}"
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(part) for part in parts)
    if is_typeddict(kind) or kind in (dict, Mapping) or origin in (dict, Mapping):
        return "a mapping"
    if kind in (list, tuple, Sequence) or origin in (list, tuple, Sequence):
        return f"a list ({wanted(parts[0])} each)" if parts and parts[0] is not Any else "a list"
    names = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false", None: "null",
             type(None): "null"}
    return names.get(kind) or f"a {getattr(kind, '__name__', kind)}"
