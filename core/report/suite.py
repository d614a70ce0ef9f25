"""The table of a suite of tasks, as VTAB-1k's papers print it: every task, the mean of each group, and both overall
means, that of all tasks and that of the groups, which papers are apt to confuse."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.report.text import bytes_text, duration_text, is_repetition, methods_named, scalars, trained, value_text

UNKNOWN = "failed everywhere"
"""Stands for the group of tasks that no run finished: it might be any, so that no group's mean is known."""
WIDEST = 8
"""Settings that stand side by side, each in a column; more of them take a row each."""


@dataclass
class Cell:
    """One task under one setting: the metric of each repetition, by its seed or fold."""

    values: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values.values()) if self.values else None


@dataclass
class Suite:
    """The results of settings (methods, scales) on the tasks of a suite.

    Args:
        axis: the axis of the tasks.
        groups: group -> its tasks, both in the order in which they came.
        metric: what was measured, ``test accuracy``.
        cells: setting -> task -> results.
        extras: setting -> mean trained parameters, mean bytes of an adapter, seconds of all runs.
    """

    axis: str
    groups: dict[str, list[str]]
    metric: str
    cells: dict[str, dict[str, Cell]]
    extras: dict[str, dict[str, float | None]]

    @property
    def tasks(self) -> list[str]:
        return [task for tasks in self.groups.values() for task in tasks]

    def means(self, setting: str, values: dict[str, float | None]) -> dict[str, float | None]:
        """The means over ``values`` of tasks: of each group, of all tasks, of the groups; None where one is missing."""
        found: dict[str, float | None] = {group: _mean([values[task] for task in tasks]) if UNKNOWN not in self.groups
                                          else None for group, tasks in self.groups.items() if group != UNKNOWN}
        overall = {f"mean of {len(self.tasks)} tasks": _mean([values[task] for task in self.tasks])}
        if len(found) > 1:
            overall[f"mean of {len(found)} groups"] = _mean(list(found.values()))
        return {**found, **overall}

    def line(self, setting: str) -> dict[str, dict[str, Any]]:
        """Every task and every mean -> ``{"mean", "sd", "n", "values"}``, the deviation over repetitions (n - 1)."""
        cells = self.cells[setting]
        line = {task: _result(list(cells[task].values.values())) for task in self.tasks}
        repetitions = list(dict.fromkeys(key for cell in cells.values() for key in cell.values))
        single = [self.means(setting, {task: cells[task].values.get(key) for task in self.tasks})
                  for key in repetitions]
        whole = self.means(setting, {task: cells[task].mean for task in self.tasks})
        for name, mean in whole.items():
            found = [value for one in single if (value := one[name]) is not None]
            line[name] = {**_result(found), "mean": mean}
        return line


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _result(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values) if values else None, "n": len(values), "values": values,
            "sd": statistics.stdev(values) if len(values) > 1 else None}


def gather(points: Sequence[dict[str, Any]]) -> Suite | None:
    """The suite that ``points`` (see `report.table`) ran over, or None where none of the axes is one of its tasks."""
    done = [point for point in points if point.get("metrics")]
    if not done or not all((point["metrics"].get("data") or {}).get("group") for point in done):
        return None
    axis = next((axis for axis in done[0]["axes"] if all(
        value_text(point["axes"].get(axis)) == point["metrics"]["data"].get("task") for point in done)), None)
    if axis is None:
        return None
    groups: dict[str, list[str]] = {}
    for point in done:
        tasks = groups.setdefault(point["metrics"]["data"]["group"], [])
        if (task := point["metrics"]["data"]["task"]) not in tasks:
            tasks.append(task)
    known = {task for tasks in groups.values() for task in tasks}
    failed = list(dict.fromkeys(value_text(point["axes"][axis]) for point in points if axis in point["axes"]))
    if lost := [task for task in failed if task not in known]:
        groups[UNKNOWN] = lost
    tested = any(scalars(point["metrics"]["metrics"].get("test")) for point in done)
    split = "test" if tested else "validation"
    measured = next(iter(scalars(done[0]["metrics"]["metrics"].get(split))), "")
    suite = Suite(axis, groups, f"{split} {measured}", {}, {})
    runs: dict[str, list[dict[str, Any]]] = {}
    for point in done:
        setting = _setting(point, axis)
        cells = suite.cells.setdefault(setting, {task: Cell() for task in suite.tasks})
        value = scalars(point["metrics"]["metrics"].get(split)).get(measured)
        if value is not None:
            repetition = {key: one for key, one in point["axes"].items() if is_repetition(key)}
            cells[point["metrics"]["data"]["task"]].values[json.dumps(repetition, sort_keys=True, default=str)] = value
        runs.setdefault(setting, []).append(point["metrics"])
    for setting, found in runs.items():
        suite.extras[setting] = {
            "trained": statistics.fmean(map(trained, found)),
            "bytes": statistics.fmean(run.get("adapter_bytes") or 0 for run in found),
            "seconds": sum(run.get("seconds") or 0 for run in found)}
    return suite


def _setting(point: dict[str, Any], axis: str) -> str:
    axes = {key: value for key, value in point["axes"].items() if key != axis and not is_repetition(key)}
    named = [value_text(value) if key == "peft" else f"{key.rpartition('.')[2]}={value_text(value)}"
             for key, value in axes.items()]
    return ", ".join(named) or methods_named(point["metrics"].get("peft")) or "all"


def cells_of(suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, metrics between 0 and 1 in percent: a column for each setting, or where there are
    many a row."""
    lines = {setting: suite.line(setting) for setting in suite.cells}
    percent = all(0 <= value <= 1 for line in lines.values() for found in line.values() for value in found["values"])
    names: list[tuple[str, str]] = []  # what stands in the table, and its title
    for group, tasks in suite.groups.items():
        names += [*((task, task) for task in tasks), *([(group, f"{group} mean")] if group != UNKNOWN else [])]
    names += [(name, name) for name in next(iter(lines.values())) if name.startswith("mean of ")]

    def shown(found: dict[str, Any]) -> str:
        if found["mean"] is None:
            return "-"
        scale, digits = (100, 1) if percent else (1, 4)
        spread = f" ± {found['sd'] * scale:.{digits}f}" if found["sd"] is not None else ""
        return f"{found['mean'] * scale:.{digits}f}{spread}"

    columns = [[setting, *(shown(lines[setting][name]) for name, _ in names), f"{extra['trained'] or 0:,.0f}",
                bytes_text(extra["bytes"] or 0), duration_text(extra["seconds"] or 0)]
               for setting, extra in suite.extras.items()]
    titles = [f"{suite.metric}{', %' if percent else ''}", *(title for _, title in names), "trained", "adapter",
              "time of all runs"]
    if len(columns) > WIDEST:
        return titles, columns
    turned = [list(row) for row in zip(titles, *columns, strict=True)]
    return turned[0], turned[1:]


def notes_of(suite: Suite) -> list[str]:
    """What a reader has to know, and where validation was measured the best setting for each task."""
    notes = ["trained parameters (without the head) and bytes of an adapter are means over the tasks"]
    if suite.metric.startswith("validation") and len(suite.cells) > 1:
        best = {task: max((setting for setting in suite.cells if suite.cells[setting][task].values),
                          key=lambda setting, task=task: suite.cells[setting][task].mean or 0.0, default="-")
                for task in suite.tasks}
        notes.append("best on validation: " + "; ".join(f"{task}: {setting}" for task, setting in best.items()))
    return notes


def rows_of(suite: Suite, overall: bool = False) -> list[dict[str, Any]]:
    """A row for each setting as `report.table` has them, with every task and mean as a metric, or the ``overall`` means
    alone."""
    found = []
    for setting in suite.cells:
        line = {name: one for name, one in suite.line(setting).items()
                if one["mean"] is not None and (not overall or name.startswith("mean of "))}
        found.append({"label": setting, "axes": {"setting": setting}, "n": max((one["n"] for one in line.values()),
                      default=0), "failed": 0, "metrics": line, **suite.extras[setting]})
    return found
