"""Calls made inside a module's forward, rewritten: another weight where the frozen one would go, another attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from core.anatomy.torch_attention import ATTENTION_CALLS
from core.errors import ScionError
from core.graft.arguments import rows_of_samples, with_hidden_in
from core.graft.graft import Attention, Graft

KeysOf = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Further tokens -> the keys and values that an attention module makes of them."""


class CallRewriter(TorchFunctionMode):
    """Rewrites calls made during one forward of one module: a mode, entered before that forward and left behind it."""

    def __init__(self, effective: list[Effective], attend: list[Graft], x: Tensor, keys_of: KeysOf) -> None:
        super().__init__()
        self.effective, self.attend, self.x, self.keys_of = effective, attend, x, keys_of
        self.reached = False  # written and never read here: a compiler would make what it reads a condition

    def copy(self) -> CallRewriter:
        """One for the same forward once more."""
        return CallRewriter([replace(entry) for entry in self.effective], self.attend, self.x, self.keys_of)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.attend and func in ATTENTION_CALLS:
            self.reached = True
            return attend_with(self.attend, self.x, self.keys_of, func, *args, **kwargs)
        given = [*_flat((*args, *kwargs.values()))]
        met = [entry for entry in self.effective if any(argument is entry.frozen for argument in given)]
        if not met:
            return func(*args, **kwargs)
        self.reached = True
        if func is F.linear and len(met) == 1 and met[0].make is not None and args[1] is met[0].frozen:
            x, bias = _of_linear(*args, **kwargs)
            return _recomputed_linear(x, bias, met[0])
        output = func(*_put(args, met), **_put_named(kwargs, met))
        if not isinstance(output, (Tensor, tuple, list)):  # its dtype, say
            return output
        return self._with_routed_rows(output, func, args, kwargs, met)

    def _with_routed_rows(self, output: Any, func: Any, args: tuple, kwargs: dict[str, Any], met: list[Effective]
                          ) -> Any:
        """``output`` with the rows of samples that see tensors of their own computed by those."""
        if _is_vector_alone(output, args, met):
            return self._vector_by_samples(output, func, args, kwargs, met[0])
        is_flattened = func is torch.addmm  # the batch, by transformers' Conv1D
        batch_at = 1 if is_flattened else _batch_position(args, met)
        for variant in dict.fromkeys(variant for entry in met for variant in entry.routed):
            rows = next(entry.routed[variant][0] for entry in met if variant in entry.routed)
            x = args[batch_at]
            if not isinstance(x, Tensor) or any(x is entry.frozen for entry in met):
                raise ScionError("routing by sample needs a call whose first argument is the batch")
            if is_flattened:
                times = x.shape[0] // self.x.shape[0]
                rows = (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
            own = _put(args, met, variant)
            own[batch_at] = x[rows]
            part = func(*own, **_put_named(kwargs, met, variant))
            output = output.index_copy(0, rows, part)
        return output


    def _vector_by_samples(self, output: Tensor, func: Any, args: tuple, kwargs: dict[str, Any], entry: Effective
                           ) -> Tensor:
        """``output`` [dim] for each sample, [batch, 1, ..., dim]: Gemma's norms add 1 to their weight before they
        multiply by it, so that the samples' own weights have to go through the sum."""
        by_sample = output.expand(self.x.shape[0], -1)
        for variant, (rows, _) in entry.routed.items():
            own = func(*_put(args, [entry], variant), **_put_named(kwargs, [entry], variant))
            by_sample = by_sample.index_copy(0, rows, own.expand(len(rows), -1))
        between = [1] * (self.x.dim() - 2)
        return by_sample.view(self.x.shape[0], *between, -1)


def _is_vector_alone(output: Any, args: tuple, met: list[Effective]) -> bool:
    """Whether a call makes a vector of one frozen vector, and of numbers."""
    if len(met) != 1 or not met[0].routed or not isinstance(output, Tensor):
        return False
    frozen = met[0].frozen
    others = [argument for argument in args if isinstance(argument, Tensor) and argument is not frozen]
    return not others and frozen.dim() == 1 and output.shape == frozen.shape


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Input and bias of a call of ``F.linear``."""
    return input, bias


def _batch_position(args: tuple, met: list[Effective]) -> int:
    """Which argument the batch is: the first tensor that is no parameter, for a norm may be written as weight * x."""
    for position, argument in enumerate(args):
        if isinstance(argument, Tensor) and all(argument is not entry.frozen for entry in met):
            return position
    return 0


# ------------------------------------------------------------------------------------------------- weights


@dataclass
class Effective:
    """A frozen parameter, the tensor to use instead, and for routed samples {variant: (rows, tensor)}."""

    frozen: Tensor
    tensor: Tensor
    routed: dict[int, tuple[Tensor, Tensor]]
    make: Callable[..., Tensor] | None = None
    """Makes the tensor from ``trained``, where a linear map makes it again in backward; ``tensor`` is the frozen one
    until then."""
    trained: tuple[Tensor, ...] = ()

    def of(self, variant: int | None) -> Tensor:
        """The tensor for samples of a variant; None is for samples that are not routed."""
        if self.make is not None:  # met by another call than a linear map
            self.tensor, self.make = self.make(*self.trained), None
        tensor = self.routed[variant][1] if variant is not None and variant in self.routed else self.tensor
        return tensor.to(self.frozen.dtype)


def apply_weight(graft: Graft, weight: Tensor) -> Tensor:
    """The whole parameter, in its module's layout, as the graft makes it."""
    matrix = graft(graft.site.matrix(weight), verb=_weight_verb(graft))
    return with_strength(graft, weight, graft.site.unmatrix(matrix, weight))


def apply_weights(grafts: list[Graft], weight: Tensor) -> Tensor:
    """The whole parameter as several grafts make it, one after the other."""
    for graft in grafts:
        weight = apply_weight(graft, weight)
    return weight


def apply_bias(graft: Graft, bias: Tensor) -> Tensor:
    """The whole bias as the graft makes it."""
    rows = graft.site.rows
    part = graft(bias if rows is None else rows.take(bias), verb="merged_bias")
    if part is None:
        return bias
    part = part.to(bias.dtype)
    return with_strength(graft, bias, part if rows is None else rows.put(bias, part))


def weight_from(grafts: list[Graft], strengths: list[float], weight: Tensor, *trained: Tensor) -> Tensor:
    """`apply_weights` with the grafts' trained parameters given, in their order, and with the strengths that they
    had."""
    given = iter(trained)
    for graft, strength in zip(grafts, strengths, strict=True):
        own = {name: next(given) for name, parameter in graft.named_parameters() if parameter.requires_grad}
        strength_now, graft.strength = graft.strength, strength
        matrix = functional_call(graft, own, (graft.site.matrix(weight),), {"verb": _weight_verb(graft)})
        weight = with_strength(graft, weight, graft.site.unmatrix(matrix, weight))
        graft.strength = strength_now
    return weight


def with_strength(graft: Graft, before: Tensor, after: Tensor) -> Tensor:
    """What a graft makes ``after`` of what arrives ``before``, as far as its strength goes."""
    is_whole = graft.strength == 1 or graft.folds or graft.heeds_strength
    return after if is_whole else torch.lerp(before, after, graft.strength)


def _weight_verb(graft: Graft) -> str:
    return "weight" if "weight" in graft.verbs else "merged"


class _RecomputedLinear(torch.autograd.Function):
    """x W^T + b whose W is made again in backward, from what it was made from, instead of being kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, effective: Effective, *trained: Tensor) -> Tensor:
        assert effective.make is not None
        ctx.make, ctx.biased = effective.make, bias is not None and bias.requires_grad
        ctx.save_for_backward(x, *trained)
        return F.linear(x, effective.make(*trained).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        is_double = torch.is_grad_enabled()  # this derivative will itself be differentiated
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                leaves = trained if is_double else [tensor.detach().requires_grad_() for tensor in trained]
                weight = ctx.make(*leaves)
            constant = (weight if is_double else weight.detach()).to(gradient.dtype)
            rows = gradient.reshape(-1, gradient.shape[-1])  # [rows, out]
            inputs = x.reshape(-1, x.shape[-1])  # [rows, in]
            of_x = gradient @ constant if ctx.needs_input_grad[0] else None
            of_bias = rows.sum(0) if ctx.biased else None
            of_weight = (rows.t() @ inputs).to(weight.dtype)
            of_trained = torch.autograd.grad(weight, leaves, of_weight, create_graph=is_double, allow_unused=True)
        return of_x, of_bias, None, *of_trained


def is_transforming() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work, for which `_RecomputedLinear` has no rule."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _recomputed_linear(x: Tensor, bias: Tensor | None, effective: Effective) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(kind), None if bias is None else bias.to(kind)
        with torch.autocast(x.device.type, enabled=False):
            return _RecomputedLinear.apply(x, bias, effective, *effective.trained)  # type: ignore[no-any-return]
    return _RecomputedLinear.apply(x, bias, effective, *effective.trained)  # type: ignore[no-any-return]


def _flat(args: tuple) -> Iterator[Any]:
    """Arguments, and what sequences of tensors among them hold (those of ``torch.cat``)."""
    for argument in args:
        if isinstance(argument, (tuple, list)):
            yield from argument
        else:
            yield argument


def _put(args: tuple | list, met: list[Effective], variant: int | None = None) -> list[Any]:
    """The arguments with the effective tensors where the frozen ones are."""
    found = []
    for argument in args:
        if isinstance(argument, (tuple, list)):
            holds_one = any(entry.frozen is part for part in argument for entry in met)
            found.append(_put(argument, met, variant) if holds_one else argument)
        else:
            entry = next((entry for entry in met if argument is entry.frozen), None)
            found.append(argument if entry is None else entry.of(variant))
    return found


def _put_named(kwargs: dict[str, Any], met: list[Effective], variant: int | None = None) -> dict[str, Any]:
    return dict(zip(kwargs, _put(tuple(kwargs.values()), met, variant), strict=True))


# ------------------------------------------------------------------------------------------------- attention


def attend_with(grafts: list[Graft], x: Tensor, keys_of: KeysOf, attend: Callable[..., Tensor], query: Tensor,
                key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """torch's attention call, or one like it, with ``grafts`` around it; ``x`` is the attention module's input."""
    if is_causal and attn_mask is None:
        # A graft may add keys: causality must be in the mask, where it can be extended.
        queries, keys = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()

    def base(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(q, k, v, mask, dropout_p, False, scale=scale, enable_gqa=enable_gqa)

    def chain(some: list[Graft], x: Tensor) -> Attention:
        attention = Attention(base, keys_of)
        for graft in some:
            attention = Attention(_around(graft, attention, x), keys_of)
        return attention

    routed = [graft for graft in grafts if graft.batch is not None]
    output = chain([graft for graft in grafts if graft.batch is None], x)(query, key, value, attn_mask)
    for variant in variants_present(routed):
        rows = next(rows_of_samples(graft.batch, query.shape[0], graft.route)
                    for graft in routed if graft.variant == variant)
        own_grafts = [graft for graft in grafts if graft.batch is None or graft.variant == variant]
        mask = attn_mask
        if mask is not None and mask.dim() == 4 and len(mask) == len(query):  # each sample has its own
            mask = mask[rows]
        own_attention = chain(own_grafts, x[rows])
        part = own_attention(query[rows], key[rows], value[rows], mask)
        output = output.index_copy(0, rows, part)
    return output


def _around(graft: Graft, inner: Attention, x: Tensor) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        output = graft(q, k, v, mask, x, inner, verb="attend")
        if graft.strength == 1 or graft.heeds_strength:
            return output
        return with_strength(graft, inner(q, k, v, mask), output)

    return call


def variants_present(routed: list[Graft]) -> list[int]:
    """The variants with rows in this batch.

    Raises:
        ScionError: the grafts follow different routes.
    """
    if len({id(graft.route) for graft in routed}) > 1:
        raise ScionError("routing: two routes at one site cannot both choose a weight or an attention for a row")
    found: dict[int, None] = {}  # in their order, each once
    for graft in routed:
        if graft.batch is not None and len(graft.batch):
            found[graft.variant] = None
    return list(found)


class _CatchKeys(TorchFunctionMode):
    """Catches the keys and values that an attention is called with, and does not call it."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in ATTENTION_CALLS:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        self.found += [given["key"], given["value"]]
        return given["query"]


def keys_of_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of further tokens [batch, tokens, dim], by the attention module's own forward up to its call."""
    args, kwargs = with_hidden_in(args, kwargs, tokens)
    hidden = args[0] if args else tokens
    rest = [hidden if value is hidden else _without_position(value) for value in args]
    named = {name: value if value is tokens else _without_position(value) for name, value in kwargs.items()}
    found: list[Tensor] = []
    with _CatchKeys(found):
        module.forward(*rest, **named)
    return found[0], found[1]


def _without_position(value: Any) -> Any:
    """An argument of an attention for tokens without a position: rotated by nothing, position 0, no mask, no cache."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        cosines, sines = value
        return torch.ones_like(cosines[:1, :1]), torch.zeros_like(sines[:1, :1])
    if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64):
        first = value[:1] if value.dim() == 1 else value[:1, ..., :1]
        return torch.zeros_like(first)
    return value if isinstance(value, (bool, int, float, str)) else None
