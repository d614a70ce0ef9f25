"""What every datamodule shares: its public face.

The order of its batches survives an interruption exactly (`core.data.samplers`, `core.data.loader`). Random
augmentation must be a function of (seed, epoch, index) in the same way: a dataset that augments defines ``set_epoch``.
"""

from __future__ import annotations

import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from core.data.batch import Inputs, stack
from core.data.info import DataInfo
from core.data.loader import EpochLoader as EpochLoader
from core.data.samplers import BalancedSampler, LengthSampler
from core.data.samplers import ClassSampler as ClassSampler
from core.data.samplers import EpochSampler as EpochSampler
from core.data.samplers import Share as Share
from core.data.targets import class_numbers, lengths_of
from core.errors import ScionError
from core.files import check_regular
from core.random_state import seed_of as seed_of
from core.record import Recorded

Source = Literal["auto", "real", "mini"]


def bounded(lines: list[str], most: int) -> list[str]:
    """``lines``, or the first ``most`` of them and how many more there are."""
    more = len(lines) - most
    if more <= 0:
        return list(lines)
    return [*lines[:most], f"... and {more} more"]


@rank_zero_only
def _tell_skipped(skipped: list[str]) -> None:
    """Name the files that are left out: a few on the screen, more in the run's log."""
    for line in bounded(skipped, 10):
        text = line if line.startswith("...") else f"skipped {line}"
        print(text, file=sys.stderr)
    for line in bounded(skipped, 1000):
        logging.getLogger("scion.data").info("skipped %s", line)


class DataDeclarations:
    """What a datamodule says of its data once they are loaded."""

    classes: list[str]
    """Class names; a target is a position in this list."""
    origin: dict[str, str]
    """``{"source": "real" | "mini", "name": ...}``: what the numbers were measured on. Of one task of a suite also
    ``task`` and ``group``: tables of all tasks then have the groups' means."""
    skipped: list[str]
    """Files left out, each with the reason."""
    multilabel: bool = False

    train_set: Dataset
    validation_set: Dataset | None = None
    test_set: Dataset | None = None
    batch_size: int
    num_workers: int
    seed: int | None
    balanced: bool
    length_groups: int | None


class Loaders(DataDeclarations, LightningDataModule):
    """The loaders of the sets, in the house's order."""

    @property
    def test_sets(self) -> Mapping[str, Dataset]:
        """The test sets by name, each measured apart; here the nameless one, if there is any."""
        return {} if self.test_set is None else {"": self.test_set}

    def sampler(self, dataset: Dataset, train: bool) -> EpochSampler:
        """The order of an epoch: shuffled by (seed, epoch) for training, as the data lie otherwise; balanced or by
        length where that is asked for."""
        seed = self.seed or 0
        if self.balanced and train:
            return BalancedSampler(class_numbers(dataset, "data.balanced"), seed)
        if self.length_groups is not None:
            return LengthSampler(lengths_of(dataset), self.length_groups, train, seed)
        return EpochSampler(len(dataset), shuffle=train, seed=seed)  # type: ignore[arg-type]

    def collate(self, train: bool) -> Callable[[list[Any]], Any] | None:
        """The function that makes a batch (inputs, targets), each a tensor or a mapping of tensors, of samples: of
        training, or of validation and test. None stacks tensors, which have one shape then; padding belongs here."""
        return self.collate_train() if train else None

    def collate_train(self) -> Callable[[list[Any]], Any] | None:
        """The function that makes a training batch, where only that differs (mixup); None stacks the samples."""
        return None

    def loader(self, dataset: Dataset, train: bool) -> EpochLoader:
        """A loader in the house's order, that of ``sampler``."""
        sampler = self.sampler(dataset, train)
        if self.trainer is not None:  # one of a single process may follow one of several in the same program
            where = self.trainer.distributed_sampler_kwargs or {}
            sampler.process = where.get("rank", 0), where.get("num_replicas", 1)
        if train and hasattr(dataset, "set_epoch"):
            sampler.listeners.append(dataset.set_epoch)  # type: ignore[attr-defined]
        # without one of its own a DataLoader draws its workers' seed from the global random state
        generator = torch.Generator().manual_seed(self.seed or 0)
        return EpochLoader(dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers,
                           collate_fn=self.collate(train), generator=generator)

    def train_dataloader(self) -> EpochLoader:
        return self.loader(self.train_set, train=True)

    def val_dataloader(self) -> EpochLoader | list:
        if self.validation_set is None:
            return []
        return self.loader(self.validation_set, train=False)

    def test_dataloader(self) -> EpochLoader | list:
        sets = dict(self.test_sets)
        check_names(sets)
        loaders = [self.loader(dataset, train=False) for dataset in sets.values()]
        return loaders[0] if list(sets) == [""] else loaders


class DataModule(Recorded, Loaders, ABC):
    """A benchmark, or its mini.

    A subclass defines ``load``, which sets ``train_set``, ``validation_set`` (None where the protocol has none),
    ``test_set`` (None where nothing is to be tested: settings are searched) and ``classes``, and ``read`` and
    ``example``. An item is ``(input, target)``, each a tensor or a mapping of tensors. Data with several test sets
    define ``test_sets``, data with other targets than classes ``info``.

    Args:
        root: folder of the data in its published layout; None looks into the cache.
        source: ``real`` demands the benchmark, ``mini`` the generated stand-in; ``auto`` takes the benchmark where it
            can be had and otherwise the mini, with a warning.
        batch_size: samples a step, in each process.
        num_workers: loader processes; results do not depend on it.
        seed: of order and augmentation. None takes the run's ``seed_everything``.
        balanced: in training, every class equally often (`core.data.BalancedSampler`).
        length_groups: batches that are sorted by length together, 50 for one (`core.data.LengthSampler`); validation
            and test are sorted as a whole. The data sets say how long their samples are, as ``lengths``. None leaves
            lengths out of account.
    """

    def __init__(self, root: str | None = None, source: Source = "auto", batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None, balanced: bool = False, length_groups: int | None = None) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0),
                                   ("length_groups", length_groups, 1)):
            if value is not None and value < least:
                raise ScionError(f"data.{name}: {value} must be at least {least}")
        if balanced and length_groups is not None:
            raise ScionError("data.balanced: batches are made either of all classes equally often or by length; leave "
                             "one of data.balanced and data.length_groups out")
        self.root = Path(root) if root is not None else None
        self.source: Source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.balanced = balanced
        self.length_groups = length_groups
        self.skipped = []
        self.is_loaded = False

    @abstractmethod
    def load(self) -> None:
        """Read the benchmark (or make the mini) and set the datasets, ``classes`` and ``origin``."""

    @abstractmethod
    def example(self, batch_size: int = 1) -> Inputs:
        """Inputs of the shape that a batch has, made without reading a file: for counting costs."""

    @abstractmethod
    def read(self, file: str | Path) -> Inputs:
        """One file as one input, prepared as the test set's are. Bad files raise ``ScionError`` with their name."""

    @property
    def info(self) -> DataInfo:
        """What a task must know of the data: here the classes, as far as they are known yet."""
        classes = getattr(self, "classes", None)
        if classes is None:
            classes = self.peek() or ()
        return DataInfo(tuple(classes), self.multilabel)

    def bind(self, backbone: Any) -> None:
        """Take from the backbone what its inputs are made with (a tokenizer). Called before ``setup`` and ``read``."""

    def entries(self, file: str) -> list[tuple[str, Callable[[], Inputs]]]:
        """The samples that a file holds for prediction, by name, each with what reads it: here one. Text has one a
        line. What is wrong with one sample is told when it is read."""
        def make() -> Inputs:
            check_regular(file)
            return self.read(file)

        return [(file, make)]

    def stack(self, inputs: Sequence[Inputs]) -> Inputs:
        """A batch of inputs as ``read`` gives them."""
        return stack(inputs)

    def peek(self) -> list[str] | None:
        """The classes, if they can be named without reading samples; None otherwise."""
        return None

    @property
    def listing(self) -> str:
        """A short hash of what the data are, known when they are loaded: the same on another machine, another one where
        samples came, went or changed. Here it is of the data's name, the classes and the sizes of the sets."""
        import hashlib
        import json

        origin = {key: value for key, value in self.origin.items() if key != "note"}
        sizes = []
        for which in ("train", "validation", "test"):
            dataset = getattr(self, f"{which}_set", None)
            sizes.append(len(dataset) if isinstance(dataset, Sized) else None)
        known: list[Any] = [origin, list(self.info.classes), sizes]
        if list(self.test_sets) not in ([], [""]):
            named = {name: len(dataset) for name, dataset in self.test_sets.items()}  # type: ignore[arg-type]
            known.append(named)
        text = json.dumps(known)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def name_of(self, dataset: Dataset, index: int) -> str:
        """What people call a sample of one of the sets: its file, where the dataset has ``names``, else its number."""
        names = getattr(dataset, "names", None)
        return str(names[index]) if names is not None else f"sample {index}"

    def state(self) -> dict[str, Any]:
        """What ``read`` needs to know of the training data (lengths, statistics), as JSON; a run keeps it."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Make ``read`` work as in the run that saved ``state``, without the data."""

    @classmethod
    def choices(cls, argument: str, arguments: dict[str, Any]) -> list[Any]:
        """What ``all`` stands for as a value of ``argument``, given the others: ``--over data.task=all``."""
        raise ScionError(f"--over data.{argument}=all: {cls.__name__} does not say what all of them are; list them")

    def illustrate(self, inputs: Any) -> Tensor | None:
        """Pictures of a batch of inputs for people to look at, uint8 [batch, 3, height, width]; None where there is
        nothing to see."""
        return None

    def text_of(self, dataset: Any, index: int) -> str | None:
        """A sample of one of the sets in words, for people to read; None where there is nothing to read."""
        return None

    def files(self, folder: Path) -> list[Path]:
        """The files below ``folder`` that ``read`` may be asked for: all that are not hidden."""
        found = []
        for file in sorted(folder.rglob("*")):
            # hidden below ``folder``; the folder itself may lie in a hidden one
            is_hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.is_file() and not is_hidden:
                found.append(file)
        return found

    def setup(self, stage: str | None = None) -> None:
        if not self.is_loaded:
            self.load()
            self.is_loaded = True
            _tell_skipped(self.skipped)


def check_names(sets: Iterable[str]) -> None:
    """Refuse names of test sets that could not stand in the name of a metric."""
    names = list(sets)
    for name in names:
        if name and re.fullmatch(r"[A-Za-z0-9_-]+", name):
            continue
        if name or len(names) > 1:
            raise ScionError(f"data: a test set is called {name!r}; of several each needs a name of letters, digits, "
                             "'-' and '_'")
