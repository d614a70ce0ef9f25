"""Invariant 28: each row of a batch sees its own variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from core import load_adapter
from core.compose import Route
from core.errors import ScionError
from core.peft import Houlsby, LoRA  # type: ignore[attr-defined]
from tests.methods import Cell
from tests.models import batch, make
from tests.toolkit import differences, distance, invariant, outputs, randomize, same, snapshot, trace, uneven

NAMES = ("en", "sw", "ky")


def routable(cell: Cell) -> bool:
    fixed = cell.cls.moves_base or cell.new().norms or not cell.cls.by_rows
    return not fixed and not cell.row.variants[cell.variant].ready


def _alone(cell: Cell, route: Route, name: str, inputs: Tensor) -> Tensor:
    """What a model with this variant and nothing else gives."""
    model = make(cell.family)
    method = cell.new(name=name).attach(model)
    with torch.no_grad():
        for key, tensor in method.live_tensors().items():
            tensor.copy_(route.live_tensors()[key.replace(f"peft.{name}.", f"{route.prefix}{name}.")])
    return outputs(model, inputs)


@invariant(28, "row i equals a run with its own adapter", where=lambda cell: routable(cell) and cell.trains)
def test_rows(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family, 5)
    route = Route([cell.new(name=name) for name in NAMES])
    route.attach(model)
    randomize(route)
    alone = [_alone(cell, route, name, inputs) for name in NAMES]
    assert torch.equal(outputs(model, inputs), alone[0])
    left = trace(model)
    for name, expected in zip(NAMES, alone, strict=True):
        with route.route(name):
            assert torch.equal(outputs(model, inputs), expected)
    rows = [0, 2, 1, 0, 2]
    for chosen in (rows, torch.tensor(rows), [1] * 5):
        with route.route(chosen):
            mixed = outputs(model, inputs)
        for i, variant in enumerate(chosen):
            assert distance(mixed[i], alone[int(variant)][i]) < 1e-5
    assert torch.equal(outputs(model, inputs), alone[0]) and differences(left, trace(model)) == []


@invariant(28, "row i equals a run with its own adapter", where=lambda cell: not routable(cell))
def test_what_the_rows_share_cannot_be_routed(cell: Cell) -> None:
    """A method that moves the base refuses; one in a later stage is attached in its first."""
    if cell.cls.moves_base or cell.new().norms:
        with pytest.raises(ScionError, match=f"Route: {cell.method} trains the backbone itself"):
            Route([cell.new()])
    elif not cell.cls.by_rows:
        with pytest.raises(ScionError, match=f"Route: {cell.method} changes every tensor"):
            Route([cell.new()])
    else:
        route = Route([cell.new(name=name) for name in NAMES])
        route.attach(make(cell.family))
        assert len(route.methods) == 3 and route.trainable()


@invariant(28, "row i equals a run with its own adapter",
           where=lambda cell: routable(cell) and cell.trains)
def test_gradients_of_routed_rows(cell: Cell) -> None:
    """Each variant learns from its rows alone: as if it had seen these in a batch of their own."""
    model, inputs = make(cell.family, dtype=torch.float64), batch(cell.family, 4, dtype=torch.float64)
    route = Route([cell.new(name=name) for name in NAMES])
    route.attach(model)
    randomize(route)
    with route.route([0, 1, 1, 0]):
        uneven(model(inputs)).backward()
    assert any(t.grad is not None and bool(t.grad.any()) for t in route.trainable().values())
    mixed = {name: t.grad.clone() for name, t in route.trainable().items() if t.grad is not None}
    for variant, rows in enumerate(([0, 3], [1, 2], [])):
        own = {name: t for name, t in route.trainable().items() if name.startswith(f"{route.prefix}{NAMES[variant]}.")}
        if not rows:
            assert not any(bool(mixed[name].any()) for name in own if name in mixed)
            continue
        model.zero_grad()
        with route.route(NAMES[variant]):
            uneven(model(inputs[rows])).backward()
        for name, tensor in own.items():
            assert tensor.grad is not None and torch.allclose(mixed[name], tensor.grad, rtol=1e-8, atol=1e-10), name


@invariant(28, "row i equals a run with its own adapter",
           where=lambda cell: routable(cell) and cell.trains)
def test_route_is_saved(cell: Cell, tmp_path: Path) -> None:
    model, inputs = make(cell.family), batch(cell.family, 4)
    values = snapshot(model)
    route = Route([cell.new(name=name) for name in NAMES])
    route.attach(model)
    randomize(route)
    route.save(tmp_path)
    fresh = make(cell.family)
    loaded = load_adapter(tmp_path, fresh)
    assert isinstance(loaded, Route) and [m.name for m in loaded.methods] == list(NAMES)
    assert same(route.tensors(), loaded.tensors())
    with route.route([0, 1, 2, 1]), loaded.route([0, 1, 2, 1]):
        assert torch.equal(outputs(model, inputs), outputs(fresh, inputs))
    with loaded.disabled():
        assert torch.equal(outputs(fresh, inputs), outputs(make(cell.family), inputs))
    loaded.remove()
    assert same(values, snapshot(fresh)) and not hasattr(fresh, "peft")


def test_two_kinds_of_method_side_by_side() -> None:
    model, inputs = make("bert"), batch("bert", 2)
    route = Route([LoRA(rank=2), Houlsby(bottleneck=2)])
    route.attach(model)
    randomize(route)
    with route.route("LoRA"):
        one = outputs(model, inputs)
    with route.route("Houlsby"):
        two = outputs(model, inputs)
    with route.route([1, 0]):
        mixed = outputs(model, inputs)
    assert distance(mixed[0], two[0]) < 1e-5 and distance(mixed[1], one[1]) < 1e-5 and distance(one, two) > 1e-4


def test_bad_routes() -> None:
    with pytest.raises(ScionError, match="names of their own"):
        Route([LoRA(), LoRA()])
    with pytest.raises(ScionError, match="names of their own"):
        Route([])
    model, inputs = make("bert"), batch("bert", 4)
    route = Route([LoRA(name="en", rank=2), LoRA(name="sw", rank=2)])
    with pytest.raises(ScionError, match="Route is not attached"), route.route("en"):
        pass
    route.attach(model)
    left, expected = trace(model), outputs(model, inputs)
    for bad, words in (("sv", r"'sv'.*'sw'"), ([0, 2], "0 to 1"), ([-1, 0], "0 to 1"), ([[0]], "one index a row")):
        with pytest.raises(ScionError, match=words), route.route(bad):  # type: ignore[arg-type]
            pass
    with pytest.raises(ScionError, match="3 samples are routed, but 4 rows"), route.route([0, 1, 0]):
        outputs(model, inputs)
    with pytest.raises(ScionError, match="cannot be merged"):
        route.merge()
    assert differences(left, trace(model)) == [] and torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_weights_of_gemma_s_norms_by_row(family: str) -> None:
    """They are added to 1 before they multiply: a row's own weight goes through the sum."""
    test_rows(Cell("SensitivityTuning", "both", family))
