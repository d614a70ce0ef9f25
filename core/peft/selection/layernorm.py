"""Tuning of the norms alone (Qi et al. 2022, arXiv:2211.08682)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from core.anatomy import NORMS, Anatomy, Site, dissect
from core.errors import ScionError
from core.interop import MODEL, PeftForm, Place, Plan
from core.method import PEFTMethod


class LayerNormForm(PeftForm):
    """peft holds a copy of each norm."""

    mark = ".ln_tuning_layers."

    def write(self, methods: list[PEFTMethod], place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
        parameters = dict(place.root.named_parameters())
        moved = {place.name(name).rpartition("."): parameters[name] for method in methods for name in method.start}
        return ({"target_modules": place.pattern({path for path, _, _ in moved})},
                {f"{MODEL}{path}{self.mark}{leaf}": tensor for (path, _, leaf), tensor in moved.items()})

    def fits(self, site: Site) -> bool:
        return site.role in NORMS

    def collect(self, method: PEFTMethod, plan: Plan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        site_of = {site.name: site for site in dissect(method._need_root()).all_sites()}
        return {f"{site_of[name].path}.{theirs.rpartition('.')[2]}": tensor for name, part in plan.parts.items()
                for theirs, tensor in part.items()}


class LayerNormTuning(PEFTMethod):
    """Trains gains and shifts of the backbone's norms and nothing else.

    Equation: y = (gamma + d gamma) (x - mean) / sd + (beta + d beta), for every norm of the backbone
    Trains: all norms' weights and biases; ViT-B/16 and BERT-base: 38,400
    Merges: the weights are the base's own
    Source: Qi et al. 2022, arXiv:2211.08682, section 3; the learning rate is from memory

    Args:
        targets: roles of norms; None is every norm of the backbone.
    """

    mergeable = True
    moves_base = True
    inference_cost = "none"
    recommended = {"lr": 1e-3, "weight_decay": 0.0}
    peft = LayerNormForm("LN_TUNING", tensors={"ln_tuning_layers.weight": "", "ln_tuning_layers.bias": ""})

    def __init__(self, targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.roles = None if targets is None else tuple(targets)

    def moved(self, anatomy: Anatomy) -> list[str]:
        roles = self.roles or [role for role in anatomy.roles if role in NORMS]
        sites = anatomy.sites(roles, self.layers, self.name)
        for site in sites:
            if site.role.rpartition(".")[2] not in {norm.rpartition(".")[2] for norm in NORMS}:
                raise ScionError(f"{self.name}: {site.name} is no norm; norms are {', '.join(NORMS)}")
        return list(dict.fromkeys(name for site in sites for name in site.parameter_names))
