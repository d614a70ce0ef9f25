"""Invariants 37 to 44: adapters and checkpoints, there and back."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core import dissect, load_adapter
from core.adapters.load import RECORD, TENSORS, adapter_bytes, keep_only_owned
from core.errors import ScionError
from core.method import PEFTMethod, methods_on
from core.method.described import FileNames, Names
from core.record import plain
from tests.artifacts.make_artifacts import STORED, WORDS, artifact_cells, expected_outputs, folder_of
from tests.methods import Cell
from tests.models import batch, make, with_head
from tests.toolkit import (
    LIGHT,
    Plain,
    differences,
    distance,
    invariant,
    loader,
    outputs,
    randomize,
    same,
    seeded,
    snapshot,
    trace,
    train,
    trainer,
)


def _numbers(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@invariant(37, "saved, loaded into a fresh base, same outputs")
def test_save_and_load(cell: Cell, tmp_path: Path) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    train(model, method, cell.family)
    expected = outputs(model, inputs)
    assert method.save(tmp_path / "adapter") == tmp_path / "adapter"
    fresh = make(cell.family)
    with seeded(99):
        loaded = load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(outputs(fresh, inputs), expected)
    assert type(loaded) is type(method) and loaded.name == method.name and loaded.counts() == method.counts()
    assert same(method.tensors(), loaded.tensors())
    assert plain(loaded.config) == plain({**method.config, "name": method.name})
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()
    with loaded.disabled():
        assert torch.equal(outputs(fresh, inputs), outputs(make(cell.family), inputs))


def _kept(method: PEFTMethod) -> dict[str, str]:
    """What a method remembers, to compare."""
    own = {name: value for name, value in vars(method).items() if name not in ("root", "module", "_home")}
    return {name: str(value.sum()) if isinstance(value, Tensor) else repr(value) for name, value in own.items()}


@invariant(37, "saved, loaded into a fresh base, same outputs")
def test_looking_changes_nothing(cell: Cell, tmp_path: Path) -> None:
    """Of an attached method, folded where it can be: questions about its own backbone and about another one."""
    model, inputs = make(cell.family), batch(cell.family)
    method: Any = cell.attach(model)
    randomize(method)
    if hasattr(method, "fold"):
        method.fold()
    remembered, expected = _kept(method), outputs(model, inputs)
    for other in (model, make(cell.family, width=64)):
        anatomy = dissect(other)
        method.examine(other)
        method.check(anatomy)
        method.sites(anatomy)
        method.moved(anatomy)
        method.foresee(list(anatomy.roles), len(anatomy.blocks), anatomy.family)
    assert _kept(method) == remembered and torch.equal(outputs(model, inputs), expected)
    method.save(tmp_path)
    fresh = make(cell.family)
    load_adapter(tmp_path, fresh)
    assert distance(outputs(fresh, inputs), expected) < 1e-6


@invariant(38, "the file holds what is declared, and no more")
def test_adapter_file(cell: Cell, tmp_path: Path) -> None:
    """The bytes of its tensors (at most 4 a number; sparse ones: values and int32 positions), 160 a tensor, 4 KiB."""
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method)
    method.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    packed = {name.rpartition(".")[0] for name in tensors}
    names = FileNames(Names.of(dissect(model)), [method])
    assert {names.of(name) for name in method.trainable()} <= set(tensors) | packed
    assert same({names.of(name): tensor.detach() for name, tensor in method.tensors().items()}, tensors)
    assert all(tensor.dtype in (torch.float32, torch.int32, torch.uint8) for tensor in tensors.values())
    stored = method.counts()["stored"]
    assert stored == _numbers(tensors)
    trained = _numbers(dict(method.trainable()))
    assert stored <= (1 if cell.moves_base else cell.row.stored) * trained
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert adapter_bytes(tmp_path) <= held + 160 * len(tensors) + 4096 and held <= 4 * stored
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([TENSORS, RECORD])


def _saved(cell: Cell, folder: Path, **changes: Any) -> PEFTMethod:
    model = make(cell.family)
    method = cell.attach(model, **changes)
    randomize(method)
    method.save(folder)
    return method


def _refuses(folder: Path, model: nn.Module, *words: str, **options: Any) -> str:
    """One line with the folder and ``words``; the model is as it was."""
    left, values = trace(model), snapshot(model)
    with pytest.raises(ScionError) as refusal, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(folder, model, **options)
    message = str(refusal.value)
    assert all(word in message for word in (str(folder), *words)) and "\n" not in message, message
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))
    return message


@invariant(39, "another base refuses, base='any' carries the delta")
def test_other_base(cell: Cell, tmp_path: Path) -> None:
    saved = _saved(cell, tmp_path, **cell.row.carries)
    assert _refuses(tmp_path, make(cell.family, seed=1), "another base", "base='any'")
    other = make(cell.family, seed=1)
    start, inputs = snapshot(other), batch(cell.family)
    before = outputs(other, inputs)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if saved.start:  # values of the base's own tensors: their change is known only beside the base they come from
            assert _refuses(tmp_path, other, "cannot be carried", "base=<", base="any")
            assert _refuses(tmp_path, other, "not the one", base=make(cell.family, seed=2))
        loaded = load_adapter(tmp_path, other, base=make(cell.family) if saved.start else "any")
    assert any("carried from base" in str(warning.message) for warning in told)
    assert cell.trains != torch.equal(outputs(other, inputs), before)
    now = dict(other.named_parameters())
    for name, value in saved.start.items():  # of the base's own tensors the delta is carried, not the value
        assert distance(now[name], start[name] + saved.tensors()[name] - value) < 1e-5
    own = {name: tensor for name, tensor in saved.tensors().items() if name.startswith("peft.")}
    assert same(own, {name: tensor for name, tensor in loaded.tensors().items() if name.startswith("peft.")})
    with loaded.disabled():
        assert same(start, snapshot(other)) and torch.equal(outputs(other, inputs), before)


@invariant(39, "another base refuses, base='any' carries the delta", where=lambda cell: cell.trains)
def test_other_width(cell: Cell, tmp_path: Path) -> None:
    """With the name of a tensor and both shapes."""
    method = _saved(cell, tmp_path)
    wide = make(cell.family, width=64)
    names = {name.rpartition(".")[2] for name in method.tensors()} | {g.site.weight_name for g in method.grafts}
    for options in ({}, {"base": "any"}):
        message = _refuses(tmp_path, wide, "] in the file, [", "] here", **options)
        assert any(name in message for name in names)


@invariant(39, "another base refuses, base='any' carries the delta")
def test_other_family(cell: Cell, tmp_path: Path) -> None:
    _saved(cell, tmp_path)
    other = "bert" if cell.family != "bert" else "timm_vit"
    assert _refuses(tmp_path, make(other), "another base")


@invariant(40, "missing, extra, misshapen tensors refuse", where=lambda cell: cell.trains)
def test_damaged_tensors(cell: Cell, tmp_path: Path) -> None:
    _saved(cell, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    name = sorted(tensors)[0]
    whole = tensors[name]
    for changed, words in (
        ({k: v for k, v in tensors.items() if k != name}, ("missing", name)),
        ({**tensors, "peft.extra": torch.zeros(1)}, ("no method", "peft.extra")),
        ({**tensors, name: torch.zeros(*whole.shape, 2)}, (name, str([*whole.shape, 2]), str([*whole.shape]))),
    ):
        save_file(changed, tmp_path / TENSORS)
        assert _refuses(tmp_path, make(cell.family), *words)


@invariant(40, "missing, extra, misshapen tensors refuse")
def test_damaged_files(cell: Cell, tmp_path: Path) -> None:
    _saved(cell, tmp_path)
    tensors, record = (tmp_path / TENSORS).read_bytes(), (tmp_path / RECORD).read_text()
    content = json.loads(record)
    unknown = {**content, "methods": [{**content["methods"][0], "class": "LoRAA"}]}
    option = {**content, "methods": [{**content["methods"][0], "config": {"rnak": 3}}]}
    for data, text, words in (
        (tensors[: len(tensors) // 2], record, TENSORS), (b"", record, TENSORS), (tensors, record[:40], RECORD),
        (tensors, "[]", RECORD), (tensors, json.dumps({**content, "format": 99}), "99"),
        (tensors, json.dumps(unknown), "'LoRAA'"), (tensors, json.dumps(option), "'rnak'"),
    ):
        (tmp_path / TENSORS).write_bytes(data)
        (tmp_path / RECORD).write_text(text)
        model = make(cell.family)
        left = trace(model)
        with pytest.raises(ScionError, match=words) as refusal:
            load_adapter(tmp_path, model)
        assert "\n" not in str(refusal.value) and differences(left, trace(model)) == []
    (tmp_path / TENSORS).unlink()
    (tmp_path / RECORD).write_text(record)
    assert _refuses(tmp_path, make(cell.family), "missing")
    assert _refuses(tmp_path / "nowhere", make(cell.family), RECORD)


@invariant(41, "checkpoints hold deltas only, and load alone", families=LIGHT)
def test_checkpoint(cell: Cell, tmp_path: Path) -> None:
    """Whole ones, and those of weights only."""
    module = Plain(make(cell.family))
    method = cell.attach(module.backbone)
    fit = trainer(tmp_path, method, max_steps=2)
    fit.fit(module, loader(cell.family))
    owned = {f"backbone.{name}" for name in method.live_tensors()} | {"head.weight", "head.bias"}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    count = sum(p.requires_grad for p in module.parameters())
    fixed = 1024 * count + 65536 + 4 * (_numbers(method.live_tensors()) - _numbers(method.trainable()))
    for weights_only in (False, True):
        file = tmp_path / f"{weights_only}.ckpt"
        fit.save_checkpoint(file, weights_only=weights_only)
        state = torch.load(file, weights_only=True)["state_dict"]
        assert {name for name in state if not name.endswith("_extra_state")} == owned
        assert file.stat().st_size <= (4 if weights_only else 12 + cell.row.state) * trained + fixed
        fresh, inputs = make(cell.family), batch(cell.family)
        loaded = load_adapter(file, fresh)
        module.eval()
        assert torch.equal(outputs(fresh, inputs), outputs(module.backbone, inputs))
        assert same(method.tensors(), loaded.tensors())
        assert _refuses(file, make(cell.family, seed=1), "another base")


@invariant(42, "k + k steps equal 2k steps", families=LIGHT)
def test_resume(cell: Cell, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, losses, random states; broken off within an epoch, and resumed by fresh objects."""

    def start(checkpoint: Path | None = None) -> tuple[Plain, Any, PEFTMethod]:
        module = Plain(make(cell.family))
        method = cell.attach(module.backbone) if checkpoint is None else cell.new()
        if cell.row.variants[cell.variant].own_optimizer:
            module.head.requires_grad_(False)
            module.make = lambda: method.make_optimizer(method.param_groups(), lr=module.lr)  # type: ignore
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        fit = trainer(tmp_path, method, keep, max_steps=8, enable_checkpointing=True)
        fit.fit(module, loader(cell.family), ckpt_path=checkpoint)
        return module, fit, method

    with seeded(3):
        whole, fit_whole, method_whole = start()
        drawn = torch.rand(3)
    with seeded(55):
        resumed, fit, method = start(tmp_path / "step=4.ckpt")
        assert torch.equal(torch.rand(3), drawn)
    assert len(whole.losses) == 8 and resumed.losses == whole.losses[4:]
    assert same(method_whole.tensors(), method.tensors())
    assert torch.equal(resumed.head.weight, whole.head.weight)
    one, two = fit_whole.optimizers[0].state_dict(), fit.optimizers[0].state_dict()
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for key, values in one["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(two["state"][key][n])) for n, v in values.items())


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
@invariant(43, "deepcopy, pickle, state dict, compiled keys")
def test_copies(cell: Cell, copied: Callable[[Any], Any]) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    randomize(method)
    values, expected = dict(method.tensors()), outputs(model, inputs)
    twin = copied(model)
    assert torch.equal(outputs(twin, inputs), expected)
    [other] = methods_on(twin)
    assert other is not method and other.root is twin and same(values, other.tensors())
    randomize(other, seed=1)
    assert torch.equal(outputs(model, inputs), expected) and torch.equal(outputs(twin, inputs), expected) != cell.trains
    with other.disabled():
        assert torch.equal(outputs(twin, inputs), outputs(make(cell.family), inputs))
    other.remove()
    assert torch.equal(outputs(twin, inputs), outputs(make(cell.family), inputs))
    assert torch.equal(outputs(model, inputs), expected)


@invariant(43, "deepcopy, pickle, state dict, compiled keys")
def test_state_dict(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    randomize(cell.attach(model))
    twin = make(cell.family)
    cell.attach(twin)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(twin, inputs), outputs(model, inputs))
    state = model.state_dict()
    extra = next(name for name in state if name.endswith("_extra_state"))
    del state[extra]
    with pytest.raises(RuntimeError, match="_extra_state"):
        twin.load_state_dict(state, strict=True)


@invariant(43, "deepcopy, pickle, state dict, compiled keys")
def test_compiled_keys(cell: Cell, tmp_path: Path) -> None:
    """A method on a compiled module has the names that it has on the plain one; files of either load onto either."""
    inputs = batch(cell.family)
    names = list(cell.attach(make(cell.family)).tensors())
    inner = make(cell.family)
    method = cell.attach(torch.compile(inner, backend="eager"))  # type: ignore[arg-type]
    randomize(method)
    assert list(method.tensors()) == names
    expected = outputs(inner, inputs)
    method.save(tmp_path)
    plain_, other = make(cell.family), make(cell.family)
    load_adapter(tmp_path, plain_)
    load_adapter(tmp_path, torch.compile(other, backend="eager"))  # type: ignore[arg-type]
    assert torch.equal(outputs(plain_, inputs), expected) and torch.equal(outputs(other, inputs), expected)
    module = Plain(inner)
    module.backbone = torch.compile(inner, backend="eager")  # type: ignore[assignment]
    keep_only_owned(module)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "compiled.ckpt")
    fresh = make(cell.family)
    load_adapter(tmp_path / "compiled.ckpt", fresh)
    assert torch.equal(outputs(fresh, inputs), expected)


@pytest.mark.parametrize("cell", artifact_cells(), ids=str)
def test_stored_adapter(cell: Cell) -> None:
    """44: an adapter written by an earlier release loads and gives its stored outputs."""
    folder = folder_of(cell)
    assert folder.is_dir(), f"no stored adapter for {cell}: python -m tests.artifacts.make_artifacts writes it"
    model, inputs = make(cell.family), batch(cell.family)
    load_adapter(folder, model)
    stored = load_file(folder / STORED)
    assert distance(outputs(model, inputs), stored["outputs"]) < 1e-6
    assert distance(outputs(model, inputs), outputs(make(cell.family), inputs)) > 1e-4
    assert sum(file.stat().st_size for file in folder.iterdir()) < 24 * 1024, WORDS


def test_an_adapter_of_before_ssf_made_biases() -> None:
    """44: where a later version has more tensors, an earlier file still loads."""
    folder = Path(__file__).parent.parent / "artifacts" / "earlier" / "SSF-published"
    model, inputs = make("llama"), batch("llama")
    load_adapter(folder, model)
    assert distance(outputs(model, inputs), load_file(folder / STORED)["outputs"]) < 1e-6


def test_stored_adapters_are_current() -> None:
    """44: what is written today gives today's outputs as well, so a new format is noticed before it is released."""
    for cell in artifact_cells():
        stored = load_file(folder_of(cell) / STORED)["outputs"]
        assert distance(expected_outputs(cell)[1], stored) < 1e-6, cell


@pytest.mark.parametrize("head", ["train", "frozen"])
def test_head_inside_the_backbone(head: Any, tmp_path: Path) -> None:
    """37: a task head is trained, counted apart, saved and restored, unless it is to stay frozen."""
    from core.peft import LoRA  # type: ignore[attr-defined]

    inputs = batch("timm_vit")
    model = with_head()
    method = LoRA(rank=2, head=head).attach(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained - set(method.trainable()) == ({"head.weight", "head.bias"} if head == "train" else set())
    assert method.counts()["head"] == (4 * 32 + 4 if head == "train" else 0)
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.1)
    method.save(tmp_path)
    fresh = with_head()
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    other = with_head()
    with torch.no_grad():
        other.head.weight.add_(1)  # type: ignore[union-attr, operator]
    load_adapter(tmp_path, other)  # a base is the same whatever its head
    assert torch.equal(outputs(other, inputs), outputs(model, inputs)) == (head == "train")
