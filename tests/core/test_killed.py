"""A run that is killed at any moment and started again ends with the weights of an unbroken one, to the bit.

Children are forked from this process, which has imported everything, and killed by SIGKILL: after a random time, or
right behind the writing of a checkpoint. `make test-all` makes 20 tries a method at random times.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.core.tiny_run import PointOf, child, finish, weights

ALL = bool(os.environ.get("SCION_ALL"))
OPTIONS = {
    "LoRA": ["--peft.dropout", "0.1"],                          # a static one, with noise
    "LTSFT": [],                                                # two stages
    "AdaLoRA": [],                                              # a schedule with running scores, a loss of its own
    "TriAdaptLoRA": [],                                         # tensors that appear in mid-run
    "MoS": ["--peft.rank", "2"],                                # shared tensors with indices
    "GaLore": ["--peft.rank", "4", "--peft.interval", "5"],     # an optimizer
    "IST": ["--peft", "LoRA", "--peft+=IST"],                   # other layers at each step, over another method
    "Hydra": ["--peft.dropout", "0.1"],
    "LIFT": ["--peft.rank", "2", "--peft.interval", "4"],       # positions that move with their moments
    "SpIEL": ["--peft.rank", "2", "--peft.interval", "5", "--peft.window", "2"],  # windows, an optimizer
    "RAMT": [],                                                 # two gradients, draws
    "Quantize": ["--peft", "LoRA", "--peft+=Quantize"],         # files in bits
    "VQT": ["--peft.keep", "0.5"],                              # a wider feature, two stages, a new head
    "LadderSideTuning": ["--peft.reduction", "2", "--peft.init", "fisher", "--peft.samples", "16"],  # data first
    "MTLoRA": ["--peft.tasks", "[one, two]"],                   # streams in the batch, tensors of the base
    "Pfeiffer": ["--peft", "{class: LanguageAdapter, trainable: false}", "--peft+={class: Pfeiffer, bottleneck: 4}"],
}
METHODS = list(OPTIONS)
QUICK = ("LoRA", "TriAdaptLoRA", "SpIEL", "VQT")
"""Those that the quick tier kills more often, and at random: plain, growing, with moving indices, in two stages."""
ONCE = ("AdaLoRA", "GaLore", "IST", "LadderSideTuning")
"""Those that it kills once: with running scores, an optimizer, over another method, with data first."""


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in QUICK + ONCE else pytest.mark.slow) for name in METHODS])
def test_killed_behind_a_checkpoint(point_of: PointOf, tmp_path: Path, method: str) -> None:
    from core.training import run

    point = point_of("--peft", method, *OPTIONS.get(method, []))
    run.execute(point, tmp_path / "unbroken")
    reference = weights(tmp_path / "unbroken")
    total = 24 if method in ("LTSFT", "VQT") else 12  # two stages
    stops = range(1, total + 1) if ALL else (1, total // 2 + 1) if method in QUICK else (total // 2 + 1,)
    for stop in stops:
        folder = tmp_path / f"stop{stop}"
        os.waitpid(child(point, folder, stop), 0)
        assert finish(point, folder) == reference, f"killed behind checkpoint {stop}"


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS])
def test_killed_at_random(point_of: PointOf, tmp_path: Path, method: str) -> None:
    from core.training import run

    point = point_of("--peft", method, *OPTIONS.get(method, []))
    began = time.monotonic()
    run.execute(point, tmp_path / "unbroken")
    took = time.monotonic() - began
    reference = weights(tmp_path / "unbroken")
    chance = random.Random(0)
    for number in range(20 if ALL else 2):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(2):
            pid = child(point, folder)
            time.sleep(chance.uniform(0.05, took))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            if (folder / "adapter").exists():
                break
        assert finish(point, folder) == reference, f"try {number}"
