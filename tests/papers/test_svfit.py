"""Checks of SVFit: the checks by their numbers there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_adapter
from core.anatomy import Anatomy
from core.compose import Route
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, check_effective, matrix, meta, numbers, run, shift
from tests.rows import NOT_LINEAR, WIDE, Row, Variant, target_shapes
from tests.toolkit import distance, outputs, randomize, same, snapshot, train


def svfit_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank or min(i, o) for i, o in target_shapes(anatomy, method))


ROWS = {
    "SVFit": Row(
        {"q, v": Variant(), "all": Variant({"rank": 3, **WIDE}, learns={"lr": 3e-2})},
        trained=svfit_count,
        cards=(("bert_base", {}, 18_432),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 99}, "rank 99"), ({"energy": 0.0}, "energy 0"),
             ({"energy": 0.9, "rank": 3}, "not both"), *NOT_LINEAR),
        weights=True, operators=7, saved=0.85, size=0.02, carries={"save_basis": True},
        artifact={"rank": 1},
    ),
}

SVFit: Any = method_class("SVFit")
LoRA: Any = method_class("LoRA")
WIDE = ("q", "mlp.up", "mlp.down")


def _bert_large() -> Any:
    from transformers import BertConfig, BertModel

    return meta(lambda: BertModel(BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                             intermediate_size=4096)))


@pytest.mark.parametrize(("build", "count"), [(bert_base, 18_432), (_bert_large, 49_152)])
def test_1_counts(build: Any, count: int) -> None:
    """At q and v a sixteenth of LoRA's of rank 8."""
    assert SVFit().attach(build()).counts()["method"] == count
    assert LoRA().attach(build()).counts()["method"] == 16 * count


@pytest.mark.parametrize("rank", [3, None])
def test_2_identity_at_the_start(rank: int | None) -> None:
    model, inputs = make("bert"), batch("bert")
    expected, before = outputs(model, inputs), snapshot(model)
    SVFit(rank=rank, targets=WIDE).attach(model)
    assert torch.equal(outputs(model, inputs), expected) and same(before, snapshot(model))


@pytest.mark.parametrize("rank", [3, 32])
def test_3_the_basis_is_the_weight_s(rank: int) -> None:
    """U_r and V_r are orthonormal, S_r the largest singular values, falling; at full rank nothing is left over."""
    method = SVFit(rank=rank, targets=WIDE).attach(make("bert", dtype=torch.float64))
    for graft in method.grafts:
        w, eye = matrix(graft), torch.eye(rank, dtype=torch.float64)
        assert distance(graft.U.t() @ graft.U, eye) < 1e-10 and distance(graft.V @ graft.V.t(), eye) < 1e-10
        values = torch.linalg.eigvalsh(w @ w.t() if w.shape[0] <= w.shape[1] else w.t() @ w).flip(0).sqrt()
        assert distance(graft.sigma.detach(), values[:rank]) < 1e-6 and torch.equal(graft.sigma, graft.S)
        left = w - graft.U @ torch.diag(graft.S) @ graft.V
        share = float(graft.S.square().sum() / w.square().sum())
        if rank == 32:
            assert float(left.norm() / w.norm()) < 1e-10 and abs(share - 1) < 1e-10
        else:
            assert abs(float(left.square().sum() / w.square().sum()) - (1 - share)) < 1e-10 and share < 0.9


@pytest.mark.parametrize("rank", [3, None])
def test_equation(rank: int | None) -> None:
    """x (U_r diag(sigma) V_r^T + W_e)^T + b, with W_e what the first r singular values leave; sigma may be negative."""
    method = SVFit(rank=rank, targets=WIDE).attach(make("bert", dtype=torch.float64))
    randomize(method, size=1.0)
    assert any(bool((graft.sigma < 0).any()) for graft in method.grafts)
    for graft in method.grafts:
        rest = matrix(graft) - graft.U @ torch.diag(graft.S) @ graft.V
        check_effective(graft, lambda w, g=graft, e=rest: g.U @ torch.diag(g.sigma) @ g.V + e)


def test_4_gradient() -> None:
    """dL/dsigma = diag(U_r^T G V_r) with G = dL/dW."""
    method = SVFit(rank=5, targets=WIDE).attach(make("bert", dtype=torch.float64))
    for graft in method.grafts:
        x, dy = numbers(4, graft.site.in_features), numbers(4, graft.site.out_features, seed=1)
        (run(graft, x) * dy).sum().backward()
        weight = matrix(graft).clone().requires_grad_()
        ((x @ weight.t() + shift(graft)) * dy).sum().backward()
        assert weight.grad is not None
        assert distance(graft.sigma.grad, (graft.U.t() @ weight.grad @ graft.V.t()).diag()) < 1e-10


def test_5_merge() -> None:
    model, inputs = make("bert"), batch("bert")
    before = snapshot(model)
    method = SVFit(targets=WIDE).attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-5
    method.unmerge()
    assert same(before, snapshot(model))


def test_6_signs_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs (u, v) and (-u, -v) give the same function of sigma, trained on a machine that has the one or the other."""
    inputs, found, svd = batch("bert"), [], torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = svd(*args, **kwargs)
        signs = 1 - 2 * (torch.arange(len(s)) % 2).to(u)
        return u * signs, s, signs[:, None] * v

    bases = []
    for decompose in (svd, flipped):
        monkeypatch.setattr(torch.linalg, "svd", decompose)
        model = make("bert", dtype=torch.float64)
        method = SVFit(rank=5).attach(model)
        bases.append(method.grafts[0].U)
        train(model, method, "bert", steps=3)
        found.append(outputs(model, inputs))
    assert distance(bases[0][:, 0], bases[1][:, 0]) == 0 and distance(bases[0][:, 1], -bases[1][:, 1]) == 0
    assert distance(*found) < 1e-10 and distance(found[0], outputs(make("bert", dtype=torch.float64), inputs)) > 1e-4


def _turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a decomposition finds other vectors where eight values are one: the same weight all the same."""
    svd = torch.linalg.svd

    def turned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = svd(*args, **kwargs)
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(u)).Q
        u, v = u.clone(), v.clone()
        u[:, :8], v[:8] = u[:, :8] @ turn, turn.t() @ v[:8]
        return u, s, v

    monkeypatch.setattr(torch.linalg, "svd", turned)


def test_8_the_file_holds_sigma_alone(tmp_path: Path) -> None:
    """r numbers a target; a fresh base gives the same outputs, for it has the same basis."""
    model, inputs = make("bert"), batch("bert")
    method = SVFit().attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path)
    kept = load_file(tmp_path / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in kept} == {"sigma"} and all(t.numel() == 32 for t in kept.values())
    assert method.counts()["stored"] == method.counts()["method"] == sum(t.numel() for t in kept.values())
    fresh = make("bert")
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), expected)


@pytest.mark.parametrize("save_basis", [False, True])
def test_6_another_basis_is_noticed(save_basis: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With repeated singular values the directions are anybody's. On a machine that finds others a file of sigma alone
    is refused; one that holds its basis gives the same outputs, also when it is saved again."""
    model, inputs = _repeated(), batch("bert")
    method = SVFit(rank=6, targets=("q",), save_basis=save_basis).attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path / "one")
    fresh, anew = _repeated(), _repeated()
    names = {name.rpartition(".")[2] for name in load_file(tmp_path / "one" / "adapter.safetensors")}
    assert names == ({"U", "V", "S", "sigma"} if save_basis else {"sigma"})
    _turned(monkeypatch)
    if not save_basis:
        before = snapshot(fresh)
        with pytest.raises(ScionError, match="singular vectors of .*query.weight here are not those.*save_basis=True"):
            load_adapter(tmp_path / "one", fresh)
        assert same(before, snapshot(fresh)) and "peft" not in dict(fresh.named_children())
        return
    load_adapter(tmp_path / "one", fresh).save(tmp_path / "two")
    assert distance(outputs(fresh, inputs), expected) < 1e-6
    loaded = load_adapter(tmp_path / "two", anew)
    assert distance(outputs(anew, inputs), expected) < 1e-6
    with torch.no_grad():
        other = SVFit(rank=6, targets=("q",), name="other").attach(_repeated())
        for mine, theirs in zip(loaded.grafts, other.grafts, strict=True):
            theirs.sigma.copy_(mine.sigma)
        assert distance(outputs(other.root, inputs), expected) > 1e-5  # what sigma alone would have given


def test_6_another_basis_is_noticed_in_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fresh = _repeated(), _repeated()
    SVFit(rank=6, targets=("q",)).attach(model)
    _turned(monkeypatch)
    SVFit(rank=6, targets=("q",)).attach(fresh)
    with pytest.raises(ScionError, match="singular vectors"):
        fresh.load_state_dict(model.state_dict())


def test_a_file_of_an_earlier_version_holds_its_basis(tmp_path: Path) -> None:
    """Its record says nothing of one; alone, and as a variant of a Route."""
    model, inputs = make("bert"), batch("bert")
    method = SVFit(rank=3, save_basis=True).attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path / "old")
    record = json.loads((tmp_path / "old" / "adapter.json").read_text())
    for option in ("energy", "save_basis"):
        del record["methods"][0]["config"][option]
    record["methods"][0]["structure"] = {}
    (tmp_path / "old" / "adapter.json").write_text(json.dumps(record))
    fresh = make("bert")
    load_adapter(tmp_path / "old", fresh)
    assert distance(outputs(fresh, inputs), expected) < 1e-6
    fresh = make("bert")
    route = Route([{"adapter": str(tmp_path / "old"), "name": "one"}, LoRA(name="two")]).attach(fresh)
    assert distance(outputs(fresh, inputs), expected) < 1e-6
    route.save(tmp_path / "route")
    again = make("bert")
    load_adapter(tmp_path / "route", again)
    assert distance(outputs(again, inputs), expected) < 1e-6


def test_in_a_route_the_basis_is_noticed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = SVFit(rank=6, targets=("q",)).attach(_repeated())
    method.save(tmp_path)
    bases = [_repeated(), _repeated()]
    Route([str(tmp_path), LoRA()]).attach(bases[0]).save(tmp_path / "route")
    _turned(monkeypatch)
    with pytest.raises(ScionError, match="singular vectors"):
        Route([str(tmp_path), LoRA()]).attach(bases[1])
    with pytest.raises(ScionError, match="singular vectors"):
        load_adapter(tmp_path / "route", bases[1])


@pytest.mark.parametrize("save_basis", [False, True])
def test_3_rank_by_energy(save_basis: bool, tmp_path: Path) -> None:
    """As many of the largest values as hold the share of the sum of all squares, in each target."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert")
    method = SVFit(energy=0.7, targets=WIDE, save_basis=save_basis).attach(model)
    for graft in method.grafts:
        values = torch.linalg.svdvals(matrix(graft)).square()
        r = len(graft.S)
        assert values[:r].sum() >= 0.7 * values.sum() > values[:r - 1].sum() and 1 < r < 32
    assert len({len(graft.S) for graft in method.grafts}) > 1
    assert all(len(graft.S) == 32 for graft in SVFit(energy=1.0).attach(make("bert")).grafts)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path)
    fresh = make("bert", dtype=torch.float64)
    load_adapter(tmp_path, fresh)
    assert distance(outputs(fresh, inputs), expected) < 1e-12


def _repeated() -> Any:
    """A model whose query projections have eight equal largest singular values."""
    model: Any = make("bert")
    for layer in model.model.encoder.layer:
        linear = layer.attention.self.query
        u, s, v = torch.linalg.svd(linear.weight.detach())
        s[:8] = s[0]
        with torch.no_grad():
            linear.weight.copy_((u * s) @ v)
    return model


def test_7_fused_projection() -> None:
    """One decomposition of the whole is not that of its parts: the same energy, other values."""
    whole = SVFit(targets=("qkv",), layers=(0,)).attach(make("timm_vit", dtype=torch.float64)).grafts[0]
    parts = SVFit(targets=("q", "k", "v"), layers=(0,)).attach(make("timm_vit", dtype=torch.float64)).grafts
    energy = sum(float(graft.S.square().sum()) for graft in parts)
    assert abs(energy / float(whole.S.square().sum()) - 1) < 1e-10
    largest = torch.cat([graft.S for graft in parts]).sort(descending=True).values[:32]
    assert whole.U.shape == (96, 32) and distance(largest, whole.S) > 1e-2


def test_head_learns_slower_than_sigma() -> None:
    assert SVFit.recommended["head_lr"] == 0.1 * SVFit.recommended["lr"]


def test_9_sigma_is_not_decayed() -> None:
    """Decay towards zero would shrink the backbone."""
    method = SVFit().attach(make("bert"))
    groups = method.param_groups()
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.0
    assert {id(p) for p in groups[0]["params"]} == {id(graft.sigma) for graft in method.grafts}


def test_half_precision_base() -> None:
    """The decomposition is in float32, and the start is exact all the same, since W itself stays."""
    model = make("bert", dtype=torch.bfloat16)
    inputs = batch("bert")
    expected = outputs(model, inputs)
    method = SVFit().attach(model)
    assert all(graft.sigma.dtype == graft.U.dtype == torch.float32 for graft in method.grafts)
    assert torch.equal(outputs(model, inputs), expected)
