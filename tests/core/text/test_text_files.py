"""Files of texts: every record with its line, and what cannot be taken in one line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.errors import ScionError
from core.text import files
from core.text.files import read_json_lines, read_lines, read_records, read_table


def file_of(folder: Path, name: str, content: bytes | str) -> Path:
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_lines(tmp_path: Path) -> None:
    file = file_of(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\n  three \xc3\xa4\nno end")
    found = list(read_records(file))
    assert [record.fields for record in found] == [{"text": "one"}, {"text": ""}, {"text": "  three ä"},
                                                   {"text": "no end"}]
    assert [record.line for record in found] == [1, 2, 3, 4] and found[2].place == f"{file}, line 3"
    assert list(read_lines(file_of(tmp_path, "empty.txt", b""))) == []


def test_json_lines(tmp_path: Path) -> None:
    file = file_of(tmp_path, "a.jsonl", '{"question": "q", "context": "c"}\n\n{"text": "a", "n": 1}\n')
    first, second = read_records(file)
    assert (first.text("question"), first.text("context")) == ("q", "c")
    assert (second.line, second.fields) == (3, {"text": "a", "n": 1})
    with pytest.raises(ScionError, match=f"{file}, line 3: no field 'question'; it has text, n"):
        list(read_records(file, ("question",)))


def test_tables(tmp_path: Path) -> None:
    file = file_of(tmp_path, "a.tsv", 'text\ttext_pair\n"one\ttwo \n\nthree\t\n')
    found = list(read_records(file, ("text", "text_pair")))
    assert [record.fields for record in found] == [{"text": '"one', "text_pair": "two "},
                                                   {"text": "three", "text_pair": ""}]
    assert [record.line for record in found] == [2, 4]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    assert [record.text("text") for record in read_records("-")] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"one\n\xff\n")))
    with pytest.raises(ScionError, match="standard input, line 2: not UTF-8"):
        list(read_records("-"))


def test_nothing_is_read_ahead(tmp_path: Path) -> None:
    """A record comes before the lines behind it are looked at, so that a corpus need not fit into memory."""
    records = read_lines(file_of(tmp_path, "a.txt", b"one\n" * 10_000 + b"\xff\n"))
    assert next(records).text("text") == "one"
    with pytest.raises(ScionError, match="line 10001"):
        list(records)


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.txt", b"fine\nab\xe4c\n", "line 2: not UTF-8 .byte 8 of the file, 3 of the line, is 0xe4.; save it as UTF-8"),
    ("a.txt", b"\xef\xbb\xbfab\xe4\n", "line 1: not UTF-8 .byte 6 of the file, 3 of the line, is 0xe4."),
    ("a.txt", b"a\0b\n", "line 1: holds a NUL character"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: no JSON .Expecting value at character 10.; one mapping a line"),
    ("a.jsonl", b'{"text": "a"}\n["a"]\n', 'line 2: a list, where a mapping is wanted, as ."text": "..."'),
    ("a.jsonl", b"[" * 100_000, "line 1: no JSON .nested too deeply."),
    ("a.tsv", b"text\ttext\n", "two columns are called 'text'"),
    ("a.tsv", b"text\tpair\na\tb\nc\n", "line 3: 1 cells, and the header has 2 .text, pair."),
])
def test_what_cannot_be_taken(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    file = file_of(tmp_path, name, content)
    with pytest.raises(ScionError, match=words) as caught:
        list(read_records(file))
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_fields_that_cannot_be_taken(tmp_path: Path) -> None:
    file = file_of(tmp_path, "a.jsonl", '{"text": 3, "targt": "a", "target": null, "empty": " ", "list": [1]}')
    record = next(read_json_lines(file))
    for field, words in (("text", "text is a number, where a text is wanted"), ("target", "target is null"),
                         ("list", "list is a list"), ("tex", "no field 'tex' .did you mean 'text'"),
                         ("empty", "empty is empty; fill it in or leave the line out")):
        with pytest.raises(ScionError, match=f"{file}, line 1: {words}"):
            record.filled(field)
    assert record.text("empty") == " "


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file, words in ((tmp_path, "a folder, where a file is wanted"),
                        (tmp_path / "none.txt", "cannot be read .No such")):
        with pytest.raises(ScionError, match=words):
            list(read_lines(file))
    monkeypatch.setattr(files, "LONGEST_LINE", 2**20)
    with pytest.raises(ScionError, match="line 2: longer than 1 MiB"):
        list(read_table(file_of(tmp_path, "a.tsv", b"a\n" + b"x" * (2**20 + 1))))
