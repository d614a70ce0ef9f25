"""Checks of IA3: the numbers are those of the paper's checks for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, check_equation, matrix, shift, vit_b16
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize, same, snapshot


def ia3_count(anatomy: Anatomy, method: Any) -> int:
    outputs = sum(s.out_features for s in anatomy.sites(method.output_roles)) if method.output_roles else 0
    return outputs + (sum(s.in_features for s in anatomy.sites(method.input_roles)) if method.input_roles else 0)


ROWS = {
    "IA3": Row(
        {"k, v, mlp": Variant(learns={"lr": 3e-2}),
         "outputs": Variant({"outputs": ("q", "mlp.up"), "inputs": ()}, learns={"lr": 2e-2})},
        trained=ia3_count,
        cards=(("vit_b16", {}, 55_296), ("bert_base", {}, 55_296)),
        bad=(({"outputs": (), "inputs": ()}, "neither"), ({"inputs": ("q",), "outputs": ("q",)}, "q")),
        operators=4, saved=1.1, without_attention={"outputs": ("mlp.up",)},
        artifact={"inputs": ()},
    ),
}

IA3: Any = method_class("IA3")


def test_equation() -> None:
    """k <- l k, v <- l v, W_down (l a) + b."""
    method = IA3().attach(make("bert", dtype=torch.float64))
    randomize(method)
    assert [graft.site.role for graft in method.grafts].count("mlp.down") == 2 and len(method.grafts) == 6
    for graft in method.grafts:
        w, b = matrix(graft), shift(graft)
        if graft.site.role == "mlp.down":
            check_equation(graft, lambda x, g=graft, w=w, b=b: (x * g.l) @ w.t() + b)
        else:
            check_equation(graft, lambda x, g=graft, w=w, b=b: (x @ w.t() + b) * g.l)


@pytest.mark.parametrize("build", [vit_b16, bert_base])
def test_1_scales_no_more_than_it_says(build: Any) -> None:
    """By the ends of names the library also scales the attention's output on BERT, and q on a ViT: 64,512 each."""
    method = IA3().attach(build())
    assert method.counts()["method"] == 12 * (2 * 768 + 3072) == 55_296
    assert {graft.site.role for graft in method.grafts} == {"k", "v", "mlp.down"}


def test_queries_of_a_fused_projection_stay() -> None:
    model = make("timm_vit")
    method = IA3(inputs=()).attach(model)
    randomize(method)
    linear: Any = method.grafts[0].site.module
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    found = linear(x)
    with method.disabled():
        base = linear(x)
    scales = torch.cat([graft.l for graft in method.grafts if graft.site.module is linear])
    assert torch.equal(found[..., :32], base[..., :32])
    assert distance(found[..., 32:].detach(), (base[..., 32:] * scales).detach()) < 1e-6


def test_2_and_3_start() -> None:
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method = IA3().attach(model)
    assert all(bool((tensor == 1).all()) for tensor in method.trainable().values())
    assert torch.equal(outputs(model, inputs), expected)
    model(inputs).pow(3).sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in method.trainable().values())


def test_4_merges_into_rows_columns_and_biases() -> None:
    """Rows and biases of k and v, columns of W_down; taking it out again is exact, where the library divides by
    l + 1e-8, even with a scale of zero."""
    model: Any = make("bert", dtype=torch.float64)
    before, inputs = snapshot(model), batch("bert")
    method = IA3().attach(model)
    randomize(method)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor[3] = 0.0
    expected = outputs(model, inputs)
    scales = {graft.site.path: (graft.site.role, graft.l.detach().clone()) for graft in method.grafts}
    method.merge()
    for path, (role, scale) in scales.items():
        weight, bias = before[f"{path}.weight"], before[f"{path}.bias"]
        merged = model.get_submodule(path)
        if role == "mlp.down":
            assert torch.equal(merged.weight, weight * scale) and torch.equal(merged.bias, bias)
        else:
            assert torch.equal(merged.weight, scale[:, None] * weight) and torch.equal(merged.bias, scale * bias)
    assert distance(outputs(model, inputs), expected) < 1e-12
    method.unmerge()
    assert same(before, snapshot(model))


def test_one_input_that_serves_several_maps() -> None:
    """q, k and v of a fused projection read one tensor, which cannot be scaled for one of them alone."""
    with pytest.raises(ScionError, match="shares its input with others"):
        IA3(outputs=(), inputs=("k",)).attach(make("timm_vit"))
