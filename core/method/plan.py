"""What looking at a model yields: where a method's grafts will be, what it trains of the base, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.anatomy import Anatomy, Site


@dataclass(frozen=True)
class Plan:
    """What one method will be on one model. Making it changes neither; `PEFTMethod.attach` carries it out."""

    anatomy: Anatomy
    sites: tuple[Site, ...]
    """Where grafts will be."""
    base_parameters: tuple[str, ...]
    """Names of the base's own parameters that the method trains, norms (the option) included."""
    norms: tuple[str, ...]
    """Those of them that the option ``norms`` adds."""
    numbers: Mapping[str, Any]
    """Attributes that the method has on this model (`PEFTMethod.numbers`)."""
