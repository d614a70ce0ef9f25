"""Loggers of a Trainer; a YAML names them, and Lightning's, under ``loggers``.

A logger is a class in any file of this folder that derives from Lightning's ``Logger`` or from one of its loggers.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.source_index import derived_from, public_classes

if TYPE_CHECKING:
    from core.loggers.csv_logger import CSVLogger as CSVLogger

LIGHTNINGS = ("Logger", "CSVLogger", "TensorBoardLogger")
"""Classes of Lightning that one of ours may derive from."""


@functools.cache
def _modules() -> dict[str, str]:
    """Name of a logger -> the module that defines it."""
    classes = public_classes(Path(__file__).parent, __name__)
    return {name: classes[name].module for name in derived_from(LIGHTNINGS, classes)}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_modules()[name]), name)


def __dir__() -> list[str]:
    return sorted(_modules())
