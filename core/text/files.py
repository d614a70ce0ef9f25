"""Texts in files as people have them: a text a line, JSON lines, tables with a header, or standard input.

Every reader gives one record after the other, so that a corpus need not fit into memory, and names the file and the
line of what it cannot take.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from core.errors import ScionError, listed, nearest
from core.files import open_regular

STANDARD_INPUT = "-"
LONGEST_LINE = 64 * 2**20
"""Bytes beyond which a line is none: a file without line breaks would be read into memory whole."""


@dataclass(frozen=True)
class Record:
    """The fields of one line."""

    file: str
    line: int
    """Counted from 1."""
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """The file and the line, for messages."""
        return f"{self.file}, line {self.line}"

    def text(self, field: str) -> str:
        """A field that must be there and be text.

        Raises:
            ScionError: it is missing, or a number, a list or the like.
        """
        if field not in self.fields:
            has = listed(self.fields) or "nothing"
            raise ScionError(f"{self.place}: no field {field!r}{nearest(field, self.fields)}; it has {has}")
        value = self.fields[field]
        if not isinstance(value, str):
            raise ScionError(f"{self.place}: {field} is {_kind(value)}, where a text is wanted")
        return value

    def filled(self, field: str) -> str:
        """A text that must have more than blanks, as a target must.

        Raises:
            ScionError: it is missing, no text, or empty.
        """
        value = self.text(field)
        if not value.strip():
            raise ScionError(f"{self.place}: {field} is empty; fill it in or leave the line out")
        return value


def has_columns(file: str | Path) -> bool:
    """Whether a line of a file has fields by name, as its ending says; else it is one text."""
    return _ending(file) in (".jsonl", ".ndjson", ".tsv")


def _ending(file: str | Path) -> str:
    return "" if str(file) == STANDARD_INPUT else Path(file).suffix.lower()


def read_records(file: str | Path, fields: Sequence[str] = (), plain: str = "text") -> Iterator[Record]:
    """The records of a file, by its ending: ``.jsonl`` and ``.ndjson`` as JSON lines, ``.tsv`` as a table with a
    header, anything else, and ``-`` for standard input, as a text a line.

    Args:
        file: its name.
        fields: that each record must have, as text.
        plain: the field in which a line is that is one text.

    Raises:
        ScionError: names the file, and the line where there is one.
    """
    if not has_columns(file):
        records = read_lines(file, plain)
    else:
        records = read_table(file) if _ending(file) == ".tsv" else read_json_lines(file)
    for record in records:
        for field in fields:
            record.text(field)
        yield record


def read_lines(file: str | Path, field: str = "text") -> Iterator[Record]:
    """A text a line, in the field ``field``; a line without anything is a text of length 0.

    Raises:
        ScionError: see `lines`.
    """
    for number, line in lines(file):
        yield Record(_called(file), number, {field: line})


def read_json_lines(file: str | Path) -> Iterator[Record]:
    """JSON lines; lines of blanks are left out.

    Raises:
        ScionError: a line is no JSON, or no mapping; see `lines`.
    """
    for number, line in lines(file):
        if not line.strip():
            continue
        record = Record(_called(file), number, {})
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            is_syntax = isinstance(error, json.JSONDecodeError)
            reason = f"{error.msg} at character {error.colno}" if is_syntax else "nested too deeply"
            raise ScionError(f"{record.place}: no JSON ({reason}); one mapping a line is wanted") from None
        if not isinstance(value, dict):
            raise ScionError(f"{record.place}: {_kind(value)}, where a mapping is wanted, as {{\"text\": \"...\"}}")
        record.fields.update(value)
        yield record


def read_table(file: str | Path) -> Iterator[Record]:
    """A table with tabs between its columns and a header. Quotation marks are text like any other, as tools that write
    such tables mean it.

    Raises:
        ScionError: a row has more or fewer cells than the header, or the header names a column twice; see `lines`.
    """
    names: list[str] = []
    for number, line in lines(file):
        cells = line.split("\t")
        if not names:
            names = [cell.strip() for cell in cells]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ScionError(f"{_called(file)}: two columns are called {twice[0]!r}; which one is meant?")
            continue
        if not line.strip():
            continue
        if len(cells) != len(names):
            raise ScionError(f"{_called(file)}, line {number}: {len(cells)} cells, and the header has {len(names)} "
                             f"({listed(names)})")
        yield Record(_called(file), number, dict(zip(names, cells, strict=True)))


def lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8 and their numbers, from 1, without their ends and without a byte order mark.

    Raises:
        ScionError: the file is missing or unreadable, or a line is no text in UTF-8; the byte is named.
    """
    with _opened(file) as stream:
        start = 0
        for number, data in enumerate(_whole_lines(stream, file), start=1):
            line = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
            yield number, _decoded(line, _called(file), number, start + len(data) - len(line))
            start += len(data)


def _whole_lines(stream: BinaryIO, file: str | Path) -> Iterator[bytes]:
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ScionError(f"{_called(file)}, line {number}: longer than {LONGEST_LINE >> 20} MiB, which no text "
                                 "is")
            yield line
    except OSError as error:
        raise ScionError(f"{_called(file)}: cannot be read ({error.strerror or error})") from None


def _decoded(line: bytes, file: str, number: int, start: int) -> str:
    """A line as text; ``start`` is the number of its first byte in the file, from 0."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ScionError(f"{file}, line {number}: not UTF-8 (byte {start + error.start + 1} of the file, "
                         f"{error.start + 1} of the line, is 0x{byte:02x}); save it as UTF-8") from None
    if "\0" in text:
        raise ScionError(f"{file}, line {number}: holds a NUL character, which no text does")
    return text.removesuffix("\n").removesuffix("\r")


@contextmanager
def _opened(file: str | Path) -> Iterator[BinaryIO]:
    if str(file) == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    try:
        stream = open_regular(file)
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror or error})") from None
    with stream:
        yield stream


def _called(file: str | Path) -> str:
    return "standard input" if str(file) == STANDARD_INPUT else str(file)


def _kind(value: Any) -> str:
    """What a JSON value is, in a word."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), type(value).__name__)
