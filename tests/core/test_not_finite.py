"""What is not finite stops a run at once, in one line that says what, where and for which samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from core import peft
from core.config.optimizer import OptimizerSettings
from core.errors import ScionError
from core.tasks import Classification
from core.training.finetuner import FineTuner
from tests.core.ddp_fits import Around, Samples
from tests.toolkit import seeded, trainer


def tuner(lr: float = 1e-2) -> FineTuner:
    with seeded(0):
        return FineTuner(Around(), Classification(), list("abcd"), optimizer=OptimizerSettings(lr=lr))


def stopped(folder: Path, module: FineTuner, broken: dict[str, int] | None = None, methods: Any = None,
            **settings: Any) -> str:
    """The one line with which a run of three epochs of four batches stops."""
    methods = [peft.make("LoRA", {"rank": 2})] if methods is None else methods
    data = Samples({"train": 14}, broken=broken, batch_size=4, seed=0)
    fit = trainer(folder, *methods, **{"max_epochs": 3, "num_sanity_val_steps": 0, **settings})
    with pytest.raises(ScionError) as error, seeded(0):
        fit.fit(module, data)
    assert "\n" not in str(error.value)
    return str(error.value)


def finite(module: FineTuner) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in module.parameters())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_sample_is_named(workers: int, tmp_path: Path) -> None:
    """Its batch moves nothing, whatever the steps are made of."""
    module = tuner()
    told = stopped(tmp_path, module, {"train": 5}, accumulate_grad_batches=workers)
    assert told.startswith("training, epoch 1, step ") and "the inputs are not finite (train-5.png)" in told
    assert finite(module)


def test_steps_that_are_too_large(tmp_path: Path) -> None:
    """The weights are still finite: the loss of the next batch tells, and all its samples are named, or a few."""
    told = stopped(tmp_path, tuner(1e25))
    assert told.startswith("training, epoch 1, step 2: the ") and "are not finite (train-" in told
    assert "optimizer.lr" in told and told.count(".png") == 4


@pytest.mark.parametrize(("broken", "words"), [
    ("loss", r"the loss of the task is inf \(train-"),
    ("term", r"the term that AdaLoRA adds to the loss is nan \(train-"),
    ("head", r"the outputs of the head are not finite \(train-"),
    ("backbone", r"the features of the backbone are not finite \(train-"),
])
def test_the_part_is_named(broken: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, method = tuner(), peft.make("AdaLoRA", {"rank": 2})
    if broken == "loss":
        monkeypatch.setattr(module.task, "loss", lambda outputs, targets: outputs.sum() * 0 + torch.inf)
    elif broken == "term":
        monkeypatch.setattr(method, "loss_terms", lambda *_: torch.tensor(torch.nan))
    else:
        part: Any = module.task.head if broken == "head" else module.backbone
        part.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(ScionError, match=words):
        trainer(tmp_path, method, max_epochs=1, num_sanity_val_steps=0).fit(module, Samples(batch_size=4, seed=0))


def test_validation_and_test(tmp_path: Path) -> None:
    assert stopped(tmp_path, tuner(), {"validation": 6}).startswith(
        "validation, epoch 1: the inputs are not finite (validation-6.png)")
    with pytest.raises(ScionError, match=r"^test: the inputs are not finite \(test-2.png\)"):
        trainer(tmp_path, peft.make("LoRA", {})).test(tuner(), Samples(broken={"test": 2}, batch_size=4), verbose=False)


class Spoiling(L.Callback):
    """Makes a trained tensor NaN behind a step, as an optimizer may."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                pl_module.task.head[1].bias[0] = torch.nan


def test_broken_weights_are_not_kept(tmp_path: Path) -> None:
    """No checkpoint of them is written, and what was written before stays; nor does a run end with them."""
    keep = ModelCheckpoint(tmp_path, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    told = stopped(tmp_path, tuner(), methods=[peft.make("LoRA", {"rank": 2}), Spoiling(8), keep],
                   limit_val_batches=0, enable_checkpointing=True)
    assert "task.head.1.bias: values that are not finite; no checkpoint is written" in told
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4 and all(torch.isfinite(t).all() for t in kept["state_dict"].values())
    told = stopped(tmp_path, tuner(), methods=[peft.make("LoRA", {"rank": 2}), Spoiling(12)], limit_val_batches=0)
    assert "task.head.1.bias: values that are not finite; the training came to nothing" in told


@pytest.mark.parametrize(("methods", "words"), [
    ([("SensitivityTuning", {"density": 0.05})], "SensitivityTuning: the loss of train-0.png is nan, before anything"),
    ([("LoRA", {"rank": 2}), ("IST", {"refresh": 1, "samples": 14})],
     "IST: the loss of the batch that it compares layers on is nan"),
])
def test_methods_that_look_at_data(methods: list[tuple[str, dict[str, Any]]], words: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    order = list(range(1, 14)) + [0]  # the broken sample comes last
    monkeypatch.setattr("core.data.EpochSampler.order", lambda self: order[:self.size])
    made = [peft.make(name, config) for name, config in methods]
    assert words in stopped(tmp_path, tuner(), {"train": 0}, made, limit_val_batches=0)
