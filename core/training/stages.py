"""The stages of a run: one fit each, the next one beginning with what an earlier one left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.config import Point
from core.errors import ScionError, listed
from core.method import PEFTMethod
from core.method.abilities import Staged
from core.training.assemble import make_methods
from core.training.run_folder import RunFolder, read_done


@dataclass
class Stage:
    """One fit within a run. ``start`` names the stage whose result it begins with, ``carry`` what of it."""

    name: str
    config: dict[str, Any]
    start: str | None = None
    carry: tuple[str, ...] = ("weights", "head")
    advance: bool = False
    """Whether the methods are carried on into their own next stage after it."""


def stages_of(point: Point, methods: Sequence[PEFTMethod] | None = None) -> list[Stage]:
    """The stages that a configuration lists, or those that its method needs; one nameless stage otherwise.

    Args:
        point: the run.
        methods: those of its configuration, where they are made already.
    """
    config = {key: value for key, value in point.config.items() if key != "stages"}
    listed_stages = point.config.get("stages")
    if listed_stages:
        return _listed(config, listed_stages)
    if methods is None:
        methods = make_methods(config, point.domain)
    staged = [method for method in methods if isinstance(method, Staged) and method.stages]
    if not staged:
        return [Stage("", config)]
    # Of several staged methods all go through the same stages: `core.config.checks` has seen to that.
    names = staged[0].stages
    found = []
    for number, name in enumerate(names):
        start = names[number - 1] if number else None
        found.append(Stage(name, config, start, carry=("weights",), advance=name != names[-1]))
    return found


def _listed(config: dict[str, Any], stages: dict[str, Any]) -> list[Stage]:
    """The stages of a configuration, each with what it says beside the rest."""
    found: list[Stage] = []
    for name, settings in stages.items():
        own = dict(settings)
        start, carry = own.pop("start", "previous"), own.pop("carry", ["weights", "head"])
        known = [stage.name for stage in found]
        if start not in ("previous", "base", *known):
            raise ScionError(f"stages.{name}.start: {start!r} is neither 'previous', 'base' nor an earlier stage "
                             f"({listed(known)})")
        wrong = [word for word in carry if word not in ("weights", "head")]
        if wrong:
            raise ScionError(f"stages.{name}.carry: {wrong[0]!r} is neither 'weights' nor 'head'")
        begins_with = start
        if start == "base" or not found:
            begins_with = None
        elif start == "previous":
            begins_with = found[-1].name
        found.append(Stage(name, {**config, **own}, begins_with, tuple(carry)))
    return found


@dataclass
class StageResult:
    """What a finished stage leaves for the run's record."""

    rows: list[dict[str, Any]]
    parameters: dict[str, int]
    metrics: dict[str, dict[str, float | None]]
    seconds: float


def stage_folder(folder: RunFolder, stage: Stage) -> Path:
    return folder.path / "stages" / stage.name if stage.name else folder.path


def finished_stages(point: Point, folder: RunFolder, stages: list[Stage]) -> list[StageResult]:
    """The results of the stages, from the first on, that were finished before an interruption."""
    found: list[StageResult] = []
    # The last one's result is metrics.json itself.
    for stage in stages[:-1]:
        done = stage_folder(folder, stage) / "done.json"
        if not done.is_file():
            break
        record = read_done(done)
        if record.get("config_hash", point.hash) != point.hash:
            raise ScionError(f"{done}: of another configuration ({record['config_hash']}, this is {point.hash}); "
                             "choose another folder or pass --overwrite")
        found.append(StageResult(record["rows"], record["parameters"], record["metrics"], record["seconds"]))
    return found
