"""torch's own attention and transformer layers, which do not call their parts, and attention written out.

``nn.MultiheadAttention`` never calls its output projection, keeps the maps of queries, keys and values in one
parameter, and ``nn.TransformerEncoderLayer`` computes all of itself in one kernel where nothing needs a gradient.
While a graft is active inside such a module, the module takes the way that calls its parts; without one nothing is
changed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from core.anatomy.description import READERS, class_names

Setting = tuple[nn.Module, str, Any]
"""A module, the name of an attribute, and the value that it must have while a graft is active."""


def settings(modules: Mapping[str, nn.Module], path: str) -> list[Setting]:
    """What must be so for the module at ``path`` to be called by the modules around it."""
    found: list[Setting] = []
    for outer_path in _paths_towards(path):
        module = modules[outer_path]
        if is_attention(module):
            forward = functools.partial(attention_forward, module)  # type: ignore[arg-type]
            found.append((module, "forward", forward))
        elif isinstance(module, nn.TransformerEncoderLayer):
            found.append((module, "activation_relu_or_gelu", 0))  # the fused kernel knows only these two activations
        elif isinstance(module, nn.TransformerEncoder):
            found.append((module, "use_nested_tensor", False))  # nested tensors go through the fused kernel only
        for class_name in class_names(module):
            child, attributes = READERS.get(class_name, ("", None))
            if attributes is not None and path == f"{outer_path}.{child}".lstrip("."):
                found += [(module, name, value) for name, value in attributes(module).items()]
    return found


def _paths_towards(path: str) -> Iterator[str]:
    """The paths of a module and of all around it, from the root inwards."""
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        yield ".".join(parts[:depth])


def is_attention(module: nn.Module) -> bool:
    """Whether this is torch's attention in its plain form: one map for queries, keys and values, and nothing beside the
    keys that it is given."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    if type(module).forward is not nn.MultiheadAttention.forward:
        return False  # a subclass that computes something else
    return module.in_proj_weight is not None and module.bias_k is None and not module.add_zero_attn


def attention_forward(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
                      key_padding_mask: Tensor | None = None, need_weights: bool = True,
                      attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False
                      ) -> tuple[Tensor, Tensor | None]:
    """``nn.MultiheadAttention.forward``, which calls `F.linear` on the fused map, torch's attention call, and the
    output projection. Shapes and masks are those of torch."""
    batched = query.dim() == 3
    q, k, v = _projections(attention, query, key, value)
    if key_padding_mask is not None and not batched:
        key_padding_mask = key_padding_mask[None]
    mask = _mask(attn_mask, key_padding_mask, q, k, is_causal)
    dropout = attention.dropout if attention.training else 0.0
    weights = None
    if need_weights:
        weights = _weights(q, k, mask, dropout)
        out = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    joined = out.transpose(1, 2).flatten(2)  # [batch, tokens, heads * width]
    out = attention.out_proj(joined)
    if batched:
        return out if attention.batch_first else out.transpose(0, 1), weights
    return out[0], None if weights is None else weights[0]


def _projections(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values, each [batch, heads, tokens, width]."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    dim = attention.embed_dim
    batched = query.dim() == 3
    states = [_batch_first(one, batched, attention.batch_first) for one in (query, key, value)]
    if key is query and value is query:
        # As torch does: one product where all three read the same states.
        parts = list(F.linear(states[0], weight, bias).chunk(3, -1))
    else:
        parts = []
        for i, one in enumerate(states):
            rows = slice(i * dim, (i + 1) * dim)
            part_bias = None if bias is None else bias[rows]
            parts.append(F.linear(one, weight[rows], part_bias))
    heads = attention.num_heads
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """The weights [batch, heads, queries, keys], written out where the caller asks to see them."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    return F.dropout(torch.softmax(scores, -1), dropout)


def _batch_first(states: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """States as [batch, tokens, dim]."""
    if not batched:
        return states[None]
    return states if batch_first else states.transpose(0, 1)


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, is_causal: bool) -> Tensor | None:
    """What is added to the scores [batch or 1, heads or 1, queries or 1, keys]: both masks, in which True hides."""
    if is_causal and attn_mask is None:
        everything = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
        attn_mask = everything.triu(1)
    found = None
    if attn_mask is not None:
        found = _as_summand(attn_mask, q)
        if found.dim() == 2:
            found = found[None, None]
        else:  # torch takes three axes as [batch * heads, queries, keys]
            found = torch.unflatten(found, 0, (-1, q.shape[1]))
    if padding is not None:
        hidden = _as_summand(padding, q)[:, None, None]
        found = hidden if found is None else found + hidden
    return found


def _as_summand(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as a summand of the scores: minus infinity where it is True."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)  # it is a summand already
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill_(mask, float("-inf"))


def written_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
                      dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
                      enable_gqa: bool = False) -> Tensor:
    """What torch's attention call computes, as libraries write it out: equal to them to the bit, and a call that can be
    rewritten all the same.

    Args:
        query: [batch, heads, queries, width].
        key: [batch, heads, keys, width].
        value: [batch, heads, keys, width].
        attn_mask: added to the scores; the arguments behind ``dropout_p`` are torch's and not made use of.
    """
    if torch.compiler.is_compiling():  # a compiler's tracing knows only torch's own calls as calls
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, scale=scale)
    given = (query, key, value)
    if has_torch_function(given):  # a rewriter is active
        return handle_torch_function(written_attention, given, *given, attn_mask=attn_mask, dropout_p=dropout_p)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        scores = scores + attn_mask
    weights = F.dropout(scores.softmax(-1), dropout_p)
    return weights @ value


ATTENTION_CALLS = (F.scaled_dot_product_attention, written_attention)
"""The calls that the verb ``attend`` rewrites."""
