"""What a finished run leaves: its metrics, its pictures, its adapter."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import report
from core.adapters.load import adapter_bytes, save_adapter, versions
from core.config import Point
from core.data import DataModule, bounded
from core.files import write_json
from core.method import Home, methods_on
from core.method.saving import tokenizer_of
from core.training import examples
from core.training import gallery as pictures
from core.training.finetuner import FineTuner
from core.training.head_files import outside
from core.training.recorded_model import model_record
from core.training.run_folder import FORMAT, RunFolder, copy_adapter
from core.training.stages import Stage, StageResult, stage_folder

WHOLE = {
    "fast_dev_run": (None, False, 0),
    "overfit_batches": (None, 0),
    "limit_train_batches": (None, 1.0),
    "limit_val_batches": (None, 1.0),
    "limit_test_batches": (None, 1.0),
}
"""Arguments of the Trainer that may leave out data, with their values that leave out none."""


@dataclass
class Outcome:
    """What a finished stage leaves for the report."""

    tuner: FineTuner
    data: DataModule
    rows: list[dict[str, float]]
    parameters: dict[str, int]
    metrics: dict[str, dict[str, float]]
    seconds: float
    best_epoch: int | None = None
    """The epoch that ``select: best`` has chosen."""
    tables: dict[str, Any] = field(default_factory=dict)


def count(tuner: FineTuner) -> dict[str, int]:
    """Trained parameters by owner, over all methods (``beside`` are those that only training needs), and the size of
    the backbone."""
    counts = {"method": 0, "norms": 0, "head": 0, "stored": 0}
    for method in tuner.methods:
        for key, value in method.counts().items():
            if key == "head":  # all methods count the same head
                counts["head"] = max(counts["head"], value)
            else:
                counts[key] += value
    # By identity: tensors that are compared are compared number by number.
    beside = {id(p): p for p in tuner.beside_inference()}
    counts["beside"] = _numbers(p for p in beside.values() if p.requires_grad)
    inside = {id(p) for p in tuner.backbone.parameters()}
    inside.update(beside)
    in_head = [p for p in tuner.parameters() if p.requires_grad and id(p) not in inside]
    counts["head"] += _numbers(in_head)
    for name, head in getattr(tuner.task, "heads", {}).items():  # several heads are counted by name as well
        counts[f"head/{name}"] = _numbers(p for p in head.parameters() if p.requires_grad)
    added: set[int] = set()
    if hasattr(tuner.backbone, "peft"):
        home: Home = tuner.backbone.peft  # type: ignore[assignment]
        added = {id(p) for p in home.parameters()}
    counts["backbone"] = _numbers(p for p in tuner.backbone.parameters() if id(p) not in added)
    return counts


def _numbers(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def save_run_adapter(tuner: FineTuner, folder: Path) -> None:
    """The adapter of a run: its methods, the task head, and what rebuilds backbone and task."""
    save_adapter(methods_on(tuner), folder, outside(tuner), model_record(tuner))


def write_record(point: Point, folder: RunFolder, stages: list[Stage], results: list[StageResult], outcome: Outcome
            ) -> dict[str, Any]:
    """Write pictures and metrics.json, the latter last: it makes the run a finished one."""
    data, path = outcome.data, folder.path
    rows = _rows(stages, results)
    _draw(point, outcome, rows, path)
    write_json(path / "data_state.json", data.state(), indent=None)
    write_json(path / "history.json", [_finite(row) for row in rows], indent=None)
    last = stages[-1]
    if last.name:  # the last stage's adapter is the run's
        copy_adapter(stage_folder(folder, last) / "adapter", path / "adapter")
    metrics = _metrics(point, stages, results, outcome, path)
    write_json(path / "metrics.json", metrics)
    return metrics


def _rows(stages: list[Stage], results: list[StageResult]) -> list[dict[str, Any]]:
    """What was logged, in order; each row says its stage where there are stages."""
    rows = []
    for stage, result in zip(stages, results, strict=True):
        for logged in result.rows:
            row = dict(logged)
            if stage.name:
                row["stage"] = stage.name
            rows.append(row)
    return rows


def _draw(point: Point, outcome: Outcome, rows: list[dict[str, Any]], path: Path) -> None:
    tuner, data = outcome.tuner, outcome.data
    backbone = tuner.backbone.origin.get("name")
    title = f"{point.name} on {backbone}, {report.data_named(data.origin)}"
    report.curves(rows, path / "curves.png", title)
    confusion = outcome.tables.get("test/confusion")
    if confusion is not None:
        report.confusion(confusion, data.classes, path / "confusion.png", title)
    pictures.of_run(tuner, data, path / "pictures.png", title)
    examples.of_run(tuner, data, path / "examples.md", title)


def _metrics(point: Point, stages: list[Stage], results: list[StageResult], outcome: Outcome, path: Path
             ) -> dict[str, Any]:
    """The content of metrics.json."""
    tuner, data = outcome.tuner, outcome.data
    home: Home = tuner.backbone.peft  # type: ignore[assignment]
    measured = {split: _finite(values) for split, values in outcome.metrics.items()}
    seconds = sum(result.seconds for result in results)
    metrics: dict[str, Any] = {
        "format": FORMAT,
        "status": "finished",
        "config_hash": point.hash,
        "select": stages[-1].config["select"],
        "data": dict(data.origin),
        "backbone": {**tuner.backbone.origin, "fingerprint": home.base_now().described},
        "peft": [method.spec() for method in tuner.methods],
        "parameters": outcome.parameters,
        "adapter_bytes": adapter_bytes(path / "adapter"),
        "metrics": measured,
        "seconds": round(seconds, 2),
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "warnings": _warnings(tuner, data, stages[-1]),
    }
    tokenizer = tokenizer_of(tuner.backbone)
    if tokenizer is not None:
        metrics["backbone"]["tokenizer"] = tokenizer
    if data.skipped:
        metrics["data"]["skipped"] = bounded(data.skipped, 1000)
    if outcome.best_epoch is not None:
        metrics["selected_epoch"] = outcome.best_epoch
    if len(stages) > 1:
        metrics["stages"] = _results_by_stage(stages, results)
    figures = {method.name: _finite(method.figures()) for method in tuner.methods}
    given = {name: found for name, found in figures.items() if found}
    if given:
        metrics["figures"] = given
    return metrics


def _warnings(tuner: FineTuner, data: DataModule, last: Stage) -> list[str]:
    """What data and backbone say of themselves, and what made the last stage see less than all data."""
    origins = (data.origin, tuner.backbone.origin)
    notes = [origin["note"] for origin in origins if "note" in origin]
    return notes + _limits(last.config["trainer"])


def _limits(arguments: dict[str, Any]) -> list[str]:
    """What of the Trainer's arguments lets a run see only a part of its data."""
    found = []
    for name, harmless in WHOLE.items():
        if name in arguments and not _is_one_of(arguments[name], harmless):
            found.append(f"trainer.{name} {arguments[name]}: not all of the data was used")
    return found


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # Also by type: a limit of 1 is one batch, one of 1.0 is all batches, and Python holds them for equal.
    return any(value == one and type(value) is type(one) for one in values)


def _results_by_stage(stages: list[Stage], results: list[StageResult]) -> dict[str, dict[str, Any]]:
    by_stage = {}
    for stage, result in zip(stages, results, strict=True):
        by_stage[stage.name] = {
            "parameters": result.parameters,
            "metrics": result.metrics,
            "seconds": result.seconds,
        }
    return by_stage


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with None for numbers that JSON does not have."""
    found = {}
    for key, value in values.items():
        is_finite = not isinstance(value, float) or math.isfinite(value)
        found[key] = value if is_finite else None
    return found


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on a Mac, in KiB on Linux.
    return peak if sys.platform == "darwin" else peak * 1024
