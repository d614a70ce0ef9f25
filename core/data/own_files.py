"""Anybody's files: a folder with a subfolder for each class, or a table of files and labels, of sounds as of pictures.

Files may lie as they lie. What cannot be read is left out and named.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from dataclasses import replace
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
        self.columns = {"file": file_column, "label": label_column, "split": split_column}
        self.separator, self.multilabel = separator, separator is not None
        self.label_pattern = _pattern("label_pattern", label_pattern)
        if self.label_pattern and not self.label_pattern.groups:
            raise ScionError(f"data.label_pattern: {label_pattern!r} has no group; put brackets around the label")
        self.set_patterns = {"test": _pattern("test_pattern", test_pattern),
                             "validation": _pattern("validation_pattern", validation_pattern)}
        self.wanted = classes
        self.validation_share, self.test_share, self.split_seed = validation_share, test_share, split_seed

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
        samples = self._by_pattern(root, self.label_pattern) if self.label_pattern else \
            self._by_table(root, root / self.table_file) if self.table_file else self._by_subfolders(root)
        found = ordered(label for sample in samples for label in sample.labels)
        if self.wanted is None:
            return samples, at_least_two(found, self._labels_from(root))
        for name in self.wanted:
            if name not in found:
                raise ScionError(f"data.classes: no file is labelled {name!r}{nearest(name, found)}; the labels are "
                                 f"{listed(found)}")
        if others := [name for name in found if name not in self.wanted]:
            self.notes.append(f"data.classes: {listed(others)} left out")
        kept = []
        for sample in samples:
            labels = tuple(label for label in sample.labels if label in self.wanted)
            if labels or (self.separator and not sample.labels):
                kept.append(replace(sample, labels=labels))
        return kept, list(self.wanted)

    def _labels_from(self, root: Path) -> str:
        if self.label_pattern:
            return f"data.label_pattern on the files in {root}"
        return f"data.table: {root / self.table_file}" if self.table_file else f"data.root: {root}"

    def _labels(self, text: str) -> tuple[str, ...]:
        if self.separator is None:
            return (text,)
        return tuple(dict.fromkeys(part.strip() for part in text.split(self.separator) if part.strip()))

    def _by_subfolders(self, root: Path) -> list[Any]:
        folders = self.subfolders(root)
        hint = self._hint(root)
        if not folders:
            raise ScionError(f"data.root: {root} has no subfolders; wanted: one for each class, or data.table, or "
                             f"data.label_pattern{hint}{self._benchmark(root)}")
        names = {folder.name.lower() for folder in folders}
        sets = {folder: SETS[folder.name.lower()] for folder in folders} if names <= set(SETS) else {root: None}
        if len(sets) > 1 and len(set(sets.values())) < len(sets):
            raise ScionError(f"data.root: {root} has two folders for one set ({listed(sorted(names))})")
        if None not in sets.values():
            for which in ("train", "test"):
                if which not in sets.values():
                    raise ScionError(f"data.root: of the sets {root} has {listed(sorted(names))} and none to {which}")
        samples = []
        for place, which in sets.items():
            least, around = (2, folders) if place == root else (1, self.subfolders(place))
            inside = self.with_files(around, least, f"{hint}{self._benchmark(root)}")
            for folder, files in inside.items():
                labels = self._labels(as_text(folder.name))
                samples += [self._sample(root, file, labels, which) for file in files]
            self.skipped += [one_line(f"{file}: lies in no class folder") for file in self.files(place)
                             if file.parent == place and file not in folders]
        return samples

    def _hint(self, root: Path) -> str:
        tables = sorted(file.name for file in root.iterdir() if file.suffix.lower() in (".csv", ".tsv"))
        return f" (there is {listed(tables, 3)}: is it data.table?)" if tables else ""

    def _benchmark(self, root: Path) -> str:
        """A hint where the folder is a benchmark in its published layout."""
        inside: list[Path] = []
        with contextlib.suppress(OSError):
            inside = sorted(root.iterdir())
        for place in (root, *inside):
            for marker, config in self.benchmarks.items():
                if os.path.exists(place / marker):
                    return (f"; {place / marker} is of a benchmark that has its own configuration: "
                            f"lightning run {config} --data.root {place}")
        return ""

    def _by_pattern(self, root: Path, pattern: re.Pattern[str]) -> list[Any]:
        samples = []
        files = self.files(root)
        if not files:
            raise ScionError(f"data.root: no {self.files_are} in {root}")
        for file in files:
            match = pattern.search(file.relative_to(root).as_posix())
            label = match and (match.groupdict().get("label") or match.group(1))
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
        names = {key: self._column(key, list(rows[0]), table) for key in self.columns}
        samples: list[Any] = []
        lines: dict[str, int] = {}
        for line, row in enumerate(rows, start=2):
            name, text = row.get(str(names["file"]), ""), row.get(str(names["label"]), "")
            labels = self._labels(text)
            if not name or (not text and self.separator is None):
                raise ScionError(f"{table}, line {line}: {'no file' if not name else f'no label for {name}'}")
            place, further = self.place(row, names, f"{table}, line {line}")
            group = None
            if names["split"]:
                value = row.get(names["split"], "")
                group = SETS.get(value.lower())
                if group is None:
                    raise ScionError(f"{table}, line {line}: {value!r} is no set; train, validation or test wanted")
            key = f"{name}@{place}" if place else name
            if lines.setdefault(key, line) != line:
                raise ScionError(f"{table}, line {line}: {name} stands in line {lines[key]} already; one line a file "
                                 "(several labels of a file go into one field, see data.separator)")
            file = root / name
            if not os.path.isfile(file) and os.path.isfile(table.parent / name):
                file = table.parent / name
            samples.append(self.kind(file, key, labels, group, **further))
        self._check_present(root, table, samples)
        return samples

    def _check_present(self, root: Path, table: Path, samples: list[Any]) -> None:
        """Refuse a table of which no file is there, and say where they were looked for, and where they may lie."""
        if any(os.path.lexists(sample.file) for sample in samples):
            return
        first = samples[0].name.partition("@")[0]
        places = listed(dict.fromkeys(map(str, (root, table.parent))))
        found = next((file for file in self.files(root) if file.name == Path(first).name), None)
        hint = self._benchmark(root)
        if found is not None and not hint:
            below = str(found).removesuffix(first).rstrip("/")
            hint = (f"; {found.name} is in {found.parent}: --data.root {below} --data.table "
                    f"{os.path.relpath(table, below)}") if str(found).endswith(first) else f"; {first} is {found}"
        raise ScionError(f"data.table: none of the {len(samples)} files in {table} exists; they were looked for in "
                         f"{places}, the first is {first}{hint}")

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
                             f"{listed(there)}: say which it is{self._benchmark(table.parent)}"
                             f"{self._benchmark(table.parent.parent)}")
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
        if any(sample.group for sample in samples):
            given: Parts = {}
            for row, sample in enumerate(samples):
                given.setdefault(str(sample.group), []).append(row)
            for which in ("train", "test"):
                if which not in given:
                    raise ScionError(f"{self._labels_from(self.root or Path())}: no file is in the set {which}")
            return given
        found: Parts = {which: [] for which in PARTS}
        patterns = {which: pattern for which, pattern in self.set_patterns.items() if pattern}
        for row, sample in enumerate(samples):
            found[next((which for which in patterns if patterns[which].search(sample.name)), "train")].append(row)
        for which, pattern in patterns.items():
            if not found[which]:
                raise ScionError(f"data.{which}_pattern: {pattern.pattern!r} finds none of {len(samples)} files, the "
                                 f"first is {samples[0].name}")
        shares = {"test": self.test_share, "validation": self.validation_share}
        shares = {which: 0.0 if which in patterns else share for which, share in shares.items()}
        taken = stratified([row for row in found["train"] if row not in bad], samples, shares, self.split_seed)
        if shares["test"] and not taken["test"]:
            unread = f" ({len(bad)} of {len(samples)} files cannot be read)" if bad else ""
            raise ScionError(f"data.test_share: no class has two readable files{unread}, and one file is not divided "
                             "between the sets; name them in a column (data.split_column) or by data.test_pattern")
        found = {"train": taken["train"], **{which: found[which] + taken[which] for which in PARTS[1:]}}
        # files too few for a share give no validation rather than an error: it is a wish, not a protocol
        return {which: sorted(rows) for which, rows in found.items() if rows or which != "validation"}

    def named(self, samples: list[Any], classes: list[str]) -> str:
        root = Path(os.path.realpath(os.path.expanduser(self.root or self.folder)))
        name = as_text(root.parent.name if os.path.isfile(root) else root.name)
        kinds = "labels" if self.multilabel else "classes"
        return f"{name} ({len(samples)} {self.samples_are}, {len(classes)} {kinds})"


def _pattern(name: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ScionError(f"data.{name}: {text!r} is no regular expression ({error})") from None


def stratified(rows: list[int], samples: list[Any], shares: dict[str, float], seed: int) -> Parts:
    """``shares`` of the files of each class set apart for ``test`` and ``validation``, the rest to ``train``.

    Of a class of at least two files one goes to test at least, and of at least four one to validation. A file's place
    in the draw is a function of (seed, its name), so that a new file moves few others; samples of one file stay
    together. With several labels a file is dealt out with the rarest of them.
    """
    total = Counter(label for row in rows for label in samples[row].labels)
    files: dict[Path, list[int]] = {}
    for row in sorted(rows, key=lambda row: seed_of(seed, "split", samples[row].name.partition("@")[0])):
        files.setdefault(samples[row].file, []).append(row)
    classes: dict[str, list[list[int]]] = {}
    for members in files.values():
        labels = {label for row in members for label in samples[row].labels}
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
