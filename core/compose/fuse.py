"""AdapterFusion: a learned mixture of trained adapters (Pfeiffer et al. 2021, arXiv:2005.00247)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.compose.joined import Joined, JoinedMethods
from core.errors import ScionError
from core.graft import Graft

HIDDEN = ("attention", "mlp", "block", "norm1", "norm2")
"""Roles where a hidden state of a block enters and leaves."""


class FusionGraft(Joined):
    """h + V sum_n p_n a_n, p = softmax_n((Q z + b_Q) . (K a_n + b_K)), a_n the change that the n-th graft makes of h.

    Q, K and V are [dim, dim]; z is the site's own output: h itself, or behind a norm that h enters, the norm's output.
    """

    def __init__(self, site: Site, parts: Sequence[Graft], dropout: float) -> None:
        super().__init__(site, parts)
        dim = site.width
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=dropout > 0)
        self.value = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        # as AdapterHub starts it: the identity, with 1e-6 in all other places
        with torch.no_grad():
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def before(self, x: Tensor) -> Tensor:
        wide = x.to(self.value.weight.dtype)
        changes = torch.stack([part(wide, verb="before") - wide for part in self.parts], -2)  # [..., methods, dim]
        mixture = self.mixed(self.again(x), changes)
        return x + mixture.to(x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        wide = y.to(self.value.weight.dtype)
        changes = torch.stack([part(x, wide, verb="after") - wide for part in self.parts], -2)  # [..., methods, dim]
        mixture = self.mixed(y, changes)
        return y + mixture.to(y.dtype)

    def mixed(self, z: Tensor, changes: Tensor) -> Tensor:
        """z [..., dim] and changes [..., methods, dim] -> what is added [..., dim]."""
        query = self.query(z.to(self.value.weight.dtype))
        scores = (self.key(changes) @ query[..., None]).squeeze(-1)  # [..., methods]
        weights = torch.softmax(self.dropout(scores), -1)
        mixture = (weights[..., None, :] @ changes).squeeze(-2)  # [..., dim]
        return self.value(mixture)

    def penalty(self) -> Tensor:
        """||V - I||_F^2"""
        weight = self.value.weight
        identity = torch.eye(self.site.width, device=weight.device)
        return (weight - identity).square().sum()


class Fuse(JoinedMethods):
    """AdapterFusion: trained adapters, frozen, and an attention in each block that chooses among them.

    Equation: h + V sum_n softmax_n((Q z + b_Q) . (K a_n + b_K)) a_n, a_n the change by adapter n, z what it reads;
        loss + penalty sum ||V - I||_F^2
    Trains: 3 dim^2 + 2 dim a site, whatever the adapters; BERT-base with Pfeiffer's: 21,252,096
    Merges: no, the mixture depends on the input
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2, and AdapterHub: Q and K start from a normal of 0.02, V
        as the identity with 1e-6 beside it, and the scores see the dropout before the softmax. Without dropout b_K
        would cancel in the softmax, so that it is left out

    Args:
        methods: at least two, that change hidden states of the blocks at the same sites; folders of trained ones as
            a rule, since those are not trained any more.
        dropout: probability of dropping a score, in [0, 1).
        penalty: factor of the squared distance of V from the identity.
    """

    tags = ("additive", ("block", "routing", "composition"))
    inference_cost = "all adapters, and three maps of the whole width a site"
    recommended = {"lr": 5e-5, "weight_decay": 0.0}
    refusal = ("is no change of a block's hidden state that could be fused; bottleneck adapters are (LanguageAdapter "
               "with invertible=False)")

    def __init__(self, methods: Sequence[Any], dropout: float = 0.1, penalty: float = 0.01, **common: Any) -> None:
        super().__init__(methods, **common)
        if len(self.methods) < 2:
            raise ScionError(f"Fuse: one method ({self.methods[0].name}) leaves nothing to choose")
        if not 0 <= dropout < 1 or penalty < 0:
            raise ScionError(f"Fuse: dropout {dropout} must be in [0, 1), penalty {penalty} not negative")
        self.dropout = dropout
        self.penalty = penalty

    def fits(self, part: Graft) -> bool:
        return part.site.role in HIDDEN

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        return FusionGraft(site, parts, self.dropout)

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        module.requires_grad_(False)  # before the mixtures are added, which are trained
        super().arrange(module, anatomy)

    @property
    def adds_loss(self) -> bool:
        return self.penalty > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        terms = [graft.penalty() for graft in self.grafts if isinstance(graft, FusionGraft)]
        if not self.penalty or not self.is_trained:
            return None
        return self.penalty * torch.stack(terms).sum()
