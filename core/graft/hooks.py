"""The hooks of one module, which run its grafts in their order of attachment."""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft.arguments import (
    Call,
    hidden_in,
    hidden_name,
    hidden_out,
    rows_of_samples,
    with_hidden_in,
    with_hidden_out,
)
from core.graft.graft import VERBS, Graft, HooksOfModule, hooks_of
from core.graft.held_attributes import hold, release
from core.graft.rewrite import (
    CallRewriter,
    Effective,
    apply_bias,
    apply_weight,
    apply_weights,
    is_transforming,
    keys_of_tokens,
    variants_present,
    weight_from,
    with_strength,
)
from core.graft.rows import after_on_rows, before_on_rows, call_after, edit_arguments, side_by_side


class SiteHooks(HooksOfModule):
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
        self.open: list[CallRewriter] = []
        """Rewriters of forwards that are running; more than one where the module calls itself."""
        self.held: list[tuple[nn.Module, str]] = []
        """Attributes of modules that are held at other values than their own, for active grafts."""
        self.names = list(inspect.signature(type(module).forward).parameters)[1:]
        # The rewriter is entered by the last hook before the forward, and left by the first one behind it.
        self.handles = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave, with_kwargs=True, always_call=True, prepend=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    @classmethod
    def of(cls, module: nn.Module) -> SiteHooks | None:
        """Those of ``module``; None where it has no grafts."""
        hooks = hooks_of(module)
        return hooks if isinstance(hooks, SiteHooks) else None

    # ------------------------------------------------------------------------------- who is here

    def add(self, graft: Graft) -> None:
        """Take in a graft of this module."""
        self.grafts.append(graft)
        # One that returns by unmerge returns to its place.
        self.grafts.sort(key=lambda graft: (graft.folds, graft.place))
        self._sort_by_verb()
        self.refresh()

    def drop(self, graft: Graft) -> None:
        """Forget a graft of this module, or one that reads it; the last one takes the hooks along."""
        self.grafts = [other for other in self.grafts if other is not graft]
        self.readers = [other for other in self.readers if other is not graft]
        self._sort_by_verb()
        self.refresh()
        if not self.grafts and not self.readers:
            for handle in self.handles:
                handle.remove()

    def _sort_by_verb(self) -> None:
        """Find out once, and not in each forward, what the grafts here do."""
        for verb in VERBS:
            self.acting[verb] = [graft for graft in self.grafts if verb in _verbs_at_site(graft)]
        self.noticing = [graft for graft in self.grafts if type(graft).notice is not Graft.notice]

    def refresh(self) -> None:
        """Give modules the attributes that active grafts need here, and their own back where none does."""
        needed = {}
        for graft in self.grafts:
            if graft.live:
                for module, name, value in graft.site.while_active:
                    needed[id(module), name] = (module, name, value)
        held = {(id(module), name) for module, name in self.held}
        for module, name in self.held:
            if (id(module), name) not in needed:
                release(module, name)
        for key, (module, name, value) in needed.items():
            if key not in held:
                hold(module, name, value)
        self.held = [(module, name) for module, name, _ in needed.values()]

    def _live(self, verb: str) -> list[Graft]:
        """The grafts that have a verb and take part. It runs in each forward, so the loop asks no property."""
        found = []
        for graft in self.acting[verb]:
            if graft.active and not graft.dropped:
                found.append(graft)
        if verb == "weight" and any(graft.site.by_weight for graft in found):
            found.sort(key=_turn)
        return found

    # ------------------------------------------------------------------------------- before the forward

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.open:  # a forward that ended without its hooks, by Ctrl-C
            self._leave_interrupted()
        for graft in self.noticing:
            if graft.active and not graft.dropped:
                graft.notice(args, kwargs)
        if self.readers:
            self._fill_taps("input", hidden_in(args, kwargs))
        if self.acting["before"]:
            args, kwargs = self._before(args, kwargs)
        if self.acting["weight"] or self.acting["attend"]:
            rewriter = self._rewriter(self._live("weight"), self._live("attend"), args, kwargs)
            if rewriter is not None:
                rewriter.__enter__()
                self.open.append(rewriter)
        return args, kwargs

    def _before(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's arguments as grafts change them."""
        live = self._live("before")
        for group in side_by_side([graft for graft in live if graft.edits_call]):
            arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
            args, kwargs = (), edit_arguments(group, arguments)
        before = [graft for graft in live if not graft.edits_call]
        if not before:
            return args, kwargs
        x = hidden_in(args, kwargs)
        for graft in before:
            if graft.by_rows:
                x = before_on_rows(graft, x)
            else:
                x = with_strength(graft, x, graft(x, verb="before"))
        return with_hidden_in(args, kwargs, x)

    def _fill_taps(self, side: str, value: Tensor) -> None:
        """Let grafts of other sites have what arrives here, or what leaves."""
        for graft in self.readers:
            will_not_read = graft.by_rows and graft.batch is not None and not len(graft.batch)
            if graft.live and graft.tap is not None and graft.tap.side == side and not will_not_read:
                graft.tap.value = value

    # ------------------------------------------------------------------------------- during the forward

    def _rewriter(self, weights: list[Graft], attend: list[Graft], args: tuple, kwargs: dict[str, Any]
                  ) -> CallRewriter | None:
        if not weights and not attend:
            return None
        x = hidden_in(args, kwargs)
        keys_of = functools.partial(keys_of_tokens, self.module, args, kwargs)
        return CallRewriter(self._effective(weights, x), attend, x, keys_of)

    def again(self, asker: Graft | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output with the grafts beside ``asker``, without anything before it."""
        weights = [graft for graft in self._live("weight") if graft is not asker]
        attend = [graft for graft in self._live("attend") if graft is not asker]
        after = [graft for graft in self._live("after") if graft is not asker]
        with self._rewriter(weights, attend, args, kwargs) or contextlib.nullcontext():
            output = self.module.forward(*args, **kwargs)
        return self._run_after(after, args, kwargs, output)

    def _effective(self, grafts: list[Graft], x: Tensor) -> list[Effective]:
        """What is used instead of each parameter that these grafts change."""
        found: list[Effective] = []
        for name in dict.fromkeys(graft.site.parameter for graft in grafts):
            frozen = getattr(self.module, name)
            found.append(_effective_weight(frozen, [graft for graft in grafts if graft.site.parameter == name], x))
        bias = self._effective_bias([graft for graft in grafts if graft.site.by_weight], x)
        if bias is not None:
            found.append(bias)
        return found

    def _effective_bias(self, grafts: list[Graft], x: Tensor) -> Effective | None:
        """What is used instead of the bias of a map on which grafts act by its weight."""
        changing = [graft for graft in grafts if type(graft).merged_bias is not Graft.merged_bias]
        frozen = getattr(self.module, changing[0].site.bias_parameter) if changing else None
        if frozen is None:
            return None
        effective = Effective(frozen, frozen, {})
        present = variants_present([graft for graft in changing if graft.batch is not None])
        for graft in changing:
            if graft.batch is None:
                effective.tensor = apply_bias(graft, effective.tensor)
            elif graft.variant in present:
                rows = rows_of_samples(graft.batch, x.shape[0], graft.route)
                effective.routed[graft.variant] = (rows, apply_bias(graft, effective.of(graft.variant)))
        return effective

    # ------------------------------------------------------------------------------- behind the forward

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.open:
            return
        rewriter = self.open.pop()
        rewriter.__exit__(None, None, None)
        if not rewriter.reached and output is not None:  # None: the forward itself raised
            sites = ", ".join(graft.site.name for graft in self.grafts)
            raise ScionError(f"{sites}: {type(module).__name__}.forward made no call that a graft could rewrite")

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        after = self._live("after") if self.acting["after"] else []
        changed = self._run_after(after, args, kwargs, output) if after else None
        if self.readers:
            self._fill_taps("output", hidden_out(output if changed is None else changed))
        return changed

    def _run_after(self, after: list[Graft], args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_in(args, kwargs), hidden_out(output)
        call = None
        for graft in after:
            if graft.reads_call and call is None:
                arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
                hidden = next(iter(arguments)) if args else hidden_name(kwargs)
                call = Call(arguments, hidden, y)
        groups = [after] if len(after) == 1 else side_by_side(after)
        for group in groups:
            first = group[0]
            if first.by_rows:
                y = after_on_rows(group, x, y, call)
            else:
                y = with_strength(first, y, call_after(first, x, y, call))
        return with_hidden_out(output, y)

    def _leave_interrupted(self) -> None:
        """Leave rewriters that an interrupt kept open: hooks with ``always_call`` do not run on KeyboardInterrupt, and
        a rewriter that stays would go on rewriting calls."""
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


def _effective_weight(frozen: Tensor, grafts: list[Graft], x: Tensor) -> Effective:
    """What is used instead of the parameter ``frozen``, which all of ``grafts`` change."""
    effective = Effective(frozen, frozen, {})
    # Routed ones come on top of those that all rows share.
    common = [graft for graft in grafts if graft.batch is None]
    routed = [graft for graft in grafts if graft.batch is not None]
    trained = tuple(p for graft in common for p in graft.parameters() if p.requires_grad)
    if not routed and trained and _may_recompute(common, frozen):
        strengths = [graft.strength for graft in common]
        effective.make = functools.partial(weight_from, common, strengths, frozen)
        effective.trained = trained
    else:
        effective.tensor = apply_weights(common, frozen)
    present = variants_present(routed)
    for graft in routed:
        if graft.variant in present:
            rows = rows_of_samples(graft.batch, x.shape[0], graft.route)
            effective.routed[graft.variant] = (rows, apply_weight(graft, effective.of(graft.variant)))
    return effective


def _may_recompute(grafts: list[Graft], frozen: Tensor) -> bool:
    """Whether the effective weight can be made again in backward, and some graft gains by that."""
    if not any(graft.remade for graft in grafts) or frozen.requires_grad:
        return False
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transforming()


def _verbs_at_site(graft: Graft) -> tuple[str, ...]:
    """The verbs of a graft at its site: where no map is called, all is done to the weight."""
    return ("weight",) if graft.site.by_weight else graft.verbs


def _turn(graft: Graft) -> tuple[int, int]:
    """The order in which grafts act on a weight so that each does what it would do to input and output: what changes
    the weight, then what changes the output, then, the last one first, what changes the input."""
    if "weight" in graft.verbs:
        return 0, graft.place
    return (2, -graft.place) if graft.verbs == ("before",) else (1, graft.place)


def connect(graft: Graft) -> None:
    """Add the graft at its site, behind those that are there."""
    for module in (graft.site.module, *graft.site.tied):
        hooks = SiteHooks.of(module) or SiteHooks(module)
        hooks.add(graft)
    if graft.tap is not None:
        read = graft.tap.site.module
        hooks = SiteHooks.of(read) or SiteHooks(read)
        hooks.readers.append(graft)


def disconnect(graft: Graft) -> None:
    """Take the graft from its site, and from the one that it reads; the last one takes the hooks along."""
    read = () if graft.tap is None else (graft.tap.site.module,)
    for module in (graft.site.module, *graft.site.tied, *read):
        hooks = SiteHooks.of(module)
        if hooks is not None:
            hooks.drop(graft)


def run_at(site: Site, x: Tensor) -> Tensor:
    """The site's module on further states ``x``, with the weights and outputs that its grafts give it; nothing that
    reads the site sees them."""
    hooks = SiteHooks.of(site.module)
    return site.module.forward(x) if hooks is None else hidden_out(hooks.again(None, (x,), {}))


def refresh(graft: Graft) -> None:
    """Tell the hooks of the graft's site that its activity changed."""
    hooks = SiteHooks.of(graft.site.module)
    if hooks is not None:
        hooks.refresh()
