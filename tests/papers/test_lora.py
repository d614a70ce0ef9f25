"""Checks of LoRA, rsLoRA, LoRAPlus, PiSSA, DoRA: low-rank changes; the numbers are those of the paper's checks for
every method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from core import load_adapter
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, check_effective, matrix, run, shift, vit_b16
from tests.papers.training import deep
from tests.rows import NOT_LINEAR, RANK, WIDE, Row, Variant, low_rank_count
from tests.toolkit import distance, outputs, randomize, same, snapshot

ROWS = {
    "LoRAPlus": Row(
        {"q, v": Variant(RANK, learns_on=dict.fromkeys(("timm_swin", "bert"), {"lr": 3e-3})),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=low_rank_count,
        bad=(({"rank": 0}, "rank 0"), ({"lr_ratio": 0.0}, "lr_ratio 0"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
}

LoRA: Any = method_class("LoRA")
rsLoRA: Any = method_class("rsLoRA")
LoRAPlus: Any = method_class("LoRAPlus")
PiSSA: Any = method_class("PiSSA")
DoRA: Any = method_class("DoRA")
WIDE = ("q", "mlp.up", "mlp.down")


def _on_bert(method: Any, size: float = 0.1) -> Any:
    method.attach(make("bert", dtype=torch.float64))
    randomize(method, size=size)
    return method


# ------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize(("cls", "options", "scale"), [
    (LoRA, {"rank": 4}, 1.0), (LoRA, {"rank": 3, "alpha": 6}, 2.0), (LoRAPlus, {"rank": 4, "alpha": 2}, 0.5),
    (rsLoRA, {"rank": 4, "alpha": 6}, 3.0), (rsLoRA, {"rank": 9}, 3.0)])
def test_lora_rslora_lora_plus_equation(cls: Any, options: dict[str, Any], scale: float) -> None:
    """W + (alpha / r) B A, with alpha / sqrt(r) for rsLoRA; alpha is r where it is not given."""
    for graft in _on_bert(cls(targets=WIDE, layers=(1,), **options)).grafts:
        check_effective(graft, lambda w, g=graft: w + scale * g.B @ g.A)


def test_2_lora_start() -> None:
    """B is zero; A is uniform between -1 / sqrt(in) and 1 / sqrt(in), which Kaiming's rule gives for a = sqrt 5."""
    method = LoRA(rank=16, targets=("q", "mlp.down")).attach(make("bert", width=128))
    for graft in method.grafts:
        assert not graft.B.any()
        values = graft.A.detach() * math.sqrt(graft.site.in_features)
        assert 0.99 < float(values.abs().max()) <= 1 and abs(float(values.std()) - 1 / math.sqrt(3)) < 0.02
    assert {graft.site.in_features for graft in method.grafts} == {128, 256}


def test_3_lora_first_gradients() -> None:
    """At the start B alone learns; after one step both do."""
    model, inputs = make("bert"), batch("bert")
    method = LoRA(rank=2).attach(model)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(inputs).pow(3).sum().backward()
        for graft in method.grafts:
            assert bool(graft.B.grad.any()) and bool(graft.A.grad.any()) == (step > 0)
        optimizer.step()


def test_lora_dropout_is_on_the_branch() -> None:
    """The frozen map sees all of x; its branch sees x with entries dropped and the others scaled up."""
    model = make("bert")
    method = LoRA(rank=1, dropout=0.5, targets=("q",), layers=(0,)).attach(model)
    model.train()
    graft = method.grafts[0]
    with torch.no_grad():
        graft.A.zero_()
        graft.A[0, 3] = 1.0
        x = torch.ones(1000, graft.site.in_features)
        with method.disabled():
            base = run(graft, x)
        assert torch.equal(run(graft, x), base)
        graft.B[5, 0] = 1.0
        change = run(graft, x) - base
        assert not change[:, :5].any() and not change[:, 6:].any()
        dropped = change[:, 5].abs() < 1e-4
        assert bool(((change[:, 5] - 2).abs() < 1e-4)[~dropped].all()) and 400 < int(dropped.sum()) < 600
        model.eval()
        assert bool(((run(graft, x) - base)[:, 5] - 1).abs().max() < 1e-4)


def test_lora_on_a_fused_projection() -> None:
    """One change of the whole shares A among q, k and v; changes of q and v have an A each, and k's rows stay as they
    are. The numbers of parameters are the same, the functions are not."""
    models = [make("timm_vit", dtype=torch.float64) for _ in range(2)]
    whole = LoRA(rank=4, targets=("qkv",)).attach(models[0])
    parts = LoRA(rank=4, targets=("q", "v")).attach(models[1])
    assert whole.counts() == parts.counts()
    for method in (whole, parts):
        randomize(method)
    for graft in whole.grafts:
        assert graft.A.shape == (4, 32) and graft.B.shape == (96, 4)
        check_effective(graft, lambda w, g=graft: w + g.B @ g.A)
    q, v = (next(graft for graft in parts.grafts if graft.site.name == name) for name in ("0.q", "0.v"))
    linear: Any = q.site.module
    change = torch.cat([q.B @ q.A, torch.zeros(32, 32), v.B @ v.A])
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = linear(x)
        with parts.disabled():
            base = linear(x)
        assert torch.equal(found[..., 32:64], base[..., 32:64])
        assert distance(found, base + x @ change.t()) < 1e-12
        assert torch.linalg.matrix_rank(torch.cat([change[:32], change[64:]])) == 8


def test_4_lora_merges_into_transposed_weights() -> None:
    """GPT-2's weights are [in, out]."""
    model: Any = make("gpt2", dtype=torch.float64)
    method = LoRA(rank=3, alpha=6, targets=("qkv", "mlp.down")).attach(model)
    randomize(method)
    expected = {graft.site.path: (graft.site.full_weight + 2 * (graft.B @ graft.A).t()).detach()
                for graft in method.grafts}
    assert any(value.shape[0] != value.shape[1] for value in expected.values())
    method.merge()
    for path, value in expected.items():
        assert distance(model.get_submodule(path).weight, value) < 1e-12


@pytest.mark.parametrize(("build", "count"), [(vit_b16, 1_179_648), (bert_base, 1_327_104)])
def test_1_lora_everywhere_is_in_the_blocks(build: Any, count: int) -> None:
    """Names that end in "proj" or "dense" would take the patches' convolution (1,191,936) and the pooler (1,339,392)
    along."""
    method = LoRA(targets=None).attach(build())
    assert method.counts()["method"] == count
    assert not any("patch_embed" in graft.site.path or "pooler" in graft.site.path for graft in method.grafts)


# ------------------------------------------------------------------------------------------------- rsLoRA, LoRA+


def test_rslora_keeps_the_size_of_the_change() -> None:
    """With entries of B of one size, the change is as large at rank 64 as at rank 4; LoRA's is a quarter."""
    sizes: dict[Any, list[float]] = {}
    for cls in (LoRA, rsLoRA):
        for rank in (4, 64):
            method = cls(rank=rank, alpha=8, targets=("q",), layers=(0,)).attach(make("bert", width=128))
            graft = method.grafts[0]
            with torch.no_grad():
                graft.B.normal_(generator=torch.Generator().manual_seed(0))
                x = torch.randn(500, 128, generator=torch.Generator().manual_seed(1))
                change = run(graft, x)
                with method.disabled():
                    change = change - run(graft, x)
            sizes.setdefault(cls, []).append(float(change.square().mean()))
    assert abs(sizes[rsLoRA][1] / sizes[rsLoRA][0] - 1) < 0.2
    assert abs(16 * sizes[LoRA][1] / sizes[LoRA][0] - 1) < 0.2


def test_rslora_is_lora_with_another_alpha() -> None:
    inputs, found = batch("bert"), []
    for method in (rsLoRA(rank=4, alpha=3, name="x"), LoRA(rank=4, alpha=6, name="x")):
        model = make("bert")
        randomize(method.attach(model))
        found.append(outputs(model, inputs))
    assert torch.equal(*found)


@pytest.mark.parametrize("ratio", [16.0, 4.0])
def test_lora_plus_learning_rates(ratio: float) -> None:
    """The optimizer has B at ``lr_ratio`` times A's rate; nothing else is new."""
    backbone: Any = make("bert")
    method = LoRAPlus(rank=2, lr_ratio=ratio).attach(backbone)
    assert method.counts() == LoRA(rank=2).attach(make("bert")).counts()
    groups = method.param_groups()
    fast = {id(p) for group in groups if group.get("lr_factor") == ratio for p in group["params"]}
    slow = {id(p) for group in groups if "lr_factor" not in group for p in group["params"]}
    assert fast == {id(graft.B) for graft in method.grafts} and slow == {id(graft.A) for graft in method.grafts}
    plain = LoRAPlus(rank=2, lr_ratio=1.0).attach(make("bert")).param_groups()
    assert len(plain) == 1 and "lr_factor" not in plain[0]


def test_lora_plus_in_a_run() -> None:
    """What FineTuner's optimizer makes of it: 16 times A's rate for B, and the head at the run's own."""
    tuner = deep()
    method = LoRAPlus(rank=2).attach(tuner.backbone)
    rates = {id(p): group["lr"] for group in tuner.param_groups() for p in group["params"]}
    assert {rates[id(graft.A)] for graft in method.grafts} == {1e-2}
    assert {round(rates[id(graft.B)], 9) for graft in method.grafts} == {16e-2}
    assert {rates[id(p)] for p in tuner.task.head.parameters()} == {1e-2}


# ------------------------------------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_pissa_start(alpha: float | None) -> None:
    """A_0 = sqrt(S_r / s) V_r^T and B_0 = U_r sqrt(S_r / s): s B_0 A_0 is the best approximation of rank r, what is
    left of W has the other singular values, and A's and B's rows and columns are as long as each other."""
    method = PiSSA(rank=4, alpha=alpha, targets=WIDE).attach(make("bert", dtype=torch.float64))
    scale = (alpha or 4) / 4
    for graft in method.grafts:
        u, s, v = torch.linalg.svd(matrix(graft), full_matrices=False)
        near = (u[:, :4] * s[:4]) @ v[:4]
        start = scale * graft.B.detach() @ graft.A.detach()
        assert distance(start, near) < 1e-10
        left = torch.linalg.svdvals(matrix(graft) - start)
        assert distance(left[:-4], s[4:]) < 1e-10 and float(left[-4:].max()) < 1e-10 * float(s[0])
        for gram in (graft.A @ graft.A.t(), graft.B.t() @ graft.B):
            assert distance(gram.detach(), torch.diag(s[:4] / scale)) < 1e-10


def test_pissa_equation() -> None:
    """W_res x + s B A x, W_res = W - s B_0 A_0, with the frozen weight as it was; as a change, of rank 2 r."""
    model = make("bert", dtype=torch.float64)
    before = snapshot(model)
    method = PiSSA(rank=3, alpha=6, targets=WIDE).attach(model)
    starts = [(graft.A.detach().clone(), graft.B.detach().clone()) for graft in method.grafts]
    randomize(method)
    assert same(before, snapshot(model))
    for graft, (a, b) in zip(method.grafts, starts, strict=True):
        check_effective(graft, lambda w, g=graft, a=a, b=b: (w - 2 * b @ a) + 2 * g.B @ g.A)
        up, down = graft.factors()
        assert up.shape[1] == down.shape[0] == 6
        assert distance((up @ down).detach(), (2 * (graft.B @ graft.A - b @ a)).detach()) < 1e-10


def test_2_and_3_pissa() -> None:
    """The start is the identity to the last bit, and both A and B learn from the first step on."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method = PiSSA(rank=4, targets=WIDE).attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    model(inputs).pow(3).sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in method.trainable().values())


def test_6_pissa_from_its_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is in the file: on a machine whose decomposition has other signs, the adapter is the same."""
    model, inputs = make("bert"), batch("bert")
    method = PiSSA(rank=4).attach(model)
    randomize(method)
    method.save(tmp_path)
    svd = torch.linalg.svd

    def flipped(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = svd(*args, **kwargs)
        return -u, s, -v

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    fresh = make("bert")
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


# ------------------------------------------------------------------------------------------------- DoRA


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_dora_equation(alpha: float | None) -> None:
    """m (W + s B A) / ||W + s B A|| row by row, the norm constant in backward, the bias as it was."""
    scale = (alpha or 3) / 3

    def effective(weight: Tensor, graft: Any) -> Tensor:
        moved = weight + scale * graft.B @ graft.A
        return graft.magnitude[:, None] * moved / moved.detach().square().sum(1, keepdim=True).sqrt()

    for graft in _on_bert(DoRA(rank=3, alpha=alpha, targets=WIDE)).grafts:
        assert shift(graft).any()
        check_effective(graft, lambda w, g=graft: effective(w, g))


def test_2_dora_start() -> None:
    """One magnitude for each output, its row's length; the start is the identity to the last bit."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method = DoRA(rank=3, targets=WIDE).attach(model)
    for graft in method.grafts:
        assert graft.magnitude.shape == (graft.site.out_features,)
        assert distance(graft.magnitude.detach(), matrix(graft).norm(dim=1)) < 1e-6
    assert torch.equal(outputs(model, inputs), expected)


def test_dora_norm_is_recomputed() -> None:
    """However large the change is, each row of the effective weight is as long as its magnitude."""
    for graft in _on_bert(DoRA(rank=3, targets=WIDE), size=3.0).grafts:
        rows = graft.merged(matrix(graft)).detach().norm(dim=1)
        assert distance(rows, graft.magnitude.detach().abs()) < 1e-10


def test_dora_on_a_fused_projection() -> None:
    """Magnitudes of the rows of q and v alone; k's rows stay."""
    model = make("timm_vit", dtype=torch.float64)
    method = DoRA(rank=3, targets=("q", "v"), layers=(0,)).attach(model)
    randomize(method, size=0.3)
    q, v = method.grafts
    linear: Any = q.site.module
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = linear(x)
        with method.disabled():
            base = linear(x)
        for graft, rows in ((q, slice(0, 32)), (v, slice(64, 96))):
            moved = linear.weight[rows] + graft.B @ graft.A
            weight = graft.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
            assert distance(found[..., rows], x @ weight.t() + linear.bias[rows]) < 1e-12
        assert torch.equal(found[..., 32:64], base[..., 32:64])
