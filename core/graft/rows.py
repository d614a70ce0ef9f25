"""Grafts that serve some rows of a batch each, side by side in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.errors import ScionError
from core.graft.arguments import Call, rows_of_samples, take_rows
from core.graft.graft import Graft
from core.graft.rewrite import with_strength


def side_by_side(grafts: list[Graft]) -> list[list[Graft]]:
    """Grafts in their order; neighbours that serve different rows of one route together, for each sees what arrived."""
    groups: list[list[Graft]] = []
    for graft in grafts:
        last = groups[-1] if groups else []
        if last and _can_join(graft, last):
            last.append(graft)
        else:
            groups.append([graft])
    return groups


def _can_join(graft: Graft, group: list[Graft]) -> bool:
    first = group[0]
    same_route = graft.by_rows and first.by_rows and first.route is graft.route
    return same_route and all(other.variant != graft.variant for other in group)


def call_after(graft: Graft, x: Tensor, y: Tensor, call: Call | None) -> Tensor:
    """``after`` of one graft, which may ask for the module's whole call."""
    return graft(x, y, call, verb="after") if graft.reads_call else graft(x, y, verb="after")


def before_on_rows(graft: Graft, x: Tensor) -> Tensor:
    """``before`` of a graft on the rows of x [batch, ..., in] that it serves."""
    rows = rows_of_samples(graft.batch, x.shape[0], graft.route)
    if not len(rows):
        return x
    part = graft(x[rows], verb="before")
    return x.index_copy(0, rows, with_strength(graft, x[rows], part))


def edit_arguments(grafts: list[Graft], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as grafts side by side edit them, each for the rows of the batch that it serves.

    Raises:
        ScionError: some rows are served by none, so that they would not become as long as the others.
    """
    if not grafts[0].by_rows:
        return grafts[0](arguments, verb="before")
    total = next(len(value) for value in arguments.values() if isinstance(value, Tensor))
    parts = []
    for graft in grafts:
        rows = rows_of_samples(graft.batch, total, graft.route)
        if not len(rows):
            continue
        # Arguments without an entry a row (a table of rotations) are shared by all.
        own = {}
        for name, value in arguments.items():
            own[name] = value if _is_table(value) else take_rows(value, rows, total)
        parts.append((rows, graft(own, verb="before")))
    if sum(len(rows) for rows, _ in parts) < total:
        raise ScionError(f"routing: at {grafts[0].site.name} each row needs a variant, for they lengthen it")
    # The parts come variant by variant; the batch has its own order.
    order = torch.cat([rows for rows, _ in parts]).argsort()
    first_part = parts[0][1]
    return {name: _rejoin([part[name] for _, part in parts], order, grafts[0]) for name in first_part}


def after_on_rows(grafts: list[Graft], x: Tensor, y: Tensor, call: Call | None) -> Tensor:
    """``after`` of grafts that serve different rows; all may make the output wider alike.

    Raises:
        ScionError: they give rows of different shapes.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for graft in grafts:
        rows = rows_of_samples(graft.batch, y.shape[0], graft.route)
        if not len(rows):
            continue
        own_call = call.of(rows) if call is not None and graft.reads_call else None
        own_input = x[rows] if isinstance(x, Tensor) else x
        part = call_after(graft, own_input, y[rows], own_call)
        parts.append((rows, with_strength(graft, y[rows], part)))
    shapes = {part.shape[1:] for _, part in parts}
    if shapes - {y.shape[1:]}:  # wider than what arrived, as where a feature is lengthened
        if len(shapes) > 1 or sum(len(rows) for rows, _ in parts) < y.shape[0]:
            raise ScionError(f"routing: the variants at {grafts[0].site.name} give rows of different shapes")
        y = y.new_empty(y.shape[0], *parts[0][1].shape[1:])
    for rows, part in parts:
        y = y.index_copy(0, rows, part)
    return y


def _is_table(value: Any) -> bool:
    """Whether this is a table of rotations [tokens, width], which all samples share."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _rejoin(parts: list[Any], order: Tensor, graft: Graft) -> Any:
    """One argument of all rows from those of its parts."""
    if not all(isinstance(part, Tensor) and part.dim() for part in parts):
        return parts[0]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ScionError(f"routing: the variants at {graft.site.name} lengthen their rows by different numbers")
    whole = torch.cat(parts)
    # What has no entry a row came back whole from every part.
    return whole[order] if len(whole) == len(order) else parts[0]
