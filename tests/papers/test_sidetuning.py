"""Checks of SideTuning: the blend, its count, and that the base needs no backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core.anatomy import Anatomy
from core.errors import ScionError
from core.graft import Graft
from core.peft import method_class
from tests.models import Pooled, batch, make
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize


def side_count(anatomy: Anatomy, method: Any) -> int:
    width, dim = anatomy.stacks[-1].blocks[0].dim, method.dim or anatomy.blocks[-1].dim
    if method.network == "alexnet":
        return 2_469_696 + 9_216 * dim + 1
    return method.hidden * (width + dim) + method.hidden + dim + 1


ROWS = {
    "SideTuning": Row(
        {"mlp": Variant({"hidden": 16}, learns={"lr": 1e-2}, learns_on={"timm_convnext": {"lr": 3e-2}})},
        trained=side_count,
        cards=(("vit_b16", {"network": "alexnet"}, 9_547_585),),
        bad=(({"hidden": 0}, "hidden 0"), ({"network": "vgg"}, "'vgg'"), ({"pretrained": True}, "alexnet"),
             ({"layers": (0,)}, "layers")),
        random=True, commutes=False, operators=24, saved=0.3,
        absent=("test_no_graph_below_the_first_graft",),
        artifact={"hidden": 1},
    ),
}

SideTuning: Any = method_class("SideTuning")


def _blend(method: Any) -> Any:
    return method.grafts[-1]


def test_1_blend() -> None:
    """sigmoid(a) base(x) + (1 - sigmoid(a)) side(x), halves at the start, by hand on the patches with positions."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    base = outputs(model, inputs)
    method = SideTuning(hidden=8).attach(model)
    blend, seen = _blend(method), []
    inner: Any = model.model
    inner.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for a in (0.0, 2.0):
        with torch.no_grad():
            blend.a.fill_(a)
            found = model(inputs)
            z = F.gelu(F.linear(seen.pop(), blend.down.weight, blend.down.bias))
            side = F.linear(z, blend.up.weight, blend.up.bias).mean(1)
        share = 1 / (1 + torch.exp(torch.tensor(-a, dtype=torch.float64)))
        assert distance(found, share * base + (1 - share) * side) < 1e-12
    assert not method.identity_at_start


def test_2_count() -> None:
    """AlexNet's features 2,469,696, a map of 9,216 to 768 without a bias 7,077,888, and a."""
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = SideTuning(network="alexnet").attach(model)
    blend = _blend(method)
    assert sum(p.numel() for p in blend.features.parameters()) == 2_469_696
    assert blend.projection.weight.numel() == 7_077_888 and blend.projection.bias is None
    assert method.counts()["method"] == 9_547_585


def test_2_alexnet_reads_the_image() -> None:
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=2,
                            num_classes=0)
    model, images = Pooled(vit).eval(), torch.randn(2, 3, 64, 64)
    base = outputs(model, images)
    method = SideTuning(network="alexnet").attach(model)
    blend = _blend(method)
    with torch.no_grad():
        side = blend.pool(blend.features(images)).flatten(1) @ blend.projection.weight.t()
    torch.testing.assert_close(outputs(model, images), (base + side) / 2)
    model(images).sum().backward()
    assert all(p.grad is not None for p in method.trainable().values())
    with pytest.raises(ScionError, match="AlexNet reads images"):
        other = make("bert")
        SideTuning(network="alexnet").attach(other)
        other(batch("bert"))


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "bert", "llama", "t5"])
def test_3_the_base_needs_no_backward(family: str) -> None:
    """No block's output has a graph; the side network and a have gradients."""
    model = make(family)
    method = SideTuning(hidden=4).attach(model)
    graphs: list[bool] = []
    for name, module in model.named_modules():
        if name and not name.startswith("peft"):
            module.register_forward_hook(lambda module, args, out: graphs.append(
                isinstance(out, torch.Tensor) and out.requires_grad))
    model(batch(family)).square().sum().backward()
    assert graphs and not any(graphs)
    assert all(p.grad is not None and bool(p.grad.any()) for p in method.trainable().values())


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_4_a_sample_does_not_depend_on_the_batch(family: str) -> None:
    """What pads a sentence to its neighbour's length is left out of the mean, where the model is told."""
    model, ids = make(family), batch(family)
    if family == "t5":  # its decoder pads as its encoder
        def both(inputs: torch.Tensor) -> torch.Tensor:
            mask = (inputs != 0).long()
            return model.model(inputs, attention_mask=mask, decoder_input_ids=inputs, decoder_attention_mask=mask
                               ).last_hidden_state[:, 0]

        model.forward = both  # type: ignore[method-assign]
    method = SideTuning(hidden=8).attach(model)
    randomize(method, size=0.5)
    with torch.no_grad():
        _blend(method).a.fill_(-3.0)
    together = outputs(model, ids)
    assert bool((ids[1, -4:] == 0).all())
    assert distance(outputs(model, ids[1:2, :-4]), together[1:2]) < 1e-5
    assert distance(outputs(model, ids[:1]), together[:1]) < 1e-5
    wide = torch.cat([ids, torch.zeros(len(ids), 3, dtype=ids.dtype)], 1)
    assert distance(outputs(model, wide), together) < 1e-5


def test_5_it_stands_at_the_feature_alone() -> None:
    model = make("timm_vit")
    method = SideTuning(hidden=4).attach(model)
    verbs = {graft.site.role: graft.verbs for graft in method.grafts}
    assert verbs == {"inputs": (), "feature": ("after",)} and all(isinstance(g, Graft) for g in method.grafts)
    with pytest.raises(ScionError, match="no meaning"):
        SideTuning(layers=(0,)).attach(make("timm_vit"))
