"""Checks of a method's options, each in one line that says what was given and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from core.anatomy import Site
from core.errors import ScionError, nearest


def at_least(least: float, who: str, **options: Any) -> None:
    """Refuse options below ``least``; None is no value and passes.

    Raises:
        ScionError: names the options and the bound.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if any(value < least for value in given.values()):
        raise ScionError(f"{who}: {_listed(given)} must be at least {least:g}")


def positive(who: str, **options: Any) -> None:
    """Refuse options that are not above zero; None passes."""
    given = {name: value for name, value in options.items() if value is not None}
    if any(value <= 0 for value in given.values()):
        raise ScionError(f"{who}: {_listed(given)} must be positive")


def not_negative(who: str, **options: Any) -> None:
    """Refuse options below zero; None passes."""
    given = {name: value for name, value in options.items() if value is not None}
    if any(value < 0 for value in given.values()):
        raise ScionError(f"{who}: {_listed(given)} must not be negative")


def probability(who: str, **options: float | None) -> None:
    """Refuse options outside [0, 1), as of a dropout; None passes."""
    given = {name: value for name, value in options.items() if value is not None}
    if any(not 0 <= value < 1 for value in given.values()):
        raise ScionError(f"{who}: {_listed(given)} must lie in [0, 1)")


def one_of(choices: Iterable[str], who: str, **options: str) -> None:
    """Refuse options that are none of ``choices``."""
    known = tuple(choices)
    for name, value in options.items():
        if value not in known:
            words = ", ".join(map(repr, known[:-1]))
            raise ScionError(f"{who}: {name} {value!r} must be {words} or {known[-1]!r}{nearest(str(value), known)}")


def _listed(options: dict[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in options.items()]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def linear_only(who: str, sites: Iterable[Site], everywhere: Iterable[Site]) -> None:
    """Refuse sites that are no linear map; ``everywhere`` are all sites, for the roles that have one.

    Raises:
        ScionError: names the first such site, and the roles that would do.
    """
    for site in sites:
        if site.kind == "module":
            roles = dict.fromkeys(other.role for other in everywhere if other.kind != "module")
            raise ScionError(f"{who}: {site.name} ({type(site.module).__name__}) has no linear weight; roles that "
                             f"have one: {', '.join(roles)}")
