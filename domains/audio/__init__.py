"""Audio: the Audio Spectrogram Transformer and the benchmarks it is adapted to. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domains.audio.backbones import AST as AST
    from domains.audio.esc50 import ESC50 as ESC50

_WHERE = {"AST": "backbones", "ESC50": "esc50"}
__all__ = ["AST", "ESC50"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
