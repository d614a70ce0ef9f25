"""LoRA, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.adapters.huggingface.form import LoRAShapedForm
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.lora import LoRA, LoRAGraft


class LoRAForm(LoRAShapedForm):
    """A principal start is a change of twice the rank; peft writes its own as a start, and subtracts it from W."""

    def pair(self, graft: Graft) -> tuple[Tensor, Tensor, float]:
        return (graft.A, graft.B, graft.scale) if type(graft) is LoRAGraft else super().pair(graft)

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        start = config.get("init_lora_weights", True)
        if start not in (True, False, None, "gaussian", "orthogonal", "eva", "pissa"):
            raise ScionError(f"init_lora_weights {start!r} changes the frozen weights in a way that LoRA here does not "
                             "have; let peft convert it (path_initial_model_for_weight_conversion)")
        return {**super().arguments(config), **({"start": "principal"} if start == "pissa" else {})}

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**super().from_hf(method, graft, tensors), **dict(graft.named_buffers())}  # the start is the weight's


FORMS = {
    LoRA: LoRAForm(fixed={"use_dora": False}),
}
