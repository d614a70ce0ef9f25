"""What methods with a low-rank change beside a linear map share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from core.method import PEFTMethod
from core.method.options import at_least, positive, probability


class LowRankMethod(PEFTMethod):
    """A change of rank ``rank``, times alpha / rank, behind a dropout, at linear maps.

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of the change, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
    """

    linear_only = True
    mergeable = True
    recommended = {"lr": 5e-3, "weight_decay": 0.1}
    former_options: ClassVar[dict[str, Any]] = {"root": False, "start": "random", "lr_ratio": 1.0}

    def __init__(self, rank: int, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), **common: Any) -> None:
        super().__init__(**common)
        at_least(1, type(self).__name__, rank=rank)
        probability(type(self).__name__, dropout=dropout)
        positive(type(self).__name__, alpha=alpha)
        self.rank, self.dropout = rank, dropout
        self.targets = None if targets is None else tuple(targets)
        self.alpha = rank if alpha is None else alpha

