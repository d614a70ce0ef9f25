"""Invariants 13 to 22: what moves in training, and what does not."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from core.graft import checkpoint_activations
from core.method.training_checks import GRADIENT_STEPS
from tests.methods import Cell
from tests.models import EVERY_FAMILY, FAMILIES, batch, make
from tests.toolkit import (
    LIGHT,
    Plain,
    invariant,
    loader,
    loss_of,
    optimizer_of,
    outputs,
    problem,
    randomize,
    same,
    seeded,
    snapshot,
    train,
    trainer,
)


def _gradients(model: nn.Module, names: Any) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {name: torch.zeros_like(p) if (p := parameters[name]).grad is None else p.grad.clone() for name in names}


def _close(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> bool:
    """Whether gradients agree, relative to the largest of them."""
    scale = max((gradient.abs().max().item() for gradient in two.values()), default=1.0)
    return all((one[name] - two[name]).abs().max().item() <= tolerance * scale for name in two)


@invariant(13, "each trained tensor gets a gradient, no frozen one")
def test_gradients(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    batches, head = problem(cell.family)
    optimizer = optimizer_of(method, lr=1e-2)
    model.train()
    trained = method.trainable()
    waiting = {name for name in trained if name not in method.idle()}
    with seeded(0):
        for step in range(GRADIENT_STEPS):
            loss = loss_of(model, head, *batches[step % 2])
            assert loss.requires_grad == bool(trained)
            if loss.requires_grad:
                loss.backward()
            waiting -= {name for name in waiting if (g := trained[name].grad) is not None
                        and (name in method.resting() or bool(g.any()))}
            assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
            optimizer.step()
            optimizer.zero_grad()
    assert not waiting


@invariant(14, "gradcheck in float64", where=lambda cell: cell.trains, families=LIGHT)
def test_gradcheck(cell: Cell) -> None:
    model, inputs = make(cell.family, dtype=torch.float64), batch(cell.family, 2, dtype=torch.float64)
    method = cell.attach(model, **({"dropout": 0.0} if "dropout" in cell.new().config else {}))
    randomize(method)
    names = [name for name in method.trainable() if not name.endswith(cell.row.stopped or ("\0",))]

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,))

    tensors = tuple(method.trainable()[name].detach().clone().requires_grad_() for name in names)
    assert gradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-6, fast_mode=True)


@invariant(15, "only declared tensors move")
def test_only_declared_move(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    base = {**snapshot(model), **{name: p.detach().clone() for name, p in model.named_parameters()}}
    start = {name: base[name] for name in method.start}
    assert same(start, {name: value.to(base[name]) for name, value in method.start.items()})
    train(model, method, cell.family, steps=3, weight_decay=0.1)
    trained = method.trainable()
    now = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    moved = {name for name, value in base.items() if not torch.equal(value, now[name])}
    entries = method.resting() - set(method.start)
    assert set(trained) - method.idle() - entries <= moved <= set(trained)
    assert same(start, {name: value.to(base[name]) for name, value in method.start.items()})


@invariant(16, "halves a 2-batch loss in 30 recommended steps", where=lambda cell: cell.trains, families=LIGHT)
def test_learns(cell: Cell) -> None:
    """A frozen random head of unit variance, 2 batches of 2 with random labels, the method's own learning rate."""
    model = make(cell.family)
    method = cell.attach(model, **cell.learns)
    batches, head = problem(cell.family)

    both = tuple(torch.cat(part) for part in zip(*batches, strict=True))

    def loss() -> Tensor:
        return loss_of(model, head, *both)

    with seeded(0):
        start = loss().item()
        optimizer = optimizer_of(method)
        model.train()
        for _ in range(EVERY_FAMILY[cell.family].steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        model.eval()
        assert loss().item() < 0.5 * start


@invariant(17, "optimizer holds the trained tensors, once each")
def test_parameter_groups(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model)
    groups = method.param_groups()
    held = [tensor for group in groups for tensor in group["params"]]
    assert len(held) == len({id(tensor) for tensor in held})
    assert {id(tensor) for tensor in held} == {id(tensor) for tensor in method.trainable().values()}
    for group in groups:
        assert group["params"]
        assert all((tensor.dim() > 1 if cell.row.decays is None else cell.row.decays) == (
            group.get("weight_decay") != 0.0) for tensor in group["params"])


@invariant(18, "activation checkpointing changes nothing", where=lambda cell: cell.trains, families=LIGHT)
def test_checkpointing(cell: Cell) -> None:
    """For one forward, and for two before one backward; dropout draws the same in the recomputation."""
    model = make(cell.family)
    method = cell.attach(model)
    randomize(method)
    batches, head = problem(cell.family)
    model.train()
    found = []
    for on in (False, True):
        checkpoint_activations(model, on)
        for forwards in (1, 2):
            with seeded(0):
                losses = [loss_of(model, head, *samples) for samples in batches[:forwards]]
                model.zero_grad()
                torch.stack(losses).sum().backward()
            found.append(_gradients(model, method.trainable()))
    checkpoint_activations(model, False)
    assert any(bool(gradient.any()) for gradient in found[0].values())
    assert _close(found[2], found[0], 1e-6) and _close(found[3], found[1], 1e-6)


@invariant(19, "two half batches equal one", where=lambda cell: cell.trains)
def test_accumulation(cell: Cell) -> None:
    model = make(cell.family)
    method = cell.attach(model, backbone_mode="eval", **cell.quiet)
    randomize(method)
    [(inputs, labels), _], head = problem(cell.family, size=4)
    model.train()
    loss_of(model, head, inputs, labels).backward()
    whole = _gradients(model, method.trainable())
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (loss_of(model, head, inputs[part], labels[part]) / 2).backward()
    assert _close(_gradients(model, method.trainable()), whole, 1e-5)


@invariant(20, "one seed, one checkpoint", families=LIGHT)
def test_reproducible(cell: Cell, tmp_path: Any) -> None:
    found = []
    for run in range(2):
        module = Plain(make(cell.family))
        method = cell.attach(module.backbone)
        with seeded(7):
            fit = trainer(tmp_path, method, max_steps=3)
            fit.fit(module, loader(cell.family))
            fit.save_checkpoint(tmp_path / "run.ckpt")
        found.append((tmp_path / "run.ckpt").read_bytes())
        torch.rand(run + 1)
    first, second = found
    assert first == second


@invariant(21, "schedules follow their formula", where=lambda cell: cell.row.schedule is not None)
def test_schedule(cell: Cell) -> None:
    assert cell.row.schedule is not None
    cell.row.schedule()


@invariant(22, "no noise in eval mode")
def test_eval_is_quiet(cell: Cell) -> None:
    model, inputs = make(cell.family), batch(cell.family)
    method = cell.attach(model)
    randomize(method)
    assert torch.equal(outputs(model, inputs), outputs(model, inputs))
    model.train()
    with seeded(0):
        noisy = not torch.equal(outputs(model, inputs), outputs(model, inputs))
    trunk = method.backbone_mode == "train" and _is_noisy(cell.family)
    assert noisy == (trunk or bool(method.config.get("dropout")) or cell.row.variants[cell.variant].noise)


@functools.cache
def _is_noisy(family: str) -> bool:
    """Whether a family's own model draws anything in training: drop-path or dropout."""
    model, inputs = make(family).train(), batch(family)
    with seeded(0):
        return not torch.equal(outputs(model, inputs), outputs(model, inputs))


def test_which_families_are_noisy() -> None:
    noisy = [family for family in FAMILIES if _is_noisy(family)]
    assert noisy == ["timm_swin", "bert", "t5"]


@invariant(22, "no noise in eval mode")
def test_frozen_parts_stay_in_eval(cell: Cell) -> None:
    """The backbone's modules, after ``train()`` on anything around them; ``backbone_mode="train"`` opts out."""
    for mode in ("eval", "train"):
        module = Plain(make(cell.family))
        method: Any = cell.attach(module.backbone, backbone_mode=mode)
        module.train()
        own = [m for name, m in module.backbone.named_modules() if name and not name.startswith("peft")]
        assert {m.training for m in own} == {mode == "train"}
        assert method.module.training and module.backbone.training and module.head.training
        module.eval()
        assert not any(m.training for m in module.modules())


def test_gradients_of_dora_with_its_norm_held() -> None:
    """14: DoRA's A and B have the gradient of the formula in which the norm is a constant."""
    cell = Cell("DoRA", "q, v", "ast")
    model, inputs = make("ast", dtype=torch.float64), batch("ast", 2, dtype=torch.float64)
    method = cell.attach(model, targets=("mlp.up",), layers=(0,))
    randomize(method)
    reference = copy.deepcopy(model)
    model(inputs).square().sum().backward()

    [graft] = method.grafts
    mine: Any = reference.get_submodule("peft.DoRA").get_submodule(next(iter(dict(method.module.named_children()))))
    linear: Any = graft.site.module
    down, up, magnitude = (getattr(mine, name).detach().clone().requires_grad_() for name in ("A", "B", "magnitude"))
    direction = linear.weight.detach() + graft.scale * up @ down  # type: ignore[operator]
    weight = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    plain = make("ast", dtype=torch.float64)
    functional_call(plain, {f"{graft.site.path}.weight": weight}, (inputs,)).square().sum().backward()
    for name, expected in (("A", down), ("B", up), ("magnitude", magnitude)):
        found = getattr(graft, name).grad
        assert torch.allclose(found, expected.grad, rtol=1e-9, atol=1e-12), name
