"""AdaLoRA, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from core.adapters.huggingface.form import PeftForm
from core.graft import Graft
from core.method import PEFTMethod
from core.peft.weights.adalora import AdaLoRA


class AdaLoRAForm(PeftForm):
    """peft counts the schedule in steps, which do not carry over, and stores only the triplets that are left."""

    def __init__(self) -> None:
        options = {"rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout",
                   "beta": "beta1", "gamma": "orth_reg_weight", "interval": "deltaT"}
        tensors = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
        training = ("r", "beta2", "tinit", "tfinal", "total_step", "init_lora_weights", "megatron_core",
                    "qalora_group_size", "rank_pattern")
        super().__init__("ADALORA", options, tensors, modules=("linear", "conv1d"), training=training)

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        config = super().config(method)
        config["beta2"] = method.config["beta"]
        # peft refuses a schedule without steps; this one is over after the first.
        config["tinit"] = 0
        config["tfinal"] = 0
        config["total_step"] = 1
        return config

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lost = method.config["rank"] - len(tensors["lora_E"])
        if lost > 0:
            tensors = {name: _padded(name, tensor, lost) for name, tensor in tensors.items()}
        return super().from_hf(method, graft, tensors)


def _padded(name: str, tensor: Tensor, lost: int) -> Tensor:
    """One of a module's tensors with zeros for the triplets that were pruned."""
    # B is [out, rank], A [rank, in] and E [rank, 1]; pad counts from the last axis.
    if name == "lora_B":
        return nn.functional.pad(tensor, (0, lost))
    return nn.functional.pad(tensor, (0, 0, 0, lost))


FORMS = {
    AdaLoRA: AdaLoRAForm(),
}
