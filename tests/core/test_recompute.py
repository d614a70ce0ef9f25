"""Recomputed blocks see the grafts as they were in their forward (invariant 18, for what is switched in between)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from core.compose import Route
from core.graft import checkpoint_activations
from core.peft import DiffPruning, FullFineTuning, Houlsby, LoRA, PrefixTuning  # type: ignore[attr-defined]
from tests.models import batch, make
from tests.toolkit import randomize

KINDS = {"LoRA": lambda name: LoRA(name=name, rank=2), "Houlsby": lambda name: Houlsby(name=name, bottleneck=2),
         "PrefixTuning": lambda name: PrefixTuning(name=name, tokens=2)}


@pytest.mark.parametrize("kind", KINDS)
def test_switched_between_forward_and_backward(kind: str) -> None:
    """Two forwards under two routes, one disabled, and one backward after all of them."""
    inputs = batch("bert", 4)
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        model = make("bert")
        route: Any = Route([KINDS[kind](name) for name in "ab"]).attach(model)
        randomize(route)
        checkpoint_activations(model, on)
        loss = torch.zeros(())
        for context in (route.route([0, 1, 1, 0]), route.route("b"), nullcontext(), route.disabled()):
            with context:
                loss = loss + model(inputs.roll(1, 0)).square().sum()
        before = [(graft.active, graft.batch) for graft in route.grafts]
        loss.backward()
        assert [(graft.active, graft.batch) for graft in route.grafts] == before
        found.append({name: tensor.grad.clone() for name, tensor in route.trainable().items()})
    plain, recomputed = found
    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-6) for name in plain)
    assert all(gradient.any() for gradient in plain.values())


@pytest.mark.parametrize("make_method", [lambda: DiffPruning(draw=False), lambda: FullFineTuning()])
@pytest.mark.parametrize("family", ["timm_convnext", "timm_eva"])
def test_parameters_of_the_block_itself(family: str, make_method: Any) -> None:
    """ConvNeXt's scale belongs to the block, whose own hooks stand outside what is recomputed."""
    found: list[dict[str, Tensor]] = []
    for on in (False, True):
        model = make(family)
        method = make_method().attach(model)
        randomize(method)
        checkpoint_activations(model, on)
        model(batch(family)).square().sum().backward()
        found.append({name: tensor.grad.clone() for name, tensor in method.trainable().items()
                      if tensor.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys() and any("gamma" in name for name in plain) == (family == "timm_convnext")
    assert all(torch.allclose(plain[name], recomputed[name], rtol=1e-5, atol=1e-6) for name in plain)
