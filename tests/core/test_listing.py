"""What a datamodule says of its data: a hash that tells other data, and names of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, TensorDataset

from core.data import DataModule, seed_of
from core.errors import ScionError


class Squares(DataModule):
    """As many squares as wanted."""

    def __init__(self, size: int = 4, classes: str = "ab", note: str = "", **common: Any) -> None:
        super().__init__(**common)
        self.size, self.names, self.note = size, classes, note

    def load(self) -> None:
        self.classes, self.origin = list(self.names), {"source": "mini", "name": "squares", "note": self.note}
        self.train_set = TensorDataset(torch.zeros(self.size, 1), torch.zeros(self.size))
        self.test_set, self.validation_set = self.train_set, None

    def example(self, batch_size: int = 1) -> Tensor:
        return torch.zeros(batch_size, 1)

    def read(self, file: str | Path) -> Tensor:
        return torch.zeros(1)


def _loaded(**options: Any) -> Squares:
    data = Squares(**options)
    data.setup()
    return data


def test_other_data_have_another_hash() -> None:
    first = _loaded().listing
    assert len(first) == 16 and int(first, 16) >= 0
    assert first == _loaded(note="a warning", seed=3, batch_size=7).listing
    assert len({first, _loaded(size=5).listing, _loaded(classes="abc").listing}) == 3


def test_samples_have_names() -> None:
    data = _loaded()
    assert data.name_of(data.train_set, 2) == "sample 2"
    data.train_set.names = ["a", "b", Path("c"), "d"]  # type: ignore[attr-defined]
    assert data.name_of(data.train_set, 2) == "c"


def test_names_that_are_no_text_have_seeds() -> None:
    assert seed_of(1, "a\udcff") != seed_of(1, "a\ud800") != seed_of(1, "a") == seed_of(1, "a")


def test_what_a_loader_process_cannot_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> Iterator[Any]:
        try:
            raise ScionError("x.png: cannot be read")
        except ScionError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()
        yield

    monkeypatch.setattr(DataLoader, "__iter__", broken)
    with pytest.raises(ScionError, match=r"^x\.png: cannot be read$"):
        next(iter(_loaded().train_dataloader()))
