"""Checks of a method's options, each in one line that says what was given and what would be right.

An option that is None has been left to the method, and passes every check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.method.described import APART


def at_least(least: float, who: str, **options: Any) -> None:
    """Refuse options below ``least``.

    Args:
        least: the bound.
        who: the method, as the message names it.
        options: values by their names.

    Raises:
        ScionError: names all of the options, and the bound.
    """
    _check(lambda value: value >= least, f"be at least {least:g}", who, options)


def positive(who: str, **options: Any) -> None:
    """Refuse options that are not above zero; see `at_least`."""
    _check(lambda value: value > 0, "be positive", who, options)


def not_negative(who: str, **options: Any) -> None:
    """Refuse options below zero; see `at_least`."""
    _check(lambda value: value >= 0, "not be negative", who, options)


def probability(who: str, **options: Any) -> None:
    """Refuse options outside [0, 1), as of a dropout; see `at_least`."""
    # At 1 everything would be dropped, and what is left would be divided by zero.
    _check(lambda value: 0 <= value < 1, "lie in [0, 1)", who, options)


def _check(is_right: Callable[[Any], bool], demand: str, who: str, options: dict[str, Any]) -> None:
    given = {name: value for name, value in options.items() if value is not None}
    for value in given.values():
        if not is_right(value):
            # All are named, not only the wrong one: people change them together.
            raise ScionError(f"{who}: {_in_words(given)} must {demand}")


def _in_words(options: dict[str, Any]) -> str:
    words = [f"{name} {value}" for name, value in options.items()]
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def linear_only(who: str, sites: Iterable[Site], everywhere: Iterable[Site]) -> None:
    """Refuse sites that are no linear map.

    Args:
        who: the method's name.
        sites: where it would be.
        everywhere: all sites of the model, for the roles that would do.

    Raises:
        ScionError: names the first such site, and those roles.
    """
    for site in sites:
        if site.kind == "module":
            roles = dict.fromkeys(other.role for other in everywhere if other.kind != "module")
            raise ScionError(f"{who}: {site.name} ({type(site.module).__name__}) has no linear weight; roles that "
                             f"have one: {', '.join(roles)}")


def excluded(who: str, roles: Iterable[str], anatomy: Anatomy) -> list[str]:
    """The paths of the modules that a method leaves out by an option ``exclude``.

    To leave out a language-model head, a pooler or a task head is in order where there is none: a method goes from
    classes of a family that have it to classes that have not.

    Raises:
        ScionError: any other role that the model does not have.
    """
    present = [role for role in roles if role in anatomy.roles or role not in APART]
    return anatomy.paths(present, who)
