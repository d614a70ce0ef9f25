"""`FineTuner`, the LightningModule that hosts a backbone, a task and any methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from core.adapters.load import (
    keep_only_owned,
    restore,
    split_checkpoint,
)
from core.anatomy import dissect
from core.backbone import Backbone
from core.callbacks.exact_resume import ExactResume, convert_early
from core.config.optimizer import OptimizerSettings, ScheduleSettings
from core.data import DataInfo, seed_of
from core.data.batch import detach, first_tensor
from core.errors import ScionError, listed
from core.graft import checkpoint_activations
from core.method import PEFTMethod, home_in, key_of, methods_on
from core.method.abilities import AddsLoss, OwnLoss
from core.record import plain
from core.tasks.base import Task, total_loss
from core.training.epoch import EpochTotals
from core.training.finite import Losses, check_trained, stop_unless_finite, what_is_not_finite
from core.training.head_files import load_outside, outside
from core.training.objective import of_methods_alone
from core.training.optimizers import groups_of, make_optimizer
from core.training.recorded_model import build, model_record, spec
from core.training.token_means import TokenMeans, labels_of, no_loss
from core.training.training_set import training_set_of


class FineTuner(EpochTotals):
    """A backbone, a task on one of its readings, and whatever methods are attached to the backbone.

    Methods arrive as callbacks of the Trainer, or are attached by hand before training. ``load_from_checkpoint``
    rebuilds them from the checkpoint, without a Trainer.

    Args:
        backbone: a `Backbone` (or what a checkpoint recorded of one).
        task: a `Task`, built for the data's classes, or to be built from ``classes``.
        classes: names of the classes, where the task is not built yet; or all that the data say (`core.data.DataInfo`).
        multilabel: whether a sample may have several labels.
        optimizer: settings of the optimizer.
        schedule: settings of the learning rate's schedule.
        checkpointing: recompute activations in backward instead of keeping them.
        seed: random state in which a recorded backbone and task are built (one with random weights is then the same).
        info: what a checkpoint recorded of the data beside the classes.
    """

    def __init__(self, backbone: Backbone | dict[str, Any], task: Task | dict[str, Any],
                 classes: DataInfo | Sequence[str] = (), multilabel: bool = False,
                 optimizer: OptimizerSettings | dict[str, Any] | None = None,
                 schedule: ScheduleSettings | dict[str, Any] | None = None, checkpointing: bool = False,
                 seed: int = 0, info: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone: Backbone = build(backbone, seed, Backbone) if isinstance(backbone, dict) else backbone
        self.task: Task = build(task, seed, Task) if isinstance(task, dict) else task
        self.info = DataInfo.of(classes, multilabel)
        """What the data say of their targets."""
        if info:
            self.info = DataInfo.from_record(self.info.classes, self.info.multilabel, info, "FineTuner")
        self.head_dim: Any = None
        """Width of what the head reads; None where the task came with its head."""
        self.backbone.check_reading(self.task.reads)
        self.task.prepare(self.backbone)
        if not self.task.is_built:
            if self.task.needs_classes and not self.info.classes:
                raise ScionError("FineTuner: the task is not built; give classes=[...]")
            self.head_dim = self.backbone.width(self.task.reads)
            self.task.build(self.head_dim, self.info)
        self.optimizer = optimizer if isinstance(optimizer, OptimizerSettings) else OptimizerSettings(
            **(optimizer or {}))
        self.schedule = schedule if isinstance(schedule, ScheduleSettings) else ScheduleSettings(**(schedule or {}))
        self.aside = nn.ModuleDict()
        """What methods put beside the model for training only, by their names (`core.method.OwnLoss`)."""
        self.share = 1.0
        """What this process's loss of the present batch is multiplied by (`core.data.Share.weight`)."""
        self.token_means: TokenMeans | None = None
        """Where a Trainer fits a task that counts labels."""
        self.objective = "task"
        """What it trains on: the task's loss and what methods add to it, or, as ``method``, the latter alone."""
        self.checkpointing = checkpointing
        if checkpointing:
            checkpoint_activations(self.backbone)
        keep_only_owned(self)
        # Lightning calls the constructor with these from a checkpoint: they are plain, and say how to build both parts.
        recorded: dict[str, Any] = {}
        for name, part in (("backbone", self.backbone), ("task", self.task)):
            how = spec(part)
            if how:
                recorded[name] = how
        recorded |= {"classes": list(self.info.classes), "multilabel": self.info.multilabel,
                     "optimizer": plain(asdict(self.optimizer)), "schedule": plain(asdict(self.schedule)),
                     "checkpointing": checkpointing, "seed": seed}
        further = self.info.further()
        if further:
            recorded["info"] = further
        self.save_hyperparameters(recorded, logger=False)

    @property
    def methods(self) -> list[PEFTMethod]:
        """The methods attached to the backbone."""
        return methods_on(self)

    def forward(self, inputs: Any, targets: Any = None) -> Any:
        """inputs -> the task's outputs

        Args:
            inputs: a tensor or a mapping of tensors, [batch, ...].
            targets: where they are known, for tasks that read only what has a target.
        """
        reading = self.read(inputs, targets)
        is_vector = self.task.reads == "feature" and isinstance(reading, Tensor)
        if self.head_dim is not None and is_vector and reading.shape[-1] != self.head_dim:
            raise ScionError(f"the head reads {self.head_dim} features, the backbone with its methods gives "
                             f"{reading.shape[-1]}: call fit_head() once the methods are attached")
        outputs = self.task(reading)
        for method in self.methods:
            outputs = method.outputs(outputs)
        return outputs

    def read(self, inputs: Any, targets: Any = None) -> Any:
        """What the task reads of the backbone."""
        return self.backbone.read(inputs, self.task.reads, **self.task.reading_options(inputs, targets))

    @property
    def feature_dim(self) -> Any:
        """Width of what the task reads, with the methods that are attached to the backbone."""
        dim = self.backbone.width(self.task.reads)
        if self.task.reads != "feature":
            return dim
        if any(type(method).feature_dim is not PEFTMethod.feature_dim for method in self.methods):
            anatomy = dissect(self.backbone)
            for method in self.methods:
                dim = method.feature_dim(dim, anatomy)
        return dim

    def fit_head(self) -> None:
        """Build the head anew where the attached methods give a feature of another width than it reads. A Trainer and
        all that loads a model do so by themselves; the global random state stays as it is."""
        dim = self.feature_dim
        if self.head_dim in (None, dim):
            return
        parameter = next(self.backbone.parameters())
        old = next(self.task.parameters(), parameter)
        # A seed of its own, or the head would depend on what was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.hparams["seed"], "head", dim))
            self.task.build(dim, self.info)
        self.task.to(old.device, old.dtype).train(self.training)
        self.head_dim = dim

    def setup(self, stage: str) -> None:
        """Callbacks have attached their methods by now; neither a checkpoint is loaded nor an optimizer made yet."""
        trainer = self._trainer
        for method in self.methods:
            method.check_reading(self.task.reads, type(self.task).__name__)
        if self.task.compares and trainer is not None and trainer.world_size > 1:
            raise ScionError(f"trainer.devices: {trainer.world_size} processes; samples are compared with all "
                             "others in one process, so 1 is wanted for this task")
        self.fit_head()
        if stage == "fit":
            self.fit_aside()
        if trainer is not None and stage == "fit":
            self.task.see_training(training_set_of(trainer))
        if trainer is not None:
            self.token_means = TokenMeans.ensure(trainer, self.task)
            ExactResume.ensure(trainer)
            convert_early(trainer, self)

    def fit_aside(self) -> None:
        """Make what the attached methods want beside the model for training, where it is not there yet.

        Raises:
            ScionError: two methods want that: only one of them can give the loss.
        """
        for method in self.methods:
            key = key_of(method.name)
            if not isinstance(method, OwnLoss) or not method.is_trained or key in self.aside:
                continue
            module = method.training_module(self)
            if module is None:
                continue
            if len(self.aside):
                raise ScionError(f"{method.name}: {listed(self.aside)} stands beside the model already, and one method "
                                 "alone can give the loss in the task's place")
            self.aside[key] = module.to(self.device).train(self.training)

    def beside_inference(self) -> list[nn.Parameter]:
        """Parameters that inference does not need: the task's, and what stands beside the model."""
        own = [p for name, p in self.task.named_parameters() if name.partition(".")[0] in self.task.training_only]
        return [*own, *self.aside.parameters()]

    def parameters_beside(self) -> dict[str, nn.Parameter]:
        """What inference needs beside the backbone, by its names here."""
        left_out = {id(p) for p in [*self.backbone.parameters(), *self.beside_inference()]}
        return {name: p for name, p in self.named_parameters() if id(p) not in left_out}

    def model_record(self) -> dict[str, Any]:
        """How to build the backbone and the task (`core.training.recorded_model`)."""
        return model_record(self)

    def tensors_beside(self) -> dict[str, Tensor]:
        """What stands beside the backbone, as an adapter holds it (`core.method.beside`)."""
        return outside(self)

    def load_beside(self, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
        """Copy what stood beside the backbone into it (`core.method.beside`)."""
        self.fit_head()
        load_outside(self, tensors, where, write)

    # ------------------------------------------------------------------------------- a step

    def loss(self, batch: Any) -> Tensor:
        """The task's loss of a batch plus what the methods add to it; logs nothing."""
        return self._losses(batch).total

    def _losses(self, batch: Any, training: bool = False) -> Losses:
        inputs, targets = batch
        outputs = self(inputs, targets)
        labels = labels_of(self.task, outputs, targets)
        # Terms come before the loss: some are computed from this pass, which a second forward would overwrite.
        terms = []
        for method in self.methods:
            term = method.loss_terms(self, batch, outputs) if isinstance(method, AddsLoss) else None
            if term is not None:
                terms.append((method.name, term))
        if training:
            for method in self.methods:
                if isinstance(method, OwnLoss) and method.is_trained:
                    own = method.training_loss(self, batch, outputs)
                    if own is not None:
                        return Losses(outputs, method.name, own, terms, labels=labels)
            if self.objective == "method":
                return of_methods_alone(outputs, terms)
        found = no_loss(outputs) if labels == 0 else self.task.loss(outputs, targets)
        parts = {} if isinstance(found, Tensor) else found
        return Losses(outputs, "the task", total_loss(self.task, found), terms, parts, labels)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        # Of a joint batch that does not divide evenly, a process with fewer samples counts for less.
        share = self.share_of("train", batch, index)
        self.share = share.weight
        losses = self._losses(batch, training=True)
        stop_unless_finite(self, losses, batch, index)
        self.count("train", losses, batch, share)
        if self.token_means is not None and losses.labels is not None:
            return self.token_means.weigh(losses, losses.labels, share, self.trainer, index)
        return losses.total if share.weight == 1 else losses.total * share.weight

    def validation_step(self, batch: Any, index: int) -> None:
        self._evaluate("validation", batch, index)

    def test_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> Any:  # Lightning's name
        return self._evaluate(self.test_stages()[dataloader_idx], batch, index)

    def _evaluate(self, stage: str, batch: Any, index: int) -> Any:
        """Measure a batch; returns the outputs."""
        share = self.share_of(stage, batch, index)
        if not share.own:
            return None
        if self.task.has_loss(stage.partition("/")[0]):
            losses = self._losses(batch)
            self.count(stage, losses, batch, share)
        else:
            outputs = detach(self(*batch))
            self.task.update(stage, outputs, batch[1])
            losses = Losses(outputs, "the task", first_tensor(outputs).float().sum(), [])
        if stage not in self.not_finite and not bool(torch.isfinite(losses.total)):
            self.not_finite[stage] = what_is_not_finite(self, losses, stage, batch, index)
        return detach(losses.outputs) if stage.startswith("test") else None

    def on_train_end(self) -> None:
        check_trained(self, "the training came to nothing")

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer (`core.training.optimizers`)."""
        return [group for entry in groups_of(self) for group in entry.groups]

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = self.schedule
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_trained(self, "no checkpoint is written, and the last one stays")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rebuild the methods that the checkpoint holds, where they are not attached yet, and the head for them."""
        if not any("._extra_state" in name for name in checkpoint["state_dict"]):
            return
        # Without a Trainer nobody has attached the methods; with one they are there, at their start.
        is_bare = home_in(self) is None
        record, tensors = split_checkpoint(checkpoint["state_dict"], "the checkpoint", made=not is_bare)
        if is_bare:
            restore(record, tensors, self.backbone, where="the checkpoint")
        else:
            structures = {saved["name"]: saved.get("structure", {}) for saved in record["methods"]}
            for method in self.methods:
                method.restructure(structures.get(method.name, {}))
        self.fit_head()
        if any(name.startswith("aside.") for name in checkpoint["state_dict"]):
            self.fit_aside()
