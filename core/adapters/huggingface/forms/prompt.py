"""PromptTuning and PTuning, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from core.adapters.huggingface.form import FolderPlan, Inexpressible, PeftForm, WrappedModel
from core.errors import ScionError
from core.json_types import Count
from core.method import PEFTMethod, key_of
from core.peft.tokens._sequence import PromptGraft, TextPrompt
from core.peft.tokens.prompt import COUNTS, PromptTuning, PTuning


class PromptForm(PeftForm):
    """peft keeps the prompts as one table, P-tuning's as well, without the network that made them."""

    types = {"num_virtual_tokens": Count}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        grafts = [graft for method in methods for graft in method.grafts if isinstance(graft, PromptGraft)]
        if len(methods) > 1 or len(grafts) > 1 or not isinstance(grafts[0], TextPrompt):
            raise Inexpressible(f"{methods[0].name}: peft puts one set of prompts before embedded ids, and here are "
                                f"{len(grafts)} in {wrapped.anatomy.family}")
        prompts = grafts[0].values().detach()
        return {"num_virtual_tokens": len(prompts), "token_dim": prompts.shape[1], "num_attention_heads": 1,
                "num_layers": len(wrapped.anatomy.blocks), "num_transformer_submodules": 1,
                "task_type": wrapped.task() or "FEATURE_EXTRACTION"}, {"prompt_embeddings": prompts}

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        rows, tokens = given.pop("prompt_embeddings"), config["num_virtual_tokens"]
        sites = [stack.text for stack in wrapped.anatomy.stacks if stack.text is not None]
        if not sites:
            raise ScionError(f"{wrapped.where}: its prompts stand before embedded ids, which {wrapped.anatomy.family} "
                             "does not take")
        # Of an encoder and a decoder peft stores two sets, and uses the first.
        return [FolderPlan({"tokens": tokens}, {sites[0].name: {"prompt": rows[:tokens]}})]

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        if isinstance(method, PTuning):
            method.fold()
        (name, part), = plan.parts.items()
        return {f"{method.prefix}{key_of(name)}.prompt": part["prompt"]}


FORMS = {
    PromptTuning: PromptForm("PROMPT_TUNING", training=(
        *COUNTS, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        "init_weights")),
    PTuning: PromptForm("P_TUNING", training=(
        *COUNTS, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")),
}
