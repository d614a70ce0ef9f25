"""Batches grouped by class: what is in them, how evenly samples come up, several processes, and resuming."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler, TensorDataset

from core.data import ClassSampler, EpochLoader
from core.errors import ScionError

EVEN = [row % 10 for row in range(200)]
UNEVEN = [target for target, size in enumerate((4, 6, 9, 12, 15, 18, 21, 25, 30, 40)) for _ in range(size)]


def batches(targets: list[int], size: int = 8, each: int = 2, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    sampler = ClassSampler(targets, size, each, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(order) == len(sampler) and len(order) % size == 0
    return [order[start:start + size] for start in range(0, len(order), size)]


@pytest.mark.parametrize("targets", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("size", "each"), [(8, 2), (12, 3), (5, 1), (20, 2), (16, 4)])
def test_each_class_of_a_batch_stands_in_one_place(targets: list[int], size: int, each: int) -> None:
    found = batches(targets, size, each)
    assert len(found) == len(targets) // size
    for batch in found:
        classes = [targets[row] for row in batch]
        runs = [classes[start:start + each] for start in range(0, size, each)]
        assert all(len(set(run)) == 1 for run in runs)
        assert len({run[0] for run in runs}) == size // each  # no class twice
        assert len(set(batch)) == size  # every class has at least as many samples


def test_all_samples_come_up_about_equally_often() -> None:
    once = Counter(row for batch in batches(EVEN) for row in batch)
    assert set(once.values()) <= {1, 2} and len(once) > 0.9 * len(EVEN)
    total = Counter(row for epoch in range(40) for batch in batches(UNEVEN, epoch=epoch) for row in batch)
    # 40 epochs of 22 batches of 8 samples over 180 samples: each some 39 times
    assert len(total) == 180 and min(total.values()) > 26 and max(total.values()) < 52
    classes = Counter({target: sum(times for row, times in total.items() if UNEVEN[row] == target) / size
                       for target, size in Counter(UNEVEN).items()})
    assert max(classes.values()) / min(classes.values()) < 1.15


def test_a_large_class_does_not_crowd_the_others_out_unevenly() -> None:
    targets = [0] * 100 + [1] * 10 + [2] * 20 + [3] * 10
    times = Counter(targets[row] for epoch in range(20) for batch in batches(targets, 4, 2, epoch) for row in batch)
    assert times[0] == 20 * 35 * 2  # in each batch
    assert times[2] / times[1] == pytest.approx(2, rel=0.1) and times[3] == pytest.approx(times[1], rel=0.1)


def test_batches_bring_different_classes_together() -> None:
    pairs = {frozenset((EVEN[first], EVEN[second])) for batch in batches(EVEN) for first, second in
             pairwise(batch[::2])}
    assert len(pairs) > 25  # of 45


def test_small_classes_repeat_their_samples() -> None:
    targets = [0, 1, 1, 2, 2, 2, 2, 2]
    for batch in batches(targets, 9, 3):
        assert Counter(targets[row] for row in batch) == {0: 3, 1: 3, 2: 3}
        assert set(batch) >= {0, 1, 2} and len({row for row in batch if row > 2}) == 3
    assert len(batches(targets, 9, 3)) == 1  # fewer samples than a batch holds: still one


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    state = torch.get_rng_state()
    assert batches(UNEVEN) == batches(UNEVEN)
    assert batches(UNEVEN) != batches(UNEVEN, epoch=1) != batches(UNEVEN, epoch=1, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_impossible_batches_are_refused() -> None:
    for size, each, words in ((9, 2, "2 samples of a class do not divide a batch of 9"), (8, 0, "0 samples"),
                              (22, 2, "take 11 classes, and the training set has 10; at most 20 can be")):
        with pytest.raises(ScionError, match=words) as caught:
            ClassSampler(EVEN, size, each, seed=0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_read_whole_batches_of_their_own(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[list[list[int]]] = []
    for rank in range(world):
        monkeypatch.setattr(ClassSampler, "processes", staticmethod(lambda rank=rank: (rank, world)))
        found.append(batches(UNEVEN))
    assert {len(own) for own in found} == {len(UNEVEN) // (8 * world)}
    monkeypatch.undo()
    together = [batch for step in zip(*found, strict=True) for batch in step]
    assert together == batches(UNEVEN)[:len(together)]  # what one process would read, dealt out


def test_lightning_leaves_it_as_it_is() -> None:
    from lightning.pytorch.trainer.connectors.data_connector import _DataConnector

    loader = EpochLoader(TensorDataset(torch.tensor(EVEN)), batch_size=8, sampler=ClassSampler(EVEN, 8, 2, seed=0))
    assert isinstance(loader.sampler, DistributedSampler)

    class Accelerators:
        use_distributed_sampler = is_distributed = True

    class Trainer:
        _accelerator_connector = Accelerators()

    connector = _DataConnector(Trainer())  # type: ignore[arg-type]
    assert not connector._requires_distributed_sampler(loader)


class Seen(L.LightningModule):
    """Keeps the rows of the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.rows: list[list[int]] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        self.rows.append(batch[0].tolist())
        return self.weight * batch[0].float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_run_stopped_in_mid_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(steps: int, path: str | None = None) -> Seen:
        module = Seen()
        loader = EpochLoader(TensorDataset(torch.arange(200)), batch_size=8, sampler=ClassSampler(EVEN, 8, 2, seed=3))
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=32, save_top_k=-1)
        trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, callbacks=[keep],
                            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
        trainer.fit(module, loader, ckpt_path=path, weights_only=True)
        return module

    whole = run(60)
    assert len(whole.rows) == 60 and whole.rows[:25] != whole.rows[25:50]
    second = run(60, str(tmp_path / "step=32.ckpt"))  # seven batches into the second epoch
    assert second.rows == whole.rows[32:]
