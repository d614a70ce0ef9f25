"""A run resumed from any of its checkpoints ends as the unbroken one: weights, what was logged, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from core import peft
from core.config.optimizer import OptimizerSettings
from core.method import PEFTMethod
from core.tasks import Classification
from core.training.finetuner import FineTuner
from tests.core.ddp_fits import Around, Rows, Samples
from tests.models import make
from tests.toolkit import Plain, loader, same, seeded, trainer

BATCHES = 4
"""Of an epoch, the last one short."""


class Everywhere(Rows):
    """Keeps a checkpoint behind every step, every validation and every epoch."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder, self.files = folder, list[Path]()

    def _save(self, trainer: L.Trainer, where: str) -> None:
        if self.folder is not None:
            self.files.append(self.folder / f"{len(self.files)} {where}.ckpt")
            trainer.save_checkpoint(self.files[-1])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._save(trainer, "epoch")


def fitted(folder: Path | None, checkpoint: Path | None = None, methods: list[PEFTMethod] | None = None,
           keep: Rows | None = None, **settings: Any) -> tuple[FineTuner, Rows, L.Trainer]:
    """A short run with noise, from a checkpoint where one is given."""
    with seeded(0 if checkpoint is None else 1):
        options = {"eps": 1e-4} if settings.get("precision") == "16-true" else {}  # float16 has no smaller one
        tuner = FineTuner(Around(), Classification(dropout=0.1), list("abcd"),
                          optimizer=OptimizerSettings(lr=1e-3, options=options))
        rows = keep or Everywhere(folder)
        arguments = {"max_epochs": -1, "enable_checkpointing": True, "num_sanity_val_steps": 0, **settings}
        fit = trainer(folder or "", *(methods or [peft.make("LoRA", {"rank": 2, "dropout": 0.2})]), rows, **arguments)
        data = Samples({"train": 4 * BATCHES - 1}, batch_size=4, seed=0)
        fit.fit(tuner, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return tuner, rows, fit


def trained(tuner: FineTuner) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in tuner.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("settings", [
    {"max_epochs": 2},
    {"max_steps": 7},
    {"max_steps": 8, "max_epochs": 3, "check_val_every_n_epoch": 2},
    {"max_steps": 4, "accumulate_grad_batches": 2, "limit_train_batches": 3},
    {"max_steps": 7, "val_check_interval": 0.5},
    pytest.param({"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 3}, marks=pytest.mark.slow),
    pytest.param({"max_epochs": 3, "limit_train_batches": 3, "limit_val_batches": 1}, marks=pytest.mark.slow),
    pytest.param({"max_steps": 12, "accumulate_grad_batches": 3}, marks=pytest.mark.slow),
], ids=str)
def test_every_checkpoint_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    """Also one behind the last step, or behind a batch that validation follows; no epoch ends twice, or never."""
    whole, rows, fit = fitted(tmp_path, **settings)
    assert isinstance(rows, Everywhere) and len({file.name.split()[1] for file in rows.files}) == 3
    for file in rows.files[1::3] + rows.files[-2:]:
        resumed, again, other = fitted(None, file, **settings)
        assert same(trained(whole), trained(resumed)), file.name
        assert rows.rows == again.rows, file.name
        assert fit.global_step == other.global_step, file.name


def test_sums_of_an_epoch_survive(tmp_path: Path) -> None:
    """Training loss and accuracy cover the whole epoch, though most of it was before the checkpoint."""
    _, rows, _ = fitted(tmp_path, keep=Rows(tmp_path / "kept.ckpt", BATCHES - 1), max_epochs=1)
    _, again, _ = fitted(None, tmp_path / "kept.ckpt", keep=Rows(), max_epochs=1)
    assert [row["train/loss"] for row in rows.rows] == [row["train/loss"] for row in again.rows]
    assert rows.rows == again.rows and {"train/accuracy", "train/f1"} <= rows.rows[0].keys()


@pytest.mark.parametrize("at", ["batch", "epoch"])
def test_a_users_own_module_under_max_steps(at: str, tmp_path: Path) -> None:
    """Checkpoints of Lightning's own callback, at epochs' ends or behind each step."""
    where: dict[str, Any] = {"every_n_train_steps": 3} if at == "batch" else {"save_on_train_epoch_end": True}

    def run(checkpoint: Path | None) -> Plain:
        module = Plain(make("timm_vit"))
        keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **where)
        fit = trainer(tmp_path, peft.make("LoRA", {"rank": 2, "dropout": 0.3}), keep, max_steps=14,
                      enable_checkpointing=True)
        fit.fit(module, loader("timm_vit"), ckpt_path=checkpoint)
        return module

    with seeded(0):
        whole = run(None)
    with seeded(1):
        resumed = run(tmp_path / "step=6.ckpt")  # six batches are an epoch
    assert resumed.losses == whole.losses[6:] and len(whole.losses) == 14
    assert same(dict(whole.named_parameters()), dict(resumed.named_parameters()))


@pytest.mark.parametrize(("name", "config", "precision"), [
    ("LoRA", {"rank": 2}, "64-true"), ("FullFineTuning", {}, "64-true"), ("FullFineTuning", {}, "bf16-true"),
    ("TriAdaptLoRA", {"rank": 2, "warmup": 1, "interval": 2}, "64-true"), ("GaLore", {"rank": 2}, "bf16-true")])
def test_precisions_lose_no_bit(name: str, config: dict[str, Any], precision: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"precision": precision, "max_epochs": 2}
    keep = Rows(tmp_path / "kept.ckpt", 4)
    whole, rows, _ = fitted(tmp_path, None, [peft.make(name, config)], keep, **settings)
    again, others, _ = fitted(None, keep.keep, [peft.make(name, config)], Rows(), **settings)
    one, two = trained(whole), trained(again)
    assert precision != "64-true" or {tensor.dtype for tensor in one.values()} == {torch.float64}
    assert same(one, two) and rows.rows == others.rows


def test_checkpoints_of_before_are_read(tmp_path: Path) -> None:
    """Random states and the place in the data stood in one list once, and nothing else was kept."""
    whole, _, _ = fitted(tmp_path, keep=Rows(tmp_path / "new.ckpt", 4), max_epochs=2)
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=True)
    kept = checkpoint["resume"]
    [first] = kept["processes"]
    old = {"methods": kept["methods"], "loader": kept["loader"], "random_states": first["random_states"]}
    checkpoint["resume"] = old
    torch.save(checkpoint, tmp_path / "old.ckpt")
    resumed, _, _ = fitted(None, tmp_path / "old.ckpt", keep=Rows(), max_epochs=2)
    assert same(trained(whole), trained(resumed))


def test_another_number_of_processes_is_told(tmp_path: Path) -> None:
    fitted(tmp_path, keep=Rows(tmp_path / "one.ckpt", 4), max_epochs=1)
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["resume"]["processes"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="written by 2 processes, and this run has 1"):
        fitted(None, tmp_path / "two.ckpt", keep=Rows(), max_epochs=1)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("methods", [
    [("SensitivityTuning", {"density": 0.05, "batches": 1, "batch_size": 2})],
    [("LadderSideTuning", {"reduction": 2, "init": "fisher", "samples": 2})],
    [("LoRA", {"rank": 2}), ("IST", {"refresh": 1, "samples": 2})],
], ids=["SensitivityTuning", "LadderSideTuning", "IST"])
def test_data_are_seen_in_the_trainers_precision(methods: list[tuple[str, dict[str, Any]]], precision: str,
                                                 tmp_path: Path) -> None:
    made = [peft.make(name, config) for name, config in methods]
    tuner, _, fit = fitted(tmp_path, methods=made, keep=Rows(), precision=precision, max_steps=2)
    assert fit.global_step == 2 and all(method.prepared for method in made if method.prepares)
    assert all(bool(torch.isfinite(p).all()) for name, p in trained(tuner).items() if not name.startswith("task"))
