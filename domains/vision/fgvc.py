"""FGVC: five benchmarks of close kinds (birds, cars, dogs, flowers) in the splits of VPT; or a mini that is made on the
spot.

    >>> data = FGVC(dataset="cub", root="fgvc/CUB_200_2011")
    >>> data.setup()
    >>> picture, target = data.train_set[0]     # picture [3, 224, 224], normalised; target 0 .. 199

M. Jia et al., Visual Prompt Tuning, 2022, https://arxiv.org/abs/2203.12119, table 8; their lists are linked at
https://github.com/KMnP/vpt. Layout from documentation: each benchmark's pictures as its archive has them, and beside
them ``train.json``, ``val.json`` and ``test.json``, each an object of paths and labels.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from core.data import Source
from core.data.folds import folder_with
from core.data.lists import as_text, at_least_two
from core.data.sample import Parts, Sample
from core.errors import ScionError, listed, nearest
from core.files import read_text
from domains.vision.images import Augment, ImageData, Normalise, Resize

LISTS = {"train": "train.json", "validation": "val.json", "test": "test.json"}


@dataclass(frozen=True)
class Benchmark:
    """One of the five.

    Args:
        title: what it is called.
        folder: what VPT calls its folder.
        place: where in it the pictures lie that the lists name.
        classes: how many there are.
        sizes: pictures to train, to validate, to test.
        names: further spellings, in small letters and digits alone.
    """

    title: str
    folder: str
    place: str
    classes: int
    sizes: tuple[int, int, int]
    names: tuple[str, ...]


BENCHMARKS = {
    "cub": Benchmark("CUB-200-2011", "CUB_200_2011", "images", 200, (5394, 600, 5794),
                     ("cub200", "cub2002011", "cubbirds")),
    "nabirds": Benchmark("NABirds", "nabirds", "images", 555, (21536, 2393, 24633), ()),
    "flowers": Benchmark("Oxford Flowers", "OxfordFlower", "", 102, (1020, 1020, 6149),
                         ("oxfordflower", "oxfordflowers", "flowers102", "oxfordflowers102", "oxford102flowers")),
    "dogs": Benchmark("Stanford Dogs", "Stanford-dogs", "Images", 120, (10800, 1200, 8580), ("stanforddogs",)),
    "cars": Benchmark("Stanford Cars", "stanford-cars", "", 196, (7329, 815, 8041), ("stanfordcars", "cars196")),
}


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def key_of(name: str) -> str:
    """The benchmark that is meant, as ``BENCHMARKS`` calls it.

    Raises:
        ScionError: there is none of that name.
    """
    spellings = {spelling: key for key, one in BENCHMARKS.items() for spelling in (key, *one.names)}
    if _plain(name) not in spellings:
        raise ScionError(f"data.dataset: FGVC has no {name!r}{nearest(_plain(name), spellings)}; it has "
                         f"{listed(BENCHMARKS)}")
    return spellings[_plain(name)]


class FGVC(ImageData):
    """One of the five benchmarks of FGVC, in VPT's splits. The mini is ten rendered varieties of one kind.

    Classes are in the order of their labels. They are named after their folders where each has one, else by the label.

    Args:
        dataset: cub, nabirds, flowers, dogs or cars; usual spellings as CUB_200_2011 are understood. The mini is the
            same for all.
        root: the benchmark's folder, or one with the folders CUB_200_2011, nabirds, OxfordFlower, Stanford-dogs and
            stanford-cars.
        size, resize, augment, normalise and all others: see ``ImageData``; the defaults are those of SSF's runs
            (https://arxiv.org/abs/2210.08823), without their mixup and CutMix.
    """

    mini_name = "mini FGVC (ten rendered varieties of one kind)"
    obtain = "give the folder of its pictures and of VPT's lists as data.root"

    def __init__(self, dataset: str = "cub", root: str | None = None, source: Source = "auto",
                 size: int | None = None, resize: Resize = "crop", augment: Augment = "crop_flip",
                 normalise: Normalise = "inception", **common: Any) -> None:
        super().__init__(root, source, size, resize=resize, augment=augment, normalise=normalise, **common)
        self.dataset = dataset
        self.benchmark = BENCHMARKS[key_of(dataset)]
        self.title = self.benchmark.title
        self.folder = f"FGVC/{self.benchmark.folder}"

    @classmethod
    def choices(cls, argument: str, arguments: dict[str, Any]) -> list[Any]:
        if argument != "dataset":
            return super().choices(argument, arguments)
        data = cls(**arguments)
        there = data.source == "real" or data.root or os.path.isdir(data.cache / "FGVC")
        return list(BENCHMARKS) if data.source != "mini" and there else [data.dataset]

    # ------------------------------------------------------------------------------ its files

    def layout(self, root: Path) -> Path:
        own = (key_of(self.dataset), _plain(self.benchmark.folder), *self.benchmark.names)
        children = sorted(os.listdir(root)) if os.path.isdir(root) else []
        inside = [name for name in children if _plain(name) in own]
        return folder_with(root, LISTS["train"], inside, f"{self.title} and VPT's lists")

    def table(self, root: Path) -> tuple[list[Sample], list[str]]:
        lists = {which: read_list(root / name) for which, name in LISTS.items()}
        numbers = set(lists["train"].values())
        seen: dict[str, str] = {}
        for which, found in lists.items():
            for path, label in found.items():
                if label not in numbers:
                    raise ScionError(f"{root / LISTS[which]}: {path} has label {label}, which none in train.json has")
                if seen.setdefault(path, which) != which:
                    raise ScionError(f"{root / LISTS[which]}: {path} stands in {LISTS[seen[path]]} already")
        first = next(iter(lists["train"]))
        place = next((folder for folder in (root / self.benchmark.place, root) if os.path.isfile(folder / first)),
                     root / self.benchmark.place)
        pairs = {(label, as_text(Path(path).parent.name)) for found in lists.values() for path, label in found.items()}
        each = len(pairs) == len(numbers) == len({name for _, name in pairs})  # a folder for each class
        names = dict(pairs) if each else {label: str(label) for label in numbers}
        samples = [Sample(place / path, path, (names[label],), which) for which, found in lists.items()
                   for path, label in found.items()]
        return samples, at_least_two([names[label] for label in sorted(numbers)], root / LISTS["train"])

    def lister(self, sample: Sample) -> str:
        return LISTS[str(sample.group)]

    def parts(self, samples: list[Sample], bad: set[int]) -> Parts:
        return {which: [row for row, sample in enumerate(samples) if sample.group == which] for which in LISTS}

    def named(self, samples: list[Sample], classes: list[str]) -> str:
        sizes = tuple(sum(sample.group == which for sample in samples) for which in LISTS)
        whole = sizes == self.benchmark.sizes and len(classes) == self.benchmark.classes
        return "FGVC" if whole else f"{len(samples)} pictures in {self.title}'s layout"

    def fill(self, samples: list[Sample], parts: Parts, wanted: list[int] | None) -> None:
        super().fill(samples, parts, wanted)
        self.origin.update(task=self.dataset, group="FGVC")

    # ------------------------------------------------------------------------------ the mini

    def mini_classes(self) -> list[str]:
        from domains.vision import mini

        return list(mini.FINE_CLASSES)

    def mini_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        from domains.vision import mini

        return {which: mini.fine_grained(which) for which in LISTS}


def read_list(file: Path) -> dict[str, int]:
    """The paths of a list of VPT's and their labels, as they stand there.

    Raises:
        ScionError: the file is missing or no such list; names the path whose label is no whole number.
    """
    if not os.path.lexists(file):
        raise ScionError(f"data.root: no {file.name} in {file.parent} (VPT's lists are train.json, val.json and "
                         "test.json)")
    try:
        found = json.loads(read_text(file), object_pairs_hook=_once)
    except _Twice as error:
        raise ScionError(f"{file}: {error} stands there twice") from None
    except (ValueError, RecursionError) as error:
        raise ScionError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or not found:
        raise ScionError(f"{file}: an object of paths and labels wanted, as {{\"images/1.jpg\": 0}}, found "
                         f"{'an empty one' if found == {} else type(found).__name__}")
    for path, label in found.items():
        short = isinstance(label, str) and label.isdecimal() and len(label) < 20
        if isinstance(label, bool) or not (isinstance(label, int) or short):
            raise ScionError(f"{file}: the label of {path} is {repr(label)[:80]}, a whole number wanted")
    return {path: int(label) for path, label in found.items()}


class _Twice(Exception):
    """A path that a list gives two labels."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, label in pairs:
        if path in found:
            raise _Twice(path)
        found[path] = label
    return found
