"""Audio: the Audio Spectrogram Transformer and the benchmarks it is adapted to. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domains.audio.backbones import AST as AST
    from domains.audio.esc50 import ESC50 as ESC50
    from domains.audio.fluent_speech_commands import FluentSpeechCommands as FluentSpeechCommands
    from domains.audio.folder import AudioFolder as AudioFolder
    from domains.audio.speech_commands import SpeechCommands as SpeechCommands
    from domains.audio.urbansound8k import UrbanSound8K as UrbanSound8K

_WHERE = {"AST": "backbones", "AudioFolder": "folder", "ESC50": "esc50",
          "FluentSpeechCommands": "fluent_speech_commands", "SpeechCommands": "speech_commands",
          "UrbanSound8K": "urbansound8k"}
__all__ = ["AST", "AudioFolder", "ESC50", "FluentSpeechCommands", "SpeechCommands", "UrbanSound8K"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
