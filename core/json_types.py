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
        before = f"{place}: " if place else ""
        raise ScionError(f"{where}: {before}{shown(found.value)} is not {found.wanted}")


def check_fields(value: Any, fields: Fields, where: str, name: str = "") -> None:
    """Refuse what is no mapping with some of these keys and values of their types; see `check`."""
    check(value, dict[str, Any], where, name)
    for key, item in value.items():
        if key not in fields:
            who = f"{name} " if name else ""
            known = listed(fields, 40) or "none"
            raise ScionError(f"{where}: {who}has the unknown key {shown(key)}{nearest(key, fields)}; there are {known}")
        check(item, fields[key], where, f"{name}.{key}")


_SHORT = reprlib.Repr()
_SHORT.maxstring = 60
_SHORT.maxother = 60
_SHORT.maxlevel = 2
_SHORT.maxlong = 40


def shown(value: Any) -> str:
    """A value in a few printable letters, for a message."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to print"


# ------------------------------------------------------------------------------------------------- kinds


def _check(value: Any, kind: Any, place: str) -> None:
    """Raise the `Mismatch` of a value that is not of the type; ``place`` is where it is in the whole."""
    if kind is Any:
        return
    origin = get_origin(kind)
    parts: tuple[Any, ...] = get_args(kind)
    if origin in (Required, NotRequired):
        _check(value, parts[0], place)
    elif origin is Annotated:
        # The type first: a rule may rely on it.
        _check(value, parts[0], place)
        _check_rules(value, parts[1:], place)
    elif origin in (Union, types.UnionType):
        _check_union(value, kind, place)
    elif is_typeddict(kind):
        _check_typed_dict(value, kind, place)
    elif _is_mapping(kind, origin):
        _check_mapping(value, kind, parts or (str, Any), place)
    elif _is_list(kind, origin):
        _check_sequence(value, kind, origin, parts or (Any,), place)
    elif not _is(value, kind, origin):
        raise Mismatch(place, wanted(kind), value)


def _is_mapping(kind: Any, origin: Any) -> bool:
    return kind in (dict, Mapping) or origin in (dict, Mapping)


def _is_list(kind: Any, origin: Any) -> bool:
    return kind in (list, tuple, Sequence) or origin in (list, tuple, Sequence)


def _check_rules(value: Any, rules: Sequence[Rule], place: str) -> None:
    for rule in rules:
        if not rule.holds(value):
            raise Mismatch(place, rule.wanted, value)


def _is(value: Any, kind: Any, origin: Any) -> bool:
    """Whether a value is of a type without parts."""
    if origin is Literal:
        # By type as well, since True == 1 == 1.0.
        return any(type(value) is type(option) and value == option for option in get_args(kind))
    if kind in (None, type(None)):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return _is_whole(value)
    if kind is float:
        if isinstance(value, Integral):  # 1 may be written for 1.0
            return _is_whole(value)
        return isinstance(value, Real) and math.isfinite(value)
    if kind is str:
        return isinstance(value, str) and len(value) <= LONGEST
    if isinstance(kind, type):
        return isinstance(value, kind)
    return True  # an annotation that cannot be checked, such as a type variable


def _is_whole(value: Any) -> bool:
    """Whether this is a whole number that torch could hold; Python's booleans are numbers too, but none here."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        return False
    return abs(int(value)) < LARGEST


def _check_union(value: Any, kind: Any, place: str) -> None:
    """Accept a value of any of the types; else report the type that it came nearest to."""
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
    is_open = len(parts) == 2 and parts[1] is Ellipsis  # tuple[int, ...]
    if origin is tuple and not is_open:
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
    # Unknown keys before missing ones: a key that is misspelt is both, and its nearest name helps more.
    for key in value:
        if key not in fields:
            raise UnknownKey(place, f"a mapping with the keys {listed(fields)} alone", value, key, tuple(fields))
    for key, part in fields.items():
        if key in value:
            _check(value[key], part, f"{place}.{key}")
        # Not by __required_keys__: where annotations are texts, as in our files, it takes NotRequired for required.
        elif kind.__total__ and get_origin(part) is not NotRequired:
            raise Mismatch(place, f"a mapping with the key {key!r}", value)


# As JSON and YAML call them, since that is what the reader of a message has written.
_NAMES: dict[Any, str] = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
_NAMES |= {None: "null", type(None): "null"}


def wanted(kind: Any) -> str:
    """What a type asks for, in words."""
    origin = get_origin(kind)
    parts: tuple[Any, ...] = get_args(kind)
    if origin in (Required, NotRequired):
        return wanted(parts[0])
    if origin is Annotated:
        return parts[1].wanted
    if origin is Literal:
        options = ", ".join(map(repr, parts))
        return f"one of {options}" if len(parts) > 1 else options
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(part) for part in parts)
    if is_typeddict(kind) or _is_mapping(kind, origin):
        return "a mapping"
    if _is_list(kind, origin):
        return f"a list ({wanted(parts[0])} each)" if parts and parts[0] is not Any else "a list"
    if kind in _NAMES:
        return _NAMES[kind]
    return f"a {getattr(kind, '__name__', kind)}"
