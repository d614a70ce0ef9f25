"""Tasks: what is predicted from a backbone's features, by which loss, and measured how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.tasks.base import Task
    from core.tasks.classification import Classification
    from core.tasks.embedding import Embedding

__all__ = ["Classification", "Embedding", "Task"]


def __getattr__(name: str) -> Any:
    if name == "Task":
        from core.tasks.base import Task  # start-up time

        return Task
    if name == "Classification":
        from core.tasks.classification import Classification  # start-up time

        return Classification
    if name == "Embedding":
        from core.tasks.embedding import Embedding  # start-up time

        return Embedding
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
