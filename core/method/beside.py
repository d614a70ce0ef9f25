"""What stands beside the backbone in the module around it (a head, in most cases): saved with an adapter, and restored.

A `core.FineTuner` says itself what that is; of any other module it is what is trained outside the backbone.
"""

from __future__ import annotations

from typing import Any, NotRequired, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor, nn

from core.errors import ScionError, listed, one_line
from core.tensors import check_fit, check_values

OUTSIDE = "outside."
"""Prefix, in an adapter, of tensors that belong to the module around the backbone."""


Part = dict[str, Any]
"""A backbone or a task: ``{"class": "audio:AST", arguments}``; see `core.training.recorded_model.spec`."""


class ModelRecord(TypedDict):
    """How to build what the methods stand on, and the task's head."""

    backbone: Part | None
    task: Part | None
    classes: list[str]
    multilabel: bool
    seed: int
    info: NotRequired[dict[str, Any]]
    """What the data say beside the classes (`core.data.DataInfo.further`)."""


@runtime_checkable
class KnowsItsHead(Protocol):
    """A module around a backbone that says itself what is beside that, as `core.FineTuner` does."""

    def parameters_beside(self) -> dict[str, nn.Parameter]:
        """What inference needs beside the backbone, by its names in the module."""
        ...

    def tensors_beside(self) -> dict[str, Tensor]:
        """The same, under the names and in the form that an adapter gives them."""
        ...

    def load_beside(self, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
        """Copy such tensors into it; with ``write=False`` only say what is wrong with them."""
        ...

    def model_record(self) -> dict[str, Any]:
        """How to build backbone and head (`ModelRecord`)."""
        ...


def path_of(root: nn.Module, module: nn.Module) -> str:
    """Where ``root`` is in ``module``.

    Raises:
        ScionError: it is not there.
    """
    for path, child in module.named_modules():
        if child is root:
            return path
    raise ScionError(f"the model that the methods stand on ({type(root).__name__}) is no part of this "
                     f"{type(module).__name__}")


def tensors_beside(module: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """The tensors to save of what stands in ``module`` beside ``root``, under their names in an adapter."""
    if isinstance(module, KnowsItsHead):
        return module.tensors_beside()
    return {f"{OUTSIDE}{name}": tensor.detach() for name, tensor in _trained(module, root).items()}


def load_beside(module: nn.Module, root: nn.Module, tensors: dict[str, Tensor], where: str, write: bool = True) -> None:
    """Copy saved tensors into what stands in ``module`` beside ``root``.

    Raises:
        ScionError: missing, extra or misshapen tensors, or values that are not finite; nothing is written then.
    """
    if isinstance(module, KnowsItsHead):
        module.load_beside(tensors, where, write)
        return
    given = {name.removeprefix(OUTSIDE): tensor for name, tensor in tensors.items() if name.startswith(OUTSIDE)}
    here = _all(module, root)
    missing = sorted(set(_trained(module, root)) - set(given))
    if missing:
        raise ScionError(f"{where}: tensors beside the backbone are missing: {listed(missing, 4)}")
    extra = sorted(set(given) - set(here))
    if extra:
        raise ScionError(f"{where}: {type(module).__name__} has no {listed(map(one_line, extra), 4)}, which stood "
                         "beside the backbone")
    # All shapes first: values are only read of a file whose names and shapes are right.
    for name, tensor in given.items():
        check_fit(tensor, here[name], name, where)
    for name, tensor in given.items():
        check_values(tensor, here[name], name, where)
    if write:
        with torch.no_grad():
            for name, tensor in given.items():
                here[name].copy_(tensor)


def _all(module: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """All tensors of the module's state dict that do not belong to ``root``."""
    inside = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    # nn.Module's own: a LightningModule's may leave the frozen backbone out, or be somebody's own.
    state: dict[str, Any] = nn.Module.state_dict(module, keep_vars=True)
    found = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and id(tensor) not in inside and not name.endswith("_extra_state"):
            found[name] = tensor
    return found


def _trained(module: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """Of those the trained parameters, and the buffers of modules that have some (running statistics)."""
    # A batch norm's running statistics are no parameters, but what it has learned all the same.
    found = _all(module, root)
    trained = {name for name, tensor in found.items() if tensor.requires_grad}
    owners = {name.rpartition(".")[0] for name in trained}
    buffers = {name for name, _ in module.named_buffers()}
    return {name: tensor for name, tensor in found.items()
            if name in trained or (name in buffers and name.rpartition(".")[0] in owners)}
