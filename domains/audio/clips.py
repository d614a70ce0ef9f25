"""What the audio datamodules share: a list of clips becomes filterbanks on disk, and these become three sets.

A benchmark says where its clips lie, what they are and which set they belong to (`AudioData.table`, `AudioData.parts`);
everything else is here: finding or fetching the data, the mini in their place, few-shot subsets, unreadable files, the
cache, normalisation, SpecAugment and mixup (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data import DataModule, Source, seed_of
from core.errors import ScionError, listed, nearest
from domains.audio import features
from domains.audio.network import Archive, download, reachable

PARTS = ("train", "validation", "test")
Parts = dict[str, list[int]]
"""Rows of the clips by set; ``validation`` is left out where the protocol has none."""


@dataclass(frozen=True)
class Clip:
    """One sound of a data set.

    Args:
        file: where it lies.
        name: the file within the data set, the same on every machine; what is drawn by chance is drawn by it.
        labels: its classes; one, but for multi-label data.
        group: the number of its fold, or the set that it belongs to; None where neither is given.
        start: where in the file it begins, in seconds.
    """

    file: Path
    name: str
    labels: tuple[str, ...]
    group: int | str | None = None
    start: float = 0.0


class Clips(Dataset):
    """Filterbanks of chosen clips, normalised, and augmented by (seed, epoch, index) alone.

    Args:
        banks: [clips, frames, bins] before normalisation; may lie in a file.
        targets: of each of them, a class or, with several labels, a vector [classes] of zeros and ones.
        rows: which of them are this set's.
        mean, std: of the normalisation.
        masks: SpecAugment's widest masks, (bins, frames), or None.
        mixup: alpha of Beta(alpha, alpha), or 0. With mixup a target is a vector of class weights [classes].
        classes: how many there are; only mixup asks.
        seed: of the augmentation.
    """

    def __init__(self, banks: Any, targets: Sequence[int | Tensor], rows: list[int], mean: float, std: float,
                 masks: tuple[int, int] | None = None, mixup: float = 0.0, classes: int = 0, seed: int = 0) -> None:
        self.banks, self.targets, self.rows = banks, targets, rows
        self.mean, self.std = mean, std
        self.masks, self.mixup, self.classes, self.seed = masks, mixup, classes, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def _bank(self, index: int) -> Tensor:
        bank = torch.as_tensor(np.asarray(self.banks[self.rows[index]], dtype=np.float32))
        return features.normalise(bank, self.mean, self.std)

    def _weights(self, index: int) -> Tensor:
        target = self.targets[self.rows[index]]
        return target if isinstance(target, Tensor) else torch.eye(self.classes)[target]

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        bank, target = self._bank(index), self.targets[self.rows[index]]
        if self.masks is None and not self.mixup:
            return bank, target
        generator = torch.Generator().manual_seed(seed_of(self.seed, "augment", self.epoch, index))
        if self.mixup:
            other = int(torch.randint(len(self), (), generator=generator))
            chance = np.random.default_rng(generator.initial_seed())  # torch draws no Beta from a generator
            weight = float(chance.beta(self.mixup, self.mixup))
            bank = weight * bank + (1 - weight) * self._bank(other)
            target = weight * self._weights(index) + (1 - weight) * self._weights(other)
        if self.masks is not None:
            bank = features.specaugment(bank, generator, *self.masks)
        return bank, target


class AudioData(DataModule):
    """Sound files with labels as filterbanks [frames, 128], or the mini in their place.

    A subclass names its benchmark in the attributes below and defines ``layout``, ``table`` and ``parts``.

    Args:
        root: folder of the data in its published layout; None takes the copy in the cache, or downloads it where it is
            published for that.
        source: see ``DataModule``.
        frames: frames of a clip (10 ms each), shorter clips padded, longer ones cut; null is what the benchmark's
            protocol has, and 112 for the mini.
        shots: few-shot: so many training clips of each class, drawn by the seed, the same for every method, and a
            larger number contains a smaller one's. Validation and test stay whole. Null takes all.
        normalise: ``audioset``, the statistics that the AST checkpoints expect, or ``dataset``, those of the training
            clips.
        specaugment: mask a band and a stretch of time of each training clip.
        frequency_mask: most bins of that band.
        time_mask: most frames of that stretch at the protocol's length; less in proportion where clips are shorter.
        mixup: alpha of mixup between training clips, 0 for none. Training targets are then vectors of class weights.
        skip_bad: leave out unreadable files and list them in ``skipped``, instead of stopping at the first.
        cache: folder of downloads and of the computed filterbanks; null is ``$SCION_CACHE`` or ``~/.cache/scion``.
        batch_size, num_workers, seed: see ``DataModule``.
    """

    title: ClassVar[str]
    """The benchmark's name."""
    length: ClassVar[int | None]
    """Frames of its protocol; None where the files decide."""
    archive: ClassVar[Archive | None] = None
    """Where it can be downloaded from."""
    obtain: ClassVar[str] = ""
    """Where people get it, if it cannot be downloaded by a program."""
    count: ClassVar[int] = 0
    """Clips of the whole benchmark."""
    folder: ClassVar[str] = ""
    """What it is called in the cache, where there is no archive."""
    mini_name: ClassVar[str] = ""
    """What its mini is called."""

    def __init__(self, root: str | None = None, source: Source = "auto", frames: int | None = None,
                 shots: int | None = None, normalise: Literal["audioset", "dataset"] = "audioset",
                 specaugment: bool = True, frequency_mask: int = 24, time_mask: int = 80, mixup: float = 0.0,
                 skip_bad: bool = False, cache: str | None = None, batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None) -> None:
        super().__init__(root, source, batch_size, num_workers, seed)
        if frames is not None and frames < 16:
            raise ScionError(f"data.frames: {frames} is too short, at least 16 (one patch) wanted")
        if shots is not None and shots < 1:
            raise ScionError(f"data.shots: {shots} training clips a class are too few; at least 1, or null for all")
        if mixup < 0:
            raise ScionError(f"data.mixup: {mixup} is negative; 0 switches it off")
        if frequency_mask < 0 or time_mask < 0:
            raise ScionError("data.frequency_mask and data.time_mask must not be negative; 0 switches them off")
        self.shots = shots
        self.normalise: Literal["audioset", "dataset"] = normalise
        self.specaugment, self.frequency_mask, self.time_mask, self.mixup = (specaugment, frequency_mask, time_mask,
                                                                             mixup)
        self.skip_bad = skip_bad
        self.cache = Path(cache or os.environ.get("SCION_CACHE") or "~/.cache/scion").expanduser() / "audio"
        self.mean, self.std = features.AUDIOSET
        self.notes: list[str] = []
        """What has to be known of the data beside their name."""
        self._frames = frames
        self._measured = False
        self._place: Path | Literal["mini", "download"] | None = None
        self._listing: tuple[list[Clip], list[str], dict[int, str]] | None = None

    # ------------------------------------------------------------------------------ what a benchmark defines

    @abstractmethod
    def layout(self, root: Path) -> Path:
        """``root``, or the folder in it that the archive unpacks to, checked for the layout."""

    @abstractmethod
    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        """The clips below ``root`` and the classes in their order.

        Raises:
            ScionError: names the file, and the line where there is one.
        """

    @abstractmethod
    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        """Rows of each set, readable or not; ``bad`` are the unreadable ones."""

    def named(self, clips: list[Clip], classes: list[str]) -> str:
        """What the numbers are measured on; ``clips`` are the readable ones."""
        whole = not self.count or len(clips) == self.count
        return self.title if whole else f"{len(clips)} clips in {self.title}'s layout"

    def stand_ins(self) -> list[str]:
        """Class names as long as the benchmark has not been downloaded."""
        return []

    draw = 1
    """Which mini: the folds of a benchmark take this place."""
    validates = True
    """Whether the mini has a validation set."""

    # ------------------------------------------------------------------------------ what the core asks

    @property
    def frames(self) -> int:
        """Frames of each clip; what the backbone's ``frames`` has to be.

        Asked before a backbone is built, so the folder and the table are looked at here: a mistake is told at once.
        """
        if self._frames is not None and self._measured:  # known from a run, or from the data read by now
            return self._frames
        place = self._where()
        if self._frames is None:
            from domains.audio import mini

            self._frames = mini.FRAMES if place == "mini" else self.length
            assert self._frames is not None  # where the files decide, looking at them has set it
        return self._frames

    def example(self, batch_size: int = 1) -> Tensor:
        """[batch, frames, 128], a ramp."""
        shape = (batch_size, self.frames, features.BINS)
        return torch.linspace(-1, 1, batch_size * self.frames * features.BINS).view(shape)

    def read(self, file: str | Path) -> Tensor:
        """The beginning of one sound file of any rate, length and number of channels -> [frames, 128]."""
        if self.normalise == "dataset" and not self._measured:
            self.setup()
        return features.normalise(_bank(Path(file), 0.0, self.frames), self.mean, self.std)

    def files(self, folder: Path) -> list[Path]:
        """The sound files below ``folder``."""
        return sound_files(folder)

    def peek(self) -> list[str] | None:
        """The classes, from the table where one is at hand."""
        place = self._where()
        if place == "mini":
            from domains.audio import mini

            return list(mini.CLASSES)
        if place == "download":
            return self.stand_ins()
        return self._look(place)[1]

    def state(self) -> dict[str, Any]:
        return {"frames": self.frames, "mean": self.mean, "std": self.std}

    def load_state(self, state: dict[str, Any]) -> None:
        self._frames, self.mean, self.std = int(state["frames"]), float(state["mean"]), float(state["std"])
        self._measured = True

    def load(self) -> None:
        place = self._where()
        if place == "mini":
            self._load_mini()
        else:
            self._load_real(self._download() if place == "download" else place)

    # ------------------------------------------------------------------------------ where the data come from

    def _where(self) -> Path | Literal["mini", "download"]:
        """Where the clips come from, asked once."""
        if self._place is not None:
            return self._place
        ready = self.cache / (self.archive.folder if self.archive else self.folder or self.title)
        if self.source == "mini":
            self._place = "mini"
        elif self.root is not None:  # given explicitly: it is this or nothing
            place = self.layout(self.root.expanduser())
            self._look(place)
            self._place = place
        elif ready.is_dir():
            self._place = self.layout(ready)
        elif self.archive and reachable(self.archive.url):
            self._place = "download"
        elif self.source == "real":
            raise ScionError(f"data.source real: {self._absent}; {self.obtain or 'give a data.root'}")
        else:
            self._place = "mini"
            warnings.warn(self._fallback, stacklevel=2)
        if self._place == "mini":
            self.multilabel = False  # a clip of the mini is one thing
        return self._place

    @property
    def _absent(self) -> str:
        """Why a benchmark is not there."""
        host = " and its host does not answer" if self.archive else ""
        return f"{self.title} is not in the cache{host}"

    @property
    def _fallback(self) -> str:
        hint = f" ({self.obtain})" if self.obtain else ""
        return (f"data.source auto: no data.root, {self._absent}, so this is the built-in mini: ten synthetic sounds, "
                f"not the benchmark{hint}")

    def _download(self) -> Path:
        """Fetch the benchmark into the cache; what must hold is that every clip of the table is there."""
        def whole(folder: Path) -> None:
            clips = self.table(self.layout(folder))[0]
            absent = [clip.name for clip in clips if not clip.file.is_file()]
            if len(clips) != self.count or absent:
                raise ScionError(f"{self.title}: the download is not whole: {len(clips)} clips of {self.count} listed, "
                                 f"{len(absent)} absent")

        assert self.archive is not None
        return self.layout(download(self.archive, self.title, self.cache, whole))

    # ------------------------------------------------------------------------------ loading

    def _load_mini(self) -> None:
        from domains.audio import mini

        name = self.mini_name or f"mini (10 synthetic sounds) in the place of {self.title}"
        self.origin = {"source": "mini", "name": name}
        if self.source == "auto":
            self.origin["note"] = self._fallback
        self.classes = list(mini.CLASSES)
        parts = {which: mini.split(which, self.draw) for which in mini.SIZES}
        parts = {which: (torch.stack([features.fit(bank, self.frames) for bank in banks])
                         if self.frames != mini.FRAMES else banks, targets.tolist())
                 for which, (banks, targets) in parts.items()}
        rows = {which: list(range(len(targets))) for which, (_, targets) in parts.items()}
        if self.shots:
            targets = parts["train"][1]
            rows["train"] = few(rows["train"], list(map(str, rows["train"])),
                                [(self.classes[target],) for target in targets], self.shots, self.seed or 0)
            self.origin["name"] += f", {self.shots} training clips a class"
        self._statistics(parts["train"][0], rows["train"])
        self.train_set, self.validation_set, self.test_set = (
            self._clips(banks, targets, rows[which], train=which == "train")
            for which, (banks, targets) in parts.items())
        if not self.validates:
            self.validation_set = None

    def _look(self, root: Path) -> tuple[list[Clip], list[str], dict[int, str]]:
        """The clips, the classes, and by row what is seen to be bad without decoding it; read once."""
        if self._listing is None:
            clips, classes = self.table(root)
            bad: dict[int, str] = {}
            seconds: list[float] = []
            frames = self._frames or self.length
            if frames is None or not stored(clips, frames, self.cache):  # what was decoded once needs no other look
                for row, clip in enumerate(clips):
                    with _noted(bad, row, self.skip_bad):
                        seconds.append(glance(clip))
            if frames is None:
                self._frames = fitting(seconds)
            self._listing = clips, classes, bad
        return self._listing

    def _load_real(self, root: Path) -> None:
        clips, classes, bad = self._look(root)
        while True:  # what turns out to be bad when it is decoded changes what there is to choose from
            self.classes, known = classes, set(bad)
            parts = {which: [row for row in rows if row not in known] for which, rows in
                     self.parts(clips, known).items()}
            self._check(clips, parts, bad)
            notes = []
            if self.shots:
                parts["train"], short = self._few(clips, parts["train"])
                notes += [f"data.shots {self.shots}: fewer training clips of {listed(short)}"] if short else []
            wanted = sorted(row for rows in parts.values() for row in rows) if self.shots else None
            banks, found = filterbanks(clips, self.frames, self.cache, self.skip_bad, bad, wanted)
            bad = bad | found
            if set(bad) == known:
                break
        if bad:
            notes.append(f"{len(bad)} of {len(clips)} files could not be read and were left out (named under skipped)")
        self.skipped += list(bad.values())
        shots = f", {self.shots} training clips a class" if self.shots else ""
        good = [clip for row, clip in enumerate(clips) if row not in bad]
        self.origin = {"source": "real", "name": self.named(good, classes) + shots}
        if self.notes or notes:
            self.origin["note"] = "; ".join([*self.notes, *notes])
        place = {row: index for index, row in enumerate(wanted)} if wanted is not None and len(banks) == len(wanted) \
            else {row: row for row in range(len(clips))}
        position = {name: index for index, name in enumerate(classes)}
        targets: list[Any] = [0] * len(banks)
        for row, index in place.items():
            labels = [position[label] for label in clips[row].labels]
            targets[index] = torch.eye(len(classes))[labels].sum(0) if self.multilabel else labels[0]
        rows = {which: [place[row] for row in found] for which, found in parts.items()}
        self._statistics(banks, rows["train"])
        self.train_set = self._clips(banks, targets, rows["train"], train=True)
        self.validation_set = self._clips(banks, targets, rows["validation"]) if "validation" in rows else None
        self.test_set = self._clips(banks, targets, rows["test"])

    def _check(self, clips: list[Clip], parts: Parts, bad: dict[int, str]) -> None:
        """Every class is trained, and every set that the protocol has holds something."""
        covered = {label for row in parts["train"] for label in clips[row].labels}
        missing = [name for name in self.classes if name not in covered]
        if missing:
            reason = next((reason for row, reason in bad.items() if missing[0] in clips[row].labels), "")
            raise ScionError(f"data: of {len(self.classes)} classes the training set holds none of {listed(missing)}"
                             f"{f' ({reason})' if reason else ''}")
        for which in PARTS[1:]:
            if which in parts and not parts[which]:
                raise ScionError(f"data: no readable clip in the {which} set")

    def _few(self, clips: list[Clip], rows: list[int]) -> tuple[list[int], list[str]]:
        """``shots`` of the training rows of each class, and the classes that have fewer."""
        assert self.shots is not None
        kept = few(rows, [clip.name for clip in clips], [clip.labels for clip in clips], self.shots, self.seed or 0)
        counts = Counter(label for row in kept for label in clips[row].labels)
        return kept, [f"{name} ({counts[name]})" for name in self.classes if counts[name] < self.shots]

    def _statistics(self, banks: Any, rows: list[int]) -> None:
        """With ``normalise: dataset``, mean and standard deviation over the training clips, padding included."""
        if self.normalise == "dataset":
            moments = [(bank.mean(), np.square(bank).mean())  # clip by clip: together they may not fit into memory
                       for bank in (np.asarray(banks[row], dtype=np.float64) for row in rows)]
            mean, square = np.mean(moments, axis=0)
            self.mean, self.std = float(mean), float(np.sqrt(max(square - mean**2, 1e-12)))

    def _clips(self, banks: Any, targets: list[Any], rows: list[int], train: bool = False) -> Clips:
        masks = None
        if train and self.specaugment:
            masks = self.frequency_mask, round(self.time_mask * min(self.frames / (self.length or 500), 1))
        return Clips(banks, targets, rows, self.mean, self.std, masks, self.mixup if train else 0.0,
                     len(self.classes), self.seed or 0)


# ------------------------------------------------------------------------------------------------- choosing


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


def check_folds(fold: int, validation_fold: int | str | None, count: int) -> None:
    """Refuse folds that a benchmark with ``count`` of them does not have."""
    if not 1 <= fold <= count:
        raise ScionError(f"data.fold: {fold} is not one of the folds 1 to {count}")
    if validation_fold == fold:
        raise ScionError(f"data.validation_fold: {fold} is the test fold; take another, next, or null")
    if validation_fold is not None and validation_fold != "next" and validation_fold not in range(1, count + 1):
        raise ScionError(f"data.validation_fold: {validation_fold} is not next, null or one of the folds 1 to {count}")


def by_folds(clips: list[Clip], fold: int, validation_fold: int | str | None) -> Parts:
    """``fold`` to test, ``validation_fold`` (``next``: the one after ``fold``; None: none) to validate, the rest to
    train."""
    folds = sorted({int(clip.group or 0) for clip in clips})
    if fold not in folds:
        raise ScionError(f"data.fold: {fold} is not among the folds of the table ({listed(folds)})")
    held = folds[(folds.index(fold) + 1) % len(folds)] if validation_fold == "next" else validation_fold
    if held is not None and (held not in folds or held == fold):
        raise ScionError(f"data.validation_fold: {held} is not among the other folds of the table ({listed(folds)})")
    found: Parts = {which: [] for which in PARTS if which != "validation" or held is not None}
    for row, clip in enumerate(clips):
        found["test" if clip.group == fold else "validation" if clip.group == held else "train"].append(row)
    return found


# ------------------------------------------------------------------------------------------------- tables and folders


def folder_with(root: Path, marker: str, inside: Sequence[str], title: str) -> Path:
    """``root``, or a folder of one of the names ``inside`` it, that holds ``marker``."""
    if not root.is_dir():
        raise ScionError(f"data.root: no folder {root}")
    for folder in (root, *(root / name for name in inside)):
        if (folder / marker).exists():
            return folder
    raise ScionError(f"data.root: no {marker} in {root} (wanted: {title}'s layout, see domains/audio/README.md)")


def read_csv(file: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a table with a header, values without blanks around them; commas, semicolons or tabs between them.

    Raises:
        ScionError: the file cannot be read, lacks one of ``columns``, or has no rows.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            header = handle.readline()
            handle.seek(0)
            lines = [row for row in csv.reader(handle, delimiter=max(",;\t", key=header.count)) if row]
            names = [name.strip() for name in lines[0]] if lines else []
            rows = [dict(zip(names, (value.strip() for value in line), strict=False)) for line in lines[1:]]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScionError(f"{file}: cannot be read as a table ({error})") from None
    lacking = [column for column in columns if column not in names]
    if lacking:
        raise ScionError(f"{file}: {'empty' if not names else 'no column ' + listed(lacking)}"
                         f"{nearest(lacking[0], names)}; wanted are the columns {listed(columns)}")
    if not names:
        raise ScionError(f"{file}: empty; a table with a header wanted")
    if not rows:
        raise ScionError(f"{file}: no rows below the header")
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
        raise ScionError(f"{where}: {'one class only' if classes else 'no classes'} ({listed(classes)}), at least two "
                         "wanted")
    return classes


def sound_files(folder: Path) -> list[Path]:
    """Files below ``folder`` that are sounds by their ending, sorted; hidden ones are left out."""
    return [file for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in features.SUFFIXES and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)]


# ------------------------------------------------------------------------------------------------- files


def _bank(file: Path, start: float, frames: int) -> Tensor:
    seconds = features.samples(frames) / features.RATE
    return features.filterbank(features.read_waveform(file, seconds, start), frames=frames)


def glance(clip: Clip) -> float:
    """The file's length in seconds; raises for what can be seen without decoding the sound: missing, empty, or no sound
    file at all."""
    import soundfile

    if not clip.file.is_file():
        raise ScionError(f"{clip.file}: the table lists it, but there is no such file")
    try:
        if clip.file.stat().st_size > 0:
            info = soundfile.info(clip.file)
            seconds = info.frames / info.samplerate - clip.start
            if seconds > 0 and not features.missing_bytes(clip.file):
                return seconds
    except soundfile.LibsndfileError:
        pass
    return len(features.read_waveform(clip.file, 0.1, clip.start)) / features.RATE  # says what is wrong


LONGEST = 500
"""Most frames that a folder's clips are given where nobody asks for more: five seconds."""


def fitting(seconds: Sequence[float]) -> int:
    """Frames into which nine tenths of clips of these lengths fit, 16 to ``LONGEST``: one long file among many short
    ones should not make all of them long."""
    if not seconds:
        return LONGEST
    usual = sorted(seconds)[min(len(seconds) - 1, (len(seconds) * 9) // 10)]
    frames = -(-(round(usual * features.RATE) - features.WINDOW) // features.SHIFT) + 1
    return min(max(frames, 16), LONGEST)


@contextmanager
def _noted(bad: dict[int, str], row: int, skip_bad: bool) -> Iterator[None]:
    """What is wrong with a file goes into ``bad``, or stops all with a hint."""
    try:
        yield
    except ScionError as error:
        if not skip_bad:
            raise ScionError(f"{error} (data.skip_bad: true leaves such files out)") from None
        bad[row] = str(error)


def _store(clips: Sequence[Clip], frames: int, cache: Path) -> Path:
    """The file that keeps the filterbanks of these very clips."""
    folders: dict[Path, Path] = {}
    listing: list[Any] = []
    for clip in clips:
        folder = folders.setdefault(clip.file.parent, Path())
        if folder == Path():  # resolving each of a hundred thousand files would take seconds
            folder = folders[clip.file.parent] = clip.file.parent.resolve()
        name = str(folder / clip.file.name)
        try:
            status = clip.file.stat()
            listing.append((name, status.st_size, status.st_mtime_ns, clip.start))
        except OSError:
            listing.append(name)
    key = hashlib.sha256(json.dumps(["kaldi-2", features.RATE, features.BINS, frames, listing]).encode()).hexdigest()
    return cache / f"{key[:32]}.npy"


def stored(clips: Sequence[Clip], frames: int, cache: Path) -> bool:
    """Whether the cache holds the filterbanks of these clips."""
    store = _store(clips, frames, cache)
    return store.is_file() and store.with_suffix(".json").is_file()


def filterbanks(clips: Sequence[Clip], frames: int, cache: Path, skip_bad: bool = False,
                bad: dict[int, str] | None = None, wanted: list[int] | None = None
                ) -> tuple[np.ndarray, dict[int, str]]:
    """Filterbanks of ``clips`` [clips, frames, 128] before normalisation, from the cache or computed and put there.

    The cache's key is the settings and each file's name, size and time of change. Values are kept in half precision
    (an error of at most 0.004 in the logarithm) and stay on disk until they are asked for, while they are computed too.
    Two processes may do this at once: each writes a file of its own and the last one to rename wins, with the same
    content.

    Args:
        clips: in the order of the rows.
        frames: of each filterbank.
        cache: folder to keep them in.
        skip_bad: note unreadable files instead of raising.
        bad: files that are known to be unreadable, by row, and why.
        wanted: only these rows, unless all are there already.

    Returns:
        The banks of all rows, or of ``wanted`` in its order, and for each unreadable file its row and the reason; what
        stands in the place of such a file is zero.
    """
    bad = dict(bad or {})
    if wanted is not None and not stored(clips, frames, cache):
        known = {index: bad[row] for index, row in enumerate(wanted) if row in bad}
        banks, found = filterbanks([clips[row] for row in wanted], frames, cache, skip_bad, known)
        return banks, {wanted[index]: reason for index, reason in found.items()}
    from tqdm import tqdm

    store = _store(clips, frames, cache)
    notes = store.with_suffix(".json")
    if not (store.is_file() and notes.is_file()):
        cache.mkdir(parents=True, exist_ok=True)
        with _replaced(store) as scratch, features.one_thread():
            banks = np.lib.format.open_memmap(scratch, "w+", np.float16, (len(clips), frames, features.BINS))
            for row in tqdm(range(len(clips)), "filterbanks", unit="clip", leave=False):
                if row not in bad:
                    with _noted(bad, row, skip_bad):
                        banks[row] = _bank(clips[row].file, clips[row].start, frames).numpy()
            banks.flush()
            del banks
            with _replaced(notes) as file:
                file.write_text(json.dumps(bad))
    found = {int(row): reason for row, reason in json.loads(notes.read_text()).items()}
    for row, reason in found.items():
        with _noted({}, row, skip_bad):
            raise ScionError(reason)
    return np.load(store, mmap_mode="r"), found


@contextmanager
def _replaced(file: Path) -> Iterator[Path]:
    """Another name to write ``file`` under first, so that no one ever reads half of it."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def ordered(names: Iterable[str]) -> list[str]:
    """Names without repetition, in the order of their numbers where all of them are whole numbers, else of letters."""
    found = sorted(set(names))
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else found
