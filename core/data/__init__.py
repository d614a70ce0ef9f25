"""Data: datamodules and what they are made of."""

from core.data.datamodule import DataModule, Source, bounded
from core.data.info import DataInfo
from core.data.loader import EpochLoader
from core.data.samplers import BalancedSampler, ClassSampler, EpochSampler, LengthSampler, Share
from core.random_state import seed_of

__all__ = ["BalancedSampler", "ClassSampler", "DataInfo", "DataModule", "EpochLoader", "EpochSampler", "LengthSampler",
           "Share", "Source", "bounded", "seed_of"]
