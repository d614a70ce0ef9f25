"""A quicker way to import Lightning, for the command alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

SLOW = ("torchvision", "transformers", "scipy")
"""Packages that torchmetrics imports when it finds them, for metrics that the command does not use: about two thirds of
the time that ``import lightning.pytorch`` takes where they are installed."""


@contextlib.contextmanager
def quick_lightning() -> Iterator[None]:
    """Within this context torchmetrics does not find its slow optional packages; everybody else does."""
    from lightning_utilities.core import imports

    cached, available = imports.RequirementCache.__bool__, imports.package_available

    def is_slow(name: str) -> bool:
        return name.partition(">")[0].partition("=")[0].strip() in SLOW

    def answer(self: Any) -> bool:
        return not is_slow(self.requirement or "") and cached(self)

    imports.RequirementCache.__bool__ = answer  # type: ignore[method-assign]
    imports.package_available = lambda name: not is_slow(name) and available(name)
    try:
        yield
    finally:
        imports.RequirementCache.__bool__ = cached  # type: ignore[method-assign]
        imports.package_available = available
