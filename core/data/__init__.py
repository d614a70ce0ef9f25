"""Data: datamodules and what they are made of."""

from core.data.datamodule import (
    ClassSampler,
    DataModule,
    EpochLoader,
    EpochSampler,
    Share,
    Source,
    bounded,
)
from core.data.info import DataInfo
from core.random_state import seed_of

__all__ = ["ClassSampler", "DataInfo", "DataModule", "EpochLoader", "EpochSampler", "Share", "Source", "bounded",
           "seed_of"]
