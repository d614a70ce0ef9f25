"""What ``lightning predict`` writes into a file: CSV, JSON lines, or an array of NumPy."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ScionError, listed
from core.files import write_atomically

KINDS = (".csv", ".jsonl", ".npy")


def check_kind(out: str) -> Path:
    """The file that was asked for, if its ending says what to write.

    Raises:
        ScionError: another ending, or no folder that it could lie in.
    """
    file = Path(out)
    if file.suffix not in KINDS:
        raise ScionError(f"--out {out}: a file that ends in {listed(KINDS)}")
    if not file.parent.is_dir():
        raise ScionError(f"--out {out}: there is no folder {file.parent}")
    return file


def write(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Write one line, or row, for each entry; an entry that could not be read has its reason, or a row of NaN.

    Args:
        file: its ending says how.
        entries: ``file`` of each, and ``feature``, ``probabilities`` and the like, or ``error``.
    """
    if file.suffix == ".npy":
        _write_array(file, entries)
        return
    text = _as_csv(entries) if file.suffix == ".csv" else "".join(f"{json.dumps(entry)}\n" for entry in entries)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8", newline=""))


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    """The vector of an entry by names: its probabilities by class, or its feature by number."""
    if "probabilities" in entry:
        return entry["probabilities"]
    return {str(number): value for number, value in enumerate(entry.get("feature", ()))}


def _write_array(file: Path, entries: Sequence[dict[str, Any]]) -> None:
    import numpy as np

    width = max((len(_numbers(entry)) for entry in entries), default=0)
    array = np.full((len(entries), width), np.nan, np.float32)
    for row, entry in enumerate(entries):
        numbers = list(_numbers(entry).values())
        array[row, :len(numbers)] = numbers

    def save(path: Path) -> None:
        with path.open("wb") as stream:  # given a name, NumPy would add an ending of its own
            np.save(stream, array, allow_pickle=False)

    write_atomically(file, save)


def _as_csv(entries: Sequence[dict[str, Any]]) -> str:
    names: dict[str, None] = {}
    numbers: dict[str, None] = {}
    for entry in entries:
        plain = [name for name, value in entry.items() if not isinstance(value, (dict, list))]
        names |= dict.fromkeys(plain)
        numbers |= dict.fromkeys(_numbers(entry))
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow([*names, *numbers])
    for entry in entries:
        vector = _numbers(entry)
        writer.writerow([*(entry.get(name, "") for name in names), *(vector.get(name, "") for name in numbers)])
    return stream.getvalue()
