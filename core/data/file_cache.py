"""What is computed from files or fetched, kept in a folder.

Each file is whole or not there, is made by one process at a time, and is made again where it turns out to be damaged.

A file is written as `.writing-<name>-...`, a folder as `.download-<name>-...`, while its maker holds the lock
`.<name>.lock`. The lock ends with its maker: what lies there without one is thrown away by whoever comes next.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from core.errors import ScionError, one_line
from core.files import locked, read_json, write_atomically

T = TypeVar("T")
WRITING, DOWNLOAD = ".writing-", ".download-"
"""How the names of unfinished files and folders begin."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk or a quota has no more room."""
ELSEWHERE = "set data.cache or SCION_CACHE to a folder"


class Damaged(Exception):
    """A file of the cache is not what was put there; the message says why."""


def kept(file: Path, what: str, read: Callable[[], T], make: Callable[[], None]) -> T:
    """What ``read`` gives of ``file``; where the cache does not have it whole, ``make`` puts it there first.

    One process makes it. Others that want it meanwhile wait, say so once, and take what was made.

    Args:
        file: its place in the cache.
        what: it is, for messages ("filterbanks of 400 clips").
        read: reads it and checks it; raises ``FileNotFoundError`` where it is not there, ``Damaged`` where it is not
            whole.
        make: writes it, see ``write``.

    Raises:
        ScionError: the cache cannot be written, or its disk is full.
    """
    found = _whole(read)  # without the lock first, which a folder that cannot be written does not give
    if found is None:
        with making(file, what):
            found = _whole(read, file)
            if found is None:
                make()
                found = _whole(read)
    if found is None:
        raise ScionError(f"cache: {file} is damaged as soon as it is written; {ELSEWHERE} on another disk")
    return found


def _whole(read: Callable[[], T], warn_of: Path | None = None) -> T | None:
    """What is read; None where it is not there, or damaged, of which the file ``warn_of`` is then named."""
    try:
        return read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (Damaged, OSError, ValueError, TypeError, KeyError) as error:  # the latter where a note is another's
        if warn_of is not None:
            reason = str(error).removeprefix(f"{warn_of}: ")
            warnings.warn(one_line(f"cache: {warn_of} cannot be used ({reason}), so it is made again"), stacklevel=4)
        return None


@contextlib.contextmanager
def making(file: Path, what: str) -> Iterator[None]:
    """Hold the lock of ``file`` in a folder that is there and free of what others left unfinished.

    Raises:
        ScionError: the folder cannot be written, or its disk is full.
    """
    folder = file.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with locked(folder / _lock(file.name), f"cache: {file} is being made by this very process",
                    lambda: _tell(f"cache: another process makes the {what}; waiting for it ({file})")):
            yield
    except OSError as error:
        if not _concerns(error, folder):
            raise
        if error.errno in FULL:
            room = "" if error.strerror == os.strerror(error.errno or 0) else f" ({error.strerror})"
            raise ScionError(f"cache: {folder}: disk full{room} where the {what} should go; free some, or {ELSEWHERE} "
                             "on another disk") from None
        place = error.filename2 or error.filename or folder
        raise ScionError(f"cache: {place} cannot be written ({error.strerror or error}); {ELSEWHERE} that can"
                         ) from None


def _concerns(error: OSError, folder: Path) -> bool:
    """Whether an error is about a file in ``folder``: what is read to make a file lies elsewhere."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))]
    paths = [Path(os.fsdecode(name)).absolute() for name in names]
    here = folder.absolute()
    return not paths or any(path.is_relative_to(here) or here.is_relative_to(path) for path in paths)


def _tell(line: str) -> None:
    """Print ``line``, in the first process of a run only."""
    from lightning.pytorch.utilities import rank_zero_only  # slow to import, and seldom needed

    rank_zero_only(print)(one_line(line), file=sys.stderr, flush=True)


def _lock(name: str) -> str:
    return f".{name}.lock"


def sweep(folder: Path) -> None:
    """Throw away what processes that have ended since left unfinished in ``folder``."""
    unfinished: dict[str, list[Path]] = {path.name: [] for path in folder.glob(".*.lock")}
    for mark in (WRITING, DOWNLOAD):
        for path in folder.glob(f"{mark}*"):
            name = path.name.removeprefix(mark)
            name = name.rpartition("-")[0] or name  # without what makes it unique
            unfinished.setdefault(_lock(name), []).append(path)
    for lock, paths in unfinished.items():
        # the lock's own file goes with it; a file system without locks does not say who is still at work
        with contextlib.suppress(ScionError, OSError), locked(folder / lock, "busy") as held:
            for path in paths if held else []:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def check_room(folder: Path, size: int) -> None:
    """Raise ``OSError`` where ``folder`` has no room for ``size`` bytes: better before hours of work than after."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free")


def write(file: Path, writer: Callable[[Path], Any]) -> None:
    """Write a file of the cache, whole or not at all: ``writer`` is given the name to write it under."""
    write_atomically(file, writer, prefix=f"{WRITING}{file.name}-")


def write_note(file: Path, value: Any) -> None:
    """Write ``value`` as JSON, with a checksum."""
    text = json.dumps({"value": value, "sha256": _sum(value)}) + "\n"
    write(file, lambda path: path.write_text(text, encoding="utf-8"))


def read_note(file: Path) -> Any:
    """What ``write_note`` wrote.

    Raises:
        FileNotFoundError: it is not there.
        Damaged: it is not what was written.
    """
    if not os.path.lexists(file):
        raise FileNotFoundError(file)
    try:
        record = read_json(file)
    except ScionError as error:
        raise Damaged(str(error).removeprefix(f"{file}: ")) from None
    if not isinstance(record, dict) or record.get("sha256") != _sum(record.get("value")):
        raise Damaged("damaged, its checksum is another")
    return record["value"]


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
