"""Checks of Bone, Bat: the checks by their numbers there (1 and 3 are in the published counts as well)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bare, check_effective, matrix, numbers, run, vit_b16
from tests.rows import NOT_LINEAR, Row, Variant, planned_shapes
from tests.toolkit import distance, outputs, randomize, same, snapshot


def bone_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (method.columns or o) for _, o in planned_shapes(anatomy, method))


def bat_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (o if method.group == "outputs" else i) for i, o in planned_shapes(anatomy, method))


ROWS = {
    "Bone": Row(
        {"all": Variant({"rank": 4}),
         "mini": Variant({"rank": 5, "columns": 8, "targets": ("q", "v")}, learns={"lr": 3e-3})},
        trained=bone_count,
        cards=(("vit_b16", {}, 5_308_416),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 10**6}, "inputs"), ({"rank": 2, "columns": 7}, "columns 7"),
             *NOT_LINEAR),
        weights=True, operators=8, saved=0.9, size=0.01,
        artifact={"rank": 1},
    ),
    "Bat": Row(
        {"outputs": Variant({"rank": 2}), "inputs": Variant({"rank": 4, "group": "inputs", "targets": ("q", "v")})},
        trained=bat_count,
        cards=(("vit_b16", {}, 5_308_416), ("vit_b16", {"group": "inputs"}, 4_128_768)),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 7}, "rank 7"), ({"group": "rows"}, "'rows'"), *NOT_LINEAR),
        weights=True, commutes=False, operators=14, saved=1.0,
        artifact={"rank": 1},
    ),
}

Bone: Any = method_class("Bone")
Bat: Any = method_class("Bat")
LoRA: Any = method_class("LoRA")
ALL = [Bone(rank=5), Bone(rank=5, columns=8), Bat(rank=4), Bat(rank=4, group="inputs")]


def _tiled(d: Tensor, out: int, inputs: int) -> Tensor:
    """[D^T D^T ...], cut to the inputs; the columns of D are repeated along the outputs."""
    rank, columns = d.shape
    return d[torch.arange(inputs) % rank][:, torch.arange(out) % columns].t()


def _blockwise(weight: Tensor, q: Tensor, rank: int, group: str) -> Tensor:
    """W_ac + W_ac Q + Q, block by block, Q_a for the blocks a of outputs or Q_c for those of inputs."""
    changed = weight.clone()
    for a in range(weight.shape[0] // rank):
        for c in range(weight.shape[1] // rank):
            rows, columns = slice(a * rank, (a + 1) * rank), slice(c * rank, (c + 1) * rank)
            block = q[a if group == "outputs" else c]
            changed[rows, columns] = weight[rows, columns] + weight[rows, columns] @ block + block
    return changed


def _attached(method: Any, size: float = 0.1) -> Any:
    method = type(method)(**method.config).attach(make("bert", dtype=torch.float64))
    randomize(method, size=size)
    return method


# ------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("method", ALL[:2], ids=repr)
def test_bone_equation(method: Any) -> None:
    """W x + b + D^T times the sum of x's chunks, the last one padded with zeros: 5 divides neither 32 nor 64."""
    for graft in _attached(method).grafts[::3]:
        check_effective(graft, lambda w, g=graft: w + _tiled(g.D, *w.shape))


@pytest.mark.parametrize("method", ALL[2:], ids=repr)
def test_bat_equation(method: Any) -> None:
    """W_ac (I + Q) + Q: the block multiplies from the right, and which axis it is grouped by matters."""
    for graft in _attached(method).grafts[::3]:
        check_effective(graft, lambda w, g=graft: _blockwise(w, g.Q, 4, method.group))
        other = {"outputs": "inputs", "inputs": "outputs"}[method.group]
        if graft.site.in_features == graft.site.out_features:
            wrong = _blockwise(matrix(graft), graft.Q.detach(), 4, other)
            assert distance(graft.merged(matrix(graft)).detach(), wrong) > 1e-2


# ------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize(("method", "count"), [
    (Bat(), 5_308_416), (Bat(group="inputs"), 4_128_768)], ids=repr)
def test_2_counts_of_a_vit(method: Any, count: int) -> None:
    assert method.attach(vit_b16()).counts()["method"] == count
    linear = [(graft.site.in_features, graft.site.out_features) for graft in method.grafts]
    assert (len(linear), sum(i for i, _ in linear), sum(o for _, o in linear)) == (48, 64_512, 82_944)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_4_identity_at_the_start(method: Any) -> None:
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    type(method)(**method.config).attach(model)
    assert torch.equal(outputs(model, inputs), expected)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_5_merge(method: Any) -> None:
    """The merged model is the same function; it is given back bit for bit, and as (W' - Q) (I + Q)^-1 too."""
    model, inputs = make("bert"), batch("bert")
    method = type(method)(**method.config).attach(model)
    before = snapshot(model)
    randomize(method, size=0.02)
    expected = outputs(model, inputs)
    weights = [matrix(graft).clone() for graft in method.grafts]
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-5
    for graft, weight in zip(method.grafts, weights, strict=True):
        merged = matrix(graft)
        if isinstance(method, Bat):
            group = method.group
            blocks = merged.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)  # [a, c, 4, 4]
            q = graft.Q.detach()[:, None] if group == "outputs" else graft.Q.detach()[None]
            back = ((blocks - q) @ torch.linalg.inv(torch.eye(4) + q)).transpose(1, 2).flatten(2).flatten(0, 1)
            assert distance(back, weight) < 1e-4
        else:
            assert distance(merged - _tiled(graft.D.detach(), *merged.shape), weight) < 1e-6
    method.unmerge()
    assert same(before, snapshot(model))


def test_5_merge_of_widths_that_do_not_divide() -> None:
    """770 inputs in chunks of 64; the weight that is given stays as it is."""
    graft = bare(Bone(rank=64), nn.Linear(770, 24).double())
    with torch.no_grad():
        graft.D.copy_(numbers(64, 24))
    weight, x = matrix(graft), numbers(7, 770, seed=1)
    kept = weight.clone()
    merged = graft.merged(weight).detach()
    assert torch.equal(weight, kept)
    assert distance(x @ merged.t() + graft.site.bias.detach(), run(graft, x).detach()) < 1e-12
    assert distance((merged - weight)[:, 768:], graft.D.detach().t()[:, :2]) < 1e-12


def test_6_rank_and_period() -> None:
    """The change has at most rank r, and its columns j and j + r are the same."""
    for graft in _attached(Bone(rank=5)).grafts:
        zero = torch.zeros_like(matrix(graft))
        change = graft.merged(zero).detach()
        assert torch.linalg.matrix_rank(change) == 5
        assert torch.equal(change[:, 5:], change[:, :-5])


@pytest.mark.parametrize("group", ["outputs", "inputs"])
def test_7_bat_depends_on_the_weight(group: str) -> None:
    """Of W = 0 it makes Q, tiled; of 2 W another change than of W. Bone's change is the same."""
    for graft in _attached(Bat(rank=4, group=group)).grafts:
        weight = matrix(graft)
        tiles = graft.merged(torch.zeros_like(weight)).detach()
        out, inputs = weight.shape[0] // 4, weight.shape[1] // 4
        for a in range(out):
            for c in range(inputs):
                tile = tiles[a * 4:(a + 1) * 4, c * 4:(c + 1) * 4]
                assert torch.equal(tile, graft.Q.detach()[a if group == "outputs" else c])
        changes = [graft.merged(factor * weight).detach() - factor * weight for factor in (1, 2)]
        assert distance(changes[1], changes[0]) > 0.05
    for graft in _attached(Bone(rank=4)).grafts:
        weight = matrix(graft)
        changes = [graft.merged(factor * weight).detach() - factor * weight for factor in (1, 2)]
        assert distance(changes[1], changes[0]) < 1e-12


def _kept(method: Any) -> int:
    """Numbers that a linear map 768 -> 3072 keeps for backward of 100 tokens; parameters do not count."""
    linear = nn.Linear(768, 3072)
    linear.requires_grad_(False)
    graft = bare(method, linear)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*linear.parameters(), *graft.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    x = torch.randn(100, 768, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = linear(x)
    del alive
    return sum(kept.values())


def test_8_kept_numbers() -> None:
    """N (in + r) for LoRA, N r for Bone; Bat makes its weight again, so that N in are left of the direct form's
    N in + 2 out in."""
    assert _kept(LoRA(rank=64)) == 100 * (768 + 64) == 83_200
    assert _kept(Bone()) == 100 * 64 == 6_400
    assert _kept(Bat()) == 100 * 768 < 4_795_392


def test_9_widths_that_do_not_fit() -> None:
    for method, words in ((Bat(rank=7), "does not divide the 32 x 32"), (Bone(rank=33), "more than the 32 inputs"),
                          (Bone(rank=4, columns=7), "columns 7 does not divide")):
        model = make("bert")
        with pytest.raises(ScionError, match=words):
            method.attach(model)
        assert not hasattr(model, "peft")
    Bone(rank=32).attach(make("bert"))


def test_10_gradient() -> None:
    """(sum_j x_j)^T dy, summed over tokens."""
    for graft in _attached(Bone(rank=5), size=0.0).grafts:
        x, dy = numbers(2, 3, graft.site.in_features), numbers(2, 3, graft.site.out_features, seed=1)
        (run(graft, x) * dy).sum().backward()
        padded = torch.cat([x, torch.zeros(2, 3, -x.shape[-1] % 5, dtype=x.dtype)], -1)
        chunks = sum(padded.split(5, dim=-1), torch.zeros(2, 3, 5, dtype=x.dtype))
        assert distance(graft.D.grad, torch.einsum("btr,bto->ro", chunks, dy)) < 1e-12


def test_bone_is_a_lora_with_a_fixed_map() -> None:
    """B = D^T, A = [I I ...]."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert")
    bone = Bone(rank=8, targets=("q", "mlp.down")).attach(model)
    randomize(bone)
    twin = make("bert", dtype=torch.float64)
    lora = LoRA(rank=8, targets=("q", "mlp.down")).attach(twin)
    with torch.no_grad():
        for mine, theirs in zip(bone.grafts, lora.grafts, strict=True):
            theirs.B.copy_(mine.D.t())
            theirs.A.copy_(torch.eye(8).repeat(1, mine.site.in_features // 8))
    assert distance(outputs(model, inputs), outputs(twin, inputs)) < 1e-12


def test_order_of_two_bats_matters() -> None:
    """Each multiplies what the one before has made."""
    inputs, found = batch("bert"), []
    for order in ("ab", "ba"):
        model = make("bert", dtype=torch.float64)
        for name in order:
            randomize(Bat(rank=4, targets=("q",), name=name).attach(model), seed=ord(name), size=0.5)
        found.append(outputs(model, inputs))
    assert distance(*found) > 1e-6
