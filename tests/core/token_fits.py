"""Runs of a task that counts labels, in one process or several, for `test_token_means`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric, MetricCollection

from core import peft
from core.config.optimizer import OptimizerSettings
from core.method import PEFTMethod
from core.tasks.base import STAGES, Task
from core.training.finetuner import FineTuner
from tests.core.ddp_fits import Around, Rows, Samples, as_process, trainer_of
from tests.models import batch
from tests.toolkit import seeded

TOKENS, KINDS, NONE = 17, 3, -100
STEP = 8
"""Samples of a step, in all micro-batches and processes together."""
SIZES = {"train": 27, "validation": 7, "test": 5}
"""Of the last step's window there are three samples: some micro-batches are missing, some processes have nothing."""


class TokensOf(Around):
    """All final states of a tiny ViT [batch, tokens, dim]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.forward_features(inputs)  # type: ignore[operator, union-attr]


class Tagging(Task):
    """One of a few kinds for each token; tokens of target -100 have no label."""

    selects = ("seen", "max")

    def build(self, dim: int, classes: Sequence[str], multilabel: bool = False) -> None:
        self.head = nn.Linear(dim, KINDS)
        self.metrics = nn.ModuleDict({f"{stage}_": MetricCollection({"seen": Seen()}) for stage in STAGES})

    def counts(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets != NONE).sum()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=NONE)

    def predict(self, outputs: Tensor) -> list[dict[str, Any]]:
        return []


class Seen(MeanMetric):
    """The mean of all outputs, whatever the targets are."""

    def update(self, value: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(value)


class Averaging(Tagging):
    """The same with a mean over each sample's labels, and then over samples: what counts are samples."""

    def counts(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        return None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.transpose(1, 2), targets, ignore_index=NONE, reduction="none")
        return losses.mean()


class Tagged(Samples):
    """Noise, of which few tokens have a label: none in more than half of the samples, all in some."""

    def load(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for number, (part, size) in enumerate(SIZES.items()):
            targets = torch.randint(KINDS, (size, TOKENS), generator=generator)
            labelled = torch.tensor([0, 0, 1, 0, TOKENS, 0, 2]).repeat(size)[:size]
            targets[torch.arange(TOKENS) >= labelled[:, None]] = NONE
            setattr(self, f"{part}_set", TensorDataset(batch("timm_vit", size, seed=number), targets))
        self.classes, self.origin = list("abcd"), {"source": "mini", "name": "noise"}


class Watch(L.Callback):
    """Keeps the gradients of each step as callbacks see them, and how many labels each micro-batch has; writes a
    checkpoint behind one of them."""

    def __init__(self, keep: Path | None = None, after: int = 0) -> None:
        self.keep, self.after = keep, after
        self.gradients: list[dict[str, Tensor]] = []
        self.labels: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.labels.append(int((batch[1] != NONE).sum()))
        if self.keep is not None and trainer.current_epoch == 0 and index + 1 == self.after:
            trainer.save_checkpoint(self.keep)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append(found)


def tuner_of(task: type[Tagging] = Tagging, method: str = "LoRA") -> tuple[FineTuner, PEFTMethod]:
    with seeded(0):
        tuner = FineTuner(TokensOf(), task(), list("abcd"), optimizer=OptimizerSettings("SGD", lr=0.1))
        made = peft.make(method, {"rank": 2, "backbone_mode": "eval"})
        made.attach(tuner.backbone)
        with torch.no_grad():
            for tensor in made.trainable().values():  # LoRA's B begins at zero, and A then has no gradient
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return tuner, made


def fit(folder: Path, batches: int, rank: int = 0, world: int = 1, keep: Path | None = None, after: int = 0,
        resume: Path | None = None, task: type[Tagging] = Tagging, method: str = "LoRA", **settings: Any
        ) -> dict[str, Any]:
    """A run of two epochs whose steps have so many micro-batches: gradients, labels, what was logged and trained."""
    with as_process(rank, world):
        tuner, made = tuner_of(task, method)
        data = Tagged(batch_size=STEP // batches // world, seed=0)
        watch, rows = Watch(keep, after), Rows()
        settings = {"accumulate_grad_batches": batches, **settings}
        trainer = trainer_of(world, folder, [made], rows, settings)
        trainer.callbacks.insert(0, watch)  # type: ignore[attr-defined]
        with seeded(0):
            trainer.fit(tuner, datamodule=data, ckpt_path=resume, weights_only=True)
            [tested] = trainer.test(tuner, datamodule=data, verbose=False)
    trained = {name: p.detach().clone() for name, p in tuner.named_parameters() if p.requires_grad}
    return {"gradients": watch.gradients, "labels": watch.labels, "rows": rows.rows, "test": tested,
            "trained": trained, "steps": trainer.global_step}


def work(rank: int, folder: Path) -> None:
    """What each of two processes does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
                            timeout=timedelta(minutes=3))
    keep = folder / "two.ckpt"
    found: dict[str, Any] = {}
    try:
        for batches in (1, 2, 4):
            found[str(batches)] = fit(folder, batches, rank, 2)
        found["whole"] = fit(folder, 4, rank, 2, keep=keep, after=6)
        found["resumed"] = fit(folder, 4, rank, 2, resume=keep)
    except Exception as error:  # told to the tests
        found["error"] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
