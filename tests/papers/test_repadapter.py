"""Checks of RepAdapter: its equation before attention and MLP, its count, and the exact merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, dissect
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize


def repadapter_count(anatomy: Anatomy, method: Any) -> int:
    inputs = {(site.block, site.role.startswith("mlp")): [] for site in method.sites(anatomy)}
    for site in method.sites(anatomy):
        inputs[site.block, site.role.startswith("mlp")].append(site)
    total, h = 0, method.bottleneck
    for sites in inputs.values():
        d = sites[0].in_features
        total += d * h + h * d // method.groups + (h + d if all(s.bias is not None for s in sites) else 0)
    return total


ROWS = {
    "RepAdapter": Row(
        {"both": Variant({"dropout": 0.0}, learns={"lr": 1e-2}),
         "mlp": Variant({"bottleneck": 4, "groups": 4, "scale": 0.5, "targets": ("mlp",)}, learns={"lr": 3e-2})},
        trained=repadapter_count,
        cards=(("vit_b16", {}, 239_808), ("bert_base", {}, 239_808)),
        bad=(({"bottleneck": 7}, "bottleneck 7"), ({"groups": 0}, "groups 0"), ({"scale": 0}, "scale 0"),
             ({"dropout": 1.0}, "dropout 1"), ({"bottleneck": 10, "groups": 5}, "groups 5 does not divide"),
             ({"targets": ("mlp.up",)}, "no sublayer")),
        random=True, commutes=False, operators=10, saved=0.95, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 2, "targets": ("mlp",)},
    ),
}

RepAdapter: Any = method_class("RepAdapter")


def _released(adapter: Any, x: Tensor, groups: int, scale: float) -> Tensor:
    """The same change by two convolutions of width 1 over tokens, the second one grouped."""
    hidden = F.conv1d(x.transpose(1, 2), adapter.A[:, :, None], adapter.a)
    return x + scale * F.conv1d(hidden, adapter.blocks.flatten(0, 1)[:, :, None], adapter.b, groups=groups
                                ).transpose(1, 2)


@pytest.mark.parametrize(("bottleneck", "groups", "scale"), [(8, 2, 1.0), (4, 4, 0.5), (3, 1, 10.0)])
def test_1_serial_before_attention_and_mlp(bottleneck: int, groups: int, scale: float) -> None:
    """x + attn(R(norm1 x)), then + mlp(R'(norm2 x)), with R x + s conv_B(conv_A x)."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    method = RepAdapter(bottleneck=bottleneck, groups=groups, scale=scale, layers=(0,)).attach(model)
    randomize(method, size=0.1 / scale)
    seen: list[tuple[Tensor, Tensor]] = []
    block: Any = dissect(model).blocks[0].module
    block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    outputs(model, inputs)
    first, second = ([graft.adapter for graft in method.grafts])
    x, out = seen[0]
    with torch.no_grad(), method.disabled():
        x = x + block.attn(_released(first, block.norm1(x), groups, scale))
        x = x + block.mlp(_released(second, block.norm2(x), groups, scale))
    assert distance(x, out) < 1e-12


def test_1_one_adapter_for_separate_maps() -> None:
    """BERT's q, k and v read one changed input; the residual beside them does not."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert", dtype=torch.float64)
    method = RepAdapter(targets=("attention",), layers=(0,)).attach(model)
    assert len(method.grafts) == 3 and len(method.trainable()) == 4
    assert len({id(graft.shared[0]) for graft in method.grafts}) == 1
    randomize(method)
    seen: dict[str, Tensor] = {}
    attention: Any = dissect(model).blocks[0].sites["attend"].module
    maps = {"query": attention.query, "key": attention.key, "value": attention.value}
    for name, linear in maps.items():
        linear.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    attention.register_forward_pre_hook(lambda module, args: seen.update({"x": args[0]}))
    outputs(model, inputs)
    changed = _released(method.grafts[0].adapter, seen["x"], 2, 1.0)
    for name, linear in maps.items():
        assert distance(F.linear(changed, linear.weight, linear.bias), seen[name]) < 1e-12


def test_2_count() -> None:
    """2 L (d h + h + h d / g + d) = 239,808, of which 221,184 are weights."""
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = RepAdapter().attach(model)
    assert method.counts()["method"] == 239_808
    assert sum(t.numel() for t in method.trainable().values() if t.dim() > 1) == 221_184


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "timm_eva", "bert", "gpt2", "codegen", "gpt_neox",
                                    "llama"])
def test_3_merge_is_exact(family: str) -> None:
    """Fused, transposed and gated maps, with and without a bias: 1e-12 in double precision."""
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    method = RepAdapter().attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12


def test_4_a_map_without_bias_has_an_adapter_without() -> None:
    names = {name.rpartition(".")[2] for name in RepAdapter().attach(make("llama")).trainable()}
    assert names == {"A", "blocks"}
