"""PrefixTuning, as Hugging Face peft writes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from core.adapters.huggingface.form import FolderPlan, Inexpressible, PeftForm, WrappedModel
from core.errors import ScionError
from core.json_types import Count
from core.method import PEFTMethod
from core.peft.tokens.prefix import PrefixTuning


class PrefixForm(PeftForm):
    """peft puts the prefix into the cache, which moves the tokens' positions on by its length.

    Rotary positions then turn the queries, and turning the prefix's keys as far undoes it; learned positions would
    change.
    """

    types = {"num_virtual_tokens": Count, "token_dim": Count}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        method = methods[0]
        blocks = wrapped.anatomy.blocks
        assert isinstance(method, PrefixTuning)
        if len(methods) > 1 or len(method.grafts) != len(blocks):
            raise Inexpressible(f"{method.name}: peft has one prefix, in all {len(blocks)} layers of "
                                f"{wrapped.anatomy.family}")
        heads = blocks[0].sites["attend"].heads
        assert heads is not None
        parts: list[Tensor] = []
        for graft in method.grafts:
            prefix = graft.values().detach()  # type: ignore[operator]
            parts.append(self.turned(wrapped, prefix, method.tokens, method.name))
        config: dict[str, Any] = {"num_virtual_tokens": method.tokens, "token_dim": heads.key * heads.width}
        config["num_layers"] = len(blocks)
        # peft reshapes the table by this number: with grouped queries it is the number of key heads.
        config["num_attention_heads"] = heads.key
        config["num_transformer_submodules"] = 1
        config["prefix_projection"] = False
        config["task_type"] = wrapped.task() or "FEATURE_EXTRACTION"
        return config, {"prompt_embeddings": torch.cat(parts, 1)}

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        tokens = config["num_virtual_tokens"]
        sites = wrapped.anatomy.sites("attend", asker=wrapped.where)
        rows = given.pop("prompt_embeddings")
        width = 2 * config["token_dim"]  # the keys of a layer, then its values
        expected = [tokens, width * len(sites)]
        if list(rows.shape) != expected:
            raise ScionError(f"{wrapped.where}: prompt_embeddings is {list(rows.shape)} in the file, and {tokens} "
                             f"tokens for {len(sites)} layers are {expected}")
        parts: dict[str, dict[str, Tensor]] = {}
        for site, part in zip(sites, rows.split(width, 1), strict=True):
            parts[site.name] = {"prefix": self.turned(wrapped, part, -tokens, wrapped.where)}
        return [FolderPlan({"tokens": tokens}, parts)]

    def turned(self, wrapped: WrappedModel, prefix: Tensor, by: int, asker: str) -> Tensor:
        """The prefix [tokens, 2 x key heads x width] with its keys turned by so many positions."""
        block = wrapped.anatomy.blocks[0]
        model = wrapped.anatomy.inputs.module
        heads = block.sites["attend"].heads
        rotary = getattr(model, "rotary_emb", None)
        if not block.described.rotary or rotary is None or not _has_plain_positions(model, rotary):
            raise Inexpressible(f"{asker}: peft moves the tokens' positions on by the prefix's length, which only "
                                f"plain rotary positions can make up for; {wrapped.anatomy.family} has others")
        assert heads is not None
        # [tokens, 2 x key heads x width] -> keys and values, each [tokens, key heads, width]
        keys, values = torch.unflatten(prefix, 1, (2, heads.key, heads.width)).unbind(1)
        position = torch.tensor([[abs(by)]], device=keys.device)
        cos, sin = (part.flatten().to(keys) for part in rotary(keys, position))
        size = torch.hypot(cos, sin)  # a factor that some models (yarn) put on both
        cos = cos / size
        sin = sin / size * (1 if by > 0 else -1)
        # Some models turn only the first numbers of a head: as many as there are cosines.
        turning = len(cos)
        first, second = keys[..., :turning].chunk(2, -1)
        crossed = torch.cat([-second, first], -1)
        turned = keys[..., :turning] * cos + crossed * sin
        keys = torch.cat([turned, keys[..., turning:]], -1)
        return torch.stack([keys, values], 1).flatten(1)


def _has_plain_positions(model: Any, rotary: Any) -> bool:
    """Whether moving all positions on by a constant only turns queries and keys: no window, fixed frequencies."""
    config = getattr(model, "config", None)
    if getattr(config, "sliding_window", None):
        return False
    return getattr(rotary, "rope_type", "default") in ("default", "linear", "llama3", "yarn")


_TRAINING = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
             "prefix_projection", "encoder_hidden_size", "init_weights")

FORMS = {
    PrefixTuning: PrefixForm("PREFIX_TUNING", tensors={"prefix": "prefix"}, training=_TRAINING),
}
