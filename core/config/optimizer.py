"""Settings of the optimizer and of the learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from core.config.schema import Optimizer, Schedule
from core.config.schema import check as check_shape
from core.errors import ScionError
from core.optim import steps_of
from core.record import is_finite


@dataclass
class OptimizerSettings:
    """The optimizer, by its name in ``torch.optim``.

    Args:
        name: ``AdamW``, ``SGD``, ...
        lr: learning rate; ``auto`` takes the recommended one of each method.
        weight_decay: on tensors with two axes or more; ``auto`` takes the recommended one of each method.
        options: further arguments of the optimizer (``betas``, ``eps``, ``momentum``).
    """

    name: str = "AdamW"
    lr: float | Literal["auto"] = "auto"
    weight_decay: float | Literal["auto"] = "auto"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_shape(asdict(self), Optimizer, "optimizer")
        if not is_finite(asdict(self)):
            raise ScionError("optimizer: a number that is not finite")


@dataclass
class ScheduleSettings:
    """The learning rate over the run, step by step.

    Args:
        name: ``cosine`` or ``linear`` (down to ``final``), or ``constant``.
        warmup: share of all steps (below 1), or their number, of linear warm-up.
        final: the last learning rate as a share of the first.
    """

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        check_shape(asdict(self), Schedule, "lr_scheduler")
        if not is_finite(asdict(self)):
            raise ScionError("lr_scheduler: a number that is not finite")

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied by at ``step`` of ``total``."""
        warmup = steps_of(self.warmup, total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "constant":
            return 1.0
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        falling = (1 + math.cos(math.pi * done)) / 2 if self.name == "cosine" else 1 - done
        return self.final + (1 - self.final) * falling
