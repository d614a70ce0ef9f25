"""Full fine-tuning, the reference that every other method is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.anatomy import Anatomy
from core.method import PEFTMethod
from core.method.options import excluded


class FullFineTuning(PEFTMethod):
    """Trains every parameter of the backbone.

    Equation: theta <- theta - lr g(theta), for all theta
    Trains: all; ViT-B/16: 85,798,656, BERT-base: 109,482,240
    Merges: the weights are the base's own
    Source: the usual baseline; learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        exclude: roles that stay frozen (``("pool",)`` where the pooler feeds nothing).
    """

    tags = ("partial", ("linear", "norms"))
    mergeable = True
    moves_base = True
    inference_cost = "none"
    recommended = {"lr": 5e-5, "weight_decay": 0.1}
    mode = "train"

    def __init__(self, exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        self.exclude = tuple(exclude)

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        return all_parameters(anatomy, self.layers, self.exclude, self.name)


def all_parameters(anatomy: Anatomy, layers: Sequence[int] | None, exclude: Sequence[str], asker: str) -> list[str]:
    """Names of the backbone's parameters: all, or those of some blocks; never a task head's, nor of roles left out."""
    left_out = tuple(f"{path}." for path in excluded(asker, exclude, anatomy))
    inside = tuple(f"{anatomy.blocks[i].path}." for i in sorted(anatomy.layer_indices(layers, asker)))
    return [name for name, _ in anatomy.root.named_parameters()
            if name not in anatomy.head_names() and not name.startswith(("peft.", *left_out))
            and (layers is None or name.startswith(inside))]
