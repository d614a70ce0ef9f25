"""Archives from the net: plain files within their folder, of the size that was published, and all of it or nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from core.data import download as network
from core.data.download import Archive, download, reachable
from core.errors import ScionError

Members = dict[str, bytes | tarfile.TarInfo | zipfile.ZipInfo]


def _tar(file: Path, members: Members) -> None:
    with tarfile.open(file, "w:gz") as packed:
        for name, content in members.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))


def _zip(file: Path, members: Members) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(content if isinstance(content, zipfile.ZipInfo) else name,
                            content if isinstance(content, bytes) else b"/etc/passwd")


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def _zipped_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


GOOD: Members = {"set/a.txt": b"a", "set/sub/b.txt": b"b"}


def _archive(tmp_path: Path, members: Members, write: Callable[[Path, Members], None] = _tar) -> Archive:
    file = tmp_path / "published"
    write(file, members)
    return Archive(file.as_uri(), "sha256", hashlib.sha256(file.read_bytes()).hexdigest(), "set", "1 kB", most=10_000)


def _fails(archive: Archive, cache: Path, words: str) -> None:
    with pytest.raises(ScionError, match=words) as caught:
        download(archive, "The set", cache, lambda folder: None)
    assert "\n" not in str(caught.value) and not list(cache.iterdir())


@pytest.mark.parametrize("write", [_tar, _zip])
def test_what_is_published_is_unpacked_once(write: Callable[[Path, Members], None], tmp_path: Path) -> None:
    archive, cache = _archive(tmp_path, GOOD, write), tmp_path / "cache"
    folder = download(archive, "The set", cache, lambda folder: None)
    assert (folder / "sub" / "b.txt").read_bytes() == b"b" and os.listdir(cache) == ["set"]
    (tmp_path / "published").unlink()
    assert download(archive, "The set", cache, lambda folder: None) == folder  # as a second process finds it


@pytest.mark.parametrize(("write", "name", "content"), [
    (_tar, "../outside", b"x"), (_tar, "/tmp/outside", b"x"), (_tar, "set/../../outside", b"x"),
    (_tar, "set/link", _link("set/link", "/etc/passwd")), (_tar, "set/link", _link("set/link", "a.txt")),
    (_tar, "set/hard", _link("set/hard", "set/a.txt", tarfile.LNKTYPE)),
    (_tar, "set/pipe", _link("set/pipe", "", tarfile.FIFOTYPE)),
    (_tar, "set/device", _link("set/device", "", tarfile.CHRTYPE)),
    (_zip, "../outside", b"x"), (_zip, "/tmp/outside", b"x"), (_zip, "set/link", _zipped_link("set/link")),
])
def test_nothing_but_plain_files_within_the_folder(write: Callable[[Path, Members], None], name: str,
                                                   content: bytes | tarfile.TarInfo | zipfile.ZipInfo,
                                                   tmp_path: Path) -> None:
    archive = _archive(tmp_path, {**GOOD, name: content}, write)
    _fails(archive, tmp_path / "cache", f"The set could not be downloaded .the archive holds {name}, which is no plain")
    assert not (tmp_path / "outside").exists() and not Path("/tmp/outside").exists()


@pytest.mark.parametrize("write", [_tar, _zip])
def test_bombs_are_not_unpacked(write: Callable[[Path, Members], None], tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _archive(tmp_path, {**GOOD, "set/zeros": bytes(5_000_000)}, write)
    assert (tmp_path / "published").stat().st_size < 10_000
    _fails(archive, tmp_path / "cache", "unpacks to more than 1e-05 GB")
    _fails(replace(archive, most=100), tmp_path / "cache", "more than 1e-07 GB came, and the archive has 1 kB")


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    archive = _archive(tmp_path, GOOD, _zip)
    whole = (tmp_path / "published").read_bytes()
    flipped = bytearray(whole)
    flipped[39] ^= 0xFF  # the first byte of the first file
    locked = bytearray(whole)
    locked[6] |= 1  # says that a password is wanted, in the file's head and in the list at the end
    locked[locked.index(b"PK\1\2") + 8] |= 1
    for content in (b"", b"no archive", whole[:100], bytes(flipped), bytes(locked)):
        (tmp_path / "published").write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the checksum is another
            _fails(replace(archive, fixed=False), tmp_path / "cache", "could not be downloaded")
    (tmp_path / "published").unlink()
    _fails(archive, tmp_path / "cache", "could not be downloaded")
    _fails(replace(_archive(tmp_path, GOOD), folder="other"), tmp_path / "cache", "holds no folder other")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive, cache = _archive(tmp_path, GOOD), tmp_path / "cache"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(network, "_unpack", full)
        _fails(archive, cache, "disk full where the files of The set should go; .*data.cache or SCION_CACHE")
    assert download(archive, "The set", cache, lambda folder: None).is_dir()


def test_an_odd_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.client

    def odd(*_: object, **__: object) -> None:
        raise http.client.BadStatusLine("what?")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(network.urllib.request, "urlopen", odd)
    assert not reachable("http://localhost:9/")
