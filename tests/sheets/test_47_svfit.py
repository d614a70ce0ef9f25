"""Sheet 47, SVFit: the checks by their numbers there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_adapter
from core.peft import method_class
from tests.models import batch, make
from tests.sheets.sites import bert_base, check_effective, matrix, meta, numbers, run, shift
from tests.toolkit import distance, outputs, randomize, same, snapshot, train

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


def test_6_and_8_the_file_holds_its_basis(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With repeated singular values the directions are anybody's: a fresh base on a machine that finds others gives
    the same outputs from the file. Trained are r numbers a target, and the file says so."""
    model, inputs = _repeated(), batch("bert")
    method = SVFit(rank=6, targets=("q",)).attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    method.save(tmp_path)
    fresh, anew = _repeated(), _repeated()
    kept = load_file(tmp_path / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in kept} == {"U", "V", "S", "sigma"}
    assert method.counts()["method"] == 12 and all(t.numel() == 6 for t in method.trainable().values())
    svd = torch.linalg.svd

    def turned(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = svd(*args, **kwargs)
        turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).to(u)).Q
        u, v = u.clone(), v.clone()
        u[:, :8], v[:8] = u[:, :8] @ turn, turn.t() @ v[:8]  # the same weight, where eight values are one
        return u, s, v

    monkeypatch.setattr(torch.linalg, "svd", turned)
    loaded = load_adapter(tmp_path, fresh)
    assert distance(outputs(fresh, inputs), expected) < 1e-6
    other = SVFit(rank=6, targets=("q",)).attach(anew)
    with torch.no_grad():
        for mine, theirs in zip(loaded.grafts, other.grafts, strict=True):
            theirs.sigma.copy_(mine.sigma)
    assert distance(outputs(anew, inputs), expected) > 1e-5  # what a file of sigma alone would have given


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
