"""The Audio Spectrogram Transformer (AST), by name, by path, small, or with random weights.

    >>> backbone = AST("nano", frames=500)
    >>> backbone(filterbank).shape          # filterbank [batch, 500, 128], see features.py
    torch.Size([batch, 128])

transformers' ``ASTModel``, unchanged but for the length of its position table, which is cut or interpolated where clips
or strides differ from the checkpoint's. Source: https://arxiv.org/abs/2104.01778; adapted as in
https://arxiv.org/abs/2312.03694, where the feature is the mean over all tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import hub
from core.backbone import Backbone
from core.data.download import reachable
from core.errors import ScionError, listed, nearest

Model = Any
"""transformers' ``ASTModel``. Even an import for type checkers alone is run by the command's parser of annotations:
seconds, before a wrong name is told."""

DEFAULT = "MIT/ast-finetuned-audioset-10-10-0.4593"
"""What ``auto`` stands for where it can be had."""

_BASE: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                         "intermediate_size": 3072, "patch_size": 16, "num_mel_bins": 128}
SHAPES: dict[str, dict[str, Any]] = {
    **{f"MIT/ast-finetuned-audioset-{stride}-{stride}-{score}":
           {**_BASE, "max_length": 1024, "frequency_stride": stride, "time_stride": stride}
       for stride, score in ((10, "0.4593"), (10, "0.448"), (10, "0.448-v2"), (10, "0.450"), (12, "0.447"),
                             (14, "0.443"), (16, "0.442"))},
    "MIT/ast-finetuned-speech-commands-v2": {**_BASE, "max_length": 128, "frequency_stride": 10, "time_stride": 10},
    "nano": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512,
             "patch_size": 16, "num_mel_bins": 128, "max_length": 512, "frequency_stride": 16, "time_stride": 16,
             "initializer_range": 0.08},  # 1 / sqrt(128): at the usual 0.02 so narrow a network hardly starts to learn
}
"""Architectures that can be built without their weights, by name."""

ROLES = ("patch_embed", "embed", "norm", "block", "q", "k", "v", "o", "mlp.up", "mlp.down", "attend", "attention",
         "mlp", "norm1", "norm2", "final_norm", "feature")
"""The roles of every AST."""

NANO = Path(__file__).parent / "nano"
"""The small AST that ``make_nano.py`` trained: config.json and model.safetensors."""

WANTED = hub.Wanted("an AST", list(SHAPES), NANO, "python -m domains.audio.make_nano (half an hour)")
"""What is looked for by name."""


class AST(Backbone):
    """AST as a backbone: filterbank [batch, frames, 128] in, the mean of all final tokens [batch, dim] out.

    Args:
        name: ``auto`` (the AudioSet checkpoint if it is cached or can be fetched, else ``nano`` with a warning), a hub
            id, a folder with config.json and model.safetensors, or ``nano``. A name given explicitly never falls back.
        pretrained: False builds the architecture of that name with random weights, positions included.
        frames: frames of a clip (10 ms each); None keeps the checkpoint's own length. Tokens are
            2 + (112 / stride + 1) * ((frames - 16) / stride + 1), divisions rounded down.
        frequency_stride: step of the 16 x 16 patches in mel bins; None keeps the checkpoint's.
        time_stride: step of the patches in frames; None keeps the checkpoint's.
        zero_positions: set the position table to zero, as the runs of the PETL paper have it (the loader of that time
            dropped a table of another length and left zeros, which stayed frozen).

    Raises:
        ScionError: for a name that is unknown, cannot be fetched within seconds, or holds no safetensors.
    """

    def __init__(self, name: str = "auto", pretrained: bool = True, frames: int | None = None,
                 frequency_stride: int | None = None, time_stride: int | None = None,
                 zero_positions: bool = False) -> None:
        super().__init__()
        for key, value, least in (("frames", frames, 16), ("frequency_stride", frequency_stride, 1),
                                  ("time_stride", time_stride, 1)):
            if value is not None and value < least:
                raise ScionError(f"backbone.{key}: {value} is too small, at least {least} wanted")
        note = None
        if name == "auto":
            name, note = hub.auto(DEFAULT, reachable)
        model, kind = _pretrained(name) if pretrained else (_random(name), "random")
        config = model.config
        _fit(model, frames or config.max_length, frequency_stride or config.frequency_stride,
             time_stride or config.time_stride)
        if zero_positions:
            nn.init.zeros_(model.embeddings.position_embeddings)
        self.model = model
        self.dim = config.hidden_size
        self.frames, self.bins = config.max_length, config.num_mel_bins
        self.origin = {"name": name, "pretrained": pretrained, "kind": kind, **({"note": note} if note else {})}

    @classmethod
    def outline(cls, name: str) -> tuple[Sequence[str], int] | None:
        return (ROLES, SHAPES[name]["num_hidden_layers"]) if name in SHAPES else None

    def forward(self, inputs: Tensor) -> Tensor:
        """filterbank [batch, frames, bins] -> features [batch, dim]"""
        if inputs.dim() != 3 or inputs.shape[1:] != (self.frames, self.bins):
            raise ScionError(f"backbone AST wants filterbanks [batch, {self.frames}, {self.bins}], got "
                             f"{list(inputs.shape)}: set backbone.frames to the data's frames")
        return self.model(inputs).last_hidden_state.mean(dim=1)


def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The position table [1, 2 + F * T, dim] of a grid ``old`` = (F, T) for a grid ``new``.

    As AST's authors do it: an axis that shrinks is cut from the middle, one that grows is interpolated bilinearly. The
    two special positions (class and distillation token) stay.
    """
    special, grid = table[:, :2], table[:, 2:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)  # [1, dim, F, T]
    for axis, (have, want) in enumerate(zip(old, new, strict=True), start=2):
        if want < have:
            grid = grid.narrow(axis, (have - want) // 2, want)
    if grid.shape[2:] != new:
        grid = nn.functional.interpolate(grid, size=new, mode="bilinear", align_corners=False)
    return torch.cat([special, grid.flatten(2).transpose(1, 2)], dim=1)


def grid_of(config: Any) -> tuple[int, int]:
    """Patches along (frequency, time)."""
    patch = config.patch_size
    return ((config.num_mel_bins - patch) // config.frequency_stride + 1,
            (config.max_length - patch) // config.time_stride + 1)


def _fit(model: Model, frames: int, frequency_stride: int, time_stride: int) -> None:
    """Set clip length and strides of ``model`` in place."""
    config, embeddings = model.config, model.embeddings
    old = grid_of(config)
    config.max_length, config.frequency_stride, config.time_stride = frames, frequency_stride, time_stride
    embeddings.patch_embeddings.projection.stride = (frequency_stride, time_stride)
    if grid_of(config) != old:
        table = resize_positions(embeddings.position_embeddings.detach(), old, grid_of(config))
        embeddings.position_embeddings = nn.Parameter(table.contiguous())


def _random(name: str) -> Model:
    # on the CPU: importing transformers imports torchaudio, which keeps a constant tensor that must not be a meta one
    with torch.device("cpu"):
        from transformers import ASTConfig, ASTModel

    if name not in SHAPES and not os.path.isfile(Path(name) / "config.json"):
        raise ScionError(f"backbone.name: no shapes are known for {name!r}{nearest(name, SHAPES)}; with pretrained: "
                         f"false a folder with config.json or one of {listed(SHAPES)} is wanted")
    try:
        config = ASTConfig(**SHAPES[name]) if name in SHAPES else ASTConfig.from_pretrained(name)
        config._attn_implementation = "sdpa"
        model = ASTModel(config)
    except Exception as error:  # of a folder's config.json, which may hold anything
        raise ScionError(f"backbone.name: {name!r}: its config.json gives no AST ({hub.first_line(error)})") from None
    embeddings = model.embeddings
    # transformers leaves these zero, for a checkpoint to fill; AST's authors draw them
    for table in (embeddings.position_embeddings, embeddings.cls_token, embeddings.distillation_token):
        nn.init.trunc_normal_(table, std=config.initializer_range)
    return model


def _pretrained(name: str) -> tuple[Model, str]:
    """The model of that name with its weights, and where they came from: nano, local or hub."""
    source = hub.find(name, WANTED, ask=reachable)
    model = hub.load(source, WANTED, ["audio-spectrogram-transformer"], _model_class, attn_implementation="sdpa")
    return model, source.kind


def _model_class(_: str) -> Any:
    from transformers import ASTModel

    return ASTModel
