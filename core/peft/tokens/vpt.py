"""VPT: visual prompts, at the input or in every layer (Jia et al. 2022, arXiv:2203.12119)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, Stack
from core.errors import ScionError
from core.graft import Attention, Graft, run_at
from core.method import PEFTMethod
from core.peft.tokens._sequence import Prompted, Values
from core.random_state import dropout_for_all


class DeepPrompts(Graft):
    """attention(q, [K(P); k], [V(P); v]), P [tokens, dim] the layer's own prompts, behind its norm.

    Prompts that are put into a layer and taken out behind it are read by the other tokens through their keys and values
    alone: nothing else of them need be computed.
    """

    def __init__(self, site: Site, prompt: Tensor, dropout: float) -> None:
        super().__init__(site)
        self.prompt = nn.Parameter(prompt)
        self.dropout = nn.Dropout(dropout)

    def tokens(self) -> Tensor:
        """The prompts [1 or samples, tokens, dim]."""
        return dropout_for_all(self.dropout, self.prompt)[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        block = self.site.around
        assert block is not None
        tokens = self.tokens().to(x.dtype)
        if block.pre_norm and "norm1" in block.sites:
            tokens = run_at(block.sites["norm1"], tokens)
        keys, values = attention.keys(tokens)
        # Where each sample has its own, its windows stand one behind the other.
        keys, values = (part.to(k.dtype).expand(len(k), -1, -1, -1) if len(part) == 1 else
                        part.to(k.dtype).repeat_interleave(len(k) // len(part), 0) for part in (keys, values))
        if keys.shape[1] != k.shape[1]:  # under grouped queries, k may arrive repeated
            keys, values = (part.repeat_interleave(k.shape[1] // part.shape[1], dim=1) for part in (keys, values))
        if mask is not None:  # every query sees the prompts
            open_ = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
            mask = mask.expand(*mask.shape[:-1], k.shape[-2])
            mask = torch.cat([open_(*mask.shape[:-1], keys.shape[-2]), mask], dim=-1)
        return attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), mask)


class VPT(Prompted, PEFTMethod):
    """Learned tokens in the sequence: new ones in every layer (deep), or some that enter at the first.

    Equation: deep: [x_l, _] = L_l([x_{l-1}, P_{l-1}]), shallow: [x_l, Z_l] = L_l([x_{l-1}, Z_{l-1}]), Z_0 = P_0;
        P [tokens, dim], behind the class token, without a position
    Trains: tokens x dim, and deep so in each layer; ViT-B/16, 10 tokens: shallow 7,680, deep 92,160
    Merges: no, they are tokens of the sequence
    Source: Jia et al. 2022, arXiv:2203.12119, section 3.2. Deep prompts are computed as keys and values of their layer
        alone, for nothing else of them is read; where maps are cut into windows, each window reads them. The prompts'
        outputs are not part of the result: a mean over all tokens is one over the input's. Trained there by SGD, with a
        rate searched from 0.05 to 50 times batch / 256; recommended here is AdamW's of PETL-AST

    Args:
        tokens: prompts (a layer), at least 1.
        deep: new prompts in each of ``layers``.
        dropout: of the prompts.
    """

    tags = ("additive", ("tokens",))
    recommended = {"lr": 1e-2, "weight_decay": 1e-4}

    def __init__(self, tokens: int = 10, deep: bool = True, dropout: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        if tokens < 1 or not 0 <= dropout < 1:
            raise ScionError(f"VPT: tokens {tokens} must be at least 1, dropout {dropout} at least 0 and below 1")
        if dropout and not deep:
            raise ScionError("VPT: dropout is for deep prompts")
        self.tokens, self.deep, self.dropout = tokens, deep, dropout
        self.patch_inputs = 0

    def sites(self, anatomy: Anatomy) -> list[Site]:
        if not self.deep:
            return super().sites(anatomy)
        if "attend" not in anatomy.roles:
            raise ScionError(f"{self.name} needs the role 'attend', which {anatomy.family} does not have")
        return anatomy.sites("attend", self.layers, self.name)

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        found = {} if self.deep else super().numbers(anatomy)
        patches = anatomy.stem.get("patch_embed")
        found["patch_inputs"] = patches[0].in_features if patches else 0  # numbers that a patch has
        return found

    def _start(self, dim: int) -> Tensor:
        """Xavier-uniform values, a patch's numbers being the inputs."""
        bound = math.sqrt(6 / ((self.patch_inputs or dim) + dim))
        return torch.empty(self.tokens, dim).uniform_(-bound, bound)

    def prompt_for(self, stack: Stack, dim: int, table: nn.Embedding | None) -> tuple[Tensor | None, Values | None]:
        return self._start(dim), None

    def build(self, site: Site) -> Graft:
        return DeepPrompts(site, self._start(site.width), self.dropout) if self.deep else super().build(site)
