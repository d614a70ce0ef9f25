"""Optimizers side by side (some methods are optimizers, while a head beside them wants an ordinary one), and the count
of their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer


class ChainedOptimizer(Optimizer):
    """Several optimizers that step as one; schedulers see all their groups, and one state dict holds all of theirs."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self.optimizers = list(optimizers)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = run_closure(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """The loss of a step's closure, which computes gradients even where the step itself does not; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def steps_of(value: float, total: int) -> float:
    """A number of steps given as such, or, below 1, as a share of ``total``."""
    return value * total if value < 1 else value


Together = ChainedOptimizer  # its former name
