"""Checks of LIFT: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from core import load_adapter, peft
from core.anatomy import Anatomy
from core.peft import method_class
from core.peft.selection.lift import principal
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import Row, Variant, planned_shapes
from tests.toolkit import distance, outputs, randomize


def lift_count(anatomy: Anatomy, method: Any) -> int:
    return sum(min((i + o) * method.rank, i * o) for i, o in planned_shapes(anatomy, method))


def selection_follows_formula() -> None:
    """LIFT: the positions are the largest of the rank-r part of the present weight, at the start and after each
    selection; entries that stay keep their moments, those that leave their values."""
    method: Any = peft.method_class("LIFT")(rank=2, interval=3, targets=("q", "mlp.up"))  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.05)
    method.follow(optimizer, total=9)
    generator = torch.Generator().manual_seed(0)

    def expected(graft: Any) -> set[int]:
        u, s, v = torch.linalg.svd(graft(graft.site.matrix(graft.site.full_weight.detach()), verb="weight").detach())
        near = (u[:, :2] * s[:2]) @ v[:2]
        return set(near.abs().flatten().argsort(descending=True)[:len(graft.index)].tolist())

    moved = 0
    for step in range(1, 10):
        before = {graft: (graft.index.tolist(), graft(torch.zeros(graft.site.out_features, graft.site.in_features),
                                                      verb="weight").detach()) for graft in method.grafts}
        assert step % 3 != 1 or all(set(graft.index.tolist()) == expected(graft) for graft in method.grafts)
        for graft in method.grafts:
            graft.values.grad = torch.randn(graft.values.shape, generator=generator)
        optimizer.step()
        for graft in method.grafts:
            old, change = before[graft]
            now = graft(torch.zeros_like(change), verb="weight").detach()
            touched = (now != change).flatten().nonzero().flatten().tolist()
            assert set(touched) <= set(old) and len(touched) == len(old)  # also those that have left since
            state = optimizer.state[graft.values]
            fresh = [i for i, position in enumerate(graft.index.tolist()) if position not in old]
            stays = [i for i, position in enumerate(graft.index.tolist()) if position in old]
            moved += len(fresh)
            assert (step % 3 == 0 or not fresh) and not state["exp_avg"][fresh].any()
            assert bool((state["exp_avg"][stays] != 0).all()) and state["step"] == step
    assert moved > 20


ROWS = {
    "LIFT": Row(
        {"all": Variant({"rank": 2}, learns={"rank": 16, "lr": 1e-2}),
         "few": Variant({"rank": 3, "filter_rank": 1, "interval": 2, "targets": ("q", "mlp.down")},
                        learns={"rank": 32, "lr": 1e-2})},
        trained=lift_count,
        cards=(("bert_base", {"targets": ("q", "k", "v", "o", "mlp.up", "mlp.down")}, 1_327_104),),
        bad=(({"rank": 0}, "rank 0"), ({"filter_rank": 0}, "filter_rank 0"), ({"interval": 0}, "interval 0"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        operators=2, saved=0.96, stored=4.0, state=12,
        schedule=selection_follows_formula,
        artifact={"rank": 1, "targets": ("o",)},
    ),
}

LIFT: Any = method_class("LIFT")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


@pytest.mark.parametrize(("build", "rank", "count"), [(_bert, 8, 1_327_104), (_vit, 8, 1_179_648),
                                                      (_llama, 128, 319_815_680)], ids=["bert", "vit", "llama"])
def test_1_counts(build: Any, rank: int, count: int) -> None:
    """BERT-base and ViT-B/16 at rank 8; LLaMA-2-7B at rank 128: 4.746 % of its parameters."""
    with torch.device("meta"):
        model = build()
    assert LIFT(rank=rank).attach(model).counts()["method"] == count


def _steps(method: Any, optimizer: torch.optim.Optimizer, number: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for tensor in method.trainable().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("interval", [None, 2])
def test_2_untouched_entries_stay(interval: int | None) -> None:
    """With a fixed mask exactly k entries of the merged weight change, else at most k (1 + refreshes); the others have
    the same bits."""
    model = make("timm_vit")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = LIFT(rank=2, interval=interval).attach(model)
    sizes = {graft.site.weight_name: len(graft.index) for graft in method.grafts}
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.05, weight_decay=0.0)
    method.follow(optimizer, total=6)
    _steps(method, optimizer, 6)
    method.merge()
    for name, parameter in model.named_parameters():
        changed = int((parameter != start[name]).sum())
        if name not in sizes:
            assert changed == 0
        elif interval is None:
            assert changed == sizes[name]
        else:
            assert sizes[name] < changed <= sizes[name] * 4


def test_3_limits() -> None:
    """At full rank the mask is that of the largest weights; with every entry selected the steps are dense Adam's."""
    model = make("timm_vit")
    for graft in LIFT(rank=2, filter_rank=10_000).attach(model).grafts:
        flat = graft.site.full_weight.detach().abs().flatten()
        assert set(graft.index.tolist()) == set(flat.argsort(descending=True)[:len(graft.index)].tolist())
    model, twin = make("timm_vit"), make("timm_vit")
    method = LIFT(rank=1000, targets=("mlp.up",)).attach(model)
    dense = [p for name, p in twin.named_parameters() if name.endswith("mlp.fc1.weight")]
    one = torch.optim.AdamW(method.param_groups(), lr=1e-2, weight_decay=0.0)
    two = torch.optim.AdamW(dense, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    inputs = batch("timm_vit")
    for _ in range(3):
        for net, optimizer in ((model, one), (twin, two)):
            optimizer.zero_grad()
            net(inputs).pow(2).sum().backward()
            optimizer.step()
    assert distance(outputs(model, inputs), outputs(twin, inputs)) < 1e-6


def test_4_state_is_small_and_comes_back(tmp_path: Path) -> None:
    """Two moments of k numbers each; a run resumed behind a selection ends as the unbroken one, to the bit."""
    def lift() -> Any:
        return LIFT(rank=2, interval=3)

    whole = run(tmp_path, lift(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = run(tmp_path, lift(), checkpoint=tmp_path / "step=5.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    state: Any = whole.trainer.optimizers[0].state
    for graft in whole.methods[0].grafts:
        assert state[graft.values]["exp_avg"].shape == state[graft.values]["exp_avg_sq"].shape == graft.index.shape


def test_5_moments_move_along() -> None:
    """Entries that stay through a selection keep m and v, new ones have zeros."""
    method = LIFT(rank=2, filter_rank=1, interval=None, targets=("q",)).attach(make("timm_vit"))
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.2)
    _steps(method, optimizer, 4)
    kept = fresh = 0
    for graft in method.grafts:
        state = optimizer.state[graft.values]
        before = {name: dict(zip(graft.index.tolist(), state[name].tolist(), strict=True))
                  for name in ("exp_avg", "exp_avg_sq")}
        graft.refresh(1, [state["exp_avg"], state["exp_avg_sq"]])
        for name, old in before.items():
            for position, value in zip(graft.index.tolist(), state[name].tolist(), strict=True):
                assert value == old.get(position, 0.0)
                kept, fresh = kept + (position in old), fresh + (position not in old)
    assert kept and fresh


def test_6_principal_is_not_largest() -> None:
    """On a random matrix the mask of a low rank is not that of the largest entries, and not that of the smallest."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    chosen = set(principal(weight, 2, 500).tolist())
    order = weight.abs().flatten().argsort(descending=True).tolist()
    assert len(chosen) == 500 and 50 < len(chosen & set(order[:500])) < 450
    assert len(chosen & set(order[:500])) > 1.5 * len(chosen & set(order[-500:]))


def test_after_selections_it_saves_merges_and_goes() -> None:
    """What left the selection stays in the function: in the file, in the merged weights, and gone with the method."""
    import tempfile

    model, inputs = make("bert", dtype=torch.float64), batch("bert", dtype=torch.float64)
    plain = outputs(model, inputs)
    method = LIFT(rank=2, filter_rank=1, targets=("q", "mlp.up")).attach(model)
    for seed in range(3):
        randomize(method, seed=seed, size=0.3)
        before: Tensor = outputs(model, inputs)
        for graft in method.grafts:
            graft.refresh(1, [])
        assert distance(outputs(model, inputs), before) < 1e-12
    assert all(len(graft.left_index) for graft in method.grafts)
    with tempfile.TemporaryDirectory() as folder:
        method.save(folder)
        other = make("bert", dtype=torch.float64)
        load_adapter(folder, other)
        assert torch.equal(outputs(other, inputs), before)
    method.merge()
    assert distance(outputs(model, inputs), before) < 1e-12
    method.unmerge()
    method.remove()
    assert torch.equal(outputs(model, inputs), plain)
