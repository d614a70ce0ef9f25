"""Prefix-tuning: learned keys and values in every attention (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Attention, Graft
from core.method import PEFTMethod


class Reparametrization(nn.Module):
    """W2 tanh(W1 e + b1) + b2: one table e [tokens, dim] and one MLP for the prefixes of all layers."""

    def __init__(self, tokens: int, dim: int, hidden: int, widths: list[int]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, dim))
        self.first = nn.Linear(dim, hidden)
        self.second = nn.Linear(hidden, sum(widths))

    def rows(self, start: int, stop: int) -> Tensor:
        """Prefix columns ``start`` to ``stop`` [tokens, stop - start]."""
        hidden = torch.tanh(self.first(self.embedding))
        return nn.functional.linear(hidden, self.second.weight[start:stop], self.second.bias[start:stop])


class PrefixGraft(Graft):
    """attention(q, [P_k; k], [P_v; v]), with P [tokens, 2 x key heads x width] or a part of a shared MLP's output."""

    def __init__(self, site: Site, tokens: int, shared: Reparametrization | None, start: int) -> None:
        super().__init__(site)
        assert site.heads is not None
        self.width = 2 * site.heads.key * site.heads.width
        self.source: list[Reparametrization | None] = [shared]  # in a list: the method registers it, once
        self.start = start
        self.prefix = None if shared is not None else nn.Parameter(torch.empty(tokens, self.width).normal_(std=0.02))

    def values(self) -> Tensor:
        """The prefix [tokens, 2 x key heads x width]."""
        if self.prefix is not None:
            return self.prefix
        assert self.source[0] is not None
        return self.source[0].rows(self.start, self.start + self.width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        heads = self.site.heads
        assert heads is not None
        prefix = self.values().to(k.dtype).unflatten(1, (2, heads.key, heads.width)).permute(1, 2, 0, 3)
        prefix = prefix.repeat_interleave(k.shape[1] // heads.key, dim=1)  # grouped queries: k may arrive repeated
        prefix = prefix[:, None].expand(2, k.shape[0], *prefix.shape[1:])  # [2, batch, heads, tokens, width]
        if mask is not None:  # every query sees the prefix
            open_ = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
            mask = torch.cat([open_(*mask.shape[:-1], prefix.shape[-2]), mask], dim=-1)
        return attention(q, torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2), mask)


class PrefixTuning(PEFTMethod):
    """Learned keys and values in front of every attention's own; queries, positions and labels stay as they are.

    Equation: softmax(q [P_k; K]^T / sqrt(width)) [P_v; V], P_k and P_v [tokens, dim] for each layer;
        with ``reparametrize``: P = W2 tanh(W1 e + b1) + b2, shared by the layers
    Trains: tokens 2 L dim, BERT-base, 20 tokens: 368,640; with hidden width 512: 9,864,704
    Merges: no, it adds keys to the attention
    Source: Li and Liang 2021, arXiv:2101.00190, section 4; learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        tokens: learned positions a layer, at least 1.
        reparametrize: train through an MLP of this hidden width (True is 512); ``fold`` replaces it by its output.
    """

    identity_at_start = False
    needs = ("attend",)
    inference_cost = "every attention reads `tokens` more keys and values"
    recommended = {"lr": 1e-2, "weight_decay": 0.1}

    def __init__(self, tokens: int = 20, reparametrize: bool | int = False, **common: Any) -> None:
        super().__init__(**common)
        hidden = 512 if reparametrize is True else int(reparametrize)
        if tokens < 1 or hidden < 0:
            raise ScionError(f"PrefixTuning: tokens {tokens} must be at least 1, reparametrize {reparametrize} not "
                             "negative")
        self.tokens, self.hidden, self.targets = tokens, hidden, ("attend",)
        self.folded = False

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self.widths = {site.name: 2 * site.heads.key * site.heads.width for site in sites if site.heads}
        self.reparametrization = None
        if self.hidden:
            widths = list(self.widths.values())
            self.reparametrization = Reparametrization(self.tokens, sites[0].width, self.hidden, widths)
            module.reparametrization = self.reparametrization

    def build(self, site: Site) -> Graft:
        names = list(self.widths)
        start = sum(self.widths[name] for name in names[: names.index(site.name)])
        return PrefixGraft(site, self.tokens, self.reparametrization, start)

    def check(self, anatomy: Anatomy) -> None:
        self.folded = False

    def fold(self) -> None:
        """Replace the MLP by the prefixes that it makes: the same function, with tokens 2 L dim numbers to store."""
        if self.reparametrization is None:
            return
        for graft in self.grafts:
            assert isinstance(graft, PrefixGraft)
            graft.prefix = nn.Parameter(graft.values().detach().clone(), requires_grad=self.is_trained)
            graft.source = [None]
        del self.module.reparametrization
        self.reparametrization, self.folded = None, True

    def structure(self) -> dict[str, Any]:
        return {"folded": self.folded}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("folded"):
            self.fold()
