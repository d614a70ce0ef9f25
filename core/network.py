"""The network: one short question before anything waits for it, and the download of a benchmark's archive."""

from __future__ import annotations

import hashlib
import os
import shutil
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

from core.errors import ScionError

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
        except (OSError, ValueError):
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
    """

    url: str
    algorithm: str
    checksum: str
    folder: str
    size: str
    fixed: bool = True
    inside: bool = True


def download(archive: Archive, title: str, cache: Path, check: Callable[[Path], None]) -> Path:
    """Fetch and unpack an archive into ``cache``, all or nothing; returns its folder there.

    Args:
        archive: what to fetch.
        title: the benchmark's name, for messages.
        cache: folder to put it into.
        check: raises ``ScionError`` where the unpacked folder is not whole.
    """
    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        file = Path(scratch) / "archive"
        digest = hashlib.new(archive.algorithm, usedforsecurity=False)
        folder = Path(scratch) / archive.folder
        try:
            with urllib.request.urlopen(archive.url, timeout=30) as answer, file.open("wb") as out, \
                    tqdm(total=int(answer.headers.get("Content-Length") or 0) or None, unit="B", unit_scale=True,
                         desc=title) as bar:
                while block := answer.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
            _compare(archive, title, digest.hexdigest())
            _unpack(file, Path(scratch) if archive.inside else folder)
        except (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise ScionError(f"{title} could not be downloaded ({error}); fetch {archive.url} and give data.root"
                             ) from None
        check(folder)
        ready = cache / archive.folder
        if not ready.exists():  # another process may have been faster
            shutil.move(folder, ready)
    return ready


def _compare(archive: Archive, title: str, found: str) -> None:
    name = archive.algorithm.upper()
    if found == archive.checksum:
        return
    if archive.fixed:
        raise ScionError(f"{title}: the archive's {name} sum is {found}, not the published {archive.checksum}; the "
                         f"download is damaged or the archive has changed: fetch {archive.url} and give data.root")
    warnings.warn(f"{title}: the archive's {name} sum is {found}, not the known {archive.checksum}; its content is "
                  "checked file by file", stacklevel=3)


def _unpack(file: Path, target: Path) -> None:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as packed:
            packed.extractall(target)  # checks each file's CRC
    else:
        with tarfile.open(file, "r:*") as packed:
            if hasattr(tarfile, "data_filter"):  # nothing outside the folder, no devices, no links out of it
                packed.extractall(target, filter="data")
                return
            inside = target.resolve()  # Python before 3.11.4
            for member in packed.getmembers():
                path = (target / member.name).resolve()
                if not (member.isfile() or member.isdir()) or not path.is_relative_to(inside):
                    raise ScionError(f"{file}: holds {member.name}, which is no plain file within the archive's folder")
            packed.extractall(target)
