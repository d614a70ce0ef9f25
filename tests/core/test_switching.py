"""Invariants 23 to 29: off, on, stacked, removed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core import peft
from core.errors import ScionError
from core.method import PEFTMethod, methods_on
from core.method.on_model import activate
from tests.methods import Cell
from tests.models import batch, make
from tests.toolkit import differences, distance, invariant, outputs, randomize, same, snapshot, trace, train


def partner_of(cell: Cell, model: nn.Module) -> PEFTMethod:
    """A method of another kind beside the cell's, with values of its own."""
    if cell.method == "LoRA":
        method = peft.method_class("Houlsby")(name="partner", bottleneck=2, targets=("mlp",))  # type: ignore[call-arg]
    else:
        method = peft.method_class("LoRA")(name="partner", rank=2, targets=("mlp.up",))  # type: ignore[call-arg]
    method.attach(model)
    randomize(method, seed=5)
    return method


@invariant(23, "disabled is the base, enabled is as before")
def test_disabled(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    base, values = outputs(model, inputs), snapshot(model)
    method = cell.attach(model)
    randomize(method)
    moved, on, left = snapshot(model), outputs(model, inputs), trace(model)
    with method.disabled():
        assert torch.equal(outputs(model, inputs), base) and same(values, snapshot(model))
        with method.disabled():
            assert torch.equal(outputs(model, inputs), base)
        assert torch.equal(outputs(model, inputs), base)
    assert torch.equal(outputs(model, inputs), on) and same(moved, snapshot(model))
    with pytest.raises(KeyboardInterrupt), method.disabled():
        raise KeyboardInterrupt
    assert torch.equal(outputs(model, inputs), on) and same(moved, snapshot(model))
    assert differences(left, trace(model)) == []


@invariant(23, "disabled is the base, enabled is as before")
def test_exception_inside_forward(cell: Cell) -> None:
    """A forward that fails half-way leaves no rewriting behind."""
    model, inputs = make(cell.family), batch(cell.family)
    randomize(cell.attach(model))
    expected, left = outputs(model, inputs), trace(model)
    for error in (ValueError, KeyboardInterrupt):

        def fail(*args: object, error: type[BaseException] = error) -> None:
            raise error

        modules = [m for name, m in model.named_modules() if not name.startswith("peft") and not list(m.children())]
        handles = [m.register_forward_pre_hook(fail) for m in modules[len(modules) // 2:]]
        with pytest.raises(error):
            outputs(model, inputs)
        for handle in handles:
            handle.remove()
        assert torch.equal(outputs(model, inputs), expected)
    assert differences(left, trace(model)) == []


@invariant(24, "an irregular mix of on and off is restored")
def test_irregular_mix(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    partner = partner_of(cell, model)
    randomize(method)
    states = [index % 2 == 0 for index in range(len(method.grafts))]
    activate(method.grafts, states)
    mixed, left = outputs(model, inputs), trace(model)
    with partner.disabled(), method.disabled():
        off = outputs(model, inputs)
    assert [graft.active for graft in method.grafts] == states
    assert torch.equal(outputs(model, inputs), mixed) and differences(left, trace(model)) == []
    assert torch.equal(off, outputs(make(cell.family), inputs)) and not torch.equal(off, mixed)


@invariant(25, "removal leaves no trace")
def test_removal(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    expected = outputs(model, inputs)
    model.train()
    left, values, keys = trace(model), snapshot(model), list(model.state_dict())
    method = cell.attach(model)
    assert differences(left, trace(model)) != []
    train(model, method, cell.family)
    model.zero_grad()
    model.train()
    method.remove()
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))
    assert list(model.state_dict()) == keys and torch.equal(outputs(model.eval(), inputs), expected)
    with pytest.raises(ScionError, match=f"{cell.method} is not attached"):
        method.remove()
    again = cell.attach(model)
    assert again.attached and set(again.trainable()) == {n for n, p in model.named_parameters() if p.requires_grad}


@invariant(25, "removal leaves no trace")
def test_removal_restores_flags(cell: Cell) -> None:
    """A model that came with a frozen tensor and one module in eval mode goes with them."""
    model = make(cell.family).train()
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[-1].eval()
    left = trace(model)
    cell.attach(model).remove()
    assert differences(left, trace(model)) == []


def _two(cell: Cell, names: str, model: nn.Module) -> dict[str, PEFTMethod]:
    methods = {}
    for name in names:
        methods[name] = cell.attach(model, name=name)
        randomize(methods[name], seed=ord(name), size=0.05)
    return methods


@invariant(26, "two adapters of one method", where=lambda cell: not cell.moves_base and cell.trains
           and not cell.row.variants[cell.variant].alone)
def test_two_of_a_kind(cell: Cell) -> None:
    """Each alone is what it is alone; both do more than either; the order matters only where it is declared to."""
    inputs = batch(cell.family, dtype=torch.float64)

    def run(names: str) -> tuple[nn.Module, dict[str, PEFTMethod], Tensor]:
        model = make(cell.family, dtype=torch.float64)
        methods = _two(cell, names, model)
        return model, methods, outputs(model, inputs)

    a, b, ba = run("a")[2], run("b")[2], run("ba")[2]
    model, methods, both = run("ab")
    assert distance(both, a) > 1e-4 and distance(both, b) > 1e-4
    assert cell.row.commutes is None or (distance(ba, both) < 1e-10) == cell.row.commutes
    for off, expected in (("b", a), ("a", b)):
        with methods[off].disabled():
            assert distance(outputs(model, inputs), expected) < 1e-10
    assert torch.equal(outputs(model, inputs), both)
    methods["a"].remove()
    assert distance(outputs(model, inputs), b) < 1e-10


@invariant(26, "two adapters of one method", where=lambda cell: cell.moves_base)
def test_two_that_move_the_same(cell: Cell) -> None:
    """Two methods cannot both own a tensor of the base: switching one would undo the other."""
    model = make(cell.family)
    cell.attach(model, name="a")
    left = trace(model)
    with pytest.raises(ScionError, match="b: .* is trained by a"):
        cell.new(name="b").attach(model)
    assert differences(left, trace(model)) == []


@invariant(27, "two methods stack, removing one leaves the other")
def test_stack(cell: Cell) -> None:
    inputs = batch(cell.family, dtype=torch.float64)

    def run(order: str, removed: str = "") -> Tensor:
        model = make(cell.family, dtype=torch.float64)
        methods = {}
        for letter in order:
            methods[letter] = cell.attach(model) if letter == "m" else partner_of(cell, model)
            randomize(methods[letter], seed=1)
        if removed:
            methods[removed].remove()
        assert methods_on(model) == [methods[letter] for letter in order if letter != removed]
        return outputs(model, inputs)

    method, partner = run("m"), run("p")
    assert distance(run("mp"), partner) > 1e-4 or not cell.trains
    assert distance(run("mp", removed="p"), method) < 1e-10
    assert distance(run("mp", removed="m"), partner) < 1e-10
    assert distance(run("pm", removed="m"), partner) < 1e-10


@invariant(29, "requires_grad only where it is trained")
def test_frozen_in_the_forward(cell: Cell) -> None:
    """``trainable=False`` keeps a method in the forward, frozen; one beside it trains alone."""
    model, inputs = make(cell.family), batch(cell.family)
    frozen = cell.attach(model, trainable=False)
    assert frozen.trainable() == {} and frozen.param_groups() == []
    assert not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        for name, tensor in frozen.live_tensors().items():
            if tensor.is_floating_point() and name.startswith("peft."):
                tensor += 0.1
    changed = outputs(model, inputs)
    partner = partner_of(cell, model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(partner.trainable())
    values = {name: tensor.clone() for name, tensor in frozen.tensors().items()}
    train(model, partner, cell.family)
    assert same(values, frozen.tensors())
    partner.remove()
    assert torch.equal(outputs(model, inputs), changed)
    assert not any(p.requires_grad for p in model.parameters())
