"""The random state: seeded for a while, kept and restored, and shared out among several processes."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any names and numbers, the same on every machine and in every process."""
    text = "\0".join(map(str, parts))
    # Python's own hash() of a text differs from process to process. Names of files need not be valid text.
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # so that it fits a signed number of 64 bits


@contextlib.contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """The global random state seeded by the given names, and back as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(*parts))
        yield


def random_states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, loadable with ``weights_only=True``."""
    kind, keys, *rest = numpy.random.get_state()
    # ``weights_only`` reads no arrays of NumPy, and torch computes nothing in uint32: hence a tensor in int64.
    numbers = torch.from_numpy(keys.astype("int64"))  # type: ignore[union-attr]
    states: dict[str, Any] = {}
    states["torch"] = torch.get_rng_state()
    states["python"] = _lists(random.getstate())
    states["numpy"] = [kind, numbers, *rest]
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Undo of `random_states`."""
    torch.set_rng_state(states["torch"].cpu())
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    numbers = keys.cpu().numpy().astype("uint32")
    numpy.random.set_state((kind, numbers, *rest))
    if "cuda" not in states or not torch.cuda.is_available():
        return
    # On a machine with other devices there is no telling which state is whose.
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _lists(value: Any) -> Any:
    """A value with lists for its tuples, at every depth."""
    if isinstance(value, tuple):
        return [_lists(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------- several processes


def part_random_states(rank: int) -> None:
    """Give each process other draws (dropout masks for its samples); the first one's stay as they are."""
    if rank == 0:
        return
    seed = seed_of(torch.initial_seed(), "process", rank)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # it takes no larger ones
    torch.manual_seed(seed)


def draw_for_all(draw: Callable[[], Tensor], device: torch.device) -> Tensor:
    """What ``draw`` gives in the first process, in every one: for what all samples of a joint batch share.

    It is to be called by all processes at the same point, as a forward in training is.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return draw()
    own = _state(device)
    # A copy, since broadcast writes into it; on the device, since NCCL does not reach the CPU's memory.
    first = own.to(device, copy=True)
    dist.broadcast(first, 0)
    if dist.get_rank() == 0:
        return draw()
    _set_state(first.cpu(), device)
    try:
        return draw()
    finally:
        _set_state(own, device)  # so that the process's later draws stay different from the others'


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def dropout_for_all(dropout: nn.Dropout, x: Tensor) -> Tensor:
    """``dropout`` of a tensor that all samples share, a prompt for instance: one mask for the joint batch."""
    if not dropout.training or not dropout.p:
        return dropout(x)
    return draw_for_all(lambda: dropout(x), x.device)
