"""Merging: what methods write into the weights, in which order that can be, and how one comes out again.

A module with grafts computes after_n(... after_1(W' x' + b)), where W' is W as the ``weight`` verbs change it, one
after the other in their order of attachment, and x' the input as the ``before`` verbs change it. So what acts on the
weight itself is merged before what acts on the output, and that before what acts on the input; and whatever depends on
the weight that it finds must find the one that it acts on. Where there is no such order, merging is refused.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError, listed
from core.graft import Graft, SiteHooks
from core.method.attached import Home
from core.method.contents import live_tensors
from core.method.training_checks import check_model

if TYPE_CHECKING:
    from core.method import PEFTMethod

Merged = dict[str, tuple[Tensor, Tensor]]
"""Name of a tensor -> its values before and after."""

_MERGES: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[PEFTMethod]]] = weakref.WeakKeyDictionary()
"""The methods that are merged into a model, in the order in which they were."""


# ------------------------------------------------------------------------------------------------- the order


def overlap(one: Site, other: Site) -> bool:
    """Whether two sites of one module share outputs: all do but disjoint parts of a fused projection."""
    return one.rows is None or other.rows is None or not set(one.rows.indices()).isdisjoint(other.rows.indices())


def tied(root: nn.Module, name: str) -> str:
    """Why a weight that is the same tensor as another one cannot take a change, and what to do."""
    weight = root.get_parameter(name)
    others = [other for other, p in root.named_parameters(remove_duplicate=False) if p is weight and other != name]
    return (f"{name} is tied to {listed(others, 2)}, which merging would change too. Keep the method beside the "
            f"weights (save), or untie them before it is attached or loaded: model.{name} = "
            f"torch.nn.Parameter(model.{name}.detach().clone()), and model.config.tie_word_embeddings = False where "
            "there is one")


def check_order(method: PEFTMethod, graft: Graft) -> None:
    """Refuse to merge ``graft`` of ``method`` while something stands beside it that must be merged before, or cannot be
    told apart from it."""
    hooks, own = SiteHooks.of(graft.site.module), method.grafts
    for other in hooks.grafts if hooks is not None else ():
        answer = "any" if other is graft or not overlap(graft.site, other.site) else _order(graft, other)
        if answer == "first" and other not in own:
            raise ScionError(f"{method.name} cannot be merged before another method that acts at {other.site.name}: "
                             f"merge {_name_of(other, method)} first")
        if answer != "any":
            raise ScionError(f"{method.name} cannot be merged while another method stands at {other.site.name}: one of "
                             "the two depends on the weight that merging changes")


def _order(graft: Graft, other: Graft) -> Literal["any", "first", "never"]:
    """Whether ``other`` must be merged ``first``, may stay (``any``), or keeps ``graft`` from ever being merged."""
    earlier = other.place < graft.place
    one, two = _verb(graft), _verb(other)
    if not one or not two:
        return "never"
    if one == "before":  # everything else sees the input that it makes; of several the last one meets the weight
        return "any" if two == "before" and earlier else "first"
    if two == "before":
        return "any"
    if _depends_on_base(other):
        return "first" if one == "after" and earlier else "never"
    if _depends_on_base(graft):
        return "any" if two == "after" and not earlier else "never"
    if one == two == "weight":
        apart = graft.site.parameter != other.site.parameter
        ordered = earlier and (graft.reads_weight or other.reads_weight)
        return "first" if ordered and not apart else "any"
    if one == "weight":
        return "any"
    if two == "weight":
        return "first" if other.reads_weight or graft.reads_output else "any"
    return "first" if earlier and (graft.reads_output or other.reads_output) else "any"


def _verb(graft: Graft) -> str:
    """The one verb of a graft; "" where it has several."""
    return graft.verbs[0] if len(graft.verbs) == 1 else ""


def _depends_on_base(graft: Graft) -> bool:
    """Whether it acts on the output and looks at the module's own weight meanwhile (DoRA's norm)."""
    return graft.reads_weight and _verb(graft) == "after"


def _name_of(graft: Graft, beside: PEFTMethod) -> str:
    """The name of the method that a graft belongs to."""
    home: Any = beside.need_root().peft
    methods = home.methods.values()
    return next((method.name for method in methods if method.place == graft.place), "that one")


# ------------------------------------------------------------------------------------------------- the values


@torch.no_grad()
def merged_values(method: PEFTMethod, parameters: dict[str, nn.Parameter]) -> Merged:
    """What the grafts of ``method`` make of the tensors as they are now; nothing is written.

    Raises:
        ScionError: there is no place for a shift, or values would not be finite.
    """
    merged: Merged = {}
    for graft in method.grafts:
        if graft.dropped:
            continue
        site, name = graft.site, graft.site.weight_name
        before, now = merged.get(name, (parameters[name].detach().clone(), parameters[name].detach()))
        merged[name] = before, site.unmatrix(graft(site.matrix(_wide(now)), verb="merged"), _wide(now))
        _merge_bias(method, graft, parameters, merged)
    for name, (_, now) in merged.items():
        if not bool(torch.isfinite(now).all()):
            raise ScionError(f"{method.name}: merging would write values that are not finite into {name}")
    return {name: (before, now.to(before.dtype, copy=True)) for name, (before, now) in merged.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _merge_bias(method: PEFTMethod, graft: Graft, parameters: dict[str, nn.Parameter], merged: Merged) -> None:
    if type(graft).merged_bias is Graft.merged_bias:
        return
    site = graft.site
    name = site.bias_name
    bias = parameters[name].detach() if name in parameters else site.full_weight.new_zeros(
        site.full_weight.numel() // site.in_features)
    if name not in parameters and not graft.adds_bias:
        shift = graft(torch.zeros(site.out_features, device=bias.device), verb="merged_bias")
        if shift is not None and bool(shift.any()):
            raise ScionError(f"{method.name}: {site.name} has no bias, so there is no place for the shift that merging "
                             "leaves")
        return
    before, now = merged.get(name, (bias.clone(), bias))
    wide = _wide(now)
    part = graft(wide if site.rows is None else site.rows.take(wide), verb="merged_bias")
    if part is not None:
        merged[name] = (before, part if site.rows is None else site.rows.put(wide, part.to(wide.dtype)))


# ------------------------------------------------------------------------------------------------- into the weights


@dataclass
class MergedWeights:
    """What merging one method has done to the model."""

    values: Merged
    new_biases: list[str]
    """Names of biases that the maps did not have."""
    home: Home
    """Where the method was; it knows the base as it was before the first method."""


def merge(method: PEFTMethod) -> None:
    """Write a method into the weights and take it off (see `PEFTMethod.merge`): look at everything, then write."""
    root = method.need_root()
    if method.merged is not None:
        warnings.warn(f"{method.name} is merged already", stacklevel=3)
        return
    check_model(method)
    if not method.mergeable:
        raise ScionError(f"{method.name} cannot be merged into the weights: {method.inference_cost}")
    parameters = dict(root.named_parameters())
    _check_can_merge(method, root, parameters)
    values = merged_values(method, parameters)
    new_biases = [name for name in values if name not in parameters]
    with torch.no_grad():
        for name in new_biases:
            module = root.get_submodule(name.rpartition(".")[0])
            module.bias = parameters[name] = nn.Parameter(values[name][0].clone(), requires_grad=False)
        _write(parameters, {name: after for name, (_, after) in values.items()})
        for name in method.base_at_start:  # moved already: they must be the same when the method comes back
            value = parameters[name].detach().clone()
            values[name] = (value, value)
    method.disconnect()
    home: Home = root.peft  # type: ignore[assignment]
    method.merged = MergedWeights(values, new_biases, home)
    home.take_off(method)
    _MERGES.setdefault(root, []).append(weakref.ref(method))


def _check_can_merge(method: PEFTMethod, root: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    for name, tensor in live_tensors(method).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ScionError(f"{method.name}: {name} holds values that are not finite: it cannot be merged")
    shared = {name for name, _ in root.named_parameters(remove_duplicate=False)} - set(parameters)
    for graft in method.grafts:
        if graft.dropped:
            continue
        check_order(method, graft)
        name = graft.site.weight_name
        # Tied modules that all have the graft change as one.
        others = () if name in shared or graft.site.tied else shared
        if name in shared or any(root.get_parameter(other) is parameters[name] for other in others):
            raise ScionError(f"{method.name}: {tied(root, name)}")


def unmerge(method: PEFTMethod) -> None:
    """Restore the weights and put a method back (see `PEFTMethod.unmerge`)."""
    root, merged = method.need_root(), method.merged
    if merged is None:
        raise ScionError(f"{method.name} is not merged")
    parameters = dict(root.named_parameters())
    _take_out(method, merged.values, parameters)
    _MERGES[root] = [one for one in _MERGES.get(root, []) if one() not in (None, method)]
    for name in merged.new_biases:
        root.get_submodule(name.rpartition(".")[0]).bias = None  # type: ignore[assignment]
    home = getattr(root, "peft", None)
    if not isinstance(home, Home):
        home = merged.home
        home.enter(root)
    if home is not merged.home:  # all that are there now came later
        method.place = min(other.place for other in home.methods.values()) - 1
    method.merged = None
    home.add(method)
    method.connect()
    for name in method.base_at_start:
        parameters[name].requires_grad_(method.is_trained)
    root.train(root.training)


# ------------------------------------------------------------------------------------------------- out again


@torch.no_grad()
def _take_out(method: PEFTMethod, merged: Merged, parameters: dict[str, nn.Parameter]) -> None:
    """Give the tensors the values that they would have if ``method`` had not been merged.

    Raises:
        ScionError: a tensor has changed since, or what was merged later depends on this method.
    """
    later = [(other, other.merged) for other in _merged_after(method) if other.merged is not None]
    touching = [(other, weights) for other, weights in later if merged.keys() & weights.values.keys()]
    ends = dict(merged)
    for _, weights in later:
        ends |= {name: values for name, values in weights.values.items() if name in merged}
    all_commute = all(_commute(method, other) for other, _ in touching)
    for name, (_, after) in ends.items():
        if not all_commute or not torch.equal(parameters[name].detach(), after):
            raise ScionError(f"{method.name}: {name} has changed since it was merged; unmerge what came later first")
    for _, weights in reversed(touching):
        _write(parameters, {name: before for name, (before, _) in weights.values.items()})
    _write(parameters, {name: before for name, (before, _) in merged.items()})
    for other, weights in touching:
        weights.values = merged_values(other, parameters)
        _write(parameters, {name: after for name, (_, after) in weights.values.items()})


def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def _merged_after(method: PEFTMethod) -> list[PEFTMethod]:
    merges = [other for one in _MERGES.get(method.need_root(), []) if (other := one()) is not None]
    return merges[merges.index(method) + 1:] if method in merges else []


def _commute(one: PEFTMethod, other: PEFTMethod) -> bool:
    """Whether the changes of two methods add up, whichever comes first."""
    for method in (one, other):
        if method.base_at_start or (method.merged is not None and method.merged.new_biases):
            return False
    return all(_verb(graft) in ("weight", "after") and not graft.reads_weight and not graft.reads_output
               for graft in (*one.grafts, *other.grafts))
