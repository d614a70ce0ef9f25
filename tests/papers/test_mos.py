"""Checks of MoS: the checks by their numbers there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import load_adapter
from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.rows import WIDE, Row, Variant
from tests.toolkit import distance, outputs, randomize, train


def mos_count(anatomy: Anatomy, method: Any) -> int:
    sites = method.sites(anatomy)
    return sum(method.budget * (s.in_features + s.out_features) for s in sites)


ROWS = {
    "MoS": Row(
        {"shared": Variant({"rank": 2, "targets": ("q", "mlp.down")}),
         "no private": Variant({"rank": 2, "private": 0, "shards": 4, "alpha": 4, **WIDE})},
        trained=mos_count,
        cards=(("vit_b16", {"targets": ("qkv", "o", "mlp.up", "mlp.down")}, 294_912),),
        bad=(({"rank": 0}, "rank 0"), ({"budget": 0}, "budget 0"), ({"private": 3}, "private 3"),
             ({"rank": 3, "private": 2}, "must be the same"), ({"shards": 7}, "does not divide"),
             ({"rank": 99}, "at most"), ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=12, saved=0.9, stored=1.2,
        artifact={"rank": 2},
    ),
}

MoS: Any = method_class("MoS")
LoRA: Any = method_class("LoRA")
SEVEN = ("q", "k", "v", "o", "mlp.gate", "mlp.up", "mlp.down")


def llama(**shape: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        return LlamaModel(LlamaConfig(num_hidden_layers=32, **shape))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rank", "budget", "private", "shards", "count"), [
    (4, 2, 1, 2, 4_997_120), (8, 2, 0, 4, 4_997_120), (32, 8, 3, 1, 19_988_480), (2, 2, 2, 1, 4_997_120)])
def test_1_count_of_llama_2_7b(rank: int, budget: int, private: int, shards: int, count: int) -> None:
    """Whatever the rank, the private share and the shards."""
    model = llama(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    assert MoS(rank=rank, budget=budget, private=private, shards=shards).attach(model).counts()["method"] == count


@pytest.mark.parametrize(("budget", "count"), [(2, 5_242_880), (1, 2_621_440)])
def test_2_count_of_llama_3_8b(budget: int, count: int) -> None:
    model = llama(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    method = MoS(rank=4, budget=budget, private=0, targets=SEVEN).attach(model)
    assert method.counts()["method"] == count


def test_3_count_and_pools_of_vit() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = MoS().attach(model)
    assert method.counts()["method"] == 294_912 and len(method.module.pools) == 4
    pool = method.module.pools["qkv-0"]
    assert tuple(pool.A.shape) == (48, 384) and tuple(pool.B.shape) == (48, 1152)


def test_5_nothing_shared_is_lora() -> None:
    inputs = batch("bert")
    one, two = make("bert"), make("bert")
    mos = MoS(rank=3, budget=3, private=3, shards=1, targets=("q", "mlp.up")).attach(one)
    randomize(mos)
    lora = LoRA(rank=3, targets=("q", "mlp.up")).attach(two)
    with torch.no_grad():
        for mine, theirs in zip(mos.grafts, lora.grafts, strict=True):
            theirs.A.copy_(mine.A)
            theirs.B.copy_(mine.B)
    assert distance(outputs(one, inputs), outputs(two, inputs)) < 1e-6
    first, second = [graft for graft in mos.grafts if graft.site.role == "q"]
    assert first.index_A.tolist() == [0, 1, 2] and second.index_A.tolist() == [3, 4, 5]


def test_6_one_pool_for_all_layers() -> None:
    model = make("bert")
    method = MoS(rank=2, targets=("q",)).attach(model)
    one, two = method.grafts
    assert one.pool[0] is two.pool[0]
    assert [name for name, _ in model.named_parameters() if "peft" in name] == [
        "peft.MoS.pools.q-0.A", "peft.MoS.pools.q-0.B"]
    train(model, method, "bert")
    optimizer = torch.optim.AdamW(method.param_groups())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_7_indices(tmp_path: Path) -> None:
    def attach(seed: int = 0) -> Any:
        import timm

        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=6,
                                  num_heads=2, num_classes=0)
        return MoS(rank=4, budget=2, private=1, shards=2, targets=("mlp.up",), seed=seed).attach(model)

    method = attach()
    private, count = 2, 6
    shared = (2 - 1) * 6 * 2
    owners: list[set[int]] = []
    for graft in method.grafts:
        for index in (graft.index_A, graft.index_B):
            assert len(index) == 8 == len(set(index.tolist())) and int(index.max()) < 2 * count * 2
            assert sum(int(i) >= shared for i in index) == private
        owners.append({int(i) for i in graft.index_A if i >= shared})
        assert owners[-1] == {int(i) for i in graft.index_B if i >= shared}
    assert len(set().union(*owners)) == private * count
    assert any(a.index_A.tolist() != a.index_B.tolist() for a in method.grafts)
    assert all(torch.equal(a.index_A, b.index_A) for a, b in zip(method.grafts, attach().grafts, strict=True))
    assert not all(torch.equal(a.index_A, b.index_A) for a, b in zip(method.grafts, attach(1).grafts, strict=True))


def test_8_private_rows_change_one_layer() -> None:
    model = make("bert")
    method = MoS(rank=2, budget=2, private=1, shards=2, targets=("q",)).attach(model)
    randomize(method)
    before = [(graft.B @ graft.A).clone() for graft in method.grafts]
    with torch.no_grad():
        method.module.pools["q-0"].A[method.grafts[1].index_A[-2:].long()] += 1
    after = [graft.B @ graft.A for graft in method.grafts]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_10_constraints() -> None:
    for options, words in (({"rank": 9, "budget": 2, "private": 1}, "at most"), ({"shards": 5}, "does not divide"),
                           ({"rank": 4, "budget": 2, "private": 2}, "must be the same")):
        with pytest.raises(ScionError, match=words):
            MoS(**{"rank": 2, "targets": ("q",), **options}).attach(make("bert"))


def test_11_pools_stay_shared(tmp_path: Path) -> None:
    model = make("bert")
    method = MoS(rank=2, targets=("q",)).attach(model)
    randomize(method)
    expected = outputs(model, batch("bert"))
    twin = copy.deepcopy(model).double()
    from core.method import methods_on

    [other] = methods_on(twin)
    assert other.grafts[0].pool[0] is other.grafts[1].pool[0] is other.module.pools["q-0"]  # type: ignore[attr-defined, index]
    method.save(tmp_path)
    fresh = make("bert")
    loaded = load_adapter(tmp_path, fresh)
    assert loaded.grafts[0].pool[0] is loaded.grafts[1].pool[0]
    assert torch.equal(outputs(fresh, batch("bert")), expected)
