"""Bytes kept for backward at full size, to the byte: the frozen model's own tensors and the inputs apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from core import peft
from tests.models import Pooled
from tests.toolkit import saved_bytes


def vit_base() -> tuple[nn.Module, torch.Tensor]:
    """ViT-B/16 and four images."""
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0), torch.zeros(4, 3, 224, 224)


def t5_base() -> tuple[nn.Module, torch.Tensor]:
    """T5-base, encoder and decoder, and four samples of 128 tokens."""
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=32_100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, use_cache=False)
    ids = torch.arange(4 * 128).view(4, 128) % 1000 + 1
    return Pooled(T5Model(config), token=-1), ids


MODELS = {"ViT-B/16": vit_base, "T5-base": t5_base}
KEPT: dict[tuple[str, str], tuple[dict[str, Any], int, int]] = {
    ("FullFineTuning", ""): ({"backbone_mode": "train"}, 470_221_984, 1_411_448_832),
    ("LoRA", "rank=8"): ({"rank": 8}, 320_747_520, 531_062_784),
    ("Houlsby", "bottleneck=48"): ({"bottleneck": 48}, 346_732_608, 563_257_344),
    ("LadderSideTuning", ""): ({}, 98_046_256, 523_956_512),  # T5: the thin blocks' own attention maps, as their
    ("LadderSideTuning", "drop=0,4,8"): ({"drop": [0, 4, 8]}, 74_292_748, 394_115_288),  # position bias is trained
    ("VQT", ""): ({}, 59_870_592, 116_867_520),
    ("VQT", "tokens=10"): ({"tokens": 10}, 75_823_488, 148_125_312),
}
"""(method, options as text) -> options, bytes on ViT-B/16, bytes on T5-base."""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", KEPT, ids=" ".join)
def test_kept(model: str, name: tuple[str, str]) -> None:
    options, *kept = KEPT[name]
    backbone, inputs = MODELS[model]()
    peft.make(name[0], options).attach(backbone)
    assert saved_bytes(backbone.train(), inputs) == kept[list(MODELS).index(model)]
