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
        text = f"stopped by {signal.Signals(number).name}"
        super().__init__(f"{text}; {hint}" if hint else text)

    @property
    def code(self) -> int:
        """The command's exit code, as shells count it."""
        return 128 + self.number

    @classmethod
    def last(cls) -> Interrupted:
        """The one of the last signal, or of Ctrl-C where none was received."""
        return cls(cls.received or signal.SIGINT)

    @classmethod
    def behind(cls, error: BaseException) -> Interrupted | None:
        """The one that ``error`` comes of, if a signal has come: libraries that are interrupted in the midst of writing
        a file end in errors of their own."""
        if isinstance(error, Interrupted):
            return error
        if isinstance(error, KeyboardInterrupt) or cls.received is not None:
            return cls.last()
        return None

    @classmethod
    def after(cls, stop: KeyboardInterrupt, hint: str) -> Interrupted:
        """The one that ``stop`` was, with a hint how to go on."""
        number = stop.number if isinstance(stop, Interrupted) else cls.last().number
        return cls(number, hint)


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
    except ValueError:  # Python lets no other thread set a handler
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
    if not _is_of_memory(error):
        return None
    advice = "out of memory; a smaller data.batch_size, or trainer.accumulate_grad_batches, takes less"
    lines = str(error).strip().splitlines()
    if not lines:
        return ScionError(advice)
    return ScionError(f"{advice} ({lines[0][:200]})")  # CUDA's message has a page of advice behind its first line


def _is_of_memory(error: BaseException) -> bool:
    # By its name, so that torch is not imported to report that a file is missing.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch's words on the CPU


def one_line(text: object) -> str:
    """``text`` on one line for a terminal: other characters than printable ones, escapes for instance, are spelled
    out."""
    words = str(text).split()
    return printable(" ".join(words))


def printable(text: object) -> str:
    """``text`` with other characters than printable ones, tabs and line breaks too, spelled out: a field of a line."""
    return "".join(_spelled_out(letter) for letter in str(text))


def _spelled_out(letter: str) -> str:
    if letter.isprintable():
        return letter
    return letter.encode("unicode_escape").decode("ascii")


def nearest(word: str, known: Iterable[str], n: int = 3) -> str:
    """``" (did you mean 'a' or 'b'?)"`` for the names most like ``word``, or an empty string."""
    names = {str(name).lower(): str(name) for name in known}  # lora is meant for LoRA
    hits = difflib.get_close_matches(word.lower(), list(names), n=n, cutoff=0.5)
    if not hits:
        return ""
    choice = " or ".join(repr(names[hit]) for hit in hits)
    return f" (did you mean {choice}?)"


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
    text = ", ".join(words[:most])
    return f"{text}, ... and {more} more" if more > 0 else text
