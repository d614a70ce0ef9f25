"""Scion's core: graft small trainable parts onto large frozen models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from core.former_names import install

if TYPE_CHECKING:
    from core.adapters.entry import load_method
    from core.adapters.huggingface.convert import to_peft
    from core.adapters.load import load_adapter
    from core.anatomy import dissect
    from core.cost import describe
    from core.errors import ScionError
    from core.graft import checkpoint_activations
    from core.patch import Patch
    from core.training.finetuner import FineTuner
    from core.training.load_run import load_run

__version__ = "0.1.0"
__all__ = ["FineTuner", "Patch", "ScionError", "checkpoint_activations", "describe", "dissect", "load_adapter",
           "load_method", "load_run", "to_peft"]

_HOMES = {
    "FineTuner": "core.training.finetuner",
    "Patch": "core.patch",
    "ScionError": "core.errors",
    "checkpoint_activations": "core.graft",
    "describe": "core.cost",
    "dissect": "core.anatomy",
    "load_adapter": "core.adapters.load",
    "load_method": "core.adapters.entry",
    "load_run": "core.training.load_run",
    "to_peft": "core.adapters.huggingface.convert",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
