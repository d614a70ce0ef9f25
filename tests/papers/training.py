"""A small run that the checks of several methods share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from core import FineTuner
from core.backbone import Backbone
from core.data import EpochLoader, EpochSampler
from core.tasks import Classification
from tests.toolkit import trainer


class Deep(Backbone):
    """A ViT of eight narrow layers."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=8,
                                       num_heads=2, num_classes=0)
        self.dim = 16

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def deep() -> FineTuner:
    """`Deep` with a head for four classes."""
    return FineTuner(Deep(), Classification(), classes=list("abcd"), optimizer={"lr": 1e-2, "weight_decay": 0.1})


def run(folder: Path, *methods: Any, steps: int = 12, checkpoint: Path | None = None, listen: Any = None,
        **settings: Any) -> FineTuner:
    """Train on noise; ``listen`` is a further callback, ``settings`` are the Trainer's."""
    torch.manual_seed(0)
    module = deep()
    data = TensorDataset(torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 4)
    batches = EpochLoader(data, batch_size=8, sampler=EpochSampler(64, shuffle=True, seed=0))
    fit = trainer(folder, *methods, *([listen] if listen else []), max_steps=steps, **{
        "enable_checkpointing": bool(listen), **settings})
    fit.fit(module, batches, ckpt_path=checkpoint)
    return module
