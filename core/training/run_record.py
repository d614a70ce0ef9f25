"""What a finished run leaves: its metrics, its pictures, its adapter."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core import report
from core.adapters.load import adapter_bytes, save_adapter, versions
from core.config import Point
from core.data import DataModule, bounded
from core.files import write_json
from core.method import Home, methods_on
from core.training import gallery as pictures
from core.training.finetuner import FineTuner
from core.training.head_files import outside
from core.training.recorded_model import model_record
from core.training.run_folder import FORMAT, RunFolder, copy_adapter
from core.training.stages import Stage, StageResult, stage_folder


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
            counts[key] = counts[key] + value if key != "head" else max(counts[key], value)
    beside = {id(p): p for p in tuner.beside_inference()}
    counts["beside"] = sum(p.numel() for p in beside.values() if p.requires_grad)
    inside = {id(p) for p in tuner.backbone.parameters()} | set(beside)
    counts["head"] += sum(p.numel() for p in tuner.parameters() if p.requires_grad and id(p) not in inside)
    added = {id(p) for p in tuner.backbone.peft.parameters()} if hasattr(tuner.backbone, "peft") else set()  # type: ignore[union-attr]
    counts["backbone"] = sum(p.numel() for p in tuner.backbone.parameters() if id(p) not in added)
    return counts


def save_run_adapter(tuner: FineTuner, folder: Path) -> None:
    """The adapter of a run: its methods, the task head, and what rebuilds backbone and task."""
    save_adapter(methods_on(tuner), folder, outside(tuner), model_record(tuner))


def write_record(point: Point, folder: RunFolder, stages: list[Stage], results: list[StageResult], outcome: Outcome
            ) -> dict[str, Any]:
    """Write pictures and metrics.json, the latter last: it makes the run a finished one."""
    tuner, data, path = outcome.tuner, outcome.data, folder.path
    home: Home = tuner.backbone.peft  # type: ignore[assignment]
    title = f"{point.name} on {tuner.backbone.origin.get('name')}, {report.data_named(data.origin)}"
    rows = [{**row, **({"stage": stage.name} if stage.name else {})}
            for stage, result in zip(stages, results, strict=True) for row in result.rows]
    report.curves(rows, path / "curves.png", title)
    confusion = outcome.tables.get("test/confusion")
    if confusion is not None:
        report.confusion(confusion, data.classes, path / "confusion.png", title)
    pictures.of_run(tuner, data, path / "pictures.png", title)
    write_json(path / "data_state.json", data.state(), indent=None)
    write_json(path / "history.json", [_finite(row) for row in rows], indent=None)
    if stages[-1].name:  # the last stage's adapter is the run's
        copy_adapter(stage_folder(folder, stages[-1]) / "adapter", path / "adapter")
    notes = [origin["note"] for origin in (data.origin, tuner.backbone.origin) if "note" in origin]
    notes += _shortened(stages[-1].config["trainer"])
    metrics = {
        "format": FORMAT, "status": "finished", "config_hash": point.hash, "select": point.config["select"],
        "data": dict(data.origin), "backbone": {**tuner.backbone.origin, "fingerprint": home.fingerprint},
        "peft": [method.spec() for method in tuner.methods], "parameters": outcome.parameters,
        "adapter_bytes": adapter_bytes(path / "adapter"),
        "metrics": {split: _finite(values) for split, values in outcome.metrics.items()},
        "seconds": round(sum(result.seconds for result in results), 2), "peak_memory_bytes": peak_memory(),
        "versions": versions(), "warnings": notes,
    }
    if data.skipped:
        metrics["data"]["skipped"] = bounded(data.skipped, 1000)
    if outcome.best_epoch is not None:
        metrics["selected_epoch"] = outcome.best_epoch
    if len(stages) > 1:
        metrics["stages"] = {stage.name: {"parameters": result.parameters, "metrics": result.metrics,
                                          "seconds": result.seconds}
                             for stage, result in zip(stages, results, strict=True)}
    figures = {method.name: _finite(method.figures()) for method in tuner.methods}
    if any(figures.values()):
        metrics["figures"] = {name: found for name, found in figures.items() if found}
    write_json(path / "metrics.json", metrics)
    return metrics


def _shortened(arguments: dict[str, Any]) -> list[str]:
    """What of the Trainer's arguments lets a run see only a part of its data."""
    whole = {"fast_dev_run": (None, False, 0), "overfit_batches": (None, 0), "limit_train_batches": (None, 1.0),
             "limit_val_batches": (None, 1.0), "limit_test_batches": (None, 1.0)}
    given = {name: arguments[name] for name in whole if name in arguments}
    return [f"trainer.{name} {value}: not all of the data was used" for name, value in given.items()
            if not any(value == one and type(value) is type(one) for one in whole[name])]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with None for numbers that JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()}


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
