"""The graft: the one mechanism by which anything is inserted into a backbone, switched, and removed.

A graft is an ``nn.Module`` at a site that does one or more of four things there::

    before(x)                                     a new input of the site
    weight(W)                                     an effective weight, W and the result as matrices [out, in]
    after(x, y)                                   a new output, from the site's input and output
    attend(q, k, v, mask, x, attention)           attention's output; ``attention(q, k, v, mask)`` is the base call

All grafts of a module are carried by one `Carrier`, which owns the module's hooks and runs the grafts in their order of
attachment. ``before`` and ``after`` are plain hooks. ``weight`` and ``attend`` rewrite calls inside the module's
forward: a `TorchFunctionMode`, entered by the last pre-hook and left by the first forward hook, puts the effective
tensor where the frozen parameter would go, or hands the attention call over. The backbone's class, ``forward``,
parameters and state-dict keys stay as they are.

A graft may also read another site of its block than its own (`Tap`), or edit all arguments of a call in ``before``
(``edits_call``), where what it puts in needs a longer mask or other positions.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from core.anatomy import Site, dissect
from core.errors import ScionError

VERBS = ("before", "weight", "after", "attend")


class Attention:
    """The attention that ``attend`` is given: called with (q, k, v, mask) it is the base call, or the next graft's."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
                 keys_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.call, self.keys_of = call, keys_of

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.call(q, k, v, mask)

    def keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What attention makes of further ``tokens`` [batch, tokens, dim], given as its module's input and without a
        position: (keys, values), each [batch, heads, tokens, width]."""
        return self.keys_of(tokens)


class Graft(nn.Module):
    """Base of all grafts; a subclass defines any of the four verbs, and ``merged`` where it can be written into W."""

    reads_weight: bool = False
    """Its function depends on the frozen weight itself, so that nothing may be merged into that while it stands."""
    folds: bool = False
    """It changes the number of rows, for streams that ride in the batch. It then acts last at its site, before and
    after, so that all others there see an input and an output with the same rows; and it heeds ``strength`` itself."""
    reads_output: bool = False
    """Its function depends on the output that arrives, so that what stands before it must be merged before it."""
    reads_call: bool = False
    """``after`` is given a third argument: the module's `Call`."""
    edits_call: bool = False
    """``before`` is given the module's arguments by name, and returns them, in place of the hidden state."""
    remade: bool = False
    """The effective weight of a linear map is made again in backward instead of being kept for it: worth it where
    making it costs little beside the map itself, and is not random."""
    entries: bool = False
    """Its tensors stand for chosen entries of the backbone's, any of which may have a zero gradient by its place."""
    heeds_strength: bool = False
    """It makes what ``strength`` means of itself (a magnitude that stays, an angle); else its change is multiplied by
    it, the output going from what arrives to what it gives."""
    adds_bias: bool = False
    """Merging it gives a bias to a map that has none."""
    whole_batch: bool = False
    """Its ``before`` and ``after`` see all rows of a routed batch, and look to ``batch`` themselves."""
    momentary: tuple[str, ...] = ("active", "dropped", "strength", "batch", "route", "variant")
    """Attributes that may be others at each forward."""
    packed: tuple[str, ...] = ()
    """Its tensors that files hold in another form; it defines ``pack`` and ``unpack`` then. Checkpoints hold
    the form in use, since training goes on from there."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.active = True
        """Whether it takes part in the forward."""
        self.dropped = False
        """Whether another method has taken it out of the model: it takes no part then, whatever ``active`` says, and
        is not merged."""
        self.strength = 1.0
        """How far it takes part, from 0 to 1 (a method that weighs others sets it); see ``heeds_strength``."""
        self.batch: Tensor | None = None
        """Rows of the batch that it serves, as indices; None is all of them."""
        self.route: Tensor | None = None
        """The whole route, one entry a sample, of which ``batch`` is a part."""
        self.place = 0
        """Its method's place in the order of attachment."""
        self.variant = 0
        """The entry in ``route`` that means this graft."""
        self.tap: Tap | None = None
        """Another site that it reads."""

    @property
    def live(self) -> bool:
        """Whether it takes part in the forward, after all."""
        return self.active and not self.dropped

    def limits(self) -> dict[str, int]:
        """Its tensors of positions, each with the number of positions that there are: what a file holds must lie
        below it."""
        return {}

    def forward(self, *args: Any, verb: str) -> Any:
        """Calls a verb, or ``merged`` and its like. The core calls them so, and a graft is then itself a module whose
        parameters other grafts can change."""
        return getattr(self, verb)(*args)

    def before(self, x: Tensor) -> Tensor:
        """x [..., in] -> a new input of the same shape."""
        raise NotImplementedError

    def weight(self, weight: Tensor) -> Tensor:
        """W [out, in] -> the effective weight [out, in]."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Input x [..., in] and output y [..., out] of the site -> a new output [..., out]."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        """q [batch, heads, queries, width], k and v [batch, key heads, keys, width], mask or None, the module's input x
        -> attention's output [batch, heads, queries, width]."""
        raise NotImplementedError

    def notice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called with the arguments of the site's module before it runs, for what a graft must know of the model's
        inputs; ``args`` and ``kwargs`` stay as they are."""

    def read(self) -> Tensor:
        """Within ``before`` or ``after``: what its ``tap`` caught in this forward, the rows of the batch that it
        serves."""
        assert self.tap is not None
        value, self.tap.value = self.tap.value, None
        if value is None:
            raise ScionError(f"{self.site.name}: {self.tap.site.name}, which is read there, has not run before it")
        return value[_expand(self.batch, value.shape[0], self.route)] if self.by_rows else value

    def merged(self, weight: Tensor) -> Tensor:
        """W [out, in] with this graft written into it. Grafts with ``weight`` have it for free."""
        if type(self).weight is Graft.weight:
            raise ScionError(f"{type(self).__name__} cannot be merged: what it does is no linear map of the weight")
        return self.weight(weight)

    def merged_bias(self, bias: Tensor) -> Tensor | None:
        """The site's bias b [out] (zeros where the module has none) with this graft written into it; None leaves it."""
        return None

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """The stored parts of one of its ``packed`` tensors."""
        raise NotImplementedError

    def unpack(self, parts: dict[str, Tensor], tensor: Tensor) -> None:
        """Write what the stored parts stand for into ``tensor``."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up [out, rank], down [rank, in]) where the change of the weight is their product; None where it is not."""
        return None

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """Within ``before`` or ``after``: the site's module once more on these inputs, with the weights and outputs as
        the site's other grafts make them, but nothing ``before`` it and without this graft. (`Site.rerun` is the
        frozen module alone.)"""
        carrier = Carrier.of(self.site.module)
        return self.site.module.forward(*args, **kwargs) if carrier is None else carrier.again(self, args, kwargs)

    @property
    def layer(self) -> int | None:
        """The block to whose layer it belongs, for methods that act on layers; None where it serves all."""
        return self.site.block

    @property
    def by_rows(self) -> bool:
        """Whether ``before`` and ``after`` see only the rows of the batch that it serves."""
        return self.batch is not None and not self.whole_batch

    @property
    def verbs(self) -> tuple[str, ...]:
        """Which of the four verbs this class defines."""
        return tuple(verb for verb in VERBS if getattr(type(self), verb) is not getattr(Graft, verb))


@dataclass(eq=False)
class Tap:
    """Where a graft reads, when it is not at its own site: the hidden state that arrives at another site of its block,
    or leaves it, which runs before its own in each forward. It copies and pickles empty."""

    site: Site
    side: Literal["input", "output"] = "input"
    value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"site": self.site, "side": self.side, "value": None}


# ------------------------------------------------------------------------------------------------- hidden states


def hidden_in(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a module's arguments: the first positional one, or ``hidden_states``."""
    return args[0] if args else kwargs[hidden_name(kwargs)]


def hidden_name(kwargs: dict[str, Any]) -> str:
    """The name of the hidden state among named arguments."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def _with_hidden_in(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    if args:  # torch's attention gets it three times
        return (x, *(x if value is args[0] else value for value in args[1:])), kwargs
    return args, {**kwargs, hidden_name(kwargs): x}


def hidden_out(output: Any) -> Tensor:
    """The hidden state in a module's output: itself, the first of a tuple, or ``last_hidden_state``."""
    if isinstance(output, dict):
        if "last_hidden_state" not in output:
            raise ScionError(f"a {type(output).__name__} ({', '.join(output)}) has no hidden state for a graft to "
                             "change: attach to the model inside, which gives one")
        return output["last_hidden_state"]
    return output[0] if isinstance(output, tuple) else output


def _with_hidden_out(output: Any, y: Tensor) -> Any:
    if isinstance(output, dict):
        return type(output)(**{**output, "last_hidden_state": y})
    return (y, *output[1:]) if isinstance(output, tuple) else y


@dataclass
class Call:
    """How a module was called: its arguments by name, the name of the hidden state, and what the module itself gave
    for that, before any graft."""

    arguments: dict[str, Any]
    hidden: str
    output: Tensor

    def of(self, rows: Tensor) -> Call:
        """The part of the call that these rows of the batch are."""
        total = self.output.shape[0]
        return Call({name: _rows_of(value, rows, total) for name, value in self.arguments.items()}, self.hidden,
                    self.output[rows])


def _rows_of(value: Any, rows: Tensor, total: int) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(part, rows, total) for part in value)
    return value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == total else value


def _expand(rows: Tensor | None, total: int, route: Tensor | None) -> Tensor:
    """Indices of samples -> indices along an axis on which each sample stands ``total / samples`` times (windows,
    beams), sample by sample."""
    assert rows is not None
    samples = total if route is None else route.numel()
    times = total // samples
    if times * samples != total:
        raise ScionError(f"routing: {samples} samples are routed, but {total} rows arrive, which is no multiple")
    return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()


# ------------------------------------------------------------------------------------------------- rewriting calls


class _Rewrite(TorchFunctionMode):
    """Rewrites calls made during one forward of one module."""

    def __init__(self, effective: list[Effective], attend: list[Graft], x: Tensor,
                 keys_of: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.effective, self.attend, self.x, self.keys_of = effective, attend, x, keys_of
        self.reached = False  # written and never read here: a compiler would make what it reads a condition

    def afresh(self) -> _Rewrite:
        """One for the same forward once more."""
        return _Rewrite([replace(entry) for entry in self.effective], self.attend, self.x, self.keys_of)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.attend and func is F.scaled_dot_product_attention:
            self.reached = True
            return _attend(self.attend, self.x, self.keys_of, *args, **kwargs)
        given = [*_flat((*args, *kwargs.values()))]
        met = [e for e in self.effective if any(a is e.frozen for a in given)]
        if not met:
            return func(*args, **kwargs)
        self.reached = True
        if func is F.linear and len(met) == 1 and met[0].make is not None and args[1] is met[0].frozen:
            return _linear(args[0], kwargs.get("bias", args[2] if len(args) > 2 else None), met[0])
        out = func(*_put(args, met), **_put_named(kwargs, met))
        if not isinstance(out, (Tensor, tuple, list)):  # its dtype, say
            return out
        flattened = func is torch.addmm  # the batch, by transformers' Conv1D
        place = 1 if flattened else next((i for i, a in enumerate(args) if isinstance(a, Tensor) and all(
            a is not e.frozen for e in met)), 0)  # a norm may be written as weight * x
        for variant in dict.fromkeys(v for e in met for v in e.routed):  # these samples see tensors of their own
            rows = next(e.routed[variant][0] for e in met if variant in e.routed)
            x = args[place]
            if not isinstance(x, Tensor) or any(x is e.frozen for e in met):
                raise ScionError("routing by sample needs a call whose first argument is the batch")
            if flattened:
                times = x.shape[0] // self.x.shape[0]
                rows = (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
            given = _put(args, met, variant)
            given[place] = x[rows]
            part = func(*given, **_put_named(kwargs, met, variant))
            out = out.index_copy(0, rows, part)  # type: ignore[union-attr]
        return out


@dataclass
class Effective:
    """A frozen parameter, the tensor that stands in for it, and for routed samples {variant: (rows, tensor)}."""

    frozen: Tensor
    tensor: Tensor
    routed: dict[int, tuple[Tensor, Tensor]]
    make: Callable[..., Tensor] | None = None
    """Makes the tensor, in place of which the frozen one stands here, from ``trained``, where a linear map makes it
    again in backward."""
    trained: tuple[Tensor, ...] = ()

    def of(self, variant: int | None) -> Tensor:
        if self.make is not None:  # met by another call than a linear map
            self.tensor, self.make = self.make(*self.trained), None
        tensor = self.routed[variant][1] if variant is not None and variant in self.routed else self.tensor
        return tensor.to(self.frozen.dtype)


class _Remade(torch.autograd.Function):
    """x W^T + b whose W is made again in backward, from what it was made from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, effective: Effective, *trained: Tensor) -> Tensor:
        assert effective.make is not None
        ctx.make, ctx.biased = effective.make, bias is not None and bias.requires_grad
        ctx.save_for_backward(x, *trained)
        return F.linear(x, effective.make(*trained).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, *trained = ctx.saved_tensors
        twice = torch.is_grad_enabled()  # this derivative will itself be differentiated
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                leaves = trained if twice else [tensor.detach().requires_grad_() for tensor in trained]
                weight = ctx.make(*leaves)
            kept = (weight if twice else weight.detach()).to(gradient.dtype)
            rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
            to_x = gradient @ kept if ctx.needs_input_grad[0] else None
            to_bias = rows.sum(0) if ctx.biased else None
            of_weight = (rows.t() @ inputs).to(weight.dtype)
            to_trained = torch.autograd.grad(weight, leaves, of_weight, create_graph=twice, allow_unused=True)
        return to_x, to_bias, None, *to_trained


def _transformed() -> bool:
    """Whether `torch.func` or forward-mode derivatives are at work, for which `_Remade` has no rule."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _linear(x: Tensor, bias: Tensor | None, effective: Effective) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(kind), None if bias is None else bias.to(kind)
        with torch.autocast(x.device.type, enabled=False):
            return _Remade.apply(x, bias, effective, *effective.trained)  # type: ignore[no-any-return]
    return _Remade.apply(x, bias, effective, *effective.trained)  # type: ignore[no-any-return]


def _flat(args: tuple) -> Iterator[Any]:
    """Arguments, and what sequences of tensors among them hold (those of ``torch.cat``)."""
    for a in args:
        if isinstance(a, (tuple, list)):
            yield from a
        else:
            yield a


def _put(args: tuple | list, met: list[Effective], variant: int | None = None) -> list[Any]:
    return [_put(a, met, variant) if isinstance(a, (tuple, list)) and any(e.frozen is b for b in a for e in met)
            else next((e.of(variant) for e in met if a is e.frozen), a) for a in args]


def _put_named(kwargs: dict[str, Any], met: list[Effective], variant: int | None = None) -> dict[str, Any]:
    return dict(zip(kwargs, _put(tuple(kwargs.values()), met, variant), strict=True))


class _Keys(TorchFunctionMode):
    """Catches the keys and values that an attention is called with, and does not call it."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        self.found += [given["key"], given["value"]]
        return given["query"]


def _keys_of(module: nn.Module, args: tuple, kwargs: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the attention module's own forward on other tokens, up to the call."""
    args, kwargs = _with_hidden_in(args, kwargs, tokens)
    hidden = args[0] if args else tokens
    rest = [hidden if value is hidden else _unplaced(value) for value in args]
    found: list[Tensor] = []
    with _Keys(found):
        module.forward(*rest, **{name: value if value is tokens else _unplaced(value)
                                 for name, value in kwargs.items()})
    return found[0], found[1]


def _unplaced(value: Any) -> Any:
    """An argument of an attention for tokens without a position: rotated by nothing, position 0, no mask, no cache."""
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        return torch.ones_like(value[0][:1, :1]), torch.zeros_like(value[1][:1, :1])  # cosines and sines
    if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64):
        return torch.zeros_like(value[..., :1] if value.dim() == 1 else value[:1, ..., :1])
    return value if value is None or isinstance(value, (bool, int, float, str)) else None


def _attend(grafts: list[Graft], x: Tensor, keys_of: Callable[[Tensor], tuple[Tensor, Tensor]], query: Tensor,
            key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    if is_causal and attn_mask is None:
        # A graft may add keys: causality must be in the mask, where it can be extended.
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()

    def base(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, False, scale=scale, enable_gqa=enable_gqa)

    def chain(some: list[Graft], x: Tensor) -> Attention:
        attention = Attention(base, keys_of)
        for graft in some:
            attention = Attention(_around(graft, attention, x), keys_of)
        return attention

    routed = [graft for graft in grafts if graft.batch is not None]
    out = chain([graft for graft in grafts if graft.batch is None], x)(query, key, value, attn_mask)
    for variant in _variants(routed):
        rows = next(_expand(g.batch, query.shape[0], g.route) for g in routed if g.variant == variant)
        mine = [graft for graft in grafts if graft.batch is None or graft.variant == variant]
        own_masks = attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[0] == query.shape[0]
        part = chain(mine, x[rows])(query[rows], key[rows], value[rows], attn_mask[rows] if own_masks else attn_mask)  # type: ignore[index]
        out = out.index_copy(0, rows, part)
    return out


def _around(graft: Graft, inner: Attention, x: Tensor) -> Callable[..., Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = graft(q, k, v, mask, x, inner, verb="attend")
        weighed = graft.strength != 1 and not graft.heeds_strength
        return _weighed(graft, inner(q, k, v, mask), out) if weighed else out

    return call


def _variants(routed: list[Graft]) -> list[int]:
    """The variants with rows in this batch."""
    if len({id(graft.route) for graft in routed}) > 1:
        raise ScionError("routing: two routes at one site cannot both choose a weight or an attention for a row")
    return list(dict.fromkeys(graft.variant for graft in routed if graft.batch is not None and len(graft.batch)))


def route_rows(grafts: list[Graft], route: Tensor | None, variant: int = 0) -> None:
    """Let ``grafts`` serve only the samples whose entry in ``route`` [batch] is ``variant``; None routes nothing."""
    for graft in grafts:
        graft.batch = None if route is None else (route == variant).nonzero().flatten()
        graft.route, graft.variant = route, variant


# ------------------------------------------------------------------------------------------------- the carrier


class _Absent(Enum):
    """Stands for an attribute that a module does not have itself; the same object after pickling."""

    OF_THE_CLASS = "what the class says"


_OF_THE_CLASS = _Absent.OF_THE_CLASS


class Carrier:
    """All grafts of one module, and the module's only hooks of ours. It copies and pickles with the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.grafts: list[Graft] = []
        self.acting: dict[str, list[Graft]] = {verb: [] for verb in VERBS}
        """The grafts that have a verb, whether or not they take part at present."""
        self.noticing: list[Graft] = []
        """Those that look at the module's arguments."""
        self.readers: list[Graft] = []
        """Grafts of other sites that read this one."""
        self.open: list[_Rewrite] = []
        self.own: list[tuple[nn.Module, str]] = []
        """Attributes of modules that this one holds at other values than their own, for active grafts."""
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        self.handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True, prepend=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    @classmethod
    def of(cls, module: nn.Module) -> Carrier | None:
        """The carrier on ``module``, found by its hooks: nothing is stored on the module itself."""
        for hook in module._forward_pre_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Carrier):
                return owner
        return None

    def add(self, graft: Graft) -> None:
        self.grafts.append(graft)
        # One that returns by unmerge returns to its place.
        self.grafts.sort(key=lambda graft: (graft.folds, graft.place))
        self._sort_out()
        self.refresh()

    def drop(self, graft: Graft) -> None:
        """Forget a graft that stands here, or that reads here; the last one takes the hooks along."""
        self.grafts = [other for other in self.grafts if other is not graft]
        self.readers = [other for other in self.readers if other is not graft]
        self._sort_out()
        self.refresh()
        if not self.grafts and not self.readers:
            for handle in self.handles:
                handle.remove()

    def _sort_out(self) -> None:
        """Find out once, and not in each forward, what the grafts here do."""
        self.acting = {verb: [graft for graft in self.grafts if verb in _acts_by(graft)] for verb in VERBS}
        self.noticing = [graft for graft in self.grafts if type(graft).notice is not Graft.notice]

    def refresh(self) -> None:
        """Give modules the attributes that active grafts need here (and their own back when there are none)."""
        wanted = {(id(module), name): (module, name, value) for graft in self.grafts if graft.live
                  for module, name, value in graft.site.while_active}
        held = {(id(module), name) for module, name in self.own}
        for module, name in self.own:
            if (id(module), name) not in wanted:
                _release(module, name)
        for key, (module, name, value) in wanted.items():
            if key not in held:
                _hold(module, name, value)
        self.own = [(module, name) for module, name, _ in wanted.values()]

    def _live(self, verb: str) -> list[Graft]:
        """The grafts that have a verb and take part. It runs in each forward, so the loop asks no property."""
        found = []
        for graft in self.acting[verb]:
            if graft.active and not graft.dropped:
                found.append(graft)
        if verb == "weight" and any(graft.site.by_weight for graft in found):
            found.sort(key=_turn)
        return found

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.open:
            self._purge()
        for graft in self.noticing:
            if graft.active and not graft.dropped:
                graft.notice(args, kwargs)
        if self.readers:
            self._tell("input", hidden_in(args, kwargs))
        if self.acting["before"]:
            args, kwargs = self._before(args, kwargs)
        if self.acting["weight"] or self.acting["attend"]:
            mode = self._rewrite(self._live("weight"), self._live("attend"), args, kwargs)
            if mode is not None:
                mode.__enter__()
                self.open.append(mode)
        return args, kwargs

    def _before(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's arguments as grafts change them."""
        for together in _side_by_side([graft for graft in self._live("before") if graft.edits_call]):
            args, kwargs = (), self._edited(together, {**dict(zip(self.names, args, strict=False)), **kwargs})
        before = [graft for graft in self._live("before") if not graft.edits_call]
        if not before:
            return args, kwargs
        x = hidden_in(args, kwargs)
        for graft in before:
            x = self._before_on_rows(graft, x) if graft.by_rows else _weighed(graft, x, graft(x, verb="before"))
        return _with_hidden_in(args, kwargs, x)

    def _rewrite(self, weights: list[Graft], attend: list[Graft], args: tuple, kwargs: dict[str, Any]
                 ) -> _Rewrite | None:
        if not weights and not attend:
            return None
        x = hidden_in(args, kwargs)
        return _Rewrite(self._effective(weights, x), attend, x, functools.partial(_keys_of, self.module, args, kwargs))

    def again(self, asker: Graft | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module as the grafts beside ``asker`` make it, without anything before it."""
        weights, attend, after = ([graft for graft in self._live(verb) if graft is not asker]
                                  for verb in ("weight", "attend", "after"))
        with self._rewrite(weights, attend, args, kwargs) or contextlib.nullcontext():
            output = self.module.forward(*args, **kwargs)
        return self._run_after(after, args, kwargs, output)

    def _effective(self, grafts: list[Graft], x: Tensor) -> list[Effective]:
        """What stands in for each parameter that these grafts change."""
        table: list[Effective] = []
        for name in dict.fromkeys(graft.site.parameter for graft in grafts):
            frozen = getattr(self.module, name)
            mine = [graft for graft in grafts if graft.site.parameter == name]
            entry = Effective(frozen, frozen, {})
            common = [graft for graft in mine if graft.batch is None]
            routed = [graft for graft in mine if graft.batch is not None]
            trained = tuple(p for graft in common for p in graft.parameters() if p.requires_grad)
            if (not routed and trained and any(graft.remade for graft in common) and torch.is_grad_enabled()
                    and not frozen.requires_grad and not torch.compiler.is_compiling() and not _transformed()):
                strengths = [graft.strength for graft in common]
                entry.make, entry.trained = functools.partial(_made_from, common, strengths, frozen), trained
            else:
                entry.tensor = _chain(common, frozen)
            present = _variants(routed)
            for graft in routed:
                if graft.variant in present:
                    assert graft.batch is not None
                    rows = _expand(graft.batch, x.shape[0], graft.route)
                    entry.routed[graft.variant] = (rows, apply_weight(graft, entry.of(graft.variant)))
            table.append(entry)
        bias = self._effective_bias([graft for graft in grafts if graft.site.by_weight], x)
        return table if bias is None else [*table, bias]

    def _effective_bias(self, grafts: list[Graft], x: Tensor) -> Effective | None:
        """What stands in for the bias of a map on which grafts act by its weight."""
        changing = [graft for graft in grafts if type(graft).merged_bias is not Graft.merged_bias]
        frozen = getattr(self.module, changing[0].site.bias_parameter) if changing else None
        if frozen is None:
            return None
        entry = Effective(frozen, frozen, {})
        present = _variants([graft for graft in changing if graft.batch is not None])
        for graft in changing:
            if graft.batch is None:
                entry.tensor = _apply_bias(graft, entry.tensor)
            elif graft.variant in present:
                rows = _expand(graft.batch, x.shape[0], graft.route)
                entry.routed[graft.variant] = (rows, _apply_bias(graft, entry.of(graft.variant)))
        return entry

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.open:
            mode = self.open.pop()
            mode.__exit__(None, None, None)
            if not mode.reached and output is not None:  # None: the forward itself raised
                sites = ", ".join(graft.site.name for graft in self.grafts)
                raise ScionError(f"{sites}: {type(module).__name__}.forward made no call that a graft could rewrite")

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        after = self._live("after") if self.acting["after"] else []
        changed = self._run_after(after, args, kwargs, output) if after else None
        if self.readers:
            self._tell("output", hidden_out(output if changed is None else changed))
        return changed

    def _tell(self, side: str, value: Tensor) -> None:
        for graft in self.readers:
            absent = graft.by_rows and graft.batch is not None and not len(graft.batch)  # it will not read
            if graft.live and graft.tap is not None and graft.tap.side == side and not absent:
                graft.tap.value = value

    def _run_after(self, after: list[Graft], args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_in(args, kwargs), hidden_out(output)
        call = None
        for graft in after:
            if graft.reads_call and call is None:
                arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
                call = Call(arguments, next(iter(arguments)) if args else hidden_name(kwargs), y)
        groups = [after] if len(after) == 1 else _side_by_side(after)
        for together in groups:
            first = together[0]
            y = self._on_parts(together, x, y, call) if first.by_rows else _weighed(
                first, y, _run_after(first, x, y, call))
        return _with_hidden_out(output, y)

    @staticmethod
    def _edited(grafts: list[Graft], arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments as grafts that stand side by side edit them, each for the rows of the batch that it serves."""
        if not grafts[0].by_rows:
            return grafts[0](arguments, verb="before")
        total = next(len(value) for value in arguments.values() if isinstance(value, Tensor))
        parts = []
        for graft in grafts:
            rows = _expand(graft.batch, total, graft.route)
            if len(rows):
                own = {name: value if _is_table(value) else _rows_of(value, rows, total)
                       for name, value in arguments.items()}
                parts.append((rows, graft(own, verb="before")))
        if sum(len(rows) for rows, _ in parts) < total:
            raise ScionError(f"routing: at {grafts[0].site.name} each row needs a variant, for they lengthen it")
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return {name: _rejoined([part[name] for _, part in parts], order, grafts[0]) for name in parts[0][1]}

    @staticmethod
    def _before_on_rows(graft: Graft, x: Tensor) -> Tensor:
        rows = _expand(graft.batch, x.shape[0], graft.route)
        return x.index_copy(0, rows, _weighed(graft, x[rows], graft(x[rows], verb="before"))) if len(rows) else x

    @staticmethod
    def _on_parts(grafts: list[Graft], x: Tensor, y: Tensor, call: Call | None) -> Tensor:
        """Run ``after`` of grafts that serve different rows; all may make the output wider alike."""
        parts: list[tuple[Tensor, Tensor]] = []
        for graft in grafts:
            rows = _expand(graft.batch, y.shape[0], graft.route)
            if len(rows):
                part = call.of(rows) if call is not None and graft.reads_call else None
                mine = x[rows] if isinstance(x, Tensor) else x
                parts.append((rows, _weighed(graft, y[rows], _run_after(graft, mine, y[rows], part))))
        shapes = {part.shape[1:] for _, part in parts}
        if shapes - {y.shape[1:]}:
            if len(shapes) > 1 or sum(len(rows) for rows, _ in parts) < y.shape[0]:
                raise ScionError(f"routing: the variants at {grafts[0].site.name} give rows of different shapes")
            y = y.new_empty(y.shape[0], *parts[0][1].shape[1:])
        for rows, part in parts:
            y = y.index_copy(0, rows, part)
        return y

    def _purge(self) -> None:
        """Leave modes that an interrupt kept open: hooks with ``always_call`` do not run on KeyboardInterrupt, and a
        leaked mode would go on rewriting calls."""
        stack = []
        while self.open:
            leaked = self.open.pop()
            while torch._C._len_torch_function_stack():
                mode = torch._C._pop_torch_function_stack()
                if mode is leaked:
                    break
                stack.append(mode)
        for mode in reversed(stack):
            torch._C._push_on_torch_function_stack(mode)


def _is_table(value: Any) -> bool:
    """Whether this is a table of rotations [tokens, width], which all samples share."""
    return isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point()


def _rejoined(parts: list[Any], order: Tensor, graft: Graft) -> Any:
    """One argument of all rows from those of its parts."""
    if not all(isinstance(part, Tensor) and part.dim() for part in parts):
        return parts[0]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ScionError(f"routing: the variants at {graft.site.name} lengthen their rows by different numbers")
    whole = torch.cat(parts)
    return whole[order] if len(whole) == len(order) else parts[0]


def _run_after(graft: Graft, x: Tensor, y: Tensor, call: Call | None) -> Tensor:
    return graft(x, y, call, verb="after") if graft.reads_call else graft(x, y, verb="after")


def _side_by_side(grafts: list[Graft]) -> list[list[Graft]]:
    """Grafts in their order; neighbours that serve different rows of one route together, for each sees what arrived."""
    found: list[list[Graft]] = []
    for graft in grafts:
        last = found[-1] if found else []
        if last and graft.by_rows and last[0].by_rows and last[0].route is graft.route and all(
                other.variant != graft.variant for other in last):
            last.append(graft)
        else:
            found.append([graft])
    return found


def apply_weight(graft: Graft, weight: Tensor) -> Tensor:
    """The whole parameter, in its module's layout, as the graft makes it."""
    matrix = graft(graft.site.matrix(weight), verb=_weight_verb(graft))
    return _weighed(graft, weight, graft.site.unmatrix(matrix, weight))


def _apply_bias(graft: Graft, bias: Tensor) -> Tensor:
    rows = graft.site.rows
    part = graft(bias if rows is None else rows.take(bias), verb="merged_bias")
    if part is None:
        return bias
    return _weighed(graft, bias, part.to(bias.dtype) if rows is None else rows.put(bias, part.to(bias.dtype)))


def _acts_by(graft: Graft) -> tuple[str, ...]:
    """The verbs of a graft at its site: where no map is called, all is done to the weight."""
    return ("weight",) if graft.site.by_weight else graft.verbs


def _weight_verb(graft: Graft) -> str:
    return "weight" if "weight" in graft.verbs else "merged"


def _turn(graft: Graft) -> tuple[int, int]:
    """The order in which grafts act on a weight so that each does what it would do to input and output: what changes
    the weight, then what changes the output, then, the last one first, what changes the input."""
    if "weight" in graft.verbs:
        return 0, graft.place
    return (2, -graft.place) if graft.verbs == ("before",) else (1, graft.place)


_HELD = "_held_for_grafts"
"""Attribute of a module whose other attributes grafts hold: name -> [its own value, how many carriers hold it]."""


def _hold(module: nn.Module, name: str, value: Any) -> None:
    """Give a module another value of an attribute, until as many let go of it."""
    held = module.__dict__.setdefault(_HELD, {})
    held.setdefault(name, [vars(module).get(name, _OF_THE_CLASS), 0])[1] += 1
    setattr(module, name, value)


def _release(module: nn.Module, name: str) -> None:
    held = module.__dict__[_HELD]
    held[name][1] -= 1
    if held[name][1]:
        return
    value = held.pop(name)[0]
    if value is _OF_THE_CLASS:
        delattr(module, name)
    else:
        setattr(module, name, value)
    if not held:
        del module.__dict__[_HELD]


def _chain(some: list[Graft], weight: Tensor) -> Tensor:
    for graft in some:
        weight = apply_weight(graft, weight)
    return weight


def _weighed(graft: Graft, before: Tensor, after: Tensor) -> Tensor:
    whole = graft.strength == 1 or graft.folds or graft.heeds_strength
    return after if whole else torch.lerp(before, after, graft.strength)


def _made_from(some: list[Graft], strengths: list[float], weight: Tensor, *trained: Tensor) -> Tensor:
    """`_chain` with the grafts' trained parameters given, in their order, and with the strengths that they had."""
    given = iter(trained)
    for graft, strength in zip(some, strengths, strict=True):
        own = {name: next(given) for name, parameter in graft.named_parameters() if parameter.requires_grad}
        now, graft.strength = graft.strength, strength
        matrix = functional_call(graft, own, (graft.site.matrix(weight),), {"verb": _weight_verb(graft)})
        weight = _weighed(graft, weight, graft.site.unmatrix(matrix, weight))
        graft.strength = now
    return weight


def connect(graft: Graft) -> None:
    """Place the graft at its site, behind those that stand there."""
    for module in (graft.site.module, *graft.site.tied):
        (Carrier.of(module) or Carrier(module)).add(graft)
    if graft.tap is not None:
        (Carrier.of(graft.tap.site.module) or Carrier(graft.tap.site.module)).readers.append(graft)


def disconnect(graft: Graft) -> None:
    """Take the graft from its site, and from the one that it reads; the last one takes the hooks along."""
    read = () if graft.tap is None else (graft.tap.site.module,)
    for module in (graft.site.module, *graft.site.tied, *read):
        carrier = Carrier.of(module)
        if carrier is not None:
            carrier.drop(graft)


def run_at(site: Site, x: Tensor) -> Tensor:
    """The site's module on further states ``x``, with the weights and outputs that its grafts give it; nothing that
    reads the site sees them."""
    carrier = Carrier.of(site.module)
    return site.module.forward(x) if carrier is None else hidden_out(carrier.again(None, (x,), {}))


def refresh(graft: Graft) -> None:
    """Tell the graft's carrier that its activity changed."""
    carrier = Carrier.of(graft.site.module)
    if carrier is not None:
        carrier.refresh()


# ------------------------------------------------------------------------------------------------- checkpointing


class _Checkpointed:
    """A block's forward under non-reentrant activation checkpointing; the block's hooks stay outside."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, *args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler recomputes what it has traced
            return checkpoint(forward, self.block, *args, use_reentrant=False, **kwargs)
        now = _Moment(self.block)
        return checkpoint(forward, self.block, *args, use_reentrant=False,
                          context_fn=lambda: (contextlib.nullcontext(), now), **kwargs)


class _Moment:
    """The state of a block's grafts at a forward; entered again when the block is recomputed, since by then they may
    be switched, routed or split otherwise. What the block's own hooks rewrite in it is rewritten again."""

    def __init__(self, block: nn.Module) -> None:
        own = Carrier.of(block)
        self.rewrites = [rewrite.afresh() for rewrite in own.open[-1:]] if own is not None else []
        self.again: list[_Rewrite] = []
        carriers = [carrier for module in block.modules() if (carrier := Carrier.of(module))]
        self.grafts = [graft for carrier in carriers for graft in carrier.grafts]
        self.states = self._read()
        self.norms = [(module, module.momentum) for graft in self.grafts for module in graft.modules()
                      if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def _read(self) -> list[dict[str, Any]]:
        return [{name: getattr(graft, name) for name in graft.momentary} for graft in self.grafts]

    def _write(self, states: list[dict[str, Any]]) -> None:
        for graft, state in zip(self.grafts, states, strict=True):
            for name, value in state.items():
                setattr(graft, name, value)

    def __enter__(self) -> None:
        self.meanwhile = self._read()
        self._write(self.states)
        self._count_batches(False)
        self.again = [rewrite.afresh() for rewrite in self.rewrites]
        for rewrite in self.again:
            rewrite.__enter__()

    def __exit__(self, *error: object) -> None:
        for rewrite in reversed(self.again):
            rewrite.__exit__(None, None, None)
        self._write(self.meanwhile)
        self._count_batches(True)

    def _count_batches(self, on: bool) -> None:
        """Let batch norms of grafts see the recomputed batch without counting it again."""
        for norm, momentum in self.norms:
            norm.momentum = momentum if on else 0.0


def checkpoint_activations(model: nn.Module, on: bool = True) -> None:
    """Switch activation checkpointing of a backbone's blocks on or off. Only this switch keeps grafts exact: a
    library's own may recompute a block without the state of its forward."""
    for block in dissect(model).blocks:
        if on:
            block.module.__dict__["forward"] = _Checkpointed(block.module)
        else:
            block.module.__dict__.pop("forward", None)
