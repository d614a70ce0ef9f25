"""Invariant 48: two processes equal one on the joint batch."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

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
        other = context.Process(target=work, args=(1, str(folder), everything), daemon=True)
        other.start()
        work(0, str(folder), everything)
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
    results: list[Any] = [torch.load(pair / f"{cell}-{rank}.pt") for rank in range(2)]
    assert all(isinstance(result, dict) for result in results), results
    expected = trained(cell)
    assert results[0].keys() == results[1].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.allclose(results[0][name], tensor, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("method", MOVING)
def test_what_moves_moves_alike(method: str, pair: Path) -> None:
    """Ranks that grow or fall, and positions: the same in both processes, and as in one process on the joint batch (but
    for SpIEL, whose candidates are those of the first process)."""
    results: list[Any] = [torch.load(pair / f"{method}-{rank}.pt") for rank in range(2)]
    assert all(isinstance(result, dict) for result in results), results
    expected = moved(method)
    assert results[0].keys() == results[1].keys() == expected.keys()
    assert method != "TriAdaptLoRA" or any(name.endswith(".A.1") for name in expected), "nothing has grown"
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
        if method != "SpIEL":
            assert torch.allclose(tensor.float(), expected[name].float(), rtol=1e-4, atol=1e-4), name
