"""Learned tokens put into frozen blocks and taken out again, by plain hooks: what the sheets say, in plain torch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import dissect

SPECIAL = {"timm_vit": 1, "vit": 1, "ast": 2, "clip_vision": 1, "timm_eva": 1}
"""Special tokens in front, behind which prompts stand."""


def longer_mask(mask: Tensor, tokens: int) -> Tensor:
    """Mask [batch, heads, queries, keys] with prompts in front: seen by all, and seeing no token behind them."""
    *rest, queries, keys = mask.shape
    among = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        wide = torch.zeros(*rest, tokens + queries, tokens + keys, dtype=torch.bool)
        wide[..., tokens:, :tokens], wide[..., :tokens, :tokens] = True, among
    else:
        wide = torch.full((*rest, tokens + queries, tokens + keys), torch.finfo(mask.dtype).min)
        wide[..., tokens:, :tokens] = 0
        wide[..., :tokens, :tokens] = wide[..., :tokens, :tokens].masked_fill(among, 0)
    wide[..., tokens:, tokens:] = mask
    return wide


def _unrotated(value: Any, tokens: int) -> Any:
    """Rotations (cosines, sines) [batch, tokens, width], or sines and cosines side by side [tokens, width], with
    prompts in front that nothing rotates."""
    if isinstance(value, tuple):
        cos, sin = value
        shape = (cos.shape[0], tokens, cos.shape[2])
        return torch.cat([torch.ones(shape), cos], 1), torch.cat([torch.zeros(shape), sin], 1)
    half = value.shape[-1] // 2
    own = torch.cat([torch.zeros(tokens, half), torch.ones(tokens, half)], 1)
    return torch.cat([own, value.reshape(-1, 2 * half)], 0).reshape(*value.shape[:-2], -1, 2 * half)


def insert(model: nn.Module, prompts: Sequence[Tensor], special: int = 0) -> None:
    """Prompts [tokens, dim] enter behind the ``special`` tokens: one set for each block, which takes its own out
    again, or a single set that enters at the first block and leaves behind the last."""
    blocks: list[nn.Module] = [block.module for block in dissect(model).blocks]
    deep, tokens = len(prompts) > 1, len(prompts[0])
    assert not deep or len(prompts) == len(blocks)

    def enter(index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            name = "hidden_states" if "hidden_states" in kwargs else "x"
            if deep or index == 0:
                x, own = kwargs[name], prompts[index]
                kwargs[name] = torch.cat([x[:, :special], own.expand(len(x), -1, -1), x[:, special:]], 1)
            for key in ("attention_mask", "attn_mask"):
                if kwargs.get(key) is not None:
                    kwargs[key] = longer_mask(kwargs[key], tokens)
            for key in ("position_embeddings", "rope"):
                if kwargs.get(key) is not None:
                    kwargs[key] = _unrotated(kwargs[key], tokens)
            return (), kwargs
        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        y = torch.cat([y[:, :special], y[:, special + tokens:]], 1)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(enter(index), with_kwargs=True)
        if deep or block is blocks[-1]:
            block.register_forward_hook(leave)


def gate_attention(prefixes: Sequence[Tensor], calls: list[Tensor]) -> Any:
    """A stand-in for torch's attention call: (1 - l) softmax(q K) V + l softmax(q P_k) P_v, with l the share of the
    exponentials that the prefix has; the calls take ``prefixes`` [tokens, 2, key heads, width] (or [batch, ...]) in
    turn, and leave their l in ``calls``."""

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        prefix = prefixes[len(calls)]
        prefix = prefix if prefix.dim() == 5 else prefix[None]
        P_k, P_v = prefix[:, :, 0].transpose(1, 2), prefix[:, :, 1].transpose(1, 2)  # [batch, heads, tokens, width]
        P_k, P_v, k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (P_k, P_v, k, v))
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores, own = q @ k.transpose(2, 3), q @ P_k.transpose(2, 3)
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = (scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool
                      else scores + attn_mask)
        share = torch.sigmoid(own.logsumexp(-1, keepdim=True) - scores.logsumexp(-1, keepdim=True))
        calls.append(share)
        return (1 - share) * (scores.softmax(-1) @ v) + share * (own.softmax(-1) @ P_v)

    return attention
