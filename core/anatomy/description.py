"""How a family of models is described; a family's file needs nothing but this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from core.anatomy.layout import Grid, Rows

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
        entry: path (from the backbone) of what is between the block before and this one: a downsampling.
        widths: attributes (as paths from the block) that follow the width of a head, with the power: ``head_dim`` 1,
            a scale -0.5.
        tables: buffers (as paths from the block) with sines of rotary positions and then their cosines, a column for
            each frequency: [positions, 2 x frequencies].
        leads: parts that a stack's first block has for those behind it, and the attributes that say so: path -> path.
        passes: what the block returns beside its hidden state for the next one: place in the output -> argument.
        memory: the argument that holds an encoder's final state.
        cache: the argument that holds keys and values of earlier tokens.
        rotary: the argument that holds cosines and sines as wide as a head, in two halves.
        repeats: how often a forward runs the block, where its weights serve several layers.
        grid: how its tokens lie, where they are a grid.
        causal: whether its tokens see only those before them.
        flat: the sublayers (``attention``, ``mlp``) that get the tokens of all samples in one row: [batch * tokens,
            dim].
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
    tables: tuple[str, ...] = ()
    leads: dict[str, str] = field(default_factory=dict)
    passes: dict[int, str] = field(default_factory=dict)
    memory: str = ""
    cache: str = ""
    rotary: str = ""
    repeats: int = 1
    grid: Grid | None = None
    causal: bool = False
    flat: tuple[str, ...] = ()


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


# By the name of a class and not by the class, so that no model library is imported for its description.
Describer = Callable[[Any], Description]
FAMILIES: dict[str, Describer] = {}


def family(*class_names: str) -> Callable[[Describer], Describer]:
    """Register a description for classes named ``"module:Class"``; subclasses are covered by their MRO."""

    def register(function: Describer) -> Describer:
        for name in class_names:  # a later description of the same class replaces the earlier one
            FAMILIES[name] = function
        return function

    return register


LANGUAGE_HEADS: dict[str, tuple[str, ...]] = {}


def language_head(class_name: str, *children: str) -> None:
    """Say which children of the language model ``"module:Class"`` are its pretrained head, where that has several: they
    are no task head. The map to the vocabulary is found without this (``get_output_embeddings``)."""
    LANGUAGE_HEADS[class_name] = children


Attributes = Callable[[Any], dict[str, Any]]
READERS: dict[str, tuple[str, Attributes]] = {}


def reads_parameter(class_name: str, child: str, attributes: Attributes) -> None:
    """Say that a module ``"module:Class"`` reads the parameter of a child without calling the child, so that a graft
    there would do nothing, and which attributes it must have to call it instead."""
    READERS[class_name] = (child, attributes)


def class_names(module: nn.Module) -> list[str]:
    """The names under which a description of this module can be registered, the most special one first."""
    return [f"{cls.__module__}:{cls.__qualname__}" for cls in type(module).__mro__]
