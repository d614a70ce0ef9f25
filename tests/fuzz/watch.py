"""The promises that every input is held against: no traceback, no hang, nothing of the user's touched."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from core.errors import ScionError

SECONDS = 10
LONG = bool(os.environ.get("SCION_ALL"))


def tries(short: int, long: int) -> settings:
    """So many inputs in the quick tier, so many in the long one; the same ones each time."""
    number = int(os.environ.get("SCION_FUZZ") or 0) or (long if LONG else short)
    checks: list[HealthCheck] = list(HealthCheck)  # type: ignore[arg-type]
    return settings(max_examples=number, derandomize=not os.environ.get("SCION_FUZZ_RANDOM"), deadline=None,
                    database=None, suppress_health_check=checks, print_blob=False)


class Hang(BaseException):
    """It took longer than `SECONDS`."""


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused_or(work: Callable[[], Any]) -> str | None:
    """Do ``work``, which may refuse by a `ScionError` of one line and by nothing else; returns the line, or None."""
    with no_hang():
        try:
            work()
        except ScionError as error:
            assert str(error).strip(), "a refusal without a word"
            return str(error)
    return None


def command(words: list[str]) -> str:
    """Run the command; it must end with 0, or with 2 and a message of one line at the end. Returns what it printed on
    the standard error."""
    from core.cli import main

    out, err = io.StringIO(), io.StringIO()
    with no_hang(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:  # argparse's way
            code = stop.code
    text = err.getvalue()
    assert code in (0, 2), f"exit code {code}: {text}"
    assert "Traceback" not in text and "unexpected" not in text, text
    assert code == 0 or text.strip(), "nothing was said"
    assert all(letter.isprintable() or letter in "\n\r\t" for letter in text), repr(text)
    return text


def snapshot(folder: Path) -> dict[str, Any]:
    """What lies in a folder: content of files, targets of links."""
    found: dict[str, Any] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = file.read()
            else:
                found[path] = None
    return found
