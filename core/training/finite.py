"""What is not finite: which part of a loss, which samples of a batch, which trained tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core.errors import ScionError, listed


@dataclass
class Losses:
    """A batch's outputs and the parts of its loss."""

    outputs: Tensor
    source: str
    """Whose the main loss is: the task's, or that of a method in its place."""
    main: Tensor
    terms: list[tuple[str, Tensor]]
    """What methods add, by their names."""

    def __post_init__(self) -> None:
        self.total = self.main
        for _, term in self.terms:
            self.total = self.total + term

    def culprit(self) -> str:
        """Which part is not finite, for a message."""
        for name, value in [(f"the loss of {self.source}", self.main),
                            *((f"the term that {name} adds to the loss", term) for name, term in self.terms)]:
            if not bool(torch.isfinite(value)):
                return f"{name} is {float(value)}"
        return f"the loss is {float(self.total)}"


def broken_rows(values: Any, rows: int) -> list[int]:
    """Which rows of a batch hold values that are not finite."""
    found = torch.zeros(rows, dtype=torch.bool)
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[:1] == (rows,):
            found |= ~torch.isfinite(tensor.detach()).reshape(rows, -1).all(1).cpu()
    return found.nonzero().flatten().tolist()


def check_trained(module: Any, consequence: str) -> None:
    """Refuse trained tensors of a LightningModule that are not finite; ``consequence`` ends the message."""
    optimizers = module.trainer.optimizers if module._trainer is not None else []
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad or id(p) in held}
    broken = [name for name, p in trained.items() if not bool(torch.isfinite(p).all())]
    if not broken:
        return
    hint = ""
    if any(trained[name].dtype == torch.float16 for name in broken):
        hint = "; Adam's eps of 1e-8 is zero in float16: set optimizer.options.eps to 1e-4, or take bf16-true"
    raise ScionError(f"{listed(broken, 2)}: values that are not finite; {consequence}{hint}")
