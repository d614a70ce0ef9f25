"""Reading one file of a data set: what cannot be read is told by its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import ScionError, one_line
from core.files import open_regular


@contextmanager
def noted(bad: dict[int, str], row: int, skip_bad: bool) -> Iterator[None]:
    """What is wrong with a file goes into ``bad``, or stops all with a hint."""
    try:
        yield
    except ScionError as error:
        if not skip_bad:
            raise ScionError(f"{error} (data.skip_bad: true leaves such files out)") from None
        bad[row] = one_line(error)


@contextmanager
def plainly() -> Iterator[None]:
    """What the system says of files and memory as one line."""
    try:
        yield
    except OSError as error:
        raise ScionError(f"data: {error.filename or 'a file'} cannot be read ({error.strerror or error})") from None
    except (MemoryError, RuntimeError) as error:
        if not _short_of_memory(error):
            raise
        raise ScionError(one_line(f"data: not enough memory ({error})")) from None


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Where memory is short while ``file`` is read, say so. That is not the file's fault: it is not left out for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _short_of_memory(error):
            raise
        raise MemoryError(f"while {file} was read") from None


def _short_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # the latter is torch's


def check_name(file: Path) -> None:
    """Refuse what no file can be called: lists in JSON and MATLAB's form may hold any characters."""
    try:
        if b"\0" not in os.fsencode(file):
            return
    except UnicodeEncodeError:
        pass
    raise ScionError(f"{one_line(file)}: no name of a file, it holds characters that none can have")


def readable(file: str | Path) -> bool:
    """Whether a file can be opened now. What cannot, for it is not there or not allowed, may be there another time."""
    try:
        with open_regular(file):
            return True
    except (OSError, ScionError):
        return False
