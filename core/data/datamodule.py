"""What every datamodule shares: its public face, and loaders whose order survives an interruption exactly.

Lightning's checkpoints hold neither random states nor a position in the data. Here the order of an epoch is a function
of (seed, epoch) alone and a loader knows how many batches of it were handed out, so a resumed run sees the batches that
the unbroken run would have seen. Several processes share that order, and read together what one would read. Random
augmentation must be a function of (seed, epoch, index) in the same way: a dataset that augments defines ``set_epoch``.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from core.data.batch import Inputs, stack
from core.data.info import DataInfo
from core.errors import ScionError
from core.random_state import seed_of as seed_of
from core.record import Recorded

Source = Literal["auto", "real", "mini"]


@dataclass(frozen=True)
class Share:
    """What one process has of a joint batch, which all processes read together."""

    own: int
    """Samples of the joint batch that are this process's; with none it reads one that does not count."""
    joint: int
    """Samples of the joint batch."""
    processes: int

    @property
    def weight(self) -> float:
        """What the mean loss of the own samples is multiplied by, so that the mean of this product over all processes
        is the mean loss of the joint batch."""
        return self.own * self.processes / self.joint


class EpochSampler(DistributedSampler):
    """Indices of one epoch, shuffled by (seed, epoch); after a resume in mid-epoch the first ``skip`` are left out.

    Lightning calls ``set_epoch`` at each epoch's start. Several processes take turns in one order: process r of n reads
    its samples r, r + n, r + 2 n, ..., so that their batches together are those of one process with the joint batch,
    the last short one included. All read the same number of batches: where the last one has fewer samples than there
    are processes, those without one read a sample twice, and `share` says so.

    Being a ``DistributedSampler`` by name only, it is not wrapped by Lightning, which would shuffle once more and
    repeat samples without saying which.
    """

    def __init__(self, size: int, shuffle: bool, seed: int) -> None:
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.epoch = 0
        self.batch_size = 1
        """Samples of a batch in each process; a loader sets its own."""
        self.process: tuple[int, int] | None = None
        """This process's number, and how many there are; None asks torch."""
        self.resumed: tuple[int, int] = (-1, 0)
        """(epoch, samples of it that this process was handed out before the interruption)."""
        self.listeners: list[Callable[[int], None]] = []

    @property
    def skip(self) -> int:
        """Samples to leave out of the present epoch."""
        epoch, samples = self.resumed
        return samples if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        for listener in self.listeners:
            listener(epoch)

    def processes(self) -> tuple[int, int]:
        """This process's number, and how many there are."""
        if self.process is not None:
            return self.process
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def order(self) -> list[int]:
        """The indices of the present epoch, of all processes together."""
        if not self.shuffle:
            return list(range(self.size))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch))
        return torch.randperm(self.size, generator=generator).tolist()

    def own(self) -> list[int]:
        """The indices that this process reads in the present epoch."""
        rank, processes = self.processes()
        order = self.order()
        mine = order[rank::processes]
        # with fewer samples than processes one has none, and reads another's
        repeated = mine or order
        return mine + repeated[-1:] * (len(self) - len(mine))

    def share(self, batch: int) -> Share:
        """What this process has of the joint batch with this number in the epoch."""
        rank, processes = self.processes()
        whole = self.batch_size * processes
        joint = min(whole, self.size - batch * whole)
        return Share(len(range(rank, joint, processes)), joint, processes)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own()[self.skip:])

    def __len__(self) -> int:
        rank, processes = self.processes()
        mine = len(range(rank, self.size, processes))
        batches = math.ceil(self.size / (self.batch_size * processes))
        return mine + (math.ceil(mine / self.batch_size) < batches)


class ClassSampler(EpochSampler):
    """Batches of ``batch_size // per_class`` different classes, each with ``per_class`` samples in a row.

    The order of an epoch is a function of (seed, epoch). It has ``samples // batch_size`` batches, at least one; under
    several processes each reads whole batches of its own, as many as the others. Classes come up in proportion to their
    sizes and a class's samples in shuffled rounds, so that all samples are used about equally often (a class that would
    have to come up twice in a batch, less). A class of fewer than ``per_class`` samples repeats them.

    Args:
        targets: the class of each sample, any whole numbers.
        batch_size: samples of a batch, in each process.
        per_class: samples of a class in a batch.
        seed: of the order.

    Raises:
        ScionError: ``per_class`` does not divide ``batch_size``, or there are fewer classes than a batch takes.
    """

    def __init__(self, targets: Sequence[int], batch_size: int, per_class: int, seed: int) -> None:
        super().__init__(len(targets), shuffle=True, seed=seed)
        members: dict[int, list[int]] = {}
        for index, target in enumerate(targets):
            members.setdefault(int(target), []).append(index)
        if per_class < 1 or batch_size % per_class:
            raise ScionError(f"data.per_class: {per_class} samples of a class do not divide a batch of {batch_size}")
        if batch_size // per_class > len(members):
            raise ScionError(f"data.batch_size: {batch_size} samples, {per_class} of each class, take "
                             f"{batch_size // per_class} classes, and the training set has {len(members)}; at most "
                             f"{len(members) * per_class} can be")
        self.batch_size = batch_size
        self.per_class = per_class
        self.members = [members[target] for target in sorted(members)]

    def order(self) -> list[int]:
        """The indices that this process reads in the present epoch."""
        rank, world = self.processes()
        generator = torch.Generator().manual_seed(seed_of(self.seed, "classes", self.epoch))
        classes = self.batch_size // self.per_class
        rates = self._rates(classes)
        credit = torch.zeros(len(rates), dtype=torch.float64)
        pools: list[list[int]] = [[] for _ in self.members]
        found: list[int] = []
        for batch in range(len(self) // self.batch_size * world):
            credit += rates
            # the classes that are due; the chance added lets different ones meet in every round
            due = credit + torch.rand(len(rates), generator=generator, dtype=torch.float64)
            chosen = due.masked_fill(rates >= 1, torch.inf).topk(classes).indices
            credit[chosen] -= 1
            for number in chosen.tolist():
                taken = self._take(pools[number], self.members[number], generator)
                if batch % world == rank:
                    found += taken
        return found

    def _rates(self, most: int) -> Tensor:
        """How often each class comes up in a batch of ``most`` classes, at most 1: in proportion to its samples."""
        sizes = torch.tensor([len(rows) for rows in self.members], dtype=torch.float64)
        always = torch.zeros(len(sizes), dtype=torch.bool)
        while True:
            # the classes that are in every batch leave the other places to the others
            places = most - int(always.sum())
            rates = torch.where(always, 1.0, sizes * places / sizes[~always].sum())
            if always.all() or not (rates > 1).any():
                return rates
            always |= rates >= 1

    def _take(self, pool: list[int], rows: list[int], generator: torch.Generator) -> list[int]:
        """``per_class`` samples off the pool, into which ``rows`` come again, shuffled, when it runs out."""
        while len(pool) < self.per_class:
            order = torch.randperm(len(rows), generator=generator).tolist()
            fresh = [rows[index] for index in order]
            pool += sorted(fresh, key=set(pool).__contains__)  # no sample twice in one batch while there are others
        taken = pool[:self.per_class]
        del pool[:self.per_class]
        return taken

    def own(self) -> list[int]:
        return self.order()

    def share(self, batch: int) -> Share:
        _, world = self.processes()
        return Share(self.batch_size, self.batch_size * world, world)

    def __len__(self) -> int:
        _, world = self.processes()
        return max(self.size // (self.batch_size * world), 1) * self.batch_size


class EpochLoader(DataLoader):
    """A DataLoader that Lightning saves and restores in mid-epoch: its state is the number of batches handed out."""

    given = 0

    @property
    def epoch_sampler(self) -> EpochSampler | None:
        """The house's sampler, where it is in use."""
        if not isinstance(self.sampler, EpochSampler):
            return None
        self.sampler.batch_size = self.batch_size or 1
        return self.sampler

    def __len__(self) -> int:
        _ = self.epoch_sampler  # which knows how many samples there are once it knows the size of a batch
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order = self.epoch_sampler
        self.given = order.skip // order.batch_size if order else 0
        try:
            for batch in super().__iter__():
                self.given += 1
                yield batch
        except ScionError as error:  # a loader process has put its traceback before the one line
            raise ScionError(str(error).rpartition("ScionError: ")[2].strip()) from error

    def state_dict(self) -> dict[str, int]:
        order = self.epoch_sampler
        return {"epoch": order.epoch if order else 0, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        order = self.epoch_sampler
        if order:
            order.resumed = (state["epoch"], state["given"] * order.batch_size)

    def indices(self, batch: int) -> list[int]:
        """Where in the dataset the samples of a batch of the present epoch stand; empty where the order is unknown."""
        order = self.epoch_sampler
        if order is None:
            return []
        start = batch * order.batch_size
        return order.own()[start:start + order.batch_size]


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


class DataModule(Recorded, LightningDataModule, ABC):
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
    """

    classes: list[str]
    """Class names; a target is a position in this list."""
    origin: dict[str, str]
    """``{"source": "real" | "mini", "name": ...}``: what the numbers were measured on. Of one task of a suite also
    ``task`` and ``group``: tables of all tasks then have the groups' means."""
    skipped: list[str]
    """Files left out, each with the reason."""
    multilabel: bool = False

    train_set: Dataset
    validation_set: Dataset | None
    test_set: Dataset | None

    def __init__(self, root: str | None = None, source: Source = "auto", batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("seed", seed, 0)):
            if value is not None and value < least:
                raise ScionError(f"data.{name}: {value} must be at least {least}")
        self.root = Path(root) if root is not None else None
        self.source: Source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
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

    @property
    def test_sets(self) -> Mapping[str, Dataset]:
        """The test sets by name, each measured apart; here the nameless one, if there is any."""
        return {} if self.test_set is None else {"": self.test_set}

    def bind(self, backbone: Any) -> None:
        """Take from the backbone what its inputs are made with (a tokenizer). Called before ``setup`` and ``read``."""

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
        text = json.dumps([origin, self.classes, sizes])
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

    def sampler(self, dataset: Dataset, train: bool) -> EpochSampler:
        """The order of an epoch: shuffled by (seed, epoch) for training, as the data lie otherwise."""
        return EpochSampler(len(dataset), shuffle=train, seed=self.seed or 0)  # type: ignore[arg-type]

    def collate_train(self) -> Callable[[list[Any]], Any] | None:
        """The function that makes a training batch (mixup belongs here); None stacks the samples."""
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

    def loader(self, dataset: Dataset, train: bool) -> EpochLoader:
        """A loader in the house's order, that of ``sampler``."""
        sampler = self.sampler(dataset, train)
        if self.trainer is not None:  # one of a single process may follow one of several in the same program
            where = self.trainer.distributed_sampler_kwargs or {}
            sampler.process = where.get("rank", 0), where.get("num_replicas", 1)
        if train and hasattr(dataset, "set_epoch"):
            sampler.listeners.append(dataset.set_epoch)  # type: ignore[attr-defined]
        collate = self.collate_train() if train else None
        # without one of its own a DataLoader draws its workers' seed from the global random state
        generator = torch.Generator().manual_seed(self.seed or 0)
        return EpochLoader(dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers,
                           collate_fn=collate, generator=generator)

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


def check_names(sets: Iterable[str]) -> None:
    """Refuse names of test sets that could not stand in the name of a metric."""
    names = list(sets)
    for name in names:
        if name and re.fullmatch(r"[A-Za-z0-9_-]+", name):
            continue
        if name or len(names) > 1:
            raise ScionError(f"data: a test set is called {name!r}; of several each needs a name of letters, digits, "
                             "'-' and '_'")
