"""Steps of a loss that counts labels and not samples: every label of a step weighs the same.

Lightning averages the mean losses of a step's micro-batches, and of its processes, so that a label in a batch with few
of them moves the weights more than one in a batch with many. Here a micro-batch gives its loss as a sum over labels,
divided by a constant, and once the step's labels are all counted its gradient is scaled to their mean: after mixed
precision has taken its own factor out, before any callback looks at gradients, and before they are clipped.

What methods add to the loss is weighed with the batch that it was computed from, as if it stood at each label.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.callbacks.exact_resume import gather
from core.data import Share
from core.errors import ScionError
from core.tasks.base import Task
from core.training.finite import Losses

SCALE = 1024
"""What sums over labels are divided by, so that they are about as large as means. A power of two rounds nothing."""


def labels_of(task: Task, outputs: Any, targets: Any) -> int | None:
    """How many labels a batch's mean loss is over; None where the task counts samples."""
    counted = task.counts(outputs, targets)
    return None if counted is None else int(counted)


def no_loss(outputs: Any) -> Tensor:
    """The loss of a batch without labels, whose mean would be 0 / 0: zero, with gradients of zero for all that the
    outputs depend on, which several processes wait for."""
    total = torch.zeros(())
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            total = (leaf * 0).sum() + total.to(leaf)
    return total


class TokenMeans(L.Callback):
    """Makes the gradient of a step that of the mean loss over all its labels: of all its micro-batches, fewer at an
    epoch's end, and of all processes. A checkpoint amid the micro-batches of a step keeps what they have added up."""

    def __init__(self) -> None:
        self.labels: int | None = None
        """Labels of the present step so far, in this process; None where samples count."""
        self._kept: list[dict[str, Any]] | None = None
        """Of each process, what the checkpoint holds that this run goes on from."""

    @classmethod
    def ensure(cls, trainer: L.Trainer, task: Task) -> TokenMeans | None:
        """That of ``trainer``, made where it has none, for a task that counts labels; None for any other task.

        Raises:
            ScionError: the Trainer's strategy adds up gradients where nobody can scale them.
        """
        if type(task).counts is Task.counts:
            return None
        if trainer.strategy.handles_gradient_accumulation:
            raise ScionError(f"trainer.strategy: {type(trainer.strategy).__name__} adds up gradients by itself, and a "
                             f"loss that counts labels ({type(task).__name__}) scales them; take ddp or fsdp")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, cls):
                return callback
        # In front: methods and monitors behind it see gradients of the mean.
        callbacks.insert(0, cls())
        return callbacks[0]

    def weigh(self, losses: Losses, labels: int, share: Share, trainer: L.Trainer, index: int) -> Tensor:
        """What backward gets of a batch, the number ``index`` of its epoch.

        Args:
            losses: the batch's mean losses.
            labels: how many labels they are means over.
            share: what this process has of the joint batch; labels of a sample that does not count do not either.
            trainer: the Trainer.
            index: the batch's number in the epoch.
        """
        is_first = index % trainer.accumulate_grad_batches == 0  # with which Lightning sets gradients to zero
        if is_first or self.labels is None:
            self.labels = 0
        own = labels if share.own else 0
        self.labels += own
        return losses.total * (own / SCALE)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        if self.labels is None:
            return
        labels = self._labels_everywhere(trainer)
        if not labels:  # all gradients are zero, and stay so
            return
        # Lightning has divided by the number of micro-batches, and the processes have taken their mean.
        factor = SCALE * trainer.accumulate_grad_batches * trainer.world_size / labels
        for parameter in _trained(pl_module, optimizer):
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _labels_everywhere(self, trainer: L.Trainer) -> int:
        counted = torch.tensor(self.labels, device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(counted)
        return int(counted)

    # ------------------------------------------------------------------------------- across an interruption

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.labels = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        is_amid_step = trainer.fit_loop._should_accumulate()
        if self.labels is None or not is_amid_step or "optimizer_states" not in checkpoint:
            return
        gradients = {name: p.grad.cpu() for name, p in pl_module.named_parameters() if p.grad is not None}
        resume = checkpoint.setdefault("resume", {"methods": {}})
        resume["labels"] = gather({"labels": self.labels, "gradients": gradients}, trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._kept = checkpoint.get("resume", {}).get("labels")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept, self._kept = self._kept, None
        # Of another number of processes nothing can be had; `ExactResume` says so.
        if kept is None or len(kept) != trainer.world_size:
            return
        own = kept[trainer.global_rank]
        self.labels = own["labels"]
        for name, parameter in pl_module.named_parameters():
            if name in own["gradients"]:
                parameter.grad = own["gradients"][name].to(parameter)


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters of the module and of the optimizer, each once."""
    seen: set[int] = set()
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in [*module.parameters(), *held]:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield parameter
