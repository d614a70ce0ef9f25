"""Vision: timm's models, and the benchmarks that they are adapted to. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from domains.vision.backbones import TimmBackbone as TimmBackbone
    from domains.vision.fgvc import FGVC as FGVC
    from domains.vision.folder import ImageFolder as ImageFolder
    from domains.vision.metric import MetricLearning as MetricLearning
    from domains.vision.vtab import VTAB1k as VTAB1k

_WHERE = {"FGVC": "fgvc", "ImageFolder": "folder", "MetricLearning": "metric", "TimmBackbone": "backbones",
          "VTAB1k": "vtab"}
__all__ = ["FGVC", "ImageFolder", "MetricLearning", "TimmBackbone", "VTAB1k"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
