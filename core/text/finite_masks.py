"""Masks that stay finite where a model computes its softmax in single precision, whatever the type of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("bloom",)
"""transformers' names of such models."""


def keep_masks_finite(model: Any) -> None:
    """Let a model in double precision read padded batches.

    BLOOM adds the mask's least number of double precision to its scores and takes their softmax in single precision,
    in which that number is minus infinity: the row of a padding token, which sees nothing, becomes NaN, and all who
    multiply it by 0 do too. The least number of single precision hides as well. Nothing changes in other types.
    """
    if model.config.model_type not in KINDS:
        return
    for block in model.base_model.h:
        block.register_forward_pre_hook(_clamp, with_kwargs=True)


def _clamp(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dtype != torch.float64:
        return None
    return args, {**kwargs, "attention_mask": mask.clamp(min=torch.finfo(torch.float32).min)}
