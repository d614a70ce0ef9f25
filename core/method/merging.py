"""Merging: what methods write into the weights, in which order that can be, and how one comes out again.

A module with grafts computes after_n(... after_1(W' x' + b)), where W' is W as the ``weight`` verbs change it, one
after the other in their order of attachment, and x' the input as the ``before`` verbs change it. So what acts on the
weight itself is merged before what acts on the output, and that before what acts on the input; and whatever depends on
the weight that it finds must find the one that it acts on. Where there is no such order, merging is refused.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError, listed
from core.graft import Carrier, Graft

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
    carrier, own = Carrier.of(graft.site.module), method.grafts
    for other in carrier.grafts if carrier is not None else ():
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
    home: Any = beside._need_root().peft
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


# ------------------------------------------------------------------------------------------------- out again


def note(method: PEFTMethod) -> None:
    """Remember that ``method`` has been merged."""
    _MERGES.setdefault(method._need_root(), []).append(weakref.ref(method))


def forget(method: PEFTMethod) -> None:
    """Remember that it is no longer."""
    root = method._need_root()
    _MERGES[root] = [one for one in _MERGES.get(root, []) if one() not in (None, method)]


@torch.no_grad()
def take_out(method: PEFTMethod, merged: Merged, parameters: dict[str, nn.Parameter]) -> None:
    """Give the tensors the values that they would have if ``method`` had not been merged.

    Raises:
        ScionError: a tensor has changed since, or what was merged later depends on this method.
    """
    later = _merged_after(method)
    ends = dict(merged)
    for other in later:
        ends |= {name: values for name, values in (other._merged or {}).items() if name in merged}
    touching = [other for other in later if merged.keys() & (other._merged or {}).keys()]
    for name, (_, after) in ends.items():
        if not torch.equal(parameters[name].detach(), after) or any(not _commute(method, other) for other in touching):
            raise ScionError(f"{method.name}: {name} has changed since it was merged; unmerge what came later first")
    for other in reversed(touching):
        _write(parameters, {name: before for name, (before, _) in (other._merged or {}).items()})
    _write(parameters, {name: before for name, (before, _) in merged.items()})
    for other in touching:
        other._merged = merged_values(other, parameters)
        _write(parameters, {name: after for name, (_, after) in other._merged.items()})


def _write(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def _merged_after(method: PEFTMethod) -> list[PEFTMethod]:
    merges = [other for one in _MERGES.get(method._need_root(), []) if (other := one()) is not None]
    return merges[merges.index(method) + 1:] if method in merges else []


def _commute(one: PEFTMethod, other: PEFTMethod) -> bool:
    """Whether the changes of two methods add up, whichever comes first."""
    if one.start or other.start or one._made or other._made:
        return False
    return all(_verb(graft) in ("weight", "after") and not graft.reads_weight and not graft.reads_output
               for graft in (*one.grafts, *other.grafts))
