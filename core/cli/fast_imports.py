"""A quicker way to import Lightning, for the command alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

SLOW = ("torchvision", "transformers", "scipy", "matplotlib")
"""Packages that torchmetrics imports when it finds them, for metrics that the command does not use: about two thirds of
the time that ``import lightning.pytorch`` takes where they are installed."""

COMPILER = "torch._dynamo"
"""Lightning imports the compiler to recognise compiled modules and to keep its logging out of their graphs; the command
compiles nothing. It costs as much as all the rest of Lightning, and is imported as ever by whoever needs it later."""


@contextlib.contextmanager
def quick_lightning() -> Iterator[None]:
    """Within this context torchmetrics does not find its slow optional packages, and Lightning not the compiler."""
    import sys
    import types

    import torch
    from lightning_utilities.core import imports

    cached, available = imports.RequirementCache.__bool__, imports.package_available

    def is_slow(name: str) -> bool:
        return name.partition(">")[0].partition("=")[0].strip() in SLOW

    def answer(self: Any) -> bool:
        return not is_slow(self.requirement or "") and cached(self)

    imports.RequirementCache.__bool__ = answer  # type: ignore[method-assign]
    imports.package_available = lambda name: not is_slow(name) and available(name)
    compiler = types.ModuleType(COMPILER)
    compiler.OptimizedModule = type("OptimizedModule", (), {})  # type: ignore[attr-defined]
    compiler.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
    stands_in = COMPILER not in sys.modules
    if stands_in:
        sys.modules[COMPILER] = compiler
    try:
        yield
    finally:
        if stands_in and sys.modules.get(COMPILER) is compiler:
            del sys.modules[COMPILER]
            if "_dynamo" in vars(torch):
                delattr(torch, "_dynamo")
        imports.RequirementCache.__bool__ = cached  # type: ignore[method-assign]
        imports.package_available = available
