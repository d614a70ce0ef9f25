"""The tensors of an attached method: those in use, those to store, and how many are whose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from core.anatomy import dissect
from core.graft import Graft
from core.method.attached import Home

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


def stored_tensors(method: PEFTMethod) -> dict[str, Tensor]:
    """All that must be stored to rebuild a method on its base, by names in the root, packed ones in their stored
    form."""
    packings = packings_on(method)
    found: dict[str, Tensor] = {}
    for name, tensor in live_tensors(method).items():
        if name not in packings:
            found[name] = tensor
            continue
        for part, stored in packings[name].pack(tensor).items():
            found[f"{name}.{part}"] = stored
    return found


def live_tensors(method: PEFTMethod) -> dict[str, Tensor]:
    """What `stored_tensors` stores, as it is in use."""
    parameters = dict(method.need_root().named_parameters())
    found = {name: parameters[name].detach() for name in method.base_at_start}
    found |= live_buffers(method)
    for name, tensor in method.module.state_dict().items():
        if not name.endswith("_extra_state"):
            found[f"{method.prefix}{name}"] = tensor.detach()
    return found


def live_buffers(method: PEFTMethod) -> dict[str, Tensor]:
    """The base's buffers that the method moves, as they are in use."""
    if not method.buffers_at_start:
        return {}
    buffers = dict(method.need_root().named_buffers())
    return {name: buffers[name] for name in method.buffers_at_start}


@torch.no_grad()
def rewind_buffers(method: PEFTMethod) -> None:
    """Put the base's buffers that the method moves back to their start."""
    for name, buffer in live_buffers(method).items():
        start = method.buffers_at_start[name]
        if not start.is_meta:
            buffer.copy_(start)


def packings_on(method: PEFTMethod) -> dict[str, Graft]:
    """The packings of all methods on the method's root."""
    home = getattr(method.need_root(), "peft", None)
    methods = home.methods.values() if isinstance(home, Home) else [method]
    return {name: packing for one in methods for name, packing in one.packings().items()}


def counts(method: PEFTMethod) -> dict[str, int]:
    """Trained parameters by owner (see `PEFTMethod.counts`)."""
    root = method.need_root()
    trained = {name: tensor.numel() for name, tensor in method.trainable().items()}
    norms = {name: count for name, count in trained.items() if name in method.norm_names}
    # A head inside the backbone is trained with the first method, but no method owns it.
    heads = dissect(root).head_names() if method.head == "train" else set()
    home = getattr(root, "peft", None)
    if isinstance(home, Home):
        heads |= home.trained_head
    in_head = [p for name, p in root.named_parameters() if name in heads and name not in trained]
    return {
        "method": sum(trained.values()) - sum(norms.values()),
        "norms": sum(norms.values()),
        "head": sum(p.numel() for p in in_head),
        "stored": sum(tensor.numel() for tensor in stored_tensors(method).values()),
    }


@contextlib.contextmanager
def base_at_start(method: PEFTMethod) -> Iterator[None]:
    """Within this context the base's tensors that the method moves, or that it is merged into, are at their start."""
    parameters = dict(method.need_root().named_parameters())
    # What merging has written is undone as well: a merged method can be switched off.
    base: dict[str, Tensor] = {}
    if method.merged is not None:
        base = {name: before for name, (before, _) in method.merged.values.items()}
    base |= method.base_at_start
    base |= method.buffers_at_start
    moved = {name: parameters[name] for name in base if name in parameters} | live_buffers(method)
    values = {name: tensor.data for name, tensor in moved.items()}
    try:
        for name, tensor in moved.items():  # other storage, not other values: a backward under way stays valid
            tensor.data = base[name].to(tensor.device, tensor.dtype, copy=name in method.buffers_at_start)
        yield
    finally:
        for name, tensor in moved.items():
            tensor.data = values[name]
