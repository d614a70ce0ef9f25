"""Checks of PrefixTuning: in every stack, and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.anatomy import dissect
from core.peft import method_class
from tests.models import WIDTH, batch, make
from tests.papers.decoding import LANGUAGE_MODELS, a_cache_changes_nothing, later_tokens_are_not_seen
from tests.papers.explicit import gate_attention
from tests.toolkit import EVERYTHING, distance, outputs, randomize

PrefixTuning: Any = method_class("PrefixTuning")


def prefixes_of(method: Any) -> list[Tensor]:
    """One a site [tokens, 2, key heads, width], keys first."""
    return [graft.prefix.detach().unflatten(1, (2, graft.site.heads.key, graft.site.heads.width))
            for graft in method.grafts]


@pytest.mark.parametrize("family", ["bert", "timm_vit", "llama", "codegen"])
def test_1_equation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax(q [P_k; K]) [P_v; V], under padding, causality and grouped queries: no mask covers the prefix, and
    queries and positions are the frozen model's."""
    model, plain, inputs = make(family), make(family), batch(family)
    method = PrefixTuning(tokens=3).attach(model)
    randomize(method, size=1.0)
    found = outputs(model, inputs)
    if family == "codegen":  # its attention is written out: with the method absent, the same call stands there
        for block in dissect(plain).blocks:
            for module, name, value in block.sites["attend"].while_active:
                setattr(module, name, value)
    shares: list[Tensor] = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        gate_attention(prefixes_of(method), shares))
    assert distance(found, outputs(plain, inputs)) < 1e-5 and len(shares) == 2
    assert all(0.01 < float(share.mean()) < 0.9 for share in shares)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_2_reparametrization(family: str) -> None:
    """P = W2 tanh(W1 e + b1) + b2, one table and one MLP for all layers of a stack and kind of attention, keys before
    values; folded, the same function and tokens 2 L dim numbers."""
    model, twin, inputs = make(family), make(family), batch(family)
    options: dict[str, Any] = {"targets": ("attend", "cross.attend")} if family == "t5" else {}
    method = PrefixTuning(tokens=3, reparametrize=8, **options).attach(model)
    randomize(method, size=0.3)
    direct = PrefixTuning(tokens=3, **options).attach(twin)
    banks = [child for name, child in method.module.named_children() if name.startswith("reparametrization")]
    assert len(banks) == (3 if family == "t5" else 1)
    rows: list[Tensor] = []
    with torch.no_grad():
        for bank in banks:
            table: Any = bank.second(torch.tanh(bank.first(bank.embedding)))  # type: ignore[operator]
            assert table.shape == (3, 2 * 2 * WIDTH)
            rows += table.split(2 * WIDTH, 1)
        order = ([0, 1, 2, 4, 3, 5] if family == "t5" else [0, 1])  # a decoder's layer: its own, then across
        for graft, row in zip(direct.grafts, (rows[i] for i in order), strict=True):
            graft.prefix.copy_(row)
    expected = outputs(twin, inputs)
    assert distance(outputs(model, inputs), expected) < 1e-5
    method.fold()
    assert distance(outputs(model, inputs), expected) < 1e-5
    assert method.counts()["method"] == direct.counts()["method"] == 3 * 2 * WIDTH * len(order)


@pytest.mark.parametrize("name", LANGUAGE_MODELS if EVERYTHING else ("gpt2", "gpt_neox", "t5"))
def test_3_generation(name: str) -> None:
    """Caches count the model's own tokens, prefixes stand in front of them."""
    targets = ("attend", "cross.attend") if name == "t5" else ("attend",)
    a_cache_changes_nothing(name, PrefixTuning(tokens=3, targets=targets))


def test_4_causal() -> None:
    later_tokens_are_not_seen("llama", PrefixTuning(tokens=3))
