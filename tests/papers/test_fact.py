"""Checks of FacT: slices of the shared factors, their counts, and the merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, dissect
from core.peft import method_class
from tests.models import batch, make
from tests.rows import NOT_LINEAR, Row, Variant
from tests.toolkit import distance, outputs, randomize


def fact_count(anatomy: Anatomy, method: Any) -> int:
    cuts = [method.cut(site) for site in method.sites(anatomy)]
    slices = sum(rows * columns for _, rows, columns in cuts)
    widths, r = {dim for dim, *_ in cuts}, method.rank
    return 2 * r * sum(widths) + (slices * r**2 if method.form == "tt" else slices * r + len(widths) * r**3)


ROWS = {
    "FacT": Row(
        {"tt": Variant({"rank": 4, "dropout": 0.0}, learns={"lr": 1e-2}),
         "tk": Variant({"rank": 3, "form": "tk", "scale": 2.0, "dropout": 0.0, "targets": ("q", "v", "mlp.up")},
                       learns={"rank": 8, "lr": 1e-2})},
        trained=fact_count,
        cards=(("vit_b16", {}, 61_440), ("vit_b16", {"rank": 32, "form": "tk"}, 86_528)),
        bad=(({"rank": 0}, "rank 0"), ({"scale": 0}, "scale 0"), ({"form": "tucker"}, "'tucker'"),
             ({"dropout": 1.0}, "dropout 1"), *NOT_LINEAR),
        random=True, weights=True, operators=14, saved=1.15,
        artifact={"rank": 1},
    ),
}

FacT: Any = method_class("FacT")


def _sigma(method: Any, graft: Any, j: int, i: int) -> Tensor:
    """The middle factor of slice [j, i]: the slice's own, or C x_3 p."""
    r, (shared,) = method.rank, graft.shared
    if method.form == "tt":
        return graft.middle[j * r:(j + 1) * r, i * r:(i + 1) * r]
    return sum((shared.C[:, :, k] * graft.middle[j, i, k] for k in range(r)), torch.zeros(r, r).to(shared.C))


def _dense(method: Any, graft: Any) -> Tensor:
    """s dW, slice by slice, cut at the edge."""
    [shared], site = graft.shared, graft.site
    rows = [torch.cat([shared.V @ _sigma(method, graft, j, i) @ shared.U for i in range(graft.inputs)], 1)
            for j in range(graft.out)]
    return method.scale * torch.cat(rows)[:site.out_features, :site.in_features]


@pytest.mark.parametrize("form", ["tt", "tk"])
@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "llama", "gpt2", "gemma", "timm_convnext"])
def test_1_slices(family: str, form: str) -> None:
    """W x + s dW x at every map, fused, transposed, cut at the edge and convolved; merged to the same weight."""
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    method = FacT(rank=3, form=form, scale=0.5).attach(model)
    randomize(method, size=0.3)
    expected = {graft.site.name: (_dense(method, graft), graft.site) for graft in method.grafts}
    moved = outputs(model, inputs)
    before = {name: site.matrix(site.full_weight).detach().clone() for name, (_, site) in expected.items()}
    method.merge()
    assert distance(outputs(model, inputs), moved) < 1e-12
    for name, (change, site) in expected.items():
        assert distance(site.matrix(site.full_weight).detach() - before[name], change.detach()) < 1e-12


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_1_released_layout_of_the_mlp(form: str) -> None:
    """fc1: S from rank to 4 rank, V on each quarter; fc2: U on each quarter of its input, S from 4 rank to rank."""
    model = make("timm_vit", dtype=torch.float64)
    method = FacT(rank=3, form=form, scale=2.0, layers=(1,)).attach(model)
    randomize(method, size=0.3)
    grafts = {graft.site.role: graft for graft in method.grafts}
    [shared] = grafts["mlp.up"].shared
    generator = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 5, 32 * n, dtype=torch.float64, generator=generator) for n in (1, 4))
    with torch.no_grad():
        for role, given in (("mlp.up", x), ("mlp.down", z)):
            linear: Any = grafts[role].site.module
            quarters = F.linear(given.reshape(2, 5, -1, 32), shared.U).flatten(2)
            change = F.linear(F.linear(quarters, grafts[role].S).reshape(2, 5, -1, 3), shared.V).reshape(2, 5, -1)
            expected = F.linear(given, linear.weight, linear.bias) + 2 * change
            assert distance(linear(given), expected) < 1e-12
    assert grafts["mlp.up"].S.shape == (12, 3) and grafts["mlp.down"].S.shape == (3, 12)


def test_1_parts_of_a_fused_map_are_its_slices() -> None:
    """q, k and v as three sites or qkv as one: the same tensor."""
    inputs, found = batch("timm_vit"), []
    for targets in (("q", "k", "v"), ("qkv",)):
        model = make("timm_vit")
        method = FacT(rank=2, targets=targets, layers=(0,)).attach(model)
        with torch.no_grad():
            shared = method.module.factors[0]
            shared.V.copy_(torch.linspace(-1, 1, 64).view(32, 2))
            shared.U.copy_(torch.linspace(-1, 1, 64).view(2, 32) ** 2)
            values = torch.linspace(0, 1, 12).view(6, 2)
            for graft, part in zip(method.grafts, values.split(6 // len(method.grafts)), strict=True):
                graft.middle.copy_(part)
        found.append(outputs(model, inputs))
    assert distance(*found) < 1e-5


@pytest.mark.parametrize(("form", "rank", "count"), [
    ("tt", 4, 8_448), ("tt", 8, 21_504), ("tt", 16, 61_440), ("tk", 8, 13_952), ("tk", 16, 30_976), ("tk", 32, 86_528)])
def test_2_counts(form: str, rank: int, count: int) -> None:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert FacT(rank=rank, form=form).attach(model).counts()["method"] == count


def test_3_one_set_of_factors_for_each_width() -> None:
    model = make("timm_swin")
    method = FacT(rank=2).attach(model)
    widths = list(dict.fromkeys(block.dim for block in dissect(model).blocks))
    assert [factors.U.shape[1] for factors in method.module.factors] == widths and len(widths) == 2
    for graft in method.grafts:
        assert graft.shared[0] is method.module.factors[widths.index(graft.site.width)]


def test_4_start() -> None:
    """U and S by the linear layer's default bound, V zeros, C and p by Xavier's."""
    method = FacT(rank=16).attach(make("timm_vit"))
    shared: Any = method.module.factors[0]
    assert not shared.V.any() and 0.9 < shared.U.abs().max() * 32**0.5 <= 1
    for graft in method.grafts:
        assert 0.9 < graft.middle.abs().max() * (graft.inputs * 16) ** 0.5 <= 1
    method = FacT(rank=16, form="tk").attach(make("timm_vit"))
    slices = 24
    largest = max(graft.middle.abs().max() for graft in method.grafts)
    assert 0.9 < largest * ((16 + slices) / 6) ** 0.5 <= 1
    assert 0.9 < method.module.factors[0].C.abs().max() * (2 * 16**2 / 6) ** 0.5 <= 1
