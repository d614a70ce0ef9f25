"""Scion's core: graft small trainable parts onto large frozen models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.anatomy import dissect
    from core.artifact import load_adapter
    from core.cost import describe
    from core.errors import ScionError
    from core.module import FineTuner, load_run

__version__ = "0.1.0"
__all__ = ["FineTuner", "ScionError", "describe", "dissect", "load_adapter", "load_run"]

_HOMES = {"FineTuner": "core.module", "ScionError": "core.errors", "describe": "core.cost", "dissect": "core.anatomy",
          "load_adapter": "core.artifact", "load_run": "core.module"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
