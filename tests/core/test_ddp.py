"""Invariant 48: two processes equal one on the joint batch."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.core import ddp_fits
from tests.core.ddp_pair import MOVING, PATIENCE, moved, trained, work
from tests.methods import Cell, cells
from tests.toolkit import EVERYTHING, LIGHT, invariant

NUMBER = 48


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The folder with the results of one pair of processes, this one and a child, for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "ddp"
    try:
        folder.mkdir()
    except FileExistsError:  # another worker runs the pair
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while not (folder / "done").exists():
            assert time.monotonic() < deadline, "the pair of processes did not finish"
            time.sleep(0.2)
        return folder
    try:
        everything = [cell for cell in cells(EVERYTHING, NUMBER, LIGHT) if not cell.refused]
        # a fork has imported everything already; macOS's libraries do not survive one
        context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        other = context.Process(target=work, args=(1, str(folder), everything, EVERYTHING), daemon=True)
        other.start()
        work(0, str(folder), everything, EVERYTHING)
        other.join()
    finally:
        (folder / "done").touch()
    return folder


@pytest.fixture(scope="session")
def worker_id() -> str:
    """pytest-xdist's own fixture, where that is not installed or not in use."""
    return os.environ.get("PYTEST_XDIST_WORKER", "master")


@invariant(NUMBER, "two processes equal one on the joint batch", families=LIGHT)
def test_two_processes(cell: Cell, pair: Path) -> None:
    """Without a search for unused parameters, but for methods that declare idle tensors."""
    one, two = results(pair, str(cell))
    expected = trained(cell)
    assert one.keys() == two.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], two[name]), name
        assert torch.allclose(one[name], tensor, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", MOVING)
def test_what_moves_moves_alike(method: str, pair: Path) -> None:
    """Ranks that grow or fall, and positions: the same in both processes, and as in one process on the joint batch."""
    one, two = results(pair, method)
    expected = moved(method)
    assert one.keys() == two.keys() == expected.keys()
    assert method != "TriAdaptLoRA" or any(name.endswith(".A.1") for name in expected), "nothing has grown"
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=1e-4, atol=1e-4), name


# ------------------------------------------------------------------------------------------------- with a Trainer


def results(folder: Path, task: str) -> list[Any]:
    """What the two processes have left of a task."""
    found: list[Any] = [torch.load(folder / f"{task}-{rank}.pt") for rank in range(2)]
    assert not any(isinstance(result, str) for result in found), found
    return found


def distance(one: Any, other: Any) -> float:
    """The largest difference between two results of the same form."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((distance(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list):
        return max((distance(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if one is None:
        return 0.0 if other is None else math.inf
    a, b = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    return float((a - b).abs().max()) if a.shape == b.shape else math.inf


@pytest.mark.parametrize("name", [name for name, fit in ddp_fits.everything(EVERYTHING).items() if not fit.keep])
def test_a_fine_tuner_in_two_processes_is_one_on_the_joint_batch(name: str, pair: Path, tmp_path: Path) -> None:
    """Weights, losses, metrics, steps and rates, of sets whose last batch leaves one process without a sample."""
    one, two = results(pair, f"fit {name}")
    assert distance(one, two) == 0
    expected = ddp_fits.result(ddp_fits.everything(EVERYTHING)[name], tmp_path)["whole"]
    assert len(expected["rows"]) == 2 and expected["test"]["test/loss"] > 0
    assert distance(one["whole"], expected) < 1e-6


@pytest.mark.parametrize("name", ddp_fits.RESUMED)
def test_two_processes_go_on_exactly_where_they_were(name: str, pair: Path) -> None:
    """Random states, the place in the data and the sums of the epoch of each process are in the one checkpoint."""
    one, two = results(pair, f"fit {name}")
    assert distance(one, two) == 0
    for result in (one, two):
        assert result["whole"]["rows"] and distance(result["whole"], result["resumed"]) == 0


def test_processes_drop_different_values(pair: Path) -> None:
    one, two = results(pair, "masks")
    assert len(one) == len(two) == 2 and all(not torch.equal(*masks) for masks in zip(one, two, strict=True))
    assert all(mask.any() for mask in [*one, *two])


def test_all_processes_stop_at_the_first_loss_that_is_not_finite(pair: Path) -> None:
    for result in results(pair, "stopped"):
        step = result["steps"] + 1
        assert result["error"].startswith(f"training, epoch 1, step {step}: the inputs are not finite (train-3.png)")
        assert result["finite"]
