"""A folder that a command makes: whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import ScionError, one_line

if TYPE_CHECKING:

    pass


def check_free(folder: str) -> Path:
    """The path of a folder to make: there is nothing, or an empty folder.

    Raises:
        ScionError: something is there.
    """
    target = Path(folder)
    if os.path.isdir(target):
        if any(target.iterdir()):
            raise ScionError(f"{folder} exists and is not empty; give a folder to make")
    elif os.path.lexists(target):
        what = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise ScionError(f"{folder} is {what}; give a folder to make")
    return target


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target`` when everything is written, and leaves nothing otherwise.

    Args:
        target: as `check_free` gives it; an empty folder that is there stays, and gets the files.

    Raises:
        ScionError: it cannot be written.
    """
    from safetensors import SafetensorError

    made: list[Path] = []
    is_there = os.path.isdir(target)
    scratch: Path | None = None
    placed: list[Path] = []
    try:
        missing = [target] if is_there else [folder for folder in target.absolute().parents if not folder.exists()]
        for folder in () if is_there else reversed(missing):
            folder.mkdir()
            made.append(folder)
        beside = target if is_there else target.absolute().parent
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=beside))
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        if is_there:
            for file in sorted(scratch.iterdir()):
                os.replace(file, target / file.name)
                placed.append(target / file.name)
            scratch.rmdir()
        else:
            scratch.chmod(0o777 & ~umask)
            os.replace(scratch, target.absolute())
    except BaseException as error:
        for file in placed:
            file.unlink(missing_ok=True)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, ScionError):
            raise ScionError(str(error).replace(str(scratch), str(target))) from error
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ScionError(f"{target} cannot be written ({reason})") from None
        raise
