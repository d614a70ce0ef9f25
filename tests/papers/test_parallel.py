"""Checks of ParallelAdapter: its checks by their numbers there, and what it reads in pre- and post-norm blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant, parallel_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "ParallelAdapter": Row(
        {"mlp": Variant({"bottleneck": 4}, learns={"lr": 1e-3}),
         "heads": Variant({"reduction": 8, "scale": "learned", "targets": ("o", "mlp"), "input": "residual"},
                          refused={"timm_swin": "attention is cut into windows, the residual stream is a map"},
                          learns={"lr": 1e-2}),
         "attention": Variant({"bottleneck": 3, "scale": 2.0, "targets": ("attention",), "init": "normal"},
                              learns={"lr": 1e-2})},
        trained=parallel_count,
        cards=(("vit_b16", {}, 7_091_712), ("bert_base", {"scale": "learned"}, 7_091_724)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"scale": "big"}, "'big'"),
             ({"dropout": 1.0}, "dropout 1"), ({"input": "norm"}, "'norm'"), ({"init": "zero"}, "'zero'"),
             ({"targets": ("q",)}, "no output of a sublayer")),
        random=True, operators=6, saved=0.7, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
    ),
}

ParallelAdapter: Any = method_class("ParallelAdapter")


def bottleneck(graft: Any, x: Tensor) -> Tensor:
    """s (U relu(D x + b_D) + b_U)"""
    hidden = torch.relu(x @ graft.down.weight.t() + graft.down.bias)
    return graft.scale * (hidden @ graft.up.weight.t() + graft.up.bias)


def written_out(block: Any, x: Tensor, graft: Any, role: str, residual: bool) -> Tensor:
    """A pre-norm ViT block with one adapter."""

    def added(at: str, normed: Tensor, stream: Tensor) -> Tensor | float:
        return bottleneck(graft, stream if residual else normed) if role == at else 0.0

    normed, attention = block.norm1(x), block.attn
    if role in ("o", "attend"):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in attention.qkv(normed).chunk(3, -1))
        heads = (q @ k.transpose(2, 3) / 8 ** 0.5).softmax(-1) @ v
        if role == "attend":  # with q as it is, not divided by the root of its width
            P_k, P_v = (part.transpose(0, 1) for part in (graft.P_k, graft.P_v))
            heads = heads + graft.scale * torch.relu(q @ P_k.transpose(1, 2)) @ P_v
        heads = heads.transpose(1, 2).flatten(2)
        attended = attention.proj(heads + added("o", normed, x))
    else:
        attended = attention(normed) + added("attention", normed, x)
    middle = x + attended
    normed = block.norm2(middle)
    return middle + block.mlp(normed) + added("mlp", normed, middle)


@pytest.mark.parametrize("scale", [4.0, "learned"])
@pytest.mark.parametrize("role", ["mlp", "attention", "o", "attend"])
@pytest.mark.parametrize("reads", ["normed", "residual"])
def test_0_pre_norm(role: str, reads: str, scale: Any) -> None:
    """The input is the sublayer's own, or the stream before its norm, at each head the query; the scale multiplies the
    bias too."""
    model = make("timm_vit", dtype=torch.float64)
    method = ParallelAdapter(bottleneck=3, targets=(role,), input=reads, scale=scale, layers=(0,)).attach(model)
    randomize(method, size=0.3)
    block: Any = dissect(model).blocks[0].module
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = block(x)
        with method.disabled():
            expected = written_out(block, x, method.grafts[0], role, reads == "residual")
            assert distance(block(x), expected) > 1e-2
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("reads", ["normed", "residual"])
def test_0_post_norm(reads: str) -> None:
    """In BERT the MLP reads the normed stream, and both choices are that: LN(mlp(x) + A(x) + x)."""
    model = make("bert", dtype=torch.float64)
    method = ParallelAdapter(bottleneck=3, input=reads, scale=2.0).attach(model)
    randomize(method, size=0.3)
    layer: Any = dissect(model).blocks[1].module
    seen: list[Tensor] = []
    layer.intermediate.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    outputs(model, batch("bert"))
    x, found = seen
    graft = method.grafts[1]
    with torch.no_grad(), method.disabled():
        mlp = layer.output.dense(layer.intermediate(x))
        assert distance(found, layer.output.LayerNorm(mlp + bottleneck(graft, x) + x)) < 1e-12


def test_0_learned_scale_starts_at_one() -> None:
    method = ParallelAdapter(bottleneck=3, scale="learned").attach(make("bert"))
    assert [graft.scale.item() for graft in method.grafts] == [1.0, 1.0]


@pytest.mark.parametrize("family", ["timm_vit", "bert", "t5", "timm_swin", "codegen"])
def test_5_start(family: str) -> None:
    """Zeros in U: no difference at all; the normal start is none, and its flag says so."""
    model, inputs = make(family), batch(family)
    expected = outputs(model, inputs)
    targets = ("mlp", "attention", "o")
    method = ParallelAdapter(bottleneck=3, targets=targets).attach(model)
    assert torch.equal(outputs(model, inputs), expected) and method.identity_at_start
    other = ParallelAdapter(bottleneck=3, targets=targets, init="normal", name="other")
    assert not other.identity_at_start
    other.attach(model)
    assert not torch.equal(outputs(model, inputs), expected)


def _identity_mlp(model: nn.Module) -> None:
    for block in dissect(model).blocks:
        mlp: Any = block.module.mlp
        mlp.act = nn.Identity()
        with torch.no_grad():
            width, dim = mlp.fc1.weight.shape
            mlp.fc1.weight.copy_(torch.eye(width, dim, dtype=mlp.fc1.weight.dtype))
            mlp.fc2.weight.copy_(torch.eye(dim, width, dtype=mlp.fc1.weight.dtype))
            mlp.fc1.bias.zero_()
            mlp.fc2.bias.zero_()


@pytest.mark.parametrize("identity", [True, False])
def test_6_beside_and_behind(identity: bool) -> None:
    """Around a sublayer that gives what it gets, an adapter beside it does what one behind it does; else not."""
    found = []
    for name in ("ParallelAdapter", "Pfeiffer"):
        model = make("timm_vit", dtype=torch.float64)
        if identity:
            _identity_mlp(model)
        options: dict[str, Any] = {"scale": 1.0} if name == "ParallelAdapter" else {}
        method: Any = method_class(name)(bottleneck=3, **options).attach(model)  # type: ignore[call-arg]
        with torch.no_grad():
            for i, graft in enumerate(method.grafts):
                for part, values in graft.named_parameters():
                    generator = torch.Generator().manual_seed(len(part) + i)
                    values.copy_(0.3 * torch.randn(values.shape, generator=generator))
        found.append(outputs(model, batch("timm_vit", dtype=torch.float64)))
    assert (distance(*found) < 1e-12) == identity


@pytest.mark.parametrize("family", ["timm_vit", "bert", "llama", "t5", "gpt2"])
def test_6_before_the_output_projection(family: str) -> None:
    """At ``o`` the change passes through that projection: with zeros there it is gone; at ``attention`` it is not."""
    model, inputs = make(family), batch(family)
    with torch.no_grad():
        for block in dissect(model).blocks:
            block.sites["o"].full_weight.zero_()
    expected = outputs(model, inputs)
    heads = ParallelAdapter(bottleneck=3, targets=("o",)).attach(model)
    randomize(heads, size=0.5)
    assert torch.equal(outputs(model, inputs), expected)
    randomize(ParallelAdapter(bottleneck=3, targets=("attention",), name="outside").attach(model), size=0.5)
    assert distance(outputs(model, inputs), expected) > 1e-3


def test_6_cross_attention() -> None:
    """Beside T5's cross-attention it reads the decoder's stream behind that sublayer's norm."""
    model = make("t5", dtype=torch.float64)
    method = ParallelAdapter(bottleneck=3, targets=("cross.attention",)).attach(model)
    randomize(method, size=0.3)
    layer: Any = method.grafts[0].site.around.module.layer[1]
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.extend((args[0], out[0])), with_kwargs=True)
    outputs(model, batch("t5"))
    x, found = seen[:2]
    seen.clear()
    with method.disabled():
        outputs(model, batch("t5"))
    assert torch.equal(seen[0], x)
    with torch.no_grad():
        assert distance(found - seen[1], bottleneck(method.grafts[0], layer.layer_norm(x))) < 1e-10


def test_refusals() -> None:
    """In windows attention's output and the residual stream have different tokens."""
    for role in ("attention", "o"):
        with pytest.raises(ScionError, match="windows"):
            ParallelAdapter(targets=(role,), input="residual").attach(make("timm_swin"))
    inputs = batch("timm_swin")
    for options in ({"targets": ("attention", "o")}, {"input": "residual"}):
        model = make("timm_swin")
        expected = outputs(model, inputs)
        randomize(ParallelAdapter(bottleneck=3, **options).attach(model))
        assert distance(outputs(model, inputs), expected) > 1e-4
    with pytest.raises(ScionError, match="cannot be merged|not linear|merge"):
        ParallelAdapter().attach(make("bert")).merge()


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "timm_swin"])
def test_each_head_elsewhere(family: str) -> None:
    """The identity at the start; masks, windows and grouped queries are no matter of its own."""
    model, inputs = make(family), batch(family)
    expected = outputs(model, inputs)
    method = ParallelAdapter(bottleneck=4, targets=("attend",)).attach(model)
    assert distance(outputs(model, inputs), expected) < 1e-5  # Swin writes its attention out where nothing stands at it
    heads = dissect(model).blocks[0].sites["attend"].heads
    assert heads is not None and method.grafts[0].P_k.numel() == 4 * heads.query * heads.width
    randomize(method)
    assert distance(outputs(model, inputs), expected) > 1e-4
