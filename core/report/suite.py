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
"""The group of tasks that no run finished: it might be any, so that no group's mean is known."""
WIDEST = 8
"""Settings that are shown side by side, each in a column; more of them take a row each."""
Point = dict[str, Any]
"""One run of several, as `report.table` takes them."""
Result = dict[str, Any]
Extras = dict[str, float | None]


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
    extras: dict[str, Extras]

    @property
    def tasks(self) -> list[str]:
        return [task for tasks in self.groups.values() for task in tasks]

    def means(self, setting: str, values: dict[str, float | None]) -> dict[str, float | None]:
        """The means over ``values`` of tasks: of each group, of all tasks, of the groups; None where one is missing."""
        of_groups: dict[str, float | None] = {}
        for group, tasks in self.groups.items():
            if group == UNKNOWN:
                continue
            # Some task's group is not known: it might be this one, whose mean would then lack a task.
            of_groups[group] = None
            if UNKNOWN not in self.groups:
                of_groups[group] = _mean([values[task] for task in tasks])
        of_all = [values[task] for task in self.tasks]
        overall = {f"mean of {len(of_all)} tasks": _mean(of_all)}
        if len(of_groups) > 1:
            group_means = list(of_groups.values())
            overall[f"mean of {len(group_means)} groups"] = _mean(group_means)
        return {**of_groups, **overall}

    def line(self, setting: str) -> dict[str, dict[str, Any]]:
        """Every task and every mean -> ``{"mean", "sd", "n", "values"}``, the deviation over repetitions (n - 1)."""
        cells = self.cells[setting]
        line: dict[str, Result] = {}
        for task in self.tasks:
            values = list(cells[task].values.values())
            line[task] = _result(values)
        repetitions = dict.fromkeys(key for cell in cells.values() for key in cell.values)
        single = []
        for key in repetitions:
            of_repetition = {task: cells[task].values.get(key) for task in self.tasks}
            single.append(self.means(setting, of_repetition))
        # The mean of a row is that of its tasks' means: a seed that failed on one task must not take away the others.
        # Its deviation needs repetitions that ran on every task.
        of_tasks = {task: cells[task].mean for task in self.tasks}
        whole = self.means(setting, of_tasks)
        for name, mean in whole.items():
            known = [means[name] for means in single]
            result = _result([value for value in known if value is not None])
            line[name] = {**result, "mean": mean}
        return line


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None where there is no value or one of them is missing."""
    known = [value for value in values if value is not None]
    is_complete = len(known) == len(values)
    return statistics.fmean(known) if known and is_complete else None


def _result(values: list[float]) -> Result:
    mean = statistics.fmean(values) if values else None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": mean, "n": len(values), "values": values, "sd": deviation}


# ------------------------------------------------------------------------------------------------- from runs


def gather(points: Sequence[dict[str, Any]]) -> Suite | None:
    """The suite that ``points`` (see `report.table`) ran over, or None where none of the axes is one of its tasks."""
    done = [point for point in points if point.get("metrics")]
    if not done or not all(_group_of(point) for point in done):
        return None
    axis = _axis_of_tasks(done)
    if axis is None:
        return None
    groups = _groups(done)
    failed_everywhere = _other_tasks(points, axis, groups)
    if failed_everywhere:
        groups[UNKNOWN] = failed_everywhere
    tested = any(_values_of(point, "test") for point in done)
    split = "test" if tested else "validation"
    # A suite has one metric: the first one of the first run.
    measured = next(iter(_values_of(done[0], split)), "")
    suite = Suite(axis, groups, f"{split} {measured}", {}, {})
    runs: dict[str, list[Point]] = {}
    for point in done:
        setting = _setting(point, axis)
        empty = {task: Cell() for task in suite.tasks}
        cells = suite.cells.setdefault(setting, empty)
        value = _values_of(point, split).get(measured)
        if value is not None:
            task = point["metrics"]["data"]["task"]
            cells[task].values[_repetition(point)] = value
        runs.setdefault(setting, []).append(point)
    for setting, found in runs.items():
        suite.extras[setting] = _extras(found)
    return suite


def _group_of(point: Point) -> str | None:
    data = point["metrics"].get("data") or {}
    return data.get("group")


def _values_of(point: Point, split: str) -> dict[str, float]:
    return scalars(point["metrics"]["metrics"].get(split))


def _axis_of_tasks(done: list[Point]) -> str | None:
    """The first axis whose value is, in every run, the name of the task that the run's data record."""
    for axis in done[0]["axes"]:
        if all(_names_the_task(point, axis) for point in done):
            return axis
    return None


def _names_the_task(point: Point, axis: str) -> bool:
    value = value_text(point["axes"].get(axis))
    return value == point["metrics"]["data"].get("task")


def _groups(done: list[Point]) -> dict[str, list[str]]:
    """Group -> its tasks, both in the order in which they came."""
    groups: dict[str, list[str]] = {}
    for point in done:
        data = point["metrics"]["data"]
        tasks = groups.setdefault(data["group"], [])
        if data["task"] not in tasks:
            tasks.append(data["task"])
    return groups


def _other_tasks(points: Sequence[Point], axis: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks that are in no group, since only a run that finishes records its group."""
    known = {task for tasks in groups.values() for task in tasks}
    others: list[str] = []
    for point in points:
        if axis not in point["axes"]:
            continue
        task = value_text(point["axes"][axis])
        if task not in known and task not in others:
            others.append(task)
    return others


def _repetition(point: Point) -> str:
    """The seed and fold of a run, as a key."""
    axes = {axis: value for axis, value in point["axes"].items() if is_repetition(axis)}
    # As text, since values may be lists and mappings, which are no keys of a dictionary.
    return json.dumps(axes, sort_keys=True, default=str)


def _extras(points: list[Point]) -> Extras:
    runs = [point["metrics"] for point in points]
    counts = [trained(run) for run in runs]
    sizes = [run.get("adapter_bytes") or 0 for run in runs]
    times = [run.get("seconds") or 0 for run in runs]
    return {"trained": statistics.fmean(counts), "bytes": statistics.fmean(sizes), "seconds": sum(times)}


def _setting(point: Point, task_axis: str) -> str:
    """A run's values on the axes that are neither its task nor a repetition, in words."""
    parts = []
    for axis, value in point["axes"].items():
        if axis == task_axis or is_repetition(axis):
            continue
        option = axis.rpartition(".")[2]
        text = value_text(value)
        if axis == "peft":  # a method's name says what it is, a number does not
            parts.append(text)
        else:
            parts.append(f"{option}={text}")
    methods = methods_named(point["metrics"].get("peft"))
    return ", ".join(parts) or methods or "all"


# ------------------------------------------------------------------------------------------------- to a table


def cells_of(suite: Suite) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, metrics between 0 and 1 in percent: a column for each setting, or where there are
    many a row."""
    lines = {setting: suite.line(setting) for setting in suite.cells}
    percent = _are_shares(lines)
    any_line = next(iter(lines.values()))
    titles = _titles(suite, any_line)
    columns = []
    for setting, extra in suite.extras.items():
        results = [_result_text(lines[setting][name], percent) for name, _ in titles]
        parameters = f"{extra['trained'] or 0:,.0f}"
        size = bytes_text(extra["bytes"] or 0)
        time = duration_text(extra["seconds"] or 0)
        columns.append([setting, *results, parameters, size, time])
    unit = ", %" if percent else ""
    names = [title for _, title in titles]
    header = [f"{suite.metric}{unit}", *names, "trained", "adapter", "time of all runs"]
    if len(columns) > WIDEST:
        return header, columns
    # Turned over: papers list the tasks from left to right, but a terminal has room for few columns.
    rows = [list(row) for row in zip(header, *columns, strict=True)]
    return rows[0], rows[1:]


def _are_shares(lines: dict[str, dict[str, Result]]) -> bool:
    """Whether all values are between 0 and 1."""
    for line in lines.values():
        for result in line.values():
            if not all(0 <= value <= 1 for value in result["values"]):
                return False
    return True


def _titles(suite: Suite, line: dict[str, Result]) -> list[tuple[str, str]]:
    """What the table shows, by its name in a line of the suite, with its title; each group's mean after its tasks."""
    titles: list[tuple[str, str]] = []
    for group, tasks in suite.groups.items():
        titles += [(task, task) for task in tasks]
        if group != UNKNOWN:
            titles.append((group, f"{group} mean"))
    titles += [(name, name) for name in line if _is_overall(name)]
    return titles


def _is_overall(name: str) -> bool:
    """Whether ``name`` is one of the overall means of `Suite.means`."""
    return name.startswith("mean of ")


def _result_text(result: Result, percent: bool) -> str:
    if result["mean"] is None:
        return "-"
    scale, digits = (100, 1) if percent else (1, 4)
    mean = f"{result['mean'] * scale:.{digits}f}"
    if result["sd"] is None:
        return mean
    return f"{mean} ± {result['sd'] * scale:.{digits}f}"


def notes_of(suite: Suite) -> list[str]:
    """What a reader has to know, and where validation was measured the best setting for each task."""
    notes = ["trained parameters (without the head) and bytes of an adapter are means over the tasks"]
    # Not on the test set: a choice by it would be tuned on it.
    if suite.metric.startswith("validation") and len(suite.cells) > 1:
        tasks = dict.fromkeys(suite.tasks)
        best = [f"{task}: {_best_setting(suite, task)}" for task in tasks]
        notes.append("best on validation: " + "; ".join(best))
    return notes


def _best_setting(suite: Suite, task: str) -> str:
    """The setting with the highest mean on ``task``, the first of equal ones; ``-`` where all failed."""
    means: dict[str, float] = {}
    for setting, cells in suite.cells.items():
        if cells[task].values:
            means[setting] = cells[task].mean or 0.0
    return max(means, key=means.__getitem__, default="-")


def rows_of(suite: Suite, overall: bool = False) -> list[dict[str, Any]]:
    """A row for each setting as `report.table` has them, with every task and mean as a metric, or with only the
    ``overall`` means."""
    rows = []
    for setting in suite.cells:
        metrics: dict[str, Result] = {}
        for name, result in suite.line(setting).items():
            if result["mean"] is not None and (not overall or _is_overall(name)):
                metrics[name] = result
        n = max((result["n"] for result in metrics.values()), default=0)
        row = {"label": setting, "axes": {"setting": setting}, "n": n, "failed": 0, "metrics": metrics}
        row.update(suite.extras[setting])
        rows.append(row)
    return rows
