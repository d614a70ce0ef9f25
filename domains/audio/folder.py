r"""Anybody's sounds: a folder with a subfolder for each class, or a table of files and labels.

    >>> data = AudioFolder(root="my_sounds")                                        # my_sounds/<class>/*.wav
    >>> data = AudioFolder(root="my_sounds", table="labels.csv", separator="|")     # several labels a file
    >>> data = AudioFolder(root="recordings", label_pattern=r"^(\d)_")              # labels in the files' names

Files may have any rate, length and number of channels; only as much of each is read as is used. What cannot be read is
left out and named.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from core.data import seed_of
from core.errors import ScionError, listed, nearest
from domains.audio.clips import PARTS, AudioData, Clip, Parts, at_least_two, ordered, read_csv, sound_files

SETS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
        "dev": "validation", "test": "test", "testing": "test"}
"""What people call the three sets."""
COLUMNS = {"file": ("file", "file_name", "filename", "path"), "label": ("label", "labels", "class", "category", "tags"),
           "split": ("split", "subset")}
"""What people call the columns."""


class AudioFolder(AudioData):
    """Sounds in a folder, labelled by their subfolders, by a table, or by their names.

    The sets are those of the table's split column, of subfolders ``train``, ``validation`` and ``test`` (around those
    of the classes), or of ``test_pattern`` and ``validation_pattern``; else a part of each class is set apart, always
    the same files whatever the run's seed.

    Args:
        root: the folder, or a table in it; files are named relative to the folder. Null is the mini.
        table: CSV file (commas, semicolons or tabs) with a header, relative to ``root``. Null takes ``metadata.csv``
            where there is one, else subfolders.
        file_column: the table's column of files; null looks for file, file_name, filename, path.
        label_column: its column of labels; null looks for label, labels, class, category, tags.
        split_column: its column of sets (train, validation, test); null looks for split, subset.
        start_column: its column of seconds at which clips begin in longer files; null: all begin at 0.
        separator: what stands between several labels of one file ("|"): the task is then one yes or no for each label,
            measured by mean average precision. Null: each file has one label.
        label_pattern: regular expression that finds the label in a file's path below ``root``: its group ``label``, or
            its first. Instead of subfolders and table.
        test_pattern: files whose path below ``root`` it finds are the test set.
        validation_pattern: likewise for validation.
        classes: names of the classes in their order; other files are left out. Null takes all, sorted.
        validation_share: part of each class to validate where nothing else says so, in [0, 1); 0 for no validation.
        test_share: part of each class to test where nothing else says so, in (0, 1).
        split_seed: of the draw of these parts; the run's seed does not touch them.
        skip_bad: leave out unreadable files and name them; false stops at the first.
        frames: frames of a clip (10 ms each); null is the length that nine tenths of the files fit into, at most 500.
    """

    title = "AudioFolder"
    length = None
    obtain = "give the folder of your sounds as data.root"

    def __init__(self, root: str | None = None, table: str | None = None, file_column: str | None = None,
                 label_column: str | None = None, split_column: str | None = None, start_column: str | None = None,
                 separator: str | None = None, label_pattern: str | None = None, test_pattern: str | None = None,
                 validation_pattern: str | None = None, classes: list[str] | None = None,
                 validation_share: float = 0.1, test_share: float = 0.2, split_seed: int = 0, skip_bad: bool = True,
                 **common: Any) -> None:
        super().__init__(root, skip_bad=skip_bad, **common)
        if not 0 <= validation_share < 1 or not 0 < test_share < 1 or validation_share + test_share >= 1:
            raise ScionError(f"data.validation_share {validation_share} and data.test_share {test_share} must lie in "
                             "[0, 1) and (0, 1) and leave something to train")
        if table and label_pattern:
            raise ScionError("data.label_pattern: the labels are in data.table already; give one of the two")
        if separator == "":
            raise ScionError("data.separator: empty; give what stands between two labels, or null for one label a file")
        if classes is not None:
            twice = [name for name, times in Counter(classes).items() if times > 1]
            if twice or len(classes) < 2:
                raise ScionError(f"data.classes: {f'{twice[0]!r} stands there twice' if twice else classes}; at least "
                                 "two different names wanted")
        self.table_file = table
        self.columns = {"file": file_column, "label": label_column, "split": split_column, "start": start_column}
        self.separator, self.multilabel = separator, separator is not None
        self.label_pattern = _pattern("label_pattern", label_pattern)
        if self.label_pattern and not self.label_pattern.groups:
            raise ScionError(f"data.label_pattern: {label_pattern!r} has no group; put brackets around the label")
        self.set_patterns = {"test": _pattern("test_pattern", test_pattern),
                             "validation": _pattern("validation_pattern", validation_pattern)}
        self.wanted = classes
        self.validation_share, self.test_share, self.split_seed = validation_share, test_share, split_seed

    @property
    def _absent(self) -> str:
        return "there is no folder of sounds"

    # ------------------------------------------------------------------------------ which files, which labels

    def layout(self, root: Path) -> Path:
        if root.is_file() and root.suffix.lower() in (".csv", ".tsv"):
            self.table_file = self.table_file or root.name
            return root.parent
        if not root.is_dir():
            raise ScionError(f"data.root: no folder {root}")
        return root

    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        if self.table_file is None and self.label_pattern is None and (root / "metadata.csv").is_file():
            self.table_file = "metadata.csv"
        clips = self._by_pattern(root, self.label_pattern) if self.label_pattern else \
            self._by_table(root, root / self.table_file) if self.table_file else self._by_subfolders(root)
        found = ordered(label for clip in clips for label in clip.labels)
        if self.wanted is None:
            return clips, at_least_two(found, self._labels_from(root))
        for name in self.wanted:
            if name not in found:
                raise ScionError(f"data.classes: no file is labelled {name!r}{nearest(name, found)}; the labels are "
                                 f"{listed(found)}")
        if others := [name for name in found if name not in self.wanted]:
            self.notes.append(f"data.classes: {listed(others)} left out")
        kept = []
        for clip in clips:
            labels = tuple(label for label in clip.labels if label in self.wanted)
            if labels or (self.separator and not clip.labels):
                kept.append(Clip(clip.file, clip.name, labels, clip.group, clip.start))
        return kept, list(self.wanted)

    def _labels_from(self, root: Path) -> str:
        if self.label_pattern:
            return f"data.label_pattern on the files in {root}"
        return f"data.table: {root / self.table_file}" if self.table_file else f"data.root: {root}"

    def _labels(self, text: str) -> tuple[str, ...]:
        if self.separator is None:
            return (text,)
        return tuple(dict.fromkeys(part.strip() for part in text.split(self.separator) if part.strip()))

    def _by_subfolders(self, root: Path) -> list[Clip]:
        folders = _subfolders(root)
        hint = self._hint(root)
        if not folders:
            raise ScionError(f"data.root: {root} has no subfolders; wanted: one for each class, or data.table, or "
                             f"data.label_pattern{hint}")
        names = {folder.name.lower() for folder in folders}
        sets = {folder: SETS[folder.name.lower()] for folder in folders} if names <= set(SETS) else {root: None}
        if len(sets) > 1 and len(set(sets.values())) < len(sets):
            raise ScionError(f"data.root: {root} has two folders for one set ({listed(sorted(names))})")
        if None not in sets.values():
            for which in ("train", "test"):
                if which not in sets.values():
                    raise ScionError(f"data.root: of the sets {root} has {listed(sorted(names))} and none to {which}")
        clips = []
        for place, which in sets.items():
            for folder in _subfolders(place):
                files = sound_files(folder)
                if not files:
                    raise ScionError(f"data.root: no sound file in the folder {folder}{hint}")
                clips += [self._clip(root, file, self._labels(folder.name), which) for file in files]
            self.skipped += [f"{file}: lies in no class folder" for file in sound_files(place)
                             if file.parent == place]
        return clips

    def _hint(self, root: Path) -> str:
        tables = sorted(file.name for file in root.iterdir() if file.suffix.lower() in (".csv", ".tsv"))
        return f" (there is {listed(tables, 3)}: is it data.table?)" if tables else ""

    def _by_pattern(self, root: Path, pattern: re.Pattern[str]) -> list[Clip]:
        clips = []
        files = sound_files(root)
        if not files:
            raise ScionError(f"data.root: no sound file in {root}")
        for file in files:
            match = pattern.search(file.relative_to(root).as_posix())
            label = match and (match.groupdict().get("label") or match.group(1))
            if label:
                clips.append(self._clip(root, file, self._labels(label)))
            else:
                self.skipped.append(f"{file}: data.label_pattern finds no label in its name")
        if not clips:
            raise ScionError(f"data.label_pattern: {pattern.pattern!r} finds a label in none of {len(files)} files, "
                             f"the first is {files[0].relative_to(root).as_posix()}")
        return clips

    def _clip(self, root: Path, file: Path, labels: tuple[str, ...], group: str | None = None) -> Clip:
        return Clip(file, file.relative_to(root).as_posix(), labels, group)

    def _by_table(self, root: Path, table: Path) -> list[Clip]:
        if not table.is_file():
            raise ScionError(f"data.table: no file {table}")
        rows = read_csv(table)
        names = {key: self._column(key, list(rows[0]), table) for key in self.columns}
        clips: list[Clip] = []
        lines: dict[str, int] = {}
        for line, row in enumerate(rows, start=2):
            name, text = row.get(str(names["file"]), ""), row.get(str(names["label"]), "")
            labels = self._labels(text)
            if not name or (not text and self.separator is None):
                raise ScionError(f"{table}, line {line}: {'no file' if not name else f'no label for {name}'}")
            start = self._start(row.get(str(names["start"]), "0"), table, line)
            group = None
            if names["split"]:
                value = row.get(names["split"], "")
                group = SETS.get(value.lower())
                if group is None:
                    raise ScionError(f"{table}, line {line}: {value!r} is no set; train, validation or test wanted")
            key = f"{name}@{start:g}" if names["start"] else name
            if lines.setdefault(key, line) != line:
                raise ScionError(f"{table}, line {line}: {name} stands in line {lines[key]} already; one line a file "
                                 "(several labels of a file go into one field, see data.separator)")
            file = root / name
            if not file.is_file() and (table.parent / name).is_file():
                file = table.parent / name
            clips.append(Clip(file, key, labels, group, start))
        return clips

    def _column(self, key: str, there: list[str], table: Path) -> str | None:
        given, usual = self.columns[key], COLUMNS.get(key, ())
        if given is not None:
            if given not in there:
                raise ScionError(f"data.{key}_column: {table} has no column {given!r}{nearest(given, there)}; it has "
                                 f"{listed(there)}")
            return given
        found = next((name for usual_name in usual for name in there if name.lower() == usual_name), None)
        if found is None and key in ("file", "label"):
            raise ScionError(f"data.{key}_column: {table} has none of the columns {listed(usual)}; it has "
                             f"{listed(there)}: say which it is")
        return found

    def _start(self, text: str, table: Path, line: int) -> float:
        try:
            start = float(text or 0)
        except ValueError:
            start = -1.0
        if not 0 <= start < float("inf"):
            raise ScionError(f"{table}, line {line}: {text!r} is no start in seconds")
        return start

    # ------------------------------------------------------------------------------ which set

    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        if any(clip.group for clip in clips):
            given: Parts = {}
            for row, clip in enumerate(clips):
                given.setdefault(str(clip.group), []).append(row)
            for which in ("train", "test"):
                if which not in given:
                    raise ScionError(f"{self._labels_from(self.root or Path())}: no file is in the set {which}")
            return given
        found: Parts = {which: [] for which in PARTS}
        patterns = {which: pattern for which, pattern in self.set_patterns.items() if pattern}
        for row, clip in enumerate(clips):
            found[next((which for which in patterns if patterns[which].search(clip.name)), "train")].append(row)
        for which, pattern in patterns.items():
            if not found[which]:
                raise ScionError(f"data.{which}_pattern: {pattern.pattern!r} finds none of {len(clips)} files, the "
                                 f"first is {clips[0].name}")
        shares = {"test": self.test_share, "validation": self.validation_share}
        shares = {which: 0.0 if which in patterns else share for which, share in shares.items()}
        taken = stratified([row for row in found["train"] if row not in bad], clips, shares, self.split_seed)
        if shares["test"] and not taken["test"]:
            raise ScionError("data.test_share: no class has two readable files, and one file is not divided between "
                             "the sets; name them in a column (data.split_column) or by data.test_pattern")
        found = {"train": taken["train"], **{which: found[which] + taken[which] for which in PARTS[1:]}}
        # files too few for a share give no validation rather than an error: it is a wish, not a protocol
        return {which: sorted(rows) for which, rows in found.items() if rows or which != "validation"}

    def named(self, clips: list[Clip], classes: list[str]) -> str:
        root = (self.root or Path(self.folder)).expanduser().resolve()
        name = root.parent.name if root.is_file() else root.name
        return f"{name} ({len(clips)} clips, {len(classes)} {'labels' if self.multilabel else 'classes'})"


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ScionError(f"data.{name}: {text!r} is no regular expression ({error})") from None


def _subfolders(folder: Path) -> list[Path]:
    """Without hidden ones, and what a Mac's zip leaves behind."""
    return sorted(child for child in folder.iterdir()
                  if child.is_dir() and child.name[0] != "." and child.name != "__MACOSX")


def stratified(rows: list[int], clips: list[Clip], shares: dict[str, float], seed: int) -> Parts:
    """``shares`` of the files of each class set apart for ``test`` and ``validation``, the rest to ``train``.

    Of a class of at least two files one goes to test at least, and of at least four one to validation. A file's place
    in the draw is a function of (seed, its name), so that a new file moves few others; clips of one file stay together.
    With several labels a file is dealt out with the rarest of them.
    """
    total = Counter(label for row in rows for label in clips[row].labels)
    files: dict[Path, list[int]] = {}
    for row in sorted(rows, key=lambda row: seed_of(seed, "split", clips[row].name.partition("@")[0])):
        files.setdefault(clips[row].file, []).append(row)
    classes: dict[str, list[list[int]]] = {}
    for members in files.values():
        labels = {label for row in members for label in clips[row].labels}
        classes.setdefault(min(labels, key=lambda name: (total[name], name), default=""), []).append(members)
    found: Parts = {which: [] for which in PARTS}
    for members in classes.values():
        size = len(members)
        for which, least in (("test", 2), ("validation", 4)):
            count = max(1, round(shares[which] * size)) if shares[which] and size >= least else 0
            found[which] += [row for file in members[:count] for row in file]
            members = members[count:]
        found["train"] += [row for file in members for row in file]
    return found
