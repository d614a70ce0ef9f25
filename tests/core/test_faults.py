"""What the machine refuses (a full disk, memory, a folder that cannot be written) is one line and exit code 2; the last
good state is kept, and a second call goes on. One failed run does not end a table."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core import report
from core.cli import main
from core.config import points
from core.data import DataModule
from core.training import run
from core.training.checkpoints import AtomicCheckpointIO
from core.training.finetuner import FineTuner
from core.training.many_runs import run as run_all
from core.training.run import execute
from tests.core.tiny_run import PointOf, is_finished, results

ERRORS = [
    (MemoryError(), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/somewhere/file"), "/somewhere/file: No space left on device"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "/somewhere/file"), "/somewhere/file: No such file"),
    (RuntimeError("something\nelse"), "unexpected RuntimeError: something else"),
]
IDS = ["memory", "gpu", "allocator", "disk", "vanished", "unexpected"]


def raising(error: Exception) -> Callable[..., Any]:
    def stop(*_: Any, **__: Any) -> Any:
        raise error

    return stop


PLACES: list[tuple[Any, str]] = [(DataModule, "setup"), (FineTuner, "training_step"), (FineTuner, "validation_step"),
                                 (FineTuner, "test_step"), (run, "save_run_adapter"), (report, "curves")]


PAIRS = [pytest.param(*place, *ERRORS[index % len(ERRORS)], id=f"{place[1]}-{IDS[index % len(ERRORS)]}")
         for shift in (0, 3) for index, place in enumerate(PLACES, shift)]
"""Each place with two errors, each error at two places."""


@pytest.mark.parametrize(("cls", "name", "error", "text"), PAIRS)
def test_a_run(tiny_config: Path, point_of: PointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
               capsys: pytest.CaptureFixture[str], cls: Any, name: str, error: Exception, text: str) -> None:
    short = ("--trainer.max_epochs", "1", "--trainer.checkpoint_every_n_steps", "null")
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, raising(error))
        assert main(["run", str(tiny_config), *short, "--run_dir", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert text in line
    execute(point_of(*short), tmp_path / "run")
    assert is_finished(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_written(tiny_config: Path, point_of: PointOf, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """The one before is still there, and the run goes on from it."""
    save, written = torch.save, [0]

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        written[0] += 1
        if written[0] == 3:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file, *args, **kwargs)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(["run", str(tiny_config), "--run_dir", str(folder)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "last.ckpt: the checkpoint cannot be written (No space left on device)" in line
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert json.loads((folder / "metrics.json").read_text())["status"] == "failed"
    resumed = []
    load = AtomicCheckpointIO.load_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "load_checkpoint",
                      lambda self, *args, **kwargs: resumed.append(args[0]) or load(self, *args, **kwargs))
        execute(point_of(), folder)
    execute(point_of(), tmp_path / "alone")
    assert resumed and results(folder)["weights"] == results(tmp_path / "alone")["weights"]


@pytest.mark.parametrize(("error", "text"), [
    pytest.param(*ERRORS[0], id=IDS[0]), pytest.param(*ERRORS[-1], id=IDS[-1], marks=pytest.mark.slow)])
def test_a_table(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                 error: Exception, text: str) -> None:
    """The points behind a failed one are run, the table names the failure, and a second call makes up for it."""
    found = points(str(tiny_config), ["--over", "seed_everything=0,1,2", "--trainer.max_epochs", "1"])
    step = FineTuner.training_step

    def second_fails(self: FineTuner, batch: Any, index: int) -> Any:
        if self.hparams["seed"] == 1:
            raise error
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "training_step", second_fails)
        assert run_all(found, str(tmp_path / "table")) == 2
    record = json.loads((tmp_path / "table" / "table.json").read_text())
    assert [bool(point["error"]) for point in record["points"]] == [False, True, False]
    assert text in record["points"][1]["error"] and text in capsys.readouterr().out
    assert run_all(found, str(tmp_path / "table")) == 0
    record = json.loads((tmp_path / "table" / "table.json").read_text())
    assert not any(point["error"] for point in record["points"])


@pytest.mark.parametrize("name", ["table.json", "table.md", "table.png"])
def test_somebody_elses_table(tiny_config: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text('{"mine": true}')
    words = ["--over", "seed_everything=0,1", "--run_dir", str(tmp_path)]
    assert main(["run", str(tiny_config), *words]) == 2
    assert name in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_damaged_record_in_a_table(tiny_config: Path, tmp_path: Path) -> None:
    """It is that point's failure, and stays as it is."""
    found = points(str(tiny_config), ["--over", "seed_everything=0,1", "--trainer.max_epochs", "1"])
    assert run_all(found, str(tmp_path)) == 0
    damaged = tmp_path / "LoRA-seed0" / "metrics.json"
    damaged.write_text("{")
    assert run_all(found, str(tmp_path)) == 2
    assert damaged.read_text() == "{"
    assert str(damaged) in json.loads((tmp_path / "table.json").read_text())["points"][0]["error"]
