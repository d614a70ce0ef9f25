"""Checks of LTSFT: what the entry and the authors' description of its two stages demand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import load_adapter, peft
from core.anatomy import Anatomy
from core.errors import ScionError
from core.method import key_of
from core.peft import LTSFT, LoRA  # type: ignore[attr-defined]
from tests.models import batch, make
from tests.rows import FEW, Row, Variant, to_sparse, whole_count
from tests.toolkit import distance, outputs, randomize, same, snapshot, train


def ltsft_count(anatomy: Anatomy, method: Any) -> int:
    if method.stage == "dense":
        return whole_count(anatomy, method)
    return method.count or round(method.density * anatomy.size)


def mask_follows_formula() -> None:
    """LT-SFT: the mask is the K largest moves over all tensors together."""
    model = make("timm_vit")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method: Any = peft.method_class("LTSFT")(count=100).attach(model)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter += torch.randn(parameter.shape, generator=generator)
    moves = torch.cat([(method.trainable()[name] - value).abs().flatten() for name, value in start.items()])
    expected = set(moves.argsort(descending=True)[:100].tolist())
    method.advance()
    offsets, total = {}, 0
    for name, value in start.items():
        offsets[key_of(name)] = total
        total += value.numel()
    found = {offsets[key] + int(i) for key, graft in method.module.named_children() for i in graft.index}
    assert found == expected


ROWS = {
    "LTSFT": Row(
        {"dense": Variant({"density": 0.01}), "sparse": Variant({"density": 0.01}, to_sparse, everywhere=True,
                                                                   moves_base=False, learns={"density": 1.0})},
        trained=ltsft_count,
        bad=(({"density": 0.0}, "density 0"), ({"density": 1.5}, "density 1.5"), ({"count": 0}, "count 0"),
             ({"count": 10**9}, "count 1000000000"), ({"count": 10, "density": 0.5}, "not both")),
        operators=1, stored=2.0,
        schedule=mask_follows_formula,
        artifact={"density": None, "count": 64, **FEW},
    ),
}

FAMILY = "bert"


def dense(model: nn.Module, **options: Any) -> LTSFT:
    """LT-SFT after a dense stage of 3 steps."""
    method = LTSFT(**({"count": 200} | options)).attach(model)
    train(model, method, FAMILY)
    return method


def diff(model: nn.Module, method: LTSFT) -> dict[str, Tensor]:
    """phi = theta - theta_0 of the sparse stage, as whole tensors."""
    parameters = dict(model.named_parameters())
    return {graft.site.weight_name: graft.weight(parameters[graft.site.weight_name]).detach()
            - parameters[graft.site.weight_name] for graft in method.grafts}


def test_rewinds_bit_exactly_before_the_sparse_stage() -> None:
    model = make(FAMILY)
    start, inputs = snapshot(model), batch(FAMILY)
    expected = outputs(model, inputs)
    method = dense(model)
    assert not same(start, snapshot(model))
    method.advance()
    assert same(start, snapshot(model)) and torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_nothing_outside_the_mask_moves(weight_decay: float) -> None:
    """Not under momentum or decoupled weight decay either."""
    model = make(FAMILY)
    start = snapshot(model)
    method = dense(model)
    method.advance()
    train(model, method, FAMILY, steps=5, weight_decay=weight_decay)
    assert same(start, snapshot(model))
    phi = diff(model, method)
    changed = sum(int((delta != 0).sum()) for delta in phi.values())
    assert 0 < changed <= 200
    merged = make(FAMILY)
    method.merge()
    for name, parameter in merged.named_parameters():
        outside = phi.get(name, torch.zeros_like(parameter)) == 0
        assert torch.equal(model.get_parameter(name)[outside], parameter[outside])


def test_mask_has_exactly_count_entries_even_with_ties() -> None:
    """Every entry moved alike: the threshold alone would free them all."""
    method = LTSFT(count=50).attach(make(FAMILY))
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.5
    method.advance()
    assert sum(tensor.numel() for tensor in method.trainable().values()) == 50


def test_more_than_there_is_refuses() -> None:
    total = sum(p.numel() for p in make(FAMILY).parameters())
    LTSFT(count=total).attach(make(FAMILY))
    with pytest.raises(ScionError, match=f"count {total + 1} is more than the {total}"):
        LTSFT(count=total + 1).attach(make(FAMILY))
    fewer = sum(p.numel() for name, p in make(FAMILY).named_parameters() if "Norm" not in name)
    with pytest.raises(ScionError, match=f"{fewer}"):
        LTSFT(count=fewer + 1, exclude=("norm1", "norm2", "norm")).attach(make(FAMILY))


def test_the_last_stage_is_the_last() -> None:
    method = dense(make(FAMILY))
    method.advance()
    with pytest.raises(ScionError, match="last"):
        method.advance()


def test_composition_commutes_and_reverts() -> None:
    """Apply RM then LM == LM then RM; taking both away gives the start values, bit for bit."""
    inputs = batch(FAMILY)

    def run(order: str) -> tuple[nn.Module, dict[str, LTSFT], Tensor]:
        model = make(FAMILY)
        methods: dict[str, LTSFT] = {}
        for name in order:
            methods[name] = LTSFT(count=200, name=name).attach(model)
            generator = torch.Generator().manual_seed(ord(name))
            with torch.no_grad():
                for tensor in methods[name].trainable().values():
                    tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
            methods[name].advance()
            randomize(methods[name], seed=ord(name))
        return model, methods, outputs(model, inputs)

    model, methods, one = run("lr")
    _, _, two = run("rl")
    assert distance(one, two) < 1e-6
    start = snapshot(make(FAMILY))
    for name in "lr":
        methods[name].merge()
    assert distance(outputs(model, inputs), one) < 1e-5
    for name in "rl":
        methods[name].unmerge()
    assert same(start, snapshot(model)) and torch.equal(outputs(model, inputs), one)


def test_sparse_diff_round_trips(tmp_path: Any) -> None:
    model, inputs = make(FAMILY), batch(FAMILY)
    method = dense(model)
    method.advance()
    train(model, method, FAMILY)
    phi = diff(model, method)
    method.save(tmp_path)
    fresh = make(FAMILY)
    loaded = load_adapter(tmp_path, fresh)
    assert isinstance(loaded, LTSFT) and loaded.stage == "sparse"
    assert same(phi, diff(fresh, loaded)) and torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_ranking_mask_on_a_frozen_language_mask() -> None:
    """theta_0 of the second method is the backbone with the first method's phi."""
    model, inputs = make(FAMILY), batch(FAMILY)
    language = dense(model, name="language")
    language.advance()
    randomize(language)
    expected = outputs(model, inputs)
    frozen = {name: tensor.clone() for name, tensor in language.tensors().items()}
    language.freeze()
    ranking = LTSFT(count=100, name="ranking").attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    train(model, ranking, FAMILY)
    ranking.advance()
    assert torch.equal(outputs(model, inputs), expected)
    train(model, ranking, FAMILY)
    assert same(frozen, language.tensors()) and distance(outputs(model, inputs), expected) > 1e-4
    with ranking.disabled():
        assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_l1_to_the_start(stage: str) -> None:
    """lambda sum |theta - theta_0| / N, N the number of all parameters, with a factor for each stage."""
    model = make(FAMILY)
    total = sum(p.numel() for p in model.parameters())
    start = snapshot(model)
    method = LTSFT(count=200, l1_dense=0.1, l1_sparse=0.3).attach(model)
    train(model, method, FAMILY)
    moved: dict[str, Tensor] = {n: p.detach() - start[n] for n, p in model.named_parameters() if n in start}
    factor = 0.1
    if stage == "sparse":
        method.advance()
        randomize(method)
        moved, factor = diff(model, method), 0.3
    term = method.loss_terms(None, None, None)
    assert term is not None
    expected = factor * torch.stack([delta.abs().sum() for delta in moved.values()]).sum() / total
    torch.testing.assert_close(term.detach(), expected, rtol=1e-5, atol=0)
    term.backward()
    assert all(t.grad is not None for t in method.trainable().values())
    assert LTSFT(count=200).attach(make(FAMILY)).loss_terms(None, None, None) is None  # type: ignore[attr-defined]


def test_shares_are_of_all_parameters() -> None:
    """N of the regulariser and the base of density are the whole model's, whatever may be chosen from."""
    exclude = ("q", "k", "v", "mlp.up", "mlp.down")
    model = make(FAMILY)
    total = sum(p.numel() for p in model.parameters())
    method = LTSFT(density=0.01, l1_dense=0.1, exclude=exclude).attach(model)
    choice = method.counts()["method"]
    assert choice < 0.7 * total
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.5
    assert abs(float(method.loss_terms(None, None, None)) - 0.1 * 0.5 * choice / total) < 1e-6
    method.advance()
    assert method.counts()["method"] == round(0.01 * total)
    method = LTSFT(density=1.0, exclude=exclude).attach(make(FAMILY))
    method.advance()
    assert method.counts()["method"] == choice


def test_head_rewinds_apart() -> None:
    """What another method or the head trains is not LT-SFT's to choose from or to rewind."""
    model = make(FAMILY)
    lora = LoRA(rank=2).attach(model)
    randomize(lora)
    values = {name: tensor.clone() for name, tensor in lora.tensors().items()}
    method = LTSFT(count=100).attach(model)
    assert not any(name.startswith("peft.LoRA") for name in method.trainable())
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.1
    method.advance()
    assert same(values, lora.tensors())
