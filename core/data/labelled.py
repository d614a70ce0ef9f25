"""What the datamodules of labelled files share: from a list of samples to the three sets.

A benchmark says where its files lie, what they are and which set they belong to (`LabelledData.table`,
`LabelledData.parts`); a kind of file (sounds, pictures) says how they are read (`LabelledData.prepare`,
`LabelledData.fill`). Everything else is here: finding or fetching the data, the mini in their place, few-shot subsets,
unreadable files, tables and lists.
"""

from __future__ import annotations

import os
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from core.data import DataModule, Source, seed_of
from core.data.download import Archive, download, reachable
from core.data.lists import contents_of, is_folder
from core.data.reading import check_name, noted, plainly
from core.data.sample import PARTS, Parts
from core.errors import ScionError, listed
from core.files import files_below


class BenchmarkDeclarations:
    """What a benchmark says of its files."""

    domain: ClassVar[str]
    """Its folder in the cache."""
    samples_are: ClassVar[str] = "samples"
    """What people call them: clips, pictures."""
    files_are: ClassVar[str] = "file"
    """What one file is: a sound file, a picture."""
    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Endings of such files, in small letters."""
    mini_is: ClassVar[str] = "generated samples"
    """What the mini holds."""

    title: str
    """The benchmark's name."""
    archive: ClassVar[Archive | None] = None
    """Where it can be downloaded from."""
    obtain: ClassVar[str] = ""
    """Where people get it, if it cannot be downloaded by a program."""
    count: ClassVar[int] = 0
    """Samples of the whole benchmark."""
    folder: str = ""
    """What it is called in the cache, where there is no archive."""
    mini_name: ClassVar[str] = ""
    """What its mini is called."""
    every_class: ClassVar[bool] = True
    """Whether each class has to be trained; a sample drawn from many classes may miss some."""


class LabelledData(BenchmarkDeclarations, DataModule):
    """Files with labels, or the mini in their place.

    A subclass names its benchmark in the attributes of `BenchmarkDeclarations`, and defines ``layout``, ``table`` and
    ``parts``.

    Args:
        root: folder of the data in its published layout; None takes the copy in the cache, or downloads it where it is
            published for that.
        source: see ``DataModule``.
        shots: few-shot: so many training samples of each class, drawn by the seed, the same for every method, and a
            larger number contains a smaller one's. Validation and test stay whole. Null takes all.
        skip_bad: leave out unreadable files and list them in ``skipped``, instead of stopping at the first.
        cache: folder of downloads and of what is computed from files; null is ``$SCION_CACHE`` or ``~/.cache/scion``.
        batch_size, num_workers, seed, balanced: see ``DataModule``.
    """

    def __init__(self, root: str | None = None, source: Source = "auto", shots: int | None = None,
                 skip_bad: bool = False, cache: str | None = None, batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None, balanced: bool = False) -> None:
        super().__init__(root, source, batch_size, num_workers, seed, balanced)
        if shots is not None and shots < 1:
            raise ScionError(f"data.shots: {shots} training {self.samples_are} a class are too few; at least 1, or "
                             "null for all")
        self.shots = shots
        self.skip_bad = skip_bad
        caches = cache or os.environ.get("SCION_CACHE") or "~/.cache/scion"
        self.cache = Path(os.path.expanduser(caches)) / self.domain
        self.notes: list[str] = []
        """What has to be known of the data beside their name."""
        self._place: Path | Literal["mini", "download"] | None = None
        self._listing: tuple[list[Any], list[str], dict[int, str]] | None = None
        self._contents: str | None = None

    # ------------------------------------------------------------------------------ what a benchmark defines

    @abstractmethod
    def layout(self, root: Path) -> Path:
        """``root``, or the folder in it that the archive unpacks to, checked for the layout."""

    @abstractmethod
    def table(self, root: Path) -> tuple[list[Any], list[str]]:
        """The samples below ``root`` and the classes in their order.

        Raises:
            ScionError: names the file, and the line where there is one.
        """

    @abstractmethod
    def parts(self, samples: list[Any], bad: set[int]) -> Parts:
        """Rows of each set, readable or not; ``bad`` are the unreadable ones."""

    def named(self, samples: list[Any], classes: list[str]) -> str:
        """What the numbers are measured on; ``samples`` are the readable ones."""
        whole = not self.count or len(samples) == self.count
        return self.title if whole else f"{len(samples)} {self.samples_are} in {self.title}'s layout"

    def stand_ins(self) -> list[str]:
        """Class names as long as the benchmark has not been downloaded."""
        return []

    # ------------------------------------------------------------------------------ what a kind of file defines

    def survey(self, samples: list[Any], bad: dict[int, str]) -> None:
        """Note in ``bad`` what is seen to be unreadable without decoding it."""

    @abstractmethod
    def prepare(self, samples: list[Any], wanted: list[int] | None, bad: dict[int, str]) -> dict[int, str]:
        """Decode what has to be decoded of the rows ``wanted`` (None: all) before training; returns the rows that turn
        out to be unreadable, each with the reason."""

    @abstractmethod
    def fill(self, samples: list[Any], parts: Parts, wanted: list[int] | None) -> None:
        """Set ``train_set``, ``validation_set`` and ``test_set``."""

    @abstractmethod
    def load_mini(self) -> None:
        """Make the mini: set ``origin``, ``classes`` and the three sets."""

    @abstractmethod
    def mini_classes(self) -> list[str]:
        """The classes of the mini."""

    # ------------------------------------------------------------------------------ what the core asks

    def files(self, folder: Path) -> list[Path]:
        """What is of this kind below ``folder`` by its ending, without hidden ones. Pipes and folders that cannot be
        listed are among them, so that they are named as what cannot be read."""
        files, closed = files_below(folder)
        of_this_kind = [file for file in files if file.suffix.lower() in self.suffixes]
        return sorted(of_this_kind + closed)

    def with_files(self, folders: list[Path], least: int, hint: str = "") -> dict[Path, list[Path]]:
        """The files of each of these folders of classes. A folder that holds others alone (notes, say) is left out and
        named, as long as ``least`` folders stay.

        Raises:
            ScionError: a folder is empty, or too few hold a file of this kind.
        """
        found = {folder: self.files(folder) for folder in folders}
        lacking = [folder for folder, files in found.items() if not files]
        others = {folder: files_below(folder)[0] for folder in lacking}
        # an empty folder is a class without files, and rather a mistake than notes
        wrong = next((folder for folder, files in others.items() if not files), None)
        if lacking and wrong is None and len(found) - len(lacking) < least:
            wrong = lacking[0]
        if wrong is not None:
            raise ScionError(f"data.root: no {self.files_are} in the folder {wrong}{hint}")
        for folder in lacking:
            endings = listed(dict.fromkeys(file.suffix.lower() or file.name for file in others[folder]), 3)
            note = f"the folder {folder} is left out: it holds {endings} and no {self.files_are}"
            self.notes.append(note)
            warnings.warn(f"data.root: {note}", stacklevel=2)
        return {folder: files for folder, files in found.items() if files}

    def subfolders(self, folder: Path) -> list[Path]:
        """The folders in ``folder``, without hidden ones and what a Mac's zip leaves behind. A link back to a folder
        that it lies in is left out and named: its files would be counted twice."""
        found = []
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            child = folder / entry.name
            if not is_folder(entry) or child.name[0] == "." or child.name == "__MACOSX":
                continue
            if entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(child)):
                reason: dict[int, str] = {}
                with noted(reason, 0, self.skip_bad):  # which raises it, or keeps it
                    raise ScionError(f"{child}: a link back to a folder that it lies in")
                self.skipped += reason.values()
                continue
            found.append(child)
        return found

    @property
    def listing(self) -> str:
        if not self.is_loaded:
            self.setup()
        return self._contents or super().listing

    def peek(self) -> list[str] | None:
        """The classes, from the table where one is at hand."""
        place = self.where()
        if place == "mini":
            return self.mini_classes()
        if place == "download":
            return self.stand_ins()
        return self.look(place)[1]

    def load(self) -> None:
        place = self.where()
        with plainly():
            if place == "mini":
                self.load_mini()
            elif place == "download":
                self._load_real(self._download())
            else:
                self._load_real(place)

    # ------------------------------------------------------------------------------ where the data come from

    def where(self) -> Path | Literal["mini", "download"]:
        """Where the samples come from, asked once."""
        if self._place is None:
            with plainly():
                self._place = self._find()
        if self._place == "mini":
            self.multilabel = False  # a sample of the mini is one thing
        return self._place

    def _find(self) -> Path | Literal["mini", "download"]:
        """Look for the samples: what is given, then the cache, then the network, then the mini."""
        name = self.archive.folder if self.archive else self.folder or self.title
        ready = self.cache / name
        if self.source == "mini":
            return "mini"
        if self.root is not None:  # given explicitly: it is this or nothing
            place = self.layout(Path(os.path.expanduser(self.root)))
            self.look(place)
            return place
        if os.path.isdir(ready):
            try:
                return self.layout(ready)
            except ScionError as error:
                raise ScionError(f"{error}; this is the copy in the cache: take it away to have it fetched or made up "
                                 "for again") from None
        if self.archive and reachable(self.archive.url):
            return "download"
        if self.source == "real":
            raise ScionError(f"data.source real: {self.absent}; {self.obtain or 'give a data.root'}")
        warnings.warn(self.fallback, stacklevel=4)
        return "mini"

    @property
    def absent(self) -> str:
        """Why a benchmark is not there."""
        host = " and its host does not answer" if self.archive else ""
        return f"{self.title} is not in the cache{host}"

    @property
    def fallback(self) -> str:
        """The warning where the mini stands in."""
        hint = f" ({self.obtain})" if self.obtain else ""
        return (f"data.source auto: no data.root, {self.absent}, so this is the built-in mini: {self.mini_is}, not the "
                f"benchmark{hint}")

    def _download(self) -> Path:
        """Fetch the benchmark into the cache; what must hold is that every file of the table is there."""
        def whole(folder: Path) -> None:
            samples = self.table(self.layout(folder))[0]
            absent = [sample.name for sample in samples if not sample.file.is_file()]
            if len(samples) != self.count or absent:
                raise ScionError(f"{self.title}: the download is not whole: {len(samples)} {self.samples_are} of "
                                 f"{self.count} listed, {len(absent)} absent")

        assert self.archive is not None
        return self.layout(download(self.archive, self.title, self.cache, whole))

    # ------------------------------------------------------------------------------ loading

    def look(self, root: Path) -> tuple[list[Any], list[str], dict[int, str]]:
        """The samples, the classes, and by row what is seen to be bad without decoding it; read once."""
        if self._listing is None:
            with plainly():
                samples, classes = self.table(root)
                for sample in samples:
                    check_name(sample.file)
                bad: dict[int, str] = {}
                self.survey(samples, bad)
                self._listing = samples, classes, bad
        return self._listing

    def _load_real(self, root: Path) -> None:
        """Load the samples below ``root``, less those that cannot be read."""
        samples, classes, bad = self.look(root)
        if samples and len(bad) == len(samples):
            raise ScionError(f"data: none of {len(samples)} files can be read ({next(iter(bad.values()))})")
        while True:  # what turns out to be bad when it is decoded changes what there is to choose from
            self.classes = classes
            known = set(bad)
            parts = self._readable_parts(samples, known)
            self.check_parts(samples, parts, bad)
            notes: list[str] = []
            wanted = None
            if self.shots:
                parts["train"], short = self._few(samples, parts["train"])
                if short:
                    notes.append(f"data.shots {self.shots}: fewer training {self.samples_are} of {listed(short)}")
                wanted = sorted(chain.from_iterable(parts.values()))
            bad = bad | self.prepare(samples, wanted, bad)
            if set(bad) == known:
                break
        if bad:
            notes.append(f"{len(bad)} of {len(samples)} files could not be read and were left out (named under "
                         "skipped)")
        self.skipped += list(bad.values())
        good = [sample for row, sample in enumerate(samples) if row not in bad]
        name = self.named(good, classes)
        if self.shots:
            name += f", {self.shots} training {self.samples_are} a class"
        self.origin = {"source": "real", "name": name}
        all_notes = [*self.notes, *notes]
        if all_notes:
            self.origin["note"] = "; ".join(all_notes)
        self._contents = contents_of(root, self.classes, samples, parts)
        self.fill(samples, parts, wanted)

    def _readable_parts(self, samples: list[Any], bad: set[int]) -> Parts:
        """The rows of each set without unreadable ones."""
        found: Parts = {}
        for which, rows in self.parts(samples, bad).items():
            found[which] = [row for row in rows if row not in bad]
        return found

    def check_parts(self, samples: list[Any], parts: Parts, bad: dict[int, str]) -> None:
        """Every class is trained, where that is wanted, and every set that the protocol has holds something."""
        covered = {label for row in parts["train"] for label in samples[row].labels}
        missing = [name for name in self.classes if name not in covered]
        if missing and self.every_class:
            # most likely all files of the class are unreadable: why the first of them is
            reason = next((reason for row, reason in bad.items() if missing[0] in samples[row].labels), "")
            hint = f" ({reason})" if reason else ""
            raise ScionError(f"data: of {len(self.classes)} classes the training set holds none of {listed(missing)}"
                             f"{hint}")
        for which in PARTS[1:]:
            if which in parts and not parts[which]:
                raise ScionError(f"data: no readable {self.samples_are.rstrip('s')} in the {which} set")

    def _few(self, samples: list[Any], rows: list[int]) -> tuple[list[int], list[str]]:
        """``shots`` of the training rows of each class, and the classes that have fewer."""
        assert self.shots is not None
        names = [sample.name for sample in samples]
        labels = [sample.labels for sample in samples]
        kept = few(rows, names, labels, self.shots, self.seed or 0)
        counts = Counter(label for row in kept for label in samples[row].labels)
        short = [f"{name} ({counts[name]})" for name in self.classes if counts[name] < self.shots]
        return kept, short


def few(rows: list[int], names: Sequence[str], labels: Sequence[tuple[str, ...]], shots: int, seed: int) -> list[int]:
    """``shots`` of ``rows`` for each class, in ascending order; all where a class has no more.

    A row's place in the draw depends on (seed, its name) alone, so that more shots contain fewer, and the rows of one
    class do not depend on another. With several labels the rarest class chooses first, and what was chosen counts for
    all of its classes.

    Args:
        rows: to choose from.
        names, labels: of every row of the data set.
        shots: of each class, at least 1.
        seed: of the draw.
    """
    order = sorted(rows, key=lambda row: seed_of(seed, "shots", names[row]))
    total = Counter(label for row in rows for label in labels[row])
    have: Counter[str] = Counter()
    kept: set[int] = set()
    for name in sorted(total, key=lambda name: (total[name], name)):
        for row in order:
            if have[name] >= shots:
                break
            if row not in kept and name in labels[row]:
                kept.add(row)
                have.update(labels[row])
    return sorted(kept)
