"""Which tensors of a method an optimizer has: some methods train other tensors as a run goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.errors import ScionError

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


class Membership:
    """What a method remembers of the optimizer that trains it."""

    def __init__(self) -> None:
        self.handle: Any = None
        """Of the hook behind each step."""
        self.around: nn.Module | None = None
        """The module whose parameters the optimizer has; None is the root."""
        self.late: list[Tensor] = []
        """Tensors that came after data-parallel training had begun."""

    def end(self) -> None:
        """Follow no optimizer any more."""
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.around, self.late = None, None, []


def follow(method: PEFTMethod, optimizer: torch.optim.Optimizer, total: int, around: nn.Module | None) -> Any:
    """Let a scheduled method act after each step of ``optimizer``, of ``total``; returns the hook's handle."""
    method.total, method.membership.around = total, around
    scheduled: Any = method

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        method.steps += 1
        if method.is_trained and method.attached:
            scheduled.after_step(optimizer)

    return optimizer.register_step_post_hook(hook)


def enter(method: PEFTMethod, optimizer: torch.optim.Optimizer, fresh: Sequence[nn.Parameter],
          beside: Iterable[Tensor] | None = None) -> None:
    """Give ``fresh`` tensors of a method to ``optimizer``.

    They join the group of those ``beside`` which they come (by default all that it has of this method), so that
    schedules go on, in the order in which a new optimizer would have them, so that its state can be loaded.

    Raises:
        ScionError: the optimizer has none of the method's tensors.
    """
    neighbours = {id(tensor) for tensor in (method.trainable().values() if beside is None else beside)}
    # An optimizer's state is loaded by position, and a resumed run makes its groups in the module's order.
    around = method.membership.around or method.need_root()
    order = {id(p): i for i, p in enumerate(around.parameters())}
    groups = []
    for group in optimizer.param_groups:
        are_matrices = [p.dim() > 1 for p in group["params"] if id(p) in neighbours]
        if are_matrices:
            groups.append((group, are_matrices))
    for tensor in fresh:
        if not groups:
            raise ScionError(f"{method.name}: the optimizer has none of its tensors")
        # Matrices have groups of their own where they are decayed.
        fitting = [group for group, are_matrices in groups if (tensor.dim() > 1) in are_matrices]
        tensors = (fitting or [group for group, _ in groups])[0]["params"]
        positions = [order.get(id(p), 0) for p in tensors]
        tensors.append(tensor)
        if positions == sorted(positions):
            tensors.sort(key=lambda p: order.get(id(p), 0))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        method.membership.late += fresh


def leave(method: PEFTMethod, optimizer: torch.optim.Optimizer, gone: Iterable[Tensor]) -> None:
    """Take tensors from ``optimizer``, with what it keeps of them."""
    lost = {id(tensor): tensor for tensor in gone}
    for group in optimizer.param_groups:
        group["params"][:] = [p for p in group["params"] if id(p) not in lost]
    # A chained optimizer has the groups, and its parts the state.
    for one in getattr(optimizer, "optimizers", [optimizer]):
        for tensor in lost.values():
            one.state.pop(tensor, None)
    method.membership.late = [tensor for tensor in method.membership.late if id(tensor) not in lost]


def average_late(tensors: Iterable[Tensor]) -> None:
    """Average over all processes the gradients of tensors that came late: DistributedDataParallel averages those that
    it was made with."""
    for tensor in tensors:
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.distributed.all_reduce(gradient)
        tensor.grad = gradient / torch.distributed.get_world_size()
