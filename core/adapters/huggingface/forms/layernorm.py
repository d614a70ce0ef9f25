"""LayerNormTuning, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.adapters.huggingface.form import MODEL, FolderPlan, PeftForm, WrappedModel
from core.anatomy import NORMS, Site, dissect
from core.method import PEFTMethod
from core.peft.selection.layernorm import LayerNormTuning


class LayerNormForm(PeftForm):
    """peft holds a copy of each norm."""

    mark = ".ln_tuning_layers."

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        parameters = dict(wrapped.root.named_parameters())
        paths: set[str] = set()
        tensors: dict[str, Tensor] = {}
        for method in methods:
            for name in method.base_at_start:
                path, _, leaf = wrapped.name(name).rpartition(".")
                paths.add(path)
                tensors[f"{MODEL}{path}{self.mark}{leaf}"] = parameters[name]
        return {"target_modules": wrapped.pattern(paths)}, tensors

    def fits(self, site: Site) -> bool:
        return site.role in NORMS

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        # The method trains the base's own norms: their tensors go to the base's names, not to the method's.
        site_of = {site.name: site for site in dissect(method.need_root()).all_sites()}
        found: dict[str, Tensor] = {}
        for name, part in plan.parts.items():
            path = site_of[name].path
            for theirs, tensor in part.items():
                leaf = theirs.rpartition(".")[2]
                found[f"{path}.{leaf}"] = tensor
        return found


# The method has no grafts whose tensors these could be: `collect` finds their places.
_TENSORS = {"ln_tuning_layers.weight": "", "ln_tuning_layers.bias": ""}

FORMS = {
    LayerNormTuning: LayerNormForm("LN_TUNING", tensors=_TENSORS),
}
