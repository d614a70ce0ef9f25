"""What the audio datamodules share: a list of clips becomes filterbanks on disk, and these become three sets.

A benchmark says where its clips lie, what they are and which set they belong to; what it has in common with other
labelled files is in ``core.data.labelled``. Here are the reading of sounds, the cache of their filterbanks,
normalisation, SpecAugment and mixup (https://arxiv.org/abs/1710.09412).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data import Source, file_cache, seed_of
from core.data.labelled import LabelledData, few
from core.data.reading import naming, noted, plainly, readable
from core.data.sample import Parts, Sample
from core.errors import ScionError
from core.files import is_absent, open_regular
from core.json_types import Rule, check
from domains.audio import features


@dataclass(frozen=True)
class Clip(Sample):
    """One sound of a data set.

    Args:
        file, name, labels, group: see `Sample`.
        start: where in the file it begins, in seconds.
    """

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
        names: what people call each of the set's clips; None where they have no names.
    """

    def __init__(self, banks: Any, targets: Sequence[int | Tensor], rows: list[int], mean: float, std: float,
                 masks: tuple[int, int] | None = None, mixup: float = 0.0, classes: int = 0, seed: int = 0,
                 names: Sequence[str] | None = None) -> None:
        self.names = names
        self.banks, self.rows = banks, rows
        self.targets = [targets[row] for row in rows]
        """Of each of the set's clips."""
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
        target = self.targets[index]
        if isinstance(target, Tensor):
            return target
        weights = torch.zeros(self.classes)
        weights[target] = 1
        return weights

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        bank, target = self._bank(index), self.targets[index]
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


class State(TypedDict):
    """What a run saves of its clips."""

    frames: Annotated[int, Rule(lambda count: 16 <= count <= 360_000, "a number of frames, 16 to 360000 (an hour)")]
    mean: float
    std: Annotated[float, Rule(lambda value: value > 0, "a number above 0")]


class AudioData(LabelledData):
    """Sound files with labels as filterbanks [frames, 128], or the mini in their place.

    A subclass names its benchmark in the attributes below and defines ``layout``, ``table`` and ``parts``.

    Args:
        frames: frames of a clip (10 ms each), shorter clips padded, longer ones cut; null is what the benchmark's
            protocol has, and 112 for the mini.
        normalise: ``audioset``, the statistics that the AST checkpoints expect, or ``dataset``, those of the training
            clips.
        specaugment: mask a band and a stretch of time of each training clip.
        frequency_mask: most bins of that band.
        time_mask: most frames of that stretch at the protocol's length; less in proportion where clips are shorter.
        mixup: alpha of mixup between training clips, 0 for none. Training targets are then vectors of class weights.
        root, source, shots, skip_bad, cache, batch_size, num_workers, seed, balanced: see
            ``LabelledData``.
    """

    domain = "audio"
    samples_are, files_are, mini_is = "clips", "sound file", "ten synthetic sounds"
    suffixes = features.SUFFIXES
    length: ClassVar[int | None]
    """Frames of its protocol; None where the files decide."""

    def __init__(self, root: str | None = None, source: Source = "auto", frames: int | None = None,
                 shots: int | None = None, normalise: Literal["audioset", "dataset"] = "audioset",
                 specaugment: bool = True, frequency_mask: int = 24, time_mask: int = 80, mixup: float = 0.0,
                 **common: Any) -> None:
        super().__init__(root, source, shots, **common)
        if frames is not None and frames < 16:
            raise ScionError(f"data.frames: {frames} is too short, at least 16 (one patch) wanted")
        if mixup < 0:
            raise ScionError(f"data.mixup: {mixup} is negative; 0 switches it off")
        if frequency_mask < 0 or time_mask < 0:
            raise ScionError("data.frequency_mask and data.time_mask must not be negative; 0 switches them off")
        self.normalise: Literal["audioset", "dataset"] = normalise
        self.specaugment, self.frequency_mask, self.time_mask, self.mixup = (specaugment, frequency_mask, time_mask,
                                                                             mixup)
        self.mean, self.std = features.AUDIOSET
        self._frames = frames
        self._measured = False
        self._banks: Any = None

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
        place = self.where()
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
        with plainly():
            return features.normalise(_bank(Path(file), 0.0, self.frames), self.mean, self.std)

    def state(self) -> dict[str, Any]:
        return {"frames": self.frames, "mean": self.mean, "std": self.std}

    def load_state(self, state: dict[str, Any]) -> None:
        check(state, State, "data")
        self._frames, self.mean, self.std = state["frames"], state["mean"], state["std"]
        self._measured = True

    # ------------------------------------------------------------------------------ loading

    def mini_classes(self) -> list[str]:
        from domains.audio import mini

        return list(mini.CLASSES)

    def load_mini(self) -> None:
        from domains.audio import mini

        name = self.mini_name or f"mini (10 synthetic sounds) in the place of {self.title}"
        self.origin = {"source": "mini", "name": name}
        if self.source == "auto":
            self.origin["note"] = self.fallback
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

    def survey(self, samples: list[Clip], bad: dict[int, str]) -> None:
        seconds: list[float] = []
        frames = self._frames or self.length
        if frames is None or not stored(samples, frames, self.cache):  # what was decoded once needs no other look
            for row, clip in enumerate(samples):
                with noted(bad, row, self.skip_bad):
                    seconds.append(glance(clip))
        if frames is None:
            self._frames = fitting(seconds)

    def prepare(self, samples: list[Clip], wanted: list[int] | None, bad: dict[int, str]) -> dict[int, str]:
        self._banks, found = filterbanks(samples, self.frames, self.cache, self.skip_bad, bad, wanted)
        return found

    def fill(self, samples: list[Clip], parts: Parts, wanted: list[int] | None) -> None:
        banks = self._banks
        place = {row: index for index, row in enumerate(wanted)} if wanted is not None and len(banks) == len(wanted) \
            else {row: row for row in range(len(samples))}
        position = {name: index for index, name in enumerate(self.classes)}
        targets: list[Any] = [0] * len(banks)
        for row, index in place.items():
            labels = [position[label] for label in samples[row].labels]
            targets[index] = _marks(labels, len(self.classes)) if self.multilabel else labels[0]
        rows = {which: [place[row] for row in found] for which, found in parts.items()}
        names = {which: [_name(samples[row]) for row in found] for which, found in parts.items()}
        self._statistics(banks, rows["train"])
        self.train_set = self._clips(banks, targets, rows["train"], names["train"], train=True)
        self.validation_set = None
        if "validation" in rows:
            self.validation_set = self._clips(banks, targets, rows["validation"], names["validation"])
        self.test_set = self._clips(banks, targets, rows["test"], names["test"])

    def _statistics(self, banks: Any, rows: list[int]) -> None:
        """With ``normalise: dataset``, mean and standard deviation over the training clips, padding included."""
        if self.normalise == "dataset":
            moments = [(bank.mean(), np.square(bank).mean())  # clip by clip: together they may not fit into memory
                       for bank in (np.asarray(banks[row], dtype=np.float64) for row in rows)]
            mean, square = np.mean(moments, axis=0)
            self.mean, self.std = float(mean), float(np.sqrt(max(square - mean**2, 1e-12)))

    def _clips(self, banks: Any, targets: list[Any], rows: list[int], names: list[str] | None = None,
               train: bool = False) -> Clips:
        masks = None
        if train and self.specaugment:
            masks = self.frequency_mask, round(self.time_mask * min(self.frames / (self.length or 500), 1))
        return Clips(banks, targets, rows, self.mean, self.std, masks, self.mixup if train else 0.0,
                     len(self.classes), self.seed or 0, names)


def _marks(labels: list[int], classes: int) -> Tensor:
    """[classes], 1 at each of ``labels``."""
    marks = torch.zeros(classes)
    marks[labels] = 1
    return marks


def _name(clip: Clip) -> str:
    return f"{clip.file} from {clip.start:g} s" if clip.start else str(clip.file)


# ------------------------------------------------------------------------------------------------- files


def _bank(file: Path, start: float, frames: int) -> Tensor:
    """A clip's filterbank before normalisation [frames, 128].

    Raises:
        ScionError: names the file that cannot be read, or whose values are so large that nothing comes of them.
    """
    seconds = features.samples(frames) / features.RATE
    with naming(file):
        waveform = features.read_waveform(file, seconds, start)
        bank = features.filterbank(waveform, frames=frames)
    if not torch.isfinite(bank).all():
        raise ScionError(f"{file}: the sound file's values are too large (up to {float(waveform.abs().max()):.0e}, and "
                         "sound lies in -1 .. 1)")
    return bank


def glance(clip: Clip) -> float:
    """The file's length in seconds; raises for what can be seen without decoding the sound: missing, empty, or no sound
    file at all."""
    if is_absent(clip.file):
        raise ScionError(f"{clip.file}: the table lists it, but there is no such file")
    with features.open_sound(clip.file) as sound:
        seconds = sound.frames / sound.samplerate - clip.start
        whole = seconds > 0 and not features.missing_bytes(clip.file)
    if whole:
        return seconds
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


def _store(clips: Sequence[Clip], frames: int, cache: Path) -> Path:
    """The file that keeps the filterbanks of these very clips."""
    folders: dict[Path, str] = {}
    listing: list[Any] = []
    for clip in clips:
        folder = clip.file.parent
        if folder not in folders:  # resolving each of a hundred thousand files would take seconds
            folders[folder] = os.path.realpath(folder)
        name = os.path.join(folders[folder], clip.file.name)
        try:
            status = clip.file.stat()
            listing.append((name, status.st_size, status.st_mtime_ns, clip.start))
        except OSError:
            listing.append(name)
    key = hashlib.sha256(json.dumps(["kaldi-3", features.RATE, features.BINS, frames, listing]).encode()).hexdigest()
    return cache / f"{key[:32]}.npy"


def stored(clips: Sequence[Clip], frames: int, cache: Path) -> bool:
    """Whether the cache seems to hold the filterbanks of these clips."""
    store = _store(clips, frames, cache)
    return os.path.isfile(store) and os.path.isfile(_notes(store))


def filterbanks(clips: Sequence[Clip], frames: int, cache: Path, skip_bad: bool = False,
                bad: dict[int, str] | None = None, wanted: list[int] | None = None
                ) -> tuple[np.ndarray, dict[int, str]]:
    """Filterbanks of ``clips`` [clips, frames, 128] before normalisation, from the cache or computed and put there.

    The cache's key is the settings and each file's name, size and time of change. Values are kept in half precision
    (an error of at most 0.004 in the logarithm) and stay on disk until they are asked for; they are written one after
    the other, never mapped while the file grows, for a map on a full disk ends the process. What is in the cache is
    checked by its size and checksum, and made again where it is damaged.

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

    Raises:
        ScionError: a file cannot be read, or the cache cannot be written.
    """
    bad = dict(bad or {})
    if wanted is not None and not stored(clips, frames, cache):
        known = {index: bad[row] for index, row in enumerate(wanted) if row in bad}
        banks, found = filterbanks([clips[row] for row in wanted], frames, cache, skip_bad, known)
        return banks, {wanted[index]: reason for index, reason in found.items()}
    store = _store(clips, frames, cache)
    banks, found = file_cache.kept(store, f"filterbanks of {len(clips)} clips",
                               read=lambda: _read(store, clips, frames),
                               make=lambda: _make(store, clips, frames, skip_bad, bad))
    for row, reason in found.items():
        with noted({}, row, skip_bad):
            raise ScionError(reason)
    return banks, found


def _notes(store: Path) -> Path:
    return store.with_suffix(".json")


def _read(store: Path, clips: Sequence[Clip], frames: int) -> tuple[np.ndarray, dict[int, str]]:
    """The banks in a file of the cache and the unreadable files, checked; raises what `core.data.file_cache.kept` asks
    for."""
    if not os.path.lexists(store):
        raise FileNotFoundError(store)
    notes = file_cache.read_note(_notes(store))
    shape = (len(clips), frames, features.BINS)
    try:
        with open_regular(store) as file:
            size, checksum = 0, 0
            while block := file.read(1 << 20):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    except ScionError as error:
        raise file_cache.Damaged(str(error)) from None
    if (size, checksum) != (notes["size"], notes["crc32"]):
        raise file_cache.Damaged(f"damaged, {size} bytes of {notes['size']}" if size != notes["size"]
                             else "damaged, its checksum is another")
    banks = np.load(store, mmap_mode="r")
    if banks.shape != shape or banks.dtype != np.float16:
        raise file_cache.Damaged(f"{banks.dtype} {banks.shape} instead of float16 {shape}")
    if any(readable(clips[row].file) for row in notes["closed"]):
        raise file_cache.Damaged("files that could not be opened then can be now")
    return banks, {int(row): reason for row, reason in notes["bad"].items()}


def _make(store: Path, clips: Sequence[Clip], frames: int, skip_bad: bool, bad: dict[int, str]) -> None:
    """Compute the banks into a file of the cache, and note what was written and which files could not be read."""
    from tqdm import tqdm

    bad = dict(bad)
    shape = (len(clips), frames, features.BINS)
    file_cache.check_room(store.parent, 2 * math.prod(shape))
    size, checksum = 0, 0

    def blocks() -> Iterator[bytes]:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
        yield header.getvalue()
        for row in tqdm(range(len(clips)), "filterbanks", unit="clip", leave=False, disable=None):
            bank = np.zeros(shape[1:])
            if row not in bad:
                with noted(bad, row, skip_bad):
                    bank = _bank(clips[row].file, clips[row].start, frames).numpy()
            yield bank.astype("<f2").tobytes()

    def write(scratch: Path) -> None:
        nonlocal size, checksum
        with scratch.open("wb") as file:
            for block in blocks():
                file.write(block)
                size, checksum = size + len(block), zlib.crc32(block, checksum)

    with features.one_thread():
        file_cache.write(store, write)
    # what could not even be opened may come back unchanged: then it is tried again
    closed = [row for row in bad if not readable(clips[row].file)]
    file_cache.write_note(_notes(store), {"size": size, "crc32": checksum, "closed": closed, "bad": bad})
