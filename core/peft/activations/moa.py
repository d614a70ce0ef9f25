"""Mixtures of adapters, dense and soft (Cappellazzo et al. 2024, arXiv:2402.00828)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft, Tap
from core.method import PEFTMethod
from core.method.options import at_least

Kind = Literal["soft", "dense"]


class Adapters(Graft):
    """n bottlenecks E_i(z) = U_i gelu(D_i z + b_i) + c_i side by side, D [n, dim, bottleneck], U [n, bottleneck, dim];
    U and the biases start at zero."""

    def __init__(self, site: Site, adapters: int, bottleneck: int) -> None:
        super().__init__(site)
        assert site.around is not None
        self.tap = Tap(site.around.into(site.role))
        bound = 1 / math.sqrt(site.width)
        self.down = nn.Parameter(torch.empty(adapters, site.width, bottleneck).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(adapters, bottleneck, site.width))
        self.down_bias = nn.Parameter(torch.zeros(adapters, 1, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(adapters, 1, site.width))

    def change(self, x: Tensor) -> Tensor:
        """x [batch, tokens, dim] -> what is added to the sublayer's output."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.read().to(self.down.dtype)
        # A flat sublayer gets [batch * tokens, dim].
        tokens = z.flatten(1, -2) if z.dim() > 2 else z[:, None]
        return y + self.change(tokens).view_as(z).to(y.dtype)


class DenseMixture(Adapters):
    """sum_i p_i E_i(x), p = softmax(R x + r) for each token."""

    def __init__(self, site: Site, adapters: int, bottleneck: int) -> None:
        super().__init__(site, adapters, bottleneck)
        self.router = nn.Linear(site.width, adapters)

    def change(self, x: Tensor) -> Tensor:
        shares = F.softmax(self.router(x), -1)  # [batch, tokens, n]
        hidden = F.gelu(torch.einsum("btd,ndr->btnr", x, self.down) + self.down_bias[:, 0])
        shared = shares[..., None] * hidden
        return torch.einsum("btnr,nrd->btd", shared, self.up) + shares @ self.up_bias[:, 0]


class SoftMixture(Adapters):
    """Slots z_ij = sum_t softmax_t(x_t Phi)_ij x_t go to adapter i; token t gets sum_ij softmax_ij(x_t Phi) E_i(z_ij).

    Phi is [dim, n x slots].
    """

    spans_tokens = True

    def __init__(self, site: Site, adapters: int, bottleneck: int, slots: int) -> None:
        super().__init__(site, adapters, bottleneck)
        self.slots = slots
        self.phi = nn.Parameter(nn.init.xavier_normal_(torch.empty(site.width, adapters * slots)))

    def change(self, x: Tensor) -> Tensor:
        logits = x @ self.phi  # [batch, tokens, n x slots]
        dispatch, combine = F.softmax(logits, 1), F.softmax(logits, 2)
        slots = torch.unflatten(dispatch.transpose(1, 2) @ x, 1, (-1, self.slots))  # [batch, n, slots, dim]
        hidden = F.gelu(slots @ self.down + self.down_bias)
        return combine @ (hidden @ self.up + self.up_bias).flatten(1, 2)


class MixtureOfAdapters(PEFTMethod):
    """Several bottlenecks beside a sublayer: each token is given to all by shares, or mixtures of tokens to each.

    Equation: y = F(x) + sum_i p_i E_i(x), E_i(z) = U_i gelu(D_i z + b_i) + c_i; dense: p = softmax(R x + r);
        soft: E_i sees slots sum_t softmax_t(x Phi)_ij x_t, and p = softmax_ij(x Phi)
    Trains: n (2 dim bottleneck + bottleneck + dim) a site, and dim n slots (soft) or (dim + 1) n (dense); AST-Base,
        seven adapters, reduction 128, one slot: 903,672
    Merges: no, it is not linear
    Source: Cappellazzo et al. 2024, arXiv:2402.00828 (Soft-MoA, Dense-MoA), whose runs also train the norm at the
        sublayer: norms=("norm2",). Soft mixtures look at all tokens, padding too, so that behind causal attention only
        dense ones can stand

    Args:
        kind: ``soft`` or ``dense``.
        adapters: n, at least 1.
        reduction: a bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        slots: mixtures of tokens that each adapter of a soft mixture gets.
        targets: ``mlp``, ``attention`` or both.
    """

    tags = ("additive", ("block", "routing"))
    inference_cost = "all adapters stay beside each sublayer"
    recommended = {"lr": 5e-3, "weight_decay": 0.1}

    def __init__(self, kind: Kind = "soft", adapters: int = 7, reduction: float = 128, bottleneck: int | None = None,
                 slots: int = 1, targets: Sequence[str] = ("mlp",), **common: Any) -> None:
        super().__init__(**common)
        if kind not in get_args(Kind):
            raise ScionError(f"MixtureOfAdapters: kind {kind!r} is not one of {', '.join(get_args(Kind))}")
        at_least(1, "MixtureOfAdapters", adapters=adapters, slots=slots)
        if reduction <= 0 or (bottleneck is not None and bottleneck < 1):
            raise ScionError(f"MixtureOfAdapters: reduction {reduction} must be positive, bottleneck {bottleneck} at "
                             "least 1")
        self.kind, self.adapters, self.reduction, self.bottleneck = kind, adapters, reduction, bottleneck
        self.slots, self.targets = slots, tuple(targets)

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck or max(1, round(dim / self.reduction))

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if site.role not in ("attention", "mlp") or site.around is None:
                raise ScionError(f"{self.name}: {site.name} is no sublayer: take 'attention' or 'mlp'")
            if self.kind == "soft" and site.around.causal:
                raise ScionError(f"{self.name}: a soft mixture looks at all tokens, and those of {site.name} may see "
                                 "only what is before them: take kind='dense'")

    def build(self, site: Site) -> Graft:
        if self.kind == "dense":
            return DenseMixture(site, self.adapters, self.width(site.width))
        return SoftMixture(site, self.adapters, self.width(site.width), self.slots)
