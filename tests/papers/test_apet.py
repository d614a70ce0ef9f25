"""Checks of APET: its checks, by their numbers there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.anatomy import Anatomy, dissect
from core.peft import method_class
from core.peft.selection.apet import distinct, draw
from tests.models import batch, make
from tests.rows import NOT_LINEAR, Row, Variant, whole_count
from tests.toolkit import distance, outputs, randomize, same, snapshot, train


def tensor_apet_count(anatomy: Anatomy, method: Any) -> int:
    """Of the backbone at most half of the budget; of what is added less than one unit more than the other half."""
    sizes = {site.name: sum(method.sizes(site)) for site in anatomy.sites(method.targets)}
    added, moved = sum(sizes[name] for name in method.added), sum(t.numel() for t in method.start.values())
    half = method.budget(anatomy) // 2
    assert moved <= half and added < half + max(sizes.values()) and len(method.grafts) == len(method.added)
    return added + moved


ROWS = {
    "APET": Row(
        {"all": Variant({"density": 0.02}, learns={"density": 0.4, "lr": 1e-2}),
         "few": Variant({"count": 300, "targets": ("q", "mlp.down")}, learns={"count": 1500, "lr": 3e-2})},
        trained=lambda anatomy, method: getattr(method, "count", None) or int(
            getattr(method, "density", 0.0) * whole_count(anatomy, method)),
        cards=(("vit_b16", {}, 257_395),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 10**9}, "1000000000 entries"),
             ({"count": 3, "density": 0.1}, "not both"), *NOT_LINEAR),
        random=True, operators=2, saved=0.96, stored=2.0,
        artifact={"density": None, "count": 60, "targets": ("mlp.up",)},
    ),
    "TensorAPET": Row(
        {"drawn": Variant({"count": 6000, "rank": 2, "bottleneck": 4}, learns={"count": 30000, "lr": 3e-3}),
         "modules": Variant({"count": 3000, "rank": 2, "bottleneck": 4, "seed": 3, "exclude": ("norm",)},
                            learns={"count": 20000, "lr": 3e-3})},
        trained=tensor_apet_count,
        cards=(("vit_b16", {}, 259_632),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 1}, "budget of 1"),
             ({"count": 3, "density": 0.1}, "not both"), ({"rank": 0}, "rank 0"), ({"bottleneck": 0}, "bottleneck 0"),
             ({"targets": ("feature",)}, "neither a linear map")),
        random=True, operators=8, saved=1.08, commutes=False, without_attention={"targets": ("mlp.up", "mlp")},
        artifact={"count": 120, "targets": ("mlp",), "bottleneck": 1},
    ),
}

APET: Any = method_class("APET")
TensorAPET: Any = method_class("TensorAPET")


def test_2_exact_budget() -> None:
    """ViT-B/16: exactly as many as LoRA of rank 8 at q and v, of 84,934,656 weights in 48 maps."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = APET(count=294_912).attach(model)
    assert method.counts()["method"] == 294_912 and method.counts()["stored"] == 2 * 294_912
    sites = dissect(model).sites(("qkv", "o", "mlp.up", "mlp.down"))
    assert len(sites) == len(method.grafts) == 48
    assert sum(site.full_weight.numel() for site in sites) == 84_934_656


def _chosen(seed: int, count: int = 2000) -> set[tuple[str, int]]:
    method = APET(count=count, seed=seed).attach(make("bert"))
    for graft in method.grafts:
        assert graft.index.tolist() == sorted(set(graft.index.tolist()))
    return {(graft.site.name, i) for graft in method.grafts for i in graft.index.tolist()}


def test_3_positions() -> None:
    """Distinct and ascending, N in all; one seed, one set; two seeds share about N^2 / pool."""
    pool = sum(site.full_weight.numel() for site in dissect(make("bert")).sites(
        ("q", "k", "v", "o", "mlp.up", "mlp.down")))
    one, two = _chosen(0), _chosen(1)
    assert len(one) == len(two) == 2000 and one == _chosen(0)
    expected = 2000**2 / pool
    assert abs(len(one & two) - expected) < 5 * expected**0.5


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_4_to_6_only_the_drawn_entries_move(weight_decay: float) -> None:
    """Identity at the start; at most N entries of the merged weights differ after training; unmerged all bits are
    back."""
    model, inputs = make("bert"), batch("bert")
    start, base = snapshot(model), outputs(model, inputs)
    method = APET(count=500).attach(model)
    drawn = {graft.site.weight_name: graft.index.long() for graft in method.grafts}
    assert torch.equal(outputs(model, inputs), base)
    train(model, method, "bert", steps=4, weight_decay=weight_decay)
    randomize(method)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-6
    for name, parameter in model.named_parameters():
        moved = (parameter != start[name]).flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(drawn.get(name, torch.zeros(0)).tolist())
        assert name not in drawn or len(moved)
    method.unmerge()
    assert same(start, snapshot(model))


@pytest.mark.parametrize("count", [3, 40])
def test_9_uniform(count: int) -> None:
    """Over 2,000 seeds each tensor's share is its share of the pool within 5 %, or four standard errors of so few
    draws; by either way of drawing."""
    sizes = torch.tensor([10, 30, 20, 40])
    ends = sizes.cumsum(0)
    found = torch.zeros(4)
    for seed in range(2000):
        drawn = distinct(100, count, torch.Generator().manual_seed(seed))
        assert len(drawn.unique()) == count
        found += torch.bincount(torch.searchsorted(ends, drawn, right=True), minlength=4)
    expected = sizes / 100
    error = (expected * (1 - expected) / (2000 * count)).sqrt()
    assert bool(((found / (2000 * count) - expected).abs() < torch.maximum(0.05 * expected, 4 * error)).all())


def test_1_budgets() -> None:
    """LoRA of rank 8 on q and v, and bottlenecks of 24, of BLOOM-7b1's 30 blocks: the sizes that units are drawn by."""
    from types import SimpleNamespace

    linear: Any = SimpleNamespace(kind="linear", in_features=4096, out_features=4096)
    hidden: Any = SimpleNamespace(kind="module", width=4096)
    assert 30 * 2 * sum(TensorAPET().sizes(linear)) == 3_932_160
    assert 30 * 2 * sum(TensorAPET().sizes(hidden)) == 12_043_680


def test_7_tensor_mode() -> None:
    """Of the backbone's tensors at most N / 2, of added ones less than a unit more, and units stay whole."""
    for seed in range(1, 6):
        model = make("bert")
        method = TensorAPET(count=6000, seed=seed, rank=2, bottleneck=4).attach(model)
        moved = sum(p.numel() for p in method.start.values())
        sizes = [sum(p.numel() for p in graft.parameters()) for graft in method.grafts]
        assert moved <= 3000 and sum(sizes) < 3000 + max(sizes) and method.counts()["method"] == moved + sum(sizes)
        for graft in method.grafts:
            kinds = {"A", "B"} if graft.site.kind != "module" else {"down.weight", "down.bias", "up.weight", "up.bias"}
            assert {name for name, p in graft.named_parameters() if p.requires_grad} == kinds
    assert {tuple(TensorAPET(count=6000, seed=seed, rank=2).attach(make("bert")).start) for seed in (1, 1)} != {
        tuple(TensorAPET(count=6000, seed=2, rank=2).attach(make("bert")).start)}


def test_8_draw() -> None:
    """The example of the checks, by Python's random numbers seeded with N times the seed."""
    units = [(f"l{i}.{role}", (8, 8)) for i in range(4) for role in "qv"]
    tensors = [(f"l{i}.{kind}", size) for kind, size in (("w", 16), ("b", 4), ("ln", 3)) for i in range(4)]
    added, moved = draw(units, tensors, 40, 1)
    assert added == ["l1.q"] and sorted(moved) == ["l2.b", "l3.w"]


def test_3_rearranged() -> None:
    """As many entries in each role, at other places; drawn from all matrices of the role together."""
    found = []
    for rearranged in (False, True):
        method = APET(count=2000, rearranged=rearranged).attach(make("bert"))
        entries = {(graft.site.name, i) for graft in method.grafts for i in graft.index.tolist()}
        counts: dict[str, int] = {}
        for graft in method.grafts:
            counts[graft.site.role] = counts.get(graft.site.role, 0) + len(graft.index)
        found.append((entries, counts, {graft.site.name: len(graft.index) for graft in method.grafts}))
    (one, roles, sites), (two, roles_there, sites_there) = found
    assert roles == roles_there and len(one) == len(two) == 2000 and sites != sites_there
    assert len(one & two) < 1000
    twin = APET(count=2000, rearranged=True).attach(make("bert"))
    assert {(graft.site.name, i) for graft in twin.grafts for i in graft.index.tolist()} == two
