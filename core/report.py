"""What a person reads: a run's summary, curves and confusion matrix, the table of many runs, and the cards of methods.

Pictures are drawn without pyplot, so nothing global is touched and no display is needed; everything that is written
appears under its name whole or not at all. Numbers from a mini or a nano say so wherever they are shown.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, GREY = "#c2571a", "#1f5f8b", "#8a8a8a"
OTHER = ("#1f5f8b", "#c2571a", "#3f7d4f", "#8b4f8f", "#9c7a12")

# ------------------------------------------------------------------------------------------------- summary


def reasons(metrics: dict[str, Any]) -> list[str]:
    """Why the numbers of a run (its metrics.json) are no benchmark result; empty where they are one."""
    data, backbone = metrics.get("data") or {}, metrics.get("backbone") or {}
    found = []
    if data.get("source") == "mini":
        found.append(f"the data are a generated mini ({data.get('name', 'unnamed')})")
    if backbone.get("kind") == "nano" or backbone.get("name") == "nano":
        found.append("the backbone is the built-in nano")
    if backbone.get("kind") == "random" or backbone.get("pretrained") is False:
        found.append("the backbone's weights are random")
    return found


def data_named(data: dict[str, Any]) -> str:
    """The name of a run's data, and of the task in a suite."""
    return f"{data.get('name', 'unnamed data')}{': ' + str(data['task']) if data.get('task') else ''}"


def caution(found: list[str]) -> str:
    """The loud line for these reasons, or an empty string."""
    return f"NOT A BENCHMARK RESULT: {', and '.join(found)}" if found else ""


def summary(metrics: dict[str, Any]) -> str:
    """The closing summary of a run for a person, from the content of its metrics.json; what is missing is left out."""
    data, backbone = metrics.get("data") or {}, metrics.get("backbone") or {}
    title = f"{methods_named(metrics.get('peft')) or 'run'} on {backbone.get('name', 'an unnamed backbone')}"
    lines = [f"{title}, {data_named(data)}: {metrics.get('status', 'status unknown')}"]
    if reasons(metrics):
        lines.append(f"*** {caution(reasons(metrics))} ***")
    rows = [*_parameter_rows(metrics.get("parameters") or {})]
    if metrics.get("adapter_bytes") is not None:
        rows.append(("adapter", f"{bytes_text(metrics['adapter_bytes'])} ({metrics['adapter_bytes']:,} bytes)"))
    for split in ("validation", "test"):
        values = scalars((metrics.get("metrics") or {}).get(split))
        if values:
            rows.append((split, "   ".join(f"{name} {value:.4f}" for name, value in values.items())))
    if metrics.get("select"):
        rows.append(("checkpoint", {"last": "the last epoch's", "best": "the best by validation"}.get(
            metrics["select"], str(metrics["select"]))))
    if metrics.get("seconds") is not None:
        rows.append(("time", duration_text(metrics["seconds"])))
    if metrics.get("peak_memory_bytes"):
        rows.append(("peak memory", bytes_text(metrics["peak_memory_bytes"])))
    rows += [("warning", str(text)) for text in metrics.get("warnings") or []]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([*lines, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _parameter_rows(counts: dict[str, int]) -> list[tuple[str, str]]:
    if not counts:
        return []
    own = sum(counts.get(owner) or 0 for owner in ("method", "norms", "other"))
    parts = [f"{own:,} parameters"]
    of = "backbone" if counts.get("backbone") else "total"
    if counts.get(of):
        parts[0] += f", {own / counts[of]:.4%} of the {'backbone' if of == 'backbone' else 'model'}'s {counts[of]:,}"
    if counts.get("norms"):
        parts.append(f"{counts['norms']:,} of them in norms")
    if counts.get("head"):
        parts.append(f"and a head of {counts['head']:,}")
    if counts.get("beside"):
        parts.append(f"beside the model, for training alone, {counts['beside']:,}")
    rows = [("trained", "; ".join(parts))]
    if counts.get("stored") not in (None, own):
        rows.append(("stored", f"{counts['stored']:,} numbers"))
    return rows


def methods_named(peft: Any) -> str:
    """``LoRA`` or ``LoRA + IST`` from whatever names methods: a name, a component, a recorded method, or a list."""
    if isinstance(peft, (list, tuple)):
        return " + ".join(map(methods_named, peft))
    if isinstance(peft, dict):
        return str(peft.get("class_path") or peft.get("class") or peft.get("name") or "?").rpartition(".")[2]
    return "" if peft is None else str(peft)


def scalars(values: Any) -> dict[str, float]:
    """The plain numbers of a split's metrics, names without the split, a loss last."""
    found = {str(name).rpartition("/")[2]: float(value) for name, value in (values or {}).items()
             if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return dict(sorted(found.items(), key=lambda item: item[0] in ("loss", "penalty")))


def bytes_text(count: float) -> str:
    """``1.4 KiB``"""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration_text(seconds: float) -> str:
    """``2 min 5 s``"""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# ------------------------------------------------------------------------------------------------- pictures


def curves(history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw learning curves as a PNG: losses, metrics, learning rate.

    Args:
        history: one row for each time something was logged, in order: ``epoch`` (from 0), ``step``, ``train/<name>``,
            ``validation/<name>``, ``lr`` or ``lr-<group>``; any of them may be missing in a row. With a key ``stage``
            the rows of each stage are drawn in a section of their own, one behind the other.
        path: file to write.
        title: one line above the picture.
    """
    sections, unit = _sections(history)
    panels = _panels(history)
    figure = _figure(7.5, 0.7 + 2.5 * max(1, len(panels)))
    if title:
        figure.suptitle(title, fontsize=10)
    for number, (label, keys) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, number)
        _style(axes)
        axes.set_ylabel(label)
        names = list(dict.fromkeys(key.rpartition("/")[2] for key in keys))
        for key in keys:
            split, _, name = key.rpartition("/")
            colour = OTHER[names.index(name) % len(OTHER)]
            if label != "learning rate" and len(names) == 1:
                colour = TRAIN if split == "train" else VALIDATION
            drawn = key
            for _, rows in sections:
                found = [(x, row[key]) for x, row in rows if row.get(key) is not None]
                if found:
                    axes.plot(*zip(*found, strict=True), color=colour, label=drawn, linewidth=1.6,
                              linestyle="--" if split == "train" and len(names) > 1 else "-",
                              marker="o" if len(found) <= 40 else None, markersize=3.5)
                    drawn = "_hidden"
        _mark_sections(axes, sections, names=number == 1)
        axes.legend(frameon=False, fontsize=8, ncols=2 if len(keys) > 3 else 1)
        if number == len(panels):
            axes.set_xlabel(unit)
    if not panels:
        figure.text(0.5, 0.5, "nothing was logged", ha="center", va="center", color=GREY)
    _save(figure, path)


Rows = list[tuple[float, dict[str, Any]]]


def _sections(history: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, Rows]], str]:
    """The rows of each stage with their place on the x axis: finished epochs, or steps where an epoch has many rows."""
    seen, unit = set(), "epoch"
    for row in history:
        new = {(row.get("stage"), row.get("epoch"), key) for key in row if "/" in key or key.startswith("lr")}
        if seen & new or row.get("epoch") is None:
            unit = "step"
        seen |= new
    sections: list[tuple[str, Rows]] = []
    offset = end = 0.0
    for index, row in enumerate(history, start=1):
        stage = str(row.get("stage", ""))
        x = float(row["epoch"]) + 1 if unit == "epoch" else float(row.get("step", index))
        if not sections or sections[-1][0] != stage:
            offset = end if sections and x <= end else 0.0  # a stage that counts from its own beginning
            sections.append((stage, []))
        sections[-1][1].append((x + offset, row))
        end = max(end, x + offset)
    return sections, unit


def _panels(history: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Panel label -> the keys drawn in it. Metrics between 0 and 1 share a panel, others have one each."""
    values: dict[str, list[float]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(("train/", "validation/", "lr")) and isinstance(value, (int, float)):
                values.setdefault(key, []).append(value)
    panels: dict[str, list[str]] = {}
    shares = {key.rpartition("/")[2] for key in values}
    shares -= {key.rpartition("/")[2] for key, found in values.items()
               if not all(0 <= v <= 1 for v in found if math.isfinite(v))}
    for key in sorted(values, key=lambda key: (key.startswith("lr"), not key.endswith("/loss"))):
        name = key.rpartition("/")[2]
        if key.startswith("lr"):
            same = any(values[key] == values[other] for other in panels.get("learning rate", []))
            if not same and len(values[key]) > 1:  # the same: groups that differ in weight decay alone
                panels.setdefault("learning rate", []).append(key)
        elif name in ("loss", "penalty") or name not in shares:
            panels.setdefault(name, []).append(key)
        else:
            panels.setdefault("metrics", []).append(key)
    if len({key.rpartition("/")[2] for key in panels.get("metrics", [])}) == 1:  # a single one gives its name
        panels = {panels["metrics"][0].rpartition("/")[2] if label == "metrics" else label: keys
                  for label, keys in panels.items()}
    return panels


def _mark_sections(axes: Axes, sections: list[tuple[str, Rows]], names: bool) -> None:
    axes.margins(x=0.04)
    if all(not stage for stage, _ in sections):
        if sum(len(rows) for _, rows in sections) and len({x for _, rows in sections for x, _ in rows}) == 1:
            x = sections[0][1][0][0]
            axes.set_xlim(x - 1, x + 1)
            axes.set_xticks([x])
        return
    for index, (stage, rows) in enumerate(sections):
        xs = [x for x, _ in rows]
        if index:
            axes.axvline((sections[index - 1][1][-1][0] + xs[0]) / 2, color=GREY, linewidth=0.8, linestyle=":")
        if names:
            axes.text((xs[0] + xs[-1]) / 2, 1.02, stage, transform=axes.get_xaxis_transform(), ha="center",
                      va="bottom", fontsize=9, color="#444444")


def confusion(matrix: Any, classes: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw a confusion matrix as a PNG: colour is the share of a true class, the number its samples.

    Args:
        matrix: [classes, classes] counts, rows are true classes: a tensor, an array or lists.
        classes: their names.
        path: file to write.
        title: one line above the picture.
    """
    import numpy as np

    counts = np.asarray(matrix.tolist() if hasattr(matrix, "tolist") else matrix, dtype=float)
    n = len(classes)
    if counts.shape != (n, n):
        raise ScionError(f"confusion: the matrix is {list(counts.shape)}, but there are {n} classes")
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    cell = min(0.5, max(0.2, 10 / n)) if n <= 60 else 12 / n  # inches
    names = [name if len(name) <= 22 else f"{name[:21]}…" for name in map(str, classes)]
    edge = 0.9 + 0.075 * max(map(len, names))
    figure = _figure(max(4.5, n * cell + edge + 1.0), max(3.9, n * cell + edge + 0.6))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    every = 1 if n <= 60 else math.ceil(n / 60)
    size = min(9.0, max(4.0, 72 * cell * 0.55))
    axes.set_xticks(range(0, n, every), names[::every], rotation=90, fontsize=size)
    axes.set_yticks(range(0, n, every), names[::every], fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for side in axes.spines.values():
        side.set_color("#cccccc")
    if n <= 60:
        axes.set_xticks(np.arange(0.5, n - 1), minor=True)
        axes.set_yticks(np.arange(0.5, n - 1), minor=True)
        axes.grid(which="minor", color="#e8e8e8", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        digits = max(2, len(f"{counts.max():.0f}"))
        for i, j in np.argwhere(counts > 0):
            axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color="white" if shares[i, j] > 0.55 else
                      "#222222", fontsize=min(9.0, 72 * cell / (0.75 * digits)))
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, shrink=0.7).set_label("share of the true class")
    right = counts.trace() / counts.sum() if counts.sum() else math.nan
    axes.set_title("\n".join(filter(None, [title, f"{right:.1%} of {counts.sum():.0f} samples on the diagonal"])),
                   fontsize=10)
    _save(figure, path, cropped=True)


RIGHT, WRONG = "#3f7d4f", "#b3261e"
MOST = 24
"""Pictures that a gallery shows."""


def gallery(pictures: Any, captions: Sequence[str], path: str | Path, title: str = "",
            right: Sequence[bool | None] | None = None, columns: int = 8) -> None:
    """Draw pictures in a grid, each with a caption, as a PNG.

    Args:
        pictures: uint8 [n, 3, height, width], a tensor or an array.
        captions: a text below each; it may have several lines.
        path: file to write.
        title: one line above.
        right: whether each is right (a green frame) or wrong (red); None draws no frame.
        columns: of the grid.
    """
    import numpy as np

    shown = np.asarray(pictures).transpose(0, 2, 3, 1)
    columns = max(1, min(columns, len(shown)))
    lines = -(-len(shown) // columns)
    figure = _figure(max(3.6, 1.35 * columns), 0.5 + (1.35 + 0.16 * max(
        (text.count("\n") + 1 for text in captions), default=1)) * max(1, lines))
    for place, (picture, text) in enumerate(zip(shown, captions, strict=True)):
        axes = figure.add_subplot(lines, columns, place + 1)
        axes.imshow(picture, interpolation="nearest" if max(picture.shape) < 100 else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        mark = right[place] if right is not None else None
        for side in axes.spines.values():
            side.set_visible(mark is not None)
            side.set_color(RIGHT if mark else WRONG)
            side.set_linewidth(2.5)
        axes.set_xlabel("\n".join(line if len(line) <= 20 else f"{line[:19]}…" for line in text.splitlines()),
                        fontsize=7, parse_math=False, color="#222222" if mark is None else RIGHT if mark else WRONG)
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _save(figure: Figure, path: str | Path, cropped: bool = False) -> None:
    # without matplotlib's version in it, the same numbers give the same file
    _write(path, lambda temporary: figure.savefig(temporary, format="png", metadata={"Software": None}, pad_inches=0.1,
                                                  bbox_inches="tight" if cropped else None))


def _write(path: str | Path, write: Callable[[Path], Any]) -> None:
    from core.files import write_atomically

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)


# ------------------------------------------------------------------------------------------------- many runs


def is_repetition(axis: str) -> bool:
    """Whether an axis of ``over`` repeats an experiment (seeds, folds) instead of comparing several."""
    return axis == "seed_everything" or axis.rpartition(".")[2].endswith(("seed", "fold"))


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
    from core import suite  # it reads the same records, and would import this module while this is imported

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
        _write(folder / "table.json", lambda path: path.write_text(json.dumps(record, indent=1, default=str) + "\n"))
        _write(folder / "table.md", lambda path: path.write_text(
            "\n".join([*marked, "", *(f"{note}  " for note in notes)]).rstrip() + "\n", encoding="utf-8"))
        _dots(suite.rows_of(tasks, overall=True) if tasks else rows, notes, folder / "table.png")
    return text


def _axes_text(axes: dict[str, Any]) -> str:
    return ", ".join(f"{axis}={value_text(value)}" for axis, value in axes.items()) or "the run"


def value_text(value: Any) -> str:
    """A value of an axis as a person reads it: a class by its name."""
    return methods_named(value) if isinstance(value, dict) and {"class_path", "class"} & set(value) else \
        " + ".join(map(value_text, value)) if isinstance(value, list) else str(value)


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


def trained(metrics: dict[str, Any]) -> int:
    """The parameters that a run (its metrics.json) trained, without the head."""
    counts = metrics.get("parameters") or {}
    return sum(counts.get(owner) or 0 for owner in ("method", "norms", "other"))


def origin_of(metrics: dict[str, Any]) -> str:
    """Data and backbone of a run (its metrics.json)."""
    data, backbone = metrics.get("data") or {}, metrics.get("backbone") or {}
    random = ", random weights" if backbone.get("pretrained") is False or backbone.get("kind") == "random" else ""
    return f"{data_named(data)}; {backbone.get('name', '?')}{random}"


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


def aligned(header: list[str], body: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a plain-text table; the first ``left`` columns are set left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip()
             for line in [header, *body]]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _dots(rows: list[dict[str, Any]], notes: list[str], path: Path) -> None:
    """One row a setting: each run a small dot, mean and deviation on top; a panel for each of up to three metrics."""
    import textwrap

    shown = _shown(rows)[:3]
    labels = [textwrap.shorten(row["label"], 48, placeholder="…") for row in rows]
    width = 1.6 + 0.08 * max(map(len, labels), default=0) + 3.6 * max(1, len(shown))
    figure = _figure(width, 1.5 + 0.36 * len(rows))
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
    _save(figure, path)


# ------------------------------------------------------------------------------------------------- cards of methods

SECTIONS = ("Equation", "Trains", "Merges", "Source")
DECLARED = ("identity_at_start", "mergeable", "moves_base", "needs", "inference_cost", "recommended", "stages", "mode")


def sections(doc: str) -> dict[str, str]:
    """A class's docstring taken apart: ``summary`` and what stands under each of ``SECTIONS``, lines joined."""
    found: dict[str, list[str]] = {"summary": []}
    current: str | None = "summary"
    for line in inspect.cleandoc(doc).splitlines():
        head = re.match(rf"({'|'.join(SECTIONS)}): *(.*)", line)
        if head:
            current = str(head[1]).lower()
            found[current] = [str(head[2])]
        elif current and (line.startswith(" ") or (current == "summary" and line)):
            found[current].append(line.strip())
        else:
            current = None
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def arguments(cls: type) -> list[dict[str, Any]]:
    """The constructor's arguments: ``{"name", "type", "default", "help", "common"}``; common ones are the base's."""
    from core.spec import plain, signature

    own = inspect.signature(cls.__init__).parameters
    found = []
    for name, parameter in signature(cls).parameters.items():
        known = (_argument_help(base.__doc__ or "").get(name) for base in cls.__mro__)
        annotation = parameter.annotation
        required = parameter.default is inspect.Parameter.empty
        found.append({
            "name": name, "type": "" if annotation is inspect.Parameter.empty else str(annotation),
            "required": required, "default": None if required else plain(parameter.default),
            "help": next(filter(None, known), ""), "common": name not in own and not _inherits(cls, name),
        })
    return found


def _inherits(cls: type, name: str) -> bool:
    """Whether ``name`` comes from a parent method (DoRA's rank from LoRA), not from what all methods share."""
    from core.method import PEFTMethod

    return name not in inspect.signature(PEFTMethod.__init__).parameters


def _argument_help(doc: str) -> dict[str, str]:
    lines = inspect.cleandoc(doc).splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines[lines.index("Args:") + 1:]:
        entry = re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith(" " * 8):
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
        elif line:
            break
    return found


def card_json(name: str) -> dict[str, Any]:
    """All that is known about a method, as JSON.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    from core.peft import method_class, registry
    from core.spec import plain
    from core.taxonomy import tags_of

    cls = method_class(name)
    taxon, kinds = tags_of(name, cls)
    home = registry().get(name, cls.__module__)
    family = home.removeprefix("core.peft.").partition(".")[0] if home.startswith("core.peft.") else home
    return {"name": name, "family": family, "module": home, "taxon": taxon, "kinds": list(kinds),
            "status": "implemented", **sections(cls.__doc__ or ""),
            **{key: plain(getattr(cls, key, None)) for key in DECLARED}, "arguments": arguments(cls)}


def methods_json(family: str | None = None, kind: str | None = None, mergeable: bool = False, planned: bool = False
                 ) -> list[dict[str, Any]]:
    """The cards of all methods; an installed method that cannot be imported has ``error`` instead.

    Args:
        family: keeps those of a family (`core.taxonomy.FAMILIES`), or of a folder of `core.peft`.
        kind: keeps those that modify such things (`core.taxonomy.KINDS`).
        mergeable: keeps those that can be written into the weights.
        planned: gives what is known and not here instead.

    Raises:
        ScionError: no such family or kind.
    """
    from core import taxonomy
    from core.peft import registry

    folders = {home.removeprefix("core.peft.").partition(".")[0] for home in registry().values()
               if home.startswith("core.peft.")}
    taxonomy.check_filters(family, kind, sorted(folders))
    found: list[dict[str, Any]] = []
    if planned:
        found = [{"name": known.name, "family": known.family, "taxon": known.family, "kinds": list(known.kinds),
                  "status": "planned", "summary": known.summary} for known in taxonomy.planned()]
        return [card for card in found if _is_wanted(card, family, kind, mergeable)]
    for name, home in registry().items():
        try:
            found.append(card_json(name))
        except Exception as error:
            if home.startswith("core."):
                raise
            found.append({"name": name, "family": home, "module": home, "taxon": "", "kinds": [],
                          "error": f"{type(error).__name__}: {error}"})
    found = [card for card in found if _is_wanted(card, family, kind, mergeable)]
    return sorted(found, key=lambda card: (not card["module"].startswith("core."), card["taxon"], card["family"],
                                           card["name"]))


def _is_wanted(card: dict[str, Any], family: str | None, kind: str | None, mergeable: bool) -> bool:
    of_family = family is None or family in (card["family"], card["taxon"])
    return of_family and (kind is None or kind in card["kinds"]) and (not mergeable or bool(card.get("mergeable")))


def methods_table(family: str | None = None, kind: str | None = None, mergeable: bool = False, planned: bool = False
                  ) -> str:
    """Every method in a line, by family: what it modifies, whether it merges, what it does. The arguments are those of
    `methods_json`."""
    header = ["method", "family", "modifies", "merges", "moves base", "lr", "what it does"]
    body = []
    for card in methods_json(family, kind, mergeable, planned):
        start = [card["name"], card["taxon"] or card["family"], ", ".join(card["kinds"]) or "-"]
        if "error" in card:
            body.append([*start, "-", "-", "-", f"cannot be imported: {card['error']}"])
        elif card["status"] == "planned":
            body.append([*start, "-", "-", "-", f"planned: {card['summary']}"])
        else:
            rate = card["recommended"]["lr"] if card.get("recommended") else None
            declared = ["yes" if card[key] else "no" for key in ("mergeable", "moves_base")]
            body.append([*start, *declared, "-" if rate is None else f"{rate:g}", card["summary"]])
    return "\n".join(aligned(header, body, left=len(header)))


def card(name: str) -> str:
    """The card of one method, for a terminal.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    import textwrap

    found = card_json(name)
    lines = [f"{name} ({found['family']})", *textwrap.wrap(found["summary"], 100, initial_indent="  ",
                                                          subsequent_indent="  "), ""]
    facts = [(key, found[key]) for key in map(str.lower, SECTIONS) if found.get(key)]
    facts += [("family", f"{found['taxon']}; modifies {', '.join(found['kinds'])}" if found["taxon"] else ""),
              ("at start", "the identity" if found["identity_at_start"] else "changes the output"),
              ("base", "its own tensors are trained" if found["moves_base"] else "stays as it is"),
              ("inference", found["inference_cost"]),
              ("recommended", ", ".join(f"{key} {value:g}" for key, value in (found["recommended"] or {}).items())),
              ("needs", ", ".join(found["needs"] or [])), ("stages", ", ".join(found["stages"] or [])),
              ("backbone", f"{found['mode']} mode while training")]
    for key, text in facts:
        if text:
            lines += textwrap.wrap(str(text), 100, initial_indent=f"  {key:<13}", subsequent_indent=" " * 15)
    for title, common in (("arguments", False), ("arguments of every method", True)):
        chosen = [argument for argument in found["arguments"] if argument["common"] is common]
        lines += ["", f"  {title}"] if chosen else []
        for argument in chosen:
            start = argument["name"] if argument["required"] else f"{argument['name']} = {argument['default']!r}"
            lines += textwrap.wrap(f"{start}: {argument['help']}".rstrip(": "), 100, initial_indent="    ",
                                   subsequent_indent="        ")
    return "\n".join(lines)
