"""The optimizer of a `FineTuner`: exactly its trained tensors, once each, with learning rates and decay resolved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from core.errors import ScionError, nearest
from core.method import OwnOptimizer, PEFTMethod
from core.optim import ChainedOptimizer

if TYPE_CHECKING:
    from core.training.finetuner import FineTuner


@dataclass
class OwnedGroups:
    """Groups of parameters, and the method that they belong to; None is nobody's (the task's head)."""

    owner: PEFTMethod | None
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class GroupKey:
    """What parameters that no method owns must have in common to share a group."""

    lr_factor: float = 1.0
    sparse_rows: bool = False
    """Rows of an embedding whose gradients are sparse."""
    vector: bool = False
    """Fewer than two axes: not decayed."""

    def options(self) -> dict[str, Any]:
        """The group's, beside its parameters."""
        found: dict[str, Any] = {"lr_factor": self.lr_factor}
        if self.vector:
            found["weight_decay"] = 0.0
        if self.sparse_rows:
            found["rows"] = True
        return found


@dataclass
class _Sorted:
    """Groups by the kind of optimizer that takes them."""

    ordinary: list[dict[str, Any]] = field(default_factory=list)
    sparse_rows: list[dict[str, Any]] = field(default_factory=list)
    own: list[torch.optim.Optimizer] = field(default_factory=list)


def groups_of(tuner: FineTuner) -> list[OwnedGroups]:
    """The groups of all that ``tuner`` trains. The task's head and other tensors that no method owns take the first
    method's recommendation."""
    methods = [method for method in tuner.methods if method.is_trained]
    found = []
    for method in methods:
        groups = [_resolve(tuner, group, method.suggested) for group in method.param_groups()]
        found.append(OwnedGroups(method, groups))
    # What no method owns is the head in most cases, which is trained for the method that comes first.
    first = dict(methods[0].suggested if methods else PEFTMethod.recommended)
    first["lr"] = first.get("head_lr", first["lr"])
    loose = [_resolve(tuner, group, first) for group in _loose_groups(tuner, found)]
    return [*found, OwnedGroups(None, loose)]


def _loose_groups(tuner: FineTuner, owned: list[OwnedGroups]) -> list[dict[str, Any]]:
    """Groups of the trained parameters that no method owns: matrices first, then vectors."""
    seen = {id(tensor) for entry in owned for group in entry.groups for tensor in group["params"]}
    tables = {id(module.weight) for module in tuner.modules() if isinstance(module, nn.Embedding) and module.sparse}
    # The two usual groups come first whatever is found first: the optimizer's state is saved by position.
    loose: dict[GroupKey, list[nn.Parameter]] = {GroupKey(): [], GroupKey(vector=True): []}
    for name, parameter in tuner.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            key = GroupKey(_lr_factor(tuner, name), id(parameter) in tables, parameter.dim() < 2)
            loose.setdefault(key, []).append(parameter)
    return [{"params": parameters, **key.options()} for key, parameters in loose.items() if parameters]


def _lr_factor(tuner: FineTuner, name: str) -> float:
    for start, factor in tuner.task.lr_factors.items():
        if name.startswith(f"task.{start}"):
            return factor
    return 1.0


def _resolve(tuner: FineTuner, group: dict[str, Any], recommended: dict[str, float]) -> dict[str, Any]:
    """A group with its learning rate and decay as numbers; what it says itself comes before the run's settings."""
    settings = tuner.optimizer
    lr = recommended["lr"] if settings.lr == "auto" else settings.lr
    decay = recommended["weight_decay"] if settings.weight_decay == "auto" else settings.weight_decay
    own = dict(group)
    return {"lr": lr * own.pop("lr_factor", 1.0), "weight_decay": decay, **own}


def make_optimizer(tuner: FineTuner) -> torch.optim.Optimizer:
    """The run's optimizer, beside those that methods bring; several step as one.

    Raises:
        ScionError: torch has no such optimizer, it does not take the options, or there is nothing to train.
    """
    settings = tuner.optimizer
    known = [name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)]
    if settings.name not in known:
        raise ScionError(f"optimizer.name: torch.optim has no {settings.name!r}{nearest(settings.name, known)}")
    try:  # torch's optimizers complain of options that they do not have by TypeError
        sorted_groups = _sort(tuner)
        optimizers = list(sorted_groups.own)
        if sorted_groups.ordinary:
            optimizers.insert(0, getattr(torch.optim, settings.name)(sorted_groups.ordinary, **settings.options))
        if sorted_groups.sparse_rows:  # Adam for the rows that a batch has read, and no others
            options = {key: settings.options[key] for key in ("betas", "eps") if key in settings.options}
            optimizers.append(torch.optim.SparseAdam(sorted_groups.sparse_rows, **options))
    except TypeError as error:
        raise ScionError(f"optimizer.options: {error}") from None
    if sorted_groups.sparse_rows and tuner.trainer.gradient_clip_val:
        raise ScionError("trainer.gradient_clip_val: the sparse gradients of what a method keeps for each class "
                         "cannot be clipped; leave it out")
    if not optimizers:
        raise ScionError("nothing to train: every tensor is frozen and there is no head")
    return optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)


def _sort(tuner: FineTuner) -> _Sorted:
    found = _Sorted()
    for entry in groups_of(tuner):
        if entry.groups and isinstance(entry.owner, OwnOptimizer):
            found.own.append(entry.owner.make_optimizer(entry.groups, **tuner.optimizer.options))
            continue
        for group in entry.groups:
            (found.sparse_rows if group.get("rows") else found.ordinary).append(group)
    return found
