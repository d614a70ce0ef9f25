"""Anybody's files: a folder with a subfolder for each class, or a table of files and labels, of sounds as of pictures.

Files may lie as they lie. What cannot be read is left out and named.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from core.data.labelled import LabelledData
from core.data.lists import as_text, at_least_two, ordered, read_csv
from core.data.sample import PARTS, Parts, Sample
from core.errors import ScionError, listed, nearest, one_line
from core.random_state import seed_of

SETS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
        "dev": "validation", "test": "test", "testing": "test"}
"""What people call the three sets."""
COLUMNS = {"file": ("file", "file_name", "filename", "path"), "label": ("label", "labels", "class", "category", "tags"),
           "split": ("split", "subset")}
"""What people call the columns."""


class FolderData(LabelledData):
    """Files in a folder, labelled by their subfolders, by a table, or by their names.

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
    """

    kind: ClassVar[type[Sample]] = Sample
    """What a row becomes."""
    benchmarks: ClassVar[dict[str, str]] = {}
    """Configurations of the domain's benchmarks, by a file or folder that each has in its published layout."""

    def __init__(self, root: str | None = None, table: str | None = None, file_column: str | None = None,
                 label_column: str | None = None, split_column: str | None = None,
                 separator: str | None = None, label_pattern: str | None = None, test_pattern: str | None = None,
                 validation_pattern: str | None = None, classes: list[str] | None = None,
                 validation_share: float = 0.1, test_share: float = 0.2, split_seed: int = 0, skip_bad: bool = True,
                 **common: Any) -> None:
        super().__init__(root, skip_bad=skip_bad, **common)
        _check_shares(validation_share, test_share)
        if table and label_pattern:
            raise ScionError("data.label_pattern: the labels are in data.table already; give one of the two")
        if separator == "":
            raise ScionError("data.separator: empty; give what stands between two labels, or null for one label a file")
        _check_classes(classes)
        self.table_file = table
        self.columns = {"file": file_column, "label": label_column, "split": split_column}
        self.separator = separator
        self.multilabel = separator is not None
        self.label_pattern = _pattern("label_pattern", label_pattern)
        if self.label_pattern and not self.label_pattern.groups:
            raise ScionError(f"data.label_pattern: {label_pattern!r} has no group; put brackets around the label")
        self.set_patterns = {"test": _pattern("test_pattern", test_pattern),
                             "validation": _pattern("validation_pattern", validation_pattern)}
        self.wanted = classes
        self.validation_share = validation_share
        self.test_share = test_share
        self.split_seed = split_seed

    @property
    def absent(self) -> str:
        return f"there is no folder of {self.files_are}s"

    # ------------------------------------------------------------------------------ which files, which labels

    def layout(self, root: Path) -> Path:
        if os.path.isfile(root) and root.suffix.lower() in (".csv", ".tsv"):
            self.table_file = self.table_file or root.name
            return root.parent
        if not os.path.isdir(root):
            raise ScionError(f"data.root: no folder {root}")
        return root

    def table(self, root: Path) -> tuple[list[Any], list[str]]:
        if self.table_file is None and self.label_pattern is None and os.path.isfile(root / "metadata.csv"):
            self.table_file = "metadata.csv"
        samples = self._samples(root)
        found = ordered(label for sample in samples for label in sample.labels)
        if self.wanted is None:
            return samples, at_least_two(found, self._labels_from(root))
        for name in self.wanted:
            if name not in found:
                raise ScionError(f"data.classes: no file is labelled {name!r}{nearest(name, found)}; the labels are "
                                 f"{listed(found)}")
        others = [name for name in found if name not in self.wanted]
        if others:
            self.notes.append(f"data.classes: {listed(others)} left out")
        return self._with_labels(samples, self.wanted), list(self.wanted)

    def _samples(self, root: Path) -> list[Any]:
        """The labelled files, from whichever of the three sources of labels is in use."""
        if self.label_pattern:
            return self._by_pattern(root, self.label_pattern)
        if self.table_file:
            return self._by_table(root, root / self.table_file)
        return self._by_subfolders(root)

    def _with_labels(self, samples: list[Any], classes: list[str]) -> list[Any]:
        """The samples that have one of these labels, without their other labels."""
        kept = []
        for sample in samples:
            labels = tuple(label for label in sample.labels if label in classes)
            # where a file can have several labels it can have none: such a file says no to each class
            if labels or (self.separator and not sample.labels):
                kept.append(replace(sample, labels=labels))
        return kept

    def _labels_from(self, root: Path) -> str:
        """What the labels come from, for messages."""
        if self.label_pattern:
            return f"data.label_pattern on the files in {root}"
        if self.table_file:
            return f"data.table: {root / self.table_file}"
        return f"data.root: {root}"

    def _labels(self, text: str) -> tuple[str, ...]:
        """The labels in a text, each once."""
        if self.separator is None:
            return (text,)
        parts = [part.strip() for part in text.split(self.separator)]
        return tuple(dict.fromkeys(part for part in parts if part))

    def _by_subfolders(self, root: Path) -> list[Any]:
        folders = self.subfolders(root)
        hint = self._hint(root)
        if not folders:
            raise ScionError(f"data.root: {root} has no subfolders; wanted: one for each class, or data.table, or "
                             f"data.label_pattern{hint}{self._benchmark(root)}")
        samples = []
        for place, which in _set_folders(root, folders).items():
            if place == root:
                around, least = folders, 2
            else:
                # a class may be absent from one set, and still be in another
                around, least = self.subfolders(place), 1
            inside = self.with_files(around, least, f"{hint}{self._benchmark(root)}")
            for folder, files in inside.items():
                labels = self._labels(as_text(folder.name))
                samples += [self._sample(root, file, labels, which) for file in files]
            stray = [file for file in self.files(place) if file.parent == place and file not in folders]
            self.skipped += [one_line(f"{file}: lies in no class folder") for file in stray]
        return samples

    def _hint(self, root: Path) -> str:
        """A hint where a table lies in the folder."""
        tables = sorted(file.name for file in root.iterdir() if file.suffix.lower() in (".csv", ".tsv"))
        return f" (there is {listed(tables, 3)}: is it data.table?)" if tables else ""

    def _benchmark(self, root: Path) -> str:
        """A hint where the folder is a benchmark in its published layout."""
        inside: list[Path] = []
        # a folder that cannot be listed is refused elsewhere: here it only has no hint
        with contextlib.suppress(OSError):
            inside = sorted(root.iterdir())
        for place in (root, *inside):
            for marker, config in self.benchmarks.items():
                found = place / marker
                if os.path.exists(found):
                    return (f"; {found} is of a benchmark that has its own configuration: "
                            f"lightning run {config} --data.root {place}")
        return ""

    def _by_pattern(self, root: Path, pattern: re.Pattern[str]) -> list[Any]:
        samples = []
        files = self.files(root)
        if not files:
            raise ScionError(f"data.root: no {self.files_are} in {root}")
        for file in files:
            label = _label_found(pattern, file.relative_to(root).as_posix())
            if label:
                samples.append(self._sample(root, file, self._labels(as_text(label))))
            else:
                self.skipped.append(one_line(f"{file}: data.label_pattern finds no label in its name"))
        if not samples:
            raise ScionError(f"data.label_pattern: {pattern.pattern!r} finds a label in none of {len(files)} files, "
                             f"the first is {files[0].relative_to(root).as_posix()}")
        return samples

    def _sample(self, root: Path, file: Path, labels: tuple[str, ...], group: str | None = None) -> Sample:
        return self.kind(file, file.relative_to(root).as_posix(), labels, group)

    def _by_table(self, root: Path, table: Path) -> list[Any]:
        if not os.path.lexists(table):
            raise ScionError(f"data.table: no file {table}")
        rows = read_csv(table)
        header = list(rows[0])
        names = {key: self._column(key, header, table) for key in self.columns}
        samples: list[Any] = []
        lines: dict[str, int] = {}
        for line, row in enumerate(rows, start=2):
            where = f"{table}, line {line}"
            name, labels = self._name_and_labels(row, names, where)
            place, further = self.place(row, names, where)
            group = _group(row, names["split"], where)
            key = f"{name}@{place}" if place else name
            first_line = lines.setdefault(key, line)
            if first_line != line:
                raise ScionError(f"{where}: {name} stands in line {first_line} already; one line a file "
                                 "(several labels of a file go into one field, see data.separator)")
            samples.append(self.kind(_file_named(name, root, table), key, labels, group, **further))
        self._check_present(root, table, samples)
        return samples

    def _name_and_labels(self, row: dict[str, str], names: dict[str, str | None], where: str
                         ) -> tuple[str, tuple[str, ...]]:
        """The file that a row of a table names, and the file's labels."""
        name = row.get(str(names["file"]), "")
        text = row.get(str(names["label"]), "")
        labels = self._labels(text)
        if not name:
            raise ScionError(f"{where}: no file")
        if not text and self.separator is None:
            raise ScionError(f"{where}: no label for {name}")
        return name, labels

    def _check_present(self, root: Path, table: Path, samples: list[Any]) -> None:
        """Refuse a table of which no file is there, and say where they were looked for, and where they may lie."""
        if any(os.path.lexists(sample.file) for sample in samples):
            return
        first = samples[0].name.partition("@")[0]
        places = listed(dict.fromkeys(map(str, (root, table.parent))))
        # by its bare name: the table may name it relative to another folder
        found = next((file for file in self.files(root) if file.name == Path(first).name), None)
        hint = self._benchmark(root)
        if found is not None and not hint:
            hint = _place_hint(found, first, table)
        raise ScionError(f"data.table: none of the {len(samples)} files in {table} exists; they were looked for in "
                         f"{places}, the first is {first}{hint}")

    def _column(self, key: str, there: list[str], table: Path) -> str | None:
        """The table's column of files, labels or sets; None where it has none of sets."""
        given = self.columns[key]
        if given is not None:
            if given not in there:
                raise ScionError(f"data.{key}_column: {table} has no column {given!r}{nearest(given, there)}; it has "
                                 f"{listed(there)}")
            return given
        usual = COLUMNS.get(key, ())
        found = _usual_column(usual, there)
        if found is None and key in ("file", "label"):
            hints = f"{self._benchmark(table.parent)}{self._benchmark(table.parent.parent)}"
            raise ScionError(f"data.{key}_column: {table} has none of the columns {listed(usual)}; it has "
                             f"{listed(there)}: say which it is{hints}")
        return found

    def place(self, row: dict[str, str], names: dict[str, str | None], where: str) -> tuple[str, dict[str, Any]]:
        """Where in its file the sample of a table's row lies, as a word ("" for the whole file), and what ``kind`` is
        to know of it.

        Args:
            row: the cells by column.
            names: the columns by what they are.
            where: table and line, for messages.
        """
        return "", {}

    # ------------------------------------------------------------------------------ which set

    def parts(self, samples: list[Any], bad: set[int]) -> Parts:
        # where a column or folders say which set a file is in, nothing is drawn
        if any(sample.group for sample in samples):
            return self._parts_given(samples)
        patterns = {which: pattern for which, pattern in self.set_patterns.items() if pattern}
        found = _parts_by_name(samples, patterns)
        shares = {"test": self.test_share, "validation": self.validation_share}
        for which in patterns:
            shares[which] = 0.0
        undecided = [row for row in found["train"] if row not in bad]
        taken = stratified(undecided, samples, shares, self.split_seed)
        if shares["test"] and not taken["test"]:
            unread = f" ({len(bad)} of {len(samples)} files cannot be read)" if bad else ""
            raise ScionError(f"data.test_share: no class has two readable files{unread}, and one file is not divided "
                             "between the sets; name them in a column (data.split_column) or by data.test_pattern")
        found["train"] = taken["train"]
        for which in PARTS[1:]:
            found[which] += taken[which]
        # files too few for a share give no validation rather than an error: it is a wish, not a protocol
        return {which: sorted(rows) for which, rows in found.items() if rows or which != "validation"}

    def _parts_given(self, samples: list[Any]) -> Parts:
        """The sets that the samples themselves name."""
        given: Parts = {}
        for row, sample in enumerate(samples):
            given.setdefault(str(sample.group), []).append(row)
        for which in ("train", "test"):
            if which not in given:
                raise ScionError(f"{self._labels_from(self.root or Path())}: no file is in the set {which}")
        return given

    def named(self, samples: list[Any], classes: list[str]) -> str:
        # a root such as "." has a name only when it is resolved
        root = Path(os.path.realpath(os.path.expanduser(self.root or self.folder)))
        name = as_text(root.parent.name if os.path.isfile(root) else root.name)
        kinds = "labels" if self.multilabel else "classes"
        return f"{name} ({len(samples)} {self.samples_are}, {len(classes)} {kinds})"


def _check_shares(validation_share: float, test_share: float) -> None:
    """Refuse shares that leave nothing to train or to test."""
    if not 0 <= validation_share < 1 or not 0 < test_share < 1 or validation_share + test_share >= 1:
        raise ScionError(f"data.validation_share {validation_share} and data.test_share {test_share} must lie in "
                         "[0, 1) and (0, 1) and leave something to train")


def _check_classes(classes: list[str] | None) -> None:
    """Refuse a list of classes that is too short, or has a name twice."""
    if classes is None:
        return
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice or len(classes) < 2:
        wrong = f"{twice[0]!r} stands there twice" if twice else str(classes)
        raise ScionError(f"data.classes: {wrong}; at least two different names wanted")


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ScionError(f"data.{name}: {text!r} is no regular expression ({error})") from None


def _label_found(pattern: re.Pattern[str], name: str) -> str | None:
    """The label that a pattern finds in a file's name."""
    match = pattern.search(name)
    if match is None:
        return None
    return match.groupdict().get("label") or match.group(1)


def _set_folders(root: Path, folders: list[Path]) -> dict[Path, str | None]:
    """The folders whose subfolders are the classes, each with its set: ``root`` without one, or the sets' folders."""
    names = {folder.name.lower() for folder in folders}
    # classes may be called "test" or "valid" too, so that only names of sets throughout are taken for sets
    if not names <= set(SETS):
        return {root: None}
    sets: dict[Path, str | None] = {folder: SETS[folder.name.lower()] for folder in folders}
    if len(set(sets.values())) < len(sets):
        raise ScionError(f"data.root: {root} has two folders for one set ({listed(sorted(names))})")
    for which in ("train", "test"):
        if which not in sets.values():
            raise ScionError(f"data.root: of the sets {root} has {listed(sorted(names))} and none to {which}")
    return sets


def _group(row: dict[str, str], column: str | None, where: str) -> str | None:
    """The set that a row of a table names; None where the table has no column of sets."""
    if not column:
        return None
    value = row.get(column, "")
    group = SETS.get(value.lower())
    if group is None:
        raise ScionError(f"{where}: {value!r} is no set; train, validation or test wanted")
    return group


def _file_named(name: str, root: Path, table: Path) -> Path:
    """The file of that name below ``root``; where there is none, the one beside the table."""
    file = root / name
    beside = table.parent / name
    if not os.path.isfile(file) and os.path.isfile(beside):
        return beside
    return file


def _place_hint(found: Path, name: str, table: Path) -> str:
    """Say where a file lies that a table names otherwise, and which root would find it."""
    if not str(found).endswith(name):
        return f"; {name} is {found}"
    below = str(found).removesuffix(name).rstrip("/")
    return (f"; {found.name} is in {found.parent}: --data.root {below} --data.table "
            f"{os.path.relpath(table, below)}")


def _usual_column(usual: tuple[str, ...], there: list[str]) -> str | None:
    """The column with one of the usual names, of which the first counts most."""
    for usual_name in usual:
        for name in there:
            if name.lower() == usual_name:
                return name
    return None


def _parts_by_name(samples: list[Any], patterns: dict[str, re.Pattern[str]]) -> Parts:
    """The sets whose patterns find the files' names; all other files are in ``train``."""
    found: Parts = {which: [] for which in PARTS}
    for row, sample in enumerate(samples):
        which = next((which for which in patterns if patterns[which].search(sample.name)), "train")
        found[which].append(row)
    for which, pattern in patterns.items():
        if not found[which]:
            raise ScionError(f"data.{which}_pattern: {pattern.pattern!r} finds none of {len(samples)} files, the "
                             f"first is {samples[0].name}")
    return found


def stratified(rows: list[int], samples: list[Any], shares: dict[str, float], seed: int) -> Parts:
    """``shares`` of the files of each class set apart for ``test`` and ``validation``, the rest to ``train``.

    Of a class of at least two files one goes to test at least, and of at least four one to validation. A file's place
    in the draw is a function of (seed, its name), so that a new file moves few others; samples of one file stay
    together. With several labels a file is dealt out with the rarest of them.
    """
    def place_in_draw(row: int) -> int:
        # what follows an "@" is a place within the file: samples of one file are drawn together
        return seed_of(seed, "split", samples[row].name.partition("@")[0])

    total = Counter(label for row in rows for label in samples[row].labels)
    files: dict[Path, list[int]] = {}
    for row in sorted(rows, key=place_in_draw):
        files.setdefault(samples[row].file, []).append(row)
    classes: dict[str, list[list[int]]] = {}
    for members in files.values():
        labels = {label for row in members for label in samples[row].labels}
        rarest = min(labels, key=lambda name: (total[name], name), default="")
        classes.setdefault(rarest, []).append(members)
    found: Parts = {which: [] for which in PARTS}
    for members in classes.values():
        size = len(members)
        for which, least in (("test", 2), ("validation", 4)):
            count = 0
            if shares[which] and size >= least:
                count = max(1, round(shares[which] * size))
            found[which] += chain.from_iterable(members[:count])
            members = members[count:]
        found["train"] += chain.from_iterable(members)
    return found
