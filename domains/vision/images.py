"""What the vision datamodules share: reading pictures, making them one size, augmenting, normalising.

A benchmark says where its pictures lie, what they are and which set they belong to; what it has in common with other
labelled files is in ``core.data.labelled``. Resizing is Pillow's, which smooths before it shrinks, and so equals
torchvision's on Pillow's pictures to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from core.data import Source, file_cache, seed_of
from core.data.labelled import LabelledData, few
from core.data.reading import naming, noted, plainly, readable
from core.data.sample import Parts, Sample
from core.errors import ScionError, listed, nearest
from core.files import is_absent, open_regular
from core.json_types import Rule, check

Resize = Literal["squash", "crop"]
Interpolation = Literal["bicubic", "bilinear"]
Augment = Literal["none", "flip", "crop_flip"]
Normalise = Literal["none", "imagenet", "inception"]

SUFFIXES = frozenset(f".{name}" for name in (
    "jpg jpeg jpe jfif png bmp gif tif tiff webp ppm pgm pbm pnm").split())
"""Endings of picture files."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What a file may be, whatever its name says. Pillow knows forty more, some of which start other programs."""
STATISTICS = {"none": ((0.0,) * 3, (1.0,) * 3), "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
              "inception": ((0.5,) * 3, (0.5,) * 3)}
"""Mean and standard deviation of each channel, of values in 0 .. 1."""
REAL_SIZE = 224
"""Pixels along each side of a real picture where nobody says otherwise."""
MOST_KEPT = 512 * 2**20
"""Bytes of resized pictures that a set may keep in memory."""
_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


# ------------------------------------------------------------------------------------------------- files


def read_picture(file: str | Path) -> Tensor:
    """A picture file as colours, uint8 [3, height, width].

    JPEG, PNG, BMP, GIF and WebP (the first frame), TIFF (the first page), PPM. Grey is tiled to three channels; 16-bit
    grey is divided by 257, so that white stays white; transparent parts lie over white; palettes and CMYK are
    converted. The orientation that a camera notes in EXIF is not applied, as the benchmarks' own loaders do not.

    Raises:
        ScionError: names the file that is missing, empty, no picture, cut short, or too large (Pillow's guard against
            decompression bombs).
    """
    with _unwarned():
        return pixels(load_picture(Path(file)))


def load_picture(file: Path) -> Image.Image:
    """``read_picture`` as Pillow's picture in mode RGB."""
    with naming(file):
        picture = _opened(file)
        try:
            with picture:
                return _coloured(picture, file)
        except (ScionError, MemoryError):
            raise
        except Exception as error:  # of a damaged picture any of Pillow's readers raises whatever comes
            raise ScionError(f"{file}: the picture is cut short or damaged ({_line(error)}); fetch it again or take it "
                             "out of the list") from None


def _opened(file: Path) -> Image.Image:
    """The file's header, checked; the pixels are not read yet."""
    try:
        with open_regular(file) as stream:  # never a pipe, for which Pillow would wait
            if os.fstat(stream.fileno()).st_size == 0:
                raise ScionError(f"{file}: the picture file is empty (0 bytes); fetch it again or take it out of the "
                                 "list")
        picture = Image.open(file, formats=FORMATS)
    except (ScionError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ScionError(_too_large(file)) from None
    except Image.UnidentifiedImageError:
        raise ScionError(f"{file}: no readable picture; JPEG, PNG, BMP, GIF, TIFF, WebP or PPM wanted") from None
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror or _line(error)})") from None
    except Exception as error:
        raise ScionError(f"{file}: no readable picture ({_line(error)})") from None
    if Image.MAX_IMAGE_PIXELS and picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
        picture.close()
        raise ScionError(_too_large(file))
    return picture


def _too_large(file: Path) -> str:
    return (f"{file}: more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels, which Pillow takes for a "
            "decompression bomb; make the picture smaller")


def _coloured(picture: Image.Image, file: Path) -> Image.Image:
    """``picture`` in mode RGB."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ScionError(f"{file}: grey values beyond 16 bits, or fractions; save the picture with 8 or 16 bits")
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without Pillow's warning of large pictures, which are refused by name, and of odd metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module="PIL")
        yield


# ------------------------------------------------------------------------------------------------- transforms


def pixels(picture: Image.Image) -> Tensor:
    """uint8 [3, height, width] of a picture in mode RGB."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def from_pixels(values: Tensor) -> Image.Image:
    """The picture of uint8 [3, height, width]."""
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class View:
    """How a picture of any size becomes an input of one size.

    Args:
        size: pixels along each side of the input.
        resize: ``squash`` sets width and height to ``size`` whatever their proportion; ``crop`` scales the shorter side
            to ``size`` x 256 / 224 and takes the centre.
        interpolation: between pixels, smoothed where the picture shrinks.
        normalise: see ``ImageData``.
    """

    size: int
    resize: Resize = "squash"
    interpolation: Interpolation = "bicubic"
    normalise: Normalise = "imagenet"

    def scaled(self, picture: Image.Image) -> Image.Image:
        """``picture`` at ``size``, nothing left to chance."""
        side, method = self.size, _RESAMPLING[self.interpolation]
        if self.resize == "squash":
            return picture if picture.size == (side, side) else picture.resize((side, side), method)
        shorter = min(picture.size)
        if max(picture.size) > 4 * shorter:  # only the middle is used: a strip must not be scaled up whole
            picture = _centre(picture, *(min(length, 4 * shorter) for length in picture.size))
        goal = math.floor(side * 256 / 224)
        width, height = (goal if length == shorter else int(goal * length / shorter) for length in picture.size)
        return _centre(picture if picture.size == (width, height) else picture.resize((width, height), method),
                       side, side)

    def scaled_part(self, picture: Image.Image, generator: torch.Generator) -> Image.Image:
        """A random part of ``picture`` at ``size``: 8 to 100 % of its area, its proportion between 3:4 and 4:3 (the
        crop of https://arxiv.org/abs/1409.4842)."""
        width, height = picture.size
        for _ in range(10):
            area, proportion = torch.rand(2, generator=generator).tolist()
            area, proportion = width * height * (0.08 + 0.92 * area), (3 / 4) * (16 / 9) ** proportion
            across, down = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
            if 0 < across <= width and 0 < down <= height:
                left = int(torch.randint(width - across + 1, (), generator=generator))
                top = int(torch.randint(height - down + 1, (), generator=generator))
                part = picture.crop((left, top, left + across, top + down))
                break
        else:  # a strip: the largest part of its middle that is allowed
            part = _centre(picture, min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3)))
        return part.resize((self.size, self.size), _RESAMPLING[self.interpolation])

    def normalised(self, values: Tensor) -> Tensor:
        """uint8 [..., 3, height, width] as float32 of the statistics that ``normalise`` names."""
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in STATISTICS[self.normalise])
        return (values / 255 - mean) / std

    def shown(self, inputs: Tensor) -> Tensor:
        """The pictures of ``inputs``, ``normalised`` undone: uint8 [..., 3, height, width]."""
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in STATISTICS[self.normalise])
        return ((inputs.detach().float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _centre(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    return picture.crop((left, top, left + width, top + height))


# ------------------------------------------------------------------------------------------------- a set


class Pictures(Dataset):
    """Pictures of one set at one size, normalised, and augmented by (seed, epoch, index) alone.

    Args:
        pictures: files, read when they are asked for, or uint8 [pictures, 3, height, width].
        targets: of each of them, a class or, with several labels, a vector [classes] of zeros and ones.
        view: how they become inputs.
        augment: ``flip`` mirrors every other picture; ``crop_flip`` also takes a random part of it.
        seed: of the augmentation.
        keep: keep resized pictures in memory where all of them fit into ``MOST_KEPT``.
        shared: keep them where loader processes see one another's; else each process keeps its own.
    """

    def __init__(self, pictures: Sequence[Path] | Tensor, targets: Sequence[int | Tensor], view: View,
                 augment: Augment = "none", seed: int = 0, keep: bool = False, shared: bool = False) -> None:
        self.pictures, self.targets, self.view = pictures, targets, view
        self.augment, self.seed, self.epoch = augment, seed, 0
        self.names = None if isinstance(pictures, Tensor) else pictures
        """What people call each picture: its file."""
        self._kept: Tensor | None = None
        shape = (len(pictures), 3, view.size, view.size)
        if keep and augment != "crop_flip" and not isinstance(pictures, Tensor) and math.prod(shape) <= MOST_KEPT:
            try:
                kept, have = torch.empty(shape, dtype=torch.uint8), torch.zeros(len(pictures), dtype=torch.bool)
                self._kept, self._have = (kept.share_memory_(), have.share_memory_()) if shared else (kept, have)
            except RuntimeError:  # little memory, or little that is shared, as in many containers: files are read again
                pass

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, index: int) -> Image.Image:
        """One picture as it lies, in mode RGB."""
        source = self.pictures[index]
        return from_pixels(source) if isinstance(source, Tensor) else load_picture(source)

    def scaled(self, index: int) -> Tensor:
        """One picture at the set's size, neither augmented nor normalised: uint8 [3, size, size]."""
        if self._kept is not None and self._have[index]:
            return self._kept[index]
        if isinstance(self.pictures, Tensor) and self.pictures.shape[2:] == (self.view.size, self.view.size) \
                and self.view.resize == "squash":
            return self.pictures[index]
        values = pixels(self.view.scaled(self.picture(index)))
        if self._kept is not None:
            self._kept[index] = values
            self._have[index] = True
        return values

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        if self.augment == "none":
            return self.view.normalised(self.scaled(index)), self.targets[index]
        generator = torch.Generator().manual_seed(seed_of(self.seed, "augment", self.epoch, index))
        values = self.scaled(index) if self.augment == "flip" else \
            pixels(self.view.scaled_part(self.picture(index), generator))
        if torch.rand((), generator=generator) < 0.5:
            values = values.flip(2)
        return self.view.normalised(values), self.targets[index]


# ------------------------------------------------------------------------------------------------- the datamodules


class State(TypedDict):
    """What a run saves of how its pictures are read."""

    size: Annotated[int, Rule(lambda side: 8 <= side <= 8192, "a number of pixels, 8 to 8192")]
    resize: Resize
    interpolation: Interpolation
    normalise: Normalise


class ImageData(LabelledData):
    """Picture files with labels as inputs [3, size, size], or the mini in their place.

    A subclass names its benchmark in the attributes of ``LabelledData``, and defines ``layout``, ``table``, ``parts``,
    ``mini_classes`` and ``mini_parts``.

    Args:
        size: pixels along each side of an input; null is 224, and 48 for the mini.
        resize: ``squash`` sets width and height to ``size`` whatever their proportion; ``crop`` scales the shorter side
            to ``size`` x 256 / 224 and takes the centre.
        interpolation: ``bicubic`` or ``bilinear``, smoothed where a picture shrinks.
        augment: of training pictures: ``none``; ``flip``, every other one mirrored; ``crop_flip``, also a random part
            of each at full size.
        normalise: ``none`` leaves values in 0 .. 1; ``imagenet`` and ``inception`` (0.5 and 0.5) are what backbones
            were pretrained with. Papers on one benchmark differ here, and so do their numbers: metrics.json has it.
        root, source, shots, skip_bad, cache, batch_size, num_workers, seed, balanced: see
            ``LabelledData``.
    """

    domain = "vision"
    samples_are, files_are, mini_is = "pictures", "picture", "rendered pictures of 48 x 48 pixels"
    suffixes = SUFFIXES

    def __init__(self, root: str | None = None, source: Source = "auto", size: int | None = None,
                 resize: Resize = "squash", interpolation: Interpolation = "bicubic", augment: Augment = "none",
                 normalise: Normalise = "imagenet", shots: int | None = None, **common: Any) -> None:
        super().__init__(root, source, shots, **common)
        if size is not None and size < 8:
            raise ScionError(f"data.size: {size} pixels are too few, at least 8 wanted")
        self._size = size
        self.resize: Resize = _one_of("resize", resize, Resize)
        self.interpolation: Interpolation = _one_of("interpolation", interpolation, Interpolation)
        self.augment: Augment = _one_of("augment", augment, Augment)
        self.normalise: Normalise = _one_of("normalise", normalise, Normalise)

    @abstractmethod
    def mini_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Pictures uint8 [n, 3, height, width] and targets int64 [n] of the mini's sets: train, test and, where the
        protocol has one, validation."""

    # ------------------------------------------------------------------------------ what the core asks

    @property
    def size(self) -> int:
        """Pixels along each side of an input; what the backbone's ``size`` has to be.

        Asked before a backbone is built, so the folder and the table are looked at here: a mistake is told at once.
        """
        if self._size is None:
            from domains.vision import mini

            self._size = mini.SIZE if self.where() == "mini" else REAL_SIZE
        return self._size

    @property
    def view(self) -> View:
        return View(self.size, self.resize, self.interpolation, self.normalise)

    def example(self, batch_size: int = 1) -> Tensor:
        """[batch, 3, size, size], a ramp."""
        return torch.linspace(-1, 1, batch_size * 3 * self.size**2).view(batch_size, 3, self.size, self.size)

    def read(self, file: str | Path) -> Tensor:
        """One picture file of any size -> [3, size, size]."""
        with plainly(), _unwarned():
            return self.view.normalised(pixels(self.view.scaled(load_picture(Path(file)))))

    def illustrate(self, inputs: Tensor) -> Tensor:
        """The pictures of a batch of inputs, uint8 [batch, 3, size, size]."""
        return self.view.shown(inputs)

    def state(self) -> dict[str, Any]:
        return {"size": self.size, "resize": self.resize, "interpolation": self.interpolation,
                "normalise": self.normalise}

    def load_state(self, state: dict[str, Any]) -> None:
        check(state, State, "data")
        self._size, self.resize, self.interpolation = state["size"], state["resize"], state["interpolation"]
        self.normalise = state["normalise"]

    # ------------------------------------------------------------------------------ loading

    def load_mini(self) -> None:
        name = self.mini_name or f"mini ({self.mini_is}) in the place of {self.title}"
        self.origin = {"source": "mini", "name": name}
        if self.source == "auto":
            self.origin["note"] = self.fallback
        self.classes = self.mini_classes()
        found = self.mini_parts()
        pictures, targets = found["train"]
        if self.shots:
            rows = few(list(range(len(targets))), list(map(str, range(len(targets)))),
                       [(self.classes[target],) for target in targets.tolist()], self.shots, self.seed or 0)
            found["train"] = pictures[rows], targets[rows]
            self.origin["name"] += f", {self.shots} training pictures a class"
        self.set_parts({which: (pictures, targets.tolist()) for which, (pictures, targets) in found.items()})

    def survey(self, samples: list[Any], bad: dict[int, str]) -> None:
        if os.path.isfile(self._verdicts(samples)):  # what was decoded once needs no other look
            return
        with _unwarned():
            for row, sample in enumerate(samples):
                with noted(bad, row, self.skip_bad):
                    if is_absent(sample.file):
                        raise ScionError(f"{sample.file}: {self.lister(sample)} lists it, but there is no such file")
                    _opened(sample.file).close()

    def lister(self, sample: Any) -> str:
        """What lists a sample, for messages."""
        return "the table"

    def prepare(self, samples: list[Any], wanted: list[int] | None, bad: dict[int, str]) -> dict[int, str]:
        """Decode each file once in its life: a picture that is cut short is told before training, not after hours."""
        rows = wanted if wanted is not None else list(range(len(samples)))
        store, whole = self._verdicts([samples[row] for row in rows]), self._verdicts(samples)
        if os.path.isfile(whole) and not os.path.isfile(store):
            store, rows = whole, list(range(len(samples)))
        files = [samples[row].file for row in rows]
        known = {index: bad[row] for index, row in enumerate(rows) if row in bad}
        found = file_cache.kept(store, f"verdicts on {len(files)} pictures", lambda: _recall(store, files),
                            lambda: _judge(store, files, known, self.skip_bad))
        for reason in found.values():
            with noted({}, 0, self.skip_bad):
                raise ScionError(reason)
        return {rows[index]: reason for index, reason in found.items()}

    def _verdicts(self, samples: Sequence[Any]) -> Path:
        """The file that says which of these very files cannot be read."""
        folders: dict[Path, str] = {}
        listing: list[Any] = []
        for sample in samples:
            file: Path = sample.file
            if file.parent not in folders:  # resolving each of a hundred thousand files would take seconds
                folders[file.parent] = os.path.realpath(file.parent)
            try:
                status = file.stat()
                listing.append((folders[file.parent], file.name, status.st_size, status.st_mtime_ns))
            except OSError:
                listing.append((folders[file.parent], file.name))
        key = hashlib.sha256(json.dumps(["pictures-2", listing]).encode()).hexdigest()
        return self.cache / f"{key[:32]}.json"

    def fill(self, samples: list[Any], parts: Parts, wanted: list[int] | None) -> None:
        position = {name: index for index, name in enumerate(self.classes)}

        def target(sample: Sample) -> int | Tensor:
            labels = [position[label] for label in sample.labels]
            if not self.multilabel:
                return labels[0]
            marks = torch.zeros(len(self.classes))
            marks[labels] = 1
            return marks

        self.set_parts({which: ([samples[row].file for row in rows], [target(samples[row]) for row in rows])
                        for which, rows in parts.items()})

    def set_parts(self, parts: dict[str, tuple[Any, Sequence[int | Tensor]]]) -> None:
        """Make the sets of (pictures, targets), and put into ``origin`` what has been done to the pictures."""
        self.origin.update(input=f"{self.size} x {self.size}, {self.resize}, {self.interpolation}",
                           normalise=self.normalise)
        made = {which: self.pictures(*part, train=which == "train", keep=which != "test")  # the test set is read once
                for which, part in parts.items()}
        self.train_set = made["train"]
        self.validation_set = made.get("validation")
        self.test_set = made.get("test")

    def pictures(self, pictures: Sequence[Path] | Tensor, targets: Sequence[int | Tensor], train: bool = False,
                 keep: bool = False) -> Pictures:
        """One set of this datamodule's pictures."""
        return Pictures(pictures, targets, self.view, self.augment if train else "none", self.seed or 0, keep,
                        self.num_workers > 0)


def _one_of(option: str, value: str, known: Any) -> Any:
    if value not in get_args(known):
        raise ScionError(f"data.{option}: {value!r}{nearest(value, get_args(known))} is none of "
                         f"{listed(get_args(known))}")
    return value


def _recall(store: Path, files: list[Path]) -> dict[int, str]:
    """Which files cannot be read and why, from the cache; raises what ``core.data.file_cache.kept`` asks for."""
    note = file_cache.read_note(store)
    if any(readable(files[index]) for index in note["closed"]):
        raise file_cache.Damaged("files that could not be opened then can be now")
    return {int(index): reason for index, reason in note["bad"].items()}


def _judge(store: Path, files: list[Path], bad: dict[int, str], skip_bad: bool) -> None:
    """Decode all files but those that are known to be bad, and note in the cache which cannot be read."""
    from tqdm import tqdm

    bad = dict(bad)
    left = [index for index in range(len(files)) if index not in bad]
    bar = tqdm(total=len(left), desc="looking at pictures", unit="picture", leave=False, delay=1, disable=None)
    with _unwarned(), ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(left), 256):
            chunk = left[start:start + 256]
            for index, reason in zip(chunk, pool.map(_verdict, [files[index] for index in chunk]), strict=True):
                bar.update()
                if reason:
                    with noted(bad, index, skip_bad):
                        raise ScionError(reason)
    # what could not even be opened may come back unchanged: then it is looked at again
    closed = [index for index in bad if not readable(files[index])]
    file_cache.write_note(store, {"closed": closed, "bad": bad})


def _verdict(file: Path) -> str:
    try:
        load_picture(file)
    except ScionError as error:
        return str(error)
    return ""
