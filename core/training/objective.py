"""What a stage trains on: the task's loss, what its methods add to it, or nothing."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch import Tensor

from core.errors import ScionError
from core.training.finite import Losses


class PreparesOnly(L.Callback):
    """Ends a fit before its first step. Behind the methods, which have computed by then what they compute from data."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.max_epochs = 0  # the loop looks before each epoch, whatever the least number of them is


def of_methods_alone(outputs: Any, terms: list[tuple[str, Tensor]]) -> Losses:
    """The losses of a batch where methods alone give one.

    Raises:
        ScionError: none of them has given any.
    """
    if not terms:
        raise ScionError("objective: method, and no method has added anything to the loss of this batch")
    total = terms[0][1]
    for _, term in terms[1:]:
        total = total + term
    return Losses(outputs, "the methods", total, [], dict(terms))
