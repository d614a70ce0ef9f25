"""Words for the parts of a backbone, and how its weights and tokens are laid out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
    "attention.norm": "a norm of the attention sublayer's output, before the residual is added",
    "mlp.norm": "a norm of the MLP sublayer's output, before the residual is added",
    "q.norm": "a norm of each head's queries", "k.norm": "a norm of each head's keys",
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
    "lm_head": "a language-model head: methods act at its map to the vocabulary, `exclude` leaves out the whole",
    "projection": "map of a tower's feature into a space that towers share",
    "feature": "output of the whole module that methods are attached to",
}
"""Every role, with what plays it. A site in a block is named ``<block>.<role>``, any other ``<role>``. Where blocks
come in several stages or stacks, ``<stage>.<role>`` means the role in one of them (``decoder.cross.k``)."""

NORMS = ("norm", "norm1", "norm2", "cross.norm", "attention.norm", "mlp.norm", "q.norm", "k.norm")
"""The roles that are norms."""


@dataclass(frozen=True)
class Rows:
    """The output rows of a fused weight that belong to one role: contiguous (``start``, ``stop``) or any ``index``."""

    start: int = 0
    stop: int = 0
    index: tuple[int, ...] | None = None

    def indices(self) -> Sequence[int]:
        if self.index is not None:
            return self.index
        return range(self.start, self.stop)

    def __len__(self) -> int:
        return len(self.indices())

    def take(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """These rows of ``tensor`` along ``dim``; a view where they are contiguous."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        index = torch.tensor(self.index, device=tensor.device)
        return tensor.index_select(dim, index)

    def put(self, tensor: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
        """``tensor`` with these rows replaced, as a new tensor."""
        if self.index is None:
            return tensor.slice_scatter(rows, dim, self.start, self.stop)
        index = torch.tensor(self.index, device=tensor.device)
        return tensor.index_copy(dim, index, rows)


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
            no_tokens = x.flatten(1, 2)[:, :0]
            return no_tokens, x.movedim(-1, 1)
        height, width = self._size_of(x.shape[1])  # images need not have the size that the model was built for
        special = x[:, :self.special]
        patches = x[:, self.special:].transpose(1, 2)  # [batch, dim, height * width]
        return special, torch.unflatten(patches, 2, (height, width))

    def _size_of(self, tokens: int) -> tuple[int, int]:
        """Height and width of the map in so many tokens."""
        count = tokens - self.special
        if self.height * self.width == count:
            return self.height, self.width
        side = math.isqrt(count)
        if side * side != count:
            raise ScionError(f"{tokens} tokens are not {self.special} and a grid of {self.height} x {self.width}, "
                             "nor a square")
        return side, side

    @staticmethod
    def join(special: Tensor, grid: Tensor, like: Tensor) -> Tensor:
        """Undo of `split`, in the layout of ``like``; the special tokens and the map may have other channels."""
        if like.dim() == 4:
            return grid.movedim(1, -1)
        patches = grid.flatten(2).transpose(1, 2)  # [batch, height * width, dim]
        return torch.cat([special, patches], 1)


@dataclass(frozen=True)
class Heads:
    """Heads of the queries, heads of the keys and values (fewer under grouped queries), and a head's width."""

    query: int
    key: int
    width: int


_CALLED = {
    "query": "q", "q_proj": "q", "key": "k", "k_proj": "k", "value": "v", "v_proj": "v", "o_proj": "o", "out_proj": "o",
    "proj": "o", "gate_proj": "mlp.gate", "up_proj": "mlp.up", "fc1": "mlp.up", "down_proj": "mlp.down",
    "fc2": "mlp.down", "query_key_value": "qkv", "c_attn": "qkv"}
"""What libraries call the modules that play a role."""


def check_roles(wanted: Iterable[str], known: Iterable[str], family: str, asker: str = "") -> None:
    """Refuse a role that is not among the ``known`` ones of a backbone."""
    known = list(known)
    who = f"{asker}: " if asker else ""
    for role in wanted:
        if role in known:
            continue
        # Most strangers write the name of the module, as in peft's target_modules.
        meant = _CALLED.get(role)
        hint = f" (did you mean {meant!r}? targets are roles)" if meant in known else nearest(role, known)
        raise ScionError(f"{who}target {role!r} matches nothing in {family}{hint}; its roles are {listed(known, 40)}")


def check_layers(layers: Sequence[int] | None, total: int, family: str, asker: str = "") -> set[int]:
    """Indices of the blocks that ``layers`` means, of ``total`` ones; None means all."""
    if layers is None:
        return set(range(total))
    # Negative ones count from the end, as in a Python list.
    who = f"{asker}: " if asker else ""
    for layer in layers:
        if not -total <= layer < total:
            raise ScionError(f"{who}layer {layer} does not exist; {family} has the layers 0 to {total - 1}")
    return {layer % total for layer in layers}
