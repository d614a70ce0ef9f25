"""How a model of transformers is asked: its arguments, its final states, and its own head at a few positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from core.errors import ScionError, listed

Inputs = Mapping[str, Tensor]
"""``input_ids`` and ``attention_mask`` [batch, tokens], and what else a model takes."""


def is_accepted(model: nn.Module, argument: str) -> bool:
    """Whether a model's forward takes an argument of that name."""
    return argument in inspect.signature(model.forward).parameters


def check_inputs(inputs: Any, who: str, positions: int | None) -> None:
    """Refuse what is no batch of ids, or has more tokens than the model has positions.

    Raises:
        ScionError: says what came and what is wanted.
    """
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        came = f"a mapping of {listed(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ScionError(f"backbone {who} wants a mapping with input_ids [batch, tokens] and attention_mask, got "
                         f"{came}")
    ids = inputs["input_ids"]
    if ids.dim() != 2:
        raise ScionError(f"backbone {who} wants input_ids [batch, tokens], got {list(ids.shape)}")
    if positions is not None and ids.shape[1] > positions:
        raise ScionError(f"backbone {who}: {ids.shape[1]} tokens, and the model has {positions} positions; set "
                         "max_length to at most that")


def mask_of(inputs: Inputs) -> Tensor:
    """The mask of a batch, 1 at the samples' own tokens; a batch without one has no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def arguments_of(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of a model's forward for a batch. The mask is always among them: without one, padding would be
    read as text. Only where there are no values at all, and costs are counted, the batch is one without padding:
    transformers looks into the mask to see whether there is any, unless attention is written out."""
    arguments: dict[str, Any] = {"input_ids": inputs["input_ids"]}
    mask = mask_of(inputs)
    looks_into = getattr(model.config, "_attn_implementation", None) != "eager"
    arguments["attention_mask"] = None if mask.is_meta and looks_into else mask
    if "position_ids" in inputs and is_accepted(model, "position_ids"):
        arguments["position_ids"] = inputs["position_ids"]
    if "token_type_ids" in inputs and knows_types(model):
        arguments["token_type_ids"] = inputs["token_type_ids"]
    return arguments


def knows_types(model: nn.Module) -> bool:
    """Whether a model tells the first of two texts from the second. GPT-2 takes such an argument too, and embeds it as
    if it were words; RoBERTa has but one type."""
    config: Any = model.config
    return getattr(config, "type_vocab_size", 0) > 1 and is_accepted(model, "token_type_ids")


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token among those of its own sample, whichever side is padded: mask [batch, tokens] ->
    [batch, tokens]."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def last_positions(mask: Tensor) -> Tensor:
    """Where the last token of each sample stands: mask [batch, tokens] -> [batch]."""
    numbers = torch.arange(mask.shape[1], device=mask.device)
    return (mask.long() * numbers).amax(dim=1)


def rows_of(where: Tensor, shape: torch.Size) -> Tensor:
    """The numbers of the chosen positions [labels], counted through the whole batch.

    Args:
        where: boolean [batch, tokens]; or these numbers themselves, int64 [labels], where their count must be known
            without looking into a mask (on the meta device).
        shape: (batch, tokens) of the final states.

    Raises:
        ScionError: it is neither, or a mask of another shape.
    """
    if where.dtype == torch.int64 and where.dim() == 1:
        return where
    if where.dtype != torch.bool or where.shape != shape[:2]:
        raise ScionError(f"logits want a boolean mask {list(shape[:2])}, got {where.dtype} {list(where.shape)}")
    return where.flatten().nonzero().squeeze(1)


class FinalStates:
    """Stands behind a body: keeps its final states, and hands on to the head only some of them."""

    def __init__(self, where: Tensor | None) -> None:
        self.where = where
        """The positions that the head shall see (`rows_of`); None for none at all."""
        self.states: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        is_tuple = isinstance(output, tuple)
        states: Tensor = output[0] if is_tuple else output.last_hidden_state
        self.states = states
        chosen = self._chosen(states)[None]  # a batch of one, whose tokens are the chosen positions of all samples
        if is_tuple:
            return (chosen, *output[1:])
        output["last_hidden_state"] = chosen
        return output

    def _chosen(self, states: Tensor) -> Tensor:
        flat = states.flatten(0, 1)
        if self.where is None:
            return flat[:0]
        rows = rows_of(self.where, states.shape)
        return flat.index_select(0, rows.to(flat.device))


@contextmanager
def choosing(body: nn.Module, where: Tensor | None) -> Iterator[FinalStates]:
    """Within this context a model's head gets the states of its ``body`` at the positions ``where`` only.

    So the head is the model's own, with whatever it does (a transform, a cap, a scale), and the matrix of all
    positions by all pieces is never made. The hook is the last one: what methods do to the final state comes before.
    """
    final = FinalStates(where)
    handle = body.register_forward_hook(final)
    try:
        yield final
    finally:
        handle.remove()


def pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector a sample: states [batch, tokens, dim], mask [batch, tokens] -> [batch, dim].

    Args:
        states: final states.
        mask: 1 at the samples' own tokens.
        pooling: ``cls`` for the first token, ``mean`` for the mean over all.
    """
    if pooling == "cls":
        first = mask.long().argmax(dim=1)
        return states[torch.arange(len(states), device=states.device), first]
    weights = mask.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
