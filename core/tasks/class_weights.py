"""Weights of classes in a loss: by name, or so that all classes count alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from core.data.targets import class_numbers
from core.errors import ScionError, listed, nearest

ClassWeights = Literal["balanced"] | dict[str, float] | None
ASKER = "model.task.class_weights"


def check_weights(weights: ClassWeights) -> None:
    """Refuse what are no weights, whatever the classes are."""
    if weights is None or weights == "balanced":
        return
    if not isinstance(weights, Mapping) or not weights:
        raise ScionError(f"{ASKER}: {weights!r:.60} is neither 'balanced' nor a weight for each of some classes, "
                         "{class: weight}")
    for name, weight in weights.items():
        if not weight > 0:
            raise ScionError(f"{ASKER}: {weight} of {name!r} must be above 0")


def check_names(weights: ClassWeights, classes: Sequence[str]) -> None:
    """Refuse weights of classes that the data has not."""
    if not isinstance(weights, Mapping):
        return
    for name in weights:
        if name not in classes:
            raise ScionError(f"{ASKER}: no class {name!r}{nearest(name, classes)}; the classes are "
                             f"{listed(classes, 12)}")


def named_weights(weights: Mapping[str, float], classes: Sequence[str]) -> Tensor:
    """The weight of each class [classes], 1 where none is given."""
    return torch.tensor([float(weights.get(name, 1.0)) for name in classes])


def balanced_weights(dataset: Any, classes: Sequence[str]) -> Tensor:
    """N / (C n_c) for each class [classes], of N samples, n_c of them of class c, and C classes that occur: the mean
    over all samples is 1. A class that does not occur weighs 1.

    Args:
        dataset: the training set, which says its samples' classes (`core.data.targets.class_numbers`).
        classes: their names.

    Raises:
        ScionError: it does not say them, or has other classes.
    """
    numbers = torch.tensor(class_numbers(dataset, ASKER), dtype=torch.int64)
    known = (numbers >= 0) & (numbers < len(classes))
    if not len(numbers) or not bool(known.all()):
        found = listed(sorted({str(number) for number in numbers[~known].tolist()})) or "none"
        raise ScionError(f"{ASKER}: targets of the training set are {found}, and there are {len(classes)} classes")
    counts = torch.bincount(numbers, minlength=len(classes))
    occurs = counts > 0
    weights = len(numbers) / (int(occurs.sum()) * counts.clamp(min=1).double())
    return torch.where(occurs, weights, 1.0).float()
