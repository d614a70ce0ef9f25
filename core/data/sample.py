"""A labelled file, and the sets that it can belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARTS = ("train", "validation", "test")

Parts = dict[str, list[int]]
"""Rows of the samples by set; ``validation`` is left out where the protocol has none."""


@dataclass(frozen=True)
class Sample:
    """One file of a data set, or a part of it.

    Args:
        file: where it lies.
        name: the file within the data set, the same on every machine; what is drawn by chance is drawn by it. What
            follows an ``@`` is a place within the file.
        labels: its classes; one, but for multi-label data.
        group: the number of its fold, or the set that it belongs to; None where neither is given.
    """

    file: Path
    name: str
    labels: tuple[str, ...]
    group: int | str | None = None
