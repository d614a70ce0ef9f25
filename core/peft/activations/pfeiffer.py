"""Pfeiffer adapters: one bottleneck a block, after the MLP (Pfeiffer et al. 2020, arXiv:2005.00052)."""

from __future__ import annotations

from typing import Any, get_args

import torch.nn.functional as F
from torch import Tensor

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.activations.houlsby import Bottleneck, Init


class AfterMLP(Bottleneck):
    """Pre-norm: the MLP's output h becomes h + U relu(D h + b_D) + b_U."""

    activation = staticmethod(F.relu)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.change(y)


class AtNorm(Bottleneck):
    """Post-norm: what enters the block's last norm, s = h + x, becomes s + U relu(D LN(s) + b_D) + b_U.

    With h' = h + A(LN(h + x)) the norm receives h' + x = s + A(LN(s)): the residual x is in s already, and a second
    adapter finds in s what the first made of it.
    """

    activation = staticmethod(F.relu)

    def before(self, x: Tensor) -> Tensor:
        return x + self.change(self.again(x.to(next(self.site.module.parameters()).dtype)))


class Pfeiffer(PEFTMethod):
    """One bottleneck in each block, after the MLP; on a post-norm block it reads the hidden state through the norm.

    Equation: pre-norm: h <- h + A(h), A(z) = U relu(D z + b_D) + b_U, on the MLP's output h, before the residual x is
        added; post-norm: h <- h + A(LN(h + x)), with the block's own frozen LN, which then sees the result.
        Stacked ones follow each other: h_1 = h + A_1(LN(h + x)), h_2 = h_1 + A_2(LN(h_1 + x))
    Trains: 2 bottleneck dim + bottleneck + dim a block; ViT-B/16 or BERT-base, reduction 16: 894,528, bottleneck 64:
        1,189,632
    Merges: no, the bottleneck is not linear
    Source: Pfeiffer et al. 2020, arXiv:2005.00052 (MAD-X), section 2.2, and AdapterHub's ``seq_bn`` with
        ``original_ln_before`` and ``residual_before_ln``. That library starts both maps from a normal of 0.02, biases
        zero: init="normal"; zeros in U make the start exact. Learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        init: ``zero_up`` starts as the identity, ``normal`` as the library, ``near_identity`` as Houlsby's paper.
    """

    tags = ("additive", ("block",))
    inference_cost = "one bottleneck a block stays, its activation is not linear"
    recommended = {"lr": 5e-3, "weight_decay": 0.1}

    def __init__(self, reduction: float = 16, bottleneck: int | None = None, init: Init = "zero_up", **common: Any
                 ) -> None:
        super().__init__(**common)
        name = type(self).__name__
        if reduction <= 0 or (bottleneck is not None and bottleneck < 1):
            raise ScionError(f"{name}: reduction {reduction} must be positive, bottleneck {bottleneck} at least 1")
        if init not in get_args(Init):
            raise ScionError(f"{name}: init {init!r} is not one of {', '.join(get_args(Init))}")
        self.reduction, self.bottleneck = reduction, bottleneck
        self.init: Init = init
        self.identity_at_start = init == "zero_up"

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck or max(1, round(dim / self.reduction))

    def sites(self, anatomy: Anatomy) -> list[Site]:
        keep = anatomy.layer_indices(self.layers, self.name)
        found = []
        for block in anatomy.blocks:
            role = "mlp" if block.pre_norm else "norm2"
            if block.index in keep:
                if role not in block.sites:
                    raise ScionError(f"{self.name} needs the role {role!r}, which block {block.index} of "
                                     f"{anatomy.family} does not have")
                found.append(block.sites[role])
        return found

    def build(self, site: Site) -> Graft:
        return (AfterMLP if site.role == "mlp" else AtNorm)(site, self.width(site.width), self.init)
