"""The data set that a Trainer fits."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L


def training_set_of(trainer: L.Trainer) -> Any:
    """The training set of a Trainer's datamodule, or of the loader that it was given; None where neither has one."""
    # Lightning's private place for both: before training starts it has no other.
    source = trainer.fit_loop._data_source.instance
    dataset = getattr(source, "train_set", None)
    return dataset if dataset is not None else getattr(source, "dataset", None)
