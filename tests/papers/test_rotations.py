"""Checks of OFT, BOFT: rotations of what a linear map reads; the numbers are those of the paper's checks for every
method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, check_effective, check_equation, matrix, shift, vit_b16
from tests.toolkit import distance, outputs, randomize

OFT: Any = method_class("OFT")
BOFT: Any = method_class("BOFT")
WIDE = ("q", "mlp.up", "mlp.down")


def _skew(vector: Tensor, block: int) -> Tensor:
    """The vector fills the part above the diagonal row by row, its negative the part below."""
    entries, rows = iter(vector), [[vector.new_zeros(()) for _ in range(block)] for _ in range(block)]
    for i in range(block):
        for j in range(i + 1, block):
            value = next(entries)
            rows[i][j], rows[j][i] = value, -value
    return torch.stack([torch.stack(row) for row in rows])


def _exact(q: Tensor) -> Tensor:
    eye = torch.eye(len(q), dtype=q.dtype)
    return (eye - q) @ torch.linalg.inv(eye + q)


def _series(q: Tensor) -> Tensor:
    return torch.eye(len(q), dtype=q.dtype) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def _on_bert(method: Any, size: float = 0.1) -> Any:
    method.attach(make("bert", dtype=torch.float64))
    randomize(method, size=size)
    return method


# ------------------------------------------------------------------------------------------------- OFT


@pytest.mark.parametrize("terms", [5, 0])
def test_oft_equation(terms: int) -> None:
    """y = (x R) W^T + b with R block-diagonal; I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4, or (I - Q) (I + Q)^-1."""
    for graft in _on_bert(OFT(block=4, terms=terms, targets=WIDE, layers=(0,))).grafts:
        def rotation(g: Any) -> Tensor:
            return torch.block_diag(*[(_series if terms else _exact)(_skew(vector, 4)) for vector in g.Q])

        check_equation(graft, lambda x, g=graft, r=rotation:
                       x @ r(g) @ matrix(g).t() + shift(g))
        check_effective(graft, lambda w, g=graft, r=rotation: w @ r(g).t())


def test_oft_dropout_leaves_whole_blocks() -> None:
    """In training some blocks are not rotated, others by their whole angle; backward sees the same ones."""
    method = _on_bert(OFT(block=4, dropout=0.5, targets=("q",), layers=(0,)), size=0.5)
    [graft] = method.grafts
    whole = graft.eval().rotations()
    graft.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seen = torch.stack([graft.rotations() for _ in range(200)])
    still = (seen == torch.eye(4, dtype=torch.float64)).flatten(-2).all(-1)
    assert bool((still | (seen == whole).flatten(-2).all(-1)).all())
    assert 0.4 < float(still.double().mean()) < 0.6
    for dropout in (0.0, 0.5):
        part = OFT(block=4, dropout=dropout, targets=("q",)).attach(make("timm_vit")).grafts[0]
        assert part.remade == (dropout == 0)


def test_oft_limit() -> None:
    """COFT: |Q_i| is at most the limit over the root of the number of blocks, and smaller ones stay."""
    method = _on_bert(OFT(block=4, limit=0.8, targets=("q",), layers=(0,)), size=0.1)
    [graft] = method.grafts
    with torch.no_grad():
        graft.Q[0] *= 0.01
    most = 0.8 / 8 ** 0.5
    norms = torch.stack([_skew(vector, 4) for vector in graft.bounded()]).flatten(1).norm(dim=1)
    assert float(norms.max()) <= most * (1 + 1e-12) and bool((norms > 0.99 * most).any())
    assert torch.equal(graft.bounded()[0], graft.Q[0])
    model, inputs = make("bert"), batch("bert")
    method = OFT(block=4, limit=0.8).attach(model)
    randomize(method, size=0.5)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-5
    fresh = OFT(block=4, limit=0.8).attach(make("bert"))
    fresh.root(inputs).square().sum().backward()
    assert all(bool(torch.isfinite(t.grad).all()) and bool(t.grad.any()) for t in fresh.trainable().values())


def test_oft_conventions_are_opposite() -> None:
    """The series is near (I + Q) (I - Q)^-1: what the exact transform makes of -Q, and not what it makes of Q."""
    series, exact, turned = (_on_bert(OFT(block=4, terms=terms, targets=("q",), layers=(0,)), 0.0).grafts[0]
                             for terms in (5, 0, 0))
    with torch.no_grad():
        values = 0.02 * torch.randn(series.Q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for graft, sign in ((series, 1), (exact, 1), (turned, -1)):
            graft.Q.copy_(sign * values)
    weights = [graft.merged(matrix(graft)).detach() for graft in (series, exact, turned)]
    assert distance(weights[0], weights[2]) < 1e-4 and distance(weights[0], weights[1]) > 1e-2


@pytest.mark.parametrize("size", [1e-3, 0.5])
def test_oft_is_orthogonal(size: float) -> None:
    """The exact transform keeps all lengths and angles of the weight's rows, the series does while Q is small."""
    kept = {}
    for terms in (0, 5):
        graft = _on_bert(OFT(block=4, terms=terms, targets=("q",), layers=(0,)), size).grafts[0]
        w, moved = matrix(graft), graft.merged(matrix(graft)).detach()
        assert distance(moved, w) > size / 10
        kept[terms] = distance(moved @ moved.t(), w @ w.t())
    assert kept[0] < 1e-12 and (kept[5] < 1e-7) == (size < 0.1)


def test_1_oft_count_is_the_free_entries() -> None:
    """in / b blocks with b (b - 1) / 2 entries each."""
    for graft in OFT(targets=("q", "mlp.down")).attach(bert_base()).grafts:
        assert graft.Q.shape == (graft.site.in_features // 32, 496)


# ------------------------------------------------------------------------------------------------- BOFT


def _order(width: int, block: int, level: int) -> list[int]:
    """Channels in the order in which they enter the blocks: as the library, whose permutation (in each run of 2^level
    blocks first the even halves of blocks, then the odd ones) stands before the blocks and is undone behind them."""
    run, half, found = block * 2 ** level, block // 2, []
    for start in range(0, width, run):
        pieces = [list(range(start + i * half, start + (i + 1) * half)) for i in range(run // half)]
        found += sum(pieces[::2], []) + sum(pieces[1::2], [])
    return sorted(range(width), key=lambda i: found[i])


@pytest.mark.parametrize(("block", "factors"), [(4, 1), (4, 3), (8, 2)])
def test_boft_equation(block: int, factors: int) -> None:
    """diag(s) W (R_m ... R_1)^T x + b, R_i = P_i^T diag(C(Q_1), ...) P_i with the butterfly's order P_i."""
    for graft in _on_bert(BOFT(block=block, factors=factors, targets=WIDE, layers=(0,))).grafts:
        def product(g: Any) -> Tensor:
            width = g.site.in_features
            total = torch.eye(width, dtype=torch.float64)
            for level, vectors in enumerate(g.Q):
                p = torch.eye(width, dtype=torch.float64)[_order(width, block, level)]
                total = p.t() @ torch.block_diag(*[_exact(_skew(v, block)) for v in vectors]) @ p @ total
            return total

        rotation = product(graft).detach()
        assert distance(rotation @ rotation.t(), torch.eye(len(rotation), dtype=torch.float64)) < 1e-12
        check_effective(graft, lambda w, g=graft, r=product: torch.diag(g.s) @ w @ r(g).t())


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_boft_reach(factors: int) -> None:
    """A channel meets block 2^(factors - 1) of them; with enough factors, all."""
    graft = _on_bert(BOFT(block=4, factors=factors, targets=("q",), layers=(0,))).grafts[0]
    with torch.no_grad():
        graft.s.fill_(1.0)
    rotation = graft.merged(torch.eye(32, dtype=torch.float64)).detach()
    assert {int((row.abs() > 1e-12).sum()) for row in rotation} == {4 * 2 ** (factors - 1)}


def test_1_boft_count() -> None:
    """The published numbers hold whole blocks; the free entries of a skew-symmetric block of 4 are 6 of its 16."""
    for build, targets, published in ((bert_base, ("q", "v"), 92_160), (vit_b16, ("qkv",), 64_512)):
        method = BOFT(targets=targets).attach(build())
        scales = sum(graft.s.numel() for graft in method.grafts)
        free = method.counts()["method"] - scales
        assert free * 16 // 6 + scales == published


# ------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("method", [OFT(block=4), OFT(block=4, terms=0), BOFT(factors=2)], ids=repr)
def test_2_and_3_start(method: Any) -> None:
    """Q is zero (and s one): the identity, to 1e-5; all learns from the first step on."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    method.attach(model)
    assert all(not tensor.any() or bool((tensor == 1).all()) for tensor in method.trainable().values())
    assert distance(outputs(model, inputs), expected) < 1e-5
    model(inputs).pow(3).sum().backward()
    assert all(bool(tensor.grad.any()) for tensor in method.trainable().values())
