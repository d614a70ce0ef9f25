"""A loader that is saved and restored in mid-epoch: it knows how many batches were handed out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from core.data.samplers import EpochSampler
from core.errors import ScionError

T = TypeVar("T")

UNEQUAL_SHAPES = ("stack expects each tensor to be equal size", "resize storage that is not resizable")
"""What torch says where it stacks tensors of different shapes: here, and in a loader process."""


class EpochLoader(DataLoader):
    """A DataLoader that Lightning saves and restores in mid-epoch: its state is the number of batches handed out."""

    given = 0
    _own: tuple[tuple[int, ...], list[int]] | None = None
    """What this process reads in an epoch, and which epoch that is."""

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
        except RuntimeError as error:
            if not any(words in str(error) for words in UNEQUAL_SHAPES):
                raise
            raise ScionError("data: samples of different shapes cannot be stacked to a batch; the datamodule's "
                             "collate(train) says how one is made of them (by padding, say)") from None

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
        # A shuffled or sorted order costs more than a batch does: it is made once an epoch.
        key = (order.epoch, order.batch_size, *order.processes())
        if self._own is None or self._own[0] != key:
            self._own = key, order.own()
        start = batch * order.batch_size
        return self._own[1][start:start + order.batch_size]

    def in_data_order(self, batches: Sequence[Sequence[T]]) -> list[T]:
        """What was found of each sample of this process, batch by batch from the epoch's first, in the order in which
        the samples lie in the data.

        Raises:
            ScionError: the loader's order is unknown.
        """
        if self.epoch_sampler is None:
            raise ScionError("data: a loader with a sampler of its own does not say where its samples lie")
        found: dict[int, T] = {}
        for number, results in enumerate(batches):
            found.update(zip(self.indices(number), results, strict=True))
        return [found[index] for index in sorted(found)]
