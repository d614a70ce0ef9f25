"""Adapters beside a sublayer: He et al. 2021 (arXiv:2110.04366), AdaptFormer (Chen et al. 2022, arXiv:2205.13535)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Attention, Graft, Tap
from core.method import PEFTMethod
from core.peft.activations.houlsby import Bottleneck

Input = Literal["normed", "residual"]
SUBLAYERS = {"attention": "attention", "o": "attention", "cross.attention": "cross.attention",
             "cross.o": "cross.attention", "mlp": "mlp", "attend": "attention", "cross.attend": "cross.attention"}
"""Where the change is added, and the sublayer beside which it stands."""


class Beside(Bottleneck):
    """s (U relu(dropout(D x + b_D)) + b_U), with x read where the sublayer reads."""

    activation = staticmethod(F.relu)

    def __init__(self, site: Site, bottleneck: int, init: str, width: int, scale: float | Literal["learned"],
                 dropout: float, reads: Input, biases: bool = True) -> None:
        super().__init__(site, bottleneck, "zero_up" if init == "zero_up" else "normal", width)
        nn.init.zeros_(self.down.bias)
        if not biases:
            for linear in (self.down, self.up):
                linear.register_parameter("bias", None)
        assert site.around is not None
        sublayer = SUBLAYERS[site.role]
        self.tap = Tap(site.around.into(sublayer) if reads == "normed" else site.around.beside(sublayer))
        self.scale = nn.Parameter(self.up.weight.new_ones(())) if scale == "learned" else scale
        self.dropout = nn.Dropout(dropout)

    def change(self, z: Tensor) -> Tensor:
        """The input [..., dim] -> what is added, before the scale, in the type of the bottleneck."""
        return self.up(self.dropout(self.activation(self.down(z.to(self.down.weight.dtype)))))


class BesideSublayer(Beside):
    """y + s A(x), on the sublayer's output."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.scale * self.change(self.read())).to(y.dtype)


class BesideHeads(Beside):
    """h + s A(x), on the heads side by side, before the output projection."""

    def before(self, x: Tensor) -> Tensor:
        return x + (self.scale * self.change(self.read())).to(x.dtype)


class BesideEachHead(Graft):
    """softmax(q K^T) V + s relu(q P_k^T) P_v for each head, with P_k and P_v [bottleneck, heads, width]."""

    def __init__(self, site: Site, bottleneck: int, init: str, scale: float | Literal["learned"]) -> None:
        super().__init__(site)
        assert site.heads is not None
        shape = bottleneck, site.heads.query, site.heads.width
        self.P_k = nn.Parameter(torch.empty(shape).normal_(std=0.02))
        self.P_v = nn.Parameter(torch.zeros(shape) if init == "zero_up" else torch.empty(shape).normal_(std=0.02))
        self.scale = nn.Parameter(torch.ones(())) if scale == "learned" else scale

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        hidden = F.relu(torch.einsum("bhqw,lhw->bhql", q.to(self.P_k.dtype), self.P_k))
        change = torch.einsum("bhql,lhw->bhqw", hidden, self.P_v)
        out = attention(q, k, v, mask)
        return out + (self.scale * change).to(out.dtype)


class ParallelAdapter(PEFTMethod):
    """A bottleneck beside a sublayer: it reads what the sublayer reads, and is added to what comes out.

    Equation: y <- F(x) + s (U relu(D x + b_D) + b_U), F the MLP; at ``o`` the change is added to attention's heads,
        before the output projection; at ``attend`` each head has its own: softmax(q K^T) V + s relu(q P_k^T) P_v
    Trains: 2 bottleneck dim + bottleneck + dim a site (2 bottleneck dim without biases, 1 more for a learned scale);
        ViT-B/16 or BERT-base, reduction 2: 7,091,712, with learned scales 7,091,724; multi-head 2 bottleneck dim
    Merges: no, the bottleneck is not linear
    Source: He et al. 2021, arXiv:2110.04366, sections 3.3 and 4.6: scale 4 on the MLP (2 on GLUE). For pre-norm
        networks their code reads the residual stream before the norm: input="residual". Learning rate of their GLUE
        runs. Left out of the multi-head form: a norm before it, which their code trains in BART alone

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        scale: s, or ``learned``: one number a site that starts at 1.
        targets: ``mlp``, ``attention`` (their outputs), ``o`` (the heads side by side), ``attend`` (each head, without
            biases and dropout); of a decoder also ``cross.attention``, ``cross.o``, ``cross.attend``.
        input: ``normed`` is what the sublayer reads, ``residual`` the stream before a pre-norm block's norm.
        dropout: within the bottleneck, behind its activation.
        init: ``zero_up`` starts as the identity (D Kaiming-uniform, U and biases zero), ``normal`` draws both maps
            from a normal of 0.02.
        biases: False leaves out b_D and b_U.
    """

    tags = ("additive", ("block",))
    inference_cost = "one bottleneck a site stays, its activation is not linear"
    recommended = {"lr": 1e-4, "weight_decay": 0.1, "head_lr": 1e-3}

    def __init__(self, reduction: float = 2, bottleneck: int | None = None, scale: float | Literal["learned"] = 4.0,
                 targets: Sequence[str] = ("mlp",), input: Input = "normed", dropout: float = 0.0,
                 init: Literal["zero_up", "normal"] = "zero_up", biases: bool = True, **common: Any) -> None:
        super().__init__(**common)
        name = type(self).__name__
        if reduction <= 0 or (bottleneck is not None and bottleneck < 1):
            raise ScionError(f"{name}: reduction {reduction} must be positive, bottleneck {bottleneck} at least 1")
        if scale != "learned" and (isinstance(scale, str) or scale == 0):
            raise ScionError(f"{name}: scale {scale!r} must be a number other than 0, or 'learned'")
        if not 0 <= dropout < 1:
            raise ScionError(f"{name}: dropout {dropout} must be at least 0 and below 1")
        for what, value, allowed in (("input", input, get_args(Input)), ("init", init, ("zero_up", "normal"))):
            if value not in allowed:
                raise ScionError(f"{name}: {what} {value!r} is not one of {', '.join(allowed)}")
        self.reduction, self.bottleneck, self.targets = reduction, bottleneck, tuple(targets)
        self.scale: float | Literal["learned"] = scale
        self.input: Input = input
        self.dropout, self.init, self.biases = dropout, init, biases
        self.identity_at_start = init == "zero_up"

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck or max(1, round(dim / self.reduction))

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role not in SUBLAYERS:
                raise ScionError(f"{self.name}: {site.name} is no output of a sublayer; take {', '.join(SUBLAYERS)}")
            windows = site.around is not None and site.around.described.windows
            if windows and self.input == "residual" and site.role not in ("mlp", "attend"):
                raise ScionError(f"{self.name}: {site.name} is cut into windows, the residual stream is not: take "
                                 "input='normed'")

    def build(self, site: Site) -> Graft:
        if site.role.endswith("attend"):
            return BesideEachHead(site, self.width(site.width), self.init, self.scale)
        heads = site.role.endswith("o")
        return (BesideHeads if heads else BesideSublayer)(
            site, self.width(site.width), self.init, site.in_features if heads else site.width, self.scale,
            self.dropout, self.input, self.biases)


class AdaptFormer(ParallelAdapter):
    """A bottleneck beside the MLP, which reads the residual stream before the norm.

    Equation: out = x + MLP(LN(x)) + s (U relu(dropout(D x + b_D)) + b_U), s = 0.1
    Trains: 2 bottleneck dim + bottleneck + dim a block; ViT-B/16, bottleneck 64: 1,189,632, bottleneck 8: 156,768,
        bottleneck 32 without biases: 589,824
    Merges: no, the bottleneck is not linear
    Source: Chen et al. 2022, arXiv:2205.13535, section 3.2. Trained there by SGD, momentum 0.9, lr 0.1 batch / 256;
        recommended here: AdamW with the rate that PETL-AST takes for bottlenecks beside the MLP. In a post-norm block
        the residual stream is what the MLP reads. Where a block scales its sublayers (LayerScale) or drops them
        (stochastic depth), the change is scaled and dropped too.
        Bi-AdaptFormer (Jie et al. 2023, ICCV) is [AdaptFormer(bottleneck=32, biases=False), Quantize()]

    Args:
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        scale: s, or ``learned``: one number a block that starts at 1.
        dropout: within the bottleneck, behind its activation.
        reduction: alternative to ``bottleneck``: the block's width divided by this, rounded.
        targets: outputs of sublayers to add to, as ParallelAdapter's.
        input: ``residual``, or ``normed``: what the MLP reads.
        init: ``zero_up`` starts as the identity, ``normal`` draws both maps from a normal of 0.02.
        biases: False leaves out b_D and b_U.
    """

    tags = ("additive", ("block",))
    recommended = {"lr": 5e-3, "weight_decay": 0.0}

    def __init__(self, bottleneck: int | None = 64, scale: float | Literal["learned"] = 0.1, dropout: float = 0.1,
                 reduction: float = 12, targets: Sequence[str] = ("mlp",), input: Input = "residual",
                 init: Literal["zero_up", "normal"] = "zero_up", biases: bool = True, **common: Any) -> None:
        super().__init__(reduction, bottleneck, scale, targets, input, dropout, init, biases, **common)
