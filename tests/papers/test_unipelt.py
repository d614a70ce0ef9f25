"""Checks of UniPELT: its entry, with every gate written out by hooks on a plain BERT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.explicit import gate_attention
from tests.rows import CAUSAL, NO_ATTENTION, NO_CALL, Row, Variant, bottleneck_count, prefix_count
from tests.toolkit import distance, outputs, randomize


def unipelt_count(anatomy: Anatomy, method: Any) -> int:
    gates = sum(s.width + 1 for role in ("attend", "q", "v", "mlp") for s in anatomy.sites(role, method.layers))
    lora = sum(method.rank * (s.in_features + s.out_features) for s in anatomy.sites(("q", "v"), method.layers))
    return prefix_count(anatomy, method) + lora + bottleneck_count(anatomy, method.adapter) + gates


ROWS = {
    "UniPELT": Row(
        {"mlp": Variant({"tokens": 4, "reparametrize": 8, "rank": 2, "reduction": 6}, learns={"lr": 1e-2}),
         "plain": Variant({"tokens": 3, "reparametrize": False, "rank": 1, "reduction": 8}, learns={"lr": 1e-2})},
        trained=unipelt_count,
        cards=(("bert_base", {}, 11_083_376),),
        bad=(({"tokens": 0}, "tokens 0"), ({"rank": 0}, "rank 0"), ({"reduction": 0}, "reduction 0")),
        random=True, commutes=False, operators=40, saved=1.22,
        artifact={"tokens": 1, "reparametrize": False, "rank": 1},
        refused={**NO_ATTENTION, **NO_CALL, **dict.fromkeys(CAUSAL, (
            "its gates are means over the sequence, and a causal model may not see what is to come"))},
    ),
}

UniPELT: Any = method_class("UniPELT")


def gate(graft: Any, x: Tensor) -> Tensor:
    """mean over the sequence of sigmoid(w x + b), one number a sample [batch, 1, 1]"""
    return torch.sigmoid(x @ graft.gate.weight[0] + graft.gate.bias).mean(1)[:, None, None]


def _adapter(graft: Any, z: Tensor) -> Tensor:
    return torch.relu(z @ graft.down.weight.t() + graft.down.bias) @ graft.up.weight.t() + graft.up.bias


def written_out(model: nn.Module, method: Any, monkeypatch: pytest.MonkeyPatch, ungated: bool = False) -> None:
    """All three parts as hooks on the plain model; LoRA's gate stands where alpha / rank would."""
    grafts = {graft.site.name: graft for graft in method.grafts}
    prefixes: list[Tensor] = []

    def low_rank(graft: Any) -> Any:
        return lambda module, args, out: out + (1 if ungated else gate(graft, args[0])) * (
            args[0] @ graft.A.t() @ graft.B.t())

    def prefix(graft: Any) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            own = graft.prefix.unflatten(1, (2, 4, 8))[None]
            prefixes.append(own.expand(len(x), *own.shape[1:]) if ungated else gate(graft, x)[..., None, None] * own)
        return hook

    def bottleneck(graft: Any, norm: Any) -> Any:
        def hook(module: nn.Module, args: tuple) -> tuple:
            z = type(norm).forward(norm, args[0])
            return (args[0] + (1 if ungated else gate(graft, z)) * _adapter(graft, z),)
        return hook

    for i, block in enumerate(dissect(model).blocks):
        block.sites["attend"].module.register_forward_pre_hook(prefix(grafts[f"{i}.attend"]), with_kwargs=True)
        for role in ("q", "v"):
            block.sites[role].module.register_forward_hook(low_rank(grafts[f"{i}.{role}"]))
        norm = block.sites["norm2"].module
        norm.register_forward_pre_hook(bottleneck(grafts[f"{i}.norm2"], norm))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", gate_attention(prefixes, []))


def test_1_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain, inputs = make("bert"), make("bert"), batch("bert")
    method = UniPELT(tokens=3, reparametrize=False, rank=4, reduction=8).attach(model)
    randomize(method, size=0.5)
    found, frozen = outputs(model, inputs), outputs(plain, inputs)
    written_out(plain, method, monkeypatch)
    assert distance(found, outputs(plain, inputs)) < 1e-5 and distance(found, frozen) > 1e-2


def test_2_open_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all gates open it is a prefix, LoRA at scale 1 (no alpha / rank) and a bottleneck; closed, the prefix is
    zeros and the rest is gone."""
    model, plain, inputs = make("bert"), make("bert"), batch("bert")
    method = UniPELT(tokens=3, reparametrize=False, rank=4, reduction=8).attach(model)
    randomize(method, size=0.5)
    with torch.no_grad():
        for graft in method.grafts:
            graft.gate.bias.fill_(60.0)
    found = outputs(model, inputs)
    written_out(plain, method, monkeypatch, ungated=True)
    assert distance(found, outputs(plain, inputs)) < 1e-5
    monkeypatch.undo()
    with torch.no_grad():
        for graft in method.grafts:
            graft.gate.bias.fill_(-60.0)
    twin = make("bert")
    prefix: Any = method_class("PrefixTuning")(tokens=3).attach(twin)  # type: ignore[call-arg]
    with torch.no_grad():
        for graft in prefix.grafts:
            graft.prefix.zero_()
    assert distance(outputs(model, inputs), outputs(twin, inputs)) < 1e-5


def test_3_gates_depend_on_the_input() -> None:
    """Another number for each sample and each place, between 0 and 1; a sample's is its own."""
    model, inputs = make("bert"), batch("bert")
    method = UniPELT(tokens=3, reparametrize=8, rank=2).attach(model)
    randomize(method, size=0.5)
    seen: list[Tensor] = []
    for graft in method.grafts:
        graft.gate.register_forward_hook(lambda module, args, out: seen.append(out.flatten()))
    outputs(model, inputs)
    gates = torch.stack(seen)
    assert gates.shape == (8, 3) and bool(((gates > 0) & (gates < 1)).all())
    assert len(gates.flatten().unique()) == 24
    assert sum(p.numel() for graft in method.grafts for p in graft.gate.parameters()) == 2 * 4 * 33
    alone = torch.cat([outputs(model, sample[None]) for sample in inputs])
    assert distance(outputs(model, inputs), alone) < 1e-5


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "ast"])
def test_3_pre_norm(family: str) -> None:
    """In pre-norm blocks the adapter's gate reads the MLP's output: h + g(h) A(h)."""
    model = make(family, dtype=torch.float64)
    method = UniPELT(tokens=3, reparametrize=False, rank=2, reduction=8, layers=(0,)).attach(model)
    randomize(method, size=0.5)
    graft = next(g for g in method.grafts if g.site.role == "mlp")
    seen: list[Tensor] = []
    graft.site.module.register_forward_hook(lambda module, args, out: seen.extend((args[0], out)))
    outputs(model, batch(family, dtype=torch.float64))
    x, found = seen
    with torch.no_grad(), method.disabled():
        h = graft.site.module(x)
        assert distance(found, h + gate(graft, h) * _adapter(graft, h)) < 1e-12


def test_4_nothing_is_merged() -> None:
    """The gates are those of an input; there is no weight that they could be written into."""
    model = make("bert")
    method = UniPELT(tokens=3).attach(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ScionError):
        method.merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not UniPELT.mergeable and all(graft.factors() is None for graft in method.grafts)


def test_5_fold() -> None:
    model, inputs = make("bert"), batch("bert")
    method = UniPELT(tokens=3, reparametrize=8, rank=2).attach(model)
    randomize(method, size=0.3)
    expected = outputs(model, inputs)
    method.fold()
    assert distance(outputs(model, inputs), expected) < 1e-6


@pytest.mark.parametrize("family", ["llama", "t5", "clip_text"])
def test_6_causal_models_are_refused(family: str) -> None:
    with pytest.raises(ScionError, match="only those before it"):
        UniPELT().attach(make(family))
