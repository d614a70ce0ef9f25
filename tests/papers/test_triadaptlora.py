"""Checks of TriAdaptLoRA: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core import load_adapter, peft
from core.anatomy import Anatomy
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, vit_b16
from tests.rows import WIDE, Row, Variant
from tests.toolkit import distance, outputs, randomize


def triadapt_count(anatomy: Anatomy, method: Any) -> int:
    total = 0
    for graft in method.grafts:
        rank = 0
        for width in graft.blocks:
            rank += width
            total += 2 * width * rank
        total += rank * (graft.site.in_features + graft.site.out_features)
    return total


def grown(method: Any) -> None:
    """As after two checks: every other site has grown."""
    for graft in method.grafts[::2]:
        method.grow(graft)
        method.grow(graft)


def rank_follows_formula() -> None:
    """TriAdaptLoRA: the sites with the largest growth of |C| / blocks gain ranks, until the budget is met."""
    method: Any = peft.method_class("TriAdaptLoRA")(rank=4, growth=2, warmup=2, interval=2)  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=0.0)
    method.follow(optimizer, total=12)
    sites = len(method.grafts)
    before: list[float] = [0.0] * sites
    for step in range(1, 13):
        ranks = [sum(graft.blocks) for graft in method.grafts]
        old = list(method.trainable().values())
        for tensor in old:
            tensor.grad = torch.zeros_like(tensor)
        with torch.no_grad():
            for i, graft in enumerate(method.grafts):
                graft.L[0] += 0.1 * ((i * 7 + step) % sites)
        optimizer.step()
        now = [sum(graft.blocks) for graft in method.grafts]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.trainable().values()} and all(id(p) in held for p in old)
        left = 4 * sites - sum(ranks)
        if step <= 2 or step % 2 or left <= 0:
            assert now == ranks
            continue
        cores = [torch.zeros(r, r) for r in ranks]
        for core, graft in zip(cores, method.grafts, strict=True):
            end = 0
            for rows, columns in zip(list(graft.L), list(graft.U), strict=True):
                if end + len(rows) > len(core):
                    break
                core[end:end + len(rows), :end + len(rows)] += rows.detach()
                core[:end + len(rows), end:end + len(rows)] += columns.detach()
                end += len(rows)
        counts = [1 if r == 1 else (r - 1) // 2 + 1 for r in ranks]
        norms = [float(core.norm()) / n for core, n in zip(cores, counts, strict=True)]
        scores = [a - b for a, b in zip(norms, before, strict=True)]
        before = norms
        wanted = max(1, min(sites, int(left * (step - 2) / 10)))
        best = sorted(scores, reverse=True)[wanted - 1]
        assert now == [r + 2 * (score >= best) for r, score in zip(ranks, scores, strict=True)]
    assert 4 * sites <= sum(now) < 4 * sites + 2 * sites


ROWS = {
    "TriAdaptLoRA": Row(
        {"q, v": Variant({"rank": 4, "targets": ("q", "v")}),
         "grown": Variant({"rank": 4, "growth": 2, "scale": "alpha/reference", **WIDE}, grown)},
        trained=triadapt_count,
        cards=(("bert_base", {}, 166_032),),
        bad=(({"rank": 0}, "rank 0"), ({"init_rank": 9}, "init_rank 9"), ({"growth": 0}, "growth 0"),
             ({"interval": 0}, "interval 0"), ({"scale": "alpha"}, "'alpha'"),
             ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=18, saved=0.9,
        schedule=rank_follows_formula,
        artifact={"rank": 1},
    ),
}

TriAdaptLoRA: Any = method_class("TriAdaptLoRA")


@pytest.mark.parametrize(("model", "sites", "count"), [(bert_base, 72, 166_032), (vit_b16, 48, 147_552)])
def test_1_to_3_counts_at_the_start(model: Any, sites: int, count: int) -> None:
    method = TriAdaptLoRA().attach(model())
    assert len(method.grafts) == sites and method.counts()["method"] == count


def test_new_groups_are_not_decayed() -> None:
    """At the settings of its own; grown tensors enter the groups that there are."""
    assert TriAdaptLoRA.recommended["weight_decay"] == 0.0


def test_2_count_after_growth() -> None:
    method = TriAdaptLoRA(targets=("q",), layers=(0,)).attach(bert_base())
    [graft] = method.grafts
    for _ in range(2):
        method.grow(graft)
    assert graft.blocks == [1, 4, 4] and method.counts()["method"] == 13_938


def test_4_core_from_its_pieces() -> None:
    method = TriAdaptLoRA(rank=6, growth=2, targets=("q",), layers=(0,)).attach(make("bert"))
    [graft] = method.grafts
    for width in (2, 3):
        method.grow(graft, width)
    randomize(method)
    lower, upper = torch.zeros(6, 6), torch.zeros(6, 6)
    for i, (start, end) in enumerate([(0, 1), (1, 3), (3, 6)]):
        lower[start:end, :end] = graft.L[i].detach()
        upper[:end, start:end] = graft.U[i].detach()
    assert torch.equal(graft.core(), lower + upper)
    assert not lower[0, 1:].any() and not lower[1:3, 3:].any() and not upper[1:, 0].any()


def test_5_start() -> None:
    """The identity with a gradient for C; with the published start, C and all but A zero, there is none at all."""
    model, inputs = make("bert"), batch("bert")
    before = outputs(model, inputs)
    method = TriAdaptLoRA(targets=("q", "v")).attach(model)
    assert torch.equal(outputs(model, inputs), before)
    model(inputs).square().sum().backward()
    assert all(graft.L[0].grad.any() and graft.U[0].grad.any() for graft in method.grafts)
    model.zero_grad()
    with torch.no_grad():
        for graft in method.grafts:
            graft.B[0].zero_()
    model(inputs).square().sum().backward()
    assert not any(tensor.grad.any() for tensor in method.trainable().values())  # type: ignore[union-attr]


@pytest.mark.parametrize(("scale", "ratio"), [("alpha/rank", 3 / 5), ("alpha/reference", 1.0)])
def test_6_growth(scale: str, ratio: float) -> None:
    """Old tensors and their moments stay, new ones enter one group; what was there is scaled by R / (R + growth)."""
    model = make("bert", dtype=torch.float64)
    method = TriAdaptLoRA(rank=6, init_rank=3, growth=2, scale=scale, targets=("q",), layers=(0,)).attach(model)
    randomize(method)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for tensor in method.trainable().values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    [graft] = method.grafts
    old = list(method.trainable().values())
    places = [(t.data_ptr(), optimizer.state[t]["exp_avg"].clone()) for t in old]
    x, y = torch.randn(2, 32, dtype=torch.float64), torch.zeros(2, 32, dtype=torch.float64)
    before = graft.after(x, y)
    fresh = method.grow(graft)
    method.enter_optimizer(optimizer, fresh)
    assert distance(graft.after(x, y), ratio * before) < 1e-5
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(t) for t in [*old, *fresh]) == sorted(map(id, method.trainable().values()))
    assert held == [id(p) for group in method.param_groups() for p in group["params"]]  # as a new optimizer has them
    for tensor, (place, moment) in zip(old, places, strict=True):
        assert tensor.data_ptr() == place and torch.equal(optimizer.state[tensor]["exp_avg"], moment)
    scheduler.step()
    optimizer.step()


def test_8_saved_structure(tmp_path: Path) -> None:
    model, inputs = make("bert"), batch("bert")
    method = TriAdaptLoRA(rank=4, growth=2, targets=("q", "mlp.up")).attach(model)
    for graft in method.grafts[::2]:
        method.grow(graft)
    method.grow(method.grafts[0], 3)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path)
    fresh = make("bert")
    loaded: Any = load_adapter(tmp_path, fresh)
    assert [graft.blocks for graft in loaded.grafts] == [graft.blocks for graft in method.grafts]
    assert torch.equal(outputs(fresh, inputs), expected)
    loaded.merge()
    assert distance(outputs(fresh, inputs), expected) < 1e-5
