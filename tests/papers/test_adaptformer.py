"""Checks of AdaptFormer: its entry, on blocks written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.anatomy import dissect
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant, parallel_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "AdaptFormer": Row(
        {"mlp": Variant({"bottleneck": 8, "dropout": 0.0}, learns={"lr": 1e-2})},
        trained=parallel_count,
        cards=(("vit_b16", {}, 1_189_632), ("vit_b16", {"bottleneck": 8}, 156_768)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0.0}, "scale 0")),
        random=True, operators=6, saved=0.7,
        artifact={"bottleneck": 1},
    ),
}

AdaptFormer: Any = method_class("AdaptFormer")


def bottleneck(graft: Any, x: Tensor) -> Tensor:
    return torch.relu(x @ graft.down.weight.t() + graft.down.bias) @ graft.up.weight.t() + graft.up.bias


def test_1_reads_the_stream_before_the_norm() -> None:
    """out = x + MLP(LN(x)) + 0.1 U relu(D x), x behind attention."""
    model = make("timm_vit", dtype=torch.float64)
    method = AdaptFormer(bottleneck=3).attach(model)
    randomize(method, size=0.5)
    x = torch.randn(2, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for block, graft in zip([block.module for block in dissect(model).blocks], method.grafts, strict=True):
        with torch.no_grad():
            found = block(x)
            with method.disabled():
                middle = x + block.attn(block.norm1(x))  # type: ignore[operator]
                mlp = block.mlp(block.norm2(middle))  # type: ignore[operator]
        assert distance(found, middle + mlp + 0.1 * bottleneck(graft, middle)) < 1e-12
        assert distance(found, middle + mlp + 0.1 * bottleneck(graft, block.norm2(middle))) > 1e-3  # type: ignore


def test_1_post_norm() -> None:
    """In BERT the stream behind attention has passed its norm already."""
    model = make("bert", dtype=torch.float64)
    method = AdaptFormer(bottleneck=3).attach(model)
    randomize(method, size=0.5)
    layer: Any = dissect(model).blocks[0].module
    seen: list[Tensor] = []
    layer.attention.output.LayerNorm.register_forward_hook(lambda module, args, out: seen.append(out))
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    outputs(model, batch("bert"))
    x, found = seen
    with torch.no_grad(), method.disabled():
        mlp = layer.output.dense(layer.intermediate(x))
        assert distance(found, layer.output.LayerNorm(mlp + 0.1 * bottleneck(method.grafts[0], x) + x)) < 1e-12


@pytest.mark.parametrize("family", ["t5", "llama", "timm_swin", "timm_eva"])
def test_1_what_it_adds(family: str) -> None:
    """In other pre-norm blocks, too: what enters the norm before the MLP, through the bottleneck, on its output."""
    model = make(family, dtype=torch.float64)
    method = AdaptFormer(bottleneck=3, scale=0.7, layers=(0,)).attach(model)
    randomize(method, size=0.5)
    graft = method.grafts[0]
    block = graft.site.around
    streams: list[Tensor] = []
    block.sites["norm2"].module.register_forward_hook(lambda module, args, out: streams.append(args[0]))
    block.sites["mlp"].module.register_forward_hook(lambda module, args, out: streams.append(out))
    outputs(model, batch(family, dtype=torch.float64))
    with method.disabled():
        outputs(model, batch(family, dtype=torch.float64))
    x, y, same, frozen = streams
    assert torch.equal(x, same)
    with torch.no_grad():
        assert distance(y - frozen, 0.7 * bottleneck(graft, x)) < 1e-9


def test_2_start() -> None:
    """Kaiming-uniform down, zeros up and in the biases: the identity; dropout stands behind the activation."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    expected = outputs(model, inputs)
    method = AdaptFormer().attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    for graft in method.grafts:
        assert not graft.up.weight.any() and not graft.up.bias.any() and not graft.down.bias.any()
        assert 0 < graft.down.weight.abs().max() <= 32 ** -0.5 and graft.dropout.p == 0.1 and graft.scale == 0.1
        assert graft.down.weight.shape == (64, 32)


def test_2_dropout_is_inside() -> None:
    method = AdaptFormer(bottleneck=8, dropout=0.5).attach(make("timm_vit"))
    randomize(method, size=0.5)
    graft = method.grafts[0].train()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        hidden = torch.relu(x @ graft.down.weight.t() + graft.down.bias)
        expected = torch.nn.functional.dropout(hidden, 0.5) @ graft.up.weight.t() + graft.up.bias
        torch.manual_seed(0)
        assert distance(graft.change(x), expected) < 1e-6
