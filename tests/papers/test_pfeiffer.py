"""Checks of Pfeiffer: the checks of its entry, and of sheet 01's equations, against BERT's layer written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.graft import checkpoint_activations
from core.method.on_model import activate
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant, bottleneck_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "Pfeiffer": Row(
        {"zero_up": Variant({"bottleneck": 8}, learns={"lr": 3e-3}),  # of four all may be dead
         "normal": Variant({"reduction": 4, "init": "normal"}, learns={"lr": 3e-3})},
        trained=bottleneck_count,
        cards=(("vit_b16", {}, 894_528), ("bert_base", {"bottleneck": 64}, 1_189_632)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"init": "zero"}, "'zero'")),
        random=True, commutes=False, operators=5, saved=0.68,
        artifact={"bottleneck": 1},
    ),
}

Pfeiffer: Any = method_class("Pfeiffer")


def _adapter(graft: Any, z: Tensor) -> Tensor:
    """A(z) = U relu(D z + b_D) + b_U"""
    return torch.relu(z @ graft.down.weight.t() + graft.down.bias) @ graft.up.weight.t() + graft.up.bias


def _written_out(method_of: list[Any], x: Tensor, layer: Any, index: int) -> Tensor:
    """BERT's feed-forward block with a stack of adapters, as the paper writes it."""
    h = layer.output.dense(layer.intermediate(x))
    norm = layer.output.LayerNorm
    for method in method_of:
        h = _adapter(method.grafts[index], norm(h + x)) + h  # the inner residual is the tensor before the norm
    return norm(h + x)


@pytest.mark.parametrize("names", [(), ("one",), ("one", "two"), ("a", "b", "c")])
def test_1_post_norm_stack(names: tuple[str, ...]) -> None:
    model = make("bert", dtype=torch.float64)
    methods = [Pfeiffer(name=name, bottleneck=3, init="normal").attach(model) for name in names]
    for i, method in enumerate(methods):
        randomize(method, seed=i, size=0.3)
    seen: list[tuple[Tensor, Tensor]] = []
    layers: Any = [block.module for block in dissect(model).blocks]
    for layer in layers:
        layer.attention.register_forward_hook(lambda module, args, out: seen.append((out[0], torch.empty(0))))
        layer.register_forward_hook(lambda module, args, out: seen.append((torch.empty(0), out)))
    outputs(model, batch("bert"))
    handles = [(seen[2 * i][0], seen[2 * i + 1][1]) for i in range(len(layers))]
    for method in methods:  # the frozen layer alone, for the paper's own equation
        activate(method.grafts, [False] * len(method.grafts))
    for i, (x, out) in enumerate(handles):
        with torch.no_grad():
            assert distance(out, _written_out(methods, x, layers[i], i)) < 1e-12


def test_1_pre_norm() -> None:
    """x + mlp + adapter(mlp)"""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    method = Pfeiffer(bottleneck=3, layers=(0,)).attach(model)
    randomize(method, size=0.3)
    graft: Any = method.grafts[0]
    block: Any = dissect(model).blocks[0].module
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = block(x)
        with method.disabled():
            middle = x + block.attn(block.norm1(x))
            mlp = block.mlp(block.norm2(middle))
    assert distance(found, middle + mlp + _adapter(graft, mlp)) < 1e-12
    assert outputs(model, inputs).isfinite().all()


@pytest.mark.parametrize("family", ["timm_vit", "bert", "llama"])
def test_2_identity_at_the_start(family: str) -> None:
    """Zeros in U are exact; the library's normal start is small noise, and no dead one."""
    model, inputs = make(family), batch(family)
    expected = outputs(model, inputs)
    for i in range(3):
        Pfeiffer(name=f"zero {i}").attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    method = Pfeiffer(init="normal").attach(model)
    assert 0 < distance(outputs(model, inputs), expected) < 1e-2
    model(inputs).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in method.trainable().values())


def test_3_counts() -> None:
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        models: list[nn.Module] = [BertModel(BertConfig()) for _ in range(5)]
    for model, (options, count) in zip(models, (({}, 894_528), ({"bottleneck": 64}, 1_189_632),
                                                ({"bottleneck": 8}, 156_768), ({"reduction": 2}, 7_091_712),
                                                ({"layers": range(5, 12)}, 521_808)), strict=True):
        assert Pfeiffer(**options).attach(model).counts()["method"] == count


def test_4_recomputed_blocks_give_the_same_gradients() -> None:
    inputs, gradients = batch("bert"), []
    for on in (False, True):
        model = make("bert")
        methods = [Pfeiffer(name=name, bottleneck=3, init="normal").attach(model) for name in "ab"]
        checkpoint_activations(model, on)
        model(inputs).square().sum().backward()
        gradients.append([tensor.grad for method in methods for tensor in method.trainable().values()])
    assert all(one is not None and torch.equal(one, two) for one, two in zip(*gradients, strict=True))
