"""Thinner copies of blocks, for side networks that are cut out of the backbone itself."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Block, Site
from core.errors import ScionError

Keep = Mapping[str, tuple[Tensor, Tensor | None]]
"""For a role: the output rows of its weight and the input columns that a thinner copy keeps (of a norm: its channels).
``block`` stands for what leaves the block."""


def narrow(block: Block, ratio: int, keep: Keep, leader: Block | None = None, number: int = 0) -> nn.Module:
    """A copy of ``block`` with 1 / ``ratio`` of its width and all its heads, each 1 / ``ratio`` as wide.

    Args:
        block: the block; it stays as it is.
        ratio: divides the block's width, the width of its heads and of its MLP.
        keep: what is kept of each linear map and norm.
        leader: first block of the stack, where the copy is to have what that one has for all.
        number: the copy's place in a cache of keys and values.
    """
    copied = bare_copy(block.module)
    if leader is not None:
        _lend(leader, copied)
    cut = _cut(block, copied, keep)
    _check_rest(block, copied, keep, cut)
    for module in copied.modules():
        for name in ("layer_idx", "layer_id"):
            if hasattr(module, name):
                setattr(module, name, number)
    _set_widths(block, copied, ratio)
    return copied.requires_grad_(True)


def _lend(leader: Block, copied: nn.Module) -> None:
    """Give ``copied`` copies of what the stack's first block has for all, and tell it so."""
    for path, flag in leader.described.leads.items():
        copied.set_submodule(path, bare_copy(leader.module.get_submodule(path)))
        owner, _, name = flag.rpartition(".")
        setattr(copied.get_submodule(owner), name, True)


def _cut(block: Block, copied: nn.Module, keep: Keep) -> set[int]:
    """Cut the maps and norms that ``keep`` names; returns the ids of the modules that are done."""
    by_path: dict[str, list[Site]] = {}
    for role in keep:
        site = block.sites[role]
        by_path.setdefault(site.path.removeprefix(block.path).lstrip("."), []).append(site)
    by_path.pop("", None)  # the block itself
    done: set[int] = set()
    for path, sites in by_path.items():
        module = copied.get_submodule(path)
        slice_parameters(module, _kept_rows(sites, keep), keep[sites[0].role][1])
        done |= {id(part) for part in module.modules()}
    return done


def _kept_rows(sites: list[Site], keep: Keep) -> Tensor:
    """The output rows that stay of one module, whose sites may be the parts of a fused weight."""
    rows, places = [], []
    for site in sites:
        own = keep[site.role][0]
        if site.rows is None:
            return own
        whole = _indices(site)
        rows.append(whole[own])
        # The thin weight is laid out as the whole one: parts one after the other, or head by head.
        ratio = len(whole) // len(own)
        places.append(whole[::ratio])
    return torch.cat(rows)[torch.cat(places).argsort()]


def _check_rest(block: Block, copied: nn.Module, keep: Keep, done: set[int]) -> None:
    """Cut vectors of the block's width that no role names (layer scales), and refuse what else has that width.

    Raises:
        ScionError: names the parameter.
    """
    heads = block.sites["q"].heads
    assert heads is not None
    for path, module in copied.named_modules():
        if id(module) in done:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.shape == (block.dim,):
                slice_parameters(module, keep["block"][0])
            elif parameter.shape[-1] == block.dim or parameter.shape == (heads.width,):
                raise ScionError(f"{block.path}.{path}.{name}: it is unknown how a thinner copy of this is made")


def _set_widths(block: Block, copied: nn.Module, ratio: int) -> None:
    """Set what follows the width of a head: widths are divided, a scale is raised to its power, of a table of rotary
    positions some columns stay."""
    for path, power in block.described.widths.items():
        owner, _, name = path.rpartition(".")
        module = copied.get_submodule(owner)
        value = getattr(module, name)
        setattr(module, name, value // ratio if isinstance(value, int) else value * ratio ** -power)
    for path in block.described.tables:
        owner, _, name = path.rpartition(".")
        module = copied.get_submodule(owner)
        # Every ratio-th frequency, of the sines as of the cosines: those of a model with heads of this width.
        setattr(module, name, getattr(module, name)[:, ::ratio].clone())


def narrow_entry(block: Block, before: Tensor, after: Tensor, dim: int) -> nn.Module:
    """A copy of the downsampling in front of ``block`` that reads the channels ``before`` of ``dim`` (of each of the
    places that it merges) and gives the channels ``after``."""
    assert block.entry is not None
    copied = bare_copy(block.entry.module)
    for module in copied.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear):
            slice_parameters(module, after, spread(before, dim, module.in_features))
        elif weight is not None:
            slice_parameters(module, spread(before, dim, weight.shape[0]))
    return copied.requires_grad_(True)


def spread(index: Tensor, dim: int, size: int) -> Tensor:
    """``index`` into ``dim`` channels, repeated for each of the ``size / dim`` places that were put side by side."""
    return torch.cat([index + place * dim for place in range(size // dim)])


def slice_parameters(module: nn.Module, rows: Tensor, columns: Tensor | None = None) -> None:
    """Leave a linear map or a norm with these rows of its parameters, and these columns of its weight."""
    transposed = hasattr(module, "nf")  # transformers' Conv1D, with a weight [in, out]
    for name, parameter in list(module.named_parameters()):
        kept = parameter.detach()
        kept = kept.index_select(1 if transposed and kept.dim() > 1 else 0, rows)
        if columns is not None and kept.dim() > 1:
            kept = kept.index_select(0 if transposed else 1, columns)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(kept.clone()))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif transposed:
        module.nx, module.nf = module.weight.shape  # type: ignore[union-attr, misc]
    elif hasattr(module, "normalized_shape"):
        module.normalized_shape = (len(rows),)  # type: ignore[assignment]


def _indices(site: Site) -> Tensor:
    """Rows of the module's weight that are the site's."""
    assert site.rows is not None
    return torch.tensor(site.rows.indices(), device=site.full_weight.device)


def bare_copy(module: nn.Module) -> nn.Module:
    """A deep copy without hooks and without what stands in for ``forward``; configurations stay shared."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs",
                     "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
            memo[id(getattr(part, name))] = OrderedDict()
        for name in ("config", "forward"):
            shared = part.__dict__.get(name)
            if shared is not None:
                memo[id(shared)] = shared
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        part.__dict__.pop("forward", None)
    return copied


def set_dropout(module: nn.Module, rate: float) -> None:
    """Every dropout in ``module``, also those that libraries hold as a number."""
    for part in module.modules():
        for name in ("p", "drop_prob", "dropout", "attention_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, rate)
