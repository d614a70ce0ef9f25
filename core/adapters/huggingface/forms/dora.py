"""DoRA, as Hugging Face peft writes it."""

from __future__ import annotations

from torch import Tensor

from core.adapters.huggingface.form import LoRAShapedForm, Part, placed
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.dora import DoRA, DoRAGraft


class DoRAForm(LoRAShapedForm):
    """Rows of a fused weight that the method does not adapt keep their norm as magnitude."""

    def __init__(self) -> None:
        super().__init__(fixed={"use_dora": True})
        self.options.pop("root")  # DoRA's scale is always alpha / rank
        self.tensors["lora_magnitude_vector"] = "magnitude"

    def pair(self, graft: Graft) -> tuple[Tensor, Tensor, float]:
        assert isinstance(graft, DoRAGraft)
        return graft.A, graft.B, graft.scale

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        part = super().to_hf(method, grafts)
        site = grafts[0].site
        weight = site.full_weight.detach()
        rows = weight.t() if site.kind == "conv1d" else weight.flatten(1)  # [out, in]
        magnitude = rows.float().norm(dim=1)
        for graft in grafts:
            assert isinstance(graft, DoRAGraft)
            magnitude = placed(graft.site, graft.magnitude.detach(), magnitude)
        shape = [-1]
        if site.kind == "conv":
            # As it multiplies the output in peft: [1, out, 1, 1] for a convolution in two dimensions.
            ones = [1] * (weight.dim() - 2)
            shape = [1, -1, *ones]
        part.tensors["lora_magnitude_vector"] = magnitude.view(shape)
        return part


FORMS = {
    DoRA: DoRAForm(),
}
