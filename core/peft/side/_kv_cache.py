"""Room for more layers in a model's own cache of keys and values, so that what is generated follows them too."""

from __future__ import annotations

from typing import Any

from core.errors import ScionError


def make_room(cache: Any, layers: int, asker: str) -> None:
    """Let ``cache`` (and both halves of an encoder-decoder's) hold at least ``layers`` layers.

    The cache moves what is added along with its own layers: beams, crops and repetitions reach them.

    Raises:
        ScionError: a cache of a fixed size.
    """
    halves = ("self_attention_cache", "cross_attention_cache")
    for half in [getattr(cache, name) for name in halves if hasattr(cache, name)] or [cache]:
        while len(half.layers) < layers:
            kind = type(half.layers[0]) if half.layers else half.layer_class_to_replicate
            if getattr(kind, "__name__", "") != "DynamicLayer":
                raise ScionError(f"{asker} keeps keys and values of its own in the model's cache, so that must be a "
                                 f"DynamicCache; this one has {getattr(kind, '__name__', kind)}")
            half.layers.append(kind())
