"""Orders by length and balanced ones: what is in a batch, several processes, resuming, results in the data's order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from core.data import BalancedSampler, DataModule, EpochLoader, EpochSampler, LengthSampler
from core.errors import ScionError
from tests.core.test_class_sampler import UNEVEN

Make = Callable[[list[int]], EpochSampler]
ORDERS: dict[str, Make] = {
    "plain": lambda values: EpochSampler(len(values), True, 3),
    "length": lambda values: LengthSampler(values, 2, True, 3),
    "length, sorted": lambda values: LengthSampler(values, 2, False, 3),
    "balanced": lambda values: BalancedSampler(values, 3),
}
"""Samplers of data whose samples have these lengths, or these classes."""


class Words(Dataset):
    """Rows of ones of different lengths; the target of each is its number."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"ids": torch.ones(self.lengths[index], dtype=torch.int64)}, index


def padded(samples: list[tuple[dict[str, Tensor], int]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ids = torch.nn.utils.rnn.pad_sequence([inputs["ids"] for inputs, _ in samples], batch_first=True)
    return {"ids": ids}, {"number": torch.tensor([number for _, number in samples])}


class Sentences(DataModule):
    """Words in batches that the data itself pads."""

    def __init__(self, lengths: Sequence[int], collates: bool = True, **common: Any) -> None:
        super().__init__(**common)
        self.lengths, self.collates = lengths, collates
        self.asked: list[bool] = []

    def load(self) -> None:
        self.train_set = self.validation_set = self.test_set = Words(self.lengths)
        self.classes, self.origin = [], {"source": "mini", "name": "words"}

    def example(self, batch_size: int = 1) -> Tensor:
        return torch.ones(batch_size, 4)

    def read(self, file: str | Path) -> Tensor:
        raise NotImplementedError

    def collate(self, train: bool) -> Callable[[list[Any]], Any] | None:
        self.asked.append(train)
        return padded if self.collates else None


def joint_batches(make: Make, values: list[int], size: int, world: int, epoch: int) -> list[list[int]]:
    """The joint batches that ``world`` processes read, from what each of them has."""
    sampler = make(values)
    found: list[list[int]] = []
    for rank in range(world):
        loader = EpochLoader(TensorDataset(torch.tensor(values)), batch_size=size, sampler=sampler)
        sampler.process = rank, world
        sampler.set_epoch(epoch)
        for number in range(len(loader)):
            share = sampler.share(number)
            own = loader.indices(number)
            assert len(own) == max(share.own, 1)
            if rank == 0:
                found.append([0] * share.joint)
            found[number][rank::world] = own[:share.own]
        assert len(loader) == len(found)
    return found


@pytest.mark.parametrize("name", ORDERS)
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=60), size=st.integers(1, 5), world=st.integers(2, 4),
       epoch=st.integers(0, 3))
def test_several_processes_read_together_what_one_reads(name: str, values: list[int], size: int, world: int,
                                                        epoch: int) -> None:
    """Of each joint batch, the last short one included; and again in another object."""
    make = ORDERS[name]
    alone = joint_batches(make, values, size * world, 1, epoch)
    assert joint_batches(make, values, size, world, epoch) == alone
    assert [len(batch) for batch in alone[:-1]] == [size * world] * (len(alone) - 1)
    if name != "balanced":
        assert sorted(itertools.chain(*alone)) == list(range(len(values)))


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 99), min_size=1, max_size=90), size=st.integers(1, 5), groups=st.integers(1, 4))
def test_batches_are_cut_from_sorted_groups(values: list[int], size: int, groups: int) -> None:
    sampler = LengthSampler(values, groups, True, seed=1)
    sampler.batch_size = size
    order = sampler.order()
    batches = [order[at:at + size] for at in range(0, len(order), size)]
    shuffled = EpochSampler(len(values), True, seed=1).order()
    for start in range(0, len(values), size * groups):
        members = set(shuffled[start:start + size * groups])
        inside = [batch for batch in batches if members >= set(batch)]
        assert set(itertools.chain(*inside)) == members  # no batch is of two groups
        # sorted: where two batches of a group are laid side by side, they do not overlap
        spans = sorted((min(values[row] for row in batch), max(values[row] for row in batch)) for batch in inside)
        full = [span for span, batch in zip(spans, inside, strict=True) if len(batch) == size]
        assert len(inside) - len(full) <= 1
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def padding(sampler: EpochSampler, lengths: list[int], size: int) -> float:
    """The share of padding among all tokens."""
    sampler.batch_size = size
    order = sampler.order()
    batches = [[lengths[row] for row in order[at:at + size]] for at in range(0, len(order), size)]
    tokens = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / tokens


def test_little_is_padded_and_batches_come_in_no_order() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(997, generator=generator) * 0.5 + 3).exp().int().clamp(1).tolist()
    grouped = LengthSampler(lengths, 50, True, seed=0)
    assert padding(EpochSampler(997, True, seed=0), lengths, 8) > 0.4
    assert padding(grouped, lengths, 8) < 0.08
    order = grouped.order()
    longest = [max(lengths[row] for row in order[at:at + 8]) for at in range(0, 997, 8)]
    rises = sum(one < other for one, other in itertools.pairwise(longest))
    assert 40 < rises < 85  # of 124
    grouped.set_epoch(1)
    assert grouped.order() != order


def test_evaluation_begins_with_the_longest() -> None:
    lengths = [3, 9, 1, 9, 4, 7]
    assert LengthSampler(lengths, 50, False, seed=0).order() == [1, 3, 5, 4, 0, 2]


@settings(max_examples=40, deadline=None)
@given(targets=st.lists(st.integers(-2, 6), min_size=1, max_size=80), epoch=st.integers(0, 3))
def test_classes_come_up_equally_often(targets: list[int], epoch: int) -> None:
    sampler = BalancedSampler(targets, seed=2)
    sampler.set_epoch(epoch)
    order = sampler.order()
    assert len(order) == len(sampler) == len(targets)
    classes = Counter(targets[row] for row in order)
    rows = Counter(order)
    for target, members in Counter(targets).items():
        assert classes[target] - len(targets) // len(set(targets)) in (0, 1)
        times = [rows[row] for row in range(len(targets)) if targets[row] == target]
        assert len(times) == members and max(times) - min(times) <= 1  # within a class, samples too


def test_a_balanced_order_is_mixed_and_another_in_each_epoch() -> None:
    sampler = BalancedSampler(UNEVEN, seed=0)
    state = torch.get_rng_state()
    first = sampler.order()
    assert first == BalancedSampler(UNEVEN, seed=0).order() and torch.equal(state, torch.get_rng_state())
    classes = [UNEVEN[row] for row in first]
    assert sum(one == other for one, other in itertools.pairwise(classes)) < 40  # of 179; 18 by chance
    sampler.set_epoch(1)
    assert sampler.order() != first


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("world", [1, 3])
def test_an_epoch_goes_on_from_every_batch(name: str, world: int) -> None:
    """A new loader with the state of the old one reads what that would have read, this epoch and the next."""
    make = ORDERS[name]

    def loader_of(epoch: int) -> EpochLoader:
        sampler = make(UNEVEN)
        sampler.process = world - 1, world
        made = EpochLoader(TensorDataset(torch.arange(len(UNEVEN))), batch_size=4, sampler=sampler)
        sampler.set_epoch(epoch)
        return made

    loader = loader_of(2)
    whole = [batch.tolist() for [batch] in loader]
    after = [batch.tolist() for [batch] in loader_of(3)]
    assert [loader.indices(number) for number in range(len(loader))] == whole
    for given_out in range(len(whole)):
        old = loader_of(2)
        batches = iter(old)
        for _ in range(given_out):
            next(batches)
        resumed = loader_of(0)
        resumed.load_state_dict(old.state_dict())
        order: Any = resumed.sampler
        order.set_epoch(2)
        assert [batch.tolist() for [batch] in resumed] == whole[given_out:]
        order.set_epoch(3)
        assert [batch.tolist() for [batch] in resumed] == after


# ------------------------------------------------------------------------------------------------- datamodules


LENGTHS = [5, 2, 8, 3, 3, 9, 1, 4, 7, 2, 6]


def test_the_data_makes_the_batches_of_all_three_sets() -> None:
    data = Sentences(LENGTHS, batch_size=4, length_groups=2, seed=0)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert isinstance(loader.sampler, LengthSampler)
        for number, (inputs, targets) in enumerate(loader):
            assert targets["number"].tolist() == loader.indices(number)
            assert inputs["ids"].sum(1).tolist() == [LENGTHS[row] for row in loader.indices(number)]
    assert data.asked == [True, False, False]


def test_results_come_back_in_the_order_of_the_data() -> None:
    data = Sentences(LENGTHS, batch_size=4, length_groups=50)
    data.setup()
    loader = data.test_dataloader()
    assert isinstance(loader, EpochLoader)
    found = [inputs["ids"].sum(1).tolist() for inputs, _ in loader]
    assert found[0] == [9, 8, 7, 6]  # the longest first
    assert loader.in_data_order(found) == LENGTHS
    bare = EpochLoader(Words(LENGTHS), batch_size=4, collate_fn=padded)
    with pytest.raises(ScionError, match="does not say where its samples lie"):
        bare.in_data_order([])


def test_mixup_alone_is_still_for_training_alone() -> None:
    class Mixed(Sentences):
        collate = DataModule.collate

        def collate_train(self) -> Callable[[list[Any]], Any]:
            return padded

    data = Mixed([4] * 8, batch_size=4)
    data.setup()
    assert data.train_dataloader().collate_fn is padded
    test = data.test_dataloader()
    assert isinstance(test, DataLoader) and test.collate_fn is not padded
    inputs, numbers = next(iter(test))  # mappings of one shape are stacked by torch
    assert inputs["ids"].shape == (4, 4) and numbers.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_stacked_is_one_line(workers: int) -> None:
    data = Sentences(LENGTHS, collates=False, batch_size=4, num_workers=workers)
    data.setup()
    with pytest.raises(ScionError, match="different shapes cannot be stacked") as caught:
        list(data.train_dataloader())
    assert "\n" not in str(caught.value)


class Labelled(Sentences):
    """Noise with labels."""

    def __init__(self, targets: Any, **common: Any) -> None:
        super().__init__([1], **common)
        self.targets = targets

    def load(self) -> None:
        self.train_set = self.validation_set = self.test_set = TensorDataset(
            torch.arange(len(self.targets)), torch.as_tensor(self.targets))
        self.classes, self.origin = list("abcdefghij"), {"source": "mini", "name": "noise"}


def test_balanced_is_of_training_alone() -> None:
    data = Labelled(UNEVEN, batch_size=8, balanced=True, seed=5)
    data.setup()
    train, test = data.train_dataloader(), data.test_dataloader()
    assert isinstance(train.sampler, BalancedSampler) and isinstance(test, EpochLoader)
    assert test.indices(0) == list(range(8))
    assert train.sampler.order() == BalancedSampler(UNEVEN, seed=5).order()


@pytest.mark.parametrize(("targets", "words"), [
    (torch.eye(3), "data.balanced: one class a sample is wanted, and a target of these data is a row of 3 numbers"),
    ([0.5, 1.0], "a target of these data is 0.5, no whole number")])
def test_what_has_no_classes_is_not_balanced(targets: Any, words: str) -> None:
    data = Labelled(targets, balanced=True)
    data.setup()
    with pytest.raises(ScionError, match=words):
        data.train_dataloader()


def test_orders_that_cannot_be_are_refused() -> None:
    with pytest.raises(ScionError, match="data.length_groups: 0 must be at least 1"):
        Sentences(LENGTHS, length_groups=0)
    with pytest.raises(ScionError, match="leave one of data.balanced and data.length_groups out"):
        Sentences(LENGTHS, balanced=True, length_groups=50)
    with pytest.raises(ScionError, match=r"data.balanced: Words has no ``targets``"):
        data = Sentences(LENGTHS, balanced=True)
        data.setup()
        data.train_dataloader()
    with pytest.raises(ScionError, match="data.length_groups: TensorDataset has no ``lengths``"):
        data = Labelled(UNEVEN, length_groups=50)
        data.setup()
        data.test_dataloader()
    data = Sentences(LENGTHS, length_groups=50)
    data.setup()
    data.train_set.lengths = [1, 2]  # type: ignore[attr-defined]
    data.train_set.__class__ = type("Wrong", (Words,), {"__len__": lambda self: 3})
    with pytest.raises(ScionError, match="2 lengths of 3 samples"):
        data.train_dataloader()
