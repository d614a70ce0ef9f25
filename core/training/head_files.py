"""What is around the backbone of a `FineTuner` (its head), in files: taken out, and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.errors import ScionError, listed, one_line
from core.graft import Graft
from core.method.beside import OUTSIDE
from core.tensors import check_fit, check_values

if TYPE_CHECKING:
    from core.training.finetuner import FineTuner


def outside(tuner: FineTuner) -> dict[str, Tensor]:
    """The parameters around the backbone, under the names and in the form that an adapter gives them."""
    found = _around(tuner)
    for name, packing in _packings(tuner).items():
        found |= {f"{name}.{part}": stored for part, stored in packing.pack(found.pop(name)).items()}
    return found


def _around(tuner: FineTuner) -> dict[str, Tensor]:
    return {f"{OUTSIDE}{name}": p.detach() for name, p in tuner.parameters_beside().items()}


def _packings(tuner: FineTuner) -> dict[str, Graft]:
    return {f"{OUTSIDE}task.{name}": packing for name, packing in tuner.task.packings().items()}


def head_fits(tuner: FineTuner, tensors: dict[str, Tensor]) -> bool:
    """Whether a saved head has the tensors of ``tuner``'s, in their shapes."""
    here = {name: tensor.shape for name, tensor in outside(tuner).items()}
    there = {name: tensor.shape for name, tensor in tensors.items() if name.startswith(OUTSIDE)}
    return here == there


def load_outside(tuner: FineTuner, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
    """Copy a saved head into ``tuner``; missing, extra and misshapen tensors, and values that are not finite, are
    refused before any is written."""
    into = outside(tuner)
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(OUTSIDE)}
    if into.keys() != given.keys():
        raise ScionError(f"{where}: the head's tensors are {listed(map(one_line, sorted(given)), 4)}, wanted "
                         f"{listed(sorted(into), 4)}")
    for name, tensor in into.items():
        check_fit(given[name], tensor, name, where)
    if not write:
        return
    for name, tensor in into.items():
        check_values(given[name], tensor, name, where)
    packings = _packings(tuner)
    around = _around(tuner)
    unpacked: dict[str, Tensor] = {}
    for name, packing in packings.items():
        parts = {part.removeprefix(f"{name}."): given[part] for part in given if part.startswith(f"{name}.")}
        unpacked[name] = torch.empty_like(around[name])
        packing.unpack(parts, unpacked[name])
        check_values(unpacked[name], around[name], name, where)
    for name, tensor in around.items():
        tensor.copy_(unpacked[name] if name in unpacked else given[name])
