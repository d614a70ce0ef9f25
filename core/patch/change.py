"""What is added to a model's parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Change:
    """What is added to one parameter: a dense tensor, or ``up @ down`` in the layout [out, in]."""

    up: Tensor
    """[out, rank], or the dense change itself."""
    down: Tensor | None = None
    """[rank, in]; None where the change is dense."""
    shape: tuple[int, ...] = ()

    def dense(self) -> Tensor:
        """The change in the parameter's shape, in float32 or wider."""
        if self.down is None:
            return self.up
        return (self.up @ self.down).view(self.shape)

    def scaled(self, factor: float) -> Change:
        # One factor of a product is enough.
        return Change(self.up * factor, self.down, self.shape)

    def plus(self, other: Change) -> Change:
        """The sum: low-rank if both are and the sum still has fewer numbers."""
        if self.down is not None and other.down is not None:
            # [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2
            up = torch.cat([self.up, other.up], dim=1)
            down = torch.cat([self.down, other.down])
            if up.numel() + down.numel() < self.up.shape[0] * self.down.shape[1]:
                return Change(up, down, self.shape)
        return Change(self.dense() + other.dense(), None, self.shape)

    def truncated(self, rank: int) -> Change:
        """The nearest change of this rank (singular value decomposition); vectors stay as they are."""
        if len(self.shape) < 2:
            return self
        matrix = self.dense().flatten(1)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        up = u[:, :rank] * s[:rank]
        down = v[:rank].contiguous()
        return Change(up, down, self.shape)


@dataclass(frozen=True)
class PatchData:
    """The parts of a patch, as its files hold them."""

    changes: dict[str, Change]
    base: str = ""
    """Fingerprint of the base that the changes were trained on; empty where there were several."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of a task head inside the model, as they were trained; they replace those of another model."""
    architecture: str = ""
    """Of the base (`core.patch.take.architecture_of`); empty in patches of earlier versions."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that were trained beside the backbone, by their names in the module around it, in the form in which an
    adapter holds them. They replace as well."""
    model: dict[str, Any] = field(default_factory=dict)
    """How to build the backbone and the task of a `FineTuner`, as adapters record it."""
    path: str | None = None
    """Where the described model is in the module that the names begin at; None in patches of earlier versions."""
