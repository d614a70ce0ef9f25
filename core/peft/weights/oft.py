"""OFT and BOFT: rotations of what a linear map reads (Qiu et al. 2023, arXiv:2306.07280; Liu et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod


def skew(vector: Tensor, block: int) -> Tensor:
    """[..., block (block - 1) / 2] -> skew-symmetric matrices [..., block, block], the vector above the diagonal."""
    rows, columns = torch.triu_indices(block, block, 1, device=vector.device)
    upper = vector.new_zeros(*vector.shape[:-1], block, block)
    upper[..., rows, columns] = vector
    return upper - upper.transpose(-1, -2)


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1"""
    wide = q.to(torch.promote_types(q.dtype, torch.float32))  # half precision has no solver
    eye = torch.eye(q.shape[-1]).to(wide)
    return torch.linalg.solve(eye + wide, eye - wide, left=False).to(q.dtype)


def neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q^2 + ... + Q^(terms - 1), near (I + Q) (I - Q)^-1 for small Q."""
    eye = torch.eye(q.shape[-1]).to(q)
    total, powers = torch.add(eye, q, alpha=2), [eye, q]
    for n in range(2, terms):  # each from two of half its exponent, so that backward keeps few of them
        powers.append(powers[n // 2] @ powers[(n + 1) // 2])
        total.add_(powers[n], alpha=1 if n == terms - 1 else 2)
    return total


def rotate(weight: Tensor, rotations: Tensor) -> Tensor:
    """W [out, in] times the transpose of block-diagonal rotations [blocks, block, block]."""
    parts = torch.unflatten(weight, 1, rotations.shape[:2])
    return torch.einsum("onk,njk->onj", parts, rotations).flatten(1)


class OFTGraft(Graft):
    """W R^T with R block-diagonal, orthogonal; its strength multiplies Q, and so the angles."""

    reads_weight = True
    heeds_strength = True

    def __init__(self, site: Site, block: int, terms: int, dropout: float = 0.0, limit: float | None = None) -> None:
        super().__init__(site)
        self.Q = nn.Parameter(torch.zeros(site.in_features // block, block * (block - 1) // 2))
        self.block, self.terms, self.dropout, self.limit = block, terms, dropout, limit
        self.remade = self.remade and not dropout  # backward would draw other blocks

    def bounded(self) -> Tensor:
        """The upper triangles of Q, with what is longer than the limit as long as that."""
        if self.limit is None:
            return self.Q
        most = self.limit / (2 * len(self.Q)) ** 0.5  # |Q_i| is the root of 2 times its upper triangle's
        return self.Q * (most / self.Q.norm(dim=1, keepdim=True).clamp(min=most))

    def rotations(self) -> Tensor:
        """R_1, ... [blocks, block, block]"""
        q = self.bounded()
        q = skew(q if self.strength == 1 else self.strength * q, self.block)
        if self.dropout and self.training:
            q = q * (torch.rand(len(q), 1, 1, device=q.device) >= self.dropout).to(q)
        return neumann(q, self.terms) if self.terms else cayley(q)

    def merged(self, weight: Tensor) -> Tensor:
        return rotate(weight.to(self.Q.dtype), self.rotations()).to(weight.dtype)


class RotatedInput(OFTGraft):
    """W (R^T x) + b, which is less to compute; for a map that shares its input with no other."""

    def before(self, x: Tensor) -> Tensor:
        rotations = self.rotations()
        parts = torch.unflatten(x.to(rotations.dtype), -1, rotations.shape[:2])
        return torch.einsum("...nj,njk->...nk", parts, rotations).flatten(-2).to(x.dtype)


class RotatedWeight(OFTGraft):
    """(W R^T) x + b, for a part of a fused map, and for a convolution, whose weight reads patches."""

    remade = True

    def weight(self, weight: Tensor) -> Tensor:
        return self.merged(weight)


class OFT(PEFTMethod):
    """Orthogonal fine-tuning: the input of a linear map is rotated, in blocks.

    Equation: y = W R^T x + b, R = diag(R_1, ...), R_i = I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4 with Q skew-symmetric, zeros
    Trains: in (block - 1) / 2 a target; BERT-base, q and v, blocks of 32: 285,696
    Merges: W R^T
    Source: Qiu et al. 2023, arXiv:2306.07280, section 4, with the truncated series of Qiu et al. 2025,
        arXiv:2506.19847; terms=0 is the exact transform (I - Q) (I + Q)^-1, which turns the other way. The learning
        rate is from memory

    Args:
        block: width of a rotation, at least 2; it divides the inputs of each target.
        terms: of the series, at least 2; 0 is the exact transform.
        targets: roles to adapt; None is every linear map of the blocks.
        dropout: probability with which training leaves a block unrotated, in [0, 1).
        limit: bound of |Q| (COFT; 6e-5 in Hugging Face peft), each block's being this over the root of their number:
            what is longer counts as if it were as long.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, block: int = 32, terms: int = 5, targets: Sequence[str] | None = ("q", "v"),
                 dropout: float = 0.0, limit: float | None = None, **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= dropout < 1 or (limit is not None and limit <= 0):
            raise ScionError(f"OFT: dropout {dropout} must lie in [0, 1), limit {limit} be positive, or None")
        self.dropout, self.limit = dropout, limit
        if block < 2 or terms < 0 or terms == 1:
            raise ScionError(f"{type(self).__name__}: block {block} must be at least 2, terms {terms} 0 or at least 2")
        self.block, self.terms = block, terms
        self.targets = None if targets is None else tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.in_features % self.block:
                raise ScionError(f"{self.name}: block {self.block} does not divide the {site.in_features} inputs of "
                                 f"{site.name}")

    def build(self, site: Site) -> Graft:
        graft = RotatedInput if site.rows is None and site.kind != "conv" else RotatedWeight
        return graft(site, self.block, self.terms, self.dropout, self.limit)


class BOFTGraft(Graft):
    """diag(s) W (P_m B_m P_m^T ... P_1 B_1 P_1^T)^T with B_i block-diagonal, orthogonal, and P_i a butterfly's; its
    strength multiplies Q, and the distance of s from 1."""

    remade = True
    reads_weight = True
    heeds_strength = True

    def __init__(self, site: Site, block: int, factors: int) -> None:
        super().__init__(site)
        count = site.in_features // block
        self.Q = nn.Parameter(torch.zeros(factors, count, block * (block - 1) // 2))
        self.s = nn.Parameter(torch.ones(site.out_features))
        self.block = block
        # Factor i joins the halves of blocks that lie 2^i halves apart.
        self.orders = [butterfly(site.in_features, block, i) for i in range(factors)]

    def weight(self, weight: Tensor) -> Tensor:
        changed, q, s = weight.to(self.Q.dtype), self.Q, self.s
        if self.strength != 1:
            q, s = self.strength * q, 1 + self.strength * (s - 1)
        for level, rotations in enumerate(cayley(skew(q, self.block))):
            if level == 0:  # the channels' own order
                changed = rotate(changed, rotations)
                continue
            order = self.orders[level].to(changed.device)
            changed = rotate(changed[:, order], rotations)[:, order.argsort()]
        return (s[:, None] * changed).to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias


def butterfly(width: int, block: int, level: int) -> Tensor:
    """The order in which channels enter the blocks of a factor: within groups of 2^level blocks each half of a block
    beside the one that lies 2^level halves behind it; at level 0 their own."""
    halves = torch.arange(width).view(-1, 2, 2 ** level, block // 2)  # [group, half of the group, half-block, channel]
    return halves.transpose(1, 2).flatten()


class BOFT(PEFTMethod):
    """Orthogonal fine-tuning with rotations that are products of sparse ones, and a scale for each output.

    Equation: y = diag(s) W (R_m ... R_1)^T x + b, R_i = P_i diag(C(Q_1), ...) P_i^T with P_i the butterfly's order at
        level i - 1 and C(Q) = (I - Q) (I + Q)^-1; Q skew-symmetric, zeros; s ones
    Trains: factors in (block - 1) / 2 + out a target; BERT-base, q and v, blocks of 4: 46,080. The published 92,160
        counts whole blocks, of which the part below the diagonal is the part above it, negative, and the diagonal is
        dead
    Merges: diag(s) W (R_m ... R_1)^T
    Source: Liu et al. 2023, arXiv:2311.06243, section 4; the learning rate is from memory

    Args:
        block: width of a rotation, even; it divides the inputs of each target.
        factors: sparse rotations in a product, at least 1.
        targets: roles to adapt; None is every linear map of the blocks.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, block: int = 4, factors: int = 1, targets: Sequence[str] | None = ("q", "v"), **common: Any
                 ) -> None:
        super().__init__(**common)
        if block < 2 or block % 2 or factors < 1:
            raise ScionError(f"BOFT: block {block} must be even, factors {factors} at least 1")
        self.block, self.factors = block, factors
        self.targets = None if targets is None else tuple(targets)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            doublings = self.factors - 1
            if doublings >= site.in_features.bit_length() or site.in_features % (self.block * 2 ** doublings):
                raise ScionError(f"{self.name}: block {self.block} with factors {self.factors} needs inputs that are a "
                                 f"multiple of {self.block} x 2^{doublings}, and {site.name} has {site.in_features}")

    def build(self, site: Site) -> Graft:
        return BOFTGraft(site, self.block, self.factors)
