"""Linear probe: the backbone stays frozen, a head is trained on its features."""

from __future__ import annotations

from typing import Any

from core.method import PEFTMethod


class LinearProbe(PEFTMethod):
    """Trains the task head alone; a trunk that needs no gradient keeps nothing for backward.

    Equation: y = head(backbone(x)), backbone frozen and in eval mode
    Trains: nothing in the backbone (a head of C classes on width d: C (d + 1))
    Merges: nothing to merge
    Source: the usual baseline; learning rate of Cappellazzo et al. 2024 (PETL-AST), who also train the final norm:
        norms=("norm",)
    """

    tags = ("partial", ("head",))
    mergeable = True
    trains_backbone = False
    inference_cost = "none"
    recommended = {"lr": 1e-3, "weight_decay": 0.1}

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
