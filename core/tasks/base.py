"""What a task is: a head, a loss, metrics, and readable predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from core.record import Recorded

if TYPE_CHECKING:
    from core.graft import Graft

STAGES = ("train", "validation", "test")


class Task(nn.Module, Recorded, ABC):
    """A task head and all that is particular to it. ``build`` is called once, with what the data says."""

    head: nn.Module
    metrics: nn.ModuleDict
    """Stage -> MetricCollection, each updated with (outputs, targets)."""
    selects: tuple[str, str] = ("accuracy", "max")
    """The metric by which a run may select a checkpoint, and whether more or less of it is better."""
    compares: bool = False
    """Samples are compared with each other, and those of validation and test may be of other classes than those of
    training: there is no loss outside training then."""
    training_only: tuple[str, ...] = ()
    """Names of its parameters and modules that inference does not need: they are in checkpoints, but in no adapter."""
    lr_factors: dict[str, float] = {}
    """What the learning rate of its parameters is multiplied by, by the start of their names in the task."""

    def check(self, classes: Sequence[str]) -> None:
        """Refuse classes that do not fit what the task was told."""

    @abstractmethod
    def build(self, dim: int, classes: Sequence[str], multilabel: bool = False) -> None:
        """Make the head for features of width ``dim`` and the metrics for these classes."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def predict(self, outputs: Tensor) -> list[dict[str, Any]]:
        """One readable prediction a sample, best first: ``{"label": ..., "score": ..., "scores": {label: score}}``, and
        ``labels``, all that are likely rather than not, where a sample may have several."""

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, dim] -> outputs"""
        return self.head(features)

    def scores(self, outputs: Tensor) -> Tensor:
        """What the metrics are updated with, from the outputs."""
        return outputs

    def packings(self) -> dict[str, Graft]:
        """Parameters, by their names in the task, whose stored form is not the one in use."""
        return {}

    def plain_head(self) -> nn.Module:
        """The head as modules of torch alone."""
        return self.head

    def _collections(self, metrics: dict[str, Any]) -> nn.ModuleDict:
        base = MetricCollection(metrics)
        return nn.ModuleDict({f"{stage}_": base.clone() for stage in STAGES})

    def collection(self, stage: str) -> MetricCollection:
        """The metrics of a stage."""
        return self.metrics[f"{stage}_"]  # type: ignore[return-value]
