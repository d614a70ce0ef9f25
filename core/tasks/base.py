"""What a task is: what it reads of a backbone, a head, a loss, metrics, and readable predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from core.data.batch import batch_size, rows_of
from core.data.info import DataInfo
from core.errors import ScionError
from core.record import Recorded

if TYPE_CHECKING:
    from core.graft import Graft

STAGES = ("train", "validation", "test")
"""What a run goes through; one of several test sets is the stage ``test/NAME``."""

LossParts = Tensor | Mapping[str, Tensor]
"""A mean loss, or its parts by name."""


@dataclass(frozen=True)
class Shown:
    """A sample in a picture of what the model says."""

    row: int
    """Its number in the data set."""
    text: str
    is_right: bool | None = None
    """None draws no frame."""


class TaskDeclarations:
    """What a task says of itself."""

    reads: str = "feature"
    """Which reading of the backbone (`core.backbone.Backbone`) it is given."""
    selects: tuple[str, str] = ("accuracy", "max")
    """The metric by which a run may select a checkpoint, and whether more or less of it is better."""
    weights: Mapping[str, float] = {}
    """Factors of the parts of a loss, by name; 1 where there is none."""
    needs_classes: bool = False
    """Whether it cannot be built for data without classes."""
    compares: bool = False
    """Samples are compared with each other, all in one process, and those of validation and test may be of other
    classes than those of training: there is no loss outside training then."""
    training_only: tuple[str, ...] = ()
    """Names of its parameters and modules that inference does not need: they are in checkpoints, but in no adapter."""
    lr_factors: Mapping[str, float] = {}
    """What the learning rate of its parameters is multiplied by, by the start of their names in the task."""


class Task(TaskDeclarations, nn.Module, Recorded, ABC):
    """All that is particular to a task. ``build`` is called once the data are known.

    A task reads the backbone by the name in ``reads``, gives ``outputs`` (a tensor, or a mapping of tensors) from that,
    and knows what they mean: ``loss``, ``update`` (metrics), ``predict``. It has a head of its own in ``head``, several
    by name in ``heads``, or none beside the backbone's: ``head = nn.Identity()``.
    """

    head: nn.Module
    heads: nn.ModuleDict
    metrics: nn.ModuleDict
    """Stage -> MetricCollection."""

    # ------------------------------------------------------------------------------ before training

    def check(self, classes: Sequence[str]) -> None:
        """Refuse classes that do not fit what the task was told."""

    def see_training(self, dataset: Any) -> None:
        """Look at the training set, when a Trainer is about to fit it; the task is built."""

    def prepare(self, backbone: Any) -> None:
        """Make the backbone ready for the task, before any method is attached: set ``trained_head`` where its own head
        is to be trained."""

    @abstractmethod
    def build(self, dim: Any, info: DataInfo) -> None:
        """Make the head, if there is one, and the metrics.

        Args:
            dim: width of what the task reads; one for each of several maps.
            info: what the data say of their targets.
        """

    @property
    def is_built(self) -> bool:
        """Whether the head is there."""
        return hasattr(self, "head") or hasattr(self, "heads")

    # ------------------------------------------------------------------------------ a step

    def reading_options(self, inputs: Any, targets: Any = None) -> dict[str, Any]:
        """What the reading asks for beside the inputs (``where`` of ``logits``), known from the targets in training and
        without them in prediction."""
        return {}

    def forward(self, reading: Any) -> Any:
        """What was read [batch, ...] -> outputs"""
        return self.head(reading)

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> LossParts:
        """The mean loss of a batch, or its parts, which are added up by ``weights``."""

    def has_loss(self, stage: str) -> bool:
        """Whether there is a loss to measure in a stage."""
        return stage == "train" or not self.compares

    def scores(self, outputs: Any) -> Any:
        """What the metrics are updated with, from the outputs."""
        return outputs

    def update(self, stage: str, outputs: Any, targets: Any) -> None:
        """Take a batch into the metrics of a stage."""
        self.collection(stage).update(self.scores(outputs), targets)

    # ------------------------------------------------------------------------------ what people see

    def counts(self, outputs: Any, targets: Any) -> int | Tensor | None:
        """How many labels the mean loss of a batch is over, where a step's labels shall weigh alike (tokens); 0 where
        there is none, and then the loss is not asked. None, always, where samples count."""
        return None

    @abstractmethod
    def predict(self, outputs: Any) -> list[dict[str, Any]]:
        """One readable prediction a sample, best first: ``{"label": ..., "score": ..., "scores": {label: score}}``, and
        ``labels``, all that are likely rather than not, where a sample may have several."""

    def probabilities(self, outputs: Any) -> list[dict[str, float]] | None:
        """The probability of every class by name, for each sample; None where there are no such numbers."""
        return None

    def caption(self, prediction: dict[str, Any]) -> str:
        """A prediction in a few words: the label, or the labels, and the best score."""
        label = prediction.get("label")
        if "labels" in prediction:
            label = ", ".join(prediction["labels"]) or "none"
        return f"{label} {prediction['score']:.2f}"

    def truth(self, target: Any) -> list[str] | None:
        """The right labels of a sample; None where they have no names."""
        return None

    def show(self, rows: Sequence[int], outputs: Any, targets: Sequence[Any]) -> list[Shown]:
        """What is to be written below samples that a picture shows, and whether the prediction is right.

        Args:
            rows: the samples' numbers in the data set.
            outputs: of these samples.
            targets: one a sample.
        """
        found = []
        for row, target, prediction in zip(rows, targets, self.predict(outputs), strict=True):
            text, truth = self.caption(prediction), self.truth(target)
            if truth is None:
                found.append(Shown(row, text))
                continue
            said = prediction["labels"] if "labels" in prediction else [prediction["label"]]
            is_right = sorted(said) == sorted(truth)
            if not is_right:
                text += f"\nis {', '.join(truth) or 'none'}"
            found.append(Shown(row, text, is_right))
        return found

    def summary(self, tests: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Numbers made of those of several test sets (a mean over languages, a harmonic mean).

        Args:
            tests: metrics by the name of their set.
        """
        return {}

    # ------------------------------------------------------------------------------ the head in files

    def packings(self) -> dict[str, Graft]:
        """Parameters, by their names in the task, whose stored form is not the one in use."""
        return {}

    def plain_head(self) -> nn.Module:
        """The head, or the heads, as modules of torch alone."""
        return self.heads if hasattr(self, "heads") else self.head

    # ------------------------------------------------------------------------------ metrics

    def set_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Measure each stage by copies of these metrics, by name."""
        base = MetricCollection(dict(metrics))
        self.metrics = nn.ModuleDict({f"{stage}_": base.clone() for stage in STAGES})

    def collection(self, stage: str) -> MetricCollection:
        """The metrics of a stage; those of one of several test sets are made when they are first asked for."""
        key = f"{stage}_"
        if key not in self.metrics:
            whole: MetricCollection = self.metrics[f"{stage.partition('/')[0]}_"]  # type: ignore[assignment]
            fresh = whole.clone()
            fresh.reset()
            self.metrics[key] = fresh
        return self.metrics[key]  # type: ignore[return-value]


def total_loss(task: Task, losses: LossParts) -> Tensor:
    """The sum of a loss's parts, by the task's weights.

    Raises:
        ScionError: there are none.
    """
    if isinstance(losses, Tensor):
        return losses
    parts = [task.weights.get(name, 1.0) * part for name, part in losses.items()]
    if not parts:
        raise ScionError(f"{type(task).__name__}.loss: gives no part")
    return torch.stack(parts).sum()


def row_by_row(targets: Any) -> list[Any]:
    """The targets of a batch, one a sample."""
    return [rows_of(targets, row) for row in range(batch_size(targets))]
