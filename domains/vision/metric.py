"""Metric learning: pictures of some classes to train, of others to test by retrieval; or a mini that is made on the
spot.

    >>> data = MetricLearning(dataset="cub", root="CUB_200_2011")
    >>> data.setup()
    >>> picture, target = data.train_set[0]     # picture [3, 224, 224], normalised; target 0 .. 99
    >>> data.test_set[0][1]                     # 100 .. 199

Layouts from documentation, as the benchmarks are published:

- CUB-200-2011, http://www.vision.caltech.edu/datasets/cub_200_2011: ``images.txt``, ``image_class_labels.txt``,
  ``images/``; the first 100 classes train and the last 100 test.
- Cars-196, J. Krause et al. 2013: ``cars_annos.mat`` and ``car_ims/``, or a folder for each class; 98 and 98.
- Stanford Online Products, https://cvgl.stanford.edu/projects/lifted_struct: ``Ebay_train.txt``, ``Ebay_test.txt``.
- In-Shop Clothes Retrieval, http://mmlab.ie.cuhk.edu.hk/projects/DeepFashion.html: ``list_eval_partition.txt`` (here
  or in ``Eval/``) and ``img/`` (here or in ``Img/``).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data import ClassSampler, EpochSampler, Source, seed_of
from core.data.folds import folder_with
from core.data.lists import Numbered, as_text, ordered
from core.data.own_files import SETS
from core.data.sample import Parts, Sample
from core.errors import ScionError, listed, nearest
from core.files import open_regular, read_text
from domains.vision.images import Augment, ImageData, Normalise, Resize

ROLES = {"test": 0, "query": 1, "gallery": 2}
"""A test picture asks and can be found, only asks, or can only be found."""


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Args:
        title: what it is called.
        folder: what its archive unpacks to.
        lists: files that it can be known by, any of them.
        classes: to train and to test.
        sizes: pictures of each set.
    """

    title: str
    folder: str
    lists: tuple[str, ...]
    classes: tuple[int, int]
    sizes: dict[str, int] = field(default_factory=dict)


BENCHMARKS = {
    "cub": Benchmark("CUB-200-2011", "CUB_200_2011", ("images.txt",), (100, 100), {"train": 5864, "test": 5924}),
    "cars": Benchmark("Cars-196", "cars196", ("cars_annos.mat",), (98, 98), {"train": 8054, "test": 8131}),
    "sop": Benchmark("Stanford Online Products", "Stanford_Online_Products", ("Ebay_train.txt",), (11318, 11316),
                     {"train": 59551, "test": 60502}),
    "inshop": Benchmark("In-Shop Clothes Retrieval", "In-shop Clothes Retrieval Benchmark",
                        ("list_eval_partition.txt", "Eval/list_eval_partition.txt"), (3997, 3985),
                        {"train": 25882, "query": 14218, "gallery": 12612}),
    "folder": Benchmark("MetricLearning", "", (), (0, 0)),
}


class MetricLearning(ImageData):
    """Pictures whose test classes are none of the training classes. The mini is 20 rendered species and 20 more.

    ``classes`` are those of training, and a training target is a place among them; validation and test targets go on
    behind. Of In-Shop, a test target is int64 [2]: the class, and 1 for a query or 2 for a picture of the gallery.

    Args:
        dataset: ``cub``, ``cars``, ``sop``, ``inshop``, or ``folder``: one with a subfolder for each class (folders
            train, validation and test around them are the sets where no class is in two of them, and else no matter).
        root: the data set's folder, or the one around it; see the top of this file for what is in it.
        per_class: pictures of each class in a training batch, where they follow one another; divides ``batch_size``.
        validation_share: part of the training classes that is held out to validate, always the same ones, in [0, 1).
        test_classes: of a ``folder``: the names of the classes to test.
        test_share: of a ``folder``: the part of the classes to test where they are not named, the last by name, in
            (0, 1); null is one half, the way of CUB and Cars.
        size, resize, augment, normalise and all others: see ``ImageData``; the defaults are VPTSP's (Ren et al. 2024,
            ICLR).
    """

    mini_name = "mini retrieval (rendered species, 20 to train and 20 others to test)"
    obtain = "give the folder of the pictures as data.root"

    def __init__(self, dataset: Literal["cub", "cars", "sop", "inshop", "folder"] = "cub", root: str | None = None,
                 source: Source = "auto", per_class: int = 2, validation_share: float = 0.0,
                 test_classes: list[str] | None = None, test_share: float | None = None, size: int | None = None,
                 resize: Resize = "crop", augment: Augment = "crop_flip", normalise: Normalise = "inception",
                 **common: Any) -> None:
        super().__init__(root, source, size, resize=resize, augment=augment, normalise=normalise, **common)
        if dataset not in BENCHMARKS:
            raise ScionError(f"data.dataset: {dataset!r}{nearest(dataset, BENCHMARKS)} is none of {listed(BENCHMARKS)}")
        if per_class < 1 or self.batch_size % per_class:
            raise ScionError(f"data.per_class: {per_class} samples of a class do not divide a batch of "
                             f"{self.batch_size}")
        if self.balanced:
            raise ScionError("data.balanced: data.per_class makes the batches of these data; leave balanced out")
        if not 0 <= validation_share < 1:
            raise ScionError(f"data.validation_share: {validation_share} must lie in [0, 1)")
        if test_share is not None and not 0 < test_share < 1:
            raise ScionError(f"data.test_share: {test_share} must lie in (0, 1)")
        if dataset != "folder" and (test_classes or test_share):
            raise ScionError(f"data.{'test_classes' if test_classes else 'test_share'}: the test classes of {dataset} "
                             "are given; only those of data.dataset folder can be chosen")
        if test_classes and test_share:
            raise ScionError("data.test_share: data.test_classes names the test classes already; give one of the two")
        self.dataset, self.per_class, self.validation_share = dataset, per_class, validation_share
        self.test_classes, self.test_share = test_classes, test_share or 0.5
        self.benchmark = BENCHMARKS[dataset]
        self.title, self.folder = self.benchmark.title, self.benchmark.folder
        self.validates = validation_share > 0

    @property
    def absent(self) -> str:
        return "there is no folder of pictures" if self.dataset == "folder" else super().absent

    # ------------------------------------------------------------------------------ its files

    def layout(self, root: Path) -> Path:
        if not os.path.isdir(root):
            raise ScionError(f"data.root: no folder {root}")
        if self.dataset in ("cars", "folder"):  # folders of classes need no list
            around = root / self.folder
            return around if self.folder and os.path.isdir(around) else root
        inside = [self.folder, self.folder.replace(" ", "_"), self.folder.split()[0]]
        there = [name for name in self.benchmark.lists for folder in ("", *inside)
                 if os.path.isfile(root / folder / name)]
        return folder_with(root, (there or self.benchmark.lists)[0], inside, self.title)

    def table(self, root: Path) -> tuple[list[Sample], list[str]]:
        read = {"cub": read_cub, "sop": read_products, "inshop": read_inshop}.get(self.dataset)
        if self.dataset == "cars" and os.path.lexists(root / "cars_annos.mat"):
            read = read_cars
        samples, classes = read(root) if read else self._by_folders(root)
        groups: dict[str, set[str]] = {}
        for sample in samples:
            groups.setdefault(sample.labels[0], set()).add("test" if sample.group in ROLES else str(sample.group))
        if both := [name for name in classes if len(groups[name]) > 1]:
            raise ScionError(f"data.root: {listed(both)} in {root} is both in training and in test")
        if not any(sample.group for sample in samples):
            tested = self._tested(classes)
            groups = {name: {"test" if name in tested else "train"} for name in classes}
        trained = [name for name in classes if groups[name] == {"train"}]
        if not any(group == {"validation"} for group in groups.values()):
            for name in self._held(trained):
                groups[name] = {"validation"}
        for which, word in (("train", "training"), ("test", "test")):
            found = [name for name in classes if groups[name] == {which}]
            if len(found) < 2:
                raise ScionError(f"data.root: {root} gives {len(found)} {word} class{'' if len(found) == 1 else 'es'} "
                                 f"({listed(found)}), and two at least are wanted to tell apart")
        self._others = [name for name in classes if groups[name] != {"train"}]
        samples = [sample if sample.group in ROLES else replace(sample, group=next(iter(groups[sample.labels[0]])))
                   for sample in samples]
        return samples, [name for name in classes if groups[name] == {"train"}]

    def _tested(self, classes: list[str]) -> set[str]:
        """The test classes where the benchmark splits by classes alone."""
        for name in self.test_classes or []:
            if name not in classes:
                raise ScionError(f"data.test_classes: no class {name!r}{nearest(name, classes)}; the classes are "
                                 f"{listed(classes)}")
        return set(self.test_classes or classes[len(classes) - round(self.test_share * len(classes)):])

    def _held(self, trained: list[str]) -> list[str]:
        """The training classes that validate; a class's place in the draw depends on its name alone."""
        if not self.validation_share:
            return []
        count = max(round(self.validation_share * len(trained)), 2)
        if len(trained) - count < 2:
            raise ScionError(f"data.validation_share: {self.validation_share} of {len(trained)} training classes "
                             "leaves fewer than two to train or to validate")
        self.notes.append(f"{count} of the {len(trained)} training classes held out to validate")
        return sorted(trained, key=lambda name: seed_of("validation classes", name))[:count]

    def _by_folders(self, root: Path) -> tuple[list[Sample], list[str]]:
        tops = self.subfolders(root)
        sets = {top: SETS.get(top.name.lower()) for top in tops}
        inside = {top: self.subfolders(top) for top in tops} if tops and all(sets.values()) else {root: tops}
        held = {top: self.with_files(folders, 1) for top, folders in inside.items()}
        classes = [as_text(folder.name) for folders in held.values() for folder in folders]
        given = {"train", "test"} <= set(sets.values()) and len(set(classes)) == len(classes)
        samples = []
        for top, folders in held.items():
            for folder, files in folders.items():
                samples += [Sample(file, file.relative_to(root).as_posix(), (as_text(folder.name),),
                                   sets[top] if given else None) for file in files]
        if not samples:
            raise ScionError(f"data.root: {root} has no subfolders; wanted: one for each class"
                             f"{', or cars_annos.mat' if self.dataset == 'cars' else ''}")
        return samples, ordered(classes)

    def lister(self, sample: Sample) -> str:
        return {"sop": f"Ebay_{sample.group}.txt", "inshop": "list_eval_partition.txt", "cub": "images.txt",
                "cars": "cars_annos.mat"}.get(self.dataset, "the table")

    def parts(self, samples: list[Sample], bad: set[int]) -> Parts:
        found: Parts = {}
        for row, sample in enumerate(samples):
            found.setdefault("test" if sample.group in ROLES else str(sample.group), []).append(row)
        return found

    def named(self, samples: list[Sample], classes: list[str]) -> str:
        if self.dataset == "folder":
            name = as_text(os.path.basename(os.path.realpath(os.path.expanduser(self.root or ""))))
            return f"{name} ({len(samples)} pictures, {len(classes)} + {len(self._others)} classes)"
        sizes: dict[str, int] = {}
        for sample in samples:
            which = "train" if sample.group == "validation" else str(sample.group)
            sizes[which] = sizes.get(which, 0) + 1
        every = len(classes) + len(self._others) == sum(self.benchmark.classes)
        whole = sizes == self.benchmark.sizes and every
        return self.title if whole else f"{len(samples)} pictures in {self.title}'s layout"

    # ------------------------------------------------------------------------------ its sets

    def fill(self, samples: list[Sample], parts: Parts, wanted: list[int] | None) -> None:
        position = {name: index for index, name in enumerate([*self.classes, *self._others])}

        def target(sample: Sample) -> int | Tensor:
            label, role = position[sample.labels[0]], ROLES.get(str(sample.group), 0)
            return torch.tensor([label, role]) if role else label

        self.set_parts({which: ([samples[row].file for row in rows], [target(samples[row]) for row in rows])
                        for which, rows in parts.items()})

    def set_parts(self, parts: dict[str, tuple[Any, Sequence[int | Tensor]]]) -> None:
        super().set_parts(parts)
        self.sampler(self.train_set, train=True)  # batches that cannot be are told before anything is trained

    def sampler(self, dataset: Dataset, train: bool) -> EpochSampler:
        """In training, batches of ``per_class`` pictures of each of their classes."""
        if not train:
            return super().sampler(dataset, train)
        return ClassSampler(dataset.targets, self.batch_size, self.per_class, self.seed or 0)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------ the mini

    def mini_classes(self) -> list[str]:
        from domains.vision import mini

        names = mini.RETRIEVAL_CLASSES["train"]
        held = self._held(names)
        return [name for name in names if name not in held]

    def mini_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        from domains.vision import mini

        names = mini.RETRIEVAL_CLASSES["train"]
        (pictures, targets), (others, answers) = mini.retrieval("train"), mini.retrieval("test")
        order = [*self.classes, *(name for name in names if name not in self.classes)]
        targets = torch.tensor([order.index(name) for name in names])[targets]
        held = targets >= len(self.classes)
        found = {"train": (pictures[~held], targets[~held]), "test": (others, answers + len(names))}
        return {**found, "validation": (pictures[held], targets[held])} if self.validates else found


# ------------------------------------------------------------------------------------------------- lists


def rows_of(file: Path, columns: Sequence[str], header: int = 0) -> Iterator[tuple[int, list[str]]]:
    """The lines of a list behind its ``header`` lines, cut at blanks, with their numbers.

    Raises:
        ScionError: the file cannot be read or has no such lines; names the line that has other columns.
    """
    lines = read_text(file).splitlines()
    if not any(line.strip() for line in lines[header:]):
        raise ScionError(f"{file}: empty; lines of {listed(columns)} wanted")
    for number, line in enumerate(lines[header:], start=header + 1):
        words = line.split()
        if words and len(words) != len(columns):
            raise ScionError(f"{file}, line {number}: {listed(columns)} wanted, found {line.strip()[:80]!r}")
        if words:
            yield number, words


def _whole(word: str, where: str) -> int:
    if not word.isdecimal() or len(word) > 9:
        raise ScionError(f"{where}: {word[:80]!r} is no number of a class")
    return int(word)


def read_cub(root: Path) -> tuple[list[Sample], list[str]]:
    """CUB-200-2011's pictures, and its classes in the order of their numbers."""
    labels_file, file = root / "image_class_labels.txt", root / "images.txt"
    labels = {image: _whole(number, f"{labels_file}, line {line}")
              for line, (image, number) in rows_of(labels_file, ("image id", "class id"))}
    samples, numbers = [], Numbered(file)
    for line, (image, path) in rows_of(file, ("image id", "path")):
        if image not in labels:
            raise ScionError(f"{file}, line {line}: image {image} has no class in image_class_labels.txt")
        name = as_text(Path(path).parent.name)
        numbers.add(line, labels[image], name)
        samples.append(Sample(root / "images" / path, path, (name,)))
    return samples, numbers.order()


PACKED = 15
"""The type of an element of a MATLAB file that is packed by zlib."""
LARGEST_MAT = 64 * 2**20
"""Bytes of a MATLAB file beyond which it is not read, packed or unpacked: Cars-196's has some ten million."""


def _check_size(file: Path, stream: BinaryIO) -> None:
    """Refuse a MATLAB file that is too large, or would be when it is unpacked."""
    size = os.fstat(stream.fileno()).st_size
    stream.seek(128)  # behind the header come elements: type, length, content
    while size <= LARGEST_MAT and len(head := stream.read(8)) == 8:
        kind, length = struct.unpack("<II", head)
        if kind != PACKED:
            stream.seek(length, os.SEEK_CUR)
            continue
        unpacker, data = zlib.decompressobj(), stream.read(length)
        while data and size <= LARGEST_MAT:
            size += len(unpacker.decompress(data, 1 << 20))
            data = unpacker.unconsumed_tail
    if size > LARGEST_MAT:
        raise ScionError(f"{file}: larger than {LARGEST_MAT >> 20} MiB, which no table of pictures is")
    stream.seek(0)


def read_cars(root: Path) -> tuple[list[Sample], list[str]]:
    """The pictures that ``cars_annos.mat`` lists, and its classes in the order of their numbers."""
    file = root / "cars_annos.mat"
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ScionError(f"{file}: scipy, which reads MATLAB's files, is not installed: pip install scipy") from None
    try:
        with open_regular(file) as stream:
            _check_size(file, stream)
            table = loadmat(stream, squeeze_me=True, variable_names=["annotations", "class_names"])
        names = [str(name) for name in table["class_names"]]
        rows = [(str(row["relative_im_path"]), int(row["class"])) for row in table["annotations"]]
    except ScionError:
        raise
    except Exception as error:  # of a damaged file scipy raises whatever comes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ScionError(f"{file}: no table with annotations (relative_im_path, class) and class_names ({reason})"
                         ) from None
    samples, numbers = [], Numbered(file)
    for line, (path, number) in enumerate(rows, start=1):
        if not 1 <= number <= len(names):
            raise ScionError(f"{file}, annotation {line}: class {number} of {path} has no name; there are {len(names)}")
        numbers.add(line, number, names[number - 1])
        samples.append(Sample(root / path, path, (names[number - 1],)))
    return samples, numbers.order()


def read_products(root: Path) -> tuple[list[Sample], list[str]]:
    """Stanford Online Products' pictures by set, and its classes in the order of their numbers."""
    samples = []
    for which in ("train", "test"):
        file = root / f"Ebay_{which}.txt"
        for line, (_, number, _, path) in rows_of(file, ("image_id", "class_id", "super_class_id", "path"), header=1):
            samples.append(Sample(root / path, path, (str(_whole(number, f"{file}, line {line}")),), which))
    return samples, ordered(sample.labels[0] for sample in samples)


def read_inshop(root: Path) -> tuple[list[Sample], list[str]]:
    """In-Shop's pictures by set (train, query, gallery), and its items."""
    file = next(root / name for name in BENCHMARKS["inshop"].lists if (root / name).is_file())
    samples = []
    place: Path | None = None
    for line, (path, item, which) in rows_of(file, ("image_name", "item_id", "evaluation_status"), header=2):
        if which not in BENCHMARKS["inshop"].sizes:
            raise ScionError(f"{file}, line {line}: {which!r} is no set; train, query or gallery wanted")
        if place is None:
            place = next((folder for folder in (root, root / "Img") if os.path.isfile(folder / path)), root)
        samples.append(Sample(place / path, path, (item,), which))
    for which in BENCHMARKS["inshop"].sizes:
        if not any(sample.group == which for sample in samples):
            raise ScionError(f"{file}: no picture is in the set {which}")
    return samples, ordered(sample.labels[0] for sample in samples)
