"""Sound files, folders and caches as strangers, full disks and other processes leave them: one line, or left out."""

from __future__ import annotations

import errno
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from core.errors import ScionError
from domains.audio import AudioFolder, clips, features
from domains.audio.clips import Clip
from tests.domains.audio.conftest import write_sound


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "audio"


def _ready(root: Path, **options: Any) -> Any:
    data = AudioFolder(str(root), **{"frames": 16, **options})
    data.setup()
    return data


def _sounds(root: Path, each: int = 4, classes: str = "ab") -> Path:
    for number, name in enumerate(classes):
        for index in range(each):
            write_sound(root / name / f"{index}.wav", seed=100 * number + index)
    return root


def _head(rate: int = 16_000, channels: int = 1, chunks: bytes = b"", data: bytes = bytes(8000),
          announced: int | None = None) -> bytes:
    """A WAV file of 16 bits whose head announces what it is told to."""
    form = struct.pack("<HHIIHH", 1, channels, rate, rate & 0x7FFFFFFF, 2 * channels, 16)
    size = len(data) if announced is None else announced
    body = b"WAVE" + b"fmt " + struct.pack("<I", 16) + form + chunks + b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


# ------------------------------------------------------------------------------------------------- one file


USUAL = (8000, 11_025, 12_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 176_400, 192_000)
ODD = (101, 15_999, 16_001, 24_001, 44_101, 99_991, 131_101, 191_999, 3_999_999)


@pytest.mark.parametrize("rate", USUAL)
def test_usual_rates_are_torchaudios_and_both_resamplers_agree(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchaudio.functional

    waveform = torch.randn(2 * rate // 5 + 7, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    ours = features.resample(waveform, rate)
    assert torch.equal(ours, torchaudio.functional.resample(waveform, rate, 16_000))
    monkeypatch.setattr(features, "KERNEL", 0)
    other = features.resample(waveform, rate)
    torch.testing.assert_close(other, ours, atol=1e-4, rtol=0)
    banks = features.filterbank(ours), features.filterbank(other)
    loud = banks[0] > banks[0].max() - 10
    assert (banks[0] - banks[1])[loud].abs().max() < 0.01


@pytest.mark.parametrize("rate", ODD)
def test_odd_rates_take_bounded_filters(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchaudio.functional.functional as functional

    sizes: list[int] = []
    original, sinc = functional._get_sinc_resample_kernel, features.sinc_filter

    def kernel(*arguments: Any) -> Any:
        found = original(*arguments)
        sizes.append(found[0].numel())
        return found

    def row(up: int, down: int) -> Any:
        sizes.append(len(sinc(up, down)))
        return sinc(up, down)

    monkeypatch.setattr(functional, "_get_sinc_resample_kernel", kernel)
    monkeypatch.setattr(features, "sinc_filter", row)
    hertz = min(700, rate / 5)
    tone = np.sin(2 * np.pi * hertz * np.arange(max(rate // 10, 100)) / rate)
    found = features.resample(torch.from_numpy(tone.astype(np.float32)), rate).numpy()
    wanted = np.sin(2 * np.pi * hertz * np.arange(len(found)) / 16_000)
    edge = 16_000 * 8 // min(rate, 16_000)  # half a filter beyond the ends there is nothing to hear
    assert abs(len(found) - len(tone) * 16_000 / rate) <= 1
    assert np.abs(found - wanted)[edge:-edge].max() < 2e-3
    assert len(sizes) == 1 and sizes[0] <= features.KERNEL * 2
    up, down = features.ratio(rate)
    assert abs(down * 16_000 / (up * rate) - 1) < 4e-6 and max(up, down) <= features.PERIOD


@pytest.mark.parametrize(("content", "words"), [
    (_head(rate=1), "1 samples a second, which no sound has; 100 to 4,000,000 wanted"),
    (_head(rate=2**31 - 1), "2,147,483,647 samples a second"),
    (_head(channels=0), "no readable sound file"),
    (_head(announced=2**31), "cut short"),
    (_head(channels=1024, rate=4_000_000, announced=2**31), "cut short"),
    (_head(data=b""), "no samples"),
    (b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVE" + bytes(200_000), "no readable sound file"),
    (b"fLaC" + b"\xff" * 5000, "no readable sound file"),
])
def test_heads_that_promise_too_much(content: bytes, words: str, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames=-1, **options: (
        asked.append(frames * self.channels), original(self, frames, **options))[1])
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(ScionError, match=words) as caught:
        clips._bank(tmp_path / "x.wav", 0.0, 500)
    assert str(caught.value).startswith(f"{tmp_path / 'x.wav'}: ") and "\n" not in str(caught.value)
    assert max(asked, default=0) <= features.VALUES


def test_chunks_without_end_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.wav"
    file.write_bytes(b"RIFF\0\0\0\0WAVE")
    os.truncate(file, 2**34)  # two thousand million empty chunks, and hardly a byte on the disk
    assert features.missing_bytes(file) == 0
    with pytest.raises(ScionError, match="no readable sound file"):
        clips.glance(Clip(file, "x.wav", ("a",)))


def test_long_files_are_read_in_pieces_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for channels in (1, 2, 3, 6):
        file = write_sound(tmp_path / f"{channels}.wav", 0.5, 22_050, channels)
        whole = features.read_waveform(file)
        with monkeypatch.context() as patch:
            patch.setattr(features, "VALUES", 1000)
            assert torch.equal(features.read_waveform(file), whole)
        data = torch.from_numpy(soundfile.read(file, dtype="float32", always_2d=True)[0])
        assert torch.equal(whole, features.resample(data.mean(dim=1), 22_050))


def test_nothing_but_files_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("x.wav")
    Path("circle.wav").symlink_to("circle.wav")
    for name, words in (("x.wav", "a pipe"), ("/dev/zero", "a device"), ("circle.wav", "cannot be read"),
                        ("-", "cannot be read"), ("n" * 300, "cannot be read"), ("a\0.wav", "no name of a file")):
        with pytest.raises(ScionError, match=words):
            clips._bank(Path(name), 0.0, 16)
    write_sound(Path("a.wav")).rename("-")  # libsndfile takes this name for standard input
    assert clips._bank(Path("-"), 0.0, 16).shape == (16, 128)
    Path("-").rename("x.raw")  # and this ending for a promise that there is no head
    assert clips._bank(Path("x.raw"), 0.0, 16).shape == (16, 128)


def test_values_beyond_all_sound_are_refused_and_silence_is_not(tmp_path: Path) -> None:
    for name, value in (("silent", 0.0), ("constant", 0.5), ("tiny", 1e-30), ("loud", 1e6)):
        soundfile.write(tmp_path / f"{name}.wav", np.full(2000, value, np.float32), 16_000, subtype="FLOAT")
        assert clips._bank(tmp_path / f"{name}.wav", 0.0, 16).isfinite().all()
    noise = np.random.default_rng(0).uniform(-1, 1, 2000).astype(np.float32)
    for name, value in (("large", 1e18), ("larger", 1e38)):
        soundfile.write(tmp_path / f"{name}.wav", noise * np.float32(value), 16_000, subtype="FLOAT")
        with pytest.raises(ScionError, match=f"{name}.wav: .*(too large|not numbers)"):
            clips._bank(tmp_path / f"{name}.wav", 0.0, 16)


# ------------------------------------------------------------------------------------------------- a folder


def test_what_is_odd_in_a_folder_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _sounds(tmp_path / "pond")
    os.mkfifo(root / "a" / "pipe.wav")
    (root / "a" / "circle.wav").symlink_to("circle.wav")
    (root / "a" / "inner").mkdir()
    (root / "a" / "inner" / "back").symlink_to(root)
    (root / "back").symlink_to(root)
    loud = 1e18 * np.random.default_rng(0).uniform(-1, 1, 2000)
    soundfile.write(root / "a" / "loud.wav", loud.astype(np.float32), 16_000, subtype="FLOAT")
    latin = os.path.join(os.fsencode(root), b"c\xff")
    os.mkdir(latin)
    for index in range(3):
        file = write_sound(tmp_path / "new.wav", seed=index)
        os.rename(file, os.path.join(latin, b"%d\xfe.wav" % index))
    scandir = os.scandir

    def closed(place: Any = ".") -> Any:
        if Path(place).name == "inner":  # which no chmod does to root
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", closed)
    data = _ready(root)
    assert data.classes == ["a", "b", "c\\xff"]
    found = [data.name_of(part, index) for part in (data.train_set, data.validation_set, data.test_set) if part
             for index in range(len(part))]
    assert len(set(found)) == len(found) == 11 and all(os.path.isfile(name) for name in found)
    told = sorted(line.removeprefix(f"{root}/") for line in data.skipped)
    starts = ("a/circle.wav: cannot be read", "a/inner: cannot be read",
              "a/loud.wav: the sound file's values are too large (up to 1e+18", "a/pipe.wav: a pipe",
              "back: a link back")
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(start) and line.isprintable()
    with pytest.raises(ScionError, match="skip_bad: true leaves"):
        _ready(root, skip_bad=False)


def test_files_that_vanish_or_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _sounds(tmp_path / "pond")
    gone, away = root / "a" / "0.wav", tmp_path / "away.wav"
    original = clips._bank

    def vanish(file: Path, *rest: Any) -> Any:
        if gone.exists():
            gone.rename(away)
        return original(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(clips, "_bank", vanish)
        data = _ready(root)
    assert len(data.skipped) == 1 and "0.wav: cannot be read (No such file" in data.skipped[0]
    away.rename(gone)  # with the same size and time as before
    with pytest.warns(UserWarning, match="could not be opened then"):
        assert _ready(root).skipped == []


def test_short_memory_is_told_and_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       private_cache: Path) -> None:
    root = _sounds(tmp_path / "pond")

    def short(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    for place in ("resample", "filterbank"):
        with monkeypatch.context() as patch:
            patch.setattr(features, place, short)
            with pytest.raises(ScionError, match=r"data: not enough memory .*\.wav") as caught:
                _ready(root)
            assert "\n" not in str(caught.value)
            with pytest.raises(ScionError, match="not enough memory"):
                AudioFolder(source="mini").read(root / "a" / "0.wav")
    assert list(private_cache.iterdir()) == []
    assert _ready(root).skipped == []


# ------------------------------------------------------------------------------------------------- the cache


def test_a_full_disk_while_features_are_written(tmp_path: Path, private_cache: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    root = _sounds(tmp_path / "pond")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # two clips fit, eight do not
    try:
        with pytest.raises(ScionError, match="^cache: .*disk full.*filterbanks of 8 clips.*data.cache or SCION_CACHE"):
            _ready(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(private_cache.iterdir()) == []
    with monkeypatch.context() as patch:
        usage = clips.file_cache.shutil.disk_usage(root)._replace(free=9)
        patch.setattr(clips.file_cache.shutil, "disk_usage", lambda folder: usage)
        patch.setattr(clips, "_bank", lambda *_: pytest.fail("told before anything is computed"))
        with pytest.raises(ScionError, match="disk full .0.0 MB needed"):
            _ready(root)
    modes: list[str] = []
    mapped = np.lib.format.open_memmap
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda file, mode="r+", **options: (
        modes.append(mode), mapped(file, mode=mode, **options))[1])
    assert len(_ready(root).train_set) > 0 and len(list(private_cache.iterdir())) == 2
    assert set(modes) == {"r"}  # writing into a map on a full disk ends the process


def test_damaged_features_are_computed_again(tmp_path: Path, private_cache: Path) -> None:
    root = _sounds(tmp_path / "pond")
    (root / "a" / "empty.wav").touch()
    first = _ready(root)
    store, notes = next(private_cache.glob("*.npy")), next(private_cache.glob("*.json"))
    banks = np.array(first.train_set.banks)

    def infinite() -> None:
        found = np.load(store)
        found[3, 2, 1] = np.inf
        np.save(store, found)

    def flip() -> None:
        content = bytearray(store.read_bytes())
        content[5000] ^= 1
        store.write_bytes(content)

    for spoil in (infinite, flip, lambda: os.truncate(store, 700), lambda: store.write_text("no numbers"),
                  lambda: np.save(store, banks[:, :8]), lambda: notes.write_text("{}"),
                  lambda: os.truncate(notes, 9), lambda: notes.write_text(notes.read_text().replace("empty", "other"))):
        spoil()
        with pytest.warns(UserWarning, match="cannot be used .*so it is made again"):
            again = _ready(root)
        assert np.array_equal(again.train_set.banks, banks) and again.skipped == first.skipped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ready(root)
    notes.unlink()
    assert np.array_equal(_ready(root).train_set.banks, banks)


# ------------------------------------------------------------------------------------------------- the listing


def test_the_listing_is_of_the_data_alone(tmp_path: Path) -> None:
    root = _sounds(tmp_path / "pond", 6)
    first = _ready(root).listing
    assert len(first) == 16 and int(first, 16) >= 0
    seen = {first}
    assert _ready(root.rename(tmp_path / "lake"), frames=32, seed=5).listing == first
    root = tmp_path / "lake"
    os.utime(root / "a" / "0.wav", (1, 1))
    assert _ready(root).listing == first

    def other(**options: Any) -> None:
        listing = _ready(root, **options).listing
        assert listing not in seen
        seen.add(listing)

    other(split_seed=1)
    write_sound(root / "a" / "new.wav")
    other()
    write_sound(root / "a" / "new.wav", 0.2)  # another size
    other()
    (root / "a" / "new.wav").rename(root / "b" / "new.wav")
    other()
    (root / "b" / "new.wav").write_bytes(b"none")
    other()
    (root / "b" / "new.wav").unlink()
    assert _ready(root).listing == first
