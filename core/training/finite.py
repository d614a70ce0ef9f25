"""What is not finite: which part of a loss, which samples of a batch, which trained tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from core.callbacks.exact_resume import gather
from core.data.batch import batch_size
from core.errors import ScionError, listed
from core.method import sample_name

if TYPE_CHECKING:
    from core.training.finetuner import FineTuner


@dataclass
class Losses:
    """A batch's outputs and the parts of its loss."""

    outputs: Any
    source: str
    """Whose the main loss is: the task's, or that of a method in its place."""
    main: Tensor
    terms: list[tuple[str, Tensor]]
    """What methods add, by their names."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """What the main loss is the weighted sum of, where it has parts."""
    labels: int | None = None
    """How many labels the loss is a mean over; None where samples count (`core.training.token_means`)."""

    def __post_init__(self) -> None:
        self.total = self.main
        for _, term in self.terms:
            self.total = self.total + term

    def culprit(self) -> str:
        """Which part is not finite, for a message."""
        parts = [(f"the part {name} of the loss of {self.source}", part) for name, part in self.parts.items()]
        parts += [(f"the loss of {self.source}", self.main)]
        parts += [(f"the term that {name} adds to the loss", term) for name, term in self.terms]
        for name, value in parts:
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


def stop_unless_finite(tuner: FineTuner, losses: Losses, batch: Any, index: int) -> None:
    """Stop at the first loss that is not finite, before it moves a weight; all processes stop together.

    Raises:
        ScionError: says which part of the loss it is, of which samples, in which step.
    """
    trainer: Any = tuner._trainer
    finite = torch.isfinite(losses.total.detach())
    is_one_of_many = trainer is not None and trainer.world_size > 1
    # A process that raised alone would leave the others waiting for its gradients.
    everywhere = finite
    if is_one_of_many:
        everywhere = finite.float()
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    if bool(everywhere):
        return
    own = None if bool(finite) else what_is_not_finite(tuner, losses, "train", batch, index)
    found: list[Any] = [own]
    if is_one_of_many:
        found = gather(own, tuner.trainer)
    what = next(filter(None, found))
    if trainer is None:
        raise ScionError(f"training: {what}")
    raise ScionError(f"{tuner.stage_name('train')}, step {trainer.global_step + 1}: {what}")


def what_is_not_finite(tuner: FineTuner, losses: Losses, stage: str, batch: Any, index: int) -> str:
    """Which part of a batch's loss is not finite, and for which samples."""
    inputs, targets = batch
    size = batch_size(inputs)
    # From the inputs on: the first part that is broken is the reason for all that follow.
    broken = broken_rows(inputs, size)
    part = "the inputs are not finite"
    if not broken:
        broken = broken_rows(losses.outputs, size)
        part = "the outputs of the head are not finite"
        if broken and broken_rows(_reading(tuner, inputs, targets), size):
            part = "the features of the backbone are not finite"
    if not broken:
        part = losses.culprit()
    names = _sample_names(tuner, stage, index, broken or list(range(size)))
    hint = "a smaller optimizer.lr may help, or a look at the samples"
    if 0 < len(broken) < size:
        hint = "look at the samples"
    return f"{part} ({listed(names, 4)}); {hint}"


def _reading(tuner: FineTuner, inputs: Any, targets: Any) -> Any:
    # In eval mode, so that no batch norm takes the broken batch into its statistics.
    training = tuner.training
    with torch.no_grad():
        tuner.eval()
        found = tuner.read(inputs, targets)
        tuner.train(training)
    return found


def _sample_names(tuner: FineTuner, stage: str, index: int, rows: list[int]) -> list[str]:
    """What the samples in these rows of a batch are called: their files, where the data know them."""
    loader = tuner.loader_of(stage)
    places = loader.indices(index) if loader is not None else []
    if loader is None or not places:
        return [f"row {row} of batch {index}" for row in rows]
    return [sample_name(tuner.trainer, places[row], loader.dataset) for row in rows]
