"""Building something without memory first, to see what it would be.

What a file describes is built on the meta device before it is built in earnest: its tensors have shapes there and take
no memory, so that absurd sizes cost nothing and are seen by comparing the shapes with those in the file.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from core.errors import ScionError
from core.method import methods_on

CALLS, CALLS_A_TENSOR = 20_000, 150
"""Calls of torch within which a rehearsal must end: so many, and so many more for each tensor that is there already."""
SMALL = 2**24
"""Numbers that may be made without a rehearsal."""
SHORT = 64
"""Entries up to which the length of a list says nothing."""


def hollow(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without their values, on the meta device; what is no tensor stays as it is."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if isinstance(tensor, Tensor) else tensor
            for name, tensor in tensors.items()}


def reach(arguments: Mapping[str, Any]) -> int:
    """A bound on how many times as many numbers recorded arguments can ask for: the product of all sizes in them."""
    found = 1
    for name, value in arguments.items():
        if name != "seed":
            found *= largest(value)
    return found


def largest(value: Any) -> int:
    """The largest size that a recorded value can mean: a number, the number that it is divided by, a long list."""
    if value is None or isinstance(value, (bool, str)):
        return 1
    if isinstance(value, (int, float)):
        size = abs(value)
        return int(size) if size >= 1 else int(min(1 / size, 2**63)) if size else 1
    if isinstance(value, Mapping):
        parts = [reach(value)] if "class" in value else map(largest, value.values())
    else:
        parts = map(largest, value)
    return max(parts, default=1) * (len(value) if len(value) > SHORT else 1)


def is_small(factor: int, model: nn.Module) -> bool:
    """Whether what has this `reach` cannot be large on ``model``, whatever the sizes in it mean."""
    sizes = sum(sum(parameter.shape) for parameter in model.parameters())
    return factor * max(1, sizes) <= SMALL and factor**2 <= SMALL


def twin(model: nn.Module) -> nn.Module | None:
    """A copy of ``model`` on the meta device, without memory; None where it cannot be copied."""
    copies: dict[int, Any] = {}
    tensors = [tensor for found in (model.named_parameters, model.named_buffers)
               for _, tensor in found(remove_duplicate=False)]
    tensors += [tensor for method in methods_on(model) for tensor in method.base_at_start.values()]
    for tensor in tensors:
        if id(tensor) not in copies:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = empty
    try:
        return copy.deepcopy(model, copies)
    except Exception:  # an attribute of the user's own that has no copy; there is nothing to compare with then
        return None


@contextlib.contextmanager
def rehearsing(tensors: int = 0, calls: int = CALLS) -> Iterator[None]:
    """Within this context tensors are made on the meta device, without warnings, and not without end.

    Args:
        tensors: how many there are already, in the model and in the file; each allows for more calls.
        calls: of torch that are allowed for beside those.

    Raises:
        ScionError: torch is called more often.
    """
    bound = _Bounded(calls + CALLS_A_TENSOR * tensors)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), bound, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said in earnest
        yield


class _Bounded(TorchFunctionMode):
    """Ends what calls torch too often."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.calls = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self.most:
            raise ScionError("asks for far more tensors than there can be")
        return func(*args, **(kwargs or {}))
