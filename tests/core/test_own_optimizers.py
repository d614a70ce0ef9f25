"""The optimizers that methods bring: closures, hooks, and the bytes that they keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core import describe, peft
from core.method import PEFTMethod
from core.optim import Together
from tests.models import make
from tests.toolkit import Plain, loader, problem, trainer

OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "GaLore": ("GaLore", {"rank": 4, "interval": 3}), "GaLore few": ("GaLore", {"rank": 2, "targets": ("mlp.up",)}),
    "SpIEL AG": ("SpIEL", {"rank": 2}), "SpIEL MA": ("SpIEL", {"rank": 2, "kind": "MA"})}


def _attached(name: str, model: Any) -> PEFTMethod:
    method, config = OWN[name]
    return peft.method_class(method)(**config).attach(model)


def test_every_method_with_an_optimizer_is_here() -> None:
    brought = {name for name in peft.registry()
               if peft.method_class(name).make_optimizer is not PEFTMethod.make_optimizer}
    assert brought == {method for method, _ in OWN.values()}


def _losses_and_norms(name: str, closures: bool, lr: float, beside: bool) -> tuple[list[float], list[float], int]:
    """Five steps on one batch: losses, the norms of all gradients, and how often a step's hook ran."""
    model: Any = make("timm_vit")
    method = _attached(name, model)
    [(inputs, labels), _], head = problem("timm_vit")
    optimizer: Any = method.make_optimizer(method.param_groups(), lr=lr)
    if beside:
        optimizer = Together([optimizer, torch.optim.AdamW([head.requires_grad_()], lr)])
    losses: list[float] = []
    norms: list[float] = []
    calls: list[None] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(None))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs) @ head, labels)
        loss.backward()
        losses.append(loss.item())
        norms.append(sum(float(p.grad.norm()) for p in method.trainable().values() if p.grad is not None))
        return loss

    for _ in range(5):
        if closures:
            assert optimizer.step(closure).item() == losses[-1]
        else:
            closure()
            optimizer.step()
    return losses, norms, len(calls)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a head's"])
@pytest.mark.parametrize("name", OWN)
def test_a_closure_is_the_plain_loop(name: str, beside: bool) -> None:
    """Once an ordinary AdamW exists in the process, whose step torch wraps in hooks."""
    torch.optim.AdamW([torch.zeros(1)], 1.0)
    plain, closed = (_losses_and_norms(name, closures, 1e-2, beside) for closures in (False, True))
    assert plain == closed and plain[2] == 5 and len(set(plain[0])) == 5
    _, norms, _ = _losses_and_norms(name, True, 0.0, beside)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("name", OWN)
def test_in_a_module_of_ones_own(name: str, tmp_path: Any) -> None:
    """Lightning steps with a closure that clears gradients: on one batch at learning rate 0 they stay what they are."""
    norms: list[float] = []

    class Own(Plain):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms.append(sum(float(p.grad.norm()) for p in method.trainable().values() if p.grad is not None))

    module = Own(make("timm_vit"), lr=0.0)
    method = _attached(name, module.backbone)
    module.head.requires_grad_(False)
    module.make = lambda: method.make_optimizer(method.param_groups(), lr=0.0, weight_decay=0.0)  # type: ignore
    trainer(tmp_path, method, max_steps=4).fit(module, loader("timm_vit", size=2, shuffle=False))
    assert len(norms) == 4 and len(set(norms)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OWN)
def test_bytes_told_before_are_those_kept(name: str, dtype: torch.dtype) -> None:
    """By `describe`, beside a trained head; counters of steps are left out."""
    model: Any = torch.nn.Sequential(make("timm_vit", dtype=dtype), torch.nn.Linear(32, 4, dtype=dtype))
    method = _attached(name, model[0])
    told = describe(model).optimizer_bytes
    optimizers = [method.make_optimizer(method.param_groups(), lr=1e-3), torch.optim.AdamW(model[1].parameters())]
    for tensor in [*method.trainable().values(), *model[1].parameters()]:
        tensor.grad = torch.randn_like(tensor)
    kept = 0
    for optimizer in optimizers:
        assert optimizer is not None
        optimizer.step()
        kept += sum(value.numel() * value.element_size() for state in optimizer.state.values()
                    for key, value in state.items() if key != "step")
    assert told == kept
