"""How large the gradients of a training are."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import torch
from torch.nn.utils import get_total_norm

from core.errors import ScionError


class GradientNorm(L.Callback):
    """Logs the norm of each step's gradient, over all trained tensors and before clipping.

    An epoch's mean is ``train/gradient_norm``, its largest ``train/gradient_norm_max``. Steps whose gradient is not
    finite are left out: in mixed precision they are not taken.

    Args:
        order: of the norm; 2 is the Euclidean one.
    """

    def __init__(self, order: float = 2.0) -> None:
        if order <= 0:
            raise ScionError(f"GradientNorm: order {order} must be positive")
        self.order = order
        self.sum, self.largest, self.steps = 0.0, 0.0, 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a run that goes on in mid-epoch does not come here, and has its sums from the checkpoint
        self.sum, self.largest, self.steps = 0.0, 0.0, 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        norm = float(get_total_norm(gradients, self.order))
        if math.isfinite(norm):
            self.sum += norm
            self.largest = max(self.largest, norm)
            self.steps += 1

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.steps:
            return
        found = {"train/gradient_norm": self.sum / self.steps, "train/gradient_norm_max": self.largest}
        # all processes step with one gradient, so that the largest of their numbers is that of each
        pl_module.log_dict(found, sync_dist=trainer.world_size > 1, reduce_fx="max")

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "largest": self.largest, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.sum, self.largest, self.steps = state_dict["sum"], state_dict["largest"], state_dict["steps"]
