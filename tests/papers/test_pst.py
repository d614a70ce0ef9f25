"""Checks of PST: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from core.anatomy import Site
from core.peft import method_class
from core.peft.selection.pst import PSTGraft, smallest
from tests.models import batch, make
from tests.papers.training import run
from tests.toolkit import distance, outputs, randomize, same, snapshot

PST: Any = method_class("PST")


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def _vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize(("build", "count"), [(_bert, 2_820_096), (_vit, 2_506_752)], ids=["bert", "vit"])
def test_1_to_2_counts(build: Any, count: int) -> None:
    """(r1 + r2 + 1) (m + n) a matrix: 65,280 from 768 to 3072. ViT's q, k and v are one."""
    with torch.device("meta"):
        model = build()
    method = PST().attach(model)
    assert method.counts()["method"] == method.counts()["stored"] == count
    up = next(graft for graft in method.grafts if graft.site.role == "mlp.up")
    assert sum(p.numel() for p in up.parameters()) == 65_280


def test_3_identity_at_start() -> None:
    """The same outputs to the bit while s = 0, in the path with gradients too."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method = PST().attach(model)
    assert method.identity_at_start and torch.equal(model(inputs).detach(), expected)
    assert not PST(initial=0.2).identity_at_start


@pytest.mark.parametrize(("sparsity", "kept"), [(0.9, 58_983), (0.0, 589_824), (0.5, 294_912)])
def test_4_exact_sparsity(sparsity: float, kept: int) -> None:
    """768 x 768 keeps m n - floor(s m n) entries, the rest is zero; equal scores are pruned in their order."""
    linear = nn.Linear(768, 768, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)))
    graft = PSTGraft(Site("one", "q", "", linear), 8, 8, (1.0, 1.0, 1.0), 1.0)
    graft.sparsity = sparsity
    assert int((graft.weight(linear.weight) != 0).sum()) == kept
    ties = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    assert smallest(ties, 3).tolist() == [[False, True, True], [False, True, False]]
    order = ties.flatten().argsort(stable=True)
    for count in range(7):
        assert set(smallest(ties, count).flatten().nonzero().flatten().tolist()) == set(order[:count].tolist())


def test_5_schedule() -> None:
    method = PST()
    method.total = 1000
    for step, expected in {0: 0, 100: 0, 250: 0.520312, 400: 0.7875, 550: 0.885938, 700: 0.9, 1000: 0.9}.items():
        assert method.sparsity_at(step) == pytest.approx(expected, abs=1e-6)


def test_6_gradients() -> None:
    """At the start U and A have none, the others do. Then all are those of: the mask's gradient is the scores',
    dL/dS = G * W', and W' has M * G and, through |W'| in S, that once more times its sign."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert", dtype=torch.float64)
    method = PST(initial=0.5, rank=3, score_rank=2, alpha1=0.7, alpha2=0.3, beta=1.5).attach(model)
    model(inputs).square().sum().backward()
    for graft in method.grafts:
        assert not graft.U.grad.any() and not graft.A.grad.any()
        assert all(bool(tensor.grad.any()) for tensor in (graft.V, graft.B, graft.R, graft.C))
    randomize(method, size=0.3)
    model.zero_grad()
    for graft in method.grafts:
        base = graft.site.matrix(graft.site.full_weight.detach())
        gradient = torch.randn(base.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        changed = (base + 1.5 * graft.U @ graft.V).detach()
        scores = changed.abs() + 0.7 * graft.A @ graft.B + 0.3 * (graft.R[:, None] + graft.C)
        mask = 1.0 - smallest(scores.detach(), int(0.5 * base.numel())).double()
        graft.weight(base).backward(gradient)
        to_scores = gradient * changed
        to_changed = mask * gradient + to_scores * changed.sign()
        for found, expected in ((graft.U, 1.5 * to_changed @ graft.V.t()), (graft.V, 1.5 * graft.U.t() @ to_changed),
                                (graft.A, 0.7 * to_scores @ graft.B.t()), (graft.B, 0.7 * graft.A.t() @ to_scores),
                                (graft.R, 0.3 * to_scores.sum(1)), (graft.C, 0.3 * to_scores.sum(0))):
            torch.testing.assert_close(found.grad, expected.detach(), rtol=1e-9, atol=1e-12)


def test_7_merged_is_a_plain_sparse_model() -> None:
    """The masked forward, the base's own keys, as many zeros; and the base again, to the bit."""
    model, inputs = make("gpt2"), batch("gpt2")
    keys, values = list(model.state_dict()), snapshot(model)
    method = PST(rank=2, score_rank=2).attach(model)
    randomize(method)
    method.prune(0.9)
    expected = outputs(model, inputs)
    sites = [graft.site for graft in method.grafts]
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-6 and list(model.state_dict()) == keys
    for site in sites:
        assert int((site.full_weight == 0).sum()) == int(0.9 * site.full_weight.numel())
    method.unmerge()
    method.remove()
    assert same(values, snapshot(model))


def test_8_mask_is_a_function_of_step_and_tensors(tmp_path: Path) -> None:
    """A run resumed in the midst of pruning ends as the unbroken one, to the bit, with the same share of zeros."""
    def pst() -> Any:
        return PST(sparsity=0.6, rank=2, score_rank=2)

    whole = run(tmp_path, pst(), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = run(tmp_path, pst(), checkpoint=tmp_path / "step=5.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    method: Any = whole.methods[0]
    assert method.sparsity == 0.6 and 0 < method.sparsity_at(5) < 0.6
    graft = method.grafts[0]
    base = graft.site.matrix(graft.site.full_weight)
    assert int((graft.weight(base) == 0).sum()) == int(0.6 * base.numel())


def test_scores_are_made_in_full_precision() -> None:
    """Under autocast the mask is what it is without."""
    model = make("timm_vit")
    method = PST(initial=0.5, rank=2).attach(model)
    randomize(method)
    for graft in method.grafts:
        base = graft.site.matrix(graft.site.full_weight.detach())
        with torch.autocast("cpu", torch.bfloat16):
            found = graft.weight(base)
        assert found.dtype == torch.float32 and torch.equal(found, graft.weight(base))
