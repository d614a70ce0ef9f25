"""Checks of MixtureOfAdapters: Soft- and Dense-MoA, adapter by adapter and slot by slot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.decoding import a_cache_changes_nothing, later_tokens_are_not_seen
from tests.rows import CAUSAL, Row, Variant
from tests.toolkit import distance, outputs, randomize


def moa_count(anatomy: Anatomy, method: Any) -> int:
    sites = [(s.width, method.width(s.width)) for s in method.sites(anatomy)]
    return sum(method.adapters * (2 * d * m + m + d + (d * method.slots if method.kind == "soft" else d + 1))
               for d, m in sites)


ROWS = {
    "MixtureOfAdapters": Row(
        {"dense": Variant({"kind": "dense", "adapters": 3, "bottleneck": 2}),
         "soft": Variant({"adapters": 2, "bottleneck": 2, "slots": 2, "targets": ("attention", "mlp")},
                         refused=dict.fromkeys(CAUSAL, "a soft mixture would see tokens to come"))},
        trained=moa_count,
        cards=(("vit_b16", {}, 903_672),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"kind": "hard"}, "'hard'"), ({"adapters": 0}, "adapters 0"),
             ({"targets": ("q",)}, "no sublayer")),
        random=True, operators=24, saved=0.9, without_attention={"targets": ("mlp",)},
        artifact={"adapters": 1, "bottleneck": 1},
    ),
}

MixtureOfAdapters: Any = method_class("MixtureOfAdapters")


def expert(graft: Any, i: int, z: Tensor) -> Tensor:
    """Up gelu(Down z + b) + b"""
    return F.gelu(z @ graft.down[i] + graft.down_bias[i, 0]) @ graft.up[i] + graft.up_bias[i, 0]


def soft(graft: Any, x: Tensor, slots: int) -> Tensor:
    """logits = X Phi; dispatch is a softmax over the tokens, combine one over all slots of all adapters."""
    count = len(graft.down)
    out = torch.zeros_like(x)
    for b, sample in enumerate(x):
        logits = torch.stack([sample @ graft.phi[:, n * slots + p] for n in range(count) for p in range(slots)], 1)
        dispatch, combine = logits.softmax(0), logits.softmax(1)
        for n in range(count):
            for p in range(slots):
                j = n * slots + p
                slot = (dispatch[:, j, None] * sample).sum(0)
                out[b] += combine[:, j, None] * expert(graft, n, slot)
    return out


def dense(graft: Any, x: Tensor) -> Tensor:
    """softmax(Linear(x)) for each token, over what all adapters give for it."""
    shares = (x @ graft.router.weight.t() + graft.router.bias).softmax(-1)
    return sum(shares[..., i, None] * expert(graft, i, x) for i in range(len(graft.down)))  # type: ignore[return-value]


@pytest.mark.parametrize("role", ["mlp", "attention"])
@pytest.mark.parametrize(("kind", "slots"), [("soft", 1), ("soft", 3), ("dense", 1)])
def test_1_equation(kind: str, slots: int, role: str) -> None:
    """Beside the sublayer, on what it reads."""
    model = make("ast", dtype=torch.float64)
    method = MixtureOfAdapters(kind=kind, adapters=3, bottleneck=2, slots=slots, targets=(role,),
                               layers=(0,)).attach(model)
    randomize(method, size=0.5)
    graft, layer = method.grafts[0], dissect(model).blocks[0].module
    before: Any = {"mlp": layer.layernorm_after, "attention": layer.layernorm_before}[role]
    seen: list[Tensor] = []
    before.register_forward_hook(lambda module, args, out: seen.append(out))
    graft.site.module.register_forward_hook(
        lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    inputs = batch("ast", dtype=torch.float64)
    outputs(model, inputs)
    with method.disabled():
        outputs(model, inputs)
    x, found, same, frozen = seen
    assert torch.equal(x, same)
    with torch.no_grad():
        expected = soft(graft, x, slots) if kind == "soft" else dense(graft, x)
    assert distance(found - frozen, expected) < 1e-10


def test_2_start() -> None:
    """Zeros in every U: the frozen model exactly; Phi is Xavier-normal."""
    for kind in ("soft", "dense"):
        model, inputs = make("ast"), batch("ast")
        expected = outputs(model, inputs)
        method = MixtureOfAdapters(kind=kind, adapters=7, bottleneck=3, slots=20).attach(model)
        assert torch.equal(outputs(model, inputs), expected)
        if kind == "soft":
            phi = method.grafts[0].phi.detach()
            assert phi.shape == (32, 140) and abs(float(phi.std()) * (172 / 2) ** 0.5 - 1) < 0.05


def test_2_one_adapter() -> None:
    """A dense mixture of one adapter is a bottleneck beside the sublayer."""
    model = make("timm_vit", dtype=torch.float64)
    method = MixtureOfAdapters(kind="dense", adapters=1, bottleneck=3, layers=(0,)).attach(model)
    randomize(method, size=0.5)
    graft, mlp = method.grafts[0], dissect(model).blocks[0].module.mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = mlp(x)  # type: ignore[operator]
        with method.disabled():
            assert distance(found, mlp(x) + expert(graft, 0, x)) < 1e-12  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["soft", "dense"])
def test_3_samples_do_not_meet(kind: str) -> None:
    model, inputs = make("ast"), batch("ast")
    randomize(MixtureOfAdapters(kind=kind, adapters=3, bottleneck=2).attach(model), size=0.5)
    alone = torch.cat([outputs(model, sample[None]) for sample in inputs])
    assert distance(outputs(model, inputs), alone) < 1e-5


@pytest.mark.parametrize("family", ["llama", "clip_text"])
def test_4_causal(family: str) -> None:
    """Dense mixtures look at no other token; soft ones are refused there."""
    later_tokens_are_not_seen(family, MixtureOfAdapters(kind="dense", adapters=3, bottleneck=2))
    with pytest.raises(ScionError, match="kind='dense'"):
        MixtureOfAdapters().attach(make(family))


def test_4_generation() -> None:
    a_cache_changes_nothing("llama", MixtureOfAdapters(kind="dense", adapters=3, bottleneck=2))


def test_5_count() -> None:
    """Seven adapters at reduction 128, one slot, with the norms at the MLP: 922,104."""
    from transformers import ASTConfig, ASTModel

    with torch.device("meta"):
        model = ASTModel(ASTConfig(max_length=500))
    counts = MixtureOfAdapters(norms=("norm2",)).attach(model).counts()
    assert counts["method"] + counts["norms"] == 922_104
