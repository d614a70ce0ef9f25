"""(IA)^3: learned scales of keys, values and the MLP's activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod


class ScaledOutput(Graft):
    """l * y"""

    reads_output = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.l = nn.Parameter(torch.ones(site.out_features))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.site.put(y, self.site.take(y) * self.site.per_channel(self.l))

    def merged(self, weight: Tensor) -> Tensor:
        return self.l.to(weight.dtype)[:, None] * weight

    def merged_bias(self, bias: Tensor) -> Tensor:
        return self.l.to(bias.dtype) * bias


class ScaledInput(Graft):
    """W (l * x) + b"""

    reads_weight = True  # what else stands here sees the scaled input, so that it must be merged first

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.l = nn.Parameter(torch.ones(site.in_features))

    def before(self, x: Tensor) -> Tensor:
        return (x * self.site.per_channel(self.l)).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * self.l.to(weight.dtype)


class IA3(PEFTMethod):
    """Keys, values and the MLP's activations are scaled, channel by channel.

    Equation: k <- l_k * k, v <- l_v * v, and W_down (l_ff * a) + b for the activations a between the MLP's maps; ones
    Trains: 2 dim + MLP width a block; ViT-B/16 and BERT-base: 55,296
    Merges: rows of W_k, W_v and of their biases, columns of W_down
    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3; learning rate of its recipe (from memory)

    Args:
        outputs: roles whose outputs are scaled.
        inputs: roles whose inputs are scaled.
    """

    tags = ("additive", ("scale",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 3e-3, "weight_decay": 0.0}

    def __init__(self, outputs: Sequence[str] = ("k", "v"), inputs: Sequence[str] = ("mlp.down",), **common: Any
                 ) -> None:
        super().__init__(**common)
        if not outputs and not inputs:
            raise ScionError("IA3: with neither outputs nor inputs nothing is scaled")
        self.output_roles, self.input_roles = tuple(outputs), tuple(inputs)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return [site for roles in (self.output_roles, self.input_roles) if roles
                for site in anatomy.sites(roles, self.layers, self.name)]

    def check(self, anatomy: Anatomy) -> None:
        for site in anatomy.sites(self.input_roles, self.layers, self.name) if self.input_roles else ():
            if site.kind == "conv" and site.in_features != site.module.in_channels:  # type: ignore[operator]
                raise ScionError(f"{self.name}: {site.name} sees patches; its input channels cannot be scaled alone")
            if site.rows is not None or site.role in self.output_roles:
                raise ScionError(f"{self.name}: {site.name} shares its input with others; scale it as an output, and "
                                 "not as both")

    def build(self, site: Site) -> Graft:
        return ScaledInput(site) if site.role in self.input_roles else ScaledOutput(site)
