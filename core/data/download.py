"""The network: one short question before anything waits for it, and the download of a benchmark's archive."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tarfile
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.data import file_cache
from core.errors import ScionError, one_line

SECONDS = 3.0
"""Longest wait for an answer."""


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether ``url``'s server answers within ``seconds``; looking up its name counts towards them.

    Never, where the environment says ``HF_HUB_OFFLINE=1``.
    """
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on"}:
        return False
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
            answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # it speaks to us: 401, 404, 405 are answers
                answered.set()
        except Exception:  # whatever a net or a server may do, it is no answer
            pass
        finally:
            done.set()

    done = threading.Event()
    threading.Thread(target=ask, daemon=True).start()  # a thread, since a name's look-up has no time limit of its own
    done.wait(seconds)
    return answered.is_set()


@dataclass(frozen=True)
class Archive:
    """Where a benchmark is published.

    Args:
        url: of a zip or a gzipped tar.
        algorithm, checksum: of its bytes, as ``hashlib`` names and prints them.
        folder: what it is called in the cache.
        size: of the download, for people.
        fixed: whether the host promises these very bytes. Where it packs the archive anew from time to time, another
            sum is a warning, and what counts is the content.
        inside: whether the archive holds ``folder`` itself; otherwise it is unpacked into a folder of that name.
        most: bytes that neither the download nor its content comes near: what has more is something else.
    """

    url: str
    algorithm: str
    checksum: str
    folder: str
    size: str
    fixed: bool = True
    inside: bool = True
    most: int = 20 * 10**9


def download(archive: Archive, title: str, cache: Path, check: Callable[[Path], None]) -> Path:
    """Fetch and unpack an archive into ``cache``, all or nothing; returns its folder there.

    One process does it; others that want it meanwhile wait and take what came.

    Args:
        archive: what to fetch.
        title: the benchmark's name, for messages.
        cache: folder to put it into.
        check: raises ``ScionError`` where the unpacked folder is not whole.

    Raises:
        ScionError: it cannot be had, is not what was published, or the cache cannot be written.
    """
    ready = cache / archive.folder
    with file_cache.making(ready, f"files of {title}"):
        if ready.exists():  # another process was faster
            return ready
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{file_cache.DOWNLOAD}{archive.folder}-") as scratch:
            file = Path(scratch) / "archive"
            folder = Path(scratch) / archive.folder
            try:
                _compare(archive, title, _fetch(archive, title, file))
                _unpack(file, Path(scratch) if archive.inside else folder, archive.most)
                if not folder.is_dir():
                    raise ValueError(f"the archive holds no folder {archive.folder}")
            except ScionError:
                raise
            except OSError as error:
                if error.errno in file_cache.FULL:
                    raise
                raise ScionError(_failed(archive, title, error)) from None
            except Exception as error:  # of what is no archive zipfile and tarfile raise whatever comes
                raise ScionError(_failed(archive, title, error)) from None
            check(folder)
            shutil.move(folder, ready)
    return ready


def _failed(archive: Archive, title: str, error: Exception) -> str:
    return one_line(f"{title} could not be downloaded ({error or type(error).__name__}); fetch {archive.url} and give "
                    "data.root")


def _fetch(archive: Archive, title: str, file: Path) -> str:
    """Download to ``file``; returns the checksum of what came."""
    from tqdm import tqdm

    digest = hashlib.new(archive.algorithm, usedforsecurity=False)
    with urllib.request.urlopen(archive.url, timeout=30) as answer, file.open("wb") as out:
        length = answer.headers.get("Content-Length") or ""
        total = int(length) if length.isdecimal() else None
        with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None) as bar:
            while block := answer.read(1 << 20):
                out.write(block)
                digest.update(block)
                bar.update(len(block))
                if out.tell() > archive.most:
                    raise ValueError(f"more than {archive.most / 1e9:g} GB came, and the archive has {archive.size}")
        if total is not None and out.tell() < total:
            raise OSError(f"{out.tell():,} bytes of {total:,} came")
    return digest.hexdigest()


def _compare(archive: Archive, title: str, found: str) -> None:
    name = archive.algorithm.upper()
    if found == archive.checksum:
        return
    if archive.fixed:
        raise ScionError(f"{title}: the archive's {name} sum is {found}, not the published {archive.checksum}; the "
                         f"download is damaged or the archive has changed: fetch {archive.url} and give data.root")
    warnings.warn(f"{title}: the archive's {name} sum is {found}, not the known {archive.checksum}; its content is "
                  "checked file by file", stacklevel=3)


def _unpack(file: Path, target: Path, most: int) -> None:
    """The plain files of an archive below ``target``: nothing outside it, no links, no devices, no more than ``most``
    bytes."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            members = packed.infolist()
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)
                _check_member(target, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if sum(member.file_size for member in members) > most:
                raise ValueError(f"the archive unpacks to more than {most / 1e9:g} GB")
            packed.extractall(target)  # never more than these sizes, and checks each file's CRC
        return
    unpacked = 0
    with tarfile.open(file, "r:*") as packed:
        for member in packed:  # in the order of the stream: its next ones are not known yet
            _check_member(target, member.name, member.isfile() or member.isdir())
            unpacked += member.size
            if unpacked > most:
                raise ValueError(f"the archive unpacks to more than {most / 1e9:g} GB")
            if hasattr(tarfile, "data_filter"):
                packed.extract(member, target, filter="data")
            else:  # Python before 3.11.4
                packed.extract(member, target)


def _check_member(target: Path, name: str, plain: bool) -> None:
    inside = target.resolve()
    if not plain or not (inside / name).resolve().is_relative_to(inside):
        raise ValueError(f"the archive holds {name}, which is no plain file within its folder")
