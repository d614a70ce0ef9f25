"""AdaLoRA, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.adapters.huggingface.form import PeftForm
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.adalora import AdaLoRA


class AdaLoRAForm(PeftForm):
    """peft counts the schedule in steps, which do not carry over, and stores the triplets that are left alone."""

    def __init__(self) -> None:
        super().__init__(
            "ADALORA", {"rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
                        "beta": "beta1", "gamma": "orth_reg_weight", "interval": "deltaT"},
            {"lora_A": "A", "lora_B": "B", "lora_E": "E"}, modules=("linear", "conv1d"),
            training=("r", "beta2", "tinit", "tfinal", "total_step", "init_lora_weights", "megatron_core",
                      "qalora_group_size", "rank_pattern"))

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        return {**super().config(method), "beta2": method.config["beta"], "tinit": 0, "tfinal": 0, "total_step": 1}

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lost = method.config["rank"] - len(tensors["lora_E"])
        return super().from_hf(method, graft, {
            name: nn.functional.pad(tensor, (0, lost) if name == "lora_B" else (0, 0, 0, lost))
            for name, tensor in tensors.items()} if lost > 0 else tensors)


FORMS = {
    AdaLoRA: AdaLoRAForm(),
}
