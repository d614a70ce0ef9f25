"""Checks of PST: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from core import peft
from core.anatomy import Anatomy, Site
from core.peft import method_class
from core.peft.selection.pst import PSTGraft, smallest
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import NOT_LINEAR, WIDE, Row, Variant, planned_shapes
from tests.toolkit import distance, outputs, randomize, same, snapshot


def pst_count(anatomy: Anatomy, method: Any) -> int:
    return sum((method.rank + method.score_rank + 1) * (i + o) for i, o in planned_shapes(anatomy, method))


def sparsity_follows_formula() -> None:
    """PST: the cubic rise, and as many zeros in each effective weight, those of the smallest scores."""
    method: Any = peft.method_class("PST")(sparsity=0.8, warmup=2, cooldown=3, rank=2)  # type: ignore[call-arg]
    method.attach(make("timm_vit"))
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.01)
    method.follow(optimizer, total=15)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 16):
        for tensor in method.trainable().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()
        share = 0.8 - 0.8 * (1 - min(max(step - 2, 0), 10) / 10) ** 3
        assert abs(method.sparsity - share) < 1e-12
        for graft in method.grafts:
            base = graft.site.matrix(graft.site.full_weight.detach())
            changed = base + graft.U @ graft.V
            scores = changed.abs() + graft.A @ graft.B + graft.R[:, None] + graft.C
            order = scores.flatten().argsort(stable=True)[:int(method.sparsity * base.numel())]
            expected = changed.detach().flatten().index_fill(0, order, 0.0).view_as(base)
            torch.testing.assert_close(graft.weight(base).detach(), expected)


ROWS = {
    "PST": Row(
        {"dense": Variant({"rank": 2, "score_rank": 2}, learns={"lr": 1e-3}),
         "pruned": Variant({"rank": 2, "score_rank": 3, "initial": 0.4, "sparsity": 0.6, "alpha2": 0.5, **WIDE},
                           learns={"lr": 3e-3})},
        trained=pst_count,
        cards=(("vit_b16", {}, 2_506_752), ("bert_base", {}, 2_820_096)),
        bad=(({"rank": 0}, "rank 0"), ({"score_rank": 0}, "score_rank 0"), ({"sparsity": 1.0}, "sparsity 1"),
             ({"initial": 0.95}, "initial 0.95"), ({"warmup": 0.8}, "warmup 0.8"), ({"spread": 0.0}, "spread 0"),
             *NOT_LINEAR),
        random=True, weights=True, commutes=None, operators=34, saved=1.09,
        absent=("test_gradcheck",),  # as RAMT
        schedule=sparsity_follows_formula,
        artifact={"rank": 1, "score_rank": 1},
    ),
}

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
