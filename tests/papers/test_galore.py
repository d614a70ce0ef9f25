"""Checks of GaLore: those of its checks that are about GaLore (the rest is about low-rank pretraining and Fira)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import peft
from core.peft import method_class
from core.peft.optimizers.galore import GaLoreAdamW
from tests.models import batch, make
from tests.rows import FEW, Row, Variant, moved_count
from tests.toolkit import distance


def galore_follows_formula() -> None:
    """GaLore: at full rank and scale 1, rotated back, the first step is Adam's on the rotated gradient; the state of a
    matrix holds two moments of rank max(m, n) and a basis of rank min(m, n); the rest has AdamW."""
    model = make("timm_vit")
    method: Any = peft.method_class("GaLore")(rank=4, scale=0.5, interval=2)  # type: ignore[call-arg]
    method.attach(model)
    optimizer: Any = method.make_optimizer(method.param_groups(), lr=1e-2, weight_decay=0.0)
    start = {name: tensor.detach().clone() for name, tensor in method.trainable().items()}
    generator = torch.Generator().manual_seed(0)
    for tensor in method.trainable().values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    optimizer.step()
    for name, tensor in method.trainable().items():
        moved = tensor.detach() - start[name]
        if name not in method.projected:
            torch.testing.assert_close(moved, -1e-2 * tensor.grad.sign(), rtol=1e-3, atol=1e-6)
            continue
        m, n = tensor.shape
        u, _, v = torch.linalg.svd(tensor.grad, full_matrices=False)
        low = (tensor.grad @ v[:4].t()).sign() @ v[:4] if m >= n else u[:, :4] @ (u[:, :4].t() @ tensor.grad).sign()
        torch.testing.assert_close(moved, -1e-2 * 0.5 * low, rtol=1e-3, atol=1e-5)
        state = optimizer.state[tensor]
        assert state["exp_avg"].numel() == 4 * max(m, n) and state["basis"].numel() == 4 * min(m, n)


ROWS = {
    "GaLore": Row(
        {"all": Variant({"rank": 4, "interval": 5}, learns={"rank": 16, "lr": 1e-3}),
         "few": Variant({"rank": 8, "scale": 1.0, "targets": ("mlp.up",), "layers": (0,)}, learns={"lr": 1e-3})},
        trained=moved_count,
        cards=(("vit_b16", {}, 85_798_656),),
        bad=(({"rank": 0}, "rank 0"), ({"interval": 0}, "interval 0"), ({"exclude": ("pol",)}, "'pol'"),
             ({"targets": ("block",)}, "no linear weight")),
        schedule=galore_follows_formula,
        artifact=FEW,
    ),
}

GaLore: Any = method_class("GaLore")


def _llama(width: int, hidden: int, layers: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=width, intermediate_size=hidden,
                                            num_hidden_layers=layers, num_attention_heads=heads,
                                            tie_word_embeddings=False))


@pytest.mark.parametrize(("shape", "count"), [
    ((512, 1376, 8, 8), 58_073_600), ((768, 2048, 12, 12), 134_105_856), ((1024, 2736, 24, 16), 367_969_280)])
def test_1_to_2_everything_is_trained(shape: tuple[int, int, int, int], count: int) -> None:
    """LLaMA 60M, 130M and 350M; the linear maps of the blocks are what is projected."""
    width, hidden, layers, _ = shape
    method = GaLore().attach(_llama(*shape))
    assert method.counts()["method"] == count
    low, *rest = method.param_groups()
    assert sum(p.numel() for p in low["params"]) == layers * (4 * width**2 + 3 * width * hidden)
    assert sum(p.numel() for group in rest for p in group["params"]) == 2 * 32000 * width + (2 * layers + 1) * width


def _gradient(weight: Tensor, step: int) -> Tensor:
    """Of a smooth loss that differs from step to step."""
    generator = torch.Generator().manual_seed(step)
    target = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return torch.tanh(weight - target)


def _run(weight: Tensor, steps: int, rank: int, interval: int, scale: float = 1.0, weight_decay: float = 0.0
         ) -> tuple[Tensor, dict[str, Any], list[Tensor]]:
    """The weight, its state, and its basis after each step."""
    weight = nn.Parameter(weight.clone())
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank, "scale": scale, "interval": interval}], lr=1e-2,
                            weight_decay=weight_decay)
    bases = []
    for step in range(steps):
        weight.grad = _gradient(weight.detach(), step)
        optimizer.step()
        bases.append(optimizer.state[weight]["basis"].clone())
    return weight.detach(), optimizer.state[weight], bases


SHAPES = [(9, 5), (5, 9), (6, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_6_full_rank_is_adam_in_rotated_coordinates(shape: tuple[int, int]) -> None:
    """At rank min(m, n) and scale 1: AdamW on Z = W P^T (P W where m < n), whose gradient is rotated as well."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mine, state, [basis, *_] = _run(start, 7, min(shape), 100, weight_decay=0.1)
    right = shape[0] >= shape[1]
    assert distance(basis @ basis.t(), torch.eye(min(shape))) < 1e-12

    def rotate(w: Tensor) -> Tensor:
        return w @ basis.t() if right else basis @ w

    def back(z: Tensor) -> Tensor:
        return z @ basis if right else basis.t() @ z

    rotated = nn.Parameter(rotate(start))
    adam = torch.optim.AdamW([rotated], lr=1e-2, weight_decay=0.1)
    for step in range(7):
        rotated.grad = rotate(_gradient(back(rotated.detach()), step))
        adam.step()
    assert distance(mine, back(rotated.detach())) < 1e-12
    for name in ("exp_avg", "exp_avg_sq"):
        assert distance(state[name], adam.state[rotated][name]) < 1e-12
    plain = nn.Parameter(start.clone())  # which is not plain Adam
    other = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.1)
    plain.grad = _gradient(start, 0)
    other.step()
    assert distance(_run(start, 1, min(shape), 100, weight_decay=0.1)[0], plain.detach()) > 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_6_low_rank_update(shape: tuple[int, int]) -> None:
    """One step: W - lr scale Adam(R) P, with the leading singular vectors on the shorter side; of rank 2."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    now, _, [basis] = _run(start, 1, 2, 100, scale=0.25)
    left, values, right = torch.linalg.svd(_gradient(start, 0), full_matrices=False)
    if shape[0] >= shape[1]:
        low = left[:, :2] * values[:2]
        expected = (low / (low.abs() + 1e-8)) @ right[:2]
    else:
        low = values[:2, None] * right[:2]
        expected = left[:, :2] @ (low / (low.abs() + 1e-8))
    assert basis.shape == (2, min(shape))
    assert distance(start - now, 1e-2 * 0.25 * expected) < 1e-10
    assert torch.linalg.matrix_rank(start - now, rtol=1e-8) == 2


@pytest.mark.parametrize(("shape", "rank", "moments", "basis"), [
    ((2048, 5461), 512, 5_592_064, 1_048_576), ((5461, 2048), 512, 5_592_064, 1_048_576),
    ((768, 768), 128, 196_608, 98_304)])
def test_7_state(shape: tuple[int, int], rank: int, moments: int, basis: int) -> None:
    """2 r max(m, n) + r min(m, n) numbers a matrix in place of Adam's 2 m n."""
    weight = nn.Parameter(torch.empty(shape, device="meta"))
    weight.grad = torch.empty(shape, device="meta")
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank, "scale": 1.0, "interval": 200}], lr=1e-3)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].numel() + state["exp_avg_sq"].numel() == moments == 2 * rank * max(shape)
    assert state["basis"].numel() == basis == rank * min(shape)
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "basis"}


def test_state_of_a_model() -> None:
    """All state of a run: low-rank for the projected, two moments for the rest."""
    model = make("bert")
    method = GaLore(rank=4, interval=1).attach(model)
    optimizer = method.make_optimizer(method.param_groups(), lr=1e-3)
    model(batch("bert")).square().sum().backward()
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step")
    shapes = [tuple(method.trainable()[name].shape) for name in method.projected]
    projected = sum(4 * (2 * max(shape) + min(shape)) for shape in shapes)
    trained = [p for name, p in method.trainable().items() if p.grad is not None and name not in method.projected]
    assert held == projected + sum(2 * p.numel() for p in trained)
    assert len(shapes) == 12 and held < sum(2 * p.numel() for p in method.trainable().values())


def test_basis_is_found_anew_every_interval() -> None:
    """After steps 0, 3 and 6, from the gradient of that step; the moments are not transformed."""
    start = torch.randn(8, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    _, _, bases = _run(start, 8, 2, 3)
    fresh = [step for step in range(1, 8) if not torch.equal(bases[step], bases[step - 1])]
    assert fresh == [3, 6]
    for step in (0, 3, 6):
        before = _run(start, step, 2, 3)[0] if step else start
        leading = torch.linalg.svd(_gradient(before, step), full_matrices=False)[2][:2]
        assert distance(bases[step], leading) < 1e-12
    before, old, _ = _run(start, 3, 2, 3)
    _, new, _ = _run(start, 4, 2, 3)
    low = _gradient(before, 3) @ bases[3].t()
    assert distance(new["exp_avg"], 0.9 * old["exp_avg"] + 0.1 * low) < 1e-12
    assert distance(new["exp_avg_sq"], 0.999 * old["exp_avg_sq"] + 0.001 * low.square()) < 1e-12


def test_half_precision_weights() -> None:
    """The decomposition and the moments are in float32; the weight stays in its own type."""
    weight = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
    weight.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    start = weight.detach().clone()
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 2, "scale": 1.0, "interval": 1}], lr=1e-1)
    optimizer.step()
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, start)
    assert all(optimizer.state[weight][name].dtype == torch.float32 for name in ("basis", "exp_avg", "exp_avg_sq"))
