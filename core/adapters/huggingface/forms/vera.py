"""VeRA, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.adapters.huggingface.form import FolderPlan, PeftForm, WrappedModel
from core.errors import ScionError
from core.method import PEFTMethod
from core.peft.weights.vera import VeRA


class VeRAForm(PeftForm):
    """The random map is in peft's file, or is drawn by the seed in its config."""

    types = {"projection_prng_key": int | None, "save_projection": bool}

    def shared(self, method: PEFTMethod) -> dict[str, Tensor]:
        assert isinstance(method, VeRA)
        return {"vera_A": method.projections.A, "vera_B": method.projections.B}

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        return {**super().config(method), "save_projection": True}

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        plans = super().read(config, given, wrapped)
        if "base_model.vera_A" not in given:
            if config.get("save_projection", True):
                raise ScionError(f"{wrapped.where}: save_projection is true, but the file holds no vera_A")
            names = {name for plan in plans for name in plan.parts}
            vectors = [part["vera_lambda_d"] for plan in plans for part in plan.parts.values()]
            if any(len(vector) != config["r"] for vector in vectors):
                raise ScionError(f"{wrapped.where}: r is {config['r']}, but vera_lambda_d is {list(vectors[0].shape)}")
            sites = [site for site in wrapped.anatomy.all_sites() if site.name in names]
            generator = torch.Generator().manual_seed(config.get("projection_prng_key") or 0)
            for name, shape in (("A", (config["r"], max(site.in_features for site in sites))),
                                ("B", (max(site.out_features for site in sites), config["r"]))):
                given[f"base_model.vera_{name}"] = nn.init.kaiming_uniform_(
                    torch.empty(shape, device="cpu"), nonlinearity="relu", generator=generator)
        return plans

    def shared_from_hf(self, method: PEFTMethod, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(method, VeRA)
        method.restructure({"stored": True})  # files of this method hold them from now on
        return {"projections.A": given["vera_A"][:, : method.projections.A.shape[1]],
                "projections.B": given["vera_B"][: len(method.projections.B)]}


FORMS = {
    VeRA: VeRAForm("VERA", {"rank": "r", "start": "d_initial"}, {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        modules=("linear", "conv1d"),
        training=("vera_dropout", "projection_prng_key", "save_projection", "init_weights")),
}
