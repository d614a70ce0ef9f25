"""Patterns of module names, as a peft config holds them."""

from __future__ import annotations

import re
import time

from core.errors import ScionError, one_line
from core.json_types import shown

SIMPLE = re.compile(r"(?:\\.|[^\\*+?{}()\[\]])*", re.DOTALL)
"""Patterns without repetition or groups, which mean one text or one of several, and match as fast as they are read."""

PATIENCE = 1.0
"""Seconds that all other patterns of a config may take together."""


class Matcher:
    """Says whether a pattern of a config means a module of a name; patterns that take too long are refused.

    A pattern is a regular expression, and some of those take time without end.
    """

    def __init__(self) -> None:
        self.left = PATIENCE

    def __call__(self, pattern: str, name: str, whole: bool = True) -> bool:
        """Whether the pattern matches all of the name; without ``whole``, only its last parts."""
        wide = pattern if whole else rf"(?:.*\.)?(?:{pattern})"
        try:
            if SIMPLE.fullmatch(pattern):
                return re.fullmatch(wide, name) is not None
            return self._timed(wide, name)
        except (re.error, RecursionError, OverflowError) as error:
            raise ScionError(f"{shown(pattern)} is no pattern ({one_line(error)})") from None

    def _timed(self, pattern: str, name: str) -> bool:
        """Whether the pattern matches all of the name, found within the time that is left."""
        try:
            import regex  # optional: unlike the standard library's, it takes a time limit
        except ImportError:
            raise ScionError(f"the pattern {shown(pattern)} can only be matched with the package regex: "
                             "pip install regex") from None
        start = time.monotonic()
        try:
            # Never below zero: regex takes a negative limit for none.
            return regex.fullmatch(pattern, name, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise ScionError(f"the pattern {shown(pattern)} takes too long to match {name}") from None
        except regex.error as error:
            raise re.error(str(error)) from None
        finally:
            self.left -= time.monotonic() - start
