"""Lists and tables of files as strangers leave them: what can be read is read, all else is one line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from core.data.sample import Parts
from core.errors import ScionError, listed, nearest
from core.files import read_text

END = "the end of the table"


def read_csv(file: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a table with a header, values without blanks around them; commas, semicolons or tabs between them.

    Raises:
        ScionError: the file cannot be read, lacks one of ``columns``, has no rows, or ends within quotation marks.
    """
    rows = [row for row in _rows(file) if row]
    names = [name.strip() for name in rows[0]] if rows else []
    for name, times in Counter(names).items():
        if name and times > 1:
            raise ScionError(f"{file}: two columns are called {name!r}; which one is meant?")
    lacking = [column for column in columns if column not in names]
    if lacking:
        wrong = f"no column {listed(lacking)}" if names else "empty"
        raise ScionError(f"{file}: {wrong}{nearest(lacking[0], names)}; wanted are the columns {listed(columns)}")
    if not names:
        raise ScionError(f"{file}: empty; a table with a header wanted")
    if len(rows) == 1:
        raise ScionError(f"{file}: no rows below the header")
    found = []
    for row in rows[1:]:
        values = [value.strip() for value in row]
        found.append(dict(zip(names, values, strict=False)))  # spreadsheets leave out, or add, empty cells at the end
    return found


def _rows(file: Path) -> list[list[str]]:
    """The rows of a table, the header first; an empty line is a row without cells."""
    text = read_text(file)
    header = next(iter(io.StringIO(text, newline="")), "")
    separator = max(",;\t", key=header.count)
    # read after the table: where a mark of quotation is not closed it is not found as a row of its own
    lines = csv.reader(chain(io.StringIO(text, newline=""), [END]), delimiter=separator)
    rows: list[list[str]] = []
    begins, last = 0, 0
    try:
        for row in lines:  # a row goes over several lines where a quoted value does
            begins, last = last + 1, lines.line_num
            rows.append(row)
    except csv.Error as error:
        raise ScionError(f"{file}, line {lines.line_num}: cannot be read as a table ({error})") from None
    if rows.pop() != [END]:
        raise ScionError(f"{file}, line {begins}: a mark of quotation is opened and not closed")
    return rows


class Numbered:
    """Classes that a table gives as a number and a name, which must agree on every line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.names: dict[int, str] = {}

    def add(self, line: int, number: int, name: str) -> None:
        if self.names.setdefault(number, name) != name:
            raise ScionError(f"{self.file}, line {line}: target {number} is {name!r} here and {self.names[number]!r} "
                             "above")

    def order(self) -> list[str]:
        """The names in the order of their numbers, at least two."""
        names = [self.names[number] for number in sorted(self.names)]
        if len(set(names)) < len(names):
            raise ScionError(f"{self.file}: {len(names)} targets but {len(set(names))} category names")
        return at_least_two(names, self.file)


def at_least_two(classes: list[str], where: object) -> list[str]:
    """``classes``, refused where there is nothing to tell apart."""
    if len(classes) < 2:
        found = "one class only" if classes else "no classes"
        raise ScionError(f"{where}: {found} ({listed(classes)}), at least two wanted")
    return classes


def ordered(names: Iterable[str]) -> list[str]:
    """Names without repetition, in the order of their numbers where all of them are whole numbers, else of letters."""
    found = sorted(set(names))
    # Python makes no number of thousands of digits
    are_numbers = all(name.isdecimal() and len(name) < 100 for name in found)
    return sorted(found, key=int) if are_numbers else found


def as_text(name: str) -> str:
    """A name of a folder as text: bytes of it that are none are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def contents_of(root: Path, classes: Sequence[str], samples: Sequence[Any], parts: Parts) -> str:
    """A short hash of which files are in which set with which labels, and of their sizes.

    Files are named as the data set names them, so that it is the same wherever the folder lies.
    """
    sets = {row: which for which, rows in parts.items() for row in rows}
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for row, sample in enumerate(samples):
        name = sample.name
        if os.path.isabs(name):
            name = os.path.relpath(sample.file, root)
        try:
            size = os.stat(sample.file).st_size
        except OSError:
            size = None
        line = json.dumps([name, size, sample.labels, sample.group, sets.get(row)])
        digest.update(line.encode())
    return digest.hexdigest()[:16]


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # unlike the path, it knows even where nothing may be looked at
    except OSError:
        return False
