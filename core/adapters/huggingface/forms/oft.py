"""OFT and BOFT, as Hugging Face peft writes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from core.adapters.huggingface.form import Inexpressible, Part, PeftForm, reshaped, whole
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.oft import BOFT, OFT, BOFTGraft, OFTGraft, skew


class OFTForm(PeftForm):
    """peft's series ends with the third power both at 3 terms and at 4, and blocks may be given by their number."""

    types = {"use_cayley_neumann": bool, "num_cayley_neumann_terms": int}

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        terms = method.config["terms"]
        if terms == 3:
            raise Inexpressible(f"{method.name}: terms 3 means I + 2 Q + Q^2 here, which peft does not have; it has 2, "
                                "4 and more, and the exact transform")
        config: dict[str, Any] = {"r": 0, "oft_block_size": method.config["block"]}
        config["use_cayley_neumann"] = terms > 0
        config["num_cayley_neumann_terms"] = terms or 5  # peft's default, which the exact transform does not use
        return config

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        part = super().to_hf(method, grafts)
        assert isinstance(grafts[0], OFTGraft)
        part.tensors["oft_R.weight"] = grafts[0].bounded()
        return part

    def own(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        # A block of size b is stored as its b (b - 1) / 2 numbers above the diagonal.
        numbers = tensors["oft_R.weight"].shape[1]
        return {"oft_block_size": round((1 + math.sqrt(1 + 8 * numbers)) / 2)}

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        terms = 0
        if config.get("use_cayley_neumann", True):
            terms = config.get("num_cayley_neumann_terms", 5)
        return {"block": config["oft_block_size"], "terms": 4 if terms == 3 else terms}


class BOFTForm(PeftForm):
    """peft holds whole blocks, of which half the difference from their transpose counts."""

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        graft = whole(method, grafts, self.modules)
        assert isinstance(graft, BOFTGraft)
        return Part({"boft_R": skew(graft.Q, graft.block), "boft_s": graft.s[:, None]})

    def own(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        blocks = tensors["boft_R"]  # [factors, blocks, size, size]
        return {"boft_n_butterfly_factor": len(blocks), "boft_block_size": blocks.shape[-1]}

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(graft, BOFTGraft)
        blocks = tensors["boft_R"]
        rows, columns = torch.triu_indices(graft.block, graft.block, 1)
        skewed = blocks - blocks.transpose(-1, -2)
        numbers = skewed[..., rows, columns] / 2
        scales = reshaped(tensors["boft_s"], graft.s, "boft_s")
        return {"Q": numbers, "s": scales}


_OFT_TRAINING = ("r", "use_cayley_neumann", "num_cayley_neumann_terms", "eps", "module_dropout", "init_weights")

FORMS = {
    OFT: OFTForm("OFT", {"block": "oft_block_size"}, {"oft_R.weight": "Q"}, training=_OFT_TRAINING),
    BOFT: BOFTForm("BOFT", {"block": "boft_block_size", "factors": "boft_n_butterfly_factor"},
        {"boft_R": "Q", "boft_s": "s"}, training=("boft_block_num", "boft_dropout", "init_weights")),
}
