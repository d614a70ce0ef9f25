"""The order of an epoch: a function of (seed, epoch) alone, shared by several processes.

Lightning's checkpoints hold neither random states nor a position in the data. Here the order of an epoch is a function
of (seed, epoch) alone, so a resumed run sees the batches that the unbroken run would have seen. Several processes share
that order, and read together what one would read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from core.errors import ScionError
from core.random_state import seed_of


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
        members = _members_by_class(targets)
        if per_class < 1 or batch_size % per_class:
            raise ScionError(f"data.per_class: {per_class} samples of a class do not divide a batch of {batch_size}")
        if batch_size // per_class > len(members):
            raise ScionError(f"data.batch_size: {batch_size} samples, {per_class} of each class, take "
                             f"{batch_size // per_class} classes, and the training set has {len(members)}; at most "
                             f"{len(members) * per_class} can be")
        self.batch_size = batch_size
        self.per_class = per_class
        self.members = list(members.values())

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


class LengthSampler(EpochSampler):
    """Batches of samples of about the same length, so that little of a batch is padding.

    In training the samples are shuffled by (seed, epoch), sorted by length within groups of ``groups`` joint batches,
    and the batches are shuffled again. The short batch of an epoch comes last, as everywhere; its lengths are those of
    a random place of the last group, for else it would hold the longest samples of a group in every epoch. Otherwise
    the order is from the longest sample to the shortest: a batch that needs too much memory is then the first one.

    Args:
        lengths: of each sample, in any unit (tokens, frames).
        groups: joint batches that are sorted together.
        shuffle: whether this is an order for training.
        seed: of the order.

    Raises:
        ScionError: ``groups`` is less than 1.
    """

    def __init__(self, lengths: Sequence[int], groups: int, shuffle: bool, seed: int) -> None:
        super().__init__(len(lengths), shuffle, seed)
        if groups < 1:
            raise ScionError(f"data.length_groups: {groups} batches in a group must be at least 1")
        self.lengths = [int(length) for length in lengths]
        self.groups = groups

    def order(self) -> list[int]:
        shuffled = super().order()
        if not self.shuffle:
            return sorted(shuffled, key=lambda index: -self.lengths[index])
        generator = torch.Generator().manual_seed(seed_of(self.seed, "lengths", self.epoch))
        # Cut by joint batches, the order is the same for any number of processes that share one.
        joint = self.batch_size * self.processes()[1]
        batches: list[list[int]] = []
        short: list[int] = []
        for start in range(0, self.size, joint * self.groups):
            group = shuffled[start:start + joint * self.groups]
            group.sort(key=self.lengths.__getitem__)
            whole, rest = divmod(len(group), joint)
            if rest:  # in the last group only
                place = joint * int(torch.randint(whole + 1, (), generator=generator))
                short = group[place:place + rest]
                del group[place:place + rest]
            batches += [group[at:at + joint] for at in range(0, len(group), joint)]
        places = torch.randperm(len(batches), generator=generator).tolist()
        mixed = [batches[place] for place in places]
        return [*chain.from_iterable(mixed), *short]


class BalancedSampler(EpochSampler):
    """Every class equally often, whatever the sizes of the classes; an epoch has as many samples as the data.

    The order is a function of (seed, epoch). Of ``samples / classes`` draws of a class each takes a sample of its own
    as long as there are some, and the class comes again from the start after that, shuffled: small classes repeat their
    samples within an epoch, large ones leave some for another epoch. Where the classes do not divide the samples, those
    that come up once more are drawn anew in each epoch.

    Args:
        targets: the class of each sample, any whole numbers.
        seed: of the order.
    """

    def __init__(self, targets: Sequence[int], seed: int) -> None:
        super().__init__(len(targets), shuffle=True, seed=seed)
        self.members = list(_members_by_class(targets).values())

    def order(self) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "balanced", self.epoch))
        each, left = divmod(self.size, max(len(self.members), 1))
        once_more = set(torch.randperm(len(self.members), generator=generator)[:left].tolist())
        drawn: list[int] = []
        for number, rows in enumerate(self.members):
            times = each + (number in once_more)
            drawn += _draw_in_rounds(rows, times, generator)
        mixed = torch.randperm(len(drawn), generator=generator).tolist()
        return [drawn[place] for place in mixed]


def _members_by_class(targets: Sequence[int]) -> dict[int, list[int]]:
    """The samples of each class, by the classes' numbers in their order."""
    members: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(int(target), []).append(index)
    return {target: members[target] for target in sorted(members)}


def _draw_in_rounds(rows: list[int], times: int, generator: torch.Generator) -> list[int]:
    """So many of the rows, each once before any comes again."""
    found: list[int] = []
    while len(found) < times:
        found += [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
    return found[:times]
