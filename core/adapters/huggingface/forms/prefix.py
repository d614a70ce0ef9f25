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
    """peft puts the prefix into the cache, which moves the tokens' positions on by its length. Under rotary positions
    that turns the queries, and is undone where the prefix's keys are turned as far; learned positions would change."""

    types = {"num_virtual_tokens": Count, "token_dim": Count}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        method, blocks = methods[0], wrapped.anatomy.blocks
        assert isinstance(method, PrefixTuning)
        if len(methods) > 1 or len(method.grafts) != len(blocks):
            raise Inexpressible(f"{method.name}: peft has one prefix, in all {len(blocks)} layers of "
                                f"{wrapped.anatomy.family}")
        heads = blocks[0].sites["attend"].heads
        assert heads is not None
        parts = [self.turned(wrapped, graft.values().detach(), method.tokens, method.name)  # type: ignore[operator]
                 for graft in method.grafts]
        return {"num_virtual_tokens": method.tokens, "token_dim": heads.key * heads.width, "num_layers": len(blocks),
                "num_attention_heads": heads.key, "num_transformer_submodules": 1, "prefix_projection": False,
                "task_type": wrapped.task() or "FEATURE_EXTRACTION"}, {"prompt_embeddings": torch.cat(parts, 1)}

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        tokens, sites = config["num_virtual_tokens"], wrapped.anatomy.sites("attend", asker=wrapped.where)
        rows, width = given.pop("prompt_embeddings"), config["token_dim"]
        if list(rows.shape) != [tokens, 2 * width * len(sites)]:
            raise ScionError(f"{wrapped.where}: prompt_embeddings is {list(rows.shape)} in the file, and {tokens} "
                             f"tokens for {len(sites)} layers are {[tokens, 2 * width * len(sites)]}")
        parts = {site.name: {"prefix": self.turned(wrapped, part, -tokens, wrapped.where)}
                 for site, part in zip(sites, rows.split(2 * width, 1), strict=True)}
        return [FolderPlan({"tokens": tokens}, parts)]

    def turned(self, wrapped: WrappedModel, prefix: Tensor, by: int, asker: str) -> Tensor:
        """The prefix [tokens, 2 x key heads x width] with its keys turned by so many positions."""
        block, model = wrapped.anatomy.blocks[0], wrapped.anatomy.inputs.module
        heads, rotary = block.sites["attend"].heads, getattr(model, "rotary_emb", None)
        config = getattr(model, "config", None)
        if not block.described.rotary or rotary is None or getattr(config, "sliding_window", None) or getattr(
                rotary, "rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
            raise Inexpressible(f"{asker}: peft moves the tokens' positions on by the prefix's length, which only "
                                f"plain rotary positions can make up for; {wrapped.anatomy.family} has others")
        assert heads is not None
        keys, values = torch.unflatten(prefix, 1, (2, heads.key, heads.width)).unbind(1)
        cos, sin = (t.flatten().to(keys) for t in rotary(keys, torch.tensor([[abs(by)]], device=keys.device)))
        size = torch.hypot(cos, sin)  # a factor that some models put on both
        cos, sin, turning = cos / size, sin / size * (1 if by > 0 else -1), len(cos)
        first, second = keys[..., :turning].chunk(2, -1)
        turned = keys[..., :turning] * cos + torch.cat([-second, first], -1) * sin
        return torch.stack([torch.cat([turned, keys[..., turning:]], -1), values], 1).flatten(1)


FORMS = {
    PrefixTuning: PrefixForm("PREFIX_TUNING", tensors={"prefix": "prefix"}, training=(
        "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules",
        "prefix_projection", "encoder_hidden_size", "init_weights")),
}
