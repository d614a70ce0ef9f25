"""What an epoch adds up in a LightningModule: the mean loss, what methods add to it, and the task's metrics."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from core.callbacks.exact_resume import gather
from core.data import EpochLoader, Share
from core.data.batch import batch_size, detach
from core.errors import ScionError
from core.tasks.base import STAGES, Task
from core.training.finite import Losses
from core.training.tally import LossSum, compute, joint, load_metric_states, mean_loss, metric_states


class StageSums:
    """What one stage's epoch has added up so far, beside its metrics."""

    def __init__(self) -> None:
        self.main = LossSum()
        """The task's loss, or that of a method in its place."""
        self.penalty = LossSum()
        """All that methods added to it (`core.method.AddsLoss`)."""
        self.parts: dict[str, LossSum] = {}
        """The named parts of the loss, and what each method added."""

    def add(self, losses: Losses, samples: int) -> None:
        """Take in the mean losses of so many samples."""
        self.main.add(losses.main, samples)
        if losses.terms:
            self.penalty.add(losses.total.detach() - losses.main.detach(), samples)
        for name, value in (*losses.parts.items(), *losses.terms):
            self.parts.setdefault(name, LossSum()).add(value, samples)

    def state(self) -> dict[str, Any]:
        parts = {name: part.state() for name, part in self.parts.items()}
        return {"loss": self.main.state(), "penalty": self.penalty.state(), "parts": parts}

    def load(self, state: dict[str, Any]) -> None:
        self.main.load(state["loss"])
        if "penalty" in state:  # checkpoints of earlier versions have neither this nor parts
            self.penalty.load(state["penalty"])
        for name, part in state.get("parts", {}).items():
            self.parts[name] = LossSum()
            self.parts[name].load(part)


class EpochTotals(L.LightningModule):
    """Adds up losses and metrics of each stage and logs them at its epoch's end: over all processes, and across an
    interruption. Each of several test sets is a stage of its own, ``test/NAME``."""

    task: Task

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, StageSums] = {stage: StageSums() for stage in STAGES}
        """Losses of the present epoch so far, by stage."""
        self.tables: dict[str, Tensor] = {}
        """Metrics that are no single number (a confusion matrix), as last computed."""
        self.not_finite: dict[str, str] = {}
        """What was first found not finite in an epoch of validation or test, by stage."""

    # ------------------------------------------------------------------------------- batches

    def loader_of(self, stage: str) -> EpochLoader | None:
        """The loader of a stage's batches; None where it is none of ours."""
        names = {"train": "train_dataloader", "validation": "val_dataloaders", "test": "test_dataloaders"}
        kind, _, which = stage.partition("/")
        loader = getattr(self._trainer, names[kind], None)
        if which and isinstance(loader, list):
            loader = loader[self.test_stages().index(stage)]
        return loader if isinstance(loader, EpochLoader) else None

    def test_stages(self) -> list[str]:
        """The stages of a test: ``test``, or one for each of several sets."""
        data = getattr(self._trainer, "datamodule", None)
        names = [name for name in getattr(data, "test_sets", {}) if name]
        return [f"test/{name}" for name in names] or ["test"]

    def share_of(self, stage: str, batch: Any, index: int) -> Share:
        """How much of the joint batch is this process's."""
        loader = self.loader_of(stage)
        if loader is None or loader.epoch_sampler is None or loader.epoch_sampler.processes()[1] == 1:
            size = batch_size(batch)
            return Share(size, size, 1)
        return loader.epoch_sampler.share(index)

    def count(self, stage: str, losses: Losses, batch: Any, share: Share) -> None:
        """Take a batch into the epoch's losses and metrics, if its samples are this process's."""
        if not share.own:
            return
        self.task.update(stage, detach(losses.outputs), batch[1])
        size = batch_size(batch) if losses.labels is None else losses.labels
        self.sums[stage].add(losses, size)

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
        for stage in self.test_stages():
            self._begin_epoch(stage)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train")

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("validation")

    def on_test_epoch_end(self) -> None:
        stages = self.test_stages()
        by_set = {stage.partition("/")[2]: self._log_epoch(stage) for stage in stages}
        if len(stages) > 1 or "" not in by_set:
            for name, value in self.task.summary(by_set).items():
                self._log_number("test", name, torch.tensor(value))

    def _begin_epoch(self, stage: str) -> None:
        self.sums[stage] = StageSums()
        self.task.collection(stage).reset()
        self.not_finite.pop(stage, None)

    def _log_epoch(self, stage: str) -> dict[str, float]:
        """Log the mean losses and the metrics, and return them; what methods add to the loss is apart, as ``penalty``,
        so that methods can be compared by the loss.

        Raises:
            ScionError: something in the epoch was not finite.
        """
        metrics = self.task.collection(stage)
        states = [self._state(stage)]
        if self.trainer.world_size > 1:
            states = gather(states[0], self.trainer)
            metrics = joint(metrics, [state["metrics"] for state in states])
        for state in states:
            if state["not_finite"] is not None:
                raise ScionError(f"{self.stage_name(stage)}: {state['not_finite']}")
        found: dict[str, Tensor] = {}
        for name, sums in _loss_sums(states).items():
            if any(one["samples"] for one in sums):
                found[name] = mean_loss(sums).to(self.device)
        found |= compute(metrics)
        numbers: dict[str, float] = {}
        for name, value in found.items():
            if value.dim():
                self.tables[f"{stage}/{name}"] = value.cpu()
            else:
                self._log_number(stage, name, value)
                numbers[name] = float(value)
        self._begin_epoch(stage)
        return numbers

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
        metrics = metric_states(self.task.collection(stage))
        return {**self.sums[stage].state(), "metrics": metrics, "not_finite": self.not_finite.get(stage)}

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
        self.sums["train"].load(own)
        load_metric_states(self.task.collection("train"), own["metrics"])


def _loss_sums(states: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The sums of all processes by the name under which their mean is logged."""
    found = {name: [state[name] for state in states] for name in ("loss", "penalty")}
    for state in states:
        for name, part in state["parts"].items():
            found.setdefault(f"loss/{name}", []).append(part)
    return found
