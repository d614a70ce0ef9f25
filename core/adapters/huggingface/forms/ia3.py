"""IA3, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.adapters.huggingface.form import Inexpressible, Matcher, Names, Part, PeftForm, WrappedModel, placed
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.activations.ia3 import IA3, ScaledInput, ScaledOutput


class IA3Form(PeftForm):
    """peft calls the modules whose inputs are scaled ``feedforward_modules``; other rows of a fused weight get ones."""

    types = {"feedforward_modules": Names}

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        site, inputs = grafts[0].site, isinstance(grafts[0], ScaledInput)
        if site.kind not in self.modules:
            raise Inexpressible(f"{method.name}: {site.path} is a {type(site.module).__name__}, which it cannot scale")
        scales = torch.ones(site.full_weight.shape[1 if site.kind == "conv1d" else 0])
        for graft in grafts:
            assert isinstance(graft, (ScaledInput, ScaledOutput))
            scales = placed(graft.site, graft.l.detach(), scales.to(graft.l))
        after = (1,) * (site.full_weight.dim() - 2)
        return Part({"ia3_l": scales.view((1, -1, *after) if inputs or site.kind == "conv" else (-1, 1))})

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = super().write(methods, wrapped)
        inputs = {wrapped.name(graft.site.path) for method in methods for graft in method.grafts
                  if isinstance(graft, ScaledInput)}
        return {**config, "feedforward_modules": wrapped.pattern(inputs)}, tensors

    def targets(self, config: dict[str, Any], roles: dict[str, list[str]]) -> dict[str, Any]:
        found: dict[str, list[str]] = {"outputs": [], "inputs": []}
        given = config.get("feedforward_modules") or []
        for role, names in roles.items():
            inside = {Matcher()(given, name) if isinstance(given, str) else name.endswith(tuple(given))
                      for name in names}
            if len(inside) > 1:
                raise ScionError(f"feedforward_modules holds some modules of the role {role!r} and not others")
            found["inputs" if inside.pop() else "outputs"].append(role)
        return found


FORMS = {
    IA3: IA3Form("IA3", tensors={"ia3_l": "l"}, training=("feedforward_modules", "init_ia3_weights"),
        modules=("linear", "conv1d", "conv")),
}
