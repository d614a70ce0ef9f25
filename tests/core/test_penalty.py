"""What methods add to the loss stands apart from it, so that methods can be compared by the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core import peft
from core.tasks import Classification
from core.training.finetuner import FineTuner
from tests.core.ddp_fits import Around, Samples
from tests.toolkit import randomize, trainer

METHODS: dict[str, dict[str, Any]] = {"AdaLoRA": {"rank": 2, "gamma": 0.5}, "DiffPruning": {},
                                      "LTSFT": {"l1_dense": 0.1}, "TriAdaptLoRA": {"rank": 2, "gamma": 0.5}}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_tasks(name: str, tmp_path: Path) -> None:
    tuner = FineTuner(Around(), Classification(), classes=list("abcd"))
    method = peft.make(name, METHODS[name])
    method.attach(tuner.backbone)
    randomize(method)
    data = Samples({"train": 8, "validation": 8, "test": 8}, batch_size=4)
    fit = trainer(tmp_path)
    fit.validate(tuner, datamodule=data, verbose=False)
    found = {key.rpartition("/")[2]: float(value) for key, value in fit.callback_metrics.items()}
    inputs, labels = data.validation_set.tensors  # type: ignore[union-attr]
    with torch.no_grad():
        tuner.eval()
        expected = float(F.cross_entropy(tuner(inputs), labels))
        penalty = float(method.loss_terms(tuner, (inputs, labels), tuner(inputs)))  # type: ignore[arg-type]
    assert penalty > 1e-3 and found["penalty"] == pytest.approx(penalty, rel=1e-5)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_and_resuming_keep_them_apart(tmp_path: Path) -> None:
    tuner = FineTuner(Around(), Classification(), classes=list("abcd"))
    fit = trainer(tmp_path, peft.make("AdaLoRA", METHODS["AdaLoRA"]), max_epochs=1)
    fit.fit(tuner, datamodule=Samples({"train": 8, "validation": 8, "test": 8}, batch_size=4))
    assert {"train/loss", "train/penalty", "validation/loss", "validation/penalty"} <= fit.callback_metrics.keys()
    plain = FineTuner(Around(), Classification(), classes=list("abcd"))
    fit = trainer(tmp_path, peft.make("LoRA", {"rank": 2}), max_epochs=1)
    fit.fit(plain, datamodule=Samples({"train": 8, "validation": 8, "test": 8}, batch_size=4))
    assert "train/loss" in fit.callback_metrics and "train/penalty" not in fit.callback_metrics
