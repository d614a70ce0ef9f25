"""The best epoch is chosen among those in which a method is what it is to be in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ScionError
from core.training.run import execute
from tests.core.tiny_run import PointOf

BEST = ("--select", "best", "--trainer.checkpoint_every_n_steps", "null", "--trainer.max_epochs", "4")


def test_a_sparsity_is_reached_before_an_epoch_can_be_chosen(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of("--peft", "PST", "--peft.cooldown", "0.25", *BEST)
    metrics = execute(point, tmp_path / "run")
    assert metrics["peft"][0]["structure"]["sparsity"] == 0.9 and metrics["selected_epoch"] >= 2


def test_a_budget_is_reached_before_an_epoch_can_be_chosen(point_of: PointOf, tmp_path: Path) -> None:
    metrics = execute(point_of("--peft", "AdaLoRA", "--peft.warmup", "0", "--peft.cooldown", "0", *BEST),
                      tmp_path / "run")
    assert metrics["selected_epoch"] == 3


def test_without_an_epoch_to_choose_from_the_reason_is_told(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of("--peft", "PST", *BEST, "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "3",
                     "--peft.cooldown", "0")
    with pytest.raises(ScionError, match="no epoch was validated once PST had reached the end of its schedule"):
        execute(point, tmp_path / "run")


@pytest.mark.parametrize(("key", "value"), [("limit_test_batches", "1"), ("limit_train_batches", "0.5"),
                                            ("fast_dev_run", "true")])
def test_a_run_on_a_part_of_the_data_says_so(point_of: PointOf, tmp_path: Path, key: str, value: str) -> None:
    metrics = execute(point_of(f"--trainer.{key}", value, "--trainer.max_epochs", "1"), tmp_path / "run")
    assert any(key in warning for warning in metrics["warnings"])
