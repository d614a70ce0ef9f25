"""Tiny backbones of every family, built from their configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """A thin wrapper, as a domain writes one: the library's model and a pooled feature [batch, dim]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.model(inputs)
        out = out if isinstance(out, Tensor) else out.last_hidden_state
        return out if out.dim() == 2 else out.mean(1)


def _timm_vit() -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                             num_classes=0)


def _timm_swin() -> nn.Module:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16,
                             depths=(2, 2), num_heads=(2, 4), num_classes=0, drop_path_rate=0.1)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                        max_position_embeddings=32)
    return BertModel(config, add_pooling_layer=False)


def _ast() -> nn.Module:
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, patch_size=8,
                       frequency_stride=8, time_stride=8, max_length=24, num_mel_bins=32)
    model = ASTModel(config)
    for tensor in (model.embeddings.cls_token, model.embeddings.distillation_token, model.embeddings.position_embeddings):
        nn.init.normal_(tensor, std=0.02)
    return model


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32, use_cache=False)
    return LlamaModel(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "timm_vit": (_timm_vit, lambda n: torch.randn(n, 3, 32, 32)),
    "timm_swin": (_timm_swin, lambda n: torch.randn(n, 3, 32, 32)),
    "bert": (_bert, lambda n: torch.randint(0, 50, (n, 12))),
    "ast": (_ast, lambda n: torch.randn(n, 24, 32)),
    "llama": (_llama, lambda n: torch.randint(0, 50, (n, 12))),
}


def make(family: str, seed: int = 0, wrapped: bool = True) -> nn.Module:
    """A tiny model in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family][0]()
        # Tiny models start near zero, so that methods could hardly be told apart: spread the weights.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return (Pooled(model) if wrapped else model).eval()


def batch(family: str, size: int = 3, seed: int = 1, dtype: Any = None) -> Tensor:
    """Inputs for ``make(family)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = FAMILIES[family][1](size)
    return inputs.to(dtype) if dtype is not None and inputs.is_floating_point() else inputs
