"""Invariants 45 to 47, 49 and 50: types, devices, compilation, and what a forward costs."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import load_adapter, peft
from core.anatomy import dissect
from core.graft import VERBS, hidden_out
from core.method import PEFTMethod, methods_on
from tests.artifacts.make_artifacts import Small
from tests.methods import METHODS, Cell
from tests.models import EVERY_FAMILY, WIDTH, batch, doubled, make
from tests.toolkit import (
    EVERYTHING,
    LIGHT,
    distance,
    invariant,
    loss_of,
    operators,
    outputs,
    problem,
    randomize,
    same,
    saved_bytes,
    tolerance,
    uneven,
)

HALF = (torch.bfloat16, torch.float16)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", HALF, ids=_name)
@invariant(45, "half-precision base: float32 adapters, right values")
def test_half_precision(cell: Cell, dtype: torch.dtype, tmp_path: Path) -> None:
    """Within 3e-2 (see `tolerance`) of the same rounded values computed in float64."""
    model, inputs = make(cell.family, dtype=dtype), batch(cell.family, dtype=dtype)
    method = cell.attach(model)
    for name, tensor in method.tensors().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if name.startswith("peft.") else dtype), name
    randomize(method, size=0.05)
    found = outputs(model, inputs)
    assert found.dtype == dtype and bool(torch.isfinite(found).all())
    method.save(tmp_path)
    exact = make(cell.family, dtype=torch.float64)
    with torch.no_grad(), method.disabled():
        for name, tensor in exact.named_parameters():
            tensor.copy_(model.get_parameter(name))
    load_adapter(tmp_path, exact)
    assert distance(found, outputs(exact, inputs.double() if inputs.is_floating_point() else inputs)
                    ) < tolerance(cell.family, dtype, 3e-2 * cell.row.rounding)


@pytest.mark.parametrize("dtype", HALF, ids=_name)
@invariant(45, "half-precision base: float32 adapters, right values")
def test_autocast(cell: Cell, dtype: torch.dtype) -> None:
    """A float32 base under autocast: near the full-precision output, and gradients in float32."""
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method, size=0.05)
    batches, head = problem(cell.family)
    expected = outputs(model, batches[0][0])
    with torch.autocast("cpu", dtype):
        found = model(batches[0][0])
        loss = loss_of(model, head, *batches[0])
    assert distance(found.detach(), expected) < tolerance(cell.family, dtype, 3e-2)
    assert loss.requires_grad == cell.trains
    if loss.requires_grad:
        loss.backward()
    for name, tensor in method.trainable().items():
        assert tensor.dtype == torch.float32
        if name in method.idle():
            continue
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == torch.float32 and bool(torch.isfinite(tensor.grad).all()), name


def tied(model: Any) -> Any:
    """Ties as the library makes them: moving to the meta device and assigning values undo them."""
    if hasattr(model.model, "tie_weights"):
        model.model.tie_weights()
    return model


@invariant(46, "built on meta, then loaded; .to() takes all along")
def test_meta(cell: Cell, tmp_path: Path) -> None:
    real, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(real)
    randomize(method)
    method.save(tmp_path)
    ghost = tied(make(cell.family).to("meta"))
    twin = cell.new().attach(ghost)
    assert all(tensor.is_meta for tensor in twin.tensors().values())
    ghost.model.load_state_dict(real.model.state_dict(), assign=True, strict=True)
    tied(ghost).peft.load_state_dict(real.peft.state_dict(), assign=True, strict=True)  # type: ignore[operator]
    assert same(method.tensors(), twin.tensors())
    for name, buffer in real.named_buffers():  # those outside the state dict have no value to load
        if ghost.get_buffer(name).is_meta:
            ghost.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, False)
    assert torch.equal(outputs(ghost.eval(), inputs), outputs(real, inputs))
    assert set(twin.trainable()) == {name for name, p in ghost.named_parameters() if p.requires_grad}


@invariant(46, "built on meta, then loaded; .to() takes all along")
def test_to(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family, dtype=torch.float64)
    method = cell.attach(model)
    randomize(method)
    trained = set(method.trainable())
    doubled(model)
    floating = [tensor for tensor in method.tensors().values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float64 for tensor in floating)
    assert set(method.trainable()) == trained and outputs(model, inputs).dtype == torch.float64
    with method.disabled():
        off = outputs(model, inputs)
    assert distance(off, outputs(doubled(make(cell.family)), inputs)) < 1e-10
    model.float()
    with method.disabled():
        assert torch.equal(outputs(model, batch(cell.family)), outputs(make(cell.family), batch(cell.family)))
    model.to("meta")
    assert all(tensor.is_meta for tensor in method.tensors().values()) and set(method.trainable()) == trained


@invariant(47, "torch.compile, whole graph, gives eager's output", families=LIGHT)
def test_compile(cell: Cell) -> None:
    """The first block, forward and backward; the whole model for each first variant under SCION_ALL, and where what the
    method trains shows only behind the blocks."""
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    randomize(method)
    whole, args, kwargs = model, (inputs,), {}
    block = _first_block(model, inputs)
    seen = hidden_out(block[0](*block[1], **block[2])).requires_grad or not (method.grafts and method.trainable())
    if seen and not (EVERYTHING and cell.variant == next(iter(cell.row.variants))):
        whole, args, kwargs = block
    torch._dynamo.reset()
    results, gradients = [], []
    for run in (torch.compile(whole, fullgraph=True, backend="aot_eager"), whole):
        model.zero_grad()
        with torch._dynamo.config.patch(allow_rnn=cell.variant == "lstm"):
            out = hidden_out(run(*args, **kwargs))
        if out.requires_grad:
            uneven(out).backward()
        results.append(out.detach())
        gradients.append([t.grad.clone() for t in method.trainable().values() if t.grad is not None])
    assert distance(*results) < 1e-5
    assert len(gradients[0]) == len(gradients[1]) and bool(gradients[0]) == any(
        p.requires_grad for p in whole.parameters()) | bool(method.trainable() and method.grafts)
    scale = max((gradient.abs().max().item() for gradient in gradients[1]), default=0.0)
    assert all((one - two).abs().max().item() < 1e-5 * scale for one, two in zip(*gradients, strict=True))


def _first_block(model: nn.Module, inputs: Tensor) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The first block and what the model calls it with."""
    block = dissect(model).blocks[0].module
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.register_forward_pre_hook(lambda module, *call: seen.append(call), with_kwargs=True)  # type: ignore
    outputs(model, inputs)
    handle.remove()
    return block, *seen[0]


@functools.cache
def _verbs() -> dict[str, Cell]:
    """A cell for each verb that a method of the registry uses in an attention."""
    found: dict[str, Cell] = {}
    for method, row in METHODS.items():
        cell, model = Small(method, next(iter(row.variants)), "timm_vit"), make("timm_vit")
        for verb in _verbs_at(dissect(model).blocks[0].sites["attention"].module, cell.attach(model)):
            found.setdefault(verb, cell)
    return found


def _verbs_at(module: nn.Module, method: PEFTMethod) -> list[str]:
    """The verbs of the method's grafts at a module or a child of it."""
    return [verb for graft in method.grafts if graft.site.module in (module, *module.children())
            for verb in graft.verbs]


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "PrefixTuning"])
def test_compile_beside_a_prefix(method: str) -> None:
    """47, of a stack: within a call that one method rewrites, another's forward is traced by another way."""
    model, row = make("timm_vit"), METHODS[method]
    Cell("PrefixTuning", "direct", "timm_vit").attach(model, name="prefix")
    randomize(Cell(method, next(iter(row.variants)), "timm_vit").attach(model))
    block = dissect(model).blocks[0].module
    hidden = torch.rand(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)) - 0.5
    torch._dynamo.reset()
    found = torch.compile(block, fullgraph=True, backend="aot_eager")(hidden)
    assert distance(hidden_out(found).detach(), hidden_out(block(hidden)).detach()) < 1e-5


def test_no_graft_unflattens_by_the_tensor_s_method() -> None:
    """``x.unflatten`` is Python, and calls its super: in a stack that cannot be compiled; ``torch.unflatten`` can."""
    for file in Path(peft.__path__[0]).rglob("*.py"):
        text = file.read_text()
        assert text.count(".unflatten(") == text.count("torch.unflatten("), file.name


@pytest.mark.parametrize("verbs", [(verb,) for verb in VERBS] if EVERYTHING else [tuple(VERBS)], ids="+".join)
def test_inductor(verbs: tuple[str, ...]) -> None:
    """47: the real compiler on one attention, with a method for each verb; under SCION_ALL verb by verb."""
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler here")
    from torch._inductor import config

    model = make("timm_vit")
    attention = dissect(model).blocks[0].sites["attention"].module
    for verb in verbs:
        cell = _verbs()[verb]
        method = Small(cell.method, cell.variant, cell.family).attach(model, layers=(0,), name=verb)
        randomize(method)
        assert verb in _verbs_at(attention, method)
    hidden = torch.rand(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)) - 0.5
    torch._dynamo.reset()
    with torch.no_grad(), config.patch(compile_threads=1):  # more would start a pool of processes
        assert distance(torch.compile(attention, fullgraph=True)(hidden), attention(hidden)) < 1e-5


@invariant(49, "operators a graft adds, bytes kept for backward")
def test_operators(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    base = len(operators(model, inputs))
    method = cell.attach(model)
    randomize(method)
    added = len(operators(model.eval(), inputs)) - base
    places = sum(1 + len(graft.site.tied) for graft in method.grafts) * EVERY_FAMILY[cell.family].repeats
    # fewer than none where a library's attention gets shorter
    assert added <= (cell.row.operators + EVERY_FAMILY[cell.family].operators) * places
    assert bool(added) == bool(method.grafts)


NOT_IN_ONE_BLOCK = (("LinearProbe", "head"), ("LinearProbe", "norm"), ("VPT", "shallow"))


@functools.cache
def _kept(method: str, family: str) -> int:
    model = make(family)
    Cell(method, next(iter(METHODS[method].variants)), family).attach(model, backbone_mode="eval")
    return saved_bytes(model.train(), batch(family, 8))


@invariant(49, "operators a graft adds, bytes kept for backward", where=lambda cell: cell.variant == next(iter(
    cell.row.variants)))
def test_saved_bytes(cell: Cell) -> None:
    """No method keeps more than its row's share of what full fine-tuning keeps."""
    model = make(cell.family)
    cell.attach(model, backbone_mode="eval")
    kept = saved_bytes(model.train(), batch(cell.family, 8))
    assert kept <= EVERY_FAMILY[cell.family].saved * cell.row.saved * _kept("FullFineTuning", cell.family)


@invariant(49, "operators a graft adds, bytes kept for backward", where=lambda cell: "layers" in cell.new().config
           and (cell.method, cell.variant) not in NOT_IN_ONE_BLOCK
           and (cell.method, cell.family) != ("Convpass", "whisper")  # whose last block is text, and no grid
           and EVERY_FAMILY[cell.family].repeats == 1)
def test_no_graph_below_the_first_graft(cell: Cell) -> None:
    """Trained tensors in the last block alone: nothing is kept for the blocks below."""
    kept = []
    for layers in (None, (-1,)):
        model = make(cell.family)
        changes = {"norms": ()} | ({"targets": ("mlp.down",)} if cell.method == "BitFit" else {})
        if cell.method == "BitFit" and cell.family == "qwen2":  # no other linear map has a bias
            changes |= {"targets": ("q",)}
        changes |= {"drop": ()} if cell.method == "LadderSideTuning" else {}
        changes |= {"whole": ()} if cell.method == "HalfFineTuning" else {}  # norms below the blocks
        changes |= {"biases": False} if cell.method == "VPTSP" else {}  # likewise biases
        if cell.method == "LanguageAdapter":  # its map of the embedding is trained below all blocks
            changes |= {"invertible": False, "drop_last": False}
        cell.attach(model, layers=layers, backbone_mode="eval", **changes)
        kept.append(saved_bytes(model.train(), batch(cell.family, 8)))
    assert kept[1] < 0.75 * kept[0]


@invariant(50, "a disabled method adds no operator")
def test_disabled_is_free(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    base = operators(model, inputs)
    method = cell.attach(model)
    with method.disabled():
        assert operators(model, inputs) == base


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_no_dearer_than_peft(method: str) -> None:
    """49: operators and saved bytes of a training step, beside peft's on the same model and targets."""
    reference: Any = pytest.importorskip("peft", reason="peft is not installed")
    inputs = batch("ast", 8)
    mine, theirs = make("ast").train(), make("ast").train()
    peft.method_class(method)(rank=4, targets=("q", "v")).attach(mine)  # type: ignore[call-arg]
    config = reference.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_dora=method == "DoRA")
    theirs.model = reference.inject_adapter_in_model(config, theirs.model)
    for module in theirs.modules():  # as ours: frozen parts without dropout
        if isinstance(module, nn.Dropout):
            module.eval()
    assert len(methods_on(mine)) == 1
    assert saved_bytes(mine, inputs) <= saved_bytes(theirs, inputs)
    assert len(operators(mine, inputs)) <= len(operators(theirs, inputs))


def test_adapter_loads_onto_a_half_precision_copy(tmp_path: Path) -> None:
    """45: the fingerprint knows a model's half-precision copy."""
    cell = Cell("LoRA", "q, v", "bert")
    method = cell.attach(make("bert"))
    randomize(method)
    method.save(tmp_path)
    half = make("bert", dtype=torch.bfloat16)
    loaded = load_adapter(tmp_path, half)
    assert same(method.tensors(), loaded.tensors())
