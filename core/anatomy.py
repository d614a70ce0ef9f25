"""The anatomy of a backbone: which module plays which role, so that a method asks for roles and never for paths.

``dissect(model)`` returns an `Anatomy`: blocks in order, and for every role a `Site`, a place where a graft can stand.
A family of models is described by one small function, registered under its class's name (``"module:Class"``, matched
along the class's MRO, so that nothing here imports a model library)::

    @family("my_package.models:MyEncoder")
    def my_encoder(model):
        return Description(
            stem={"embed": "embedding", "norm": "final_norm"}, final="final_norm",
            blocks=[
                BlockDescription(
                    path=f"layers.{i}", dim=model.width, heads=(8, 8, model.width // 8),
                    roles={"q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.out", "attend": "attn",
                           "mlp.up": "mlp.0", "mlp.down": "mlp.2", "attention": "attn", "mlp": "mlp",
                           "norm1": "norm1", "norm2": "norm2"},
                )
                for i in range(len(model.layers))
            ],
        )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import native
from core.errors import ScionError, listed, nearest

ROLES: dict[str, str] = {
    "q": "query projection", "k": "key projection", "v": "value projection", "o": "attention's output projection",
    "qkv": "the fused projection of queries, keys and values, as one linear map (only where they are fused)",
    "mlp.up": "first linear map of the MLP, before the activation", "mlp.gate": "gate of a gated MLP",
    "mlp.down": "last linear map of the MLP",
    "attend": "the attention call itself: queries, keys and values split into heads",
    "attention": "output of the attention sublayer, before the residual is added",
    "mlp": "output of the MLP sublayer, before the residual is added",
    "attention.branch": "what attention adds to the residual, where that lies otherwise than its output (windows)",
    "block": "a whole block, input and output",
    "norm1": "the block's norm at attention", "norm2": "the block's norm at the MLP",
    "cross.q": "query projection of cross-attention", "cross.k": "key projection of cross-attention",
    "cross.v": "value projection of cross-attention", "cross.o": "output projection of cross-attention",
    "cross.attend": "the cross-attention call itself", "cross.norm": "the block's norm at cross-attention",
    "cross.attention": "output of the cross-attention sublayer, before the residual is added",
    "norm": "norms outside blocks: the final norm, the embedding's norm",
    "final_norm": "of these, the one behind the last block",
    "conv": "the block's spatial convolution, where it has no attention",
    "position_bias": "the attention's table of relative positions, a parameter",
    "embed": "output of the embedding", "patch_embed": "projection of the patches",
    "downsample": "projection between two stages", "pool": "pooler", "head": "task head",
    "lm_head": "a language-model head's map to the vocabulary",
    "projection": "map of a tower's feature into a space that towers share",
    "feature": "output of the whole module that methods are attached to",
}
"""Every role, with what stands there. A site in a block is named ``<block>.<role>``, any other ``<role>``. Where blocks
come in several stages or stacks, ``<stage>.<role>`` means the role in one of them (``decoder.cross.k``)."""

NORMS = ("norm", "norm1", "norm2", "cross.norm")
"""The roles that are norms."""


@dataclass(frozen=True)
class Rows:
    """The output rows of a fused weight that belong to one role: contiguous (``start``, ``stop``) or any ``index``."""

    start: int = 0
    stop: int = 0
    index: tuple[int, ...] | None = None

    def indices(self) -> Sequence[int]:
        return self.index if self.index is not None else range(self.start, self.stop)

    def __len__(self) -> int:
        return len(self.indices())

    def take(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """These rows of ``tensor`` along ``dim``; a view where they are contiguous."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        return tensor.index_select(dim, torch.tensor(self.index, device=tensor.device))

    def put(self, tensor: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
        """``tensor`` with these rows replaced, as a new tensor."""
        if self.index is None:
            return tensor.slice_scatter(rows, dim, self.start, self.stop)
        return tensor.index_copy(dim, torch.tensor(self.index, device=tensor.device), rows)


@dataclass(frozen=True)
class Grid:
    """How the tokens of an image or a spectrogram lie: ``special`` ones first, then ``height`` x ``width`` row by row.
    Where the states are maps already [batch, height, width, dim], these numbers are not looked at."""

    height: int
    width: int
    special: int = 0

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [batch, tokens, dim] or [batch, height, width, dim] -> (special tokens [batch, special, dim], the map
        [batch, dim, height, width]). Images of another size than the described one are taken to be square.

        Raises:
            ScionError: the tokens are no such grid.
        """
        if x.dim() == 4:
            return x.flatten(1, 2)[:, :0], x.movedim(-1, 1)
        height, width, count = self.height, self.width, x.shape[1] - self.special
        if height * width != count:
            height = width = math.isqrt(count)
        if height * width != count:
            raise ScionError(f"{x.shape[1]} tokens are not {self.special} and a grid of {self.height} x {self.width}, "
                             "nor a square")
        return x[:, :self.special], torch.unflatten(x[:, self.special:].transpose(1, 2), 2, (height, width))

    @staticmethod
    def join(special: Tensor, grid: Tensor, like: Tensor) -> Tensor:
        """Undo of `split`, in the layout of ``like``; the special tokens and the map may have other channels."""
        return grid.movedim(1, -1) if like.dim() == 4 else torch.cat([special, grid.flatten(2).transpose(1, 2)], 1)


@dataclass(frozen=True)
class Heads:
    """Heads of the queries, heads of the keys and values (fewer under grouped queries), and a head's width."""

    query: int
    key: int
    width: int


@dataclass(eq=False)
class Site:
    """A named place in a backbone: a role, the module that plays it, and how its tensors are laid out."""

    name: str
    role: str
    path: str
    module: nn.Module
    block: int | None = None
    rows: Rows | None = None
    heads: Heads | None = None
    width: int = 0
    """Channels of the hidden state that leaves the site; they are its last axis."""
    around: Block | None = None
    """The block that it stands in."""
    parameter: str = "weight"
    """Which of the module's parameters the verb ``weight`` sees."""
    tied: tuple[nn.Module, ...] = ()
    """Other modules that hold the same parameter under the same name."""
    while_active: tuple[tuple[nn.Module, str, Any], ...] = ()
    """(module, attribute, value) that must be so while a graft is active here."""
    per_token: dict[str, str] = field(default_factory=dict)
    """Further arguments of the module that belong to the tokens it is called with."""
    offset: float = 0.0
    """What a norm adds to its weight before it multiplies."""
    by_weight: bool = False
    """The map is never called as a module: what stands here acts by what it would write into the weight."""

    def rerun(self, x: Tensor, arguments: Mapping[str, Any], hidden: str) -> Tensor:
        """The frozen module called once more, on tokens ``x`` that are not the call's own, without the hooks that stand
        at it (so without any graft of this site); those of modules inside it take part. Nothing is checkpointed.

        Args:
            x: another hidden state [batch, tokens, dim].
            arguments: those of the call, by name; masks and caches are left out, positions are the last token's.
            hidden: the name of the hidden state among them.
        """
        fates = {"none": lambda value: None, "last": _last, "": lambda value: value}
        kept = {name: fates[self.per_token.get(name, "")](value) for name, value in arguments.items()}
        output = type(self.module).forward(self.module, **{**kept, hidden: x})
        return output[0] if isinstance(output, tuple) else output

    @property
    def kind(self) -> str:
        """``linear`` (weight [out, in]), ``conv1d`` (transformers' [in, out]), ``conv`` (convolution) or ``module``."""
        if self.role == "parameter":
            return "module"
        if isinstance(self.module, nn.Linear) or self.by_weight:
            return "linear"
        if isinstance(self.module, nn.modules.conv._ConvNd) and not self.module.transposed:
            return "conv"
        if "transformers.pytorch_utils:Conv1D" in _class_names(self.module):
            return "conv1d"
        return "module"

    @property
    def out_features(self) -> int:
        """Rows of the weight that belong to the site."""
        return len(self.rows) if self.rows is not None else self.full_weight.shape[self._out_axis]

    @property
    def in_features(self) -> int:
        """Numbers that one output row reads: for a convolution (in / groups) x kernel."""
        return self.full_weight.numel() // self.full_weight.shape[self._out_axis]

    @property
    def full_weight(self) -> nn.Parameter:
        """The module's own parameter, whole, in the module's layout."""
        return getattr(self.module, self.parameter)

    @property
    def weight_name(self) -> str:
        """The parameter's name in the root's state dict."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def parameter_names(self) -> list[str]:
        """Names in the root's state dict of all that the site holds: its module's parameters, or the one it is."""
        if self.by_weight:
            return [self.weight_name, *([] if self.bias is None else [self.bias_name])]
        if self.parameter != "weight":
            return [self.weight_name]
        return [f"{self.path}.{name}" if self.path else name for name, _ in self.module.named_parameters()]

    @property
    def _out_axis(self) -> int:
        return 1 if self.kind == "conv1d" else 0

    @property
    def bias_parameter(self) -> str:
        """The name of the module's parameter that is added behind the map."""
        return "in_proj_bias" if self.by_weight else "bias"

    @property
    def bias_name(self) -> str:
        """The bias's name in the root's state dict, whether or not there is one."""
        return f"{self.path}.{self.bias_parameter}" if self.path else self.bias_parameter

    @property
    def bias(self) -> Tensor | None:
        """The site's part of the bias [out]."""
        bias = getattr(self.module, self.bias_parameter, None)
        return bias if bias is None or self.rows is None else self.rows.take(bias)

    @property
    def takes_bias(self) -> bool:
        """Whether merging may change the module's bias, or give it one: it must be called as a whole and look for it.
        Norms by root mean square do not."""
        called = all(isinstance(owner, (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention))
                     for owner, _, _ in self.while_active)
        return self.bias is not None or ("bias" in self.module._parameters and called)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels in the site's output, from the end: before the space axes behind a convolution or a
        norm of images, else the last."""
        if self.kind == "conv":
            return 1 - self.full_weight.dim()
        return -3 if type(self.module).__name__.endswith("Norm2d") else -1

    def take(self, y: Tensor) -> Tensor:
        """The site's channels of its module's output."""
        return y if self.rows is None else self.rows.take(y, self.channel_axis)

    def put(self, y: Tensor, part: Tensor) -> Tensor:
        """Its module's output with the site's channels replaced, as a new tensor of the same type."""
        part = part.to(y.dtype)
        return part if self.rows is None else self.rows.put(y, part, self.channel_axis)

    def per_channel(self, vector: Tensor) -> Tensor:
        """A vector [out] shaped so that it broadcasts over the site's output."""
        return vector if self.kind != "conv" else vector.view(-1, *[1] * (self.full_weight.dim() - 2))

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
        """``scale up @ down`` applied to the site's input as its own weight would be, without forming the product.

        Args:
            x: the site's input, in the type of ``down``.
            down: [rank, in].
            up: [out, rank].
        """
        if self.kind == "conv" and self.module.groups > 1:  # type: ignore[operator]
            # Each group sees other channels: the product is the weight itself.
            return self._convolve(x, (scale * up @ down).view(-1, *self.full_weight.shape[1:]))
        hidden = self.project(x, down)
        return self.mix(hidden if scale == 1 else hidden * scale, up)

    def project(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``matrix`` [rank, in] applied to the site's input as its own weight would be -> rank channels."""
        if self.kind != "conv":
            return F.linear(x, matrix)
        return self._convolve(x, matrix.view(-1, *self.full_weight.shape[1:]))

    def mix(self, y: Tensor, matrix: Tensor) -> Tensor:
        """``matrix`` [out, in] applied to the channels of what stands on the site's output side."""
        if self.kind != "conv":
            return F.linear(y, matrix)
        space = self.full_weight.dim() - 2
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[space]
        return convolve(y, matrix.view(*matrix.shape, *[1] * space))

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the site's convolution makes of ``x`` with another weight and no bias; it pads and strides as ever."""
        conv: Any = self.module
        if type(conv).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
            return conv._conv_forward(x, weight, None)
        held = dict(conv._parameters)
        conv._parameters.update(weight=weight, bias=None)
        try:
            return type(conv).forward(conv, x)
        finally:
            conv._parameters.update(held)

    def matrix(self, weight: Tensor) -> Tensor:
        """The site's part of ``weight`` (the module's layout) as a matrix [out, in]."""
        if self.kind == "module":
            return weight
        weight = weight.t() if self.kind == "conv1d" else weight.flatten(1)
        return weight if self.rows is None else self.rows.take(weight)

    def unmatrix(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """``weight`` (the module's layout) with the site's part replaced by ``matrix`` [out, in], as a new tensor."""
        if self.kind == "module":
            return matrix
        if self.rows is not None:
            whole = weight.t() if self.kind == "conv1d" else weight.flatten(1)
            matrix = self.rows.put(whole.to(matrix.dtype), matrix)
        return matrix.t() if self.kind == "conv1d" else matrix.reshape(weight.shape)


def _last(value: Any) -> Any:
    """The last token's part of positions (ids [.., tokens] or embeddings [.., tokens, width]) or of a mask [.., tokens,
    keys], or of a tuple of these."""
    if isinstance(value, (tuple, list)):
        return tuple(_last(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value[..., -1:] if value.dtype in (torch.int32, torch.int64) else value[..., -1:, :]


@dataclass(eq=False)
class Block:
    """One block: its module, width, sites by role, and where it stands."""

    index: int
    path: str
    module: nn.Module
    dim: int
    stage: str
    pre_norm: bool
    sites: dict[str, Site]
    described: BlockDescription
    entry: Site | None = None
    """What stands between the block before and this one (a downsampling)."""

    @property
    def grid(self) -> Grid | None:
        """How its tokens lie, where they are a grid."""
        return self.described.grid

    @property
    def causal(self) -> bool:
        """Whether its tokens see only those before them."""
        return self.described.causal

    def into(self, sublayer: str) -> Site:
        """The site whose input is what a sublayer (``attention``, ``cross.attention``, ``mlp``) reads, behind a norm
        that stands before it."""
        if sublayer == "mlp":
            return self.sites["mlp.up"]
        call = sublayer.replace("attention", "attend")
        return self.sites[call] if call in self.sites else self.sites[sublayer.replace("attention", "q")]

    def beside(self, sublayer: str) -> Site:
        """The site whose input is the residual stream that a sublayer's output is added to."""
        norms = {"attention": ("norm1",), "cross.attention": ("cross.norm",), "mlp": ("norm2", "norm1")}[sublayer]
        found = [self.sites[norm] for norm in norms if norm in self.sites]
        return found[0] if self.pre_norm and found else self.into(sublayer)


@dataclass(eq=False)
class Stack:
    """Blocks that run one after the other from an embedding to a final state: an encoder, a decoder."""

    name: str
    blocks: list[Block]
    final: Site | None
    """The norm after the last block; None where the last block's output is the final state."""
    text: Site | None = None
    """The module that takes token ids as ``input_ids`` or their embeddings as ``inputs_embeds``, where there is one."""


@dataclass(eq=False)
class Anatomy:
    """What a method may know about a backbone."""

    root: nn.Module
    family: str
    blocks: list[Block]
    stacks: list[Stack]
    """The blocks by the stack that they stand in, in the order in which the stacks run."""
    stem: dict[str, list[Site]]
    """Sites outside the blocks, by role; a role may be played more than once (``downsample``, ``norm``)."""
    inputs: Site
    """The described model itself, where its inputs arrive: each of its forwards begins here."""

    @property
    def stages(self) -> list[list[Block]]:
        """The blocks by stage, in order; one list where there are no stages."""
        found: dict[str, list[Block]] = {}
        for block in self.blocks:
            found.setdefault(block.stage, []).append(block)
        return list(found.values())

    @property
    def roles(self) -> dict[str, int]:
        """Each role that this backbone has, with the number of its sites."""
        counts: dict[str, int] = {}
        for site in self.all_sites():
            counts[site.role] = counts.get(site.role, 0) + 1
        return counts

    def linear_roles(self) -> list[str]:
        """Roles in the blocks that are linear maps; of a fused projection the whole, not its parts."""
        roles = dict.fromkeys(site.role for block in self.blocks for site in block.sites.values()
                              if site.kind != "module" and site.role not in ("attention", "mlp"))
        return [role for role in roles if role not in (("q", "k", "v") if "qkv" in roles else ())]

    def all_sites(self) -> Iterator[Site]:
        """Every site, stem first, then block by block."""
        for sites in self.stem.values():
            yield from sites
        for block in self.blocks:
            yield from block.sites.values()

    def sites(self, roles: str | Iterable[str], layers: Sequence[int] | None = None, asker: str = "") -> list[Site]:
        """The sites of the given roles, in the order of the blocks.

        Args:
            roles: one role or several; each must exist.
            layers: block indices to keep (negative counts from the end); None keeps all. Sites outside blocks are
                kept either way.
            asker: who asks, for the message.

        Raises:
            ScionError: a role or a block that does not exist; the message lists what does.
        """
        wanted = [roles] if isinstance(roles, str) else list(roles)
        staged = self._staged()
        who = f"{asker}: " if asker else ""
        if not wanted:
            raise ScionError(f"{who}targets is empty; {self.family} has the roles {listed(self.roles, 40)}")
        check_roles([role for role in wanted if role not in staged], self.roles, self.family, asker)
        keep = self.layer_indices(layers, asker)
        found = [site for role in wanted for site in self.stem.get(role, [])]
        for block in self.blocks:
            if block.index in keep:
                here = dict.fromkeys(role.removeprefix(f"{block.stage}.") for role in wanted)
                found += [block.sites[role] for role in here if role in block.sites]
        if not found:
            raise ScionError(f"{who}targets {wanted} match nothing in the layers {sorted(keep)} of {self.family}")
        return found

    def _staged(self) -> set[str]:
        """The roles with a stage before them, where blocks have one."""
        return {f"{block.stage}.{role}" for block in self.blocks if block.stage for role in block.sites}

    def block_of(self, name: str) -> int | None:
        """Index of the block that holds the parameter ``name``; None where it lies outside of them."""
        return next((block.index for block in self.blocks if name.startswith(f"{block.path}.")), None)

    def layer_indices(self, layers: Sequence[int] | None, asker: str = "") -> set[int]:
        """Block indices, negative ones counted from the end; None means all."""
        return check_layers(layers, len(self.blocks), self.family, asker)

    def head_names(self) -> set[str]:
        """Names of the parameters of the task head; a language model's head is not among them."""
        return {name for site in self.stem.get("head", []) for name in site.parameter_names}

    @property
    def size(self) -> int:
        """Number of the model's parameters, a task head included, without those that methods have added."""
        return sum(p.numel() for name, p in self.root.named_parameters() if not name.startswith("peft."))

    def norm_names(self) -> set[str]:
        """Names of all parameters of norms."""
        return {name for site in self.all_sites() if site.role in NORMS for name in site.parameter_names}


_CALLED = {
    "query": "q", "q_proj": "q", "key": "k", "k_proj": "k", "value": "v", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "proj": "o", "gate_proj": "mlp.gate", "up_proj": "mlp.up", "fc1": "mlp.up", "down_proj": "mlp.down",
    "fc2": "mlp.down", "query_key_value": "qkv", "c_attn": "qkv"}
"""What libraries call the modules that play a role."""


def check_roles(wanted: Iterable[str], known: Iterable[str], family: str, asker: str = "") -> None:
    """Refuse a role that is not among the ``known`` ones of a backbone."""
    known = list(known)
    for role in wanted:
        if role not in known:
            meant = _CALLED.get(role)
            hint = f" (did you mean {meant!r}? targets are roles)" if meant in known else nearest(role, known)
            raise ScionError(f"{asker}{': ' if asker else ''}target {role!r} matches nothing in {family}{hint}; its "
                             f"roles are {listed(known, 40)}")


def check_layers(layers: Sequence[int] | None, total: int, family: str, asker: str = "") -> set[int]:
    """Indices of the blocks that ``layers`` means, of ``total`` ones; None means all."""
    for layer in layers or ():
        if not -total <= layer < total:
            raise ScionError(f"{asker}{': ' if asker else ''}layer {layer} does not exist; {family} has the layers 0 "
                             f"to {total - 1}")
    return set(range(total)) if layers is None else {layer % total for layer in layers}


# ------------------------------------------------------------------------------------------------- descriptions

Where = str | tuple[str, Rows | str]
"""A module's path, or a path with the rows of its weight, or the name of its parameter, that are meant."""


@dataclass
class BlockDescription:
    """One block as a family describes it; the paths in ``roles`` are relative to ``path``.

    Args:
        path: the block's module.
        dim: width of its hidden state.
        heads: (query heads, key/value heads, head width); None without attention.
        roles: role -> path, or (path, Rows) for a part of a fused weight, or (path, name) for a parameter. ``block``
            is added.
        stage: name of the stage or stack, where there are several.
        pre_norm: whether the norms stand before the sublayers.
        while_active: role -> attributes (as paths from the block), and the values that they must have while a graft is
            active there.
        windows: whether its attention sees windows of a grid, not the whole sequence.
        per_token: further arguments of the block's forward that belong to its tokens, and what becomes of them when it
            is called on other tokens: ``none`` (masks, caches) is None then, ``last`` (positions) those of the last
            token.
        entry: path (from the backbone) of what stands between the block before and this one: a downsampling.
        widths: attributes (as paths from the block) that follow the width of a head, with the power: ``head_dim`` 1,
            a scale -0.5.
        leads: parts that a stack's first block has for those behind it, and the attributes that say so: path -> path.
        passes: what the block returns beside its hidden state for the next one: place in the output -> argument.
        memory: the argument that holds an encoder's final state.
        cache: the argument that holds keys and values of earlier tokens.
        rotary: the argument that holds cosines and sines as wide as a head, in two halves.
        repeats: how often a forward runs the block, where its weights serve several layers.
        grid: how its tokens lie, where they are a grid.
        causal: whether its tokens see only those before them.
    """

    path: str
    dim: int
    heads: tuple[int, int, int] | None
    roles: dict[str, Where]
    stage: str = ""
    pre_norm: bool = True
    while_active: dict[str, dict[str, Any]] = field(default_factory=dict)
    windows: bool = False
    per_token: dict[str, str] = field(default_factory=dict)
    entry: str = ""
    widths: dict[str, float] = field(default_factory=dict)
    leads: dict[str, str] = field(default_factory=dict)
    passes: dict[int, str] = field(default_factory=dict)
    memory: str = ""
    cache: str = ""
    rotary: str = ""
    repeats: int = 1
    grid: Grid | None = None
    causal: bool = False


@dataclass
class Description:
    """A whole backbone: its blocks, the roles outside them (a role may have several paths), and the path of the norm
    behind the last block (where the blocks' stages are stacks of their own, each stage's, in the order in which they
    run). Norms multiply by their weight plus ``norm_offset``. ``text`` is the path of the module that takes token ids
    as ``input_ids`` or their embeddings as ``inputs_embeds``, stage by stage like ``final``."""

    blocks: list[BlockDescription]
    stem: dict[str, str | list[str]] = field(default_factory=dict)
    final: str | dict[str, str] = ""
    norm_offset: float = 0.0
    text: str | dict[str, str] | None = None


Describer = Callable[[Any], Description]
FAMILIES: dict[str, Describer] = {}


def family(*class_names: str) -> Callable[[Describer], Describer]:
    """Register a description for classes named ``"module:Class"``; subclasses are covered by their MRO."""

    def register(function: Describer) -> Describer:
        for name in class_names:
            FAMILIES[name] = function
        return function

    return register


def _class_names(module: nn.Module) -> list[str]:
    return [f"{cls.__module__}:{cls.__qualname__}" for cls in type(module).__mro__]


def _describer(module: nn.Module) -> tuple[str, Describer] | None:
    from core import families  # noqa: F401  (they register themselves)

    for name in _class_names(module):
        if name in FAMILIES:
            return name.rpartition(":")[2], FAMILIES[name]
    return None


def _find(model: nn.Module) -> tuple[str, nn.Module]:
    """The described module nearest to the root: the model itself, or the one inside a wrapper."""
    level = [("", model)]
    while level:
        found = [(path, module) for path, module in level if _describer(module)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ScionError(f"{type(model).__name__} holds several backbones ({listed(path for path, _ in found)}): "
                             "give attach one of them, or name it with on=...")
        level = [(f"{path}.{name}".lstrip("."), child) for path, module in level
                 for name, child in module.named_children() if name != "peft"]
    known = sorted({name.rpartition(":")[2] for name in FAMILIES})
    inner = _unwrapped(model)
    around = "" if inner is model else f" (in {type(model).__name__})"
    raise ScionError(f"the anatomy of {type(inner).__name__}{around} is unknown (known: {listed(known, 40)}); "
                     f"describe it in a few lines with @core.anatomy.family({_class_names(inner)[0]!r}), see "
                     "docs/families.md")


def _unwrapped(model: nn.Module) -> nn.Module:
    """What a wrapper of one module is around: a library's model in a domain's backbone, or in the user's own module."""
    inner = model
    while True:
        children = [child for name, child in inner.named_children()
                    if name != "peft" and any(True for _ in child.parameters())]
        own = any(True for _ in inner.parameters(recurse=False))
        if len(children) != 1 or own or type(children[0]).__module__.startswith("torch.nn."):
            return inner
        inner = children[0]


_BESIDE = {"lm_head": "lm_head", "cls": "lm_head", "embed_out": "lm_head",
           "text_projection": "projection", "visual_projection": "projection"}
"""What stands beside a backbone in a library's own wrapper and comes pretrained with it: name -> role."""


def _around(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The wrappers around a backbone, with their paths, from the root inwards."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        place = ".".join(parts[:depth])
        yield place, model.get_submodule(place)


def _projection(around: Any, head: nn.Module) -> str:
    """Path, in a language-model head, of its map to the vocabulary, where the head holds more and its model says it."""
    output = around.get_output_embeddings() if hasattr(around, "get_output_embeddings") else None
    return next((name for name, module in head.named_modules() if module is output), "")


_INTERNAL = ("inputs", "entry")
"""Roles of sites that no method asks for by name."""


def _check(site: Site, family: str) -> None:
    """Refuse what a description says of a site, where the model shows that it cannot be so."""
    who = f"the description of {family} has"
    if site.role not in ROLES and site.role not in _INTERNAL:
        raise ScionError(f"{who} {site.name}, but there is no role {site.role!r}{nearest(site.role, ROLES)}; the roles "
                         "are listed in docs/families.md")
    if site.rows is not None:
        rows = site.rows.stop if site.rows.index is None else 1 + max(site.rows.index)
        whole = 0 if site.kind == "module" else site.full_weight.shape[site._out_axis]
        if rows > whole:
            raise ScionError(f"{who} {site.name} at row {rows - 1} of {site.path}, which has {whole} rows")
    if site.heads is not None and site.kind != "module" and site.role.rpartition(".")[2] in ("q", "k", "v"):
        heads = site.heads.query if site.role.endswith("q") else site.heads.key
        if site.out_features != heads * site.heads.width:
            raise ScionError(f"{who} {heads} heads of {site.heads.width} at {site.name}, but {site.path} gives "
                             f"{site.out_features} numbers, not {heads * site.heads.width}")


def dissect(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``: a described backbone, or a module that wraps exactly one.

    Raises:
        ScionError: no description fits the model or anything inside it.
    """
    path, backbone = _find(model)
    name, describer = _describer(backbone) or ("", None)
    assert describer is not None
    description = describer(backbone)
    modules = dict(model.named_modules(remove_duplicate=False))

    def join(*parts: str) -> str:
        return ".".join(part for part in parts if part)

    def site(site_name: str, role: str, *where: str, rows: Rows | None = None, **rest: Any) -> Site:
        full = join(*where)
        if full not in modules:
            raise ScionError(f"the description of {name} has {site_name} at {full!r}, where there is no module"
                             f"{nearest(full, modules)}")
        offset = description.norm_offset if role in NORMS else 0.0
        if role.rpartition(".")[2] in ("q", "k", "v", "qkv") and isinstance(modules[full], nn.MultiheadAttention):
            if not native.is_attention(modules[full]):
                raise ScionError(f"{full} ({type(modules[full]).__name__}) has maps of several widths, or keys of its "
                                 f"own: {site_name} cannot be adapted there")
            rest |= {"parameter": "in_proj_weight", "by_weight": True}
        rest["while_active"] = (*rest.get("while_active", ()), *native.settings(modules, full))
        found = Site(name=site_name, role=role, path=full, module=modules[full], rows=rows, offset=offset, **rest)
        _check(found, name)
        return found

    stem: dict[str, list[Site]] = {}
    for role, places in description.stem.items():
        places = [places] if isinstance(places, str) else places
        stem[role] = [site(role if len(places) == 1 else f"{role}.{i}", role, path, place)
                      for i, place in enumerate(places)]
    for place, around in _around(model, path):  # what stands beside the backbone in a wrapper is its head
        inside = path[len(place):].lstrip(".").partition(".")[0]
        for child_name, child in around.named_children():
            if child_name not in ("peft", inside) and any(True for _ in child.parameters()):
                role = _BESIDE.get(child_name, "head")
                inner = _projection(around, child) if role == "lm_head" else ""
                stem.setdefault(role, []).append(site(child_name, role, place, child_name, inner))
    stem["feature"] = [Site(name="feature", role="feature", path="", module=model)]

    def settings(block: BlockDescription, role: str) -> tuple[tuple[nn.Module, str, Any], ...]:
        found = block.while_active.get(role, {})
        owners = {attribute: modules.get(join(path, block.path, attribute.rpartition(".")[0])) for attribute in found}
        for attribute, owner in owners.items():
            if not hasattr(owner, attribute.rpartition(".")[2]):
                raise ScionError(f"the description of {name} sets {join(path, block.path, attribute)!r} while {role!r} "
                                 "is active, and there is no such attribute")
        return tuple((owner, attribute.rpartition(".")[2], value) for (attribute, value), owner
                     in zip(found.items(), owners.values(), strict=True) if owner is not None)

    blocks = []
    for index, block in enumerate(description.blocks):
        heads = Heads(*block.heads) if block.heads is not None else None
        sites = {"block": site(f"{index}.block", "block", path, block.path, block=index, width=block.dim)}
        for role, where in block.roles.items():
            place, part = where if isinstance(where, tuple) else (where, None)
            which: dict[str, Any] = {"parameter": part} if isinstance(part, str) else {"rows": part}
            sites[role] = site(f"{index}.{role}", role, path, block.path, place, block=index, heads=heads,
                               width=block.dim, while_active=settings(block, role), **which)
        sites["block"].per_token = block.per_token
        entry = site(f"{index}.entry", "entry", path, block.entry, width=block.dim) if block.entry else None
        blocks.append(Block(index=index, path=join(path, block.path), module=sites["block"].module, dim=block.dim,
                            stage=block.stage, pre_norm=block.pre_norm, sites=sites, described=block,
                            entry=entry))
        for own in sites.values():
            own.around = blocks[-1]
    finals = description.final if isinstance(description.final, dict) else {"": description.final}
    stacks = []
    for stack, place in finals.items():
        members = [block for block in blocks if not stack or block.stage == stack]
        final = site(join(stack, "final"), "norm", path, place, width=members[-1].dim) if place else None
        ids = description.text.get(stack) if isinstance(description.text, dict) else description.text
        name_of = join(stack, "inputs")
        stacks.append(Stack(stack, members, final, None if ids is None else site(name_of, "inputs", path, ids)))
    return Anatomy(root=model, family=name, blocks=blocks, stacks=stacks,
                   stem={role: found for role, found in stem.items() if found},
                   inputs=site("inputs", "inputs", path))


def parameter_sites(model: nn.Module, names: Iterable[str]) -> list[Site]:
    """A site for each of these parameters, of whatever modules, for methods that treat all parameters alike."""
    modules = dict(model.named_modules(remove_duplicate=False))
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in dict.fromkeys(modules.values()):
        for leaf, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((module, leaf))
    found = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        tied = tuple(other for other, its in holders[id(module.get_parameter(leaf))]
                     if other is not module and its == leaf)
        found.append(Site(name=name, role="parameter", path=path, module=module, parameter=leaf, tied=tied,
                          while_active=tuple(native.settings(modules, path))))
    return found


def linear_sites(anatomy: Anatomy) -> dict[str, Site]:
    """Sites with a weight that is a linear map, by name."""
    return {site.name: site for site in anatomy.all_sites() if site.kind != "module"}


def renamed(site: Site, **changes: Any) -> Site:
    """A copy of a site with other fields."""
    return replace(site, **changes)
