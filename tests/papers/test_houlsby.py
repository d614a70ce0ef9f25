"""Checks of Houlsby: the numbers are those of the paper's checks for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, names, numbers
from tests.rows import Row, Variant, norms_count
from tests.toolkit import distance, outputs, randomize, snapshot, train


def houlsby_count(anatomy: Anatomy, method: Any) -> int:
    sites = anatomy.sites(method.targets, method.layers)
    bottlenecks = sum(2 * method.width(s.width) * s.width + method.width(s.width) + s.width for s in sites)
    return bottlenecks + norms_count(anatomy, method.norms)


ROWS = {
    "Houlsby": Row(
        {"zero_up": Variant({"bottleneck": 4}), "near_identity": Variant({"reduction": 8, "init": "near_identity"}),
         "norms": Variant({"bottleneck": 4, "norms": ("norm1", "norm2")}, moves_base=True)},
        trained=houlsby_count,
        cards=(("vit_b16", {}, 2_379_264), ("bert_base", {}, 2_379_264)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": -2}, "reduction -2"),
             ({"targets": ("q",)}, "no hidden state"), ({"targets": ("atention",)}, "'attention'")),
        random=True, commutes=False, operators=4, saved=0.68, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
    ),
}

Houlsby: Any = method_class("Houlsby")


def _adapted(graft: Any, h: Tensor) -> Tensor:
    """h + U gelu(D h + b_D) + b_U"""
    z = h @ graft.down.weight.t() + graft.down.bias
    z = z * 0.5 * (1 + torch.erf(z / 2 ** 0.5))
    return h + z @ graft.up.weight.t() + graft.up.bias


def test_equation_in_post_norm() -> None:
    """Two a layer, each before residual and norm: LN(A(o) + x), LN(A(ffn) + z)."""
    model: Any = make("bert", dtype=torch.float64)
    method = Houlsby(bottleneck=3).attach(model)
    randomize(method, size=0.3)
    x = numbers(2, 5, 32)
    for index, layer in enumerate(model.model.encoder.layer):
        at: Any = {graft.site.role: graft for graft in method.grafts if graft.site.block == index}
        with torch.no_grad():
            found = layer(x)
            found = found[0] if isinstance(found, tuple) else found
            with method.disabled():
                o = layer.attention.output.dense(layer.attention.self(x)[0])
                z = layer.attention.output.LayerNorm(_adapted(at["attention"], o) + x)
                ffn = layer.output.dense(layer.intermediate(z))
                expected = layer.output.LayerNorm(_adapted(at["mlp"], ffn) + z)
        assert distance(found, expected) < 1e-12


def test_equation_in_pre_norm() -> None:
    """x + A(attention(LN(x))), x + A(mlp(LN(x)))"""
    model: Any = make("timm_vit", dtype=torch.float64)
    method = Houlsby(bottleneck=3).attach(model)
    randomize(method, size=0.3)
    x, block = numbers(2, 5, 32), model.model.blocks[1]
    at: Any = {graft.site.role: graft for graft in method.grafts if graft.site.block == 1}
    with torch.no_grad():
        found = block(x)
        with method.disabled():
            middle = x + _adapted(at["attention"], block.attn(block.norm1(x)))
            expected = middle + _adapted(at["mlp"], block.mlp(block.norm2(middle)))
    assert distance(found, expected) < 1e-12


def test_1_norms_are_trained_along() -> None:
    """As in the paper: every norm of the backbone, counted apart."""
    method = Houlsby(bottleneck=8, norms=("norm1", "norm2", "norm")).attach(bert_base())
    assert method.counts()["norms"] == 38_400 and len(names(method)) == 50
    model = make("bert")
    before = snapshot(model)
    method = Houlsby(bottleneck=4, norms=("norm1", "norm2", "norm")).attach(model)
    train(model, method, "bert", steps=1)
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved == names(method) and all("LayerNorm" in name for name in moved)


@pytest.mark.parametrize(("init", "exact"), [("zero_up", True), ("near_identity", False), ("normal", False)])
def test_2_start(init: str, exact: bool) -> None:
    """Zeros in U are exact. The paper's start is a normal of 0.01 cut off at two deviations, the biases zero; its
    outputs are near the backbone's."""
    model, inputs = make("bert", width=128), batch("bert")
    expected = outputs(model, inputs)
    method = Houlsby(bottleneck=64, init=init).attach(model)
    change = distance(outputs(model, inputs), expected)
    assert method.identity_at_start == exact and (change == 0) == exact and change < 0.2
    for graft in method.grafts:
        assert not graft.up.bias.any() and (exact or not graft.down.bias.any())
        for linear in (graft.down, graft.up):
            values, deviation = linear.weight.detach(), float(linear.weight.detach().std())
            if init == "near_identity":
                assert float(values.abs().max()) <= 0.02 and abs(deviation / 0.01 - 0.88) < 0.02  # of a cut normal
            elif init == "normal":
                assert abs(deviation / 0.02 - 1) < 0.05


@pytest.mark.parametrize("init", ["zero_up", "near_identity", "normal"])
def test_3_no_start_is_dead(init: str) -> None:
    """With zeros in both maps all but b_U would stay where it is for ever; here all learns in the second step."""
    model, inputs = make("bert"), batch("bert")
    method = Houlsby(bottleneck=4, init=init).attach(model)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).pow(3).sum().backward()
        optimizer.step()
    assert all(bool(tensor.grad.any()) for tensor in method.trainable().values())


def test_4_does_not_merge() -> None:
    method = Houlsby(bottleneck=4).attach(make("bert"))
    with pytest.raises(ScionError, match="cannot be merged"):
        method.merge()
