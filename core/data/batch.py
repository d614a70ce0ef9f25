"""Batches: a tensor, or a mapping of tensors, whose first axes are the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = Tensor | Mapping[str, Any]
"""One batch of inputs or of targets."""


def first_tensor(batch: Any) -> Tensor:
    """The first tensor of a batch.

    Raises:
        TypeError: there is none.
    """
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            return leaf
    raise TypeError(f"a batch of {type(batch).__name__} holds no tensor")


def batch_size(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return first_tensor(batch).shape[0]


def detach(batch: Any) -> Any:
    """The same tensors, outside of the graph."""
    return tree_map_only(Tensor, Tensor.detach, batch)


def move(batch: Any, device: torch.device | str) -> Any:
    """The same tensors on a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def rows_of(batch: Any, rows: Any) -> Any:
    """Some samples of a batch: an index, a slice or a tensor of numbers."""
    return tree_map_only(Tensor, lambda tensor: tensor[rows], batch)


def is_all_finite(batch: Any) -> bool:
    """Whether no tensor of a batch holds a NaN or an infinity."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(leaf.isfinite().all()):
            return False
    return True


def shapes(batch: Any) -> str:
    """The shapes of a batch in words: ``[2, 3, 32, 32]``, or ``input_ids [2, 16], attention_mask [2, 16]``."""
    if isinstance(batch, Mapping):
        parts = [f"{name} {shapes(value)}" for name, value in batch.items()]
        return ", ".join(parts)
    if isinstance(batch, Tensor):
        return str(list(batch.shape))
    return type(batch).__name__


def stack(samples: Sequence[Any]) -> Any:
    """A batch of samples that have one shape: tensors, mappings of them, or (inputs, targets)."""
    from torch.utils.data import default_collate

    return default_collate(list(samples))


Combine = Callable[[list[Any]], Any]
"""From samples to a batch."""
