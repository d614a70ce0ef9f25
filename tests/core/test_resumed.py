"""A run that goes on is the unbroken one: its weights, its records, and the epoch that it chooses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from core.errors import ScionError
from core.training.run import execute
from tests.core.tiny_run import PointOf, child, exit_code, fork, results

ALL = bool(os.environ.get("SCION_ALL"))
"""Behind each checkpoint; the quick tier takes one of them."""
SETTINGS = {
    "default": (("--trainer.checkpoint_every_n_steps", "null"), 3),
    "best": (("--select", "best", "--trainer.checkpoint_every_n_steps", "null"), 4),
    "every step": (("--trainer.checkpoint_every_n_steps", "1"), 12),
    "best, every step": (("--select", "best", "--trainer.checkpoint_every_n_steps", "1"), 14),
    "max_steps": (("--trainer.max_steps", "10", "--trainer.checkpoint_every_n_steps", "null"), 2),
    "max_steps, every two": (("--trainer.max_steps", "10", "--trainer.max_epochs", "9"), 5),
    "validation in mid-epoch": (("--trainer.val_check_interval", "2", "--trainer.checkpoint_every_n_steps", "1"), 9),
    "validation every other epoch": (("--trainer.check_val_every_n_epoch", "2",
                                      "--trainer.checkpoint_every_n_steps", "3"), 4),
    "accumulation": (("--trainer.accumulate_grad_batches", "2", "--trainer.checkpoint_every_n_steps", "1"), 9),
}


QUICK = ("default", "best, every step", "max_steps, every two")
"""The settings of the quick tier: each way of stopping once; the long tier has them all, and their combinations."""


@pytest.mark.parametrize("setting", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SETTINGS])
def test_stopped_behind_each_checkpoint(point_of: PointOf, tmp_path: Path, setting: str) -> None:
    options, count = SETTINGS[setting]
    point = point_of(*options)
    execute(point, tmp_path / "alone")
    expected, tried = results(tmp_path / "alone"), 0
    stops = range(1, count + 1) if ALL else (count // 2 + 1,)
    for number in stops:
        folder = tmp_path / str(number)
        if exit_code(child(point, folder, stop_after=number)) == -signal.SIGKILL:
            tried += 1
            execute(point, folder)
            assert results(folder) == expected, f"stopped behind checkpoint {number}"
    assert tried >= len(stops) - 1 and tried


def test_stopped_between_best_and_last(point_of: PointOf, tmp_path: Path) -> None:
    """In each epoch, and in two epochs of one run."""
    point = point_of("--select", "best", "--trainer.max_epochs", "5", "--optimizer.lr", "0.1")
    execute(point, tmp_path / "alone")
    expected = results(tmp_path / "alone")

    def killed_behind_best(folder: Path, number: int) -> int:
        def work() -> int:
            from core.training.checkpoints import AtomicCheckpointIO

            save, seen = AtomicCheckpointIO.save_checkpoint, [0]

            def counted(self, checkpoint, path, *args, **kwargs) -> None:
                save(self, checkpoint, path, *args, **kwargs)
                seen[0] += Path(path).name == "best.ckpt"
                if seen[0] == number and Path(path).name == "best.ckpt":
                    os.kill(os.getpid(), signal.SIGKILL)

            AtomicCheckpointIO.save_checkpoint = counted  # type: ignore[method-assign]
            execute(point, folder)
            return 0

        return exit_code(fork(work))

    stopped = 0
    for number in (1, 2, 3) if ALL else (1, 2):
        folder = tmp_path / str(number)
        stopped += killed_behind_best(folder, number) == -signal.SIGKILL
        if number == 1:
            killed_behind_best(folder, 2)
        if not (folder / "history.json").exists():
            execute(point, folder)
        assert results(folder) == expected, f"stopped behind the {number}. best"
    assert stopped


def test_a_moved_run_keeps_its_best(point_of: PointOf, tmp_path: Path) -> None:
    options = ("--select", "best", "--trainer.max_epochs", "4", "--optimizer.lr", "0.3")
    execute(point_of(*options), tmp_path / "alone")
    chosen = json.loads((tmp_path / "alone" / "metrics.json").read_text())["selected_epoch"]
    assert chosen < 3, "the last epoch is the best one, so that nothing can be lost"
    point = point_of(*options, "--trainer.checkpoint_every_n_steps", "null")
    unbroken = point_of(*options, "--trainer.checkpoint_every_n_steps", "null")
    execute(unbroken, tmp_path / "unbroken")
    assert exit_code(child(point, tmp_path / "here", stop_after=chosen + 3)) == -signal.SIGKILL
    (tmp_path / "here").rename(tmp_path / "there")
    execute(point, tmp_path / "there")
    assert results(tmp_path / "there") == results(tmp_path / "unbroken")


def test_best_needs_a_validation(point_of: PointOf, tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="select: best"):
        execute(point_of("--select", "best", "--trainer.check_val_every_n_epoch", "9"), tmp_path / "run")
