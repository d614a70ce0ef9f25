"""Houlsby adapters: two serial bottlenecks a block (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod

Init = Literal["zero_up", "near_identity", "normal"]


class Bottleneck(Graft):
    """What bottleneck adapters share: the change U f(D z + b_D) + b_U; D is [bottleneck, dim], U [dim, bottleneck]."""

    activation = staticmethod(F.gelu)

    def __init__(self, site: Site, bottleneck: int, init: Init, width: int | None = None) -> None:
        super().__init__(site)
        self.down = nn.Linear(site.width, bottleneck)
        self.up = nn.Linear(bottleneck, width or site.width)
        nn.init.zeros_(self.up.bias)
        if init == "zero_up":
            nn.init.zeros_(self.up.weight)
            return
        nn.init.zeros_(self.down.bias)
        for linear in (self.down, self.up):
            if init == "near_identity":
                nn.init.trunc_normal_(linear.weight, std=1e-2, a=-2e-2, b=2e-2)
            else:
                nn.init.normal_(linear.weight, std=2e-2)

    def change(self, z: Tensor) -> Tensor:
        """z [..., dim] -> what is added to the hidden state [..., dim], in the type of z."""
        return self.up(self.activation(self.down(z.to(self.down.weight.dtype)))).to(z.dtype)


class BottleneckGraft(Bottleneck):
    """y + U gelu(D y + b_D) + b_U"""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y)


class Houlsby(PEFTMethod):
    """A bottleneck after the attention and after the MLP of each block, each before the residual is added.

    Equation: h <- h + U gelu(D h + b_D) + b_U, on the sublayer's output, before residual and post-norm
    Trains: 2 bottleneck dim + bottleneck + dim a site, two sites a block; ViT-B/16 or BERT-base, bottleneck 64:
        2,379,264
    Merges: no, the bottleneck is not linear
    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1. The paper also trains all norms: norms=("norm1",
        "norm2", "norm"). Its start, a truncated normal of 0.01 in both maps, is init="near_identity"; zeros in U make
        the start exact. Learning rate of Cappellazzo et al. 2024 (PETL-AST).

    Args:
        bottleneck: width of the bottleneck, at least 1.
        reduction: alternative to ``bottleneck``: the block's width divided by this, rounded.
        targets: sublayer outputs to adapt.
        init: ``zero_up`` starts as the identity, ``near_identity`` as in the paper; ``normal`` draws both maps
            from a normal of 0.02.
    """

    tags = ("additive", ("block",))
    inference_cost = "two bottlenecks a block stay, their activation is not linear"
    recommended = {"lr": 5e-3, "weight_decay": 0.1}

    def __init__(self, bottleneck: int = 64, reduction: float | None = None,
                 targets: Sequence[str] = ("attention", "mlp"), init: Init = "zero_up", **common: Any) -> None:
        super().__init__(**common)
        if bottleneck < 1 or (reduction is not None and reduction <= 0):
            raise ScionError(f"Houlsby: bottleneck {bottleneck} must be at least 1, reduction {reduction} positive")
        self.bottleneck, self.reduction, self.targets = bottleneck, reduction, tuple(targets)
        self.init: Init = init
        self.identity_at_start = init == "zero_up"

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck if self.reduction is None else max(1, round(dim / self.reduction))

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role not in ("attention", "mlp", "block"):
                raise ScionError(f"{self.name}: {site.name} is no hidden state of a block; take 'attention', 'mlp' or "
                                 "'block'")

    def build(self, site: Site) -> Graft:
        return BottleneckGraft(site, self.width(site.width), self.init)
