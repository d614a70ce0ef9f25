"""The one exception for bad input: a single line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScionError(ValueError):
    """Bad input. The command prints the message as one line and exits with code 2."""


def one_line(text: object) -> str:
    """``text`` on one line for a terminal: other characters than printable ones, escapes for instance, are spelled
    out."""
    return printable(" ".join(str(text).split()))


def printable(text: object) -> str:
    """``text`` with other characters than printable ones, tabs and line breaks too, spelled out: a field of a line."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
                   for letter in str(text))


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """``" (did you mean 'a' or 'b'?)"`` for the names most like ``word``, or an empty string."""
    names = {str(name).lower(): str(name) for name in known}
    close = [names[hit] for hit in difflib.get_close_matches(word.lower(), list(names), n=n, cutoff=0.5)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def listed(names: Iterable[object], most: int = 12) -> str:
    """A comma-separated list for a message, cut after ``most`` names."""
    words = [str(name) for name in names]
    more = len(words) - most
    return ", ".join(words[:most]) + (f", ... and {more} more" if more > 0 else "")
