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
        paths, tensors = set(), {}
        for name in [name for method in methods for name in method.base_at_start]:
            path, _, leaf = wrapped.name(name).rpartition(".")
            paths.add(path)
            tensors[f"{MODEL}{path}{self.mark}{leaf}"] = parameters[name]
        return {"target_modules": wrapped.pattern(paths)}, tensors

    def fits(self, site: Site) -> bool:
        return site.role in NORMS

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        site_of = {site.name: site for site in dissect(method.need_root()).all_sites()}
        return {f"{site_of[name].path}.{theirs.rpartition('.')[2]}": tensor for name, part in plan.parts.items()
                for theirs, tensor in part.items()}


FORMS = {
    LayerNormTuning: LayerNormForm("LN_TUNING", tensors={"ln_tuning_layers.weight": "", "ln_tuning_layers.bias": ""}),
}
