"""Building something without memory first, to see how large it would be.

What a file describes is built on the meta device before it is built in earnest. Tensors have shapes there and take no
memory, so that absurd sizes cost nothing, and show when the shapes are compared with those in the file.
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

CALLS = 20_000
CALLS_A_TENSOR = 150
"""Calls of torch within which a rehearsal must end: so many, and so many more for each tensor that exists already."""
SMALL = 2**24
"""Numbers that may be made without a rehearsal."""
SHORT = 64
"""Entries up to which the length of a list does not count as a size."""


def hollow(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors without their values, on the meta device; what is no tensor stays as it is."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        else:
            found[name] = tensor
    return found


def reach(arguments: Mapping[str, Any]) -> int:
    """A bound on how many times as many numbers recorded arguments can ask for: the product of all sizes in them."""
    found = 1
    for name, value in arguments.items():
        if name != "seed":  # any number, which makes nothing larger
            found *= largest(value)
    return found


def largest(value: Any) -> int:
    """The largest size that a recorded value can mean: a number, the number that it is divided by, a long list."""
    if value is None or isinstance(value, (bool, str)):
        return 1
    if isinstance(value, (int, float)):
        return _size_of_number(abs(value))
    if isinstance(value, Mapping):
        # A method within a composition has sizes that multiply; other mappings are a choice of values.
        parts = [reach(value)] if "class" in value else map(largest, value.values())
    else:
        parts = map(largest, value)
    entries = len(value) if len(value) > SHORT else 1
    return max(parts, default=1) * entries


def _size_of_number(size: float) -> int:
    """The size that a number means: itself, or for a fraction the number that it divides by (0.001 means 1000)."""
    if size >= 1:
        return int(size)
    if size:
        return int(min(1 / size, 2**63))  # the least floats have a reciprocal that is infinite
    return 1


def is_small(factor: int, model: nn.Module) -> bool:
    """Whether what has this `reach` cannot be large on ``model``, whatever the sizes in it mean."""
    # Each tensor of a method is about as long as one axis of a parameter, times sizes among its arguments.
    sizes = sum(sum(parameter.shape) for parameter in model.parameters())
    return factor * max(1, sizes) <= SMALL and factor**2 <= SMALL


def twin(model: nn.Module) -> nn.Module | None:
    """A copy of ``model`` on the meta device, without memory; None where it cannot be copied."""
    tensors: list[Tensor] = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    tensors += [buffer for _, buffer in model.named_buffers(remove_duplicate=False)]
    for method in methods_on(model):
        tensors += method.base_at_start.values()
    # deepcopy takes what is in its memo, by id, for copied already: so no tensor's values are ever copied.
    copies: dict[int, Any] = {}
    for tensor in tensors:
        if id(tensor) not in copies:
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = empty
    try:
        return copy.deepcopy(model, copies)
    except Exception:  # some attribute of the user's has no copy; there is nothing to compare with then
        return None


@contextlib.contextmanager
def rehearsing(tensors: int = 0, calls: int = CALLS) -> Iterator[None]:
    """Within this context tensors are made on the meta device, without warnings, and by a limited number of calls.

    Args:
        tensors: how many exist already, in the model and in the file; each allows for more calls.
        calls: calls of torch that are allowed beside those.

    Raises:
        ScionError: torch is called more often.
    """
    bound = _Bounded(calls + CALLS_A_TENSOR * tensors)
    with torch.random.fork_rng(devices=[]), torch.device("meta"), bound, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of them come again when it is built in earnest
        yield


class _Bounded(TorchFunctionMode):
    """Refuses what calls torch too often."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > self.most:
            raise ScionError("asks for far more tensors than there can be")
        return func(*args, **(kwargs or {}))
