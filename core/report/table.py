"""The table of many runs: as text, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.report import plots, suite
from core.report.plots import GREY, VALIDATION, write_whole
from core.report.summary import caution, reasons
from core.report.text import (
    aligned,
    bytes_text,
    duration_text,
    is_loss,
    is_repetition,
    methods_named,
    origin_of,
    scalars,
    trained,
    value_text,
)

if TYPE_CHECKING:  # matplotlib is loaded when something is drawn: it takes half a second
    from matplotlib.axes import Axes

Point = dict[str, Any]
Row = dict[str, Any]


def table(points: Sequence[dict[str, Any]], folder: str | Path | None = None) -> str:
    """The table of a repeated run: a row for each setting, mean and standard deviation (n - 1) over seeds and folds.

    Args:
        points: ``{"axes": {axis: value}, "metrics": <content of metrics.json> or None, "error": text or None}`` each.
        folder: writes table.json, table.md and table.png there.

    Returns:
        The table as plain text, with a caption where the numbers are no benchmark results.
    """
    rows = _rows(points)
    every = _unique(axis for point in points for axis in point["axes"])
    axes = [axis for axis in every if not is_repetition(axis)]
    repeated = [axis for axis in every if is_repetition(axis)]
    notes = _notes(points, repeated)
    tasks = suite.gather(points)
    if tasks is not None:
        notes += suite.notes_of(tasks)
        header, body = suite.cells_of(tasks)
    else:
        header, body = _cells(rows, axes)
    lines = aligned(header, body)
    if folder is not None:
        folder = Path(folder)
        record = _record(points, rows, tasks, notes)
        as_json = json.dumps(record, indent=1, default=str)
        as_markdown = _markdown(header, body, notes, labels=len(axes))
        write_whole(folder / "table.json", lambda path: path.write_text(as_json + "\n"))
        write_whole(folder / "table.md", lambda path: path.write_text(as_markdown, encoding="utf-8"))
        drawn = suite.rows_of(tasks, overall=True) if tasks else rows
        _dots(drawn, notes, folder / "table.png")
    return "\n".join([*lines, *notes])


def _notes(points: Sequence[Point], repeated: list[str]) -> list[str]:
    """The lines below the table: first what no reader may overlook."""
    notes = []
    done = [point["metrics"] for point in points if point.get("metrics")]
    why = [reasons(metrics) for metrics in done]
    shared = _common(why)
    if shared:
        notes.append(caution(shared))
    if any(len(found) > len(shared) for found in why):
        notes.append("NOT ALL ROWS ARE COMPARABLE: data or backbones differ")
    if repeated:
        notes.append(f"mean ± standard deviation (n - 1) over {', '.join(repeated)}")
    for point in points:
        if not point.get("metrics"):
            problem = point.get("error") or "no result"
            notes.append(f"failed: {_axes_text(point['axes'])}: {problem}")
    return notes


def _common(lists: list[list[str]]) -> list[str]:
    """What is in every one of ``lists``."""
    if not lists:
        return []
    return [entry for entry in lists[0] if all(entry in other for other in lists)]


def _axes_text(axes: dict[str, Any]) -> str:
    parts = [f"{axis}={value_text(value)}" for axis, value in axes.items()]
    return ", ".join(parts) or "the run"


def _unique(values: Iterable[str]) -> list[str]:
    """``values`` in their order, each once."""
    return list(dict.fromkeys(values))


# ------------------------------------------------------------------------------------------------- rows


def _rows(points: Sequence[Point]) -> list[Row]:
    """Points gathered by the values of all axes that are no repetitions, in the order in which they came."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        # As text, since values may be lists and mappings, which are no keys of a dictionary.
        key = json.dumps(_compared(point["axes"]), sort_keys=True, default=str)
        groups.setdefault(key, []).append(point)
    return [_row(group) for group in groups.values()]


def _compared(axes: dict[str, Any]) -> dict[str, Any]:
    """``axes`` without those that only repeat."""
    return {axis: value for axis, value in axes.items() if not is_repetition(axis)}


def _row(group: list[Point]) -> Row:
    """One setting: its name, and each number over the runs that finished."""
    compared = _compared(group[0]["axes"])
    axes = {axis: value_text(value) for axis, value in compared.items()}
    done = [point["metrics"] for point in group if point.get("metrics")]
    results = _results(done)
    metrics = {name: _statistics(values) for name, values in results.items()}
    # A record without counts says nothing of what was trained: as 0 it would lower the mean.
    counts = [trained(run) for run in done if run.get("parameters")]
    sizes = [run.get("adapter_bytes") for run in done]
    times = [run.get("seconds") for run in done]
    origins = {origin_of(run) for run in done}
    return {
        "label": _label(axes, done),
        "axes": axes,
        "n": len(done),
        "failed": len(group) - len(done),
        "metrics": metrics,
        "trained": _mean(counts),
        "bytes": _mean(sizes),
        "seconds": _mean(times),
        "measured_on": " | ".join(sorted(origins)),
    }


def _label(axes: dict[str, str], done: list[dict[str, Any]]) -> str:
    parts = []
    for axis, value in axes.items():
        option = axis.rpartition(".")[2]
        if axis == "peft":  # a method's name says what it is, a number does not
            parts.append(value)
        else:
            parts.append(f"{option}={value}")
    label = ", ".join(parts)
    if not label and done:
        label = methods_named(done[0].get("peft"))
    return label or "all"


def _results(done: list[dict[str, Any]]) -> dict[str, list[float]]:
    """``test accuracy`` -> its values: of the test where any run has one, so that no row mixes two splits."""
    by_split = [run.get("metrics") or {} for run in done]
    tested = any(scalars(splits.get("test")) for splits in by_split)
    split = "test" if tested else "validation"
    results: dict[str, list[float]] = {}
    for splits in by_split:
        for name, value in scalars(splits.get(split)).items():
            results.setdefault(f"{split} {name}", []).append(value)
    return results


def _statistics(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "n": len(values), "values": values, "sd": deviation}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ------------------------------------------------------------------------------------------------- text and files


def _shown(rows: list[Row]) -> list[str]:
    """The metrics that the table shows: all, but a loss only where there is nothing else."""
    names = _unique(name for row in rows for name in row["metrics"])
    return [name for name in names if not is_loss(name.partition(" ")[2])] or names


def _cells(rows: list[Row], axes: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; a last column says what was measured on where that differs."""
    shown = _shown(rows)
    origins = {row["measured_on"] for row in rows if row["n"]}
    several_origins = len(origins) > 1
    first_columns = axes or ["method"]
    header = [*first_columns, *shown, "n", "trained", "adapter", "time"]
    if several_origins:
        header.append("measured on")
    body = []
    for row in rows:
        values = [row["axes"].get(axis, "") for axis in axes]
        first = values or [row["label"]]
        results = [_result_text(row["metrics"].get(name)) for name in shown]
        cells = [*first, *results, *_effort(row)]
        if several_origins:
            cells.append(row["measured_on"])
        body.append(cells)
    return header, body


def _result_text(result: dict[str, Any] | None) -> str:
    if not result:
        return "-"
    spread = "" if result["sd"] is None else f" ± {result['sd']:.4f}"
    return f"{result['mean']:.4f}{spread}"


def _effort(row: Row) -> list[str]:
    """Runs that finished, trained parameters, size of the adapter and time."""
    finished, failed = row["n"], row["failed"]
    n = str(finished)
    if failed:
        n += f" of {finished + failed}"
    parameters = _text_or_dash(row["trained"], _count_text)
    size = _text_or_dash(row["bytes"], bytes_text)
    time = _text_or_dash(row["seconds"], duration_text)
    return [n, parameters, size, time]


def _text_or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _count_text(count: float) -> str:
    return f"{count:,.0f}"


def _record(points: Sequence[Point], rows: list[Row], tasks: suite.Suite | None, notes: list[str]) -> dict[str, Any]:
    """The content of table.json."""
    record: dict[str, Any] = {"format": 1, "rows": rows}
    if tasks:
        record["suite"] = suite.rows_of(tasks)
    record["notes"] = notes
    record["points"] = [_point_record(point) for point in points]
    return record


def _point_record(point: Point) -> dict[str, Any]:
    metrics = point.get("metrics") or {}
    return {"axes": point["axes"], "error": point.get("error"), "metrics": metrics.get("metrics")}


def _markdown(header: list[str], body: list[list[str]], notes: list[str], labels: int) -> str:
    """The content of table.md; the first ``labels`` columns are set left, the others right."""
    lines = [_markdown_line(cells) for cells in [header, *body]]
    rules = []
    for column in range(len(header)):
        rules.append("---" if column < labels else "--:")
    lines.insert(1, f"|{'|'.join(rules)}|")
    lines.append("")
    lines += [f"{note}  " for note in notes]  # two blanks at its end break a line in Markdown
    return "\n".join(lines).rstrip() + "\n"


def _markdown_line(cells: list[str]) -> str:
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


# ------------------------------------------------------------------------------------------------- picture


def _dots(rows: list[Row], notes: list[str], path: Path) -> None:
    """One row a setting: each run a small dot, mean and deviation on top; a panel for each of up to three metrics."""
    import textwrap

    shown = _shown(rows)[:3]
    labels = [textwrap.shorten(row["label"], 48, placeholder="…") for row in rows]
    longest = max(map(len, labels), default=0)
    width = 1.6 + 0.08 * longest + 3.6 * max(1, len(shown))  # inches
    figure = plots.new_figure(width, 1.5 + 0.36 * len(rows))
    for number, name in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), number)
        _style(axes)
        axes.set_xlabel(name)
        for place, row in enumerate(rows):
            _draw_row(axes, place, row["metrics"].get(name))
        panel_labels = labels if number == 1 else [""] * len(rows)
        axes.set_yticks(range(len(rows)), panel_labels, fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)  # turned over: the first row is at the top, as in the text
    if not shown:
        figure.text(0.5, 0.5, "no run finished", ha="center", va="center", color=GREY)
    # 13 characters an inch are fewer than fit at 8 points, so that no line of the caption is cut off.
    wrap = textwrap.TextWrapper(int(width * 13), break_on_hyphens=False)
    lines: list[str] = []
    for note in notes[:3]:
        lines += wrap.wrap(note)
    if lines:
        figure.supxlabel("\n".join(lines), fontsize=8, color="#444444")
    plots.save_figure(figure, path)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)


def _draw_row(axes: Axes, place: int, result: dict[str, Any] | None) -> None:
    if result is None:
        # x in shares of the panel, y in rows: the word is at the left edge whatever the metric's range is.
        mixed = axes.get_yaxis_transform()
        axes.annotate("failed", (0.02, place), xycoords=mixed, fontsize=8, color=GREY, va="center",
                      backgroundcolor="white")
        return
    n = result["n"]
    if n > 1:
        axes.plot(result["values"], [place] * n, ".", color=GREY, alpha=0.6, markersize=5)
    # No bar for a deviation of 0: all that is seen of it are the caps, on top of the dot.
    deviation = result["sd"] or None
    axes.errorbar(result["mean"], place, xerr=deviation, fmt="o", color=VALIDATION, markersize=5.5, capsize=3,
                  linewidth=1.6)
