"""What attached methods change, taken from a model as a patch."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError, listed
from core.method import PEFTMethod, home_in, methods_on, uncompiled
from core.method.beside import OUTSIDE, KnowsItsHead
from core.method.described import Names
from core.patch.change import Change, PatchData


def take_from(model: nn.Module, rank: int | None = None) -> PatchData:
    """What the methods attached to ``model`` change (see `Patch.take`)."""
    if rank is not None and rank < 1:
        raise ScionError(f"Patch.take: rank {rank} must be at least 1")
    around = uncompiled(model)
    methods = methods_on(around)
    if not methods:
        raise ScionError("Patch.take: no method is attached to this model, so there is nothing to take")
    _, root = home_in(around)  # type: ignore[misc]
    if any(method.root is not root for method in methods):
        raise ScionError("Patch.take: methods are attached to several modules in this model; give one of them")
    home = root.get_submodule("peft")
    base = str(home.base_now().described)  # type: ignore[operator, union-attr]
    heads = list(home.heads)  # type: ignore[arg-type]
    parameters = dict(root.named_parameters())
    trained = [name for name in heads if name in parameters and parameters[name].requires_grad]
    head = {name: parameters[name].detach().cpu().clone() for name in trained}
    architecture = architecture_of(root)
    before = _before(parameters, methods)
    low = _factors(root)
    changes: dict[str, Change] = {}
    merged: list[PEFTMethod] = []
    try:
        for method in methods:
            method.merge()
            merged.append(method)
        _check_nothing_new(root, before)
        for name, start in before.items():
            now = root.get_parameter(name).detach()
            if name not in heads and not torch.equal(now, start):
                change = low.get(name) or _difference(now, start)
                changes[name] = change if rank is None else change.truncated(rank)
    finally:
        for method in reversed(merged):
            method.unmerge()
    patch = PatchData(changes, base, head, architecture, path=dissect(root).inputs.path)
    if around is root:
        return patch
    return replace(patch, **_surroundings(around, root))


def _before(parameters: dict[str, nn.Parameter], methods: list[PEFTMethod]) -> dict[str, Tensor]:
    """The base's parameters as they are without the methods."""
    before = {name: p.detach().clone() for name, p in parameters.items() if not name.startswith("peft.")}
    # Methods that train the base's own tensors keep what those were.
    for method in methods:
        for name, start in method.base_at_start.items():
            before[name] = start.to(parameters[name])
    return before


def _difference(now: Tensor, start: Tensor) -> Change:
    """A dense change from ``start``."""
    change = now.double() - start.double()
    return Change(change.float().cpu(), None, tuple(start.shape))


def architecture_of(model: nn.Module, from_root: bool = False) -> str:
    """The class that a backbone is described as, and a digest of the names and shapes of its parameters.

    Two models of one architecture have the same, whatever their values and whatever stands around them. What is apart
    from the backbone (heads, a pooler) and what methods have added does not count. With ``from_root`` it is that of
    earlier versions, with all but a task head.
    """
    anatomy = dissect(model)
    heads, names = anatomy.head_names(), Names.of(anatomy)
    parts: list[str] = []
    for name, parameter in model.named_parameters():
        is_apart = name in heads if from_root else names.is_apart(name)
        if not is_apart and not name.startswith("peft."):
            own = name if from_root else names.in_file(name)
            parts.append(f"{own}{list(parameter.shape)}")
    # Sorted, for the order in which a class makes its modules says nothing about their weights.
    text = "\n".join([anatomy.family, *sorted(parts)])
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{anatomy.family} {digest[:16]}"


def _surroundings(around: nn.Module, root: nn.Module) -> dict[str, Any]:
    """What a patch holds of the module around the backbone: what is trained beside it, and how both are built."""
    found: dict[str, Any] = {}
    if isinstance(around, KnowsItsHead):
        beside = {name.removeprefix(OUTSIDE): tensor for name, tensor in around.tensors_beside().items()}
        found["model"] = around.model_record()
    else:
        inside = {id(p) for p in root.parameters()}
        beside = {name: p for name, p in around.named_parameters() if id(p) not in inside and p.requires_grad}
    found["beside"] = {name: tensor.detach().cpu().clone() for name, tensor in beside.items()}
    return found


def _check_nothing_new(root: nn.Module, before: dict[str, Tensor]) -> None:
    """Refuse methods whose merging has made parameters that the base does not have."""
    made = [name for name, _ in root.named_parameters() if name not in before and not name.startswith("peft.")]
    if made:
        raise ScionError(f"Patch.take: merging makes {listed(made, 2)}, which the base does not have, and a patch adds "
                         "to what is there alone; save the merged model instead")


def _factors(model: nn.Module) -> dict[str, Change]:
    """Low-rank changes, exact, of parameters that only grafts with ``factors`` change."""
    found: dict[str, Change] = {}
    spoiled: set[str] = set()
    for method in methods_on(model):
        spoiled |= set(method.base_at_start)
        for graft in method.grafts:
            site = graft.site
            name = site.weight_name
            parts = graft(verb="factors")
            # A Conv1D's weight is [in, out], and a change is up @ down in the layout [out, in].
            if parts is None or site.kind == "conv1d":
                spoiled.add(name)
                continue
            up, down = (part.detach().float().cpu() for part in parts)
            if site.rows is not None:
                rows = torch.zeros(site.full_weight.shape[0], up.shape[1])
                up = site.rows.put(rows, up)
            change = Change(up, down, tuple(site.full_weight.shape))
            found[name] = found[name].plus(change) if name in found else change
    return {name: change for name, change in found.items() if name not in spoiled}
