"""Invariants 30 to 35: into the weights, and out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import peft
from core.adapters.load import RECORD, TENSORS
from core.errors import ScionError
from core.method import PEFTMethod
from tests.methods import Cell
from tests.models import EVERY_FAMILY, batch, make
from tests.toolkit import (
    TOLERANCE,
    differences,
    distance,
    invariant,
    outputs,
    randomize,
    same,
    snapshot,
    tolerance,
    trace,
)


def mergeable(cell: Cell) -> bool:
    return cell.mergeable


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@invariant(30, "merged equals unmerged; 32 unmerge restores all bits", where=mergeable)
def test_merge(cell: Cell, dtype: torch.dtype) -> None:
    model, inputs = make(cell.family, dtype=dtype), batch(cell.family, dtype=dtype)
    method = cell.attach(model)
    randomize(method, size=cell.row.size)
    values, expected, held = snapshot(model), outputs(model, inputs), list(model.state_dict())
    method.merge()
    assert not method.attached and method.trainable() == {}
    assert distance(outputs(model, inputs), expected) < tolerance(cell.family, dtype)
    method.unmerge()
    assert same(values, snapshot(model)) and torch.equal(outputs(model, inputs), expected)
    assert list(model.state_dict()) == held and method.attached
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(method.trainable())


@invariant(31, "merging twice warns", where=mergeable)
def test_merge_twice(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    randomize(method)
    method.merge()
    values, expected = snapshot(model), outputs(model, inputs)
    with pytest.warns(UserWarning, match=f"{cell.method} is merged already"):
        method.merge()
    assert same(values, snapshot(model)) and torch.equal(outputs(model, inputs), expected)
    method.unmerge()
    with pytest.raises(ScionError, match=f"{cell.method} is not merged"):
        method.unmerge()


@invariant(31, "merging NaN or inf refuses", where=lambda cell: cell.mergeable and cell.trains)
def test_merge_of_nan(cell: Cell) -> None:
    for value in (float("nan"), float("inf")):
        model = make(cell.family)
        method = cell.attach(model)
        randomize(method)
        with torch.no_grad():
            list(method.trainable().values())[-1].view(-1)[0] = value
        left, values = trace(model), snapshot(model)
        with pytest.raises(ScionError, match=f"{cell.method}: .*not finite"):
            method.merge()
        assert differences(left, trace(model)) == [] and method.attached
        assert all(torch.equal(now, values[name]) or not torch.isfinite(values[name]).all()
                   for name, now in snapshot(model).items())


@invariant(32, "an unmerged method is saved as ever", where=mergeable)
def test_save_after_unmerge(cell: Cell, tmp_path: Path) -> None:
    """With the base's own fingerprint, whatever was in the weights meanwhile."""
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method)
    method.save(tmp_path / "before")
    method.merge()
    method.unmerge()
    method.save(tmp_path / "after")
    for name in (TENSORS, RECORD):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


@invariant(32, "unmerge after the weights changed refuses", where=lambda cell: cell.mergeable and cell.trains)
def test_unmerge_of_other_weights(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method)
    changed = next(iter(method.start), None) or method.grafts[0].site.weight_name
    method.merge()
    with torch.no_grad():
        model.get_parameter(changed).add_(1)
    values = snapshot(model)
    with pytest.raises(ScionError, match="has changed since it was merged"):
        method.unmerge()
    assert same(values, snapshot(model))


def _merge_both(methods: list[PEFTMethod], model: nn.Module, inputs: Tensor) -> bool:
    """Merge one after the other: the function stays what it was with both attached, or a merge refuses and changes
    nothing. They come out again in reverse, or, where their changes add up, in any order. Returns whether both could be
    merged."""
    values, both, left = snapshot(model), outputs(model, inputs), trace(model)
    base = values
    first, second = methods
    try:
        first.merge()
        assert distance(outputs(model, inputs), both) < 1e-10
        left, values = trace(model), snapshot(model)
        second.merge()
    except ScionError as refusal:
        assert "another method" in str(refusal)
        assert same(values, snapshot(model)) and differences(left, trace(model)) == []
        assert distance(outputs(model, inputs), both) < 1e-10
        return False
    assert distance(outputs(model, inputs), both) < 1e-10
    if any(graft.reads_weight or graft.reads_output for method in methods for graft in method.grafts):
        with pytest.raises(ScionError, match="unmerge what came later first"):
            first.unmerge()
        second, first = first, second
    first.unmerge()
    assert distance(outputs(model, inputs), both) < 1e-10
    second.unmerge()
    assert same(base, snapshot(model)) and distance(outputs(model, inputs), both) < 1e-10
    return True


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "in reverse"])
@invariant(33, "merging two, one after the other", where=lambda cell: cell.mergeable and cell.trains
           and not cell.moves_base)
def test_merge_two(cell: Cell, order: tuple[int, int]) -> None:
    model, inputs = make(cell.family, dtype=torch.float64), batch(cell.family, dtype=torch.float64)
    methods = [cell.attach(model, name=name) for name in ("early", "late")]
    for seed, method in enumerate(methods):
        randomize(method, seed=seed, size=0.05)
    reads = any(graft.reads_weight or graft.reads_output for method in methods for graft in method.grafts)
    assert _merge_both([methods[i] for i in order], model, inputs) or reads


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "in reverse"])
@pytest.mark.parametrize("early", ["cell", "lora"])
@invariant(33, "merging two, one after the other", where=lambda cell: cell.row.weights)
def test_merge_beside_lora(cell: Cell, early: str, order: tuple[int, int]) -> None:
    """Another method's graft at the same sites."""
    model, inputs = make(cell.family, dtype=torch.float64), batch(cell.family, dtype=torch.float64)
    targets = ("q", "v") if EVERY_FAMILY[cell.family].attention else ("mlp.up",)
    lora = peft.method_class("LoRA")(rank=2, name="beside", targets=targets)  # type: ignore[call-arg]
    options = {"dropout": 0.0} if "dropout" in cell.new().config else {}
    method = cell.new(**options, targets=targets)
    methods = [method, lora] if early == "cell" else [lora, method]
    for seed, one in enumerate(methods):
        one.attach(model)
        randomize(one, seed=seed, size=0.05)
    reads = any(graft.reads_weight or graft.reads_output for method in methods for graft in method.grafts)
    assert _merge_both([methods[i] for i in order], model, inputs) or reads


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["in order", "in reverse"])
@pytest.mark.parametrize("early", ["reader", "other"])
@pytest.mark.parametrize("other", ["qkv", "sparse"])
def test_merge_beside_a_reader_of_the_weight(other: str, early: str, order: tuple[int, int]) -> None:
    """33: DoRA reads the weight's norm; a graft on the whole fused weight, or on the parameter, changes it too. What is
    added to DoRA's output afterwards can be merged after it, and nothing else."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    reader = Cell("DoRA", "q, v", "timm_vit").new()
    beside = Cell("LoRA", "q, v", "timm_vit").new(targets=("qkv",)) if other == "qkv" else Cell(
        "LTSFT", "sparse", "timm_vit").new(density=0.2)
    methods = [reader, beside] if early == "reader" else [beside, reader]
    for seed, method in enumerate(methods):
        method.attach(model)
        if method is beside and other == "sparse":
            Cell("LTSFT", "sparse", "timm_vit").make_ready(method)
        randomize(method, seed=seed, size=0.05)
    possible = other == "qkv" and early == "reader" and order == (0, 1)
    assert _merge_both([methods[i] for i in order], model, inputs) == possible


SETTINGS: dict[str, dict[str, Any]] = {
    "Bat": {"rank": 2}, "Bone": {"rank": 4}, "LoRA": {"rank": 2}, "DoRA": {"rank": 2}, "BOFT": {}, "LoHa": {"rank": 2},
    "OFT": {"block": 4}, "RAMT": {}, "PST": {"rank": 2, "score_rank": 2, "initial": 0.3}, "Hydra": {}, "SSF": {},
    "RepAdapter": {"targets": ("mlp",), "dropout": 0.0}, "IA3": {"outputs": ("mlp.up",), "inputs": ()}}
ORDERS = {
    "Bat Bat": ">", "Bat LoRA": ">", "LoRA Bat": "<", "Bone Bat": "<", "Bat Bone": ">", "Bone Bone": "<>",
    "LoRA LoHa": "<>", "DoRA LoRA": ">", "DoRA Bone": ">", "DoRA Hydra": ">", "DoRA SSF": ">", "LoRA DoRA": "",
    "DoRA DoRA": "", "Bat DoRA": "", "DoRA Bat": "", "SSF DoRA": "", "LoHa BOFT": ">", "BOFT LoHa": ">",
    "LoHa Bat": ">", "RAMT PST": ">", "RAMT LoRA": ">", "LoRA PST": "<", "SSF Bat": "<", "SSF LoHa": "<",
    "OFT LoRA": "<", "LoRA OFT": ">", "OFT OFT": "<", "OFT DoRA": "<", "DoRA OFT": ">", "RepAdapter Bat": "<",
    "RepAdapter OFT": "<", "IA3 LoRA": ">", "LoRA IA3": ">", "IA3 Hydra": ">"}
"""Methods in their order of attachment, and whether they can be merged in it (>) and in reverse (<)."""


@pytest.mark.parametrize("order", "><")
@pytest.mark.parametrize(("pair", "orders"), ORDERS.items())
def test_order_of_merging(pair: str, orders: str, order: str) -> None:
    """33: whatever has an exact order can be merged in it, and the message says which it is."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    methods: list[PEFTMethod] = []
    for place, name in enumerate(pair.split()):
        targets = {} if name in ("RepAdapter", "IA3") else {"targets": ("mlp.up",)}
        method = peft.method_class(name)(**{**targets, **SETTINGS[name]}, name=("early", "late")[place])
        method.attach(model)
        randomize(method, seed=place, size=0.05)
        methods.append(method)
    first, second = methods if order == ">" else methods[::-1]
    assert _merge_both([first, second], model, inputs) == (order in orders)
    if orders and order not in orders:
        with pytest.raises(ScionError, match=f"merge {second.name} first"):
            first.merge()


def test_three_that_add_up_come_out_in_any_order() -> None:
    """33: what is left is, to the bit, as if the one that came out had not been merged."""
    inputs = batch("timm_vit")
    for first in range(3):
        model, other = make("timm_vit"), make("timm_vit")
        both = []
        for base in (model, other):
            methods = [peft.method_class(name)(**SETTINGS[name], targets=("mlp.up",), name=f"m{i}").attach(base)
                       for i, name in enumerate(("Bone", "LoRA", "Bone"))]
            for i, method in enumerate(methods):
                randomize(method, seed=i)
            both.append(methods)
        expected, start = outputs(model, inputs), snapshot(make("timm_vit"))
        for method in both[0]:
            method.merge()
        both[0][first].unmerge()
        for i in range(3):
            if i != first:
                both[1][i].merge()
        assert same(snapshot(model), snapshot(other)) and distance(outputs(model, inputs), expected) < 1e-5
        for i in range(3):
            if i != first:
                both[0][i].unmerge()
        assert same(snapshot(model), start) and distance(outputs(model, inputs), expected) < 1e-5


@invariant(34, "a merged model is a plain backbone", where=mergeable)
def test_merged_is_plain(cell: Cell) -> None:
    """Where a method says that merging makes biases, with these, and nothing else that is new."""
    model, inputs = make(cell.family), batch(cell.family)
    left = trace(model)
    method = cell.attach(model)
    randomize(method)
    method.merge()
    merged = outputs(model, inputs)
    plain = make(cell.family, seed=1)
    made = {f"{graft.site.path}.bias": graft.site for graft in method.grafts if graft.adds_bias and (
        graft.site.bias is not None and f"{graft.site.path}.bias()" not in left)}
    for site in made.values():
        plain.get_submodule(site.path).bias = nn.Parameter(torch.zeros(site.out_features))
    assert [line for line in differences(left, trace(model)) if line.partition("(")[0] not in made] == []
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(plain, inputs), merged)
    with pytest.raises(ScionError, match="merged"):
        method.save("never written")


@invariant(35, "what cannot be merged says so", where=lambda cell: not cell.mergeable)
def test_no_merge(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method)
    left, values = trace(model), snapshot(model)
    with pytest.raises(ScionError, match=f"{cell.method} cannot be merged") as refusal:
        method.merge()
    assert cell.cls.inference_cost in str(refusal.value)
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))
