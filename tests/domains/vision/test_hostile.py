"""Pictures, folders, lists and caches as strangers and other processes leave them: one line, or left out and named."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from core.errors import ScionError
from domains.vision import images
from domains.vision.fgvc import read_list
from domains.vision.folder import ImageFolder
from domains.vision.images import read_picture
from domains.vision.metric import read_cars, rows_of
from domains.vision.vtab import _entries
from tests.domains.vision.conftest import noise, write_picture


def _ready(root: Path, **options: Any) -> Any:
    data = ImageFolder(str(root), **{"size": 16, **options})
    data.setup()
    return data


def _pictures(root: Path, each: int = 4, classes: str = "ab") -> Path:
    for number, name in enumerate(classes):
        for index in range(each):
            write_picture(root / name / f"{index}.png", seed=100 * number + index)
    return root


def _fails(file: Path, words: str) -> None:
    with pytest.raises(ScionError, match=words) as caught:
        read_picture(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- one file


def test_postscript_never_reaches_its_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: started.append(arguments))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/x) (w) file\nshowpage\n%%EOF\n"
    for name in ("x.jpg", "x.eps", "x"):
        (tmp_path / name).write_bytes(script)
        _fails(tmp_path / name, "no readable picture; JPEG, PNG, BMP, GIF, TIFF, WebP or PPM wanted")
    assert not started


@pytest.mark.parametrize("form", ["EPS", "PCX", "TGA", "ICO", "SGI", "DDS", "JPEG2000", "SPIDER", "PDF"])
def test_other_formats_are_refused_whatever_they_are_called(form: str, tmp_path: Path) -> None:
    content = io.BytesIO()
    try:
        noise(32, 32).convert("F" if form == "SPIDER" else "RGB").save(content, form)
    except OSError:
        pytest.skip(f"this Pillow writes no {form}")
    (tmp_path / "x.jpg").write_bytes(content.getvalue())
    _fails(tmp_path / "x.jpg", "no readable picture")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_bombs_and_impossible_heads(tmp_path: Path) -> None:
    head = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000), 9))
    (tmp_path / "text.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + text * 3 + _chunk(b"IEND", b""))
    _fails(tmp_path / "text.png", "no readable picture|cut short")
    wide = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    (tmp_path / "wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", wide) + _chunk(b"IEND", b""))
    _fails(tmp_path / "wide.png", "bomb|no readable picture")
    entries = b"".join(struct.pack("<HHII", tag, 4, 2**31 - 1, 8) for tag in (256, 257, 258, 273, 279))
    (tmp_path / "tags.tif").write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", 5) + entries + bytes(40))
    _fails(tmp_path / "tags.tif", "no readable picture|cannot be read")
    (tmp_path / "large.ppm").write_bytes(b"P6\n100000 100000\n255\n")
    _fails(tmp_path / "large.ppm", "bomb")
    (tmp_path / "line.ppm").write_bytes(b"P6\n" + b"1" * 5000 + b" 1\n255\n")
    _fails(tmp_path / "line.ppm", "no readable picture")


def test_nothing_but_files_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    for name, words in (("pipe.jpg", "a pipe"), ("circle.jpg", "cannot be read"), ("n" * 300, "cannot be read"),
                        ("a\0.jpg", "no name of a file")):
        _fails(tmp_path / name, words)
    _fails(Path("/dev/zero"), "a device")


def test_values_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf, 1e18):
        Image.fromarray(np.full((4, 4), value, dtype=np.float32)).save(tmp_path / "a.tiff")
        _fails(tmp_path / "a.tiff", "grey values beyond 16 bits, or fractions")


def test_whatever_a_reader_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_picture(tmp_path / "a.png")
    for error in (struct.error("unpack"), KeyError("mode"), ZeroDivisionError("of a size"), RecursionError(),
                  AssertionError(), TypeError("two\nlines")):
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", lambda *_, raised=error, **__: (_ for _ in ()).throw(raised))
            _fails(file, "no readable picture")
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "convert", lambda *_, raised=error, **__: (_ for _ in ()).throw(raised))
            _fails(file, "damaged")


# ------------------------------------------------------------------------------------------------- folders and caches


def test_what_is_odd_in_a_folder_is_left_out_and_named(tmp_path: Path) -> None:
    root = _pictures(tmp_path / "pond")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "circle.png").symlink_to("circle.png")
    (root / "a" / "back").symlink_to(root)
    (root / "back").symlink_to(root)
    (root / "b" / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    latin = os.path.join(os.fsencode(root), b"c\xff")
    os.mkdir(latin)
    for index in range(3):
        os.rename(write_picture(tmp_path / "new.png", seed=index), os.path.join(latin, b"%d\xfe.png" % index))
    data = _ready(root)
    assert data.classes == ["a", "b", "c\\xff"]
    found = [data.name_of(part, index) for part in (data.train_set, data.validation_set, data.test_set) if part
             for index in range(len(part))]
    assert len(set(found)) == len(found) == 11 and all(os.path.isfile(name) for name in found)
    told = sorted(line.removeprefix(f"{root}/") for line in data.skipped)
    for line, start in zip(told, ("a/circle.png: cannot be read", "a/pipe.png: a pipe", "b/script.jpg: no readable",
                                  "back: a link back"), strict=True):
        assert line.startswith(start) and line.isprintable()


def test_files_that_vanish_or_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _pictures(tmp_path / "pond")
    gone, away = root / "a" / "0.png", tmp_path / "away.png"
    with monkeypatch.context() as patch:
        original = images.load_picture

        def vanishing(file: Path) -> Image.Image:
            with contextlib.suppress(FileNotFoundError):  # several threads read pictures, and one of them is the first
                gone.rename(away)
            return original(file)

        patch.setattr(images, "load_picture", vanishing)
        data = _ready(root)
    assert len(data.skipped) == 1 and "0.png: cannot be read (No such file" in data.skipped[0]
    away.rename(gone)  # with the same size and time as before
    with pytest.warns(UserWarning, match="could not be opened then"):
        data = _ready(root)
    assert data.skipped == []
    for file in root.rglob("*.png"):
        file.unlink()
    with pytest.raises(ScionError, match=r"^/[^ ]*png: cannot be read \(No such file or directory\)$"):
        list(data.train_dataloader())


def test_short_memory_is_told_and_no_fault_of_the_file(tmp_path: Path, private_cache: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    root = _pictures(tmp_path / "pond")

    def short(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", short)
        with pytest.raises(ScionError, match=r"data: not enough memory .*\.png"):
            _ready(root)
        with pytest.raises(ScionError, match="not enough memory"):
            ImageFolder(source="mini", size=16).read(root / "a" / "0.png")
    assert list((private_cache / "vision").iterdir()) == []
    assert _ready(root).skipped == []


def test_damaged_verdicts_are_made_again(tmp_path: Path, private_cache: Path) -> None:
    root = _pictures(tmp_path / "pond")
    (root / "a" / "empty.png").touch()
    first = _ready(root)
    note = next((private_cache / "vision").glob("*.json"))
    whole = note.read_text()
    for text in ("", "{}", whole[:30], whole.replace("empty", "other"), "[" * 100_000):
        note.write_text(text)
        with pytest.warns(UserWarning, match="cannot be used .*so it is made again"):
            assert _ready(root).skipped == first.skipped
        assert note.read_text() == whole
    note.unlink()
    note.mkdir()
    (note / "something").touch()
    with pytest.warns(UserWarning, match="a folder"), pytest.raises(ScionError, match="^cache: .* cannot be written"):
        _ready(root)


def test_the_listing_is_of_the_data_alone(tmp_path: Path, private_cache: Path) -> None:
    root = _pictures(tmp_path / "pond", 6)
    first = _ready(root).listing
    assert _ready(root.rename(tmp_path / "lake"), size=24, seed=5, augment="flip").listing == first
    root = tmp_path / "lake"
    seen = {first}
    for change in (lambda: write_picture(root / "a" / "new.png"), lambda: write_picture(root / "a" / "new.png", 50),
                   lambda: (root / "a" / "new.png").rename(root / "b" / "new.png")):
        change()
        listing = _ready(root).listing
        assert listing not in seen
        seen.add(listing)


# ------------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize(("text", "words"), [
    ("[" * 100_000, "cannot be read as JSON"), ('{"a.jpg": 1, "a.jpg": 2}', "a.jpg stands there twice"),
    ('{"a.jpg": "%s"}' % ("9" * 5000), "a whole number wanted"), ('{"a.jpg": %s}' % ("9" * 5000), "as JSON"),
    ('{"a.jpg": NaN}', "a whole number wanted"), ("\0", "NUL"),
])
def test_lists_in_json(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(text)
    with pytest.raises(ScionError, match=words) as caught:
        read_list(tmp_path / "train.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_lists_that_are_no_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, words in (("pipe", "a pipe"), ("folder", "a folder"), ("binary", "text in UTF-8")):
        for read in (read_list, lambda file: list(rows_of(file, ("a", "b"))), lambda file: _entries(file, "x", ["y"])):
            with pytest.raises(ScionError, match=words):
                read(tmp_path / name)
    (tmp_path / "blanks.txt").write_text("a" + " " * 200_000 + "b\n")  # a minute for a careless expression
    with pytest.raises(ScionError, match="line 1: .* has no label"):
        _entries(tmp_path / "blanks.txt", "x", ["y"])


def test_matlab_files_that_are_bombs_or_none(tmp_path: Path) -> None:
    head = b"MATLAB 5.0 MAT-file".ljust(116) + bytes(8) + struct.pack("<HH", 0x0100, 0x4D49)
    bomb = zlib.compress(bytes(100_000_000), 9)
    file = tmp_path / "cars_annos.mat"
    for content, words in ((head + struct.pack("<II", 15, len(bomb)) + bomb, "larger than 64 MiB"),
                           (head + bytes(500), "no table"), (b"", "no table"), (bytes(range(256)) * 9, "no table"),
                           (head + struct.pack("<II", 15, 100) + bytes(100), "no table")):
        file.write_bytes(content)
        with pytest.raises(ScionError, match=words) as caught:
            read_cars(tmp_path)
        assert "\n" not in str(caught.value)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ScionError, match="a pipe"):
        read_cars(tmp_path)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    from domains.vision.fgvc import FGVC

    for name in ("a\0b.jpg", "a\ud800.jpg"):
        for which in ("train", "val", "test"):
            found = {f"{which}{name}": 0, f"{which}1.jpg": 1}
            (tmp_path / f"{which}.json").write_text(json.dumps(found))
        with pytest.raises(ScionError, match="no name of a file"):
            FGVC(root=str(tmp_path)).peek()
