"""Weights that are made again in backward: second derivatives, and inputs of every number of axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import peft
from core.anatomy import BlockDescription, Description, family
from core.graft import Graft
from core.method import PEFTMethod
from tests.toolkit import randomize


class Maps(nn.Module):
    """tanh(W_down tanh(W_up x)) on vectors of any number of axes [..., 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@family("tests.core.test_remade:Maps", f"{__name__}:Maps")
def maps(model: Any) -> Description:
    return Description([BlockDescription(path="block", dim=8, heads=None, roles={"mlp.up": "0", "mlp.down": "2"})])


REMADE: dict[str, dict[str, Any]] = {
    "RAMT": {"drop": 0.0}, "SpIEL": {"count": 30}, "LIFT": {"rank": 1}, "APET": {"count": 30},
    "PST": {"rank": 2, "score_rank": 2, "initial": 0.3}, "LoHa": {"rank": 2}, "LoKr": {"rank": 1},
    "FourierFT": {"frequencies": 9}, "BOFT": {}, "Bat": {"rank": 2},
    "SensitivityTuning": {"count": 40, "rank": 1, "ratio": 1.0, "vector_ratio": 0.0}}
PLAIN: dict[str, dict[str, Any]] = {
    "LoRA": {}, "DoRA": {}, "OFT": {"block": 2}, "Bone": {"rank": 2}, "VeRA": {"rank": 4}, "SVFit": {}, "Hydra": {},
    "FacT": {"rank": 2}, "Consolidator": {"groups": 2}, "MoS": {"rank": 2}, "AdaLoRA": {}, "TriAdaptLoRA": {"rank": 2},
    "SSF": {}, "IA3": {"outputs": ("mlp.up",)}}


def _attached(kind: str, model: nn.Module, targets: Any = ("mlp.up", "mlp.down"), **changes: Any) -> PEFTMethod:
    config = {**{**REMADE, **PLAIN}[kind], **({} if kind == "IA3" else {"targets": targets}), **changes}
    method = peft.method_class(kind)(**config).attach(model)
    randomize(method, size=0.3)
    return method


def _model() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Maps().double().eval(), torch.randn(5, 3, 8, dtype=torch.float64)


def _graft_kinds(kind: type[Graft]) -> list[type[Graft]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in _graft_kinds(sub))]


def test_every_graft_that_is_made_again_is_here() -> None:
    for name in peft.registry():
        peft.method_class(name)
    kinds = {kind.__name__ for kind in _graft_kinds(Graft) if kind.remade and kind.__module__.startswith("core.")}
    assert kinds == {"MaskGraft", "SparseGraft", "LIFTGraft", "PSTGraft", "LoHaGraft", "LoKrGraft", "FourierGraft",
                     "BOFTGraft", "BatGraft", "RotatedWeight"}


def _penalty(name: str, other: str) -> list[Tensor]:
    """Gradients, with respect to a second method's tensors, of the squared gradients with respect to the inputs and to
    the first one's tensors."""
    model, inputs = _model()
    first = _attached(name, model, ("mlp.up",))
    second = _attached(other, model, ("mlp.down",), name="second")
    inputs.requires_grad_()
    by = [inputs, *first.trainable().values()]
    gradients = torch.autograd.grad(model(inputs).square().sum(), by, create_graph=True)
    penalty = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    found = [*first.trainable().values(), *second.trainable().values()]
    return list(torch.autograd.grad(penalty, found, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(("name", "other"), [(name, "LoRA") for name in REMADE] + [("LoRA", name) for name in REMADE])
def test_a_gradient_penalty(name: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch itself differentiates where the weights are kept."""
    found = _penalty(name, other)
    for kind in _graft_kinds(Graft):
        monkeypatch.setattr(kind, "remade", False)
    expected = _penalty(name, other)
    assert any(tensor.any() for tensor in expected)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*REMADE, *PLAIN])
def test_a_vector_without_a_batch_axis(name: str) -> None:
    """Outputs and gradients are those of a batch of one."""
    found = []
    for shape in ((8,), (1, 8), (1, 1, 8)):
        model, inputs = _model()
        method = _attached(name, model)
        x = inputs[0, 0].reshape(shape).requires_grad_()
        out = model(x)
        out.square().sum().backward()
        assert out.shape == shape and x.grad is not None
        found.append([out.detach().flatten(), x.grad.flatten(), *(p.grad for p in method.trainable().values())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert (one is None) == (two is None) and (one is None or torch.allclose(one, two, rtol=1e-10, atol=1e-13))


@pytest.mark.parametrize("name", ["LoHa", "Bat", "PST"])
def test_functional_derivatives(name: str) -> None:
    """`torch.func` and forward-mode derivatives of a model with a method are those that backward gives."""
    model, inputs = _model()
    _attached(name, model)
    x = inputs[0, 0].clone().requires_grad_()
    [expected] = torch.autograd.grad(model(x).square().sum(), x)
    direction = torch.ones_like(x)
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).square().sum())(x.detach()), expected)
    slope = torch.func.jvp(lambda x: model(x).square().sum(), (x.detach(),), (direction,))[1]
    torch.testing.assert_close(slope, (expected * direction).sum())


@pytest.mark.parametrize("name", ["LoHa", "Bat", "PST"])
def test_backward_within_autocast(name: str) -> None:
    """Gradients are those of a backward outside."""
    found = []
    for inside in (True, False):
        model, inputs = _model()
        model.float()
        method = _attached(name, model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs.float()).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append([p.grad for p in method.trainable().values()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))

