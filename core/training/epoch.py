"""What an epoch adds up in a LightningModule: the mean loss, what methods add to it, and the task's metrics."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from core.callbacks.exact_resume import gather
from core.data import EpochLoader, Share
from core.errors import ScionError
from core.tasks.base import STAGES, Task
from core.training.finite import Losses
from core.training.tally import LossSum, compute, joint, load_metric_states, mean_loss, metric_states


class EpochTotals(L.LightningModule):
    """Adds up losses and metrics of each stage and logs them at its epoch's end: over all processes, and across an
    interruption."""

    task: Task

    def __init__(self) -> None:
        super().__init__()
        self.sums = {stage: LossSum() for stage in STAGES}
        """The main loss of the present epoch so far, by stage."""
        self.penalties = {stage: LossSum() for stage in STAGES}
        """What methods added to it (`core.method.AddsLoss`)."""
        self.tables: dict[str, Tensor] = {}
        """Metrics that are no single number (a confusion matrix), as last computed."""
        self.not_finite: dict[str, str] = {}
        """What was first found not finite in an epoch of validation or test, by stage."""

    # ------------------------------------------------------------------------------- batches

    def loader_of(self, stage: str) -> EpochLoader | None:
        """The loader of a stage's batches; None where it is none of ours."""
        names = {"train": "train_dataloader", "validation": "val_dataloaders", "test": "test_dataloaders"}
        loader = getattr(self._trainer, names[stage], None)
        return loader if isinstance(loader, EpochLoader) else None

    def share_of(self, stage: str, batch: Any, index: int) -> Share:
        """How much of the joint batch is this process's."""
        loader = self.loader_of(stage)
        if loader is None or loader.epoch_sampler is None or loader.epoch_sampler.processes()[1] == 1:
            return Share(len(batch[1]), len(batch[1]), 1)
        return loader.epoch_sampler.share(index)

    def count(self, stage: str, losses: Losses, targets: Tensor, share: Share) -> None:
        """Take a batch into the epoch's loss and metrics, if its samples are this process's."""
        if not share.own:
            return
        hard = targets
        if targets.is_floating_point():  # class weights, of mixup for one, or the zeros and ones of several labels
            hard = (targets >= 0.5).int() if self.task.multilabel else targets.argmax(-1)
        self.task.collection(stage).update(self.task.scores(losses.outputs.detach()), hard)
        self.sums[stage].add(losses.main, len(targets))
        if losses.terms:
            self.penalties[stage].add(losses.total.detach() - losses.main.detach(), len(targets))

    # ------------------------------------------------------------------------------- epochs

    def on_fit_start(self) -> None:
        self.tables = {}

    def on_test_start(self) -> None:
        self.tables = {}

    def on_train_epoch_start(self) -> None:  # a resumed run that goes on in mid-epoch does not come here
        self._begin_epoch("train")

    def on_validation_epoch_start(self) -> None:
        self._begin_epoch("validation")

    def on_test_epoch_start(self) -> None:
        self._begin_epoch("test")

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("validation")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def _begin_epoch(self, stage: str) -> None:
        self.sums[stage].reset()
        self.penalties[stage].reset()
        self.task.collection(stage).reset()
        self.not_finite.pop(stage, None)

    def _log_epoch(self, stage: str) -> None:
        """Log the mean loss and the metrics; what methods add to the loss is apart, as ``penalty``, so that methods can
        be compared by the loss.

        Raises:
            ScionError: something in the epoch was not finite.
        """
        metrics = self.task.collection(stage)
        parts = [self._state(stage)]
        if self.trainer.world_size > 1:
            parts = gather(parts[0], self.trainer)
            metrics = joint(metrics, [part["metrics"] for part in parts])
        for part in parts:
            if part["not_finite"] is not None:
                raise ScionError(f"{self.stage_name(stage)}: {part['not_finite']}")
        found: dict[str, Tensor] = {}
        for name in ("loss", "penalty"):
            sums = [part[name] for part in parts]
            if any(one["samples"] for one in sums):
                found[name] = mean_loss(sums).to(self.device)
        found |= compute(metrics)
        for name, value in found.items():
            if value.dim():
                self.tables[f"{stage}/{name}"] = value.cpu()
            else:
                self._log_number(stage, name, value)
        self._begin_epoch(stage)

    def _log_number(self, stage: str, name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise ScionError(f"{self.stage_name(stage)}: {name} is {float(value)}")
        is_shown = stage == "train" if name == "loss" else name == self.task.selects[0]
        # Lightning asks how numbers of several processes are joined: these are the same in all.
        joined: dict[str, Any] = {"sync_dist": True, "reduce_fx": "max"} if self.trainer.world_size > 1 else {}
        self.log(f"{stage}/{name}", value, prog_bar=is_shown, **joined)

    def stage_name(self, stage: str) -> str:
        """What a stage is called in a message, in training with the epoch."""
        name = {"train": "training"}.get(stage, stage)
        return f"{name}, epoch {self.trainer.current_epoch + 1}" if self.trainer.state.fn == "fit" else name

    # ------------------------------------------------------------------------------- across an interruption

    def _state(self, stage: str) -> dict[str, Any]:
        """What this process has added up so far in an epoch."""
        return {"loss": self.sums[stage].state(), "penalty": self.penalties[stage].state(),
                "metrics": metric_states(self.task.collection(stage)), "not_finite": self.not_finite.get(stage)}

    def running_state(self) -> dict[str, Any]:
        """What a checkpoint in mid-epoch must hold of this process."""
        state = self._state("train")
        del state["not_finite"]
        return {"train": state}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Undo of `running_state`; an empty one changes nothing."""
        if "train" not in state:
            return
        own = state["train"]
        self.sums["train"].load(own["loss"])
        if "penalty" in own:  # checkpoints of earlier versions have none
            self.penalties["train"].load(own["penalty"])
        load_metric_states(self.task.collection("train"), own["metrics"])
