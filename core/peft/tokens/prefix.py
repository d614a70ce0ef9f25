"""Learned keys and values in every attention: prefix-tuning (Li and Liang 2021, arXiv:2101.00190) and P-tuning v2 (Liu
et al. 2022, arXiv:2110.07602)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Attention, Graft
from core.method import PEFTMethod
from core.random_state import dropout_for_all


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

    def __init__(self, site: Site, tokens: int, shared: Reparametrization | None, start: int, dropout: float = 0.0
                 ) -> None:
        super().__init__(site)
        assert site.heads is not None
        self.width = 2 * site.heads.key * site.heads.width
        self.source: list[Reparametrization | None] = [shared]  # in a list: the method registers it, once
        self.start = start
        self.prefix = None if shared is not None else nn.Parameter(torch.empty(tokens, self.width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)

    def values(self) -> Tensor:
        """The prefix [tokens, 2 x key heads x width]."""
        if self.prefix is not None:
            return self.prefix
        assert self.source[0] is not None
        return self.source[0].rows(self.start, self.start + self.width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        heads = self.site.heads
        assert heads is not None
        prefix = dropout_for_all(self.dropout, self.values()).to(k.dtype)
        prefix = torch.unflatten(prefix, 1, (2, heads.key, heads.width)).permute(1, 2, 0, 3)
        if k.shape[1] != heads.key:  # grouped queries: k may arrive repeated
            prefix = prefix.repeat_interleave(k.shape[1] // heads.key, dim=1)
        prefix = self.batched(prefix, x)  # [2, batch, heads, tokens, width]
        prefix = prefix.expand(2, k.shape[0], *prefix.shape[2:])
        if mask is not None:  # every query sees the prefix
            open_ = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
            mask = torch.cat([open_(*mask.shape[:-1], prefix.shape[-2]), mask], dim=-1)
        return attention(q, torch.cat([prefix[0], k], dim=2), torch.cat([prefix[1], v], dim=2), mask)


    def batched(self, prefix: Tensor, x: Tensor) -> Tensor:
        """Keys and values [2, heads, tokens, width] for each sample of the input x: [2, batch or 1, ...]."""
        return prefix[:, None]


class PrefixTuning(PEFTMethod):
    """Learned keys and values in front of every attention's own; queries, positions and labels stay as they are.

    Equation: softmax(q [P_k; K]^T / sqrt(width)) [P_v; V], P_k and P_v [tokens, dim] for each layer;
        with ``reparametrize``: P = W2 tanh(W1 e + b1) + b2, shared by the layers (of one stack, and one kind of
        attention)
    Trains: tokens 2 L dim, BERT-base, 20 tokens: 368,640; with hidden width 512: 9,864,704
    Merges: no, it adds keys to the attention
    Source: Li and Liang 2021, arXiv:2101.00190, section 4; learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        tokens: learned positions a layer, at least 1.
        reparametrize: train through an MLP of this hidden width (True is 512); ``fold`` replaces it by its output.
        dropout: of the learned keys and values.
        targets: ``attend``; of a decoder also ``cross.attend``.
    """

    tags = ("additive", ("tokens",))
    identity_at_start = False
    needs = ("attend",)
    inference_cost = "every attention reads `tokens` more keys and values"
    targets: tuple[str, ...]
    recommended = {"lr": 1e-2, "weight_decay": 0.1}
    structure_types = {"folded": bool}

    def __init__(self, tokens: int = 20, reparametrize: bool | int = False, dropout: float = 0.0,
                 targets: Sequence[str] = ("attend",), **common: Any) -> None:
        super().__init__(**common)
        hidden = 512 if reparametrize is True else int(reparametrize)
        name = type(self).__name__
        if tokens < 1 or hidden < 0:
            wrong = (f"tokens {tokens} must be at least 1" if tokens < 1 else
                     f"reparametrize {reparametrize} must not be negative")
            raise ScionError(f"{name}: {wrong}")
        if not 0 <= dropout < 1:
            raise ScionError(f"{name}: dropout {dropout} must be at least 0 and below 1")
        self.tokens, self.hidden, self.dropout, self.targets = tokens, hidden, dropout, tuple(targets)
        self.folded = False

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"folded": False}

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role in self.targets and not site.role.endswith("attend"):
                raise ScionError(f"{self.name}: {site.name} is no attention: take 'attend', of a decoder also "
                                 "'cross.attend'")

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        banks: dict[str, list[Site]] = {}
        for site in sites:
            if site.role.endswith("attend") and site.around is not None:
                banks.setdefault(f"{site.around.stage}-{site.role}".replace(".", "-"), []).append(site)
        self.starts: dict[str, tuple[Reparametrization | None, int]] = {}
        for bank, members in banks.items():
            widths = [2 * site.heads.key * site.heads.width for site in members if site.heads]
            mlp = Reparametrization(self.tokens, members[0].width, self.hidden, widths) if self.hidden else None
            if mlp is not None:
                module.add_module("reparametrization" if len(banks) == 1 else f"reparametrization_{bank}", mlp)
            for i, site in enumerate(members):
                self.starts[site.name] = mlp, sum(widths[:i])

    def build(self, site: Site) -> Graft:
        return PrefixGraft(site, self.tokens, *self.starts[site.name], self.dropout)

    def fold(self) -> None:
        """Replace the MLPs by the prefixes that they make: the same function, with tokens 2 L dim numbers to store."""
        if self.folded or not self.hidden:
            return
        for graft in self.grafts:
            if isinstance(graft, PrefixGraft):
                graft.prefix = nn.Parameter(graft.values().detach().clone(), requires_grad=self.is_trained)
                graft.source = [None]
        for name in [name for name, child in self.module.named_children() if isinstance(child, Reparametrization)]:
            delattr(self.module, name)
        self.starts, self.folded = {}, True

    def structure(self) -> dict[str, Any]:
        return {"folded": self.folded}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("folded"):
            self.fold()


class PTuningV2(PrefixTuning):
    """P-tuning v2: learned keys and values in every layer, with dropout, trained as they are.

    Equation: softmax(q [P_k; K]^T / sqrt(width)) [P_v; V], P_k and P_v [tokens, dim] for each layer: PrefixTuning
        without an MLP
    Trains: tokens 2 L dim, BERT-base, 128 tokens: 2,359,296
    Merges: no, it adds keys to the attention
    Source: Liu et al. 2022, arXiv:2110.07602; tokens up to 128, learning rates 5e-3 to 1e-2, dropout 0.1

    Args:
        tokens: learned positions a layer, at least 1.
        reparametrize: train through an MLP of this hidden width, as PrefixTuning can.
        dropout: of the learned keys and values.
        targets: ``attend``; of a decoder also ``cross.attend``.
    """

    tags = ("additive", ("tokens",))
    recommended = {"lr": 5e-3, "weight_decay": 0.0}

    def __init__(self, tokens: int = 20, reparametrize: bool | int = False, dropout: float = 0.1,
                 targets: Sequence[str] = ("attend",), **common: Any) -> None:
        super().__init__(tokens, reparametrize, dropout, targets, **common)
