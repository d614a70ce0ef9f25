"""The graft: the one mechanism by which anything is inserted into a backbone, switched, and removed.

A graft is an ``nn.Module`` at a site that does one or more of four things there::

    before(x)                                     a new input of the site
    weight(W)                                     an effective weight, W and the result as matrices [out, in]
    after(x, y)                                   a new output, from the site's input and output
    attend(q, k, v, mask, x, attention)           attention's output; ``attention(q, k, v, mask)`` is the base call

All grafts of a module are run by one `core.graft.hooks.SiteHooks`, in their order of attachment. ``before`` and
``after`` are plain hooks. ``weight`` and ``attend`` rewrite calls inside the module's forward (`core.graft.rewrite`).
The backbone's class, ``forward``, parameters and state-dict keys stay as they are.

A graft may also read another site of its block than its own (`Tap`), or edit all arguments of a call in ``before``
(``edits_call``), where what it puts in needs a longer mask or other positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft.arguments import rows_of_samples

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


class GraftDeclarations:
    """What a graft says of itself, for the hooks, merging and files."""

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
    spans_tokens: bool = False
    """What it does to one token depends on others of the same call by itself (a convolution, a mean over tokens, a
    position in the sequence), and not by attention alone: texts are written without a cache and without padding."""
    extends_cache: bool = False
    """It keeps keys and values of its own in layers of the model's cache behind the model's."""
    added_positions: int = 0
    """Positions of the model's context that tokens of its own take."""
    sample_attributes: tuple[str, ...] = ()
    """Attributes that may be tensors with an entry for each sample of the batch, as a route is."""
    momentary: tuple[str, ...] = ("active", "dropped", "strength", "batch", "route", "variant")
    """Attributes that may be others at each forward."""
    packed: tuple[str, ...] = ()
    """Its tensors that files hold in another form; it defines ``pack`` and ``unpack`` then. Checkpoints hold
    the form in use, since training goes on from there."""


class Graft(GraftDeclarations, nn.Module):
    """Base of all grafts; a subclass defines any of the four verbs, and ``merged`` where it can be written into W."""

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
        # Taken out at once: a hidden state kept here would live until the next forward.
        value, self.tap.value = self.tap.value, None
        if value is None:
            raise ScionError(f"{self.site.name}: {self.tap.site.name}, which is read there, has not run before it")
        return value[rows_of_samples(self.batch, value.shape[0], self.route)] if self.by_rows else value

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
        hooks = hooks_of(self.site.module)
        return self.site.module.forward(*args, **kwargs) if hooks is None else hooks.again(self, args, kwargs)

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


def route_rows(grafts: list[Graft], route: Tensor | None, variant: int = 0) -> None:
    """Let ``grafts`` serve only the samples whose entry in ``route`` [batch] is ``variant``; None routes nothing."""
    for graft in grafts:
        graft.batch = None if route is None else (route == variant).nonzero().flatten()
        # The whole route stays along: neighbours of one route see what arrived, each for its rows.
        graft.route, graft.variant = route, variant


class HooksOfModule(ABC):
    """What runs the grafts of one module: `core.graft.hooks.SiteHooks`, as a graft sees it."""

    @abstractmethod
    def again(self, asker: Graft | None, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The module's output with the grafts beside ``asker``, without anything before it."""


def hooks_of(module: nn.Module) -> HooksOfModule | None:
    """What runs the grafts of ``module``, found among its hooks: nothing is stored on the module itself."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, HooksOfModule):
            return owner
    return None
