"""Checks of MAM: its checks by their numbers there. BART is no family here: the counts of BART-large are those of a T5
of its width and depth, which has the same stacks and the same three kinds of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, dissect
from core.peft import method_class
from tests.models import batch, make, t5_config
from tests.papers.decoding import a_cache_changes_nothing
from tests.papers.explicit import gate_attention
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant, prefix_count
from tests.toolkit import EVERYTHING, distance, outputs, randomize


def mam_count(anatomy: Anatomy, method: Any) -> int:
    return prefix_count(anatomy, method) + parallel_at_count(anatomy, method.adapter)


def parallel_at_count(anatomy: Anatomy, adapter: Any) -> int:
    return sum(2 * adapter.width(s.width) * s.width + adapter.width(s.width) + s.width + (adapter.scale == "learned")
               for s in anatomy.sites("mlp", adapter.layers))


ROWS = {
    "MAM": Row(
        {"mlp": Variant({"tokens": 4, "reparametrize": 8, "bottleneck": 4}, learns={"lr": 1e-2}),
         "plain": Variant({"tokens": 3, "reparametrize": False, "reduction": 8, "scale": "learned",
                           "input": "normed"}, learns={"lr": 1e-2}),
         "folded": Variant({"tokens": 4, "reparametrize": 8, "bottleneck": 4},
                           lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"lr": 1e-2})},
        trained=mam_count,
        cards=(("bert_base", {}, 22_493_984),),
        bad=(({"tokens": 0}, "tokens 0"), ({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0}, "scale 0")),
        random=True, commutes=None, operators=30, saved=0.9,
        artifact={"tokens": 1, "reparametrize": False, "bottleneck": 1},
        refused={**NO_ATTENTION, **NO_CALL},
    ),
}

MAM: Any = method_class("MAM")


def test_1_to_2_counts() -> None:
    """Three banks of 20,536,096 each while it trains. Folded, 27,414,528: prefixes of 2,211,840 in three kinds of
    attention, 24 adapters of 1,050,112; without biases 27,377,664."""
    from transformers import T5Model

    with torch.device("meta"):
        model = T5Model(t5_config(1024, d_kv=64, num_heads=16, num_layers=12, num_decoder_layers=12, d_ff=4096))
        method = MAM(tokens=30, bottleneck=512).attach(model)
    banks = [child for name, child in method.module.named_children() if name.startswith("reparametrization")]
    assert [sum(p.numel() for p in bank.parameters()) for bank in banks] == [20_536_096] * 3
    assert method.counts()["method"] == 61_608_288 + 24 * 1_050_112 == 86_810_976
    method.fold()
    assert method.counts()["method"] == 2_211_840 + 24 * 1_050_112 == 27_414_528
    assert sum(p.numel() for name, p in method.trainable().items() if "bias" not in name) == 27_377_664


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_2_fold_leaves_the_function(family: str) -> None:
    model, inputs = make(family), batch(family)
    method = MAM(tokens=4, reparametrize=8, bottleneck=4).attach(model)
    randomize(method, size=0.3)
    expected = outputs(model, inputs)
    method.fold()
    assert distance(outputs(model, inputs), expected) < 1e-6
    assert not any("reparametrization" in name for name in method.trainable())


def test_3_roberta() -> None:
    from transformers import RobertaConfig, RobertaModel

    with torch.device("meta"):
        model = RobertaModel(RobertaConfig(vocab_size=50265, type_vocab_size=1, max_position_embeddings=514))
    assert MAM(tokens=16, bottleneck=16, scale=2.0, reparametrize=False).attach(model).counts()["method"] == 599_232


def _bottleneck(graft: Any, x: Tensor) -> Tensor:
    return 4.0 * (torch.relu(x @ graft.down.weight.t() + graft.down.bias) @ graft.up.weight.t() + graft.up.bias)


def _reading(read: list[Tensor]) -> Any:
    return lambda module, args: read.append(args[0])


def _adding(read: list[Tensor], graft: Any) -> Any:
    return lambda module, args, out: out + _bottleneck(graft, read.pop())


def _adapters_by_hooks(model: nn.Module, grafts: list[Any]) -> None:
    """The stream before a pre-norm block's norm, or what a post-norm MLP reads, through the bottleneck, on its
    output."""
    for block, graft in zip(dissect(model).blocks, grafts, strict=True):
        place = block.sites["norm2"] if block.pre_norm else block.sites["mlp.up"]
        read: list[Tensor] = []
        place.module.register_forward_pre_hook(_reading(read))
        block.sites["mlp"].module.register_forward_hook(_adding(read, graft))


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "llama", "timm_vit"])
def test_4_gate_identity(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(1 - l) Attn(q, K, V) + l Attn(q, P_k, P_v) in every attention, across too, and 4 A(x) on every MLP."""
    model, plain, inputs = make(family), make(family), batch(family)
    method = MAM(tokens=3, reparametrize=False, bottleneck=4).attach(model)
    randomize(method, size=0.5)
    found = outputs(model, inputs)
    with method.disabled():
        assert distance(found, outputs(model, inputs)) > 1e-2
    prefixes = [graft.prefix.detach().unflatten(1, (2, graft.site.heads.key, graft.site.heads.width))
                for graft in method.grafts if hasattr(graft, "prefix")]
    _adapters_by_hooks(plain, [graft for graft in method.grafts if not hasattr(graft, "prefix")])
    shares: list[Tensor] = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", gate_attention(prefixes, shares))
    assert distance(found, outputs(plain, inputs)) < 1e-5
    assert len(shares) == len(prefixes) == (6 if family == "t5" else 2)


def test_5_start() -> None:
    """The adapter starts as the identity, the prefix does not, and the flags say so."""
    flags = {name: method_class(name)().identity_at_start for name in ("ParallelAdapter", "PrefixTuning", "MAM")}
    assert flags == {"ParallelAdapter": True, "PrefixTuning": False, "MAM": False}
    model, twin, inputs = make("bert"), make("bert"), batch("bert")
    method = MAM(tokens=3, reparametrize=False, bottleneck=4).attach(model)
    prefix: Any = method_class("PrefixTuning")(tokens=3).attach(twin)  # type: ignore[call-arg]
    with torch.no_grad():
        for mine, theirs in zip([g for g in method.grafts if hasattr(g, "prefix")], prefix.grafts, strict=True):
            theirs.prefix.copy_(mine.prefix)
    assert torch.equal(outputs(model, inputs), outputs(twin, inputs))
    assert not torch.equal(outputs(model, inputs), outputs(make("bert"), inputs))


@pytest.mark.parametrize("name", ["llama", "t5"] if EVERYTHING else ["t5"])
def test_7_generation(name: str) -> None:
    """Neither padding nor causality covers the prefix; caches and positions are the model's own."""
    a_cache_changes_nothing(name, MAM(tokens=3, reparametrize=8, bottleneck=4))


def test_7_padding() -> None:
    """A sentence with padding behind it is the sentence."""
    model: Any = make("roberta").model
    randomize(MAM(tokens=3, reparametrize=8, bottleneck=4).attach(model), size=0.5)
    ids = batch("roberta")
    with torch.no_grad():
        padded = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
        alone = model(ids[1:2, :8], attention_mask=torch.ones(1, 8).long()).last_hidden_state
    assert distance(padded[1:2, :8], alone) < 1e-5


def test_8_frozen() -> None:
    """A step moves nothing but the method's own tensors, and moves all of them."""
    model, inputs = make("t5"), batch("t5")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = MAM(tokens=3, reparametrize=8, bottleneck=4).attach(model)
    randomize(method)
    start = {name: p.detach().clone() for name, p in method.trainable().items()}
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=1e-2)
    model(inputs).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(not torch.equal(value, method.trainable()[name]) for name, value in start.items())
