"""What can be said against a run's stages before the first of them is trained: what one leaves must fit the next."""

from __future__ import annotations

import json
from typing import Any

from core.adapters.reading import base_of
from core.anatomy import dissect
from core.backbone import Backbone
from core.config import Point
from core.config import make as make_part
from core.data import DataModule
from core.errors import ScionError
from core.method.beside import OUTSIDE
from core.training.assemble import assemble, make_backbone
from core.training.finetuner import FineTuner
from core.training.head_files import outside
from core.training.stages import MakeMethods, Stage


def check_stages(point: Point, stages: list[Stage], make: MakeMethods) -> None:
    """Refuse stages of which one cannot begin with what an earlier one leaves. Backbones are built where those of the
    two differ; heads, for which data may have to be read, where ``carry`` names the head and task or data differ.

    Raises:
        ScionError: another encoder, or a head of another shape that ``carry`` asks for.
    """
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.start is None or not stage.carry:
            continue
        before = by_name[stage.start]
        has_other_backbone = _backbone(stage) != _backbone(before)
        has_other_head = stage.asks_for_head and _text(stage, "model", "data") != _text(before, "model", "data")
        if has_other_backbone and "weights" in stage.carry:
            _check_encoder(stage, _build_backbone(point, before), _build_backbone(point, stage))
        if has_other_head:
            _check_head(stage, _build(point, before, make), _build(point, stage, make))


def _text(stage: Stage, *keys: str) -> str:
    """A part of a stage's configuration, to compare."""
    return json.dumps([stage.config.get(key) for key in keys], sort_keys=True, default=str)


def _backbone(stage: Stage) -> str:
    return json.dumps(stage.config["model"]["backbone"], sort_keys=True, default=str)


def _build(point: Point, stage: Stage, make: MakeMethods) -> FineTuner:
    return assemble(point, stage.config, read=False, methods=make(stage.config)).tuner


def _build_backbone(point: Point, stage: Stage) -> Backbone:
    data = make_part(stage.config["data"], "data", point.domain, DataModule)
    return make_backbone(stage.config, point.domain, data)


def _check_encoder(stage: Stage, before: Backbone, here: Backbone) -> None:
    there, own = base_of(dissect(before)), base_of(dissect(here))
    if not own.agrees(there.record(), from_root=False):
        raise ScionError(f"stages.{stage.name}: its encoder is another one than that of {stage.start} (fingerprint "
                         f"{own.described}, there {there.described}), so that its methods cannot be carried on; take "
                         "the same one, or write start: base")


def _check_head(stage: Stage, before: FineTuner, here: FineTuner) -> None:
    there, own = _shapes(before), _shapes(here)
    if there != own:
        raise ScionError(f"stages.{stage.name}.carry: the head of {stage.start} has {there}, and this one's has {own}; "
                         "write carry: [weights]")


def _shapes(tuner: FineTuner) -> dict[str, Any]:
    """The shapes of the head's tensors, by their names."""
    return {name.removeprefix(OUTSIDE): list(tensor.shape) for name, tensor in outside(tuner).items()}
