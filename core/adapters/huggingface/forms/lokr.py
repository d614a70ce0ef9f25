"""LoKr, as Hugging Face peft writes it."""

from __future__ import annotations

import math

from torch import Tensor

from core.adapters.huggingface.form import Inexpressible, Part, PeftForm, whole
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.lokr import LoKr, LoKrGraft


class LoKrForm(PeftForm):
    """peft's scale is alpha / rank, also for whole inner matrices, which had none in earlier versions of LoKr here."""

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        graft = whole(method, grafts, self.modules)
        assert isinstance(graft, LoKrGraft) and isinstance(method, LoKr)
        for width in (graft.site.in_features, graft.site.out_features):
            if method.factor > math.isqrt(width) and width % method.factor == 0:
                raise Inexpressible(f"{method.name}: factor {method.factor} splits the width {width} of "
                                    f"{graft.site.name} in another way in peft; take one up to its square root, or -1")
        if graft.B is None:
            # A whole inner matrix: peft multiplies it by alpha / rank as well, which is taken out beforehand.
            inner = graft.A * (graft.scale * method.rank / method.alpha)
            return Part({"lokr_w1": graft.C, "lokr_w2": inner})
        return Part({"lokr_w1": graft.C, "lokr_w2_a": graft.B, "lokr_w2_b": graft.A})

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # A graft with a whole inner matrix holds it as A, where others have the second factor.
        if "lokr_w2" in tensors:
            tensors = {"lokr_w1": tensors["lokr_w1"], "lokr_w2_b": tensors["lokr_w2"]}
        return super().from_hf(method, graft, tensors)


FORMS = {
    LoKr: LoKrForm("LOKR", {"rank": "r", "alpha": "alpha", "factor": "decompose_factor"},
        {"lokr_w1": "C", "lokr_w2_a": "B", "lokr_w2_b": "A", "lokr_w2": "A"},
        training=("rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"),
        patterns={"rank_pattern": "r", "alpha_pattern": "alpha"}),
}
