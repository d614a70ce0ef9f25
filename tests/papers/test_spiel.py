"""Checks of SpIEL: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from core import peft
from core.anatomy import Anatomy
from core.graft.sparse import SparseGraft
from core.peft import method_class
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import Row, Variant, planned_shapes, whole_count
from tests.toolkit import distance, outputs, randomize, saved_bytes


def spiel_count(anatomy: Anatomy, method: Any) -> int:
    shapes = planned_shapes(anatomy, method)
    everything, targets = whole_count(anatomy, method), sum(i * o for i, o in shapes)
    budget = method.count or int((method.density or 0) * everything) or method.rank * sum(i + o for i, o in shapes)
    return sum(int(budget * i * o / targets) for i, o in shapes)


def positions_follow_formula() -> None:
    """SpIEL: windows, shares and counts of the schedule; positions stay distinct and k stays what it was."""
    for kind in ("AG", "MA"):
        method: Any = peft.method_class("SpIEL")(rank=2, kind=kind, targets=("q", "mlp.up"))  # type: ignore[call-arg]
        model = make("timm_vit")
        method.attach(model)
        optimizer = method.make_optimizer(method.param_groups(), lr=0.01)
        method.follow(optimizer, total=60)
        generator = torch.Generator().manual_seed(0)
        sizes = [len(graft.index) for graft in method.grafts]
        shares = {5: 1.0, 25: 0.2 * (1 - 25 / 60), 45: 0.2 * (1 - 45 / 60)}
        assert all(method.replaced(step) == share for step, share in shares.items())
        for step in range(1, 61):
            assert all((graft.watch is not None) == (kind == "AG" and (step <= 5 or (step - 1) % 20 >= 19 or (
                step - 1) % 20 < 5 and step > 20)) for graft in method.grafts), step
            before = [graft.index.clone() for graft in method.grafts]
            for graft in method.grafts:
                gradient = torch.randn(graft.site.out_features * graft.site.in_features, generator=generator)
                graft.values.grad = gradient[graft.index.long()]
                if graft.watch is not None:
                    graft.watch(graft, gradient)
            optimizer.step()
            for graft, old, size in zip(method.grafts, before, sizes, strict=True):
                positions = graft.index.tolist()
                assert len(set(positions)) == size and min(positions) >= 0
                assert max(positions) < graft.site.out_features * graft.site.in_features
                changed = (graft.index != old).nonzero().flatten()
                if step not in shares:
                    assert not len(changed)
                    continue
                most = int(size * shares[step])
                assert 0 < len(changed) <= most and not graft.values[changed].any()
                if kind == "MA":
                    assert len(changed) == most and not set(graft.index[changed].tolist()) & set(old.tolist())


ROWS = {
    "SpIEL": Row(
        {"AG": Variant({"rank": 2}, learns={"rank": None, "density": 0.4, "lr": 1e-2}),
         "MA": Variant({"density": 0.05, "kind": "MA", "targets": ("q", "mlp.down")},
                       learns={"density": 0.2, "lr": 3e-2}, own_optimizer=True)},
        trained=spiel_count,
        cards=(("vit_b16", {"rank": 8}, 1_179_648),),
        bad=(({"density": 0.0}, "density 0"), ({"rank": 0}, "rank 0"), ({"count": 10**9}, "1000000000 entries"),
             ({"count": 3}, "none falls to"), ({"window": 20}, "window 20"), ({"share": 0.0}, "share 0"),
             ({"kind": "SM3"}, "'SM3'"), ({"momentum": 0.9}, "kind 'MA'"), ({"rank": 2, "density": 0.1}, "give one of"),
             ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, operators=2, saved=0.96, stored=2.0, state=24, decays=True,
        schedule=positions_follow_formula,
        artifact={"rank": None, "count": 60, "targets": ("o",)},
    ),
}

SpIEL: Any = method_class("SpIEL")


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


@pytest.mark.parametrize(("config", "count"), [({"rank": 64}, 159_907_744), ({}, 67_384_032)],
                         ids=["rank 64", "density 0.01"])
def test_1_counts(config: dict[str, Any], count: int) -> None:
    """LLaMA-2-7B: k = 414,269 for a 4096 x 4096 matrix and 1,113,347 for 4096 x 11008 at the budget of rank 64; the
    density is a share of all parameters."""
    method = SpIEL(**config).attach(_llama())
    assert method.counts()["method"] == count
    if config:
        assert {len(graft.index) for graft in method.grafts} == {414_269, 1_113_347}


def _one(family: str = "timm_vit", **config: Any) -> tuple[Any, Any]:
    model = make(family, dtype=torch.float64)
    return model, SpIEL(**{"rank": 4, "targets": ("q", "mlp.up"), **config}).attach(model)


def test_3_gradient_is_the_dense_one_gathered() -> None:
    """And so is what the watcher of a window sees; the gradient of what came before is the merged layer's."""
    model, method = _one("bert")
    randomize(method, size=0.3)
    inputs, twin = batch("bert"), make("bert", dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for graft in method.grafts:
        weight = graft.site.full_weight.detach()
        twin.get_parameter(graft.site.weight_name).data += graft.delta().detach().view_as(weight)
        graft.watch = lambda graft, gradient: seen.update({graft.site.name: gradient})
    model(inputs).pow(2).sum().backward()
    twin(inputs).pow(2).sum().backward()
    for graft in method.grafts:
        dense = twin.get_parameter(graft.site.weight_name).grad
        assert dense is not None
        torch.testing.assert_close(graft.values.grad, dense.flatten()[graft.index.long()], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(seen[graft.site.name], dense.flatten(), rtol=1e-9, atol=1e-12)


def test_5_schedule() -> None:
    """interval 20, window 5, 60 steps: open at 0, 19, 39, 59; selections after 5, 25, 45 with 1, 0.1167, 0.05."""
    _, method = _one()
    optimizer = method.make_optimizer(method.param_groups(), lr=0.0)
    method.follow(optimizer, total=60)
    opened, selected = [0], []
    assert all(graft.watch is not None for graft in method.grafts)
    for step in range(1, 61):
        before, was_open = method.grafts[0].index.clone(), method.grafts[0].watch is not None
        for graft in method.grafts:
            gradient = torch.randn(graft.site.out_features * graft.site.in_features, dtype=torch.float64,
                                   generator=torch.Generator().manual_seed(step))
            graft.values.grad = gradient[graft.index.long()]
            if graft.watch is not None:
                graft.watch(graft, gradient)
        optimizer.step()
        now_open = method.grafts[0].watch is not None
        opened += [step] if now_open and not was_open else []
        selected += [(step, method.replaced(step))] if was_open and not now_open else []
        assert now_open == was_open or bool((before != method.grafts[0].index).any()) == was_open
    assert opened == [0, 19, 39, 59]
    assert selected == [(5, 1.0), (25, pytest.approx(0.116667, abs=1e-6)), (45, pytest.approx(0.05))]


def test_6_adam() -> None:
    """Without a selection the numbers follow Adam, but for where epsilon stands."""
    _, method = _one(density=None, rank=None, count=2 * (32 * 32 + 128 * 32))
    values = list(method.trainable().values())
    twins = [torch.nn.Parameter(v.detach().clone()) for v in values]
    one = method.make_optimizer(method.param_groups(), lr=1e-2, eps=0.0)
    two = torch.optim.AdamW(twins, lr=1e-2, eps=1e-20, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for value, twin in zip(values, twins, strict=True):
            value.grad = torch.randn(value.shape, dtype=value.dtype, generator=generator)
            twin.grad = value.grad.clone()
        one.step()
        two.step()
    for value, twin in zip(values, twins, strict=True):
        assert distance(value, twin) < 1e-6


def test_7_seeded_moments() -> None:
    """A constant gradient over n steps: m / (1 - beta1^n) = g and v / (1 - beta2^n) = g^2 right after the growth."""
    _, method = _one(share=1.0)
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-3)
    method.follow(optimizer, total=100)
    constants = {graft: torch.randn(graft.site.out_features * graft.site.in_features, dtype=torch.float64,
                                    generator=torch.Generator().manual_seed(1)) for graft in method.grafts}
    for step in range(1, 26):
        old = {graft: graft.index.clone() for graft in method.grafts}
        for graft, gradient in constants.items():
            graft.values.grad = gradient[graft.index.long()]
            if graft.watch is not None:
                graft.watch(graft, gradient)
        if step == 24:  # so that the last selection has something to replace
            for graft in method.grafts:
                graft.index.copy_(torch.arange(len(graft.index)))
        optimizer.step()
        if step in (5, 25):
            count = 5 if step == 5 else 6
            for graft, gradient in constants.items():
                state, new = optimizer.state[graft.values], ~torch.isin(graft.index, old[graft])
                assert bool(new.any()) and bool((state["age"][new] == count).all())
                g = gradient[graft.index.long()][new]
                torch.testing.assert_close(state["exp_avg"][new] / (1 - 0.9**count), g, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(state["exp_avg_sq"][new] / (1 - 0.999**count), g**2, rtol=1e-9, atol=1e-12)
                assert not graft.values[new].any()


def test_8_dropped_and_grown_stays() -> None:
    """Value, age and moments are what they were, at whatever selection."""
    _, method = _one()
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-2)
    method.follow(optimizer, total=100)
    graft = method.grafts[0]
    gradient = torch.zeros(graft.site.out_features * graft.site.in_features, dtype=torch.float64)
    gradient[graft.index[:30].long()] = torch.linspace(1, 2, 30, dtype=torch.float64)  # active ones are the best
    for _ in range(5):
        before = {**{k: v.clone() for k, v in optimizer.state.get(graft.values, {}).items()},
                  "values": graft.values.detach().clone(), "index": graft.index.clone()}
        for other in method.grafts:
            other.values.grad = torch.zeros_like(other.values)
            assert other.watch is not None
        graft.watch(graft, gradient)
        optimizer.step()
    assert torch.equal(graft.index[:30], before["index"][:30]) and torch.equal(graft.values[:30], before["values"][:30])
    state = optimizer.state[graft.values]
    assert bool((state["age"][:30] == before["age"][:30] + 1).all())  # the step itself, no seed
    assert torch.equal(state["exp_avg"][:30], before["exp_avg"][:30])


def test_9_accumulators_only_grow() -> None:
    """And what grows was neither active nor just dropped."""
    _, method = _one(kind="MA")
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-2)
    method.follow(optimizer, total=50)
    generator = torch.Generator().manual_seed(0)
    last: dict[Any, tuple[Tensor, Tensor]] = {}
    for step in range(1, 31):
        old = {graft: set(graft.index.tolist()) for graft in method.grafts}
        for graft in method.grafts:
            graft.values.grad = torch.randn(graft.values.shape, dtype=torch.float64, generator=generator)
        optimizer.step()
        for graft in method.grafts:
            state = optimizer.state[graft.values]
            assert {*state} == {"rows", "columns"}
            if graft in last:
                assert bool((state["rows"] >= last[graft][0]).all() and (state["columns"] >= last[graft][1]).all())
            last[graft] = state["rows"].clone(), state["columns"].clone()
            grown = set(graft.index.tolist()) - old[graft]
            assert len(set(graft.index.tolist())) == len(graft.index)
            assert len(grown) == (int(len(graft.index) * method.replaced(step)) if step in (5, 25) else 0)


def test_9_momentum() -> None:
    """A running mean of SM3's steps; what grows begins with none."""
    _, method = _one(kind="MA", momentum=0.9)
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-2)
    method.follow(optimizer, total=20)
    graft = method.grafts[0]
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros_like(graft.values.detach())
    for step in range(1, 7):
        for other in method.grafts:
            other.values.grad = torch.randn(other.values.shape, dtype=torch.float64, generator=generator)
        before, index = graft.values.detach().clone(), graft.index.clone()
        optimizer.step()
        stayed = graft.index == index
        state = optimizer.state[graft.values]
        if step <= 4:
            row, column = index.long() // 32, index.long() % 32
            found = torch.minimum(state["rows"][row], state["columns"][column])
            assert bool((found >= graft.values.grad ** 2).all()) and bool(stayed.all())
            mean = state["mean"].clone()
            torch.testing.assert_close(graft.values.detach(), before - 1e-2 * mean)
        assert not state["mean"][~stayed].any()
    assert float(mean.abs().max()) < 0.5  # four steps of size one, a tenth of each


@pytest.mark.parametrize("width", [32, 64])
def test_10_memory_follows_the_entries(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes kept for backward are those of a frozen linear map's inputs, however many entries are trained: the changed
    weight and the dense gradient are not kept, at either width. The optimizer holds three numbers an entry."""
    inputs = batch("bert")
    kept = {}
    for rank in (1, 8):
        model = make("bert", width=width)
        method = SpIEL(rank=rank, targets=("mlp.up", "mlp.down")).attach(model)
        kept[rank] = saved_bytes(model, inputs)
        optimizer = method.make_optimizer(method.param_groups(), lr=1e-3)
        method.follow(optimizer, total=60)
        for _ in range(6):
            model(inputs).sum().backward()
            optimizer.step()
        held = sum(value.numel() for state in optimizer.state.values() for value in state.values())
        assert held == 3 * method.counts()["method"] and not method.sums
    assert kept[1] == kept[8]
    monkeypatch.setattr(SparseGraft, "remade", False)
    # the first one's input has no gradient, so that its weight is not needed
    weights = 4 * sum(graft.site.in_features * graft.site.out_features for graft in method.grafts[1:])
    assert saved_bytes(model, inputs) == kept[1] + weights


def test_10_no_gradient_outlives_its_window() -> None:
    model, method = _one()
    inputs = batch("timm_vit", dtype=torch.float64)
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-3)
    method.follow(optimizer, total=60)
    for step in range(1, 8):
        model(inputs).pow(2).sum().backward()
        sizes = {v.numel() for sums in method.sums.values() for v in sums.values()}
        assert sizes <= {1, *(len(graft.index) for graft in method.grafts)} and bool(sizes) == (step <= 5)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["AG", "MA"])
def test_11_and_12_resumed_run_equals_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    """From within a window, with the head's optimizer beside the method's own: positions, values, states and sums."""
    def spiel() -> Any:
        return SpIEL(rank=2, kind=kind, interval=7, window=3)

    whole = run(tmp_path, spiel(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1))
    assert any(bool(graft.values.any()) for graft in whole.methods[0].grafts)  # type: ignore[operator, union-attr]
    for step in (2, 6, 8):
        again = run(tmp_path, spiel(), checkpoint=tmp_path / f"step={step}.ckpt")
        for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, two), (step, name)


def test_an_ordinary_optimizer_is_mended_too() -> None:
    """AdamW of a user's own: positions move, and moments with them."""
    model, method = _one()
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-2, weight_decay=0.0)
    method.follow(optimizer, total=40)
    inputs = batch("timm_vit", dtype=torch.float64)
    start = [graft.index.clone() for graft in method.grafts]
    for _ in range(5):
        optimizer.zero_grad()
        model(inputs).pow(2).sum().backward()
        optimizer.step()
    for graft, index in zip(method.grafts, start, strict=True):
        new = ~torch.isin(graft.index, index)
        assert bool(new.any()) and not graft.values[new].any()
        assert bool(optimizer.state[graft.values]["exp_avg"][new].any())
    assert torch.isfinite(outputs(model, inputs)).all()
