"""RepAdapter: linear adapters that vanish into the maps behind them (Luo et al. 2023, arXiv:2302.08106)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, renamed
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod

READERS = {"attention": ("qkv", "q", "k", "v"), "mlp": ("mlp.up", "mlp.gate")}
"""The linear maps that read what enters a sublayer."""


class Adapter(nn.Module):
    """B dropout(A x + a) + b, with A [bottleneck, dim] and, in `groups` blocks, B [dim, bottleneck]."""

    def __init__(self, dim: int, bottleneck: int, groups: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(nn.init.xavier_uniform_(torch.empty(bottleneck, dim)))
        self.blocks = nn.Parameter(torch.zeros(groups, dim // groups, bottleneck // groups))
        self.a = nn.Parameter(torch.zeros(bottleneck)) if bias else None
        self.b = nn.Parameter(torch.zeros(dim)) if bias else None
        self.dropout = nn.Dropout(dropout)

    @property
    def B(self) -> Tensor:
        """The second map, dense."""
        return torch.block_diag(*self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.dropout(F.linear(x, self.A, self.a)), self.B, self.b)


class RepAdapterGraft(Graft):
    """W (x + s (B (A x + a) + b)), in front of one of the maps that read x; the first one owns the adapter."""

    reads_weight = True  # what else stands here sees the new input, so that it must be merged first

    def __init__(self, site: Site, adapter: Adapter, scale: float, owns: bool) -> None:
        super().__init__(site)
        self.shared, self.scale = [adapter], scale  # in a list: another graft may have it
        if owns:
            self.adapter = adapter

    def before(self, x: Tensor) -> Tensor:
        [adapter] = self.shared
        return x + (self.scale * adapter(x.to(adapter.A.dtype))).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        [adapter] = self.shared
        return weight + self.scale * (weight @ adapter.B.to(weight.dtype)) @ adapter.A.to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor | None:
        [adapter] = self.shared
        if adapter.a is None or adapter.b is None:
            return None
        shift = adapter.B @ adapter.a + adapter.b
        return bias + self.scale * self.site.matrix(self.site.full_weight).to(bias.dtype) @ shift.to(bias.dtype)


class RepAdapter(PEFTMethod):
    """A linear bottleneck in front of attention and of the MLP, written into their first maps after training.

    Equation: W x becomes W (x + scale (B dropout(A x + a) + b)) for the maps W that read what enters a sublayer, one
        adapter for q, k and v, one for the MLP's; A [bottleneck, dim] Xavier-uniform; B, in ``groups`` diagonal blocks,
        a and b zeros
    Trains: dim bottleneck (1 + 1 / groups) + bottleneck + dim a sublayer, two a block; ViT-B/16 and BERT-base: 239,808
    Merges: W (I + scale B A), and the shift scale W (B a + b) into the bias
    Source: Luo et al. 2023, arXiv:2302.08106, section 3 (number and section from memory); a dropout of 0.1 as in the
        released code (from memory); learning rate and decay of the VTAB recipe that it shares with FacT. Where a map
        has no bias the shift would have no place: a and b are left out there. Where q, k and v are separate maps the
        adapter runs for each, with a dropout of its own. Keys and values that cross-attention reads from an encoder
        stay as they are

    Args:
        bottleneck: width between A and B.
        groups: diagonal blocks of B; divides bottleneck and the block's width.
        scale: of the change; the paper tries 0.1, 0.5, 1, 5 and 10.
        dropout: between A and B, in [0, 1).
        targets: sublayers to adapt: ``attention``, ``mlp``.
    """

    tags = ("reparameterised", ("linear",))
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}

    def __init__(self, bottleneck: int = 8, groups: int = 2, scale: float = 1.0, dropout: float = 0.1,
                 targets: Sequence[str] = ("attention", "mlp"), **common: Any) -> None:
        super().__init__(**common)
        if bottleneck < 1 or groups < 1 or bottleneck % groups:
            raise ScionError(f"RepAdapter: bottleneck {bottleneck} must be a multiple of groups {groups}, both at "
                             "least 1")
        if scale == 0 or not 0 <= dropout < 1:
            raise ScionError(f"RepAdapter: scale {scale} must not be zero, dropout {dropout} must lie in [0, 1)")
        self.bottleneck, self.groups, self.scale, self.dropout = bottleneck, groups, scale, dropout
        self.targets: tuple[str, ...] = tuple(targets)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found: list[Site] = []
        for sublayer in anatomy.sites(self.targets, self.layers, self.name):
            if sublayer.role not in READERS or sublayer.block is None:
                raise ScionError(f"{self.name}: {sublayer.role!r} is no sublayer with an input of its own; take "
                                 f"{' or '.join(map(repr, READERS))}")
            here = anatomy.blocks[sublayer.block].sites
            readers: dict[int, Site] = {}  # a fused map is one, whatever parts it has
            for role in READERS[sublayer.role]:
                if role in here:
                    readers.setdefault(id(here[role].module), renamed(here[role], rows=None))
            found += readers.values()
        return found

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.kind not in ("linear", "conv1d"):
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) is no linear map of the "
                                 "last axis, into which alone the adapter can be written")
            if site.in_features % self.groups:
                raise ScionError(f"{self.name}: groups {self.groups} does not divide the width {site.in_features} at "
                                 f"{site.name}")

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self._biased: dict[tuple[int | None, bool], bool] = {}
        self._adapters: dict[tuple[int | None, bool], Adapter] = {}
        for site in sites:
            self._biased[_input(site)] = self._biased.get(_input(site), True) and site.bias is not None

    def build(self, site: Site) -> Graft:
        owns = _input(site) not in self._adapters
        if owns:
            self._adapters[_input(site)] = Adapter(site.in_features, self.bottleneck, self.groups, self.dropout,
                                                   self._biased[_input(site)])
        return RepAdapterGraft(site, self._adapters[_input(site)], self.scale, owns)


def _input(site: Site) -> tuple[int | None, bool]:
    """What the site reads: the block, and whether it is its MLP's input."""
    return site.block, site.role.startswith("mlp.")
