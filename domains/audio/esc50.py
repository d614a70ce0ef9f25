"""ESC-50, environmental sound classification in five folds, with its subset ESC-10; or a mini that is made on the spot.

    >>> data = ESC50(root="ESC-50-master", fold=1)
    >>> data.setup()
    >>> bank, target = data.train_set[0]        # bank [500, 128], normalised; target 0 .. 49

K. J. Piczak, ESC: Dataset for Environmental Sound Classification, 2015, https://github.com/karolpiczak/ESC-50. Layout
from documentation: ``meta/esc50.csv`` (filename, fold, target, category, esc10, src_file, take) and ``audio/``. All
cuts of one recording lie in one fold, so folds must never be mixed. Mixup: https://arxiv.org/abs/1710.09412.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data import DataModule, Source, seed_of
from core.errors import ScionError, listed
from domains.audio import features
from domains.audio.network import reachable

ARCHIVE = "https://github.com/karolpiczak/ESC-50/archive/master.zip"
ARCHIVE_MD5 = "7771e4b9d86d0945acce719c7a59305a"
"""Of that archive as the ``soundata`` project lists it; the host makes the archive anew and promises no fixed bytes."""
FRAMES = 500
"""Frames of a clip of the benchmark: five seconds."""
CLIPS = 2000
"""Clips of the whole benchmark."""
COLUMNS = ("filename", "fold", "target", "category")


@dataclass
class Clip:
    """One row of the table: where the sound lies, its fold, and its class."""

    file: Path
    fold: int
    target: int
    category: str
    esc10: bool


class Clips(Dataset):
    """Filterbanks of chosen clips, normalised, and augmented by (seed, epoch, index) alone.

    Args:
        banks: [clips, frames, bins] before normalisation; may lie in a file.
        targets: class of each of them.
        rows: which of them are this set's.
        mean, std: of the normalisation.
        masks: SpecAugment's widest masks, (bins, frames), or None.
        mixup: alpha of Beta(alpha, alpha), or 0. With mixup a target is a vector of class weights [classes].
        classes: how many there are; only mixup asks.
        seed: of the augmentation.
    """

    def __init__(self, banks: Any, targets: list[int], rows: list[int], mean: float, std: float,
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

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        bank, target = self._bank(index), self.targets[self.rows[index]]
        if self.masks is None and not self.mixup:
            return bank, target
        generator = torch.Generator().manual_seed(seed_of(self.seed, "augment", self.epoch, index))
        answer: int | Tensor = target
        if self.mixup:
            other = int(torch.randint(len(self), (), generator=generator))
            chance = np.random.default_rng(generator.initial_seed())  # torch draws no Beta from a generator
            weight = float(chance.beta(self.mixup, self.mixup))
            bank = weight * bank + (1 - weight) * self._bank(other)
            answer = torch.zeros(self.classes)
            answer[target] += weight
            answer[self.targets[self.rows[other]]] += 1 - weight
        if self.masks is not None:
            bank = features.specaugment(bank, generator, *self.masks)
        return bank, answer


class ESC50(DataModule):
    """ESC-50 or ESC-10 by folds: three to train, one to validate, one to test.

    Args:
        root: folder with ``meta/esc50.csv`` and ``audio/``; None takes the downloaded copy, or downloads it (600 MB).
        source: see ``DataModule``.
        fold: the fold of the test set, 1 to 5. The mini, which has no folds, makes other clips for each number.
        validation_fold: ``next`` is the fold after ``fold`` (after 5 comes 1); a number; or null: four folds to train
            and none to validate.
        esc10: take only the clips that the table marks as ESC-10.
        frames: frames of a clip (10 ms each), shorter clips padded, longer ones cut; null is 500 for the benchmark and
            112 for the mini.
        normalise: ``audioset``, the statistics that the AST checkpoints expect, or ``dataset``, those of the training
            folds.
        specaugment: mask a band and a stretch of time of each training clip.
        frequency_mask: most bins of that band.
        time_mask: most frames of that stretch at 500 frames; less in proportion where clips are shorter.
        mixup: alpha of mixup between training clips, 0 for none. Training targets are then vectors of class weights.
        skip_bad: leave out unreadable files and list them in ``skipped``, instead of stopping at the first.
        cache: folder of the download and of the computed filterbanks; null is ``$SCION_CACHE`` or ``~/.cache/scion``.
        batch_size, num_workers, seed: see ``DataModule``.
    """

    def __init__(self, root: str | None = None, source: Source = "auto", fold: int = 1,
                 validation_fold: int | Literal["next"] | None = "next", esc10: bool = False,
                 frames: int | None = None, normalise: Literal["audioset", "dataset"] = "audioset",
                 specaugment: bool = True, frequency_mask: int = 24, time_mask: int = 80, mixup: float = 0.0,
                 skip_bad: bool = False, cache: str | None = None, batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None) -> None:
        super().__init__(root, source, batch_size, num_workers, seed)
        if not 1 <= fold <= 5:
            raise ScionError(f"data.fold: {fold} is not one of the folds 1 to 5")
        if validation_fold == fold:
            raise ScionError(f"data.validation_fold: {fold} is the test fold; take another, next, or null")
        if validation_fold not in (None, "next", 1, 2, 3, 4, 5):
            raise ScionError(f"data.validation_fold: {validation_fold} is not next, null or one of the folds 1 to 5")
        if frames is not None and frames < 16:
            raise ScionError(f"data.frames: {frames} is too short, at least 16 (one patch) wanted")
        if mixup < 0:
            raise ScionError(f"data.mixup: {mixup} is negative; 0 switches it off")
        if frequency_mask < 0 or time_mask < 0:
            raise ScionError("data.frequency_mask and data.time_mask must not be negative; 0 switches them off")
        self.fold, self.validation_fold, self.esc10 = fold, validation_fold, esc10
        self.normalise: Literal["audioset", "dataset"] = normalise
        self.specaugment, self.frequency_mask, self.time_mask, self.mixup = (specaugment, frequency_mask, time_mask,
                                                                             mixup)
        self.skip_bad = skip_bad
        self.cache = Path(cache or os.environ.get("SCION_CACHE") or "~/.cache/scion").expanduser() / "audio"
        self.mean, self.std = features.AUDIOSET
        self._frames = frames
        self._measured = False
        self._place: Path | Literal["mini", "download"] | None = None
        self._table: tuple[list[Clip], dict[int, str]] | None = None

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

            self._frames = mini.FRAMES if place == "mini" else FRAMES
        return self._frames

    def example(self, batch_size: int = 1) -> Tensor:
        """[batch, frames, 128], a ramp."""
        shape = (batch_size, self.frames, features.BINS)
        return torch.linspace(-1, 1, batch_size * self.frames * features.BINS).view(shape)

    def read(self, file: str | Path) -> Tensor:
        """One sound file of any rate, length and number of channels -> [frames, 128]."""
        if self.normalise == "dataset" and not self._measured:
            self.setup()
        return features.normalise(_bank(Path(file), self.frames), self.mean, self.std)

    def peek(self) -> list[str] | None:
        """The classes, from the table where one is at hand."""
        place = self._where()
        if place == "mini":
            from domains.audio import mini

            return list(mini.CLASSES)
        if place == "download":
            return [f"class {number}" for number in range(10 if self.esc10 else 50)]
        clips = [clip for clip in read_table(place) if clip.esc10 or not self.esc10]
        return list({clip.target: clip.category for clip in sorted(clips, key=lambda clip: clip.target)}.values())

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
            self._load_real(download(self.cache) if place == "download" else place)

    def _where(self) -> Path | Literal["mini", "download"]:
        """Where the clips come from, asked once."""
        if self._place is not None:
            return self._place
        ready = self.cache / "ESC-50-master"
        if self.source == "mini":
            self._place = "mini"
        elif self.root is not None:  # given explicitly: it is this or nothing
            place = _layout(self.root)
            self._table = self._look(place)
            self._place = place
        elif ready.is_dir():
            self._place = ready
        elif reachable(ARCHIVE):
            self._place = "download"
        elif self.source == "real":
            raise ScionError("data.source real: ESC-50 is not in the cache and its host does not answer; give a "
                             "data.root")
        else:
            self._place = "mini"
            warnings.warn(self._fallback, stacklevel=2)
        return self._place

    _fallback = ("data.source auto: no data.root, ESC-50 is not in the cache and its host does not answer, so this is "
                 "the built-in mini: ten synthetic sounds, not the benchmark")

    def _load_mini(self) -> None:
        from domains.audio import mini

        self.origin = {"source": "mini", "name": "mini ESC (10 synthetic sounds)"}
        if self.source == "auto":
            self.origin["note"] = self._fallback
        self.classes = list(mini.CLASSES)
        parts = {which: mini.split(which, self.fold) for which in mini.SIZES}
        parts = {which: (torch.stack([features.fit(bank, self.frames) for bank in banks])
                         if self.frames != mini.FRAMES else banks, targets.tolist())
                 for which, (banks, targets) in parts.items()}
        self._statistics(parts["train"][0])
        self.train_set, self.validation_set, self.test_set = (
            self._clips(banks, targets, list(range(len(targets))), train=which == "train")
            for which, (banks, targets) in parts.items())
        if self.validation_fold is None:
            self.validation_set = None

    def _look(self, root: Path) -> tuple[list[Clip], dict[int, str]]:
        """The wanted clips of the table, and those of them that are seen to be bad without decoding them."""
        clips = read_table(root)
        if self.esc10:
            clips = [clip for clip in clips if clip.esc10]
            if not clips:
                raise ScionError(f"data.esc10: no row of {root / 'meta' / 'esc50.csv'} is marked as ESC-10")
        bad: dict[int, str] = {}
        for row, clip in enumerate(clips):
            with _noted(bad, row, self.skip_bad):
                _glance(clip.file)
        return clips, bad

    def _load_real(self, root: Path) -> None:
        clips, bad = self._table or self._look(root)
        banks, bad = filterbanks([clip.file for clip in clips], self.frames, self.cache, self.skip_bad, bad)
        self.skipped = list(bad.values())
        # targets are ESC-50's numbers, of which a subset has holes
        names = {clip.target: clip.category for clip in sorted(clips, key=lambda clip: clip.target)}
        position = {target: index for index, target in enumerate(names)}
        targets = [position[clip.target] for clip in clips]
        self.classes = list(names.values())
        subset = "ESC-10" if len(names) == 10 and all(clip.esc10 for clip in clips) else None
        self.origin = {"source": "real", "name": subset or ("ESC-50" if len(names) == 50 else
                                                            f"{len(names)} classes in ESC-50's layout")}
        folds = sorted({clip.fold for clip in clips})
        if self.fold not in folds:
            raise ScionError(f"data.fold: {self.fold} is not among the folds of the table ({listed(folds)})")
        held = folds[(folds.index(self.fold) + 1) % len(folds)] if self.validation_fold == "next" \
            else self.validation_fold
        if held is not None and (held not in folds or held == self.fold):
            raise ScionError(f"data.validation_fold: {held} is not among the other folds of the table "
                             f"({listed(folds)})")
        parts = {"train": set(folds) - {self.fold, held}, "validation": {held}, "test": {self.fold}}
        rows = {which: [row for row, clip in enumerate(clips) if row not in bad and clip.fold in part]
                for which, part in parts.items()}
        missing = set(range(len(names))) - {targets[row] for row in rows["train"]}
        if missing:
            raise ScionError(f"data: of {len(names)} classes the training folds hold none of "
                             f"{listed(self.classes[index] for index in sorted(missing))}")
        if not rows["test"]:
            raise ScionError(f"data.fold: no readable clip in the test fold {self.fold}")
        self._statistics(banks, rows["train"])
        self.train_set = self._clips(banks, targets, rows["train"], train=True)
        self.validation_set = self._clips(banks, targets, rows["validation"]) if held is not None else None
        self.test_set = self._clips(banks, targets, rows["test"])

    def _statistics(self, banks: Any, rows: list[int] | None = None) -> None:
        """With ``normalise: dataset``, mean and standard deviation over the training clips, padding included."""
        if self.normalise == "dataset":
            rows = list(range(len(banks))) if rows is None else rows
            moments = [(bank.mean(), np.square(bank).mean())  # clip by clip: together they may not fit into memory
                       for bank in (np.asarray(banks[row], dtype=np.float64) for row in rows)]
            mean, square = np.mean(moments, axis=0)
            self.mean, self.std = float(mean), float(np.sqrt(max(square - mean**2, 1e-12)))

    def _clips(self, banks: Any, targets: list[int], rows: list[int], train: bool = False) -> Clips:
        masks = None
        if train and self.specaugment:
            masks = self.frequency_mask, round(self.time_mask * min(self.frames / FRAMES, 1))
        return Clips(banks, targets, rows, self.mean, self.std, masks, self.mixup if train else 0.0,
                     len(self.classes), self.seed or 0)


def _layout(root: Path) -> Path:
    """``root``, or the folder that the archive unpacks to inside it, checked for the layout."""
    root = root.expanduser()
    if not root.is_dir():
        raise ScionError(f"data.root: no folder {root}")
    for folder in (root, root / "ESC-50-master"):
        if (folder / "meta" / "esc50.csv").is_file():
            if not (folder / "audio").is_dir():
                raise ScionError(f"data.root: no folder audio in {folder}")
            return folder
    raise ScionError(f"data.root: no meta/esc50.csv in {root} (wanted: ESC-50's layout, meta/esc50.csv and audio/)")


def read_table(root: Path) -> list[Clip]:
    """The rows of ``meta/esc50.csv``, checked.

    Raises:
        ScionError: names the file, and the line where there is one.
    """
    file = root / "meta" / "esc50.csv"
    try:
        with file.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            rows = list(reader)
            header = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ScionError(f"{file}: cannot be read as a table ({error})") from None
    lacking = [column for column in COLUMNS if column not in header]
    if lacking:
        raise ScionError(f"{file}: {'empty' if not header else 'no column ' + listed(lacking)}; wanted are the columns "
                         f"{listed(COLUMNS)}")
    if not rows:
        raise ScionError(f"{file}: no rows below the header")
    clips, names = [], {}
    for line, row in enumerate(rows, start=2):
        try:
            clip = Clip(root / "audio" / row["filename"], int(row["fold"]), int(row["target"]), row["category"].strip(),
                        (row.get("esc10") or "").strip().lower() == "true")
        except (TypeError, ValueError, AttributeError):
            raise ScionError(f"{file}, line {line}: a file name, two whole numbers (fold, target) and a category "
                             f"wanted, found {listed(row.get(column) for column in COLUMNS)}") from None
        if names.setdefault(clip.target, clip.category) != clip.category:
            raise ScionError(f"{file}, line {line}: target {clip.target} is {clip.category!r} here and "
                             f"{names[clip.target]!r} above")
        clips.append(clip)
    if len(set(names.values())) < len(names):
        raise ScionError(f"{file}: {len(names)} targets but {len(set(names.values()))} category names")
    if len(names) < 2:
        raise ScionError(f"{file}: one class only ({listed(names.values())}), at least two wanted")
    return clips


def _bank(file: Path, frames: int) -> Tensor:
    seconds = features.samples(frames) / features.RATE
    return features.filterbank(features.read_waveform(file, seconds), frames=frames)


def _glance(file: Path) -> None:
    """Raise for what can be seen without decoding the sound: missing, empty, or no sound file at all."""
    import soundfile

    if not file.is_file():
        raise ScionError(f"{file}: the table lists it, but there is no such file")
    try:
        if file.stat().st_size > 0 and soundfile.info(file).frames > 0 and not features.missing_bytes(file):
            return
    except soundfile.LibsndfileError:
        pass
    features.read_waveform(file, seconds=0.1)  # says what is wrong


@contextmanager
def _noted(bad: dict[int, str], row: int, skip_bad: bool) -> Iterator[None]:
    """What is wrong with a file goes into ``bad``, or stops all with a hint."""
    try:
        yield
    except ScionError as error:
        if not skip_bad:
            raise ScionError(f"{error} (data.skip_bad: true leaves such files out)") from None
        bad[row] = str(error)


def filterbanks(files: list[Path], frames: int, cache: Path, skip_bad: bool = False,
                bad: dict[int, str] | None = None) -> tuple[np.ndarray, dict[int, str]]:
    """Filterbanks of ``files`` [files, frames, 128] before normalisation, from the cache or computed and put there.

    The cache's key is the settings and each file's name, size and time of change. Values are kept in half precision
    (an error of at most 0.004 in the logarithm) and stay on disk until they are asked for. Two processes may do this at
    once: each writes a file of its own and the last one to rename wins, with the same content.

    Args:
        files: in the order of the rows.
        frames: of each filterbank.
        cache: folder to keep them in.
        skip_bad: note unreadable files instead of raising.
        bad: files that are known to be unreadable, by row, and why.

    Returns:
        The banks, and for each unreadable file its row and the reason; that row is zero.
    """
    from tqdm import tqdm

    bad = dict(bad or {})
    listing = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else str(file)
               for file in files]
    key = hashlib.sha256(json.dumps(["kaldi-1", features.RATE, features.BINS, frames, listing]).encode()).hexdigest()
    store, notes = cache / f"{key[:32]}.npy", cache / f"{key[:32]}.json"
    if not (store.is_file() and notes.is_file()):
        banks = np.zeros((len(files), frames, features.BINS), dtype=np.float16)
        with features.one_thread():
            for row in tqdm(range(len(files)), "filterbanks", unit="clip", leave=False):
                if row not in bad:
                    with _noted(bad, row, skip_bad):
                        banks[row] = _bank(files[row], frames).numpy()
        cache.mkdir(parents=True, exist_ok=True)
        _replace(notes, lambda handle: handle.write(json.dumps(bad).encode()))
        _replace(store, lambda handle: np.save(handle, banks))
    found = {int(row): reason for row, reason in json.loads(notes.read_text()).items()}
    for row, reason in found.items():
        with _noted({}, row, skip_bad):
            raise ScionError(reason)
    return np.load(store, mmap_mode="r"), found


def _replace(file: Path, write: Any) -> None:
    """Write ``file`` under another name first, so that no one ever reads half of it."""
    handle = tempfile.NamedTemporaryFile(dir=file.parent, prefix=".writing-", delete=False)
    try:
        with handle:
            write(handle)
        os.replace(handle.name, file)
    except BaseException:
        Path(handle.name).unlink(missing_ok=True)
        raise


def download(cache: Path) -> Path:
    """Fetch and unpack ESC-50 into ``cache``; returns its folder. CC BY-NC 3.0, some 600 MB.

    The archive's MD5 sum is compared with the one that is known. Its host packs it anew from time to time, so another
    sum is a warning; what must hold is that the zip's own checksums are right and that it has every clip of the table.
    """
    import shutil
    import urllib.request
    import zipfile

    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        archive = Path(scratch) / "archive.zip"
        digest = hashlib.md5(usedforsecurity=False)
        try:
            with urllib.request.urlopen(ARCHIVE, timeout=30) as answer, archive.open("wb") as out, \
                    tqdm(total=int(answer.headers.get("Content-Length") or 0) or None, unit="B", unit_scale=True,
                         desc="ESC-50") as bar:
                while block := answer.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != ARCHIVE_MD5:
                warnings.warn(f"ESC-50: the archive's MD5 sum is {digest.hexdigest()}, not the known {ARCHIVE_MD5}; "
                              "its content is checked clip by clip", stacklevel=2)
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(scratch)  # checks each file's CRC
        except (OSError, zipfile.BadZipFile) as error:
            raise ScionError(f"ESC-50 could not be downloaded ({error}); fetch {ARCHIVE} and give data.root") from None
        folder = Path(scratch) / "ESC-50-master"
        clips = read_table(_layout(folder))
        absent = [clip.file.name for clip in clips if not clip.file.is_file()]
        if len(clips) != CLIPS or absent:
            raise ScionError(f"ESC-50: the download is not whole: {len(clips)} clips of {CLIPS} listed, {len(absent)} "
                             "absent")
        ready = cache / "ESC-50-master"
        if not ready.exists():  # another process may have been faster
            shutil.move(folder, ready)
    return ready
