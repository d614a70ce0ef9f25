"""Checks of PrefixTuning: the numbers are those of the paper's checks for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant, prefix_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "PrefixTuning": Row(
        {"direct": Variant({"tokens": 3}, learns={"tokens": 20}),
         "reparametrized": Variant({"tokens": 3, "reparametrize": 8}),
         "folded": Variant({"tokens": 3, "reparametrize": 8}, lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"tokens": 20})},
        trained=prefix_count,
        cards=(("bert_base", {}, 368_640), ("bert_base", {"reparametrize": True}, 9_864_704)),
        bad=(({"tokens": 0}, "tokens 0"), ({"reparametrize": -1}, "reparametrize -1")),
        random=True, operators=13, saved=0.71,
        artifact={"tokens": 1},
        refused={**NO_ATTENTION, **NO_CALL},
    ),
}

PrefixTuning: Any = method_class("PrefixTuning")


class Calls(TorchFunctionMode):
    """What reaches the attention, call by call: q, k, v, mask, output."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            self.seen.append((given["query"], given["key"], given["value"], given.get("attn_mask"),
                              given.get("is_causal", False), out))
        return out


def _calls(model: Any, inputs: Tensor) -> list[tuple[Any, ...]]:
    with Calls() as calls, torch.no_grad():
        model(inputs)
    return calls.seen


def _split(prefix: Tensor, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """[tokens, 2 heads width] -> keys and values [heads, tokens, width]: the keys' columns first, head by head."""
    keys, values = prefix.split(heads * width, dim=1)
    return tuple(torch.stack([part[:, h * width:(h + 1) * width] for h in range(heads)])  # type: ignore[return-value]
                 for part in (keys, values))


@pytest.mark.parametrize(("family", "key_heads"), [("bert", 4), ("timm_vit", 4), ("llama", 2)])
@pytest.mark.parametrize("hidden", [0, 8])
def test_equation(family: str, key_heads: int, hidden: int) -> None:
    """softmax(q [P_k; K]^T / sqrt(width)) [P_v; V]. Queries, and in the first layer the tokens' own keys and values
    (with their positions), are what they were; every query sees the prefix, what was hidden stays so."""
    model, inputs = make(family, dtype=torch.float64), batch(family)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    base = _calls(model, inputs)
    method = PrefixTuning(tokens=3, reparametrize=hidden).attach(model)
    randomize(method, size=0.5)
    found = _calls(model, inputs)
    assert len(found) == len(base) == 2
    for layer, (now, before) in enumerate(zip(found, base, strict=True)):
        q, k, v, mask, _, out = now
        q_0, k_0, v_0, mask_0, causal, _ = before
        p_k, p_v = _split(method.grafts[layer].values().detach(), key_heads, 8)
        times = k_0.shape[1] // key_heads
        assert torch.equal(k[:, :, :3], p_k.repeat_interleave(times, 0).expand(len(k), -1, -1, -1))
        assert torch.equal(v[:, :, :3], p_v.repeat_interleave(times, 0).expand(len(v), -1, -1, -1))
        if layer == 0:
            assert torch.equal(q, q_0) and torch.equal(k[:, :, 3:], k_0) and torch.equal(v[:, :, 3:], v_0)
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) / 8 ** 0.5
        hidden_keys = torch.zeros(scores.shape[-2:], dtype=torch.bool)
        if causal:
            hidden_keys[:, 3:] = torch.ones(scores.shape[-2], scores.shape[-1] - 3, dtype=torch.bool).triu(1)
        if mask_0 is not None:
            closed = ~mask_0 if mask_0.dtype == torch.bool else mask_0 < -1
            hidden_keys = F.pad(closed.expand(*scores.shape[:2], -1, -1), (3, 0))
        weights = torch.softmax(scores.masked_fill(hidden_keys, float("-inf")), -1)
        expected = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        assert distance(out, expected) < 1e-10
        assert mask is None or mask.shape[-1] == k.shape[-2]


def test_reparametrization() -> None:
    """P = W2 tanh(W1 e + b1) + b2, the layers one behind the other in its columns; folded, the same numbers, and
    nothing but them to store."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert")
    method = PrefixTuning(tokens=3, reparametrize=8).attach(model)
    randomize(method, size=0.3)
    shared = method.module.reparametrization
    whole = torch.tanh(shared.embedding @ shared.first.weight.t() + shared.first.bias) @ shared.second.weight.t()
    whole = (whole + shared.second.bias).detach()
    for layer, graft in enumerate(method.grafts):
        assert distance(graft.values().detach(), whole[:, layer * 64:(layer + 1) * 64]) < 1e-12
    expected = outputs(model, inputs)
    assert method.counts()["stored"] == 3 * 32 + 33 * 8 + 9 * 128
    method.fold()
    assert torch.equal(outputs(model, inputs), expected) and method.counts()["stored"] == 3 * 2 * 2 * 32


@pytest.mark.parametrize(("tokens", "hidden", "count"), [
    (30, 0, 552_960), (128, 0, 2_359_296), (10, 512, 9_857_024), (30, 800, 15_402_272)])
def test_1_counts(tokens: int, hidden: int, count: int) -> None:
    """p 2 L d, or p d + (d + 1) h + (h + 1) 2 L d; the last two stand inside UniPELT and MAM."""
    assert PrefixTuning(tokens=tokens, reparametrize=hidden).attach(bert_base()).counts()["method"] == count


def test_2_is_not_the_identity() -> None:
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method = PrefixTuning(tokens=3).attach(model)
    assert not method.identity_at_start and distance(outputs(model, inputs), expected) > 1e-3


@pytest.mark.parametrize("hidden", [0, 8])
def test_3_first_gradients(hidden: int) -> None:
    model, inputs = make("bert"), batch("bert")
    method = PrefixTuning(tokens=3, reparametrize=hidden).attach(model)
    model(inputs).pow(3).sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in method.trainable().values())


def test_4_does_not_merge() -> None:
    method = PrefixTuning(tokens=3).attach(make("bert"))
    with pytest.raises(ScionError, match="cannot be merged"):
        method.merge()


def test_7_samples_do_not_meet() -> None:
    """A sample's output does not depend on its neighbours, nor on how far they are padded."""
    model = make("bert", dtype=torch.float64)
    method = PrefixTuning(tokens=3).attach(model)
    randomize(method, size=0.5)
    inputs = batch("bert", 4)
    together = outputs(model, inputs)
    alone = torch.cat([outputs(model, inputs[i:i + 1]) for i in range(4)])
    assert distance(together, alone) < 1e-12
    cut = outputs(model, inputs[1:2, :8])  # without its four padded places
    assert distance(cut, together[1:2]) < 1e-10
