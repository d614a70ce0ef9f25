"""What one token costs that a language model writes, counted before any is written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.flop_counter import FlopCounterMode

from core.cost import ATTENTION_FLOPS, stand_ins
from core.graft import Graft
from core.text.backbones import LanguageModel
from core.text.generate import own_cache, without_cache

HALVES = ("self_attention_cache", "cross_attention_cache")
"""The caches of a decoder that reads an encoder."""


@dataclass(frozen=True)
class TokenCost:
    """Counts for one token of one text."""

    context: int
    """Tokens that the model has read before it; of encoder and decoder, each of the two."""
    cached: bool
    """Whether earlier tokens are in a cache; without one they are computed anew."""
    flops: int
    """Of matrix products, convolutions and attention; a multiplication and an addition are two."""
    weight_bytes: int
    """All parameters once: in a batch of one they are what is read for a token."""
    cache_bytes: int
    """Keys and values of the tokens before it, which are read too."""
    growth_bytes: int
    """By which the cache grows."""

    def to_dict(self) -> dict[str, Any]:
        """All counts as JSON can hold them."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        way = "with a cache" if self.cached else "without a cache"
        lines = [f"one token written behind {self.context:,}, {way}"]
        rows = {"FLOPs a token": self.flops, "bytes of weights": self.weight_bytes}
        if self.cached:
            rows |= {"bytes of the cache": self.cache_bytes, "  more a token": self.growth_bytes}
        lines += [f"{name:<20}{value:>20,}" for name, value in rows.items()]
        return "\n".join(lines)


def token_cost(backbone: LanguageModel, context: int) -> TokenCost | None:
    """Count what the next token costs behind ``context`` others, without computing anything; see `core.cost`.

    Returns:
        None where the model's forward reads values, and the model is on the meta device and has none.
    """
    grafts = [module for module in backbone.modules() if isinstance(module, Graft) and module.live]
    is_cached = not without_cache(grafts)
    # Made where it is used: a count that ends in the midst leaves it half full.
    cache = functools.partial(own_cache, backbone, grafts)
    try:
        return _count(backbone, context, cache if is_cached else None, fake=True)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if any(parameter.is_meta for parameter in backbone.parameters()):
            return None
    return _count(backbone, context, cache if is_cached else None, fake=False)


def _count(backbone: LanguageModel, context: int, cache: Callable[[], dict[str, Any]] | None, fake: bool) -> TokenCost:
    found: dict[str, int] = {}
    step = _Step(backbone, context, cache, found)
    with stand_ins(step, (), fake) as (forward, _):
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
            step.total = counter.get_total_flops
            forward()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in backbone.parameters())
    return TokenCost(context, cache is not None, found["flops"], weights, found["cache"], found["growth"])


class _Step(nn.Module):
    """Reads ``context`` tokens, then one more, and notes what that one took; ``cache`` makes the model's argument for
    an empty cache, and is None where there is to be none."""

    def __init__(self, backbone: LanguageModel, context: int, cache: Callable[[], dict[str, Any]] | None,
                 found: dict[str, int]) -> None:
        super().__init__()
        self.backbone, self.context, self.cache, self.found = backbone, context, cache, found
        self.total: Callable[[], int] = lambda: 0

    @torch.no_grad()
    def forward(self) -> None:
        self.backbone.eval()
        model: Any = self.backbone.model
        written = "decoder_input_ids" if self.backbone.is_encoder_decoder else "input_ids"
        before: dict[str, Any] = {}
        if self.backbone.is_encoder_decoder:
            before["encoder_outputs"] = model.get_encoder()(input_ids=_ids(self.context))
        if self.cache is None:
            start = self.total()
            model(**before, **{written: _ids(self.context + 1)}, use_cache=False)
            self.found.update(flops=self.total() - start, cache=0, growth=0)
            return
        empty = self.cache()
        cache = model(**before, **empty, **{written: _ids(self.context)}, use_cache=True).past_key_values
        start, size = self.total(), _bytes(cache)
        after = model(**before, **{written: _ids(1)}, past_key_values=cache, use_cache=True).past_key_values
        self.found.update(flops=self.total() - start, cache=size, growth=_bytes(after) - size)


def _ids(count: int) -> Tensor:
    return torch.zeros(1, count, dtype=torch.long)


def _bytes(cache: Any) -> int:
    """Of all keys and values in one of transformers' caches."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _held(cache))


def _held(cache: Any) -> Iterator[Tensor]:
    for half in [getattr(cache, name) for name in HALVES if hasattr(cache, name)] or [cache]:
        for layer in half.layers:
            yield from (value for value in (layer.keys, layer.values) if isinstance(value, Tensor))
