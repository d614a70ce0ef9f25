"""Signals end a run with their own exit code, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from core.training.many_runs import run
from core.training.run import execute
from tests.core.tiny_run import PointOf, exit_code, fork, is_finished, results, signal_behind


def command(config: Path, *words: str, behind: int, sign: int, output: Path) -> int:
    """The exit code of ``lightning run`` in a child that gets a signal behind a checkpoint."""
    def work() -> int:
        from core.cli import main

        signal_behind(behind, sign)
        return main(["run", str(config), *words])

    return exit_code(fork(work, output))


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run(tiny_config: Path, point_of: PointOf, tmp_path: Path, sign: int, code: int) -> None:
    output, folder = tmp_path / "output.txt", tmp_path / "run"
    assert command(tiny_config, "--run_dir", str(folder), behind=3, sign=sign, output=output) == code
    last = output.read_text().splitlines()[-1]
    assert last.startswith(f"lightning run: stopped by {signal.Signals(sign).name}; ") and str(folder) in last
    assert "Traceback" not in output.read_text()
    assert not is_finished(folder)
    execute(point_of(), folder)
    execute(point_of(), tmp_path / "alone")
    assert results(folder) == results(tmp_path / "alone")


@pytest.mark.parametrize(("sign", "code"), [
    (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_table(tiny_config: Path, tmp_path: Path, sign: int, code: int) -> None:
    """The points behind the one that was interrupted are not begun, and the second call does what is left."""
    from core.config import points

    output, folder = tmp_path / "output.txt", tmp_path / "table"
    words = ("--over", "seed_everything=0,1,2", "--trainer.max_epochs", "1")
    assert command(tiny_config, *words, "--run_dir", str(folder), behind=6, sign=sign, output=output) == code
    assert [is_finished(folder / f"LoRA-seed{seed}") for seed in range(3)] == [True, False, False]
    assert not (folder / "LoRA-seed2").exists() and not (folder / "table.json").exists()
    found = points(str(tiny_config), list(words))
    assert run(found, str(folder)) == 0
    assert len(json.loads((folder / "table.json").read_text())["points"]) == 3
    for seed, point in enumerate(found):
        execute(point, tmp_path / "alone" / str(seed))
        assert results(folder / f"LoRA-seed{seed}") == results(tmp_path / "alone" / str(seed))


@pytest.mark.parametrize("words", [(), ("--over", "seed_everything=0,1")], ids=["run", "table"])
def test_in_the_midst_of_writing_a_file(tiny_config: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """torch's writer ends in an error of its own then."""
    output = tmp_path / "output.txt"

    def work() -> int:
        from core.cli import main
        from core.training.checkpoints import AtomicCheckpointIO

        def save(*_: object, **__: object) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                raise RuntimeError("Writer is closed")

        AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
        return main(["run", str(tiny_config), *words, "--run_dir", str(tmp_path / "run")])

    assert exit_code(fork(work, output)) == 143
    assert output.read_text().splitlines()[-1].startswith("lightning run: stopped by SIGTERM; ")
