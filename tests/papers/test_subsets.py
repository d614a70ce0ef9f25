"""Checks of FullFineTuning, LinearProbe, BitFit, LayerNormTuning: training of what is there; the numbers are those of
the paper's checks for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make, with_head
from tests.papers.sites import bert_base, meta, names
from tests.papers.training import deep, run
from tests.rows import FEW, Row, Variant, norms_count, whole_count
from tests.toolkit import outputs, saved_bytes, snapshot, train


def layernorms_count(anatomy: Anatomy, method: Any) -> int:
    names = anatomy.norm_names() if method.roles is None else {
        name for site in anatomy.sites(method.roles) for name in site.parameter_names}
    return sum(anatomy.root.get_parameter(name).numel() for name in names)


def biases_count(anatomy: Anatomy, method: Any) -> int:
    if method.roles is not None:
        return sum(site.module.bias.numel() for site in anatomy.sites(method.roles, method.layers))  # type: ignore
    modules = [module for module in anatomy.root.modules() if isinstance(getattr(module, "bias", None), nn.Parameter)]
    return sum(module.bias.numel() for module in modules)  # type: ignore[operator]


ROWS = {
    "LayerNormTuning": Row(
        {"all": Variant(learns={"lr": 1e-2}), "few": Variant({"targets": ("norm",)}, learns={"lr": 2e-2})},
        trained=layernorms_count,
        cards=(("vit_b16", {}, 38_400), ("bert_base", {}, 38_400)),
        bad=(({"targets": ("mlp.up",)}, "no norm"), ({"targets": ("nrom1",)}, "'norm1'")),
        saved=0.9, absent=("test_no_graph_below_the_first_graft",),
        artifact={"targets": ("norm2",)},
    ),
    "BitFit": Row(
        {"all": Variant(),
         "mlp": Variant({"targets": ("mlp.up", "mlp.down"), "layers": (-1,)}, learns={"lr": 3e-2},
                        refused={"timm_eva": "gate and up are one projection with one bias",
                                 "qwen2": "its MLP has no biases"})},
        trained=biases_count,
        cards=(("vit_b16", {}, 102_912), ("bert_base", {}, 102_912)),
        bad=(({"targets": ("q", "qq")}, "'qq'"), ({"exclude": ("nrom",)}, "'norm'")),
        saved=0.79,
        artifact={"targets": ("o", "mlp.down")},
        refused={
            "llama": "no module of LlamaModel has a bias, so there is nothing to train",
            "t5": "no module of T5Model has a bias, so there is nothing to train",
            "mistral": "no module of MistralModel has a bias, so there is nothing to train",
            "gemma": "no module of GemmaModel has a bias, so there is nothing to train",
            "modernbert": "no module of ModernBertModel has a bias, so there is nothing to train",
            "qwen3": "no module of Qwen3Model has a bias, so there is nothing to train",
            "gemma2": "no module of Gemma2Model has a bias, so there is nothing to train",
            "gemma3": "no module of Gemma3TextModel has a bias, so there is nothing to train",
            "phi3": "no module of Phi3Model has a bias, so there is nothing to train"},
    ),
    "FullFineTuning": Row(
        {"all": Variant()},
        trained=whole_count,
        cards=(("vit_b16", {}, 85_798_656), ("bert_base", {}, 109_482_240)),
        bad=(({"exclude": ("pol",)}, "'pol'"),),
        artifact=FEW,
    ),
    "LinearProbe": Row(
        {"head": Variant(trains=False), "norm": Variant({"norms": ("norm",)}, moves_base=True,
                                                        learns={"lr": 1e-2})},
        trained=lambda anatomy, method: norms_count(anatomy, method.norms),
        cards=(("vit_b16", {}, 0), ("vit_b16", {"norms": ("norm",)}, 1536)),
        bad=(({"norms": ("nrm",)}, "'nrm'"),),
        saved=0.0,
        artifact={"norms": ("norm",)},
    ),
}

FullFineTuning: Any = method_class("FullFineTuning")
LinearProbe: Any = method_class("LinearProbe")
BitFit: Any = method_class("BitFit")
LayerNormTuning: Any = method_class("LayerNormTuning")


def _norms(model: nn.Module) -> set[str]:
    """Names of the parameters of every LayerNorm, wherever it is."""
    return {f"{path}.{name}" for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters()}


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------- which


def test_1_bitfit_is_every_bias() -> None:
    """Those of norms, of the patches' projection and of the pooler too."""
    for model in (make("timm_vit"), make("timm_swin"), bert_base()):
        every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
        method = BitFit().attach(model)
        assert names(method) == every == _trained(model)
    assert "pooler.dense.bias" in every


def test_1_bitfit_subset() -> None:
    """The published variant for BERT: queries and the MLP's first map."""
    method = BitFit(targets=("q", "mlp.up")).attach(bert_base())
    assert method.counts()["method"] == 12 * (768 + 3072)
    assert {name.partition("layer.")[2].partition(".")[2] for name in names(method)} == {
        "attention.self.query.bias", "intermediate.dense.bias"}


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "bert", "clip"])
def test_1_layernorm_is_every_norm(family: str) -> None:
    model = make(family)
    every = _norms(model)
    method = LayerNormTuning().attach(model)
    assert names(method) == every == _trained(model)


@pytest.mark.parametrize(("targets", "ending", "count"), [
    (("norm1",), "attention.output.LayerNorm", 4), (("norm2",), "output.LayerNorm", 4),
    (("norm",), "embeddings.LayerNorm", 2)])
def test_1_layernorm_of_one_kind(targets: tuple[str, ...], ending: str, count: int) -> None:
    method = LayerNormTuning(targets=targets).attach(make("bert"))
    assert len(names(method)) == count and all(name.rpartition(".")[0].endswith(ending) for name in names(method))


def test_1_full_is_everything() -> None:
    """All but a task head, which is counted apart; the pooler where it feeds something."""
    model = make("bert")
    every = {name for name, _ in model.named_parameters()}
    method = FullFineTuning().attach(model)
    assert names(method) == _trained(model) == every
    assert FullFineTuning(exclude=("pool",)).attach(bert_base()).counts()["method"] == 109_482_240 - 590_592
    headed = FullFineTuning().attach(with_head())
    assert headed.counts()["head"] == 4 * 33 and not any(name.startswith("head") for name in names(headed))


@pytest.mark.parametrize(("classes", "count"), [(100, 76_900), (2, 1_538)])
def test_1_linear_probe_is_the_head(classes: int, count: int) -> None:
    import timm

    model = meta(lambda: timm.create_model("vit_base_patch16_224", num_classes=classes))
    assert LinearProbe().attach(model).counts() == {"method": 0, "norms": 0, "head": count, "stored": 0}
    assert _trained(model) == {"head.weight", "head.bias"}


# ------------------------------------------------------------------------------------------------- how


@pytest.mark.parametrize("method", [BitFit(), LayerNormTuning(), FullFineTuning(), LinearProbe()], ids=repr)
def test_2_and_3_one_step(method: Any) -> None:
    """The start is the identity; a step of AdamW moves exactly what is declared."""
    model, inputs = make("bert"), batch("bert")
    expected, before = outputs(model, inputs), snapshot(model)
    method.attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    train(model, method, "bert", steps=1)
    after = snapshot(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= names(method)
    assert all(name.endswith("key.bias") for name in names(method) - moved)  # softmax does not see a shift of all keys


@pytest.mark.parametrize("method", [BitFit(), LayerNormTuning()], ids=repr)
def test_no_weight_decay(method: Any) -> None:
    """Vectors are not decayed, whatever the run says."""
    groups = method.attach(make("bert")).param_groups()
    assert groups and all(group["weight_decay"] == 0.0 for group in groups)


def test_8_linear_probe_in_eval_mode() -> None:
    """Frozen and without dropout or drop-path while the head trains; full training has them."""
    model: Any = make("timm_swin")
    inputs = batch("timm_swin")
    before = outputs(model, inputs)
    LinearProbe().attach(model)
    model.train()
    assert not any(module.training for name, module in model.model.named_modules() if name)
    assert torch.equal(outputs(model, inputs), before)
    other: Any = make("timm_swin")
    FullFineTuning().attach(other)
    other.train()
    assert all(module.training for _, module in other.model.named_modules())
    assert not torch.equal(outputs(other, inputs), before)


def test_linear_probe_keeps_nothing_for_backward() -> None:
    model, inputs = make("bert"), batch("bert")
    LinearProbe().attach(model)
    assert saved_bytes(model, inputs) == 0 and not model(inputs).requires_grad
    other = make("bert")
    BitFit().attach(other)
    assert saved_bytes(other, inputs) > 0


@pytest.mark.parametrize(("cls", "moves"), [(BitFit, True), (LinearProbe, False)])
def test_head_is_trained_along(cls: Any, moves: bool, tmp_path: Any) -> None:
    """In a run the head learns beside the biases, and alone under a probe."""
    torch.manual_seed(0)
    fresh = deep()
    start = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    tuner = run(tmp_path, cls(), steps=2)
    moved = {name for name, p in tuner.named_parameters() if name in start and not torch.equal(p, start[name])}
    assert {name for name in moved if name.startswith("task")} == {
        name for name, _ in tuner.named_parameters() if name.startswith("task")}
    inside = moved - {name for name in moved if name.startswith("task")}
    assert bool(inside) == moves and all(name.endswith("bias") for name in inside)


def test_bitfit_where_there_is_no_bias() -> None:
    with pytest.raises(ScionError, match="no bias"):
        BitFit().attach(make("llama"))
