"""The table of many runs: as text, as JSON and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from core.report import plots, suite
from core.report.plots import GREY, VALIDATION, write_whole
from core.report.summary import caution, reasons
from core.report.text import (
    aligned,
    bytes_text,
    duration_text,
    is_repetition,
    methods_named,
    origin_of,
    scalars,
    trained,
    value_text,
)


def table(points: Sequence[dict[str, Any]], folder: str | Path | None = None) -> str:
    """The table of a repeated run: a row for each setting, mean and standard deviation (n - 1) over seeds and folds.

    Args:
        points: ``{"axes": {axis: value}, "metrics": <content of metrics.json> or None, "error": text or None}`` each.
        folder: writes table.json, table.md and table.png there.

    Returns:
        The table as plain text, with a caption where the numbers are no benchmark results.
    """
    rows = _rows(points)
    every = list(dict.fromkeys(axis for point in points for axis in point["axes"]))
    axes = [axis for axis in every if not is_repetition(axis)]
    origins = {row["measured_on"] for row in rows if row["n"]}
    why = [reasons(point["metrics"]) for point in points if point.get("metrics")]
    shared = [reason for reason in why[0] if all(reason in other for other in why)] if why else []
    notes = [caution(shared)] if shared else []
    if any(len(other) > len(shared) for other in why):
        notes.append("NOT ALL ROWS ARE COMPARABLE: data or backbones differ")
    repeated = [axis for axis in every if is_repetition(axis)]
    if repeated:
        notes.append(f"mean ± standard deviation (n - 1) over {', '.join(repeated)}")
    notes += [f"failed: {_axes_text(point['axes'])}: {point.get('error') or 'no result'}"
              for point in points if not point.get("metrics")]
    tasks = suite.gather(points)
    if tasks is not None:
        notes += suite.notes_of(tasks)
        header, body = suite.cells_of(tasks)
    else:
        header, body = _cells(rows, axes, several_origins=len(origins) > 1)
    text = "\n".join([*aligned(header, body), *notes])
    if folder is not None:
        record = {"format": 1, "rows": rows, **({"suite": suite.rows_of(tasks)} if tasks else {}), "notes": notes,
                  "points": [
            {"axes": point["axes"], "error": point.get("error"),
             "metrics": (point.get("metrics") or {}).get("metrics")} for point in points]}
        marked = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in [header, *body]]
        marked.insert(1, f"|{'|'.join('---' if i < len(axes) else '--:' for i in range(len(header)))}|")
        folder = Path(folder)
        as_json = json.dumps(record, indent=1, default=str) + "\n"
        write_whole(folder / "table.json", lambda path: path.write_text(as_json))
        write_whole(folder / "table.md", lambda path: path.write_text(
            "\n".join([*marked, "", *(f"{note}  " for note in notes)]).rstrip() + "\n", encoding="utf-8"))
        _dots(suite.rows_of(tasks, overall=True) if tasks else rows, notes, folder / "table.png")
    return text


def _axes_text(axes: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={value_text(value)}" for axis, value in axes.items()) or "the run"


def _rows(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points gathered by the values of all axes that are no repetitions, in the order in which they came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        kept = {axis: value for axis, value in point["axes"].items() if not is_repetition(axis)}
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(point)
    return [_row(group) for group in groups.values()]


def _row(group: list[dict[str, Any]]) -> dict[str, Any]:
    axes = {axis: value_text(value) for axis, value in group[0]["axes"].items() if not is_repetition(axis)}
    done = [point["metrics"] for point in group if point.get("metrics")]
    named = [value if axis == "peft" else f"{axis.rpartition('.')[2]}={value}" for axis, value in axes.items()]
    label = ", ".join(named) or next((methods_named(run.get("peft")) for run in done), "") or "all"
    split = "test" if any(scalars((run.get("metrics") or {}).get("test")) for run in done) else "validation"
    results: dict[str, list[float]] = {}
    for run in done:
        for name, value in scalars((run.get("metrics") or {}).get(split)).items():
            results.setdefault(f"{split} {name}", []).append(value)
    origins = {origin_of(run) for run in done}
    return {
        "label": label, "axes": axes, "n": len(done), "failed": len(group) - len(done),
        "metrics": {name: {"mean": statistics.fmean(values), "n": len(values), "values": values,
                           "sd": statistics.stdev(values) if len(values) > 1 else None}
                    for name, values in results.items()},
        "trained": _mean([trained(run) for run in done if run.get("parameters")]),
        "bytes": _mean([run.get("adapter_bytes") for run in done]),
        "seconds": _mean([run.get("seconds") for run in done]), "measured_on": " | ".join(sorted(origins)),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _shown(rows: list[dict[str, Any]]) -> list[str]:
    """The metrics that the table shows: all, but a loss only where there is nothing else."""
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    return [name for name in names if not name.endswith(" loss")] or names


def _cells(rows: list[dict[str, Any]], axes: list[str], several_origins: bool) -> tuple[list[str], list[list[str]]]:
    shown = _shown(rows)
    header = [*(axes or ["method"]), *shown, "n", "trained", "adapter", "time", *(["measured on"] * several_origins)]
    body = []
    for row in rows:
        first = [row["axes"].get(axis, "") for axis in axes] or [row["label"]]
        results = []
        for name in shown:
            result = row["metrics"].get(name)
            spread = f" ± {result['sd']:.4f}" if result and result["sd"] is not None else ""
            results.append(f"{result['mean']:.4f}{spread}" if result else "-")
        n = f"{row['n']} of {row['n'] + row['failed']}" if row["failed"] else str(row["n"])
        body.append([*first, *results, n, "-" if row["trained"] is None else f"{row['trained']:,.0f}",
                     "-" if row["bytes"] is None else bytes_text(row["bytes"]),
                     "-" if row["seconds"] is None else duration_text(row["seconds"]),
                     *([row["measured_on"]] * several_origins)])
    return header, body


def _dots(rows: list[dict[str, Any]], notes: list[str], path: Path) -> None:
    """One row a setting: each run a small dot, mean and deviation on top; a panel for each of up to three metrics."""
    import textwrap

    shown = _shown(rows)[:3]
    labels = [textwrap.shorten(row["label"], 48, placeholder="…") for row in rows]
    width = 1.6 + 0.08 * max(map(len, labels), default=0) + 3.6 * max(1, len(shown))
    figure = plots.new_figure(width, 1.5 + 0.36 * len(rows))
    for number, name in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), number)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel(name)
        for place, row in enumerate(rows):
            result = row["metrics"].get(name)
            if result is None:
                axes.annotate("failed", (0.02, place), xycoords=axes.get_yaxis_transform(), fontsize=8, color=GREY,
                              va="center", backgroundcolor="white")
                continue
            if result["n"] > 1:
                axes.plot(result["values"], [place] * result["n"], ".", color=GREY, alpha=0.6, markersize=5)
            axes.errorbar(result["mean"], place, xerr=result["sd"] or None, fmt="o", color=VALIDATION, markersize=5.5,
                          capsize=3, linewidth=1.6)
        axes.set_yticks(range(len(rows)), labels if number == 1 else [""] * len(rows), fontsize=9)
        axes.set_ylim(len(rows) - 0.5, -0.5)
    if not shown:
        figure.text(0.5, 0.5, "no run finished", ha="center", va="center", color=GREY)
    wrap = textwrap.TextWrapper(int(width * 13), break_on_hyphens=False)
    caption = "\n".join(line for note in notes[:3] for line in wrap.wrap(note))
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#444444")
    plots.save_figure(figure, path)
