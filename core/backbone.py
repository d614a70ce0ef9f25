"""The thin wrapper in which a domain hands a library's model to the core."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
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
    trained_head: tuple[str, ...] = ()
    """Names of the parameters of its own head that a task trains (`Task.prepare`); methods leave them trained."""
    optional_readings: tuple[str, ...] = ()
    """What only some arguments of the constructor make readable; the instance's ``readings`` say it then."""
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

    def check_reading(self, reading: str) -> None:
        """Refuse a reading that this backbone does not have."""
        _check_reading(reading, self.readings, type(self).__name__)

    @classmethod
    def check_outline_reads(cls, reading: str) -> None:
        """Refuse a reading that no backbone of this class has, before one is built."""
        _check_reading(reading, (*cls.readings, *cls.optional_readings), cls.__name__)

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

    def save_beside(self, folder: Path) -> str:
        """Write into a folder what belongs beside the library's model that is saved there (a tokenizer); here nothing.

        Returns:
            What the folder is then, for people: ``"SentenceTransformer(folder) opens it"``; empty for nothing special.
        """
        return ""

    def width(self, reading: str) -> Any:
        """Width of a reading, without methods: a number, or one for each of several maps."""
        return self.dim


def _check_reading(reading: str, readings: Sequence[str], name: str) -> None:
    if reading not in readings:
        raise ScionError(f"model.task: reads {reading!r}, which the backbone {name} does not have"
                         f"{nearest(reading, readings)}; it has {listed(readings)}")
