"""UrbanSound8K: 8732 clips of at most four seconds in ten classes of city sounds, in ten folds.

    >>> data = UrbanSound8K(root="UrbanSound8K", fold=1)
    >>> data.setup()
    >>> bank, target = data.train_set[0]        # bank [400, 128], normalised; target 0 .. 9

J. Salamon, C. Jacoby and J. P. Bello, A Dataset and Taxonomy for Urban Sound Research, 2014,
https://urbansounddataset.weebly.com/urbansound8k.html, archive https://doi.org/10.5281/zenodo.1203745. Layout from
documentation: ``metadata/UrbanSound8K.csv`` (slice_file_name, fsID, start, end, salience, fold, classID, class) and
``audio/fold1`` to ``audio/fold10``. Slices of one recording lie in one fold, so folds must never be mixed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from core.data.download import Archive
from core.data.folds import by_folds, check_folds, folder_with
from core.data.lists import Numbered, read_csv
from core.data.sample import Parts
from core.errors import ScionError, listed
from domains.audio.clips import AudioData, Clip

TABLE = "metadata/UrbanSound8K.csv"
COLUMNS = ("slice_file_name", "fold", "classID", "class")


class UrbanSound8K(AudioData):
    """UrbanSound8K by its ten folds: nine to train, one to test, none to validate.

    Args:
        fold: the fold of the test set, 1 to 10. The mini, which has no folds, makes other clips for each number.
        validation_fold: null, as the protocol has it; ``next``, the fold after ``fold`` (after 10 comes 1); a number.
    """

    title = "UrbanSound8K"
    length = 400  # four seconds
    count = 8732
    archive = Archive("https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz", "md5",
                      "9aa69802bbf37fb986f71ec1483a196e", "UrbanSound8K", "6 GB")

    def __init__(self, fold: int = 1, validation_fold: int | Literal["next"] | None = None, **common: Any) -> None:
        super().__init__(**common)
        check_folds(fold, validation_fold, 10)
        self.fold, self.validation_fold = fold, validation_fold
        self.draw, self.validates = fold, validation_fold is not None

    def layout(self, root: Path) -> Path:
        folder = folder_with(root, TABLE, ["UrbanSound8K"], self.title)
        if not os.path.isdir(folder / "audio"):
            raise ScionError(f"data.root: no folder audio in {folder}")
        return folder

    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        file = root / TABLE
        clips, numbers = [], Numbered(file)
        for line, row in enumerate(read_csv(file, COLUMNS), start=2):
            try:
                fold, number = int(row["fold"]), int(row["classID"])
                name, category = f"fold{fold}/{row['slice_file_name']}", row["class"]
            except (KeyError, ValueError):
                raise ScionError(f"{file}, line {line}: a file name, two whole numbers (fold, classID) and a class "
                                 f"wanted, found {listed(row.get(column) for column in COLUMNS)}") from None
            numbers.add(line, number, category)
            clips.append(Clip(root / "audio" / name, name, (category,), fold))
        return clips, numbers.order()

    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        return by_folds(clips, self.fold, self.validation_fold)

    def stand_ins(self) -> list[str]:
        return [f"class {number}" for number in range(10)]
