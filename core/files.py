"""Files that are whole or not there, that are what they are said to be, and that one process at a time works on."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from core.errors import ScionError

LARGEST_JSON = 64 * 2**20
"""Bytes beyond which a record is not read: ours have a few thousand."""
LARGEST_TEXT = 512 * 2**20
"""Bytes beyond which a table or a list is not read: one of two million files has some hundred million."""


# ------------------------------------------------------------------------------------------------- writing


def write_atomically(path: str | Path, write: Callable[[Path], Any], prefix: str | None = None) -> None:
    """Call ``write`` with a temporary name beside ``path``, flush the file to disk, then rename it into place.

    Args:
        path: the file.
        write: writes it under the name that it is given.
        prefix: of that name; None is a dot and the file's own.
    """
    path = Path(path)
    # Beside the file, since a rename is atomic only within one file system; cut, since names have at most 255 bytes.
    prefix = prefix or f".{path.name[:100]}."
    handle, temporary = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(temporary))
        # Without this a crash of the machine could leave the new name with no content.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; the umask can be read only by setting it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any, indent: int | None = 1) -> None:
    """Write ``value`` as JSON, whole or not at all; numbers that are not finite are refused, since JSON has none."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------------------- reading


def check_regular(path: str | Path) -> Path:
    """``path``, refused where it is no regular file: opening a pipe would wait for ever.

    Raises:
        ScionError: names the file that is missing, a folder, a pipe or a device.
        OSError: it cannot be looked at.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise ScionError(f"{path}: no such file") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ScionError(f"{path}: {kind}, where a file is wanted")
    return path


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading bytes. Nothing else is opened: a pipe would wait for ever, a device might act.

    Raises:
        ScionError: a folder, a pipe, a device, or no name of a file at all.
        OSError: it is missing or cannot be read.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # a NUL in the name
        raise ScionError(f"{path}: no name of a file") from None
    if stat.S_ISREG(mode):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(handle).st_mode):  # nobody has put something else into its place meanwhile
            return open(handle, "rb")
        os.close(handle)
    if stat.S_ISDIR(mode):
        os.scandir(path).close()  # says so where it may not be looked into
    kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
    raise ScionError(f"{path}: {kind}, where a file is wanted")


def open_to_append(path: str | Path) -> IO[str]:
    """A text file to write at the end of, made where it is missing. Nothing but a file of this very name is opened: a
    link would lead to somebody else's, a pipe would wait for ever.

    Raises:
        ScionError: a link, a folder, a pipe or a device.
        OSError: it cannot be written.
    """
    if not is_absent(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise ScionError(f"{path}: a link, a folder, a pipe or a device, where a file is wanted; remove it")
    # Something else may have come to this name since: a link is refused here, and a pipe does not wait.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    return open(handle, "a", encoding="utf-8", errors="backslashreplace")


def is_absent(path: str | Path) -> bool:
    """Whether there is nothing of this name: not even a link to nowhere, nor something that may not be looked at."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; the ends of its lines stay as they are.

    Raises:
        ScionError: names the file that is missing, no regular file, unreadable, too large, or no such text.
    """
    try:
        with open_regular(path) as file:
            data = file.read(LARGEST_TEXT + 1)  # one byte more says that it is too large, however it grows meanwhile
    except OSError as error:
        raise ScionError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) > LARGEST_TEXT:
        raise ScionError(f"{path}: larger than {LARGEST_TEXT >> 20} MiB, which no table or list is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ScionError(f"{path}: cannot be read as text in UTF-8 (byte {error.start} is none); save it so") from None
    if "\0" in text:
        raise ScionError(f"{path}: cannot be read as text in UTF-8 (it holds a NUL character); save it so")
    return text


def files_below(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The files below ``folder`` that are not hidden, sorted, and the folders among them that cannot be listed.

    Links to files count as files; links to folders are not followed, so that a circle of them ends.
    """
    files: list[Path] = []
    closed: list[Path] = []

    def note(error: OSError) -> None:
        closed.append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=note):
        # os.walk goes into those that are left in its list.
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(files), sorted(closed)


def read_json(path: str | Path, largest: int = LARGEST_JSON) -> Any:
    """The value in a JSON file. A key twice in one mapping, and numbers that are not finite, are no JSON of ours.

    Args:
        path: the file.
        largest: bytes beyond which it is not read.

    Raises:
        ScionError: names the file that is missing, no regular file, unreadable, too large, or no JSON.
    """
    path = Path(path)
    try:
        if check_regular(path).stat().st_size > largest:
            raise ScionError(f"{path}: larger than {largest >> 20} MiB, which no record of ours is")
        return parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScionError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ScionError:
        raise
    except (ValueError, RecursionError):
        raise ScionError(f"{path}: damaged, not valid JSON") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, holds a key twice in one mapping, or a number that is not finite.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)  # of a key that is there twice it keeps the last value
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one mapping")
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


# ------------------------------------------------------------------------------------------------- locks


_held: set[tuple[int, int]] = set()
"""(device, inode) of the lock files that this process holds: the system's locks know processes, and a process that
opens such a file a second time loses the lock as soon as it closes it."""


@contextlib.contextmanager
def locked(file: str | Path, busy: str, wait: Callable[[], Any] | None = None) -> Iterator[bool]:
    """Hold ``file`` as a lock while the context lasts; the system frees it when the process ends, however it ends.

    The lock belongs to this process alone: worker processes that are forked from it do not hold it. The file is made
    where it is not there, and taken away at the end. Where the file system has no locks, nothing is locked, and the
    context's value is False.

    Args:
        file: the lock's file; its folder must be there.
        busy: the message where the lock is held.
        wait: called once before waiting for another process; None does not wait.

    Raises:
        ScionError: the lock is held, and nobody is to wait for it.
        OSError: the file cannot be made.
    """
    file = Path(file)
    handle, is_firm = _wait_for_lock(file, busy, wait)
    status = os.fstat(handle)
    inode = status.st_dev, status.st_ino
    _held.add(inode)
    try:
        yield is_firm
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file)  # while the lock is held, so that nobody holds a lock on a file that is gone
        os.close(handle)
        _held.discard(inode)


def _wait_for_lock(file: Path, busy: str, wait: Callable[[], Any] | None) -> tuple[int, bool]:
    """The open lock file, and whether its file system has locks, as soon as nobody else holds it."""
    has_waited = False
    while True:
        lock = _try_lock(file)
        if lock is not None:
            return lock
        if wait is None or _inode(file) in _held:  # to wait for oneself would be for ever
            raise ScionError(busy)
        if not has_waited:
            wait()
            has_waited = True
        time.sleep(0.1)


def _inode(file: Path) -> tuple[int, int] | None:
    """(device, inode) of a file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _try_lock(file: Path) -> tuple[int, bool] | None:
    """The open lock file, and whether its file system has locks; None where somebody holds it."""
    import fcntl

    if _inode(file) in _held:
        return None
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        return handle, False
    status = os.fstat(handle)
    if _inode(file) != (status.st_dev, status.st_ino):  # its last holder has taken the file away meanwhile
        os.close(handle)
        return _try_lock(file)
    return handle, True
