"""Checks of DiffPruning: what the paper says of it, and the cross-method checks by their numbers there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import load_adapter
from core.anatomy import Anatomy, parameter_sites
from core.errors import ScionError
from core.peft import method_class
from core.peft.selection.diff_pruning import MaskedChange, gate
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import WIDE, Row, Variant, to_sparse
from tests.toolkit import distance, outputs, randomize, same, snapshot, train


def diff_count(anatomy: Anatomy, method: Any) -> int:
    sizes = [p.numel() for p in anatomy.root.parameters() if p.dim()]
    tensors, numbers = len(sizes) if method.structured else 0, sum(sizes)
    return 2 * numbers + tensors if method.stage == "masks" else method.keep


ROWS = {
    "DiffPruning": Row(
        {"masks": Variant(noise=True, learns={"lr": 3e-4}),
         "structured": Variant({"structured": True, "l0": 0.0}, noise=True, learns={"lr": 3e-4}),
         "fixed": Variant({"density": 0.01}, to_sparse, everywhere=True, learns={"density": 1.0, "lr": 3e-4})},
        trained=diff_count,
        cards=(("vit_b16", {}, 171_597_312),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 10**9}, "count 1000000000"),
             ({"count": 10, "density": 0.5}, "not both"), ({"l0": -1.0}, "l0 -1"), ({"mask_lr": 0.0}, "mask_lr 0"),
             ({"exclude": ("pol",)}, "'pol'")),
        operators=12, saved=2.5, stored=2.0, decays=False,
        artifact={"layers": (0,), "exclude": WIDE["targets"]},
    ),
}

DiffPruning: Any = method_class("DiffPruning")


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize(("build", "kept", "everything"), [(_vit, 428_993, 85_798_656), (_bert, 547_411, 109_482_240)],
                         ids=["vit", "bert"])
def test_1_counts(build: Any, kept: int, everything: int) -> None:
    """Two numbers a parameter in training (and one a tensor where there are shared gates), 0.5 % kept."""
    with torch.device("meta"):
        model = build()
    method = DiffPruning().attach(model)
    assert method.counts()["method"] == 2 * everything and method.keep == kept
    method.remove()
    tensors = len(list(model.parameters()))
    assert DiffPruning(structured=True).attach(model).counts()["method"] == 2 * everything + tensors


def test_2_identity_while_w_is_zero() -> None:
    """To the bit, also where gates are drawn."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    expected = outputs(model, inputs)
    DiffPruning(structured=True, backbone_mode="eval").attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    assert torch.equal(outputs(model.train(), inputs), expected)


def test_gates() -> None:
    """z = clip(3 s - 1.5, 0, 1) with s = sigmoid(log u - log(1 - u) + a): its values where u is 1/2, and its
    shares of zeros and ones under noise."""
    for a, expected in ((5.0, 1.0), (-5.0, 0.0), (0.0, 0.0), (math.log(2.0), 0.5)):
        assert gate(torch.tensor(a), noise=False).item() == pytest.approx(expected, abs=1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = gate(torch.full((400_000,), 1.0), noise=True)
    zero, one = (z == 0).double().mean().item(), (z == 1).double().mean().item()
    assert zero == pytest.approx(1 - 1 / (1 + math.exp(-1.0)), abs=3e-3)  # s <= 1/2: logit u <= -a
    assert one == pytest.approx(1 / (1 + math.exp(math.log(5.0) - 1.0)), abs=3e-3)  # s >= 5/6: logit u >= log 5 - a
    assert bool((z >= 0).all()) and bool((z <= 1).all())


def test_penalty() -> None:
    """l0 times the sum of sigmoid(a), with a shared gate times its own; nothing in the second stage."""
    model = make("timm_vit")
    method = DiffPruning(l0=2e-3, count=50).attach(model)
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("peft."))
    expected = 2e-3 * total / (1 + math.exp(-5.0))
    assert method.adds_loss and method.loss_terms(None, None, None).item() == pytest.approx(expected, rel=1e-5)
    method.advance()
    assert not method.adds_loss and method.loss_terms(None, None, None) is None
    shared = DiffPruning(l0=2e-3, structured=True).attach(make("timm_vit"))
    assert shared.loss_terms(None, None, None).item() == pytest.approx(expected / (1 + math.exp(-5.0)), rel=1e-5)


@pytest.mark.parametrize("structured", [False, True])
def test_gradients(structured: bool) -> None:
    """Of w: z; of a: w dz/da, where the gate is neither open nor closed."""
    model = make("bert", dtype=torch.float64)
    name = next(name for name, p in model.named_parameters() if p.dim() == 2)
    graft = MaskedChange(parameter_sites(model, [name])[0], structured, 0.5, True).double()
    with torch.no_grad():
        graft.a.add_(torch.randn(graft.a.shape, generator=torch.Generator().manual_seed(0)))
        graft.w.normal_(generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(graft.w.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    graft.change().backward(gradient)
    s = torch.sigmoid(graft.a.detach())
    z = (3 * s - 1.5).clamp(0, 1)
    between = ((z > 0) & (z < 1)).double()
    shared = 1.0 if graft.shared is None else 3 / (1 + math.exp(-0.5)) - 1.5
    assert graft.w.grad is not None and graft.a.grad is not None
    torch.testing.assert_close(graft.w.grad, gradient * z * shared)
    torch.testing.assert_close(graft.a.grad, gradient * graft.w.detach() * shared * between * 3 * s * (1 - s))
    if graft.shared is not None:
        assert graft.shared.grad is not None
        torch.testing.assert_close(graft.shared.grad, (gradient * z * graft.w.detach()).sum() * 3 * torch.sigmoid(
            torch.tensor(0.5, dtype=torch.float64)) * torch.sigmoid(torch.tensor(-0.5, dtype=torch.float64)))


def test_stages(tmp_path: Path) -> None:
    """The K largest |z w| of all tensors together go on from where they are; nothing else is left, nothing else moves;
    the file holds K numbers and positions."""
    model, inputs = make("bert"), batch("bert")
    start = snapshot(model)
    method = DiffPruning(count=300).attach(model)
    randomize(method, size=0.1)
    with torch.no_grad():
        for graft in method.grafts[::3]:
            graft.a -= 6.0
    changes = {graft.site.name: graft.change().detach() for graft in method.grafts}
    edge = torch.cat([change.abs().flatten() for change in changes.values()]).topk(301).values
    assert edge[299] > edge[300]
    method.advance()
    assert method.counts()["method"] == 300 and method.counts()["stored"] == 600
    for graft in method.grafts:
        change = changes[graft.site.name]
        expected = torch.where(change.abs() >= edge[299], change, 0.0)
        torch.testing.assert_close(graft.weight(torch.zeros_like(change)).detach(), expected)
    assert method.suggested["lr"] == 5e-5
    train(model, method, "bert")
    assert same(start, snapshot(model))
    method.save(tmp_path)
    fresh = make("bert")
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    with pytest.raises(ScionError, match="last"):
        method.advance()


def test_learning_rates_and_masks_in_a_run(tmp_path: Path) -> None:
    """w and a in groups of their own, neither decayed; a strong penalty closes gates and lets what it must learn."""
    method = DiffPruning(l0=1e-3)
    module = run(tmp_path, method, steps=60)
    groups = module.trainer.optimizers[0].param_groups
    ours = {id(t): name for name, t in method.trainable().items()}
    rates = {ours[id(p)].rpartition(".")[2]: (group["initial_lr"], group["weight_decay"])
             for group in groups for p in group["params"] if id(p) in ours}
    assert rates == {"w": (1e-2, 0.0), "a": (0.1, 0.0)}
    gates = torch.cat([gate(graft.a.detach(), False).flatten() for graft in method.grafts])  # type: ignore
    assert 0.2 < (gates < 1).double().mean().item()


def test_4_merged() -> None:
    """Without noise, in train mode too."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method = DiffPruning(structured=True, start=0.8).attach(model)
    randomize(method, size=0.02)
    expected = outputs(model, inputs)
    model.train()
    method.merge()
    assert distance(outputs(model.eval(), inputs), expected) < 1e-5
