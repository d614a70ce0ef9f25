"""Checks of VeRA, FourierFT, LoHa, LoKr: dense changes made of few numbers; the numbers are those of the paper's checks
for every method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_adapter
from core.anatomy import Anatomy
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, check_effective, matrix, vit_b16
from tests.rows import NOT_LINEAR, RANK, WIDE, Row, Variant, low_rank_count, target_shapes
from tests.toolkit import distance, outputs, randomize, seeded


def vera_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank + o for _, o in target_shapes(anatomy, method))


def fourier_count(anatomy: Anatomy, method: Any) -> int:
    return method.frequencies * len(method.sites(anatomy))


def lokr_count(anatomy: Anatomy, method: Any) -> int:
    from core.peft.weights.lokr import split

    total = 0
    for i, o in target_shapes(anatomy, method):
        (out_1, out_2), (in_1, in_2) = split(o, method.factor), split(i, method.factor)
        small = method.rank < max(out_2, in_2) / 2
        total += out_1 * in_1 + (method.rank * (out_2 + in_2) if small else out_2 * in_2)
    return total


ROWS = {
    "VeRA": Row(
        {"q, v": Variant({"rank": 8}), "all": Variant({"rank": 4, **WIDE})},
        trained=vera_count,
        cards=(("bert_base", {}, 24_576),),
        bad=(({"rank": 0}, "rank 0"), ({"start": 0.0}, "start 0"), *NOT_LINEAR),
        weights=True, operators=12, saved=0.9,
        artifact={"rank": 2},
    ),
    "FourierFT": Row(
        {"q, v": Variant({"frequencies": 20, "scale": 30.0}, learns={"frequencies": 200, "lr": 3e-2}),
         "all": Variant({"frequencies": 9, "scale": 20.0, "init": "normal", **WIDE}, random=True,
                        learns={"lr": 5e-2})},
        trained=fourier_count,
        cards=(("bert_base", {}, 24_000),),
        bad=(({"frequencies": 0}, "frequencies 0"), ({"scale": 0}, "scale 0"), ({"init": "one"}, "'one'"),
             ({"frequencies": 10**6}, "fewer"), *NOT_LINEAR),
        weights=True, operators=14, saved=0.8,
        artifact={"frequencies": 2},
    ),
    "LoHa": Row(
        {"q, v": Variant(RANK, learns_on={"timm_swin": {"lr": 1e-2}}),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=lambda anatomy, method: 2 * low_rank_count(anatomy, method),
        cards=(("bert_base", {}, 589_824),),
        bad=(({"rank": 0}, "rank 0"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.8,
        artifact={"rank": 1},
    ),
    "LoKr": Row(
        {"q, v": Variant(RANK, learns={"lr": 1e-2}),
         "all": Variant({"rank": 1, "factor": 2, **WIDE}, learns={"lr": 3e-3})},
        trained=lokr_count,
        cards=(("bert_base", {}, 26_112),),
        bad=(({"rank": 0}, "rank 0"), ({"factor": 0}, "factor 0"), *NOT_LINEAR),
        random=True, weights=True, operators=12, saved=0.8,
        artifact={"rank": 1},
    ),
}

VeRA: Any = method_class("VeRA")
FourierFT: Any = method_class("FourierFT")
LoHa: Any = method_class("LoHa")
LoKr: Any = method_class("LoKr")
WIDE = ("q", "mlp.up", "mlp.down")


def _on_bert(method: Any) -> Any:
    method.attach(make("bert", dtype=torch.float64))
    randomize(method)
    return method


def _learn(method: Any, family: str = "bert") -> list[set[str]]:
    """Names (their last part) of the tensors that had a gradient, in each of the first two steps."""
    model, inputs = make(family), batch(family)
    method.attach(model)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.1)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        model(inputs).pow(3).sum().backward()
        found.append({name.rpartition(".")[2] for name, tensor in method.trainable().items() if tensor.grad.any()})
        optimizer.step()
    return found


# ------------------------------------------------------------------------------------------------- VeRA


def test_vera_equation() -> None:
    """diag(b) B diag(d) A, narrower layers with the first columns of A and the first rows of B."""
    method = _on_bert(VeRA(rank=5, targets=WIDE))
    shared = method.projections
    assert shared.A.shape == (5, 64) and shared.B.shape == (64, 5)
    for graft in method.grafts:
        a = shared.A[:, :graft.site.in_features].double()
        b = shared.B[:graft.site.out_features].double()
        check_effective(graft, lambda w, g=graft, a=a, b=b:
                        w + torch.diag(g.b) @ b @ torch.diag(g.d) @ a)


def test_2_vera_start() -> None:
    """d is 0.1 and b zero; A and B are uniform within sqrt(6 / fan in) (Kaiming's rule with gain sqrt 2)."""
    model, inputs = make("bert", width=256), batch("bert")
    expected = outputs(model, inputs)
    method = VeRA(rank=64).attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    for graft in method.grafts:
        assert torch.equal(graft.d.detach(), torch.full((64,), 0.1)) and not graft.b.any()
    for values, fan in ((method.projections.A, 256), (method.projections.B, 64)):
        bound = math.sqrt(6 / fan)
        assert 0.99 * bound < float(values.abs().max()) <= bound
        assert abs(float(values.std()) * math.sqrt(3) / bound - 1) < 0.02


def test_3_vera_gradients() -> None:
    assert _learn(VeRA(rank=4)) == [{"b"}, {"b", "d"}]


@pytest.mark.parametrize(("build", "targets", "count"), [
    (bert_base, ("q", "v"), 393_216), (vit_b16, ("qkv",), 786_432)])
def test_1_vera_shares_its_map(build: Any, targets: tuple[str, ...], count: int) -> None:
    """One A and one B, which are not trained and in no file."""
    method = VeRA(targets=targets).attach(build())
    buffers = dict(method.module.named_buffers())
    assert sum(tensor.numel() for tensor in buffers.values()) == count and len(buffers) == 2
    assert all(graft.projections[0] is method.projections for graft in method.grafts)
    assert method.counts()["stored"] == method.counts()["method"]


def test_6_vera_from_its_file(tmp_path: Any) -> None:
    """The file holds vectors alone; the seed in it makes the same map again, wherever the global random state is, and
    another seed another one."""
    model, inputs = make("bert"), batch("bert")
    method = VeRA(rank=4, seed=3).attach(model)
    randomize(method)
    method.save(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"b", "d"}
    fresh = make("bert")
    with seeded(99):
        loaded: Any = load_adapter(tmp_path, fresh)
    assert torch.equal(loaded.projections.A, method.projections.A)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    other = VeRA(rank=4, seed=4).attach(make("bert"))
    assert not torch.equal(other.projections.A, method.projections.A)


# ------------------------------------------------------------------------------------------------- FourierFT


def _waves(shape: tuple[int, int], places: Tensor, values: Tensor) -> Tensor:
    """Re(ifft2(F)) as a sum of cosines: the entry at (j, k) adds c cos(2 pi (j p / m + k q / n)) / (m n) at (p, q)."""
    m, n = shape
    p, q = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    total = torch.zeros(shape, dtype=torch.float64)
    for place, value in zip(places.tolist(), values, strict=True):
        total = total + value * torch.cos(2 * math.pi * (place // n * p / m + place % n * q / n)) / (m * n)
    return total


@pytest.mark.parametrize("family", ["bert", "timm_vit"])
def test_fourierft_equation(family: str) -> None:
    """W + scale Re(ifft2(F)), at the first entries of a permutation drawn by the seed 777, row by row."""
    method = FourierFT(frequencies=7, scale=150.0, targets=WIDE).attach(make(family, dtype=torch.float64))
    randomize(method)
    for graft in method.grafts:
        shape = graft.site.out_features, graft.site.in_features
        places = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(777))[:7]
        if graft.site.rows is None:
            check_effective(graft, lambda w, g=graft, s=shape, i=places:
                            w + 150.0 * _waves(s, i, g.c))
        merged = graft.merged(matrix(graft)).detach()
        assert distance(merged, matrix(graft) + 150.0 * _waves(shape, places, graft.c.detach())) < 1e-10


def test_fourierft_places_are_shared() -> None:
    """By all layers of one shape, whatever the method's own seed; another seed of places gives others."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    for seed in (0, 1):
        for graft in FourierFT(frequencies=9, targets=WIDE, seed=seed).attach(make("bert")).grafts:
            found.setdefault((graft.site.out_features, graft.site.in_features), []).append(graft.places)
    assert len(found) == 3 and all(len(places) == 4 for places in found.values())
    for shape, places in found.items():
        assert all(torch.equal(one, places[0]) for one in places)
        assert len(places[0].unique()) == 9 and int(places[0].max()) < shape[0] * shape[1]
    other = FourierFT(frequencies=9, targets=WIDE, places=778).attach(make("bert")).grafts[0].places
    assert not torch.equal(other, found[32, 32][0])


def test_2_fourierft_start() -> None:
    """Zeros are the identity; the library's normal start is not, and is declared so."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    assert FourierFT(frequencies=500).attach(model).identity_at_start
    assert torch.equal(outputs(model, inputs), expected)
    model = make("bert")
    method = FourierFT(frequencies=500, init="normal").attach(model)
    values = torch.cat([graft.c.detach() for graft in method.grafts])
    assert abs(float(values.std()) - 1) < 0.05 and abs(float(values.mean())) < 0.05
    assert not method.identity_at_start and distance(outputs(model, inputs), expected) > 1e-3


def test_4_fourierft_in_half_precision() -> None:
    """The transform runs in float32 for a bfloat16 base, and only its result is rounded."""
    method = FourierFT(frequencies=50, targets=("q",)).attach(make("bert", dtype=torch.bfloat16))
    randomize(method, size=1.0)
    for graft in method.grafts:
        assert graft.c.dtype == torch.float32
        zero = torch.zeros(32, 32, dtype=torch.bfloat16)
        change = graft.merged(zero).detach()
        places = torch.randperm(32 * 32, generator=torch.Generator().manual_seed(777))[:50]
        assert change.dtype == torch.bfloat16
        assert distance(change, 300 * _waves((32, 32), places, graft.c.detach().double())) < 2 ** -8


# ------------------------------------------------------------------------------------------------- LoHa


def test_loha_equation() -> None:
    """(alpha / r) (B_1 A_1) * (B_2 A_2), entry by entry; its rank goes up to r^2."""
    for graft in _on_bert(LoHa(rank=3, alpha=6, targets=WIDE)).grafts:
        def change(g: Any) -> Tensor:
            pairs = torch.einsum("or,ri,os,si->oi", g.B_1, g.A_1, g.B_2, g.A_2)  # the sum over r and s is a product
            return 2.0 * pairs

        check_effective(graft, lambda w, g=graft, c=change: w + c(g))
        assert torch.linalg.matrix_rank(change(graft).detach()) == 9


def test_2_and_3_loha_start() -> None:
    """As in LyCORIS: B_2 is zero, B_1 normal with 0.1, the A normal with 1; B_2 alone learns first, then all do."""
    method = LoHa(rank=16).attach(make("bert", width=128))
    for name, spread in (("B_1", 0.1), ("A_1", 1.0), ("B_2", 0.0), ("A_2", 1.0)):
        values = torch.cat([getattr(graft, name).detach().flatten() for graft in method.grafts])
        assert abs(float(values.std()) - spread) <= 0.03 * spread
    assert _learn(LoHa(rank=3)) == [{"B_2"}, {"B_1", "A_1", "B_2", "A_2"}]


# ------------------------------------------------------------------------------------------------- LoKr


@pytest.mark.parametrize(("width", "factor", "parts"), [
    (768, -1, (24, 32)), (2304, -1, (48, 48)), (3072, -1, (48, 64)), (768, 8, (8, 96)), (768, 7, (6, 128)),
    (13, -1, (1, 13)), (1, -1, (1, 1))])
def test_lokr_splits_widths(width: int, factor: int, parts: tuple[int, int]) -> None:
    """As near to a square as can be, the smaller part first and at most ``factor``."""
    from core.peft.weights.lokr import split

    assert split(width, factor) == parts


@pytest.mark.parametrize(("rank", "factor", "small"), [(2, -1, True), (4, -1, False), (3, 2, True), (16, 2, False)])
def test_lokr_equation(rank: int, factor: int, small: bool) -> None:
    """(alpha / r) C (x) B A: the entry at (a o_2 + b, c i_2 + d) is C[a, c] (B A)[b, d]. Where r is not below half of
    the larger side, B A is one matrix."""
    method = _on_bert(LoKr(rank=rank, alpha=3 * rank, factor=factor, targets=("q",)))
    for graft in method.grafts:
        assert (graft.B is not None) == small

        def change(g: Any) -> Tensor:
            inner = 3.0 * (g.A if g.B is None else g.B @ g.A)
            return torch.einsum("ac,bd->abcd", g.C, inner).reshape(32, 32)

        check_effective(graft, lambda w, g=graft, c=change: w + c(g))


def test_a_whole_inner_matrix_of_an_earlier_version(tmp_path: Path) -> None:
    """Its scale was 1: such a file, alone or within a Route, gives what it gave, and so does what is saved of it."""
    from core.compose import Route

    method = LoKr(rank=16, alpha=48, targets=("q",)).attach(make("bert"))
    randomize(method)
    method.save(tmp_path / "old")
    record = json.loads((tmp_path / "old" / "adapter.json").read_text())
    record["methods"][0]["structure"] = {}
    (tmp_path / "old" / "adapter.json").write_text(json.dumps(record))
    model, inputs, bases = make("bert"), batch("bert"), [make("bert") for _ in range(3)]
    with torch.no_grad():
        for graft in method.grafts:
            site, change = graft.site, torch.kron(graft.C, graft.A)
            model.get_parameter(site.weight_name).add_(change)
    expected = outputs(model, inputs)
    load_adapter(tmp_path / "old", bases[0]).save(tmp_path / "again")
    load_adapter(tmp_path / "again", bases[1])
    Route([str(tmp_path / "old"), LoHa()]).attach(bases[2])
    assert all(distance(outputs(base, inputs), expected) < 1e-5 for base in bases)


def test_heads_learn_slower_than_vectors() -> None:
    """A new head beside VeRA's two vectors a layer has a tenth of their rate."""
    assert VeRA.recommended["head_lr"] == 0.1 * VeRA.recommended["lr"]


def test_2_and_3_lokr_start() -> None:
    """C is zero, B and A are Kaiming-uniform with a = sqrt 5; C alone learns first, then all do."""
    method = LoKr(rank=2).attach(make("bert", width=512))
    for graft in method.grafts:
        assert not graft.C.any()
        for tensor in (graft.A, graft.B):
            bound = 1 / math.sqrt(tensor.shape[1])
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound
    assert _learn(LoKr(rank=2)) == [{"C"}, {"A", "B", "C"}]
