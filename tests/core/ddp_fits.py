"""Runs of a `FineTuner` by Lightning's Trainer that `test_ddp` makes in one process and in two, of the same joint
batches. Each gives tensors and numbers to compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from core import peft
from core.backbone import Backbone
from core.config.optimizer import OptimizerSettings
from core.data import DataModule
from core.errors import ScionError
from core.method import PEFTMethod
from core.peft.selection.half import HalfFineTuning
from core.peft.selection.sensitivity import SensitivityTuning
from core.tasks import Classification
from core.training.finetuner import FineTuner
from tests.methods import METHODS, Cell
from tests.models import WIDTH, batch, make
from tests.toolkit import CLASSES, seeded

JOINT = 4
"""Samples of a joint batch."""
SIZES = {"train": 13, "validation": 7, "test": 5}
"""Odd ones: of the last batches of training and test, one process has nothing."""


class Around(Backbone):
    """A tiny ViT as a domain's backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.dim = make("timm_vit").model, WIDTH
        self.origin = {"name": "tiny", "kind": "random"}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


class Samples(DataModule):
    """Noise with labels.

    Args:
        sizes: of the three parts.
        several: whether a sample has several labels.
        broken: of a part, the sample that is not finite.
    """

    def __init__(self, sizes: dict[str, int] | None = None, several: bool = False,
                 broken: dict[str, int] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.sizes, self.multilabel, self.broken = {**SIZES, **(sizes or {})}, several, broken or {}

    def load(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for number, (part, size) in enumerate(self.sizes.items()):
            inputs = batch("timm_vit", size, seed=number)
            labels = torch.randint(CLASSES, (size,), generator=generator)
            if self.multilabel:
                labels = torch.randint(2, (size, CLASSES), generator=generator).float()
            if part in self.broken:
                inputs[self.broken[part]] = torch.inf
            setattr(self, f"{part}_set", TensorDataset(inputs, labels))
        self.classes, self.origin = list("abcd"), {"source": "mini", "name": "noise"}

    def example(self, batch_size: int = 1) -> Tensor:
        return batch("timm_vit", batch_size)

    def read(self, file: str | Path) -> Tensor:
        raise NotImplementedError

    def name_of(self, dataset: Any, index: int) -> str:
        [part] = [part for part in self.sizes if dataset is getattr(self, f"{part}_set")]
        return f"{part}-{index}.png"


class Rows(Checkpoint):
    """What was logged, epoch by epoch; and a checkpoint behind one of the steps."""

    def __init__(self, keep: Path | None = None, step: int = 0) -> None:
        self.rows: list[dict[str, float]] = []
        self.keep, self.step = keep, step

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.keep is not None and trainer.global_step == self.step and not self.keep.exists():
            trainer.save_checkpoint(self.keep)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


@dataclass
class Fit:
    """One run: how its methods are made, and its settings."""

    methods: Callable[[nn.Module], Sequence[PEFTMethod]]
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    name: str = "AdamW"
    keep: int = 0
    """Step behind which a checkpoint is written, from which a second run goes on."""


@contextmanager
def as_process(rank: int, world: int) -> Iterator[None]:
    """What Lightning's own launcher would tell this process."""
    names = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}  # of no use: the processes have found each other
    with mock.patch.dict(os.environ, names if world > 1 else {}):
        os.environ.pop("PL_GLOBAL_SEED", None)  # with which Lightning would seed several processes, and not one
        yield


def trainer_of(world: int, folder: Path, methods: Sequence[PEFTMethod], rows: Rows, settings: dict[str, Any]
               ) -> L.Trainer:
    searches = any(method.idle() or isinstance(method, (SensitivityTuning, HalfFineTuning)) for method in methods)
    searches = searches or any(type(method).__name__ in ("IST", "AdapterDrop") for method in methods)
    strategy = "auto" if world == 1 else "ddp_find_unused_parameters_true" if searches else "ddp"
    return L.Trainer(**{
        "accelerator": "cpu", "devices": world, "strategy": strategy, "max_epochs": 2, "precision": "64-true",
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": True,
        "num_sanity_val_steps": 0, "callbacks": [*methods, rows], "default_root_dir": folder, **settings})


def made(fit: Fit, world: int) -> tuple[FineTuner, Samples, list[PEFTMethod]]:
    data = Samples(batch_size=JOINT // world, seed=0, **fit.data)
    with seeded(0):
        tuner = FineTuner(Around(), Classification(dropout=fit.dropout), list("abcd"), data.multilabel,
                          OptimizerSettings(fit.name, lr=1e-2))
    methods = list(fit.methods(tuner.backbone))
    for method in methods:
        method.attach(tuner.backbone)
    tuner.fit_head()
    return tuner, data, methods


def result(fit: Fit, folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """The trained tensors, all that was logged, and what the test found."""
    found: dict[str, Any] = {}
    checkpoint = folder / f"step {fit.keep} of {world}.ckpt" if fit.keep else None
    with as_process(rank, world):
        for turn in ("whole", "resumed") if fit.keep else ("whole",):
            tuner, data, methods = made(fit, world)
            rows = Rows(checkpoint if turn == "whole" else None, fit.keep)
            trainer = trainer_of(world, folder, methods, rows, fit.trainer)
            with seeded(0 if turn == "whole" else 1):
                trainer.fit(tuner, datamodule=data, ckpt_path=checkpoint if turn == "resumed" else None,
                            weights_only=True)
                [tested] = trainer.test(tuner, datamodule=data, verbose=False)
            trained = {name: p.detach().clone() for name, p in tuner.named_parameters() if p.requires_grad}
            found[turn] = {"tensors": trained, "rows": rows.rows, "test": tested, "steps": trainer.global_step,
                           "batches": trainer.num_training_batches, "confusion": tuner.tables.get("test/confusion"),
                           "rate": trainer.optimizers[0].param_groups[0]["lr"]}
    return found


# ------------------------------------------------------------------------------------------------- the runs


HOSTS: dict[str, Callable[[], PEFTMethod]] = {
    "IST": lambda: peft.make("LoRA", {"rank": 2}),
    "AdapterDrop": lambda: peft.make("Pfeiffer", {"bottleneck": 4}),
    "Quantize": lambda: peft.make("LoRA", {"rank": 2}),
}
"""What methods stand behind that act on others."""


def of_method(name: str, variant: str | None = None) -> Fit:
    """A short run of a method, without noise: with the settings of its row, or with those that keep it busy."""
    busy = BUSY.get(name, {}) if variant is None else {}
    cell = Cell(name, variant or next(iter(METHODS[name].variants)), "timm_vit")

    def methods(backbone: nn.Module) -> list[PEFTMethod]:
        hosts = [HOSTS[name]().attach(backbone)] if name in HOSTS else []
        return [*hosts, cell.attach(backbone, **{"backbone_mode": "eval", **cell.quiet, **busy})]

    return Fit(methods)


BUSY: dict[str, dict[str, Any]] = {
    "TriAdaptLoRA": {"rank": 4, "growth": 2, "warmup": 1, "interval": 2, "targets": ("q", "v")},
    "AdaLoRA": {"rank": 4, "target_rank": 1, "warmup": 1, "cooldown": 3, "interval": 1},
    "LIFT": {"rank": 2, "interval": 3},
    "SpIEL": {"rank": 2, "interval": 4, "window": 2},
    "RAMT": {"drop": 1.0},
    "IST": {"refresh": 3},
    "HalfFineTuning": {"interval": 3},
    "DiffPruning": {"draw": True, "l0": 1e-3},
}
"""Settings with which a method changes within a few steps, or draws."""
EXACT = [(name, variant) for name, row in METHODS.items() if "test_two_processes" not in row.absent
         for variant in row.variants if not Cell(name, variant, "timm_vit").refused]
"""Methods, in all their variants, that do not say that two processes are another thing."""
QUICK = ("LoRA", "AdaLoRA", "TriAdaptLoRA", "SpIEL", "RAMT", "DiffPruning", "SensitivityTuning", "IST")
"""A plain one, running scores, tensors that appear, positions that move, two gradients, draws for all, data first, and
one over another."""
FITS = {
    "several labels": Fit(lambda _: [peft.make("LoRA", {"rank": 2})], {"several": True}),
    "accumulating": Fit(lambda _: [peft.make("RAMT", {"drop": 1.0})], {"sizes": {"train": 27}},
                        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "tiny parts": Fit(lambda _: [peft.make("BitFit", {})], {"sizes": {"train": 5, "validation": 1, "test": 1}},
                      {"limit_train_batches": 2}),
    "dropout of prompts": Fit(lambda _: [peft.make("PTuningV2", {"tokens": 2, "dropout": 0.5})]),
}
RESUMED = {
    "resumed": Fit(lambda _: [peft.make("LoRA", {"rank": 2, "dropout": 0.3}), peft.make("AdaLoRA", {"rank": 2})],
                   dropout=0.2, keep=6),
    "resumed at the end of an epoch": Fit(lambda _: [peft.make("LoRA", {"rank": 2, "dropout": 0.3})],
                                          trainer={"max_steps": 7}, dropout=0.2, keep=4),
}
"""With noise, so that two processes are compared with themselves."""


def everything(methods: bool) -> dict[str, Fit]:
    """The runs by name, those of every method included or not."""
    found = {name: of_method(name) for name in QUICK} | FITS | RESUMED
    if methods:
        found |= {f"{name}[{variant}]": of_method(name, variant) for name, variant in EXACT}
    return found


def masks(folder: Path, rank: int, world: int) -> list[Tensor]:
    """The masks of the head's dropout, batch by batch."""
    found: list[Tensor] = []
    with as_process(rank, world):
        tuner, data, methods = made(Fit(lambda _: [peft.make("LoRA", {"rank": 2})], dropout=0.5), world)
        head: Any = tuner.task.head
        head[0].register_forward_hook(lambda module, inputs, out: found.append((out == 0) if module.training else out))
        with seeded(0):
            trainer_of(world, folder, methods, Rows(), {"max_steps": 2, "limit_val_batches": 0}).fit(tuner, data)
    return found


def stopped(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What is said where one process reads a sample that is not finite, after how many steps, and whether the weights
    are still finite then."""
    with as_process(rank, world):
        tuner, data, methods = made(Fit(lambda _: [peft.make("LoRA", {"rank": 2})], {"broken": {"train": 3}}), world)
        trainer = trainer_of(world, folder, methods, Rows(), {"max_epochs": 1})
        told = ""
        try:
            trainer.fit(tuner, data)
        except ScionError as error:
            told = str(error)
    return {"error": told, "steps": trainer.global_step,
            "finite": all(bool(torch.isfinite(p).all()) for p in tuner.parameters())}
