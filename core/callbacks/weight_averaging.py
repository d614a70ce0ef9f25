"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407) that goes on exactly where a run was stopped."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch import callbacks


class StochasticWeightAveraging(callbacks.StochasticWeightAveraging):
    """Lightning's averaging of the weights of several epochs, which also goes on within an epoch.

    Lightning takes its schedule up again at an epoch's start, and begins it with another rate. Options are Lightning's
    own: ``swa_lrs``, ``swa_epoch_start``, ``annealing_epochs``, ``annealing_strategy``, ``device``.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        is_resumed = self._scheduler_state is not None
        if not is_resumed or not self.swa_start <= trainer.current_epoch <= self.swa_end:
            return
        groups = trainer.optimizers[0].param_groups
        rates = [group["lr"] for group in groups]
        self.on_train_epoch_start(trainer, pl_module)
        for group, rate in zip(groups, rates, strict=True):  # making a schedule sets the rates that it begins with
            group["lr"] = rate
