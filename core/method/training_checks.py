"""Checks that training can do what it is meant to.

The optimizer has the method's tensors, gradients reach them, the model is still the one that the method was attached
to, and nothing around it undoes them unseen.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from core.errors import ScionError, listed

if TYPE_CHECKING:
    from core.method import PEFTMethod

GRADIENT_STEPS = 3
"""Optimizer steps within which each trained tensor must have a gradient."""
PATIENCE = 10
"""How many times as many steps the gradient may be zero: some tensors only start to matter when others have moved."""


# ------------------------------------------------------------------------------------------------- the model


def check_model(method: PEFTMethod) -> None:
    """Refuse a model of which a part has been replaced or resized since the method was attached to it.

    Raises:
        ScionError: names the part.
    """
    root = method.need_root()
    modules = dict(root.named_modules())
    shapes = shapes_of(method)
    for graft in method.grafts:
        site = graft.site
        now = modules.get(site.path)
        # A wrapper around the site's module (of checkpointing, of FSDP) has taken its name: that is no replacement.
        replaced = now is not None and all(site.module is not child for child in now.modules())
        before = method.shapes_at_start.get(site.weight_name)
        if not replaced and before in (None, shapes.get(site.weight_name)):
            continue
        what = "is another module now" if replaced else "has another shape now"
        raise ScionError(f"{method.name}: {site.path or site.name} {what} than when the method was attached "
                         "(resize_token_embeddings, for one, replaces what it resizes): change the model first, and "
                         f"attach then. {method.name}.remove() takes the method off")
    parameters = dict(root.named_parameters())
    for name, value in method.base_at_start.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ScionError(f"{method.name}: {name} is gone from the model, or has another shape, since the method "
                             "was attached: change the model first, and attach then")


def shapes_of(method: PEFTMethod) -> dict[str, list[int]]:
    """The shapes of the weights at the method's sites, by their names, where there are any."""
    shapes: dict[str, list[int]] = {}
    for graft in method.grafts:
        site = graft.site
        weight = getattr(site.module, site.parameter, None)
        if isinstance(weight, Tensor):
            shapes[site.weight_name] = list(weight.shape)
    return shapes


def warn_of_recomputing(root: nn.Module, name: str) -> None:
    """Warn where a model's own gradient checkpointing is switched on and does nothing.

    transformers' layers recompute only while they are in train mode, and frozen parts are in eval mode.
    """
    layers: list[str] = []
    for path, module in root.named_modules():
        is_on = getattr(module, "gradient_checkpointing", False) is True
        # transformers gives a module this function when it turns its switch on.
        if is_on and not module.training and hasattr(module, "_gradient_checkpointing_func"):
            layers.append(path or type(module).__name__)
    if layers:
        warnings.warn(f"{name}: the model's own gradient checkpointing is on and does nothing, since frozen parts are "
                      f"in eval mode ({listed(layers, 2)}). Use checkpoint_activations(model) of core (in a "
                      "configuration: model.checkpointing: true), which also keeps methods exact", stacklevel=3)


# ------------------------------------------------------------------------------------------------- the optimizer


def check_optimizers(method: PEFTMethod, optimizers: Iterable[Any]) -> None:
    """Refuse optimizers that lack some of the tensors that the method trains.

    Raises:
        ScionError: names them and the likely reason.
    """
    held: set[int] = set()
    for optimizer in optimizers:
        held |= {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = method.trainable()
    missing = [name for name, tensor in trained.items() if id(tensor) not in held]
    if not missing:
        return
    if len(missing) == len(trained):
        why = (f"it has none of {method.name}'s: it was made before the method was attached (in __init__, or for an "
               "earlier fit). Make it in configure_optimizers, from the parameters that require a gradient")
    else:
        why = ("it has others of the method's: give it all parameters that require a gradient, or the groups of "
               "method.param_groups()")
    raise ScionError(f"{method.name}: no optimizer has {listed(missing, 3)}, which would never change; {why}")


class GradientWatch:
    """Within the first steps each trained tensor must get a gradient.

    While a learning rate of the method is zero, as in a warmup, a step does not count for tensors whose gradient is
    zero: what only matters when others have moved cannot matter yet.
    """

    def __init__(self, method: PEFTMethod) -> None:
        self.method = method
        idle = method.may_lack_gradient()
        self.waiting = {name: tensor for name, tensor in method.trainable().items() if name not in idle}
        self.steps = 0.0
        """Optimizer steps so far."""
        self.moves = 0.0
        """Those of them in which all tensors of the method could move."""

    def look(self, optimizers: Sequence[Any], share: float = 1.0) -> None:
        """Look for gradients after a backward pass, which is the ``share`` of an optimizer step.

        Raises:
            ScionError: names the tensors that no gradient reaches.
        """
        if not self.waiting:
            return
        self.steps += share
        if not self._rests(optimizers):
            self.moves += share
        resting = self.method.may_have_zero_gradient()
        waiting: dict[str, Tensor] = {}
        for name, tensor in self.waiting.items():
            if tensor.grad is None or (name not in resting and not bool(tensor.grad.any())):
                waiting[name] = tensor
        self.waiting = waiting
        late = [name for name, tensor in waiting.items() if self._is_late(tensor)]
        if late:
            self._refuse(late)

    def _is_late(self, tensor: Tensor) -> bool:
        """Whether a tensor without a gradient, or with one that is zero, should have had another by now."""
        if tensor.grad is None:
            return self.steps >= GRADIENT_STEPS
        return self.moves >= GRADIENT_STEPS * PATIENCE

    def look_now(self) -> None:
        """Refuse tensors without any gradient, if a backward pass has been made."""
        tensors = [p for p in self.method.need_root().parameters() if p.requires_grad]
        without = [name for name, tensor in self.waiting.items() if tensor.grad is None]
        # Some other tensor's gradient is the sign of a backward pass.
        if without and any(tensor.grad is not None for tensor in tensors):
            self._refuse(without)

    def _refuse(self, names: list[str]) -> None:
        raise ScionError(f"{self.method.name}: no gradient reaches {listed(names, 4)}: the module that holds it is "
                         "never called, or what follows does not depend on it")

    def _rests(self, optimizers: Sequence[Any]) -> bool:
        """Whether some tensor of the method has a learning rate of zero for the time being."""
        mine = {id(tensor) for tensor in self.method.trainable().values()}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if float(group.get("lr", 1.0)) == 0 and _has_any(group, mine):
                    return True
        return False


def watch_steps(method: PEFTMethod, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Let the first optimizer with the method's tensors look for gradients before each of its first steps."""
    watch = GradientWatch(method)
    watch.look_now()
    mine = {id(tensor) for tensor in watch.waiting.values()}
    holding = (optimizer for optimizer in optimizers if any(_has_any(group, mine) for group in optimizer.param_groups))
    first = next(holding, None)
    if first is None:
        return

    def look(*_: Any) -> None:
        watch.look(optimizers)
        if not watch.waiting:
            handle.remove()

    handle = first.register_step_pre_hook(look)


def _has_any(group: dict[str, Any], ids: set[int]) -> bool:
    """Whether a group of an optimizer has one of the tensors with these ids."""
    return any(id(p) in ids for p in group["params"])


# ------------------------------------------------------------------------------------------------- the Trainer


def check_place(method: PEFTMethod, module: nn.Module) -> None:
    """Refuse a method that is attached to another model than that of ``module``.

    Raises:
        ScionError: says what to do.
    """
    if all(child is not method.root for child in module.modules()):
        raise ScionError(f"{method.name} stands on another model ({type(method.root).__name__}) than that of this "
                         f"{type(module).__name__}, which would be trained without it: make a new "
                         f"{type(method).__name__} for each module, or call remove() on this one first")


def check_launcher(method: PEFTMethod, trainer: Any) -> None:
    """Refuse to graft in a process whose model is lost when it ends (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``)."""
    from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    strategy = getattr(trainer, "strategy", None)
    if isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher):
        raise ScionError(f"{method.name}: this strategy ({getattr(strategy, '_start_method', 'fork')}) trains "
                         "in processes of its own, and what is attached there does not come back: call "
                         f"{method.name}.attach(model) on the backbone before fitting, or use strategy='ddp'")


def check_averages(method: PEFTMethod, trainer: Any, module: nn.Module) -> None:
    """Refuse callbacks that have copied the model before the method was attached, to average its weights."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.callbacks.weight_averaging import WeightAveraging

    callbacks = list(getattr(trainer, "callbacks", []))
    if method not in callbacks:
        return
    for callback in callbacks[:callbacks.index(method)]:
        copies = _copies_in(callback, module)
        if not any(_lacks(copy, method) for copy in copies):
            continue
        message = (f"{method.name}: {type(callback).__name__} stands before it in callbacks and has copied the model "
                   "without the method, which its average never has: put it behind the methods")
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ScionError(message)
        # Another library's callback is only warned of: what it does with the copy is not known.
        if any(isinstance(copy, AveragedModel) for copy in copies):
            warnings.warn(message, stacklevel=2)


def _copies_in(callback: Any, module: nn.Module) -> list[nn.Module]:
    """The models that a callback holds beside the one in training: averages, or others of its class."""
    copies: list[nn.Module] = []
    for value in vars(callback).values():
        if isinstance(value, nn.Module) and value is not module and isinstance(value, (AveragedModel, type(module))):
            copies.append(value)
    return copies


def _lacks(copy: nn.Module, method: PEFTMethod) -> bool:
    """Whether a copy of the model does not have the method."""
    homes = [module._modules["peft"] for module in copy.modules() if "peft" in module._modules]
    return all(method.name not in getattr(home, "methods", {}) for home in homes)
