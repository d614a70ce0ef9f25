"""What a data set says of its samples: their classes and their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from core.errors import ScionError


def class_numbers(dataset: Any, asker: str) -> list[int]:
    """The class of each sample: the ``targets`` of the data set, or the last tensor of a ``TensorDataset``.

    Args:
        dataset: the data set.
        asker: what wants to know, for a message.

    Raises:
        ScionError: it does not say, or a target is no single class (several labels, weights of classes).
    """
    targets = getattr(dataset, "targets", None)
    if targets is None and isinstance(dataset, TensorDataset):
        targets = dataset.tensors[-1]
    if targets is None:
        raise ScionError(f"{asker}: {type(dataset).__name__} has no ``targets``, the class of each of its samples")
    return [_class_number(target, asker) for target in targets]


def _class_number(target: Any, asker: str) -> int:
    value = torch.as_tensor(target)
    if value.dim() or value.is_floating_point():
        raise ScionError(f"{asker}: one class a sample is wanted, and a target of these data is "
                         f"{_in_words(value)}")
    return int(value)


def _in_words(value: Tensor) -> str:
    if value.dim():
        return f"a row of {len(value)} numbers"
    return f"{float(value):g}, no whole number"


def lengths_of(dataset: Any) -> Sequence[int]:
    """The length of each sample, ``lengths`` of the data set.

    Raises:
        ScionError: it has none, or another number of them than of samples.
    """
    lengths = getattr(dataset, "lengths", None)
    if lengths is None:
        raise ScionError(f"data.length_groups: {type(dataset).__name__} has no ``lengths``, a whole number for each of "
                         "its samples; leave length_groups out")
    if len(lengths) != len(dataset):
        raise ScionError(f"data.length_groups: {len(lengths)} lengths of {len(dataset)} samples")
    return lengths
