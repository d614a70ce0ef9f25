"""Tuning of the norms alone (Qi et al. 2022, arXiv:2211.08682)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.anatomy import NORMS, Anatomy
from core.errors import ScionError
from core.method import PEFTMethod


class LayerNormTuning(PEFTMethod):
    """Trains gains and shifts of the backbone's norms and nothing else.

    Equation: y = (gamma + d gamma) (x - mean) / sd + (beta + d beta), for every norm of the backbone
    Trains: all norms' weights and biases; ViT-B/16 and BERT-base: 38,400
    Merges: the weights are the base's own
    Source: Qi et al. 2022, arXiv:2211.08682, section 3; the learning rate is from memory

    Args:
        targets: roles of norms; None is every norm of the backbone.
    """

    tags = ("partial", ("norms",))
    mergeable = True
    moves_base = True
    inference_cost = "none"
    recommended = {"lr": 1e-3, "weight_decay": 0.0}

    def __init__(self, targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.roles = None if targets is None else tuple(targets)

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        roles = self.roles or [role for role in anatomy.roles if role in NORMS]
        sites = anatomy.sites(roles, self.layers, self.name)
        for site in sites:
            if site.role.rpartition(".")[2] not in {norm.rpartition(".")[2] for norm in NORMS}:
                raise ScionError(f"{self.name}: {site.name} is no norm; norms are {', '.join(NORMS)}")
        return list(dict.fromkeys(name for site in sites for name in site.parameter_names))
