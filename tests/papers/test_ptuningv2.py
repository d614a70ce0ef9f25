"""Checks of PTuningV2: a prefix without an MLP, with dropout on its keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from core.peft import method_class
from tests.models import WIDTH, batch, make
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant, prefix_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "PTuningV2": Row(
        {"plain": Variant({"tokens": 4, "dropout": 0.0}, learns={"tokens": 20, "lr": 1e-2})},
        trained=prefix_count,
        cards=(("bert_base", {"tokens": 128}, 2_359_296),),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"targets": ("q",)}, "no attention")),
        random=True, operators=20, saved=0.75,
        artifact={"tokens": 1},
        refused={**NO_ATTENTION, **NO_CALL},
    ),
}

PTuningV2: Any = method_class("PTuningV2")


@pytest.mark.parametrize("family", ["bert", "t5", "timm_vit"])
def test_1_is_a_prefix(family: str) -> None:
    """In eval mode the same numbers and the same function as PrefixTuning's."""
    model, twin, inputs = make(family), make(family), batch(family)
    method = PTuningV2(tokens=3).attach(model)
    prefix: Any = method_class("PrefixTuning")(tokens=3).attach(twin)  # type: ignore[call-arg]
    randomize(method, size=1.0)
    with torch.no_grad():
        for mine, theirs in zip(method.grafts, prefix.grafts, strict=True):
            assert mine.prefix.shape == (3, 2 * WIDTH)
            theirs.prefix.copy_(mine.prefix)
    assert torch.equal(outputs(model, inputs), outputs(twin, inputs))


def test_2_dropout() -> None:
    """In training a tenth of the keys' and values' numbers is zero, the others grow by it."""
    model, inputs = make("bert"), batch("bert")
    method = PTuningV2(tokens=40).attach(model)
    randomize(method, size=1.0)
    graft = method.grafts[0]
    seen: list[torch.Tensor] = []
    graft.dropout.register_forward_hook(lambda module, args, out: seen.append(out))
    still = outputs(model, inputs)
    assert torch.equal(seen[0], graft.prefix)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert distance(outputs(model, inputs), still) > 1e-3
    kept = seen[1] != 0
    assert 0.05 < 1 - float(kept.double().mean()) < 0.15
    assert distance(seen[1][kept], (graft.prefix / 0.9)[kept]) < 1e-6
