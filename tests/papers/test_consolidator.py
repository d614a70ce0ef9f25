"""Checks of Consolidator: its equation by torch's own shuffle and grouped convolution, and the exact merge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy
from core.peft import method_class
from tests.models import batch, make
from tests.rows import NOT_LINEAR, Row, Variant
from tests.toolkit import distance, outputs, randomize, seeded


def consolidator_count(anatomy: Anatomy, method: Any) -> int:
    return sum(s.in_features * s.out_features // method.groups_at(s) + (s.out_features if s.bias is not None else 0)
               for s in method.sites(anatomy))


ROWS = {
    "Consolidator": Row(
        {"all": Variant(learns={"groups": 2, "lr": 1e-2}),
         "zeros": Variant({"groups": 4, "init": "zeros", "dropout": 0.2, "targets": ("q", "v")}, random=False,
                          learns={"groups": 2, "lr": 3e-2})},
        trained=consolidator_count,
        cards=(("vit_b16", {}, 304_128), ("bert_base", {}, 304_128)),
        bad=(({"groups": 0}, "groups 0"), ({"groups": 7}, "groups 7 does not divide"), ({"dropout": 1.0}, "dropout 1"),
             ({"init": "one"}, "'one'"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=1.25,
        artifact={"groups": 8, "targets": ("o",)},
    ),
}

Consolidator: Any = method_class("Consolidator")


class Map(nn.Module):
    """A linear map in a family's place, to be called alone."""

    def __init__(self, method: Any, role: str) -> None:
        super().__init__()
        self.model = make("timm_vit", dtype=torch.float64)
        method.attach(self.model)
        self.graft: Any = next(graft for graft in method.grafts if graft.site.role == role)
        self.linear: Any = self.graft.site.module


@pytest.mark.parametrize("role", ["qkv", "o", "mlp.up", "mlp.down"])
@pytest.mark.parametrize("groups", [4, 8, 16])
def test_1_shuffle_and_grouped_convolution(role: str, groups: int) -> None:
    """y + groupconv_g(shuffle_g(x)), with channel_shuffle and conv1d of width 1."""
    method = Consolidator(groups=groups)
    here = Map(method, role)
    randomize(method)
    graft, linear = here.graft, here.linear
    x = torch.randn(3, 5, linear.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    channels = x.transpose(1, 2).unsqueeze(-1)  # [batch, in, tokens, 1]
    shuffled = F.channel_shuffle(channels, groups).squeeze(-1)
    change = F.conv1d(shuffled, graft.C.flatten(0, 1)[:, :, None], graft.c, groups=groups).transpose(1, 2)
    with torch.no_grad():
        assert distance(linear(x), F.linear(x, linear.weight, linear.bias) + change) < 1e-12


def test_1_start() -> None:
    """Weight and shift uniform in 1e-3: no identity, but near; zeros make it one."""
    inputs = batch("timm_vit")
    base = outputs(make("timm_vit"), inputs)
    for init, near in (("uniform", 1e-1), ("zeros", 0.0)):
        model = make("timm_vit")
        method = Consolidator(groups=8, init=init).attach(model)
        largest = max(t.abs().max().item() for t in method.trainable().values())
        assert distance(outputs(model, inputs), base) <= near and largest <= 1e-3
        assert (largest > 0.9e-3) == (init == "uniform") == (not method.identity_at_start)


def test_2_rate_of_samples() -> None:
    """In training a sample has all of the change, divided by the rate that is kept, or none."""
    method = Consolidator(groups=4, dropout=0.2)
    here = Map(method, "o")
    randomize(method)
    x = torch.randn(2000, 2, here.linear.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), seeded(0):
        base = F.linear(x, here.linear.weight, here.linear.bias)
        change = here.linear(x) - base
        here.graft.train()
        seen: Tensor = here.linear(x) - base
        here.graft.eval()
    dropped = (seen == 0).flatten(1).all(1)
    assert abs(dropped.double().mean().item() - 0.2) < 0.04
    torch.testing.assert_close(seen[~dropped], change[~dropped] / 0.8)


@pytest.mark.parametrize(("family", "groups"), [("timm_vit", 8), ("timm_vit", 16), ("timm_swin", 4), ("bert", 4),
                                                ("gpt2", None), ("codegen", None), ("t5", None)])
def test_3_merge_is_exact(family: str, groups: int | None) -> None:
    """Groups into a dense matrix, its columns in the order of the channels, where groups and in / groups differ."""
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    method = Consolidator(groups=groups).attach(model)
    randomize(method, size=0.03)
    expected = outputs(model, inputs)
    assert any(graft.C.shape[0] != graft.C.shape[2] for graft in method.grafts)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12


def test_4_convolutions() -> None:
    """Patches and a depthwise map are dealt out and merged as well."""
    model, inputs = make("timm_convnext", dtype=torch.float64), batch("timm_convnext", dtype=torch.float64)
    method = Consolidator(groups=1, targets=("patch_embed", "conv", "mlp.up")).attach(model)
    randomize(method, size=0.03)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-12
