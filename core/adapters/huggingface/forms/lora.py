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
        # A subclass may do something else with A and B, and says by its `factors` what that amounts to.
        if type(graft) is LoRAGraft:
            return graft.A, graft.B, graft.scale
        return super().pair(graft)

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        start = config.get("init_lora_weights", True)
        if start not in (True, False, None, "gaussian", "orthogonal", "eva", "pissa"):
            raise ScionError(f"init_lora_weights {start!r} changes the frozen weights in a way that LoRA here does not "
                             "have; let peft convert it (path_initial_model_for_weight_conversion)")
        arguments = super().arguments(config)
        if start == "pissa":
            arguments["start"] = "principal"
        return arguments

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().from_hf(method, graft, tensors)
        # A principal start is computed from the weight, and peft does not store it: the graft's buffers are right.
        found.update(graft.named_buffers())
        return found


FORMS = {
    LoRA: LoRAForm(fixed={"use_dora": False}),
}
