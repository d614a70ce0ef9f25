"""Tasks: what is predicted from a backbone's features, by which loss, and measured how.

A task is a class in any file of this folder that derives from ``Task``. Names are read from the sources; a file is
imported when its task is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.source_index import derived_from, public_classes

if TYPE_CHECKING:
    from core.tasks.base import Task as Task
    from core.tasks.classification import Classification as Classification
    from core.tasks.embedding import Embedding as Embedding


@functools.cache
def _modules() -> dict[str, str]:
    """Name of a task -> the module that defines it."""
    classes = public_classes(Path(__file__).parent, __name__)
    return {name: classes[name].module for name in ["Task", *derived_from(["Task"], classes)]}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(_modules())
    if name not in _modules():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_modules()[name]), name)


def __dir__() -> list[str]:
    return sorted(_modules())
