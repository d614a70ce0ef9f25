"""ESC-50, environmental sound classification in five folds, with its subset ESC-10; or a mini that is made on the spot.

    >>> data = ESC50(root="ESC-50-master", fold=1)
    >>> data.setup()
    >>> bank, target = data.train_set[0]        # bank [500, 128], normalised; target 0 .. 49

K. J. Piczak, ESC: Dataset for Environmental Sound Classification, 2015, https://github.com/karolpiczak/ESC-50. Layout
from documentation: ``meta/esc50.csv`` (filename, fold, target, category, esc10, src_file, take) and ``audio/``. All
cuts of one recording lie in one fold, so folds must never be mixed.
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

COLUMNS = ("filename", "fold", "target", "category")


class ESC50(AudioData):
    """ESC-50 or ESC-10 by folds: three to train, one to validate, one to test.

    Args:
        fold: the fold of the test set, 1 to 5. The mini, which has no folds, makes other clips for each number.
        validation_fold: ``next`` is the fold after ``fold`` (after 5 comes 1); a number; or null: four folds to train
            and none to validate.
        esc10: take only the clips that the table marks as ESC-10.
    """

    title = "ESC-50"
    mini_name = "mini ESC (10 synthetic sounds)"
    length = 500  # five seconds
    count = 2000
    # The sum is the one that the soundata project lists; the host makes the archive anew and promises no fixed bytes.
    archive = Archive("https://github.com/karolpiczak/ESC-50/archive/master.zip", "md5",
                      "7771e4b9d86d0945acce719c7a59305a", "ESC-50-master", "600 MB", fixed=False)

    def __init__(self, fold: int = 1, validation_fold: int | Literal["next"] | None = "next", esc10: bool = False,
                 **common: Any) -> None:
        super().__init__(**common)
        check_folds(fold, validation_fold, 5)
        self.fold, self.validation_fold, self.esc10 = fold, validation_fold, esc10
        self.draw, self.validates = fold, validation_fold is not None
        self._subset: set[str] = set()

    def layout(self, root: Path) -> Path:
        folder = folder_with(root, "meta/esc50.csv", ["ESC-50-master"], self.title)
        if not os.path.isdir(folder / "audio"):
            raise ScionError(f"data.root: no folder audio in {folder}")
        return folder

    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        clips, classes, self._subset = read_table(root)
        if not self.esc10:
            return clips, classes
        clips = [clip for clip in clips if clip.name in self._subset]
        if not clips:
            raise ScionError(f"data.esc10: no row of {root / 'meta' / 'esc50.csv'} is marked as ESC-10")
        found = {clip.labels[0] for clip in clips}
        return clips, [name for name in classes if name in found]

    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        return by_folds(clips, self.fold, self.validation_fold)

    def named(self, clips: list[Clip], classes: list[str]) -> str:
        if len(classes) == 10 and all(clip.name in self._subset for clip in clips):
            return "ESC-10"
        return self.title if len(classes) == 50 else f"{len(classes)} classes in ESC-50's layout"

    def stand_ins(self) -> list[str]:
        return [f"class {number}" for number in range(10 if self.esc10 else 50)]


def read_table(root: Path) -> tuple[list[Clip], list[str], set[str]]:
    """The rows of ``meta/esc50.csv``, checked; the classes in the order of their targets, which have holes in a subset;
    and the names of the files that belong to ESC-10."""
    file = root / "meta" / "esc50.csv"
    clips, numbers, subset = [], Numbered(file), set()
    for line, row in enumerate(read_csv(file, COLUMNS), start=2):
        try:
            name, fold, target, category = row["filename"], int(row["fold"]), int(row["target"]), row["category"]
        except (KeyError, ValueError):
            raise ScionError(f"{file}, line {line}: a file name, two whole numbers (fold, target) and a category "
                             f"wanted, found {listed(row.get(column) for column in COLUMNS)}") from None
        numbers.add(line, target, category)
        clips.append(Clip(root / "audio" / name, name, (category,), fold))
        if row.get("esc10", "").lower() == "true":
            subset.add(name)
    return clips, numbers.order(), subset
