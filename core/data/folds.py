"""Folds of a benchmark, and the folder that its files are in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.data.sample import PARTS, Parts
from core.errors import ScionError, listed


def check_folds(fold: int, validation_fold: int | str | None, count: int) -> None:
    """Refuse folds that a benchmark with ``count`` of them does not have."""
    if not 1 <= fold <= count:
        raise ScionError(f"data.fold: {fold} is not one of the folds 1 to {count}")
    if validation_fold == fold:
        raise ScionError(f"data.validation_fold: {fold} is the test fold; take another, next, or null")
    if validation_fold is not None and validation_fold != "next" and validation_fold not in range(1, count + 1):
        raise ScionError(f"data.validation_fold: {validation_fold} is not next, null or one of the folds 1 to {count}")


def by_folds(samples: list[Any], fold: int, validation_fold: int | str | None) -> Parts:
    """``fold`` to test, ``validation_fold`` (``next``: the one after ``fold``; None: none) to validate, the rest to
    train."""
    folds = sorted({int(sample.group or 0) for sample in samples})
    if fold not in folds:
        raise ScionError(f"data.fold: {fold} is not among the folds of the table ({listed(folds)})")
    held = folds[(folds.index(fold) + 1) % len(folds)] if validation_fold == "next" else validation_fold
    if held is not None and (held not in folds or held == fold):
        raise ScionError(f"data.validation_fold: {held} is not among the other folds of the table ({listed(folds)})")
    found: Parts = {which: [] for which in PARTS if which != "validation" or held is not None}
    for row, sample in enumerate(samples):
        found["test" if sample.group == fold else "validation" if sample.group == held else "train"].append(row)
    return found


def folder_with(root: Path, marker: str, inside: Sequence[str], title: str) -> Path:
    """``root``, or a folder of one of the names ``inside`` it, that holds ``marker``."""
    if not os.path.isdir(root):
        raise ScionError(f"data.root: no folder {root}")
    for folder in (root, *(root / name for name in inside)):
        if os.path.exists(folder / marker):
            return folder
    raise ScionError(f"data.root: no {marker} in {root} (wanted: {title}'s layout, see the domain's README.md; "
                     "files of your own: folder.yaml)")
