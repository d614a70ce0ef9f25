"""Callbacks of a Trainer that are no methods; a YAML names them under ``callbacks``.

A callback is a class in any file of this folder that derives from Lightning's ``Callback`` or one of its callbacks.
Names are read from the sources; a file is imported when its callback is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.source_index import derived_from, public_classes

if TYPE_CHECKING:
    from core.callbacks.gradient_norm import GradientNorm as GradientNorm
    from core.callbacks.weight_averaging import StochasticWeightAveraging as StochasticWeightAveraging

LIGHTNINGS = ("Callback", "Checkpoint", "EarlyStopping", "LearningRateMonitor", "StochasticWeightAveraging", "Timer",
              "WeightAveraging")
"""Classes of Lightning that one of ours may derive from."""
UNNAMED = ("ExactResume", "OneMoreStep")
"""Those that a run adds by itself."""


@functools.cache
def _modules() -> dict[str, str]:
    """Name of a callback -> the module that defines it."""
    classes = public_classes(Path(__file__).parent, __name__)
    return {name: classes[name].module for name in derived_from(LIGHTNINGS, classes) if name not in UNNAMED}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_modules()[name]), name)


def __dir__() -> list[str]:
    return sorted(_modules())
