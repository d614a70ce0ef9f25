"""Adapters with the Conformer's convolution inside (Cappellazzo et al. 2024, arXiv:2312.03694, PETL-AST)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, renamed
from core.errors import ScionError
from core.graft import Graft, Tap
from core.method import PEFTMethod


class ConformerGraft(Graft):
    """The branch A(x) = U silu(BN(C glu(D LN(x)))) beside a sublayer, F(x) + A(x), behind it, y + A(y), or before it,
    F(x + A(x)).

    D is [2 bottleneck, dim], U [dim, bottleneck]; C convolves each of the bottleneck's channels over the tokens.
    """

    spans_tokens = True

    def __init__(self, site: Site, bottleneck: int, kernel: int, parallel: bool, layer_norm: bool) -> None:
        super().__init__(site)
        assert site.around is not None
        self.tap = Tap(site.around.into(site.role)) if parallel is True else None
        self.norm = nn.LayerNorm(site.width) if layer_norm else nn.Identity()
        self.down = nn.Linear(site.width, 2 * bottleneck)
        self.up = nn.Linear(bottleneck, site.width)
        self.conv = nn.Conv1d(bottleneck, bottleneck, kernel, groups=bottleneck)
        self.batch_norm = nn.BatchNorm1d(bottleneck)
        self.batch_norm.num_batches_tracked = None  # of no use where the momentum is fixed
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        # Centred; where tokens see only what is before them, so does the kernel.
        self.margins = (kernel - 1, 0) if site.around.causal else (kernel // 2, kernel // 2)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        entered = y if self.tap is None else self.read()
        return y + self.branch(entered).to(y.dtype)

    def branch(self, x: Tensor) -> Tensor:
        """A(x)"""
        normed = self.norm(x.to(self.down.weight.dtype))
        hidden = F.glu(self.down(normed), -1)
        series = F.pad(hidden.flatten(1, -2).transpose(1, 2), self.margins)  # [batch, bottleneck, tokens]
        series = F.silu(self.batch_norm(self.conv(series)))
        return self.up(series.transpose(1, 2).view_as(hidden))


class ConformerBefore(ConformerGraft):
    """F(x + A(x)), at the site that a sublayer reads."""

    after = Graft.after

    def before(self, x: Tensor) -> Tensor:
        return x + self.branch(x).to(x.dtype)


class WholeSequences(Graft):
    """Stands where a decoder's inputs arrive and refuses to go on from a cache."""

    def __init__(self, site: Site, asker: str) -> None:
        super().__init__(site)
        self.asker = asker

    def notice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0:
            raise ScionError(f"{self.asker} convolves over whole sequences, whose earlier tokens are not in the cache: "
                             "call the model with use_cache=False")


class ConformerAdapter(PEFTMethod):
    """An adapter whose middle is the Conformer's convolution over time.

    Equation: A(x) = U silu(BN(C glu(D LN(x) + b_D) + b_C)) + b_U, with C a depthwise convolution over the tokens;
        parallel: y = F(x) + A(x), x what the sublayer F reads; sequential: y = F(x) + A(F(x)); before: y = F(x + A(x))
    Trains: dim (3 bottleneck + 3) + bottleneck (kernel + 5) a site; AST-Base, reduction 96: 252,288
    Merges: no, it is not linear
    Source: Cappellazzo et al. 2024, arXiv:2312.03694 (PETL-AST), section 3; learning rate and weight decay of its
        released configuration. There the norms at the adapted sublayers are trained as well (norms=("norm2",), with it
        270,720), and the output of LN is thrown away: layer_norm=False. Batch statistics: gradients of two half batches
        are not those of the whole. In text the padding is convolved too; behind causal attention the kernel looks back
        only, and a cache is refused

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        kernel: tokens that the convolution sees, odd.
        targets: ``mlp``, ``attention`` or both.
        parallel: beside the sublayer; False puts it behind ("sequential" in the paper, and its "parallel-after" without
            a residual), ``before`` in front.
        layer_norm: whether A begins with a norm.
    """

    tags = ("additive", ("block",))
    inference_cost = "a bottleneck with a convolution over time stays at each site"
    recommended = {"lr": 5e-3, "weight_decay": 0.1}

    def __init__(self, reduction: float = 96, bottleneck: int | None = None, kernel: int = 31,
                 targets: Sequence[str] = ("mlp",), parallel: bool | Literal["before"] = True, layer_norm: bool = True,
                 **common: Any) -> None:
        super().__init__(**common)
        if reduction <= 0 or (bottleneck is not None and bottleneck < 1):
            raise ScionError(f"ConformerAdapter: reduction {reduction} must be positive, bottleneck {bottleneck} at "
                             "least 1")
        if kernel < 1 or kernel % 2 == 0:
            raise ScionError(f"ConformerAdapter: kernel {kernel} must be odd and positive")
        if parallel not in (True, False, "before"):
            raise ScionError(f"ConformerAdapter: parallel {parallel!r} must be true, false or 'before'")
        self.reduction, self.bottleneck, self.kernel = reduction, bottleneck, kernel
        self.targets, self.parallel, self.layer_norm = tuple(targets), parallel, layer_norm

    def width(self, dim: int) -> int:
        """The bottleneck of a block of width ``dim``."""
        return self.bottleneck or max(1, round(dim / self.reduction))

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = super().sites(anatomy)
        for site in found:
            if site.role not in ("attention", "mlp"):
                raise ScionError(f"{self.name}: {site.name} is no sublayer: take 'attention' or 'mlp'")
            if site.around is not None and site.role in site.around.described.flat:
                raise ScionError(f"{self.name}: the {site.role} of {anatomy.family} gets the tokens of all samples in "
                                 "one row, so that a convolution would run from one sample into the next")
        if self.parallel == "before":  # what enters a sublayer may be wider than a fused part: the whole module's input
            found = [self._entry(anatomy, site) for site in found]
        if any(site.around and site.around.causal for site in found):
            found = [*found, anatomy.inputs]
        return found

    def _entry(self, anatomy: Anatomy, sublayer: Site) -> Site:
        """Where a sublayer reads."""
        assert sublayer.block is not None
        block = anatomy.blocks[sublayer.block]
        entry, gate = block.into(sublayer.role), block.sites.get("mlp.gate")
        is_gated = entry.role == "mlp.up" and gate is not None and gate.module is not entry.module
        if is_gated or entry.role in ("v", "cross.q"):
            raise ScionError(f"{self.name}: the {sublayer.role} of {anatomy.family} reads its input in several maps, "
                             "so that parallel='before' has no one place there")
        return renamed(entry, rows=None)

    def build(self, site: Site) -> Graft:
        if site.around is None:
            return WholeSequences(site, self.name)
        kind = ConformerBefore if self.parallel == "before" else ConformerGraft
        return kind(site, self.width(site.width), self.kernel, self.parallel is True, self.layer_norm)
