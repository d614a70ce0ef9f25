"""One walk through every cell of methods and families, of which the quick tier's other tests meet a share."""

from __future__ import annotations

import functools
from pathlib import Path
from zlib import crc32

import pytest
import torch

from core import load_adapter
from core.anatomy import Anatomy, dissect
from tests.core.test_matrix import check_refusal
from tests.methods import METHODS, Cell
from tests.models import EVERY_FAMILY, FAMILIES, batch, make
from tests.toolkit import EVERYTHING, TOLERANCE, differences, distance, outputs, randomize, same, snapshot, trace


def walked(method: str) -> list[str]:
    """The families through which a method walks: all in the long tier, else those of the quick tier and a turning third
    of the others."""
    if EVERYTHING:
        return list(EVERY_FAMILY)
    others = [family for family in EVERY_FAMILY if family not in FAMILIES]
    return [*FAMILIES, *others[crc32(method.encode()) % 3::3]]


CELLS = [Cell(method, next(iter(row.variants)), family) for method, row in METHODS.items() for family in walked(method)]


@functools.cache
def _untouched(family: str) -> tuple[torch.Tensor, Anatomy]:
    """What another model of the family gives, and its parts."""
    model = make(family)
    return outputs(model, batch(family)), dissect(model)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_cell(cell: Cell, tmp_path: Path) -> None:
    """Attached, counted, moved, differentiated, switched off, merged, saved, loaded, removed."""
    if cell.refused:
        return check_refusal(cell)
    model, inputs = make(cell.family), batch(cell.family)
    left, values = trace(model), snapshot(model)
    base, found = _untouched(cell.family)
    cell.new().foresee(list(found.roles), len(found.blocks), cell.family)  # as the command asks before it builds
    method = cell.attach(model)
    if cell.new().identity_at_start:
        assert torch.equal(outputs(model, inputs), base)
    trained = method.trainable()
    assert sum(t.numel() for t in trained.values()) == cell.row.trained(found, method)

    randomize(method, size=cell.row.size)
    moved = outputs(model, inputs)
    assert bool(torch.isfinite(moved).all())
    if trained:
        assert distance(moved, base) > 1e-5
        model.train()
        result = model(inputs)
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        idle = method.idle()
        dead = [name for name, t in trained.items() if t.grad is None and name not in idle]
        assert not dead
        model.eval()
        if cell.row.running:
            moved = outputs(model, inputs)
    frozen = {name for name, p in model.named_parameters() if p.grad is not None} - set(trained)
    assert not frozen
    with method.disabled():
        assert torch.equal(outputs(model, inputs), base)
    assert torch.equal(outputs(model, inputs), moved)

    if cell.mergeable:
        here = snapshot(model)
        method.merge()
        assert distance(outputs(model, inputs), moved) < TOLERANCE[torch.float32]
        method.unmerge()
        assert same(here, snapshot(model)) and torch.equal(outputs(model, inputs), moved)
    method.save(tmp_path)
    fresh = make(cell.family)
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), moved)
    method.remove()
    model.zero_grad()
    assert same(values, snapshot(model)) and torch.equal(outputs(model, inputs), base)
    assert differences(left, trace(model)) == []
    return None
