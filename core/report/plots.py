"""Curves, confusion matrices and galleries.

They are drawn without pyplot, so nothing global is touched and no display is needed; each appears under its name whole
or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.errors import ScionError
from core.files import write_atomically

if TYPE_CHECKING:  # matplotlib is loaded when something is drawn: it takes half a second
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, GREY = "#c2571a", "#1f5f8b", "#8a8a8a"
OTHER = ("#1f5f8b", "#c2571a", "#3f7d4f", "#8b4f8f", "#9c7a12")
Rows = list[tuple[float, dict[str, Any]]]


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
    figure = new_figure(7.5, 0.7 + 2.5 * max(1, len(panels)))
    if title:
        figure.suptitle(title, fontsize=10)
    for number, (label, keys) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, number)
        style_axes(axes)
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
    save_figure(figure, path)


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
    figure = new_figure(max(4.5, n * cell + edge + 1.0), max(3.9, n * cell + edge + 0.6))
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
    save_figure(figure, path, cropped=True)
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
    figure = new_figure(max(3.6, 1.35 * columns), 0.5 + (1.35 + 0.16 * max(
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
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def save_figure(figure: Figure, path: str | Path, cropped: bool = False) -> None:
    """Write a figure as PNG; ``cropped`` leaves out empty edges."""
    edges = "tight" if cropped else None
    metadata = {"Software": None}  # without matplotlib's version in it, the same numbers give the same file
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", metadata=metadata, pad_inches=0.1,
                                                       bbox_inches=edges))


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file, whole or not at all, in a folder that is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
