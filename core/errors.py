"""The one exception for bad input: a single line that says what is wrong and what would be right."""

from __future__ import annotations

import difflib
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


class ScionError(ValueError):
    """Bad input. The command prints the message as one line and exits with code 2."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal: Ctrl-C, or SIGTERM, with which schedulers end a job.

    Its text says how to go on. The command's exit code is 128 and the signal's number, 130 or 143.
    """

    received: ClassVar[int | None] = None
    """The last signal."""

    def __init__(self, number: int = signal.SIGINT, hint: str = "") -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}{f'; {hint}' if hint else ''}")

    @property
    def code(self) -> int:
        return 128 + self.number

    @classmethod
    def last(cls) -> Interrupted:
        """The one of the last signal."""
        return cls(cls.received or signal.SIGINT)

    @classmethod
    def behind(cls, error: BaseException) -> Interrupted | None:
        """The one that ``error`` comes of, if a signal has come: libraries that are interrupted in the midst of writing
        a file end in errors of their own."""
        if isinstance(error, Interrupted):
            return error
        return cls.last() if isinstance(error, KeyboardInterrupt) or cls.received is not None else None

    @classmethod
    def after(cls, stop: KeyboardInterrupt, hint: str) -> Interrupted:
        """The one that ``stop`` was, with a hint how to go on."""
        return cls(stop.number if isinstance(stop, Interrupted) else cls.received or signal.SIGINT, hint)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context SIGTERM and Ctrl-C raise `Interrupted`. Elsewhere than in the main thread nothing changes."""
    def stop(number: int, frame: object) -> None:
        Interrupted.received = number
        raise Interrupted(number)

    Interrupted.received = None
    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bad_input(error: BaseException) -> ScionError | None:
    """What the machine refuses (a file, memory), as bad input in one line; None for other errors."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        return ScionError(f"{os.fsdecode(error.filename)}: {reason}" if error.filename else reason)
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    text = (str(error).strip().splitlines() or [""])[0]
    if is_memory or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return ScionError("out of memory; a smaller data.batch_size, or trainer.accumulate_grad_batches, takes less"
                          + (f" ({text[:200]})" if text else ""))
    return None


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


OTHER_NAMES = {
    "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout",
    "target_modules": "targets", "epochs": "max_epochs", "num_epochs": "max_epochs", "num_train_epochs": "max_epochs",
    "gpus": "devices", "num_gpus": "devices", "gradient_accumulation_steps": "accumulate_grad_batches",
    "max_grad_norm": "gradient_clip_val", "fp16": "precision", "bf16": "precision", "learning_rate": "lr"}
"""What other libraries call options that have another name here."""


def called(word: str, known: Iterable[str]) -> str:
    """A hint what an unknown option is called here, if another library's name for it is known; else the nearest."""
    names = list(known)
    if OTHER_NAMES.get(word) in names:
        return f" (it is called {OTHER_NAMES[word]!r} here)"
    return nearest(word, names)


def listed(names: Iterable[object], most: int = 12) -> str:
    """A comma-separated list for a message, cut after ``most`` names."""
    words = [str(name) for name in names]
    more = len(words) - most
    return ", ".join(words[:most]) + (f", ... and {more} more" if more > 0 else "")
