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
    """The random map is in peft's file, or is drawn anew with the seed in its config."""

    types = {"projection_prng_key": int | None, "save_projection": bool}

    def shared(self, method: PEFTMethod) -> dict[str, Tensor]:
        assert isinstance(method, VeRA)
        return {"vera_A": method.projections.A, "vera_B": method.projections.B}

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        config = super().config(method)
        config["save_projection"] = True
        return config

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        plans = super().read(config, given, wrapped)
        if "base_model.vera_A" not in given:
            if config.get("save_projection", True):
                raise ScionError(f"{wrapped.where}: save_projection is true, but the file holds no vera_A")
            given.update(_drawn_maps(plans, config, wrapped))
        return plans

    def shared_from_hf(self, method: PEFTMethod, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(method, VeRA)
        method.restructure({"stored": True})  # files of this method hold them from now on
        # peft's maps are as wide as the widest module of the whole adapter; this method's may be narrower.
        inputs = method.projections.A.shape[1]
        outputs = len(method.projections.B)
        return {"projections.A": given["vera_A"][:, :inputs], "projections.B": given["vera_B"][:outputs]}


def _drawn_maps(plans: list[FolderPlan], config: dict[str, Any], wrapped: WrappedModel) -> dict[str, Tensor]:
    """The random maps as peft draws them, by their names in the file."""
    names: set[str] = set()
    vectors: list[Tensor] = []
    for plan in plans:
        names |= plan.parts.keys()
        vectors += [part["vera_lambda_d"] for part in plan.parts.values()]
    rank = config["r"]
    # Checked before anything is drawn: a rank that the file's vectors do not have could be of any size.
    if any(len(vector) != rank for vector in vectors):
        raise ScionError(f"{wrapped.where}: r is {rank}, but vera_lambda_d is {list(vectors[0].shape)}")
    sites = [site for site in wrapped.anatomy.all_sites() if site.name in names]
    inputs = max(site.in_features for site in sites)
    outputs = max(site.out_features for site in sites)
    generator = torch.Generator().manual_seed(config.get("projection_prng_key") or 0)
    maps: dict[str, Tensor] = {}
    # One generator for both, A first, as in peft.
    for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        empty = torch.empty(shape, device="cpu")
        maps[f"base_model.vera_{name}"] = nn.init.kaiming_uniform_(empty, nonlinearity="relu", generator=generator)
    return maps


FORMS = {
    VeRA: VeRAForm("VERA", {"rank": "r", "start": "d_initial"}, {"vera_lambda_b": "b", "vera_lambda_d": "d"},
        modules=("linear", "conv1d"),
        training=("vera_dropout", "projection_prng_key", "save_projection", "init_weights")),
}
