"""What only some methods can do. A method declares an ability by its base class, before `PEFTMethod`::

    class AdaLoRA(Scheduled, AddsLoss, PEFTMethod): ...
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from core.method import membership
from core.method.preparing import prepare_in_trainer

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


class Staged(metaclass=ABCMeta):
    """A method that needs several runs, one after the other."""

    stages: tuple[str, ...] = ()
    """Names of the runs; an option may say otherwise on the instance, and empty means one run."""

    @abstractmethod
    def advance(self, module: nn.Module | None = None) -> None:
        """Carry the attached method on into its next stage; ``module`` is what stands around the root, a head included,
        for methods that look there.

        Raises:
            ScionError: it is in its last stage.
        """


class Scheduled:
    """A method that does something after each step of the optimizer."""

    steps: int
    """Steps of the optimizer so far."""
    total: int
    """Steps of the whole run."""

    @property
    def is_scheduled(self) -> bool:
        """Whether the method acts after each step; an option may switch that off."""
        return True

    settles_late: bool = False
    """Whether `settled` is only true near the end of a run."""

    @property
    def settled(self) -> bool:
        """Whether the method is what it is to be in the end: a schedule may reach its sparsity or its budget only in
        the last steps. The best epoch of a run is chosen among those behind that."""
        return True

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after a step of the optimizer. Gradients are still there; ``steps`` counts this step too. By default
        nothing happens: some methods only need the count."""

    def training_state(self) -> dict[str, Any]:
        """What training needs beside the method's tensors (running scores, say): tensors and JSON, for checkpoints
        only."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Undo of `training_state`."""

    def follow(self, optimizer: torch.optim.Optimizer, total: int, around: nn.Module | None = None) -> Any:
        """Act after each step of ``optimizer``; a Trainer's callback does this by itself.

        Args:
            optimizer: holds the method's tensors.
            total: steps of the whole run.
            around: the module whose parameters the optimizer has, in their order; None is the root.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        return membership.follow(cast("PEFTMethod", self), optimizer, total, around)

    def enter_optimizer(self, optimizer: torch.optim.Optimizer, fresh: Sequence[nn.Parameter],
                        beside: Iterable[Tensor] | None = None) -> None:
        """Give ``fresh`` tensors of this method to ``optimizer`` (`core.method.membership.enter`)."""
        membership.enter(cast("PEFTMethod", self), optimizer, fresh, beside)

    def leave_optimizer(self, optimizer: torch.optim.Optimizer, gone: Iterable[Tensor]) -> None:
        """Take tensors from ``optimizer``, with what it keeps of them."""
        membership.leave(cast("PEFTMethod", self), optimizer, gone)


class Prepared(metaclass=ABCMeta):
    """A method that computes something from data before its first step, into tensors of its own."""

    prepares: bool = True
    """Whether there is something to compute; an option may say otherwise on the instance."""

    @abstractmethod
    def prepare(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Compute it, and set ``prepared``.

        The callback calls this once, when a `FineTuner` begins to train and neither resumes nor has loaded the method;
        elsewhere it is called by hand.

        Args:
            batches: the training samples one by one, in random order.
            loss: of such a batch, as `FineTuner.loss`.
        """

    def prepare_in(self, trainer: Any, pl_module: Any) -> None:
        """`prepare` on a Trainer's data and in its precision, as the callback calls it."""
        prepare_in_trainer(cast("PEFTMethod", self), trainer, pl_module)


class AddsLoss(metaclass=ABCMeta):
    """A method that adds a term to the task's loss."""

    @property
    def adds_loss(self) -> bool:
        """Whether the method is not itself without its term; an option or a stage may need none."""
        return True

    @abstractmethod
    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        """The term to add in `FineTuner`, or None.

        Args:
            module: the LightningModule.
            batch: (inputs, targets).
            outputs: the task's, of this batch.
        """


class OwnLoss(metaclass=ABCMeta):
    """A method that brings a loss of its own for training, and may need a module beside the model for it."""

    @abstractmethod
    def training_loss(self, pl_module: Any, batch: Any, outputs: Any) -> Tensor | None:
        """A loss to use instead of the task's in a training step, or None. If several methods return one, the first is
        used.

        Args:
            pl_module: the `FineTuner`.
            batch: (inputs, targets).
            outputs: the task's, of this batch.
        """

    def training_module(self, pl_module: Any) -> nn.Module | None:
        """A module to train beside the model, made when a `FineTuner` begins to train and has its head; or None. It is
        kept in checkpoints under ``pl_module.aside``, but in no adapter and not in inference."""
        return None


class OwnOptimizer(metaclass=ABCMeta):
    """A method that is an optimizer for its own tensors."""

    @abstractmethod
    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        """The optimizer of these groups, as `PEFTMethod.param_groups` gives them."""

    @abstractmethod
    def optimizer_bytes(self) -> int:
        """What it keeps of the method's tensors; counters of steps are left out."""
