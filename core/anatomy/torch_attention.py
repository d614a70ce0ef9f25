"""torch's own attention and transformer layers, which reach their parts without calling them.

``nn.MultiheadAttention`` never calls its output projection, keeps the maps of queries, keys and values in one
parameter, and ``nn.TransformerEncoderLayer`` computes all of itself in one kernel where nothing needs a gradient.
While a graft is active inside such a module, the module takes the way that calls its parts; without one nothing is
changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Setting = tuple[nn.Module, str, Any]
"""A module, the name of an attribute, and the value that it must have while a graft is active."""


def settings(modules: Mapping[str, nn.Module], path: str) -> list[Setting]:
    """What must be so for the module at ``path`` to be called by the modules around it."""
    found: list[Setting] = []
    for place in _places(path):
        module = modules[place]
        if is_attention(module):
            found.append((module, "forward", functools.partial(attention_forward, module)))  # type: ignore[arg-type]
        elif isinstance(module, nn.TransformerEncoderLayer):
            found.append((module, "activation_relu_or_gelu", 0))
        elif isinstance(module, nn.TransformerEncoder):
            found.append((module, "use_nested_tensor", False))
    return found


def _places(path: str) -> Iterator[str]:
    """The paths of a module and of all around it, from the root inwards."""
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        yield ".".join(parts[:depth])


def is_attention(module: nn.Module) -> bool:
    """Whether this is torch's attention in its plain form: one map for queries, keys and values, and nothing beside the
    keys that it is given."""
    if not isinstance(module, nn.MultiheadAttention) or type(module).forward is not nn.MultiheadAttention.forward:
        return False
    return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn


def attention_forward(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
                      key_padding_mask: Tensor | None = None, need_weights: bool = True,
                      attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False
                      ) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward``, which calls `F.linear` on the fused map, torch's attention call, and the
    output projection. Shapes and masks are those of torch."""
    batched, heads = query.dim() == 3, attention.num_heads
    x, memory, values = (_lined(states, batched, attention.batch_first) for states in (query, key, value))
    weight, bias, dim = attention.in_proj_weight, attention.in_proj_bias, attention.embed_dim
    if key is query and value is query:
        parts = F.linear(x, weight, bias).chunk(3, -1)
    else:
        ends = (slice(0, dim), slice(dim, 2 * dim), slice(2 * dim, 3 * dim))
        parts = tuple(F.linear(states, weight[rows], None if bias is None else bias[rows])
                      for states, rows in zip((x, memory, values), ends, strict=True))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)  # [batch, heads, tokens, width]
    mask = _mask(attn_mask, key_padding_mask if batched or key_padding_mask is None else key_padding_mask[None], q, k,
                 is_causal)
    dropout = attention.dropout if attention.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = attention.out_proj(out.transpose(1, 2).flatten(2))
    if not batched:
        return out[0], None if weights is None else weights[0]
    return out if attention.batch_first else out.transpose(0, 1), weights


def _lined(states: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """States as [batch, tokens, dim]."""
    if not batched:
        return states[None]
    return states if batch_first else states.transpose(0, 1)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
    """What is added to the scores [batch or 1, heads or 1, queries or 1, keys]: both masks, in which True hides."""
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    found = None
    if attn_mask is not None:
        found = _added(attn_mask, q)
        found = found[None, None] if found.dim() == 2 else torch.unflatten(found, 0, (-1, q.shape[1]))
    if padding is not None:
        hidden = _added(padding, q)[:, None, None]
        found = hidden if found is None else found + hidden
    return found


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(mask, float("-inf"))
