"""How texts are written: greedily, by sampling or with beams, how long, and when they stop."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.errors import ScionError
from core.text.stopping import StopRule, StopStrings

BATCHING = ("batch_size", "batch_tokens", "cache")
"""Settings that no text depends on."""


@dataclass(frozen=True)
class GenerateSettings:
    """Greedy by default: at each step the likeliest token.

    Args:
        max_new_tokens: of a text, at least 1; less where the model's context is full before.
        temperature: 0 is greedy; above 0 tokens are drawn, by logits divided by it.
        top_p: draws among the likeliest tokens that together have this share, above 0 to 1.
        top_k: draws among so many of the likeliest tokens; 0 among all.
        seed: of the draws. What a sample draws follows from the seed, its prompt's number and its own alone.
        samples: texts for each prompt; more than one are drawn.
        beams: above 1 searches for the likeliest text with so many beams, none of which is drawn.
        stop: strings before which a text ends, or a `StopRule`, or several of either.
        batch_size: texts that are written together.
        batch_tokens: tokens of such a batch at most, prompts and new ones, padding and beams included; None is no
            limit beside ``batch_size``.
        cache: keep the keys and values of earlier tokens; False computes them at each step, which gives the same texts.

    Raises:
        ScionError: names the setting that is wrong, and what would be right.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    samples: int = 1
    beams: int = 1
    stop: str | StopRule | Sequence[str | StopRule] = ()
    batch_size: int = 8
    batch_tokens: int | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "samples", "beams", "batch_size", "batch_tokens"):
            value = getattr(self, name)
            if not (value is None and name == "batch_tokens"):
                _check_whole(name, value, 1)
        _check_whole("top_k", self.top_k, 0)
        _check_whole("seed", self.seed, 0)
        if not isinstance(self.cache, bool):
            raise ScionError(f"generate.cache: {self.cache!r} is neither true nor false")
        if not _is_number(self.temperature) or self.temperature < 0:
            raise ScionError(f"generate.temperature: {self.temperature!r} is no number from 0; 0 is greedy")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ScionError(f"generate.top_p: {self.top_p!r} is no share above 0, up to 1")
        self._check_together()
        # A frozen dataclass sets its fields so; a string alone is a sequence of letters, and not meant as one.
        object.__setattr__(self, "stop", _stops(self.stop))

    def _check_together(self) -> None:
        """Refuse settings that mean nothing beside each other."""
        if self.temperature == 0:
            for name, value, off in (("samples", self.samples, 1), ("top_p", self.top_p, 1), ("top_k", self.top_k, 0)):
                if value != off:
                    raise ScionError(f"generate.{name}: {value} needs a temperature above 0; at 0 every text is the "
                                     "greedy one")
        elif self.beams > 1:
            raise ScionError(f"generate.beams: {self.beams} beams are searched and not drawn; set temperature to 0")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn."""
        return self.temperature > 0

    @property
    def rules(self) -> list[StopRule]:
        """When a text stops, beside the special tokens that end it."""
        strings = [stop for stop in self._stops if isinstance(stop, str)]
        found: list[StopRule] = [StopStrings(strings)] if strings else []
        return found + [stop for stop in self._stops if isinstance(stop, StopRule)]

    @property
    def stop_strings(self) -> list[str]:
        """The strings among ``stop``."""
        return [stop for stop in self._stops if isinstance(stop, str)]

    @property
    def _stops(self) -> tuple[str | StopRule, ...]:
        assert isinstance(self.stop, tuple)
        return self.stop

    def record(self) -> dict[str, Any]:
        """What the texts depend on, as JSON."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name not in BATCHING:
                found[field.name] = getattr(self, field.name)
        found["stop"] = [_name_of(stop) for stop in self._stops]
        return found


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScionError(f"generate.{name}: {value!r} is no whole number from {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _stops(given: Any) -> tuple[str | StopRule, ...]:
    """What was given as ``stop``, as several."""
    several = (given,) if isinstance(given, (str, StopRule)) else given
    if not isinstance(several, (list, tuple)):
        raise ScionError(f"generate.stop: {given!r:.60} is neither a string nor a StopRule, nor a list of them")
    for stop in several:
        if not isinstance(stop, (str, StopRule)):
            raise ScionError(f"generate.stop: {stop!r:.60} is neither a string nor a StopRule")
        if stop == "":
            raise ScionError("generate.stop: an empty string stands everywhere; leave it out")
    return tuple(several)


def _name_of(stop: str | StopRule) -> Any:
    """A stop string, or what a rule is called: its class and what it was given."""
    if isinstance(stop, str):
        return stop
    kind = type(stop)
    given = {name: repr(value) for name, value in vars(stop).items()}
    return {"rule": f"{kind.__module__}.{kind.__qualname__}", "given": given}
