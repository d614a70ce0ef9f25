"""Tables and lists as strangers leave them: what can be read is read, all else is one line that names file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from core.data.lists import ordered, read_csv
from core.errors import ScionError
from core.files import files_below, read_text

ROWS = [{"file": "a.wav", "label": "x"}, {"file": "b.wav", "label": "y, z"}]


@pytest.mark.parametrize("text", [
    b"file,label\na.wav,x\nb.wav,\"y, z\"\n",
    b"\xef\xbb\xbffile,label\r\na.wav,x\r\n\r\nb.wav,\"y, z\"",
    b"file,label\ra.wav,x\rb.wav,\"y, z\"\r",
    b"file;label\na.wav;x\nb.wav;y, z",
    b"file\tlabel\na.wav\tx\nb.wav\ty, z\n",
])
def test_tables_of_all_programs(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    assert read_csv(tmp_path / "t.csv", ("file", "label")) == ROWS


@pytest.mark.parametrize(("text", "words"), [
    (b"", "empty"),
    (b"file,label\n", "no rows below the header"),
    (b"file\na.wav\n", "no column label"),
    (b"file,label\na.wav,x\n\"b.wav,y\nc.wav,z\n", "line 3: a mark of quotation is opened and not closed"),
    (b"file,label\n\"a.wav,x\n", "line 2: a mark of quotation is opened and not closed"),
    (b"file,label\na.wav," + b"x" * 200_000 + b"\n", "line 2: cannot be read as a table .*field larger"),
    (b"file,label\na\0.wav,x\n", "NUL"),
    (b"file,label\na\xff.wav,x\n", "text in UTF-8"),
    ("file,label\na.wav,x\n".encode("utf-16"), "text in UTF-8"),
    (bytes(range(256)) * 20, "text in UTF-8"),
    (b"file,label,label\na.wav,x,y\n", "two columns are called 'label'"),
    (b",".join(b"c%d" % k for k in range(100_000)) + b"\n1\n", "no column file, label"),
])
def test_tables_that_are_none(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ScionError, match=words) as caught:
        read_csv(tmp_path / "t.csv", ("file", "label"))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 't.csv'}") and "\n" not in message and len(message) < 1000


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")  # opening it would wait for ever
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for name, words in (("pipe.csv", "a pipe"), ("folder.csv", "a folder"), ("loop.csv", "cannot be read"),
                        ("absent.csv", "cannot be read"), ("a\0b.csv", "no name of a file"), ("n" * 300, "cannot be")):
        with pytest.raises(ScionError, match=words):
            read_text(tmp_path / name)
    with pytest.raises(ScionError, match="a device"):
        read_text("/dev/zero")


def test_circles_of_links_end(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "file").touch()
    assert files_below(tmp_path) == ([tmp_path / "a" / "b" / "file"], [])


def test_labels_of_thousands_of_digits_are_no_numbers() -> None:
    assert ordered(["10", "9", "9" * 5000]) == ["10", "9", "9" * 5000]
    assert ordered(["10", "9"]) == ["9", "10"]
