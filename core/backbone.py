"""The thin wrapper in which a domain hands a library's model to the core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from core.record import Recorded


class Backbone(nn.Module, Recorded, ABC):
    """A library's model in ``self.model``, unchanged, and a ``forward`` that returns one feature vector a sample.

    Args:
        name: ``auto``, a model's usual name, a local path, or ``nano``. A name given explicitly never falls back.
        pretrained: False builds the named architecture with random weights.

    A subclass sets ``model``, ``dim`` (width of the features) and ``origin`` in its ``__init__``.
    """

    model: nn.Module
    dim: int
    origin: dict[str, Any]
    """``{"name": resolved name, "pretrained": bool, "kind": "hub" | "local" | "nano" | "random"}``."""

    def __init__(self) -> None:
        super().__init__()
        self.origin = {}

    @classmethod
    def outline(cls, name: str) -> tuple[Sequence[str], int] | None:
        """The roles and the number of blocks of the model of that name, if they are known without building it: a wrong
        target is then told before the model's library is imported."""
        return None

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [batch, ...] -> features [batch, dim]"""
