"""The hidden state in and out of a module's call, and the rows of a batch among its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import ScionError


def hidden_in(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a module's arguments: the first positional one, or ``hidden_states``."""
    return args[0] if args else kwargs[hidden_name(kwargs)]


def hidden_name(kwargs: dict[str, Any]) -> str:
    """The name of the hidden state among named arguments."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))


def with_hidden_in(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    """A module's arguments with another hidden state."""
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


def with_hidden_out(output: Any, y: Tensor) -> Any:
    """A module's output with another hidden state."""
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
        arguments = {name: take_rows(value, rows, total) for name, value in self.arguments.items()}
        return Call(arguments, self.hidden, self.output[rows])


def take_rows(value: Any, rows: Tensor, total: int) -> Any:
    """The ``rows`` of an argument that has an entry for each of ``total`` rows; any other as it is."""
    if isinstance(value, (tuple, list)):
        return type(value)(take_rows(part, rows, total) for part in value)
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == total
    return value[rows] if has_rows else value


def rows_of_samples(rows: Tensor | None, total: int, route: Tensor | None) -> Tensor:
    """Indices of samples -> indices along an axis on which each sample stands ``total / samples`` times (windows,
    beams), sample by sample."""
    assert rows is not None
    samples = total if route is None else route.numel()
    times = total // samples
    if times * samples != total:
        raise ScionError(f"routing: {samples} samples are routed, but {total} rows arrive, which is no multiple")
    return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
