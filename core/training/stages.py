"""The stages of a run: one fit each, the next one beginning with what an earlier one left.

A stage of a configuration is several fits where its method has stages of its own (``ranking.dense``,
``ranking.sparse``) or where it is repeated (``ranking.1``, ``ranking.2``). What starts from it begins with the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.config import Point, check_objective
from core.errors import ScionError, listed
from core.method import PEFTMethod
from core.method.abilities import Staged
from core.training.assemble import make_methods
from core.training.run_folder import RunFolder, read_done

CARRIED = ("weights", "head")
"""What a stage begins with of an earlier one: the methods' tensors, masks and structure, and the task's head."""
MakeMethods = Callable[[dict[str, Any]], list[PEFTMethod]]


@dataclass
class Stage:
    """One fit within a run. ``start`` names the one whose result it begins with, ``carry`` what of it."""

    name: str
    config: dict[str, Any]
    start: str | None = None
    carry: tuple[str, ...] = CARRIED
    own_stage: str = ""
    """The stage of its methods that it is, where they are carried on into their next one behind it."""
    objective: str = "task"
    """What it trains on: the task's loss, what methods add, or ``none``, which only prepares."""
    asks_for_head: bool = False
    """Whether ``carry`` says that the head comes along; else one of another shape is left behind."""


def stages_of(point: Point, methods: Sequence[PEFTMethod] | None = None, make: MakeMethods | None = None
              ) -> list[Stage]:
    """The stages that a configuration lists, or those that its method needs; one nameless stage otherwise.

    Args:
        point: the run.
        methods: those of its configuration, where they are made already.
        make: makes those of a stage's configuration, where stages are listed.

    Raises:
        ScionError: a stage that starts from what is not there, or whose methods cannot do what it asks for.
    """
    config = {key: value for key, value in point.config.items() if key != "stages"}
    listed_stages = point.config.get("stages")
    if listed_stages:
        plan = _Plan(config, make or (lambda own: make_methods(own, point.domain)))
        for name, settings in listed_stages.items():
            plan.add(name, settings)
        return plan.found
    if methods is None:
        methods = make_methods(config, point.domain)
    staged = _staged(methods)
    if not staged:
        return [Stage("", config)]
    # Of several staged methods all go through the same stages: `core.config.checks` has seen to that.
    names = staged[0].stages
    found = []
    for number, name in enumerate(names):
        start = names[number - 1] if number else None
        own_stage = "" if name == names[-1] else name
        found.append(Stage(name, config, start, carry=("weights",), own_stage=own_stage))
    return found


def _staged(methods: Sequence[PEFTMethod]) -> list[PEFTMethod]:
    return [method for method in methods if isinstance(method, Staged) and method.stages]


@dataclass
class _Plan:
    """The fits of a configuration's stages, one stage after the other."""

    config: dict[str, Any]
    make: MakeMethods
    found: list[Stage] = field(default_factory=list)
    last: dict[str, str] = field(default_factory=dict)
    """The last fit of each stage."""
    held: dict[str, set[str]] = field(default_factory=dict)
    """Names of the methods that each fit leaves."""

    def add(self, name: str, settings: dict[str, Any]) -> None:
        """The fits of one more stage."""
        own = dict(settings)
        start, asked = own.pop("start", "previous"), own.pop("carry", None)
        objective, repeat = own.pop("objective", "task"), own.pop("repeat", 1)
        carry = self._carry(name, asked)
        config = {**self.config, **own}
        begins_with = self._begins_with(name, start)
        before = self.held[begins_with] if begins_with is not None and "weights" in carry else set()
        methods = self.make(config)
        check_objective(objective, methods, f"stages.{name}.")
        # A method that is carried on by its name is behind its own stages already.
        staged = [method for method in _staged(methods) if method.name not in before]
        if staged and (repeat > 1 or objective == "none"):
            key = "repeat" if repeat > 1 else "objective"
            raise ScionError(f"stages.{name}.{key}: {staged[0].name} has stages of its own "
                             f"({listed(staged[0].stages)}), which are trained once, one after the other; leave it out")
        parts = [str(number) for number in range(1, repeat + 1)] if repeat > 1 else [""]
        if staged:
            parts = list(staged[0].stages)
        fits = [f"{name}.{part}" if part else name for part in parts]
        asks_for_head = asked is not None and "head" in carry
        for number, fit in enumerate(fits):
            stage = Stage(fit, config, begins_with, carry, objective=objective, asks_for_head=asks_for_head)
            if number:  # it goes on with what the one before it has left, whatever the stage began with
                stage.start, stage.carry = fits[number - 1], ("weights",) if staged else CARRIED
                stage.asks_for_head = False
            if staged and fit != fits[-1]:
                stage.own_stage = parts[number]
            self.found.append(stage)
            self.held[fit] = before | {method.name for method in methods}
        self.last[name] = fits[-1]

    @staticmethod
    def _carry(name: str, asked: list[str] | None) -> tuple[str, ...]:
        carry = CARRIED if asked is None else tuple(asked)
        wrong = [word for word in carry if word not in CARRIED]
        if wrong:
            raise ScionError(f"stages.{name}.carry: {wrong[0]!r} is neither 'weights' nor 'head'")
        return carry

    def _begins_with(self, name: str, start: str) -> str | None:
        """The fit that a stage begins with; None for the first one, and for one that begins anew."""
        if start not in ("previous", "base", *self.last):
            raise ScionError(f"stages.{name}.start: {start!r} is neither 'previous', 'base' nor an earlier stage "
                             f"({listed(self.last)})")
        if start == "base" or not self.found:
            return None
        return self.found[-1].name if start == "previous" else self.last[start]


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
