"""UniPELT: a prefix, LoRA and an adapter, each behind a gate (Mao et al. 2022, arXiv:2110.07577)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.activations.pfeiffer import AfterMLP, AtNorm, Pfeiffer
from core.peft.tokens.prefix import PrefixGraft, PrefixTuning
from core.peft.weights.lora import LoRAGraft


class Gate(nn.Linear):
    """g(x) = mean over the sequence of sigmoid(w x + b): one number a sample."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, ..., dim] -> [batch, 1, 1]; a map's gate broadcasts over its axes."""
        open_ = torch.sigmoid(super().forward(x.to(self.weight.dtype))).flatten(1)
        return open_.mean(1).view(-1, *[1] * (x.dim() - 1))


class GatedLoRA(LoRAGraft):
    """y + g(x) B A x: the gate stands in the scale's place."""

    spans_tokens = True

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__(site, rank, 1.0, 0.0)
        self.gate = Gate(site.in_features)

    def delta(self, x: Tensor) -> Tensor:
        x = x.to(self.A.dtype)
        return self.gate(x) * self.site.low_rank(x, self.A, self.B)

    def merged(self, weight: Tensor) -> Tensor:
        raise ScionError("GatedLoRA cannot be merged: its gate depends on the input")

    def factors(self) -> None:
        return None


class GatedPrefix(PrefixGraft):
    """attention(q, [g(x) P_k; k], [g(x) P_v; v])"""

    spans_tokens = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gate = Gate(self.site.width)

    def batched(self, prefix: Tensor, x: Tensor) -> Tensor:
        return prefix[:, None] * self.gate(x).view(-1, 1, 1, 1).to(prefix.dtype)


class GatedAfterMLP(AfterMLP):
    """h + g(h) A(h)"""

    spans_tokens = True

    def __init__(self, site: Site, bottleneck: int, init: Any) -> None:
        super().__init__(site, bottleneck, init)
        self.gate = Gate(site.width)

    def change(self, z: Tensor) -> Tensor:
        return (self.gate(z) * super().change(z)).to(z.dtype)


class GatedAtNorm(AtNorm):
    """s + g(LN(s)) A(LN(s)), s what enters a post-norm block's last norm"""

    spans_tokens = True

    def __init__(self, site: Site, bottleneck: int, init: Any) -> None:
        super().__init__(site, bottleneck, init)
        self.gate = Gate(site.width)

    def change(self, z: Tensor) -> Tensor:
        return (self.gate(z) * super().change(z)).to(z.dtype)


class UniPELT(PrefixTuning, PEFTMethod):
    """A prefix, a low-rank change of q and v, and a bottleneck after the MLP, each behind a gate that sees the input.

    Equation: attention(q, [g(x) P_k; k], [g(x) P_v; v]); q, v: W x + g(x) B A x; behind the MLP:
        h + g(h) (U relu(D h + b_D) + b_U); g(x) = mean over the sequence of sigmoid(w x + b), a gate of its own at each
        place
    Trains: PrefixTuning's numbers, LoRA's, Pfeiffer's, and four gates of dim + 1 a block; BERT-base: 11,083,376
    Merges: no, the gates depend on the input
    Source: Mao et al. 2022, arXiv:2110.07577, section 3; sizes and learning rate of AdapterHub's ``UniPELTConfig``.
        The gate of LoRA takes the place of alpha / rank, as in their code. A mean over the sequence would show a causal
        model what is to come: refused there. In text, padding takes part in the mean

    Args:
        tokens: learned positions a layer, at least 1.
        reparametrize: hidden width of the prefixes' MLP (True is 512); False trains them as they are.
        rank: of the change of q and v.
        reduction: the bottleneck is the block's width divided by this, rounded.
        dropout: of the learned keys and values.
        targets: ``attend`` for the prefix, and the linear maps that get a low-rank change.
    """

    tags = ("hybrid", ("block", "tokens", "linear", "routing"))
    peft = None
    inference_cost = "prefix, low-rank change, bottleneck and gates all stay"
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, tokens: int = 10, reparametrize: bool | int = True, rank: int = 8, reduction: float = 16,
                 dropout: float = 0.0, targets: Sequence[str] = ("attend", "q", "v"), **common: Any) -> None:
        super().__init__(tokens, reparametrize, dropout, targets, **common)
        if rank < 1 or reduction <= 0:
            raise ScionError(f"UniPELT: rank {rank} must be at least 1, reduction {reduction} positive")
        self.rank = rank
        self.adapter = Pfeiffer(reduction, name=self.name, layers=self.layers)

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role in self.targets and site.role != "attend" and site.kind == "module":
                raise ScionError(f"{self.name}: {site.name} is neither an attention nor a linear map")
        for block in anatomy.blocks:
            if block.causal:
                raise ScionError(f"{self.name}: its gates are means over the sequence, and in {anatomy.family} a token "
                                 "may see only those before it")

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return [*anatomy.sites(self.targets, self.layers, self.name), *self.adapter.sites(anatomy)]

    def build(self, site: Site) -> Graft:
        if site.role == "attend":
            return GatedPrefix(site, self.tokens, *self.starts[site.name], self.dropout)
        if site.role in self.targets:
            return GatedLoRA(site, self.rank)
        return (GatedAfterMLP if site.role == "mlp" else GatedAtNorm)(site, self.adapter.width(site.width), "zero_up")
