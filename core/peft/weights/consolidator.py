"""Consolidator: a grouped map of shuffled channels beside each linear map (Hao et al. 2023, arXiv:2305.00603)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.method import PEFTMethod
from core.method.options import at_least, probability


class ConsolidatorGraft(AdditiveGraft):
    """y + drop(C P x + c): P deals the channels out to the groups, C [out, in] is block-diagonal with a block a group.

    The p-th input of P x is channel (p mod groups) n + p // groups of x, with n = in / groups.
    """

    def __init__(self, site: Site, groups: int, dropout: float, random: bool) -> None:
        super().__init__(site)
        inputs, outputs = site.in_features // groups, site.out_features // groups
        self.C = nn.Parameter(torch.zeros(groups, outputs, inputs))
        self.c = nn.Parameter(torch.zeros(site.out_features)) if site.bias is not None else None
        self.groups, self.dropout = groups, dropout
        for tensor in self.parameters() if random else ():
            nn.init.uniform_(tensor, -1e-3, 1e-3)

    def order(self) -> Tensor:
        """The channel of x at each place of P x."""
        return torch.arange(self.site.in_features, device=self.C.device).view(self.groups, -1).t().flatten()

    def delta(self, x: Tensor) -> Tensor:
        x, site = x.to(self.C.dtype), self.site
        if site.kind == "conv":
            change = site.low_rank(x, torch.eye(site.in_features).to(x)[self.order()], torch.block_diag(*self.C))
        else:
            dealt = torch.unflatten(x, -1, (self.groups, -1)).transpose(-1, -2).flatten(-2)
            dealt = torch.unflatten(dealt, -1, (self.groups, -1))
            change = torch.einsum("...gi,goi->...go", dealt, self.C).flatten(-2)
        if self.c is not None:
            change = change + site.per_channel(self.c)
        if self.training and self.dropout:  # of whole samples
            kept = torch.rand(len(x), *[1] * (change.dim() - 1), device=x.device) >= self.dropout
            change = change * kept / (1 - self.dropout)
        return change

    def merged(self, weight: Tensor) -> Tensor:
        return weight + torch.block_diag(*self.C)[:, self.order().argsort()].to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor | None:
        return None if self.c is None else bias + self.c.to(bias.dtype)


class Consolidator(PEFTMethod):
    """A sparse map beside each linear map: its channels are shuffled and mapped in groups.

    Equation: y = W x + b + drop(C P x + c), with C [out, in] of ``groups`` diagonal blocks, P the channel shuffle by
        ``groups``; C and c uniform (1e-3). c is left out where W has no bias
    Trains: in out / groups + out a map; ViT-B/16 and BERT-base: 304,128
    Merges: W + C P, b + c
    Source: Hao et al. 2023, arXiv:2305.00603 (number from memory); 384 groups on ViT-B/16. The paper drops the change
        for whole samples, at a rate of 0, 0.2, 0.5 or 0.8. Learning rate and decay of the VTAB recipe that it shares
        with FacT; init="zeros" makes the start exact

    Args:
        groups: divides inputs and outputs of each map; None is half of their greatest common divisor.
        dropout: probability that a sample goes without the change in a training step, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
        init: ``uniform`` or ``zeros``.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}

    def __init__(self, groups: int | None = None, dropout: float = 0.0, targets: Sequence[str] | None = None,
                 init: Literal["uniform", "zeros"] = "uniform", **common: Any) -> None:
        super().__init__(**common)
        at_least(1, "Consolidator", groups=groups)
        probability("Consolidator", dropout=dropout)
        if init not in ("uniform", "zeros"):
            raise ScionError(f"Consolidator: init {init!r} must be 'uniform' or 'zeros'")
        self.groups, self.dropout, self.init = groups, dropout, init
        self.targets = None if targets is None else tuple(targets)
        self.identity_at_start = init == "zeros"

    def groups_at(self, site: Site) -> int:
        """The number of groups of one map."""
        return self.groups or max(1, math.gcd(site.in_features, site.out_features) // 2)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            groups = self.groups_at(site)
            if site.in_features % groups or site.out_features % groups:
                raise ScionError(f"{self.name}: groups {groups} does not divide the widths {site.in_features} and "
                                 f"{site.out_features} of {site.name}; groups=None takes what does")

    def build(self, site: Site) -> Graft:
        return ConsolidatorGraft(site, self.groups_at(site), self.dropout, self.init == "uniform")
