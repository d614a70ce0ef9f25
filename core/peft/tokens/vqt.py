"""VQT: visual query tuning (Tu, Mai and Chao 2023, arXiv:2212.03220)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Attention, Call, Graft
from core.json_types import Count
from core.method import AddsLoss, PEFTMethod, Staged
from core.method.options import not_negative, positive


class Exchange:
    """What the grafts of one VQT hand to each other while the root runs; neither copied nor pickled."""

    def __init__(self) -> None:
        self.begin(running=False)

    def begin(self, running: bool = True) -> None:
        self.running, self.answering = running, False
        self.keys: dict[int | None, tuple[Tensor, Tensor, Tensor | None] | None] = {}
        self.features: dict[int | None, Tensor] = {}

    def __reduce__(self) -> Any:
        return Exchange, ()


class KeyGraft(Graft):
    """Keeps the keys and values that the tokens made, and lets the queries attend to them."""

    def __init__(self, site: Site, exchange: Exchange) -> None:
        super().__init__(site)
        self.exchange = exchange

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        exchange, block, heads = self.exchange, self.site.block, self.site.heads
        assert heads is not None
        made = exchange.keys.get(block)
        if exchange.answering and made is not None:
            keys, values, seen = made
            times = k.shape[1] // keys.shape[1]  # grouped queries: k may arrive repeated
            if times > 1:
                keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
            return attention(q, keys, values, seen)
        if exchange.running and block not in exchange.keys:  # later calls of the block are reruns on queries
            times = k.shape[1] // heads.key
            # Copies: a view of the fused qkv would keep the queries of all tokens as well.
            exchange.keys[block] = (k[:, ::times].contiguous(), v[:, ::times].contiguous(), _of_last_token(mask))
        return attention(q, k, v, mask)


def _of_last_token(mask: Tensor | None) -> Tensor | None:
    """The row of the mask [..., queries, keys] in which padding is hidden and all that comes earlier is seen; a copy,
    for a view would keep the whole mask."""
    return None if mask is None else mask[..., -1:, :].clone()


class QueryGraft(Graft):
    """O = block(P), with the tokens' keys and values: the block's frozen module once more, on its queries P."""

    whole_batch = True
    reads_call = True

    def __init__(self, site: Site, exchange: Exchange, method: VQT) -> None:
        super().__init__(site)
        self.exchange, self.reduce, self.normalize = exchange, method.reduce, method.normalize
        bound = math.sqrt(6 / (method.fan + site.width))
        self.queries = nn.Parameter(torch.empty(method.tokens, site.width).uniform_(-bound, bound))
        self.mix = nn.Parameter(torch.full((method.tokens,), 1 / method.tokens)) if method.reduce == "sum" else None
        self.dropout = nn.Dropout(method.dropout)

    def after(self, x: Tensor, y: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        exchange, block = self.exchange, self.site.block
        if exchange.keys.get(block) is not None:
            queries = self.dropout(self.queries.to(y.dtype).expand(y.shape[0], -1, -1))
            exchange.answering = True
            try:
                out = self.site.rerun(queries, call.arguments, call.hidden)
            finally:
                exchange.answering = False
            exchange.keys[block] = None
            feature = unit(self.reduced(out), self.normalize)
            exchange.features[block] = feature if self.strength == 1 else feature * self.strength
        return y

    def reduced(self, out: Tensor) -> Tensor:
        """O [batch, tokens, dim] -> [batch, tokens dim], or [batch, dim]."""
        if self.reduce == "concat":
            return out.flatten(1)
        return out.mean(1) if self.mix is None else (self.mix.to(out.dtype) @ out)


class FeatureGraft(Graft):
    """[f, O_1, ..., O_L] in place of the root's feature f; in the second stage the columns ``kept`` of it."""

    kept: Tensor | None

    def __init__(self, site: Site, exchange: Exchange, method: VQT) -> None:
        super().__init__(site)
        self.exchange, self.method_name, self.normalize = exchange, method.name, method.normalize
        self.widths = dict(method.widths)
        self.columns = 0  # of which those are kept
        self.register_buffer("kept", None)

    def keep(self, kept: Tensor, columns: int) -> None:
        """Give only the columns ``kept`` [k] of ``columns``, in that order."""
        self.columns, self.kept = columns, kept.to(torch.int32)

    def limits(self) -> dict[str, int]:
        return {} if self.kept is None else {"kept": self.columns}

    def before(self, x: Tensor) -> Tensor:
        self.exchange.begin()
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        found = self.exchange.features
        self.exchange.begin(running=False)
        if not isinstance(y, Tensor) or y.dim() != 2:
            what = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ScionError(f"{self.method_name}: widens one feature a sample [batch, dim], but "
                             f"{type(self.site.module).__name__} returns {what}; attach to a module that pools its "
                             "tokens, as core.backbone.Backbone does")
        parts = [unit(y, self.normalize)]
        for block, width in self.widths.items():
            part = found.get(block)  # none where the block's graft is off
            if part is not None and self.batch is not None:
                part = part[self.batch]
            if part is not None and len(part) != len(y):
                raise ScionError(f"{self.method_name}: blocks that ran on {len(part)} samples, {len(y)} features")
            parts.append(y.new_zeros(y.shape[0], width) if part is None else part.to(y.dtype))
        feature = torch.cat(parts, dim=-1)
        if self.kept is None:
            return feature
        if feature.shape[1] != self.columns:
            raise ScionError(f"{self.method_name}: its columns were chosen among {self.columns}, here the feature has "
                             f"{feature.shape[1]}: attach the methods of the first stage in their order")
        return feature.index_select(1, self.kept)


def unit(feature: Tensor, normalize: bool) -> Tensor:
    """A feature [batch, width] of length 1 for each sample, if it is to be normalised."""
    return F.normalize(feature, dim=-1) if normalize else feature


class VQT(Staged, AddsLoss, PEFTMethod):
    """Learned queries summarise every frozen layer, and only the head reads the summaries.

    Equation: O_l = block_l(P_l), where P_l [tokens, dim] attends to the keys and values that layer l makes of its own
        tokens, and no token attends to P_l; f' = [nrm(f), nrm(O_1), ..., nrm(O_L)], nrm the l2 norm over all tokens of
        a layer; P ~ U(-v, v), v = sqrt(6 / (inputs of the patch projection + dim)), without one sqrt(6 / (2 dim))
    Trains: L tokens dim, and a head on dim + L tokens dim features; ViT-B/16, 1 token: 9,216; 10 tokens: 92,160;
        20 tokens: 184,320. ``sum`` trains L tokens more
    Merges: no, the feature is wider
    Source: Tu, Mai and Chao 2023, arXiv:2212.03220, section 3; the paper's code joins P to the tokens and keeps the
        whole backbone for backward, here the tokens run apart, without a gradient, and only keys and values are kept
        (same features and gradients). P sees what other methods make inside the block and of its keys and values (a
        prefix, say, but not what they put behind the whole block). It stands at the last token's place, under masks
        and under positions that attention adds (where it adds any, padding to another length moves that place), and
        sees all but padding. The head starts as its task has it (in the paper Kaiming, over its outputs). With
        ``keep`` there are two stages: the second has a new head on the int(keep x width) columns with the largest norms
        in the first one's head, and half its recommended learning rate. The command runs both; elsewhere fit, call
        ``advance(module)``, and fit again with a new optimizer. Left out: the combination of O_l by self-attention,
        whose form the paper does not give

    Args:
        tokens: queries a layer, at least 1.
        dropout: of the queries, in [0, 1).
        normalize: bring the feature and each layer's summary to length 1.
        reduce: what of O_l [tokens, dim] enters the feature: ``concat`` all of it, ``mean`` over the tokens, ``sum``
            with learned weights (at least 2 tokens).
        lr_factor: learning rate of the queries as a multiple of the run's, which the head has.
        keep: share of the feature's columns that the head reads in a second stage, in (0, 1]; None has one stage.
        sparsity: with ``keep``, lambda of the first stage's penalty, lambda sum_j |W_j|_2 over the columns of the head.
    """

    tags = ("additive", ("tokens", "side"))
    readings = ("feature",)
    identity_at_start = False
    needs = ("attend",)
    inference_cost = "`tokens` queries more in each layer, without keys, and a wider head"
    recommended = {"lr": 0.125, "weight_decay": 1e-4}
    structure_types = {"kept": Count, "columns": Count}

    fan: int
    """Inputs of what makes a token, on this model."""

    def __init__(self, tokens: int = 1, dropout: float = 0.1, normalize: bool = True,
                 reduce: Literal["concat", "mean", "sum"] = "concat", lr_factor: float = 1.0,
                 keep: float | None = None, sparsity: float = 1e-4, **common: Any) -> None:
        super().__init__(**common)
        if tokens < 1 or not 0 <= dropout < 1:
            raise ScionError(f"VQT: tokens {tokens} must be at least 1, dropout {dropout} lie in [0, 1)")
        if reduce not in ("concat", "mean", "sum") or (reduce == "sum" and tokens < 2):
            raise ScionError(f"VQT: reduce {reduce!r} is neither 'concat', 'mean' nor, from 2 tokens on, 'sum'")
        positive("VQT", lr_factor=lr_factor)
        if keep is not None and not 0 < keep <= 1:
            raise ScionError(f"VQT: keep {keep} must lie in (0, 1]")
        not_negative("VQT", sparsity=sparsity)
        self.tokens, self.dropout, self.normalize, self.reduce = tokens, dropout, normalize, reduce
        self.lr_factor, self.keep, self.sparsity = lr_factor, keep, sparsity
        self.stages = () if keep is None else ("wide", "compact")
        self.stage, self.first_lr = "wide", self.suggested["lr"]

    def check(self, anatomy: Anatomy) -> None:
        if any(block.described.windows for block in anatomy.blocks):
            raise ScionError(f"{self.name}: the blocks of {anatomy.family} cut a map into windows, each with keys of "
                             "its own; queries are no map, and have no place there")
        inside = anatomy.stem.get("head", []) + anatomy.stem.get("lm_head", [])
        if inside:
            raise ScionError(f"{self.name}: widens the feature that a head reads, but {type(anatomy.root).__name__} "
                             f"holds its head itself ({inside[0].path}); attach to the module without it")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        patches = anatomy.stem.get("patch_embed", [])
        fan = patches[0].in_features if patches and patches[0].kind == "conv" else anatomy.blocks[0].dim
        return {"stage": "wide", "suggested": {**self.suggested, "lr": self.first_lr}, "fan": fan}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return [*anatomy.stem["feature"], *anatomy.sites(("attend", "block"), self.layers, self.name)]

    def _widths(self, sites: list[Site]) -> dict[int | None, int]:
        times = self.tokens if self.reduce == "concat" else 1
        return {site.block: times * site.width for site in sites if site.role == "block"}

    def feature_dim(self, dim: int, anatomy: Anatomy) -> int:
        if self.stage == "compact":
            return len(self._feature().kept)  # type: ignore[arg-type]
        return dim + sum(self._widths(self.sites(anatomy)).values())

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        self.widths, self.exchange = self._widths(sites), Exchange()

    def build(self, site: Site) -> Graft:
        if site.role == "attend":
            return KeyGraft(site, self.exchange)
        kind = QueryGraft if site.role == "block" else FeatureGraft
        return kind(site, self.exchange, self)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{**group, "lr_factor": self.lr_factor} for group in super().param_groups()]

    # --------------------------------------------------------------------------------- the second stage

    def _feature(self) -> FeatureGraft:
        return next(graft for graft in self.grafts if isinstance(graft, FeatureGraft))

    def head_of(self, module: nn.Module) -> Tensor:
        """The weight [outputs, width] of the one linear map around the backbone that reads the wide feature."""
        inside = {id(parameter) for parameter in self.need_root().parameters()}
        found = [parameter for parameter in module.parameters() if id(parameter) not in inside
                 and parameter.dim() == 2 and parameter.shape[1] > sum(self.widths.values())]
        if len(found) != 1:
            raise ScionError(f"{self.name}: keep={self.keep} chooses columns of the head, but {type(module).__name__} "
                             f"has {len(found)} linear maps that could be it")
        return found[0]

    @property
    def adds_loss(self) -> bool:
        return self.keep is not None and self.sparsity > 0 and self.stage == "wide"

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        return self.sparsity * self.head_of(module).norm(dim=0).sum() if self.adds_loss else None

    def advance(self, module: nn.Module | None = None) -> None:
        """From the wide stage to the compact one: of what the head around the backbone (in ``module``) reads, only the
        columns with its largest norms are kept, in their order."""
        if self.keep is None:
            raise ScionError(f"{self.name}: with keep=None there is one stage only")
        if self.stage == "compact":
            raise ScionError(f"{self.name}: the compact stage is the last one")
        if module is None:
            raise ScionError(f"{self.name}: advance(module) needs the module whose head the first stage trained")
        norms = self.head_of(module).detach().norm(dim=0)
        kept = norms.topk(max(1, int(len(norms) * self.keep))).indices.sort().values
        self._become_compact(kept, len(norms))

    def _become_compact(self, kept: Tensor, columns: int) -> None:
        self._feature().keep(kept.to(next(self.module.parameters()).device), columns)
        self.stage = "compact"
        self.suggested = {**self.suggested, "lr": self.first_lr / 2}

    def structure(self) -> dict[str, Any]:
        if self.stage == "wide":
            return {}
        return {"kept": len(self._feature().kept), "columns": self._feature().columns}  # type: ignore[arg-type]

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure and self.stage == "wide":
            self._become_compact(torch.zeros(structure["kept"]), structure["columns"])
