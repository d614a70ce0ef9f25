"""Invariants 1 to 12: what attaching a method does, and all that it does not."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from core import peft
from core.anatomy import dissect
from core.errors import ScionError
from core.method import PEFTMethod, key_of
from tests.core.test_matrix import check_refusal
from tests.methods import METHODS, Cell
from tests.models import EVERY_FAMILY, batch, make, tied_llama
from tests.toolkit import (
    Plain,
    differences,
    distance,
    invariant,
    outputs,
    randomize,
    same,
    snapshot,
    trace,
)


@invariant(1, "identity at start, where it is promised")
def test_identity(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    before = outputs(model, inputs)
    method = cell.attach(model)
    after = outputs(model, inputs)
    if method.identity_at_start:
        assert torch.equal(before, after)
    else:
        assert not torch.equal(before, after), "the start is the identity, but the class does not say so"


@invariant(2, "no no-op: other values, other output")
def test_values_matter(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    before = outputs(model, inputs)
    randomize(method)
    if cell.trains:
        assert distance(outputs(model, inputs), before) > 1e-4
    else:
        assert method.trainable() == {} and torch.equal(outputs(model, inputs), before)


@invariant(3, "base tensors, classes, signature untouched")
def test_base_is_untouched(cell: Cell) -> None:
    model = make(cell.family)
    tensors, values = dict(model.named_parameters()), snapshot(model)
    classes = {name: type(module) for name, module in model.named_modules()}
    signature = inspect.signature(model.forward)
    cell.attach(model)
    assert same(values, snapshot(model))
    assert all(tensor is dict(model.named_parameters())[name] for name, tensor in tensors.items())
    assert all(type(model.get_submodule(name)) is kind for name, kind in classes.items())
    assert inspect.signature(model.forward) == signature


@invariant(4, "base keys unchanged, new keys under peft.<name>")
def test_keys(cell: Cell) -> None:
    model = make(cell.family)
    before = list(model.state_dict())
    method = cell.attach(model, name="my method")
    after = list(model.state_dict())
    new = [key for key in after if key not in before]
    assert [key for key in after if key in before] == before
    assert all(key.startswith("peft.my method.") for key in new)
    assert {name for name in method.trainable() if name not in before} <= set(new)


def _partner(cell: Cell) -> PEFTMethod:
    """A method of another kind to stand beside the cell's."""
    return peft.method_class("Houlsby" if cell.method != "Houlsby" else "LoRA")(name="partner", **(
        {"bottleneck": 2, "targets": ("mlp",)} if cell.method != "Houlsby" else {"rank": 2, "targets": ("mlp.up",)}))


def _values(method: PEFTMethod) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in method.live_tensors().items()}


@invariant(5, "same seed, same values, in any order")
def test_seed(cell: Cell) -> None:
    first, second, third, other = (make(cell.family) for _ in range(4))
    alone = _values(cell.attach(first))
    method = cell.attach(second)
    _partner(cell).attach(second)
    before_partner = _values(method)
    _partner(cell).attach(third)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        after_partner = _values(cell.attach(third))
    assert same(alone, before_partner) and same(alone, after_partner)
    different = not same(alone, _values(cell.attach(other, seed=1)))
    assert different == cell.random


@invariant(6, "random states of torch, numpy, python untouched")
def test_random_states(cell: Cell) -> None:
    model = make(cell.family)
    before = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    cell.attach(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(numpy.array_equal(a, b) for a, b in zip(numpy.random.get_state(), before[1], strict=True))
    assert random.getstate() == before[2]


@invariant(7, "setup twice injects once")
def test_setup_twice(cell: Cell) -> None:
    module = Plain(make(cell.family))
    method: Any = cell.new()
    method.setup(None, module, "fit")
    keys, left = list(module.backbone.state_dict()), trace(module)
    grafts = [id(graft) for graft in method.grafts]
    method.setup(None, module, "test")
    assert list(module.backbone.state_dict()) == keys
    assert [id(graft) for graft in method.grafts] == grafts
    assert differences(left, trace(module)) == []


@invariant(8, "trained count equals the closed formula")
def test_count(cell: Cell) -> None:
    model = make(cell.family)
    anatomy = dissect(make(cell.family))
    method = cell.attach(model)
    trained = method.trainable()
    counts = method.counts()
    expected = cell.row.trained(anatomy, method)
    assert counts["method"] + counts["norms"] == expected and counts["head"] == 0
    assert sum(tensor.numel() for tensor in trained.values()) == expected
    flags = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert flags == set(trained)


@pytest.mark.parametrize("method", ["DoRA", "AdaLoRA", "MoS", "TriAdaptLoRA"])
def test_options_of_lora_alone(method: str) -> None:
    """They are none of theirs; files of earlier versions name them with the values that change nothing."""
    names = {"root", "start", "lr_ratio"}
    assert not names & set(peft.options(method)) and not names & set(peft.make(method, {}).config)
    for options in ({"root": True}, {"start": "principal"}, {"lr_ratio": 2.0}):
        with pytest.raises(ScionError, match=f"{method} has no option"):
            peft.make(method, options)
    early = peft.make(method, {"root": False, "start": "random", "lr_ratio": 1.0, "rank": 5})
    assert early.config == peft.make(method, {"rank": 5}).config


def test_no_option_is_always_refused() -> None:
    """Whatever a method inherits and cannot have is no option of it: it takes each one's default by name."""
    for name in peft.registry():
        cls = peft.method_class(name)
        for option, value in cls().config.items():
            cls(**{option: value})
        assert set(cls().config) == set(peft.options(name))


def _refuses(cell: Cell, model: torch.nn.Module, changes: dict[str, Any], *words: str) -> str:
    """The method stops with one line holding ``words``, before anything has changed."""
    left, values = trace(model), snapshot(model)
    with pytest.raises(ScionError) as refusal:
        cell.attach(model, **changes)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))
    return message


def _takes(cell: Cell, argument: str) -> bool:
    return argument in cell.new().config


@invariant(9, "a target that matches nothing stops the run")
def test_targets(cell: Cell) -> None:
    name, model = {"name": "mine"}, make(cell.family)
    assert _refuses(cell, model, {"layers": (0, 99), **name}, "99", "mine", "layers 0 to")
    assert _refuses(cell, model, {"norms": ("norm2", "normm"), **name}, "'normm'", "mine")
    if _takes(cell, "targets"):
        good = tuple(cell.new().config["targets"] or ("mlp.up",))
        assert _refuses(cell, model, {"targets": ("mlp.dwn",), **name}, "'mlp.dwn'", "mlp.down", "mine")
        assert _refuses(cell, model, {"targets": (*good, "mlp.dwn"), **name}, "'mlp.dwn'", "mlp.down", "mine")
    if _takes(cell, "exclude"):
        assert _refuses(cell, model, {"exclude": ("nrom",), **name}, "'nrom'", "'norm'", "mine")


@invariant(9, "a target that matches nothing stops the run", where=lambda cell: cell.method != "LinearProbe")
def test_nothing_to_train(cell: Cell) -> None:
    """Empty targets or layers train nothing, and say so (what stands outside the blocks may remain)."""
    for changes in [{"layers": ()}, *([{"targets": ()}] if _takes(cell, "targets") else [])]:
        model = make(cell.family)
        left = trace(model)
        try:
            method = cell.new(**changes, norms=()).attach(model)
        except ScionError as refusal:
            assert cell.method in str(refusal) and differences(left, trace(model)) == []
        else:
            assert method.trainable(), f"{method} trains nothing, silently"


@invariant(9, "a target that matches nothing stops the run")
def test_unknown_option(cell: Cell) -> None:
    with pytest.raises(ScionError, match=r"no option 'layres'.*'layers'"):
        peft.make(cell.method, {"layres": [0]})
    with pytest.raises(ScionError, match=f"no method is called.*{cell.method}"):
        peft.make(cell.method[:-1] + "x", {})


@invariant(10, "bad values stop before anything changes")
def test_bad_values(cell: Cell) -> None:
    model = make(cell.family)
    left = trace(model)
    for changes, words in (*cell.row.bad, ({"name": "a.b"}, "'a.b'"), ({"name": ""}, "''")):
        with pytest.raises(ScionError) as refusal:
            cell.cls(**{**cell.elsewhere, **changes}).attach(model)
        elsewhere = "matches nothing" in str(refusal.value) and not EVERY_FAMILY[cell.family].attention
        assert (words in str(refusal.value) or elsewhere) and cell.method in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert differences(left, trace(model)) == []


@invariant(10, "bad values stop before anything changes")
def test_name_taken(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    left = trace(model)
    with pytest.raises(ScionError, match=f"{cell.method}: a method of that name is attached"):
        cell.new().attach(model)
    with pytest.raises(ScionError, match="another model"):
        method.attach(make(cell.family))
    assert differences(left, trace(model)) == []


@invariant(11, "a slice target leaves the other rows bit-equal",
           where=lambda cell: cell.row.weights and EVERY_FAMILY[cell.family].attention)
def test_slice(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    sites = dissect(model).blocks[0].sites
    for module, name, value in sites["q"].while_active:  # so that its module is called before there is a graft, too
        setattr(module, name, value)
    seen: list[dict[str, torch.Tensor]] = []

    def look(model: nn.Module) -> None:
        found: dict[str, torch.Tensor] = {}

        def listen(role: str) -> Any:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                found.setdefault(role, sites[role].take(output).clone())  # the first of a layer's runs

            return sites[role].module.register_forward_hook(hook)

        handles = [listen(role) for role in ("q", "k", "v")]
        outputs(model, inputs)
        for handle in handles:
            handle.remove()
        seen.append(found)

    look(model)
    options = {"dropout": 0.0} if _takes(cell, "dropout") else {}
    randomize(cell.new(targets=("q",), layers=(0,), **options).attach(model))
    look(model)
    assert not torch.equal(seen[0]["q"], seen[1]["q"])
    assert torch.equal(seen[0]["k"], seen[1]["k"]) and torch.equal(seen[0]["v"], seen[1]["v"])


# ------------------------------------------------------------------------------------------------- tied weights

METHOD_VARIANTS = [(method, variant) for method, row in METHODS.items() for variant in row.variants]


NOT_ON_TIED = {"VQT": "holds its head itself"}


@pytest.mark.parametrize(("method", "variant"), METHOD_VARIANTS)
def test_tied_weights_stay_tied(method: str, variant: str) -> None:
    """12: what a method does to a tied weight, it does on both sides."""
    if method in NOT_ON_TIED:
        with pytest.raises(ScionError, match=NOT_ON_TIED[method]):
            peft.method_class(method)().attach(tied_llama())
        return
    cell, model, plain = Cell(method, variant, "llama"), tied_llama(), tied_llama()
    if cell.refused:
        check_refusal(cell)
        return
    graft: Any
    inputs = batch("llama")
    attached = cell.attach(model)
    randomize(attached)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = list(attached.trainable())
    assert len({id(tensor) for tensor in attached.trainable().values()}) == len(names)
    if cell.cls.moves_base and all("weight" in graft.verbs for graft in attached.grafts):
        # the effective values, in a plain model
        with torch.no_grad():
            for name, tensor in plain.named_parameters():
                graft = attached.module._modules.get(key_of(name))
                value = dict(model.named_parameters())[name]
                tensor.copy_(value if graft is None else graft.weight(value))
        with torch.no_grad():
            assert distance(model(inputs).logits, plain(inputs).logits) < 1e-5
    if attached.mergeable and any("embed_tokens" in graft.site.weight_name for graft in attached.grafts):
        with torch.no_grad():
            expected = model(inputs).logits
            attached.merge()
            assert distance(model(inputs).logits, expected) < 1e-5


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.weights])
def test_one_side_of_a_tied_weight(method: str) -> None:
    """12: adapting one side warns; merging it would change the other side too, and refuses."""
    model = tied_llama()
    values = snapshot(model)
    with pytest.warns(UserWarning, match="lm_head.*tied|tied.*lm_head"):
        cell = Cell(method, next(iter(METHODS[method].variants)), "llama")
        attached = cell.new(targets=("q", "lm_head")).attach(model)
    randomize(attached)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    left = trace(model)
    with pytest.raises(ScionError, match="tied"):
        attached.merge()
    assert same(values, snapshot(model)) and differences(left, trace(model)) == []
