"""The cache: made once, by one process, whole or not at all, and made again where it is damaged."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from core.data import file_cache
from core.errors import ScionError


def _read(file: Path) -> Callable[[], list[int]]:
    return lambda: file_cache.read_note(file)


def _kept(file: Path, made: list[str] | None = None) -> list[int]:
    def make() -> None:
        if made is not None:
            made.append("made")
        file_cache.write_note(file, [1, 2, 3])

    return file_cache.kept(file, "three numbers", _read(file), make)


def _child(work: Callable[[int], None]) -> tuple[int, int]:
    """A process that does ``work``, given a pipe to write to; its number, and the pipe's other end."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    return child, ours


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda file: os.truncate(file, 20),
    "empty": lambda file: os.truncate(file, 0),
    "flipped": lambda file: file.write_text(file.read_text().replace("2", "7", 1)),
    "foreign": lambda file: file.write_text('{"kept": "by another program"}'),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_what_is_damaged_is_made_again(how: str, tmp_path: Path) -> None:
    file, made = tmp_path / "sub" / "x.json", []
    assert _kept(file, made) == _kept(file, made) == [1, 2, 3] and made == ["made"]
    DAMAGE[how](file)
    with pytest.warns(UserWarning, match="x.json cannot be used .*so it is made again") as warned:
        assert _kept(file, made) == [1, 2, 3]
    assert len(warned) == 1 and made == ["made"] * 2
    assert _kept(file, made) == [1, 2, 3] and made == ["made"] * 2
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


def test_a_second_process_waits_and_takes_what_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    go_on, told = os.pipe()

    def work(pipe: int) -> None:
        with file_cache.making(file, "three numbers"):
            os.write(pipe, b"1")
            os.read(go_on, 1)  # until the other one waits
            file_cache.write_note(file, [1, 2, 3])

    child, pipe = _child(work)
    assert os.read(pipe, 1) == b"1"
    tell = file_cache._tell
    monkeypatch.setattr(file_cache, "_tell", lambda line: (tell(line), os.write(told, b"1")))
    made: list[str] = []
    assert _kept(file, made) == [1, 2, 3] and made == []
    os.waitpid(child, 0)
    assert capsys.readouterr().err.splitlines() == [
        f"cache: another process makes the three numbers; waiting for it ({file})"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    def work(pipe: int) -> None:
        with file_cache.making(tmp_path / "y.json", "numbers"):
            def write(scratch: Path) -> None:
                scratch.write_text("half")
                os.write(pipe, b"1")
                os.read(os.pipe()[0], 1)  # for ever

            file_cache.write(tmp_path / "y.json", write)

    def unfinished() -> list[str]:
        return [path.name for path in tmp_path.glob(".*")]

    child, pipe = _child(work)
    try:
        assert os.read(pipe, 1) == b"1"
        (tmp_path / ".download-b-1234").mkdir()
        (tmp_path / ".download-b-1234" / "part").touch()
        (tmp_path / ".writing-z.npy-5678.npy").touch()
        (tmp_path / ".writing-old").touch()
        _kept(tmp_path / "x.json")
        left = unfinished()
        assert len(left) == 2 and all(".y.json.lock" == name or ".writing-y.json-" in name for name in left)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert unfinished()
    assert _kept(tmp_path / "y.json") == [1, 2, 3]
    assert not unfinished()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.npy"

    def full(scratch: Path) -> None:
        scratch.write_bytes(bytes(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(make: Callable[[], None]) -> str:
        with pytest.raises(ScionError) as caught:
            file_cache.kept(file, "many numbers", _read(file), make)
        assert list(tmp_path.iterdir()) == [] and "\n" not in str(caught.value)
        return str(caught.value)

    line = fails(lambda: file_cache.write(file, full))
    assert line.startswith(f"cache: {tmp_path}: disk full where the many numbers should go")
    assert "set data.cache or SCION_CACHE" in line
    free = file_cache.shutil.disk_usage(tmp_path)._replace(free=1_500_000)
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda folder: free)
    assert "disk full (9.0 MB needed, 1.5 MB free)" in fails(lambda: file_cache.check_room(tmp_path, 9_000_000))
    assert _kept(file) == [1, 2, 3]  # a second call goes on


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "x.json").mkdir()
    (tmp_path / "x.json" / "something").touch()
    places = [tmp_path / "taken", tmp_path / "taken" / "sub"]
    if sys.platform == "linux":
        places.append(Path("/proc/scion"))  # nobody, root included, can make it
    for folder in places:
        with pytest.raises(ScionError, match=f"cache: {folder} cannot be written .*set data.cache or SCION_CACHE"):
            _kept(folder / "x.json")
    with pytest.warns(UserWarning, match="a folder"), pytest.raises(ScionError, match=r"x\.json cannot be written"):
        _kept(tmp_path / "x.json")
    assert (tmp_path / "x.json" / "something").exists()


def test_a_cache_that_is_whole_is_never_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _kept(tmp_path / "x.json") == [1, 2, 3]
    monkeypatch.setattr(file_cache, "locked", lambda *_: pytest.fail("a folder that is read-only has no locks"))
    assert _kept(tmp_path / "x.json") == [1, 2, 3]


def test_an_error_of_another_file_is_not_the_caches(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"sound\.wav"), file_cache.making(tmp_path / "cache" / "x.json", "x"):
        (tmp_path / "sound.wav").read_bytes()
    with pytest.raises(ScionError, match="cache: .*part cannot be written"):
        with file_cache.making(tmp_path / "cache" / "x.json", "x"):
            (tmp_path / "cache" / "none" / "part").write_bytes(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(ScionError, match="cache: .*file.* cannot be written"):
        with file_cache.making(tmp_path / "file" / "cache" / "x.json", "x"):
            pass
