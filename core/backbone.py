"""The thin wrapper in which a domain hands a library's model to the core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from core.errors import ScionError, listed, nearest
from core.record import Recorded


class Backbone(nn.Module, Recorded, ABC):
    """A library's model in ``self.model``, unchanged, and named readings of it, which tasks ask for.

    ``forward`` gives the reading ``feature``, one vector a sample. Each further one is a method of its own name that
    takes the inputs, and is listed in ``readings``:

    | reading | gives |
    |---|---|
    | ``feature`` | [batch, dim] |
    | ``tokens`` | all final states [batch, tokens, dim] |
    | ``logits`` | the model's own head at the positions of the mask ``where``: [positions, vocabulary] |
    | ``maps`` | a list of maps [batch, channels, height, width], by stride |
    | ``pair`` | ``{"image": [batch, dim], "text": [batch, dim], "scale": []}`` |

    A domain may add others. Inputs are a tensor or a mapping of tensors.

    Args:
        name: ``auto``, a model's usual name, a local path, or ``nano``. A name given explicitly never falls back.
        pretrained: False builds the named architecture with random weights.

    A subclass sets ``model``, ``dim`` (width of the features) and ``origin`` in its ``__init__``.
    """

    readings: tuple[str, ...] = ("feature",)
    """What tasks can read."""
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

    @classmethod
    def check_reading(cls, reading: str) -> None:
        """Refuse a reading that this backbone does not have."""
        if reading not in cls.readings:
            raise ScionError(f"model.task: reads {reading!r}, which the backbone {cls.__name__} does not have"
                             f"{nearest(reading, cls.readings)}; it has {listed(cls.readings)}")

    @abstractmethod
    def forward(self, inputs: Any) -> Tensor:
        """inputs [batch, ...] -> features [batch, dim]"""

    def read(self, inputs: Any, reading: str = "feature", **options: Any) -> Any:
        """One of the ``readings`` of a batch of inputs.

        Args:
            options: what the reading asks for beside the inputs (``where`` of ``logits``).
        """
        self.check_reading(reading)
        # by calling the module: methods that change the feature act through hooks on it
        return self(inputs) if reading == "feature" else getattr(self, reading)(inputs, **options)

    def width(self, reading: str) -> Any:
        """Width of a reading, without methods: a number, or one for each of several maps."""
        return self.dim
