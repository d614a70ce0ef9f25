"""Data: datamodules and what they are made of."""

from core.data.datamodule import DataModule, Source, bounded
from core.data.info import DataInfo
from core.data.loader import EpochLoader
from core.data.samplers import ClassSampler, EpochSampler, Share
from core.random_state import seed_of

__all__ = ["ClassSampler", "DataInfo", "DataModule", "EpochLoader", "EpochSampler", "Share", "Source", "bounded",
           "seed_of"]
