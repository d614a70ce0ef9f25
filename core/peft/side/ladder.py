"""LST: a thin network beside a frozen backbone (Sung et al. 2022, arXiv:2206.06522)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Block, BlockDescription, Site, Stack, check_layers, dissect
from core.errors import ScionError
from core.graft import Call, Graft, hidden_out
from core.method import PEFTMethod, Plan, Prepared
from core.method.options import probability
from core.peft.side._kv_cache import make_room
from core.peft.side._narrow import Keep, bare_copy, narrow, narrow_entry, set_dropout, slice_parameters, spread

Importance = Callable[[Tensor], Tensor]
"""How much each number of a weight matters."""
Kept = dict[str, tuple[Tensor, Tensor | None]]


class Run:
    """What the taps of one stack hand to each other in a forward. It copies and pickles empty."""

    def __init__(self, encoder: Run | None = None) -> None:
        self.encoder = encoder
        self.state: Tensor | None = None
        self.passed: dict[str, Any] = {}
        self.final: tuple[Tensor, Tensor, bool] | None = None

    def begin(self, state: Tensor) -> None:
        self.state, self.passed, self.final = state, {}, None

    def recall(self, memory: Tensor, asker: str) -> Tensor:
        """The side encoder's final state beside ``memory``, the trunk's; generation repeats samples for its beams."""
        if self.final is None:
            raise ScionError(f"{asker}: the decoder's side network reads the encoder's: run the encoder too")
        trunk, state, noisy = self.final
        if memory is not trunk and not torch.compiler.is_compiling():
            times = max(1, len(memory) // len(trunk))
            trunk, state = trunk.repeat_interleave(times, 0), state.repeat_interleave(times, 0)
            if memory.shape != trunk.shape or not (noisy or memory.is_meta or torch.equal(memory, trunk)):
                raise ScionError(f"{asker}: the decoder reads other encoder states than the last ones; run the encoder "
                                 "on its input first")
            self.final = memory, state, noisy
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)


@dataclass
class Parts:
    """What stands at one tap, and the widths of trunk and side there."""

    run: Run
    dim: int
    thin: int
    first: bool = False
    last: bool = False
    up: bool = False
    entry: nn.Module | None = None
    side: nn.Module | None = None
    norm: nn.Module | None = None
    about: BlockDescription | None = None
    numbers: tuple[int, int] = (0, 0)
    """Places of the trunk's block and of the thin one in a cache of keys and values."""


TIMM = "grad_checkpointing"
SWITCHES = (TIMM, "gradient_checkpointing")
"""Attributes by which timm and transformers recompute blocks in backward."""


def check_recomputing(modules: Sequence[nn.Module]) -> None:
    """Refuse a library's own recomputing of blocks, which runs them again without the state of the side network."""
    for module in modules:
        on = [name for name in SWITCHES if getattr(module, name, False) is True]
        if on and (module.training or on[0] == TIMM):  # transformers' layers heed theirs in train mode alone
            raise ScionError(f"LadderSideTuning: {type(module).__name__}.{on[0]} runs blocks again without the side "
                             "network's state: switch it off, and take core.graft.checkpoint_activations(model)")


class Tap(Graft):
    """s <- SideBlock(mu s + (1 - mu) (Down h + b)) behind a block; at the end Up norm(s) + b in the trunk's place. Its
    strength multiplies the step that s makes."""

    reads_call = True
    heeds_strength = True
    extends_cache = True

    def __init__(self, site: Site, parts: Parts, ratio: int, temperature: float, switches: list[nn.Module]) -> None:
        super().__init__(site)
        self.switches = switches
        self.run, self.last, self.about, self.numbers = parts.run, parts.last, parts.about, parts.numbers
        self.ratio, self.temperature = ratio, temperature
        self.entry, self.side, self.norm = parts.entry, parts.side, parts.norm
        self.first = _linear(parts.dim, parts.thin) if parts.first else None
        self.down = _linear(parts.dim, parts.thin) if parts.side is not None else None
        self.alpha = nn.Parameter(torch.zeros(1)) if parts.side is not None else None
        self.up = _linear(parts.thin, parts.dim) if parts.up else None

    @property
    def mu(self) -> Tensor:
        """The gate: the share of the running state."""
        assert self.alpha is not None
        return torch.sigmoid(self.alpha / self.temperature)

    def after(self, x: Tensor, y: Tensor, call: Call) -> Tensor:  # type: ignore[override]
        run, dtype = self.run, next((tensor.dtype for tensor in self.parameters()), y.dtype)
        if self.first is not None:
            if torch.is_grad_enabled():
                check_recomputing(self.switches)
            run.begin(self.first(x.to(dtype)))
        state = run.state
        if state is None:  # the stack's first tap is off
            return y
        if self.entry is not None:
            state = self.entry(state)
        if self.side is not None and self.down is not None:
            h = call.output if self.last else y
            step = self._step(self.mu * state + (1 - self.mu) * self.down(h.to(dtype)), call, dtype)
            state = step if self.strength == 1 else torch.lerp(state, step, self.strength)
        run.state = None if self.last else state
        if not self.last:
            return y
        run.passed = {}
        state = state if self.norm is None else self.norm(state)
        if self.up is None:  # of an encoder the decoder's side reads on
            run.final = y, state, self.site.module.training
            return y
        out = self.up(state).to(y.dtype)
        return out if y is call.output else y + (out - call.output)

    def _step(self, u: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
        """The thin block on u [batch, ..., thin], with what the trunk's block was given, as far as it fits."""
        run, about = self.run, self.about
        assert about is not None and self.side is not None
        given = {name: _cast(value, dtype) for name, value in call.arguments.items() if name != call.hidden}
        given |= {name: run.passed.get(name) for name in about.passes.values()}
        if given.get(about.rotary) is not None:  # every ratio-th frequency: those of a model with heads of this width
            given[about.rotary] = tuple(part[..., ::self.ratio] for part in given[about.rotary])
        if given.get(about.memory) is not None:
            if run.encoder is None:
                raise ScionError(f"{self.site.name} reads encoder states from outside, which have no side network")
            given[about.memory] = run.encoder.recall(call.arguments[about.memory], self.site.name)
        cache = given.get(about.cache)
        if cache is not None:
            trunk, mine = self.numbers
            make_room(cache, mine + 1, self.site.name)
            if cache.get_seq_length(mine) + u.shape[1] != cache.get_seq_length(trunk):
                raise ScionError(f"{self.site.name}: the cache holds tokens that the side network has not seen, or "
                                 "those of another one; begin with an empty cache")
        out = self.side(u, **given)
        run.passed = {name: out[place] for place, name in about.passes.items()}
        return hidden_out(out)


class LadderSideTuning(Prepared, PEFTMethod):
    """A thin copy of the backbone beside it, fed by the output of each block; nothing runs back through the backbone.

    Equation: s_0 = F e + f; s <- SideBlock_i(mu_i s + (1 - mu_i) (D_i h_i + b_i)), mu_i = sigmoid(alpha_i /
        temperature); y = U norm(s) + u takes the place of the trunk's final state. e enters the first block, h_i leaves
        block i; alpha zeros, F, D, U normal (0.01), their shifts zeros
    Trains: the thin blocks (1 / reduction^2 of each map), (dim + 1) dim / reduction for F and each D, a gate a block,
        the thin final norm, (dim / reduction + 1) dim for U; T5-base, drop 0, 4, 8: 3,878,706; dropping none:
        5,097,240; ViT-B/16: 2,376,492
    Merges: no, it is a network of its own; it is no identity at the start either
    Source: Sung et al. 2022, arXiv:2206.06522, section 3; settings of its GLUE runs. The published 3,878,712 counts a
        gate for each dropped block, which cannot learn: left out. Each stack has a side stack; a side decoder reads the
        side encoder. A first block's position bias goes to the first thin one. Thin blocks start from the backbone's,
        pruned by the walk of the released code (its "fisher-v2": rows of q, k and v by the product of their
        importances). Post-norm backbones end with the last block, without a further norm. A method in the trunk learns
        through the ladders, and pays for it. Several side networks add up: each brings its change of the final state.

    Args:
        reduction: the thin width as a fraction of the trunk's; it divides width, heads' width and MLP.
        drop: blocks without a side block, by their place in each stack (negative ones count from the end).
        temperature: of the gates.
        init: importance by which the thin blocks' start is chosen: ``magnitude`` of the weights, ``fisher`` (squared
            gradients of ``samples`` training examples, in `prepare`; the paper's), or ``random``: not the backbone's at
            all.
        samples: examples for ``fisher``.
        dropout: rate in the thin blocks; None is the backbone's own.
    """

    tags = ("additive", ("side",))
    identity_at_start = False
    needs = ("q", "k", "v", "o", "mlp.up", "mlp.down", "norm1")
    inference_cost = "the side network runs along"
    recommended = {"lr": 3e-3, "weight_decay": 0.0}

    switched: list[nn.Module]
    """Modules of the model that compute otherwise where they are told to keep nothing."""

    def __init__(self, reduction: int = 8, drop: Sequence[int] = (), temperature: float = 0.1,
                 init: Literal["magnitude", "fisher", "random"] = "magnitude", samples: int = 1024,
                 dropout: float | None = None, **common: Any) -> None:
        super().__init__(**common)
        if reduction < 1 or temperature <= 0 or samples < 1:
            raise ScionError(f"LadderSideTuning: reduction {reduction} and samples {samples} must be at least 1, "
                             f"temperature {temperature} positive")
        if init not in ("magnitude", "fisher", "random"):
            raise ScionError(f"LadderSideTuning: init {init!r} must be 'magnitude', 'fisher' or 'random'")
        probability("LadderSideTuning", dropout=dropout)
        self.reduction, self.drop, self.temperature = reduction, tuple(drop), temperature
        self.init, self.samples, self.dropout = init, samples, dropout

    # --------------------------------------------------------------------------------- where it stands

    def kept(self, anatomy: Anatomy) -> set[int]:
        """Indices of the blocks that have a side block."""
        kept = anatomy.layer_indices(self.layers, self.name)
        for stack in anatomy.stacks:
            dropped = check_layers(self.drop, len(stack.blocks), anatomy.family, self.name)
            kept = kept - {stack.blocks[place].index for place in dropped}
        return kept

    def sites(self, anatomy: Anatomy) -> list[Site]:
        kept, found = self.kept(anatomy), []
        for stack in anatomy.stacks:
            ends = [stack.blocks[0]]
            if stack.final is None:
                ends.append(stack.blocks[-1])
            for block in stack.blocks:
                if block.index in kept or block in ends or block.entry is not None:
                    found.append(block.sites["block"])
            if stack.final is not None:
                found.append(stack.final)
        return found

    def check(self, anatomy: Anatomy) -> None:
        if not self.kept(anatomy):
            raise ScionError(f"{self.name}: drop and layers leave no block to {anatomy.family}'s side network")
        for stack in anatomy.stacks:
            if stack.final is None and stack.blocks[-1].pre_norm:
                raise ScionError(f"{self.name}: the description of {anatomy.family} does not name its final norm")
        for block in anatomy.blocks:
            sites, heads = block.sites, block.sites["q"].heads
            assert heads is not None
            if not block.described.widths:
                raise ScionError(f"{self.name}: the description of {anatomy.family} does not say what follows the "
                                 "width of a head, so that no thin copy can be made")
            pairs = 2 if block.described.rotary else 1  # rotary positions turn pairs of a head's channels
            widths = {"width": block.dim, "heads' width": heads.width, "MLP": sites["mlp.up"].out_features}
            for what, width in widths.items():
                if width % self.reduction or (what == "heads' width" and width // self.reduction % pairs):
                    raise ScionError(f"{self.name}: reduction {self.reduction} does not divide the {what} {width} of "
                                     f"{block.path}{' into pairs' if pairs == 2 else ''}")
            for path in block.described.tables:
                frequencies = block.module.get_buffer(path).shape[1] // 2
                if frequencies % self.reduction:
                    raise ScionError(f"{self.name}: reduction {self.reduction} does not divide the {frequencies} "
                                     f"frequencies of the rotary positions of {block.path}")
            for site in sites.values():
                if site.role in self.needs[:6] and site.kind not in ("linear", "conv1d"):
                    raise ScionError(f"{self.name}: {site.name} is no linear map, of which alone thin copies are made")

    def fill(self, module: nn.Module, plan: Plan) -> None:
        self._places = self._parts(plan.anatomy, lambda weight: weight.detach().double().abs())
        super().fill(module, plan)
        del self._places

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        switched = [module for module in anatomy.root.modules() if any(hasattr(module, name) for name in SWITCHES)]
        return {"switched": switched}

    def build(self, site: Site) -> Graft:
        parts = self._places[site.name]
        if self.init == "random" and parts.side is not None:
            for weight in parts.side.parameters():
                if weight.dim() > 1:
                    nn.init.xavier_uniform_(weight)
        return Tap(site, parts, self.reduction, self.temperature, self.switched)

    def _parts(self, anatomy: Anatomy, importance: Importance) -> dict[str, Parts]:
        """What stands at each site, by the site's name."""
        found: dict[str, Parts] = {}
        run = None
        for stack in anatomy.stacks:
            run = Run(run)  # a decoder's side network goes on from its encoder's
            found |= ThinStack(self, anatomy, stack, run, importance).parts()
        return found

    # --------------------------------------------------------------------------------- start values from data

    @property
    def prepares(self) -> bool:
        return self.init == "fisher"

    def prepare(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Choose the thin blocks' start by the backbone's Fisher information: the mean square of the gradients of
        ``loss`` on the first ``samples`` of ``batches``, which should hold one example each."""
        root = self.need_root()
        anatomy = dissect(root)
        weights = [p for name, p in root.named_parameters() if p.dim() > 1 and not name.startswith("peft.")]
        squares = {id(weight): torch.zeros_like(weight, dtype=torch.float64) for weight in weights}
        flags, training = [weight.requires_grad for weight in weights], root.training
        try:
            root.eval()
            for weight in weights:
                weight.requires_grad_(True)
            with self.disabled(), torch.enable_grad():
                for batch in itertools.islice(batches, self.samples):
                    gradients = torch.autograd.grad(loss(batch), weights, allow_unused=True)
                    for weight, gradient in zip(weights, gradients, strict=True):
                        if gradient is not None:
                            squares[id(weight)] += gradient.detach().double() ** 2
        finally:
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag)
            root.train(training)
        places = self._parts(anatomy, lambda weight: squares[id(weight)])
        with torch.no_grad():
            for graft in self.grafts:
                for name in ("entry", "side", "norm"):
                    fresh, own = getattr(places[graft.site.name], name), getattr(graft, name)
                    for mine, value in zip(own.parameters() if own else (), fresh.parameters() if fresh else (),
                                           strict=True):
                        mine.copy_(value)
        self.prepared = True


class ThinStack:
    """The thin copy of one stack of blocks, pruned from its first block to its last: what a block keeps of its output
    decides what the next one reads."""

    def __init__(self, method: LadderSideTuning, anatomy: Anatomy, stack: Stack, run: Run, importance: Importance
                 ) -> None:
        self.method, self.anatomy, self.stack, self.run, self.importance = method, anatomy, stack, run, importance
        self.ratio = method.reduction
        self.kept = method.kept(anatomy)
        self.dim = stack.blocks[0].dim
        """Width of the trunk's state, here and now."""
        self.hidden = first_channels(anatomy, stack, importance, self.ratio)
        """Which of its channels the side network follows."""
        self.number = len(stack.blocks)
        """Place of the next thin block in a cache of keys and values: they come behind the trunk's."""

    def parts(self) -> dict[str, Parts]:
        """What stands at each site of the stack, by the site's name."""
        found: dict[str, Parts] = {}
        end = Parts(self.run, 0, 0)
        for place, block in enumerate(self.stack.blocks):
            end = self._at(place, block)
            found[block.sites["block"].name] = end
        final = self.stack.final
        if final is not None:
            norm = narrow_norm(final.module, self.hidden)
            end = Parts(self.run, self.dim, self.dim // self.ratio, last=True, norm=norm)
            found[final.name] = end
        end.up = self.stack is self.anatomy.stacks[-1]
        return found

    def _at(self, place: int, block: Block) -> Parts:
        """What stands behind one block."""
        is_last = self.stack.final is None and block is self.stack.blocks[-1]
        parts = Parts(self.run, block.dim, block.dim // self.ratio, first=place == 0, last=is_last,
                      about=block.described)
        if block.entry is not None:
            before = self.hidden
            self.hidden = entry_channels(block, self.dim, before, self.importance, self.ratio)
            parts.entry = narrow_entry(block, before, self.hidden, self.dim)
            self.dim = block.dim
        # A dropped block is pruned all the same, for the next one reads what it would have kept.
        keep, self.hidden = prune(block, self.hidden, self.importance, self.ratio)
        if block.index in self.kept:
            parts.side = self._thin(block, keep)
            parts.numbers = (place, self.number)
            self.number += 1
        return parts

    def _thin(self, block: Block, keep: Keep) -> nn.Module:
        leader = self.stack.blocks[0]
        is_first_kept = self.number == len(self.stack.blocks)
        # What the first block has for all (T5's table of relative positions) goes to the first thin one.
        lent = leader if is_first_kept and block is not leader else None
        side = narrow(block, self.ratio, keep, lent, self.number)
        if self.method.dropout is not None:
            set_dropout(side, self.method.dropout)
        return side


# ------------------------------------------------------------------------------------------------- pruning


def top(scores: Tensor, ratio: int) -> Tensor:
    """Indices of the len / ratio largest scores, in order (on the meta device, where there are none: the first)."""
    count = len(scores) // ratio
    if scores.is_meta:
        return torch.arange(count, device=scores.device)
    return scores.topk(count).indices.sort().values


def first_channels(anatomy: Anatomy, stack: Stack, importance: Importance, ratio: int) -> Tensor:
    """The channels in which the embedding matters most."""
    dim = stack.blocks[0].dim
    modules = [site.module for role in ("embed", "patch_embed") for site in anatomy.stem.get(role, [])]
    weights = {id(p): p for module in modules for p in module.parameters() if p.dim() > 1}
    scores = torch.zeros(dim, dtype=torch.float64, device=next(stack.blocks[0].module.parameters()).device)
    for weight in weights.values():
        axis = 0 if weight.dim() > 3 else weight.dim() - 1  # a convolution's outputs, an embedding's columns
        if weight.shape[axis] == dim:
            scores = scores + importance(weight).transpose(0, axis).flatten(1).sum(1)
    return top(scores, ratio)


def entry_channels(block: Block, dim: int, hidden: Tensor, importance: Importance, ratio: int) -> Tensor:
    """The channels that leave a downsampling, by what of its projection reads the channels ``hidden`` of ``dim``."""
    assert block.entry is not None
    [projection] = [module for module in block.entry.module.modules() if isinstance(module, nn.Linear)]
    columns = spread(hidden, dim, projection.in_features)
    return top(importance(projection.weight).index_select(1, columns).sum(1), ratio)


def prune(block: Block, hidden: Tensor, importance: Importance, ratio: int) -> tuple[Kept, Tensor]:
    """Rows and columns to keep of each map, and the channels that leave the block, when ``hidden`` enter it."""
    sites, keep = block.sites, Kept()

    def score(role: str, columns: Tensor) -> Tensor:
        site = sites[role]
        return site.matrix(importance(site.full_weight)).index_select(1, columns)

    def attention(prefix: str, hidden: Tensor) -> Tensor:
        heads = sites["q"].heads
        assert heads is not None
        q, k, v = (score(prefix + role, hidden) for role in "qkv")
        shape = (heads.key, 1, heads.width, len(hidden))  # grouped queries share keys and values
        product = q.view(heads.key, -1, *shape[2:]) * k.view(shape) * v.view(shape)
        joint = product.sum(-1)
        queries = top(joint.flatten(), ratio)
        keys = top(joint.sum(1).flatten(), ratio)
        out = top(score(f"{prefix}o", queries).sum(1), ratio)
        for role, rows in (("q", queries), ("k", keys), ("v", keys)):
            keep[prefix + role] = rows, hidden
        for role in (f"{prefix}q.norm", f"{prefix}k.norm"):  # one for all heads, each thinner by the ratio
            if role in sites:
                keep[role] = top(importance(sites[role].full_weight), ratio), None
        keep[f"{prefix}o"] = out, queries
        return out

    def mlp(hidden: Tensor) -> Tensor:
        ups = [role for role in ("mlp.up", "mlp.gate") if role in sites]
        inner = top(torch.stack([score(role, hidden).sum(1) for role in ups]).sum(0), ratio)
        out = top(score("mlp.down", inner).sum(1), ratio)
        keep.update(dict.fromkeys(ups, (inner, hidden)))
        keep["mlp.down"] = (out, inner)
        return out

    sublayers: list[tuple[str, str, Callable[[Tensor], Tensor]]] = []
    sublayers.append(("norm1", "attention.norm", lambda h: attention("", h)))
    if "cross.q" in sites:
        sublayers.append(("cross.norm", "", lambda h: attention("cross.", h)))
    sublayers.append(("norm2", "mlp.norm", mlp))
    entered = hidden
    for norm, norm_behind, sublayer in sublayers:
        if norm == "norm2" and norm not in sites:  # the MLP stands beside attention (Phi), behind one norm with it
            hidden = sublayer(entered)
            continue
        if block.pre_norm and norm in sites:  # ModernBERT's first block has none at its attention
            keep[norm] = (hidden, None)
        hidden = sublayer(hidden)
        if norm_behind in sites:
            keep[norm_behind] = (hidden, None)
        if not block.pre_norm:
            keep[norm] = (hidden, None)
    keep["block"] = (hidden, None)
    return keep, hidden


def narrow_norm(norm: nn.Module, channels: Tensor) -> nn.Module:
    """A copy of a norm for these channels."""
    copied = bare_copy(norm).requires_grad_(True)
    if any(True for _ in copied.parameters()):
        slice_parameters(copied, channels)
    return copied


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``value`` in the thin network's type."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
