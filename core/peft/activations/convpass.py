"""Convpass: convolutions on the grid of tokens, beside the sublayers (Jie and Deng 2022, arXiv:2207.07039)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft, Tap
from core.method import PEFTMethod

SUBLAYERS = {"attention": "attention", "attention.branch": "attention", "mlp": "mlp"}


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x)"""
    return x * torch.sigmoid(1.702 * x)


class ConvpassGraft(Graft):
    """y + s U f(C f(D x)), f(z) = z sigmoid(1.702 z), C a 3 x 3 convolution on the grid of tokens.

    D is [bottleneck, dim], U [dim, bottleneck]; a special token is an image of one pixel for C.
    """

    def __init__(self, site: Site, bottleneck: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        block = site.around
        assert block is not None
        windows = site.role == "attention.branch"  # what attention reads is the whole map, before it is cut
        self.tap = Tap(block.sites["norm1"], "output") if windows else Tap(block.into(SUBLAYERS[site.role]))
        self.scale = scale
        self.down, self.up = nn.Linear(site.width, bottleneck), nn.Linear(bottleneck, site.width)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.down.weight)
        for tensor in (self.down.bias, self.up.weight, self.up.bias, self.conv.bias, self.conv.weight):
            assert tensor is not None
            nn.init.zeros_(tensor)
        with torch.no_grad():
            self.conv.weight[:, :, 1, 1] = torch.eye(bottleneck)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.site.around is not None and self.site.around.grid is not None
        hidden = quick_gelu(self.down(self.read().to(self.down.weight.dtype)))
        special, grid = self.site.around.grid.split(hidden)
        special = nn.functional.linear(special, self.conv.weight[:, :, 1, 1], self.conv.bias)
        hidden = self.site.around.grid.join(special, self.conv(grid), like=hidden)
        return y + (self.scale * self.up(self.dropout(quick_gelu(hidden)))).to(y.dtype)


class Convpass(PEFTMethod):
    """A bottleneck with a 3 x 3 convolution on the grid of tokens, beside attention and beside the MLP.

    Equation: y <- F(x) + s U f(C f(D x)), F the sublayer and x what it reads (behind its norm), f QuickGELU, C the
        convolution; the class token is an image of one pixel
    Trains: 2 dim bottleneck + 9 bottleneck^2 + 2 bottleneck + dim a sublayer; ViT-B/16, bottleneck 8: 327,552, at
        attention alone 163,776
    Merges: no, it is not linear
    Source: Jie and Deng 2022, arXiv:2207.07039, section 3.2 (s there is searched in 0.01 to 100, task by task). On
        backbones that cut maps into windows it stands on the whole map; in a network without attention beside the MLP
        alone. Where a block scales its sublayers (LayerScale), the change is scaled too

    Args:
        bottleneck: channels of the convolution, at least 1.
        scale: s.
        targets: ``attention``, ``mlp`` or both.
        dropout: behind the second activation.
    """

    tags = ("additive", ("block",))
    inference_cost = "a bottleneck with a small convolution stays beside each sublayer"
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}

    def __init__(self, bottleneck: int = 8, scale: float = 1.0, targets: Sequence[str] = ("attention", "mlp"),
                 dropout: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        if bottleneck < 1 or scale == 0 or not 0 <= dropout < 1:
            raise ScionError(f"Convpass: bottleneck {bottleneck} must be at least 1, scale {scale} other than 0, "
                             f"dropout {dropout} at least 0 and below 1")
        self.bottleneck, self.scale, self.targets, self.dropout = bottleneck, scale, tuple(targets), dropout

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = []
        for site in super().sites(anatomy):
            block = site.around
            if site.role not in SUBLAYERS or block is None:
                raise ScionError(f"{self.name}: {site.name} is no sublayer: take 'attention' or 'mlp'")
            if block.grid is not None:
                found.append(block.sites.get(f"{site.role}.branch", site))
        if not found:
            raise ScionError(f"{self.name} convolves over the grid of an image's or a spectrogram's tokens; those of "
                             f"{anatomy.family} are no grid")
        return found

    def build(self, site: Site) -> Graft:
        return ConvpassGraft(site, self.bottleneck, self.scale, self.dropout)
