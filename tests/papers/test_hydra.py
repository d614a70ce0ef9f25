"""Checks of Hydra: the checks by their place there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core.anatomy import Anatomy
from core.peft import method_class
from tests.models import batch, make
from tests.rows import WIDE, Row, Variant
from tests.toolkit import distance, outputs, randomize


def hydra_count(anatomy: Anatomy, method: Any) -> int:
    def branch(i: int, o: int, rank: int, bias: bool) -> int:
        return rank * (i + o) + (rank + o if bias else 0)

    total = 0
    for site in anatomy.sites(method.targets, method.layers):
        bias = site.bias is not None if method.bias is None else method.bias
        total += branch(site.in_features, site.out_features, method.rank, bias)
        total += branch(site.out_features, site.out_features, method.sequential_rank, bias)
    return total


ROWS = {
    "Hydra": Row(
        {"both": Variant(), "no bias": Variant({"rank": 4, "sequential_rank": 3, "bias": False, "scale": 0.5, **WIDE})},
        trained=hydra_count,
        cards=(("vit_b16", {}, 239_712),),
        bad=(({"rank": 0}, "rank 0"), ({"sequential_rank": 0}, "sequential_rank 0"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, commutes=False, operators=16, saved=0.9,
        artifact={"rank": 1, "sequential_rank": 1},
    ),
}

Hydra: Any = method_class("Hydra")


def _vit(name: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def _roberta() -> nn.Module:
    from transformers import BertConfig, BertModel  # RoBERTa-base's shapes

    with torch.device("meta"):
        return BertModel(BertConfig(vocab_size=50265, type_vocab_size=1))


@pytest.mark.parametrize(("model", "options", "count"), [
    (lambda: _vit("vit_base_patch16_224"), {}, 239_712),
    (lambda: _vit("swin_base_patch4_window7_224"), {}, 313_024),
    (lambda: _vit("vit_base_patch32_224"), {"targets": ("mlp.down",)}, 147_504),
    (_roberta, {"targets": ("mlp.down",), "rank": 4, "sequential_rank": 8, "bias": False}, 331_776)])
def test_1_to_3_counts(model: Any, options: dict[str, Any], count: int) -> None:
    assert Hydra(**options).attach(model()).counts()["method"] == count


def test_1_per_block() -> None:
    """Of ViT-B/16: 8,450 for the parallel branch at mlp.down, 3,842 for each of the three others."""
    method = Hydra().attach(_vit("vit_base_patch16_224"))
    found = {(graft.site.role, name): sum(p.numel() for p in getattr(graft, name).parameters())
             for graft in method.grafts if graft.site.block == 3 for name in ("parallel", "sequential")}
    assert found == {("mlp.down", "parallel"): 8_450, ("mlp.down", "sequential"): 3_842, ("o", "parallel"): 3_842,
                     ("o", "sequential"): 3_842}


def test_4_one_branch_alone() -> None:
    """With B_s = 0 it is LoRA with alpha / rank = s; with B_p = 0 a linear adapter on the output."""
    inputs = batch("bert")
    one, two, three = (make("bert") for _ in range(3))
    hydra = Hydra(rank=3, scale=0.5, bias=False, targets=("mlp.down",)).attach(one)
    randomize(hydra)
    lora: Any = method_class("LoRA")(rank=3, alpha=1.5, targets=("mlp.down",)).attach(two)  # type: ignore[call-arg]
    with torch.no_grad():
        for mine, theirs in zip(hydra.grafts, lora.grafts, strict=True):
            mine.sequential.B.zero_()
            theirs.A.copy_(mine.parallel.A)
            theirs.B.copy_(mine.parallel.B)
    assert distance(outputs(one, inputs), outputs(two, inputs)) < 1e-6
    sequential = Hydra(rank=3, scale=0.5, bias=False, targets=("mlp.down",)).attach(three)
    randomize(sequential)
    with torch.no_grad():
        for graft in sequential.grafts:
            graft.parallel.B.zero_()
            x = torch.randn(2, graft.site.in_features)
            y = torch.randn(2, graft.site.out_features)
            s = graft.sequential
            assert distance(graft.after(x, y), y + 0.5 * y @ s.A.t() @ s.B.t()) < 1e-6


def test_5_merged_bias() -> None:
    """With W = 0, A_p = 0 and b != 0 the output is b + s B_s A_s b (the shifts a and c being zero)."""
    model = make("bert")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "output.dense.weight" in name and "attention" not in name:
                tensor.zero_()
    hydra = Hydra(scale=0.7, targets=("mlp.down",)).attach(model)
    expected = {}
    with torch.no_grad():
        for graft in hydra.grafts:
            graft.parallel.A.zero_()
            graft.sequential.B.normal_()
            s, b = graft.sequential, graft.site.bias
            expected[graft.site.path] = (b + 0.7 * s.B @ (s.A @ b)).clone()
    hydra.merge()
    for path, value in expected.items():
        assert distance(model.get_submodule(path).bias, value) < 1e-6  # type: ignore[arg-type]
        assert not model.get_submodule(path).weight.any()  # type: ignore[operator, union-attr]


def test_6_gradients_at_the_start() -> None:
    model = make("bert")
    hydra = Hydra().attach(model)
    outputs_ = model(batch("bert"))
    outputs_.square().sum().backward()
    for graft in hydra.grafts:
        for branch in (graft.parallel, graft.sequential):
            assert not branch.A.grad.any() and branch.B.grad.any()


def test_5_a_bias_is_made_where_there_is_none() -> None:
    """s (B_p a_p + c_p + B_s a_s + c_s) is the bias of a map that had none."""
    model, inputs = make("t5", dtype=torch.float64), batch("t5", dtype=torch.float64)
    before = list(model.state_dict())
    hydra = Hydra(rank=3, bias=True, targets=("o", "mlp.down")).attach(model)
    randomize(hydra, size=0.2)
    expected = outputs(model, inputs)
    hydra.merge()
    assert distance(outputs(model, inputs), expected) < 1e-10
    assert {name.rpartition(".")[2] for name in set(model.state_dict()) - set(before)} == {"bias"}
    hydra.unmerge()
    hydra.remove()
    assert list(model.state_dict()) == before
