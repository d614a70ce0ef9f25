"""The model of a finished run, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.adapters.load import (
    Content,
    Saved,
    attach,
    load_tensors,
    open_adapter,
    refusal,
    restore,
)
from core.adapters.rehearsal import SMALL, hollow, largest, reach, rehearsing
from core.anatomy import dissect
from core.backbone import Backbone
from core.errors import ScionError
from core.method.beside import OUTSIDE
from core.record import signature
from core.tasks.base import Task
from core.training.finetuner import FineTuner
from core.training.head_files import load_outside
from core.training.recorded_model import build, published


def load_run(folder: str, device: str = "cpu", task: dict[str, Any] | None = None) -> FineTuner:
    """The model of a finished run, from the folder that ``lightning run`` left.

    ``task`` holds arguments of the task that are to be other ones than in the run (its metrics, say).

    Nothing is built but what ``core.tasks`` and the installed domains publish, and the methods of the registry.

    Raises:
        ScionError: a damaged adapter, or a backbone that only its own program can build.
    """
    path = Path(folder) / "adapter"
    if not path.is_dir():
        raise ScionError(f"{folder}: no adapter.json in a folder adapter here; give the folder of a run")
    saved = open_adapter(path)
    model = saved.record.get("model") or {}
    if task and model.get("task"):
        model["task"] = {**model["task"], **task}
    if not model.get("backbone") or not model.get("task"):
        raise ScionError(f"{path}: the record does not say how to build backbone and task (they are no domain's); "
                         "build the backbone and use core.load_adapter")
    try:
        _rehearse(saved, str(path))
        tuner = _around_backbone(model, build(model["backbone"], model["seed"], Backbone))
        own = {name: tensor for name, tensor in saved.tensors.items() if not name.startswith(OUTSIDE)}
        restore(saved.record, own, tuner.backbone, where=str(path), check_whole=saved.check_whole)
        _prepare_head(tuner)
        load_outside(tuner, saved.tensors, str(path))
    except Exception as error:
        what = str(refusal(error)).removeprefix(f"{path}: ")
        raise ScionError(f"{path}: {what}") from (None if isinstance(error, ScionError) else error)
    return tuner.to(device).eval()


def _around_backbone(model: dict[str, Any], backbone: Any) -> FineTuner:
    """What a record says of a run's model, around its backbone."""
    task = build(model["task"], model["seed"], Task)
    return FineTuner(backbone, task, model["classes"], model["multilabel"], seed=model["seed"], info=model.get("info"))


def _prepare_head(tuner: FineTuner) -> None:
    """The head as inference has it, for the methods that are attached."""
    tuner.fit_head()
    for name in tuner.task.training_only:  # the file does not hold it, and untrained it means nothing
        setattr(tuner.task, name, None)


def _rehearse(saved: Saved, where: str) -> None:
    """Refuse a run whose backbone would be absurdly large, or whose methods or head have other shapes than the tensors
    of the file, before any of it takes memory (`core.adapters.rehearsal`)."""
    model = saved.record["model"]
    sizes = [largest(model["backbone"]), largest(model["task"]), len(model["classes"]),
             *(reach(spec["config"]) for spec in saved.record["methods"])]
    if max(sizes) <= USUAL:
        return
    with rehearsing(len(saved.tensors) + USUAL):
        backbone = hollow_backbone(model["backbone"], model["seed"])
        tuner = _around_backbone(model, backbone)
        content = Content.of(saved.record, hollow(saved.tensors), dissect(backbone))
        attach(content.specs, backbone, done := [])
        load_tensors(done, content, where, write=False)
        _prepare_head(tuner)
        load_outside(tuner, hollow(saved.tensors), where, write=False)

USUAL = 2048
"""Sizes up to which nothing that a record describes takes much memory."""

MARGIN = 4
"""How many times as many numbers a backbone may have with its recorded arguments as with its name alone."""


def hollow_backbone(recorded: dict[str, Any], seed: int) -> Backbone:
    """The recorded backbone on the meta device, where it is about as large as its name says."""
    cls = published(recorded, Backbone)
    untrained = {"pretrained": False} if "pretrained" in signature(cls).parameters else {}
    name = {"name": recorded["name"]} if "name" in recorded else {}
    backbone = build({**recorded, **untrained}, seed, Backbone)
    usual = build({"class": recorded["class"], **name, **untrained}, seed, Backbone)
    numbers, limit = (sum(p.numel() for p in one.parameters()) for one in (backbone, usual))
    if numbers > MARGIN * limit + SMALL:
        raise ScionError(f"the backbone would have {numbers:,} numbers with its recorded arguments, and "
                         f"{recorded.get('name', recorded['class'])} has {limit:,}")
    return backbone
