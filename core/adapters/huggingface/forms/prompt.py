"""PromptTuning and PTuning, as Hugging Face peft writes them."""

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
    """peft keeps the prompts as one table, also for P-tuning, without the network that made them."""

    types = {"num_virtual_tokens": Count}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        grafts: list[PromptGraft] = []
        for method in methods:
            grafts += [graft for graft in method.grafts if isinstance(graft, PromptGraft)]
        if len(methods) > 1 or len(grafts) > 1 or not isinstance(grafts[0], TextPrompt):
            raise Inexpressible(f"{methods[0].name}: peft puts one set of prompts before embedded ids, and here are "
                                f"{len(grafts)} in {wrapped.anatomy.family}")
        prompts = grafts[0].values().detach()
        config: dict[str, Any] = {"num_virtual_tokens": len(prompts), "token_dim": prompts.shape[1]}
        # peft refuses a config without these where it does not find them in the model's own.
        config["num_attention_heads"] = 1
        config["num_layers"] = len(wrapped.anatomy.blocks)
        config["num_transformer_submodules"] = 1
        config["task_type"] = wrapped.task() or "FEATURE_EXTRACTION"
        return config, {"prompt_embeddings": prompts}

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        rows = given.pop("prompt_embeddings")
        tokens = config["num_virtual_tokens"]
        sites = [stack.text for stack in wrapped.anatomy.stacks if stack.text is not None]
        if not sites:
            raise ScionError(f"{wrapped.where}: its prompts stand before embedded ids, which {wrapped.anatomy.family} "
                             "does not take")
        # Of an encoder and a decoder peft stores two sets, and uses the first.
        parts = {sites[0].name: {"prompt": rows[:tokens]}}
        return [FolderPlan({"tokens": tokens}, parts)]

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        if isinstance(method, PTuning):
            method.fold()  # leaves the table, and drops the network that the file does not have
        [(name, part)] = plan.parts.items()
        return {f"{method.prefix}{key_of(name)}.prompt": part["prompt"]}


_PROMPT_START = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                 "init_weights")
_NETWORK = ("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")

FORMS = {
    PromptTuning: PromptForm("PROMPT_TUNING", training=(*COUNTS, *_PROMPT_START)),
    PTuning: PromptForm("P_TUNING", training=(*COUNTS, *_NETWORK)),
}
