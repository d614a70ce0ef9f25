"""When a text that is being written ends: at a special token, at a stop string, or where a rule says so.

    >>> class OneLine(StopRule):
    ...     def stops(self, text: str, piece: str) -> bool:
    ...         return "\\n" in piece
    ...     def kept(self, text: str) -> int:
    ...         return text.index("\\n")
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from core.errors import ScionError

if TYPE_CHECKING:
    from core.text.tokens import Tokenizer

Why = Literal["end", "stop", "length"]
"""Why a text stopped: a special token that ends texts, a stop string or rule, or no room for more tokens."""


class StopRule(ABC):
    """Says of one text when it ends. Every text of every batch gets a copy of the rule as it was given, so that what
    the rule remembers in attributes is that text's alone."""

    @abstractmethod
    def stops(self, text: str, piece: str) -> bool:
        """Whether the text ends here. Called once for each token that completes a character.

        Args:
            text: all that is written so far, ``piece`` included; without the prompt.
            piece: what has come last.
        """

    def kept(self, text: str) -> int:
        """How many characters of a text that has stopped are kept; all by default."""
        return len(text)


class StopStrings(StopRule):
    """Ends a text before the first of some strings in it.

    Args:
        strings: none of them empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.longest = max(map(len, self.strings), default=0)

    def stops(self, text: str, piece: str) -> bool:
        # One that began in an earlier piece ends in this one.
        start = max(0, len(text) - len(piece) - self.longest)
        return any(text.find(string, start) >= 0 for string in self.strings)

    def kept(self, text: str) -> int:
        places = [text.find(string) for string in self.strings]
        return min(place for place in places if place >= 0)


class Writing:
    """One text as its tokens come: it decodes them as they come, and knows when the text has stopped.

    A character that takes several tokens is there when it is whole; what is left of one at the end is left out.

    Args:
        tokenizer: of the model.
        ends: the ids that end a text.
        rules: further reasons to stop; this text's own copies.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], rules: Sequence[StopRule]) -> None:
        from tokenizers.decoders import DecodeStream  # start-up time

        self.backend, self.special = tokenizer.backend, frozenset(tokenizer.special_ids)
        self.ends, self.rules = ends, copy.deepcopy(list(rules))
        self.stream = DecodeStream(skip_special_tokens=True)
        self.text = ""
        self.tokens: list[int] = []
        """Without the one that ended the text."""
        self.why: Why = "length"
        self.is_done = False

    def add(self, token: int) -> None:
        """Take in the next token; none is after the text has stopped."""
        if self.is_done:
            return
        if token in self.ends:
            self._stop("end")
            return
        self.tokens.append(token)
        # Others than those that end a text (a mask, a pad in its midst) stand for no text.
        piece = None if token in self.special else self.stream.step(self.backend, token)
        if not piece:
            return
        self.text += piece
        for rule in self.rules:
            if rule.stops(self.text, piece):
                self.text = self.text[:_checked(rule, self.text)]
                self._stop("stop")
                return

    def copy(self) -> Writing:
        """The same text, to go on in another way."""
        other = copy.copy(self)
        other.rules, other.stream = copy.deepcopy(self.rules), copy.deepcopy(self.stream)
        other.tokens = list(self.tokens)
        return other

    def _stop(self, why: Why) -> None:
        self.why, self.is_done = why, True


def _checked(rule: StopRule, text: str) -> int:
    """How many characters a rule keeps."""
    kept = rule.kept(text)
    if not 0 <= kept <= len(text):
        raise ScionError(f"{type(rule).__name__}.kept: {kept} of {len(text)} characters; give a number from 0 to that")
    return kept
