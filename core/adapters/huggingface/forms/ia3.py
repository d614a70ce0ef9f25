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
    """peft lists the modules whose inputs are scaled as ``feedforward_modules``; other rows of a fused weight get 1."""

    types = {"feedforward_modules": Names}

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        site = grafts[0].site
        if site.kind not in self.modules:
            raise Inexpressible(f"{method.name}: {site.path} is a {type(site.module).__name__}, which it cannot scale")
        out_axis = 1 if site.kind == "conv1d" else 0
        scales = torch.ones(site.full_weight.shape[out_axis])
        for graft in grafts:
            assert isinstance(graft, (ScaledInput, ScaledOutput))
            scales = placed(graft.site, graft.l.detach(), scales.to(graft.l))
        # peft multiplies inputs, and a convolution's channels, as [1, n, ...], and other outputs as [n, 1].
        shape = [-1, 1]
        if isinstance(grafts[0], ScaledInput) or site.kind == "conv":
            ones = [1] * (site.full_weight.dim() - 2)
            shape = [1, -1, *ones]
        return Part({"ia3_l": scales.view(shape)})

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = super().write(methods, wrapped)
        inputs: set[str] = set()
        for method in methods:
            inputs |= {wrapped.name(graft.site.path) for graft in method.grafts if isinstance(graft, ScaledInput)}
        config["feedforward_modules"] = wrapped.pattern(inputs)
        return config, tensors

    def targets(self, config: dict[str, Any], roles: dict[str, list[str]]) -> dict[str, Any]:
        found: dict[str, list[str]] = {"outputs": [], "inputs": []}
        given = config.get("feedforward_modules") or []
        for role, names in roles.items():
            inside = {_is_named(given, name) for name in names}
            if len(inside) > 1:
                raise ScionError(f"feedforward_modules holds some modules of the role {role!r} and not others")
            scaled = "inputs" if inside.pop() else "outputs"
            found[scaled].append(role)
        return found


def _is_named(given: str | list[str], name: str) -> bool:
    """Whether a pattern, or a list of endings, means the module of this name."""
    if isinstance(given, str):
        return Matcher()(given, name)
    return name.endswith(tuple(given))


FORMS = {
    IA3: IA3Form("IA3", tensors={"ia3_l": "l"}, training=("feedforward_modules", "init_ia3_weights"),
        modules=("linear", "conv1d", "conv")),
}
