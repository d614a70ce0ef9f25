"""Activation checkpointing that recomputes a block with its grafts as they were in the forward.

What goes wrong without that: a batch is routed, half of its rows to one adapter and half to another; the routing ends
with the ``with`` around the forward; backward then recomputes the block, with no rows routed, and gets gradients of
another function than the one that made the loss.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.anatomy import dissect
from core.graft.hooks import SiteHooks
from core.graft.rewrite import CallRewriter


def checkpoint_activations(model: nn.Module, on: bool = True) -> None:
    """Switch activation checkpointing of a backbone's blocks on or off. Only this switch keeps grafts exact: a
    library's own may recompute a block without the state of its forward."""
    for block in dissect(model).blocks:
        if on:
            block.module.__dict__["forward"] = _CheckpointedForward(block.module)
        else:
            block.module.__dict__.pop("forward", None)


class _CheckpointedForward:
    """A block's forward under non-reentrant activation checkpointing; the block's hooks stay outside."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, *args, **kwargs)
        if torch.compiler.is_compiling():  # the compiler recomputes what it has traced
            return checkpoint(forward, self.block, *args, use_reentrant=False, **kwargs)
        state = _StateAtForward(self.block)
        return checkpoint(forward, self.block, *args, use_reentrant=False,
                          context_fn=lambda: (contextlib.nullcontext(), state), **kwargs)


class _StateAtForward:
    """What a block's grafts were set to at a forward, as a context in which the block is recomputed: by then they may
    be switched, routed or weighed otherwise. What the block's own hooks rewrite in it is rewritten again."""

    def __init__(self, block: nn.Module) -> None:
        own = SiteHooks.of(block)
        self.rewriters = [rewriter.copy() for rewriter in own.open[-1:]] if own is not None else []
        self.again: list[CallRewriter] = []
        self.grafts = []
        for module in block.modules():
            hooks = SiteHooks.of(module)
            if hooks is not None:
                self.grafts += hooks.grafts
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
        self.again = [rewriter.copy() for rewriter in self.rewriters]
        for rewriter in self.again:
            rewriter.__enter__()

    def __exit__(self, *error: object) -> None:
        for rewriter in reversed(self.again):
            rewriter.__exit__(None, None, None)
        self._write(self.meanwhile)
        self._count_batches(True)

    def _count_batches(self, on: bool) -> None:
        """Let batch norms of grafts see the recomputed batch without counting it again."""
        for norm, momentum in self.norms:
            norm.momentum = momentum if on else 0.0
