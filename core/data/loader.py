"""A loader that is saved and restored in mid-epoch: it knows how many batches were handed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from core.data.samplers import EpochSampler
from core.errors import ScionError


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
