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
        return Change(self.up * factor, self.down, self.shape)

    def plus(self, other: Change) -> Change:
        """The sum: low-rank if both are and the sum still has fewer numbers."""
        if self.down is not None and other.down is not None:
            up, down = torch.cat([self.up, other.up], dim=1), torch.cat([self.down, other.down])
            if up.numel() + down.numel() < self.up.shape[0] * self.down.shape[1]:
                return Change(up, down, self.shape)
        return Change(self.dense() + other.dense(), None, self.shape)

    def truncated(self, rank: int) -> Change:
        """The nearest change of this rank (singular value decomposition); vectors stay as they are."""
        if len(self.shape) < 2:
            return self
        u, s, v = torch.linalg.svd(self.dense().flatten(1), full_matrices=False)
        return Change(u[:, :rank] * s[:rank], v[:rank].contiguous(), self.shape)


@dataclass(frozen=True)
class PatchData:
    """What a patch is made of, and its files hold."""

    changes: dict[str, Change]
    base: str = ""
    """Fingerprint of that base; empty where there were several."""
    head: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of a task head inside the model, as they were trained: they travel along, and replace."""
    architecture: str = ""
    """Of the base (`core.patch.take.architecture_of`); empty in patches of earlier versions."""
    beside: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that were trained beside the backbone, by their names in the module around it, in the form in which an
    adapter holds them. They replace as well."""
    model: dict[str, Any] = field(default_factory=dict)
    """How to build the backbone and the task of a `FineTuner`, as adapters record it."""
