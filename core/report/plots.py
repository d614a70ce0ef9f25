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
MOST_CLASSES = 60
"""Classes of a confusion matrix in which there is room for every name and number."""
Rows = list[tuple[float, dict[str, Any]]]


def curves(history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw learning curves as a PNG: losses, metrics, learning rate.

    Args:
        history: one row for each time something was logged, in order: ``epoch`` (from 0), ``step``, ``train/<name>``,
            ``validation/<name>``, ``lr`` or ``lr-<group>``; any of them may be missing in a row. With a key ``stage``
            the rows of each stage are drawn in a section, one behind the other.
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
        for key in keys:
            _draw_curve(axes, key, label, keys, sections)
        _mark_sections(axes, sections, names=number == 1)
        columns = 2 if len(keys) > 3 else 1
        axes.legend(frameon=False, fontsize=8, ncols=columns)
        if number == len(panels):
            axes.set_xlabel(unit)
    if not panels:
        figure.text(0.5, 0.5, "nothing was logged", ha="center", va="center", color=GREY)
    save_figure(figure, path)


def _draw_curve(axes: Axes, key: str, label: str, keys: list[str], sections: list[tuple[str, Rows]]) -> None:
    """Draw ``key``, one of the ``keys`` of the panel ``label``, as a line in each section."""
    names = list(dict.fromkeys(_metric(each) for each in keys))
    split, _, name = key.rpartition("/")
    colour = OTHER[names.index(name) % len(OTHER)]
    if label != "learning rate" and len(names) == 1:
        colour = TRAIN if split == "train" else VALIDATION
    # With several metrics in a panel the colour is the metric's, and only the line's style tells the splits apart.
    style = "--" if split == "train" and len(names) > 1 else "-"
    legend = key
    for _, rows in sections:
        found = [(x, row[key]) for x, row in rows if row.get(key) is not None]
        if not found:
            continue
        xs, ys = zip(*found, strict=True)
        marker = "o" if len(found) <= 40 else None
        axes.plot(xs, ys, color=colour, label=legend, linewidth=1.6, linestyle=style, marker=marker, markersize=3.5)
        legend = "_hidden"  # matplotlib leaves out of the legend what begins with an underscore


def _metric(key: str) -> str:
    """The name of a logged number without its split."""
    return key.rpartition("/")[2]


def _sections(history: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, Rows]], str]:
    """The rows of each stage with their place on the x axis: finished epochs, or steps where an epoch has many rows."""
    unit = _unit(history)
    sections: list[tuple[str, Rows]] = []
    offset = end = 0.0
    for index, row in enumerate(history, start=1):
        stage = str(row.get("stage", ""))
        x = float(row["epoch"]) + 1 if unit == "epoch" else float(row.get("step", index))
        if not sections or sections[-1][0] != stage:
            offset = end if sections and x <= end else 0.0  # a stage that counts from its own beginning
            sections.append((stage, []))
        _, rows = sections[-1]
        rows.append((x + offset, row))
        end = max(end, x + offset)
    return sections, unit


def _unit(history: Sequence[dict[str, Any]]) -> str:
    """``epoch``, or ``step`` where a row has no epoch or an epoch has a number twice."""
    seen: set[tuple[Any, Any, str]] = set()
    for row in history:
        epoch = row.get("epoch")
        if epoch is None:
            return "step"
        new = {(row.get("stage"), epoch, key) for key in row if "/" in key or key.startswith("lr")}
        if seen & new:
            return "step"
        seen |= new
    return "epoch"


def _panels(history: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Panel label -> the keys drawn in it. Metrics between 0 and 1 share a panel, others have one each."""
    values = _logged(history)
    shares = {_metric(key) for key in values}
    shares -= {_metric(key) for key, found in values.items() if not _are_shares(found)}
    panels: dict[str, list[str]] = {}
    for key in sorted(values, key=_place):
        name = _metric(key)
        if key.startswith("lr"):
            rates = panels.get("learning rate", [])
            same = any(values[key] == values[other] for other in rates)
            if not same and len(values[key]) > 1:  # the same: groups that differ only in weight decay
                panels.setdefault("learning rate", []).append(key)
        elif name in ("loss", "penalty") or name not in shares:
            panels.setdefault(name, []).append(key)
        else:
            panels.setdefault("metrics", []).append(key)
    return _named_after_single_metric(panels)


def _logged(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Every number that is drawn, with its values in order."""
    values: dict[str, list[float]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith(("train/", "validation/", "lr")) and isinstance(value, (int, float)):
                values.setdefault(key, []).append(value)
    return values


def _are_shares(values: list[float]) -> bool:
    return all(0 <= value <= 1 for value in values if math.isfinite(value))


def _place(key: str) -> tuple[bool, bool]:
    """Losses come first, learning rates last."""
    return key.startswith("lr"), not key.endswith("/loss")


def _named_after_single_metric(panels: dict[str, list[str]]) -> dict[str, list[str]]:
    """``panels``, the one of metrics with a metric's name as label where it has only that one."""
    names = {_metric(key) for key in panels.get("metrics", [])}
    if len(names) != 1:
        return panels
    single = names.pop()
    renamed = {}
    for label, keys in panels.items():
        renamed[single if label == "metrics" else label] = keys
    return renamed


def _mark_sections(axes: Axes, sections: list[tuple[str, Rows]], names: bool) -> None:
    """Draw a line between stages and, where ``names``, write them above; runs without stages have neither."""
    axes.margins(x=0.04)
    if not any(stage for stage, _ in sections):
        _widen_single_point(axes, sections)
        return
    last_x = 0.0
    for index, (stage, rows) in enumerate(sections):
        first_x = rows[0][0]
        if index:
            axes.axvline((last_x + first_x) / 2, color=GREY, linewidth=0.8, linestyle=":")
        last_x = rows[-1][0]
        if names:
            # x in the data's numbers, y in shares of the panel: 1.02 is just above it.
            mixed = axes.get_xaxis_transform()
            axes.text((first_x + last_x) / 2, 1.02, stage, transform=mixed, ha="center", va="bottom", fontsize=9,
                      color="#444444")


def _widen_single_point(axes: Axes, sections: list[tuple[str, Rows]]) -> None:
    """Where every curve is one point, give it an axis with one tick, in the middle."""
    xs = {x for _, rows in sections for x, _ in rows}
    if len(xs) == 1:
        x = xs.pop()
        axes.set_xlim(x - 1, x + 1)
        axes.set_xticks([x])


def confusion(matrix: Any, classes: Sequence[str], path: str | Path, title: str = "") -> None:
    """Draw a confusion matrix as a PNG: colour is the share of a true class, the number its samples.

    Args:
        matrix: [classes, classes] counts, rows are true classes: a tensor, an array or lists.
        classes: their names.
        path: file to write.
        title: one line above the picture.
    """
    import numpy as np

    values = matrix.tolist() if hasattr(matrix, "tolist") else matrix
    counts = np.asarray(values, dtype=float)
    n = len(classes)
    if counts.shape != (n, n):
        raise ScionError(f"confusion: the matrix is {list(counts.shape)}, but there are {n} classes")
    totals = counts.sum(axis=1, keepdims=True)
    unknown = np.full_like(counts, np.nan)  # a class without samples has no shares, and stays white
    shares = np.divide(counts, totals, out=unknown, where=totals > 0)
    # Inches. Beyond MOST_CLASSES the picture stops growing and the cells shrink.
    cell = min(0.5, max(0.2, 10 / n)) if n <= MOST_CLASSES else 12 / n
    names = [_shortened(str(name), 22) for name in classes]
    edge = 0.9 + 0.075 * max(map(len, names))
    width = max(4.5, n * cell + edge + 1.0)
    height = max(3.9, n * cell + edge + 0.6)
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _name_classes(axes, names, cell)
    if n <= MOST_CLASSES:
        _draw_grid(axes, n)
        _write_counts(axes, counts, shares, cell)
    colours = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, shrink=0.7)
    colours.set_label("share of the true class")
    total = counts.sum()
    right = counts.trace() / total if total else math.nan
    lines = [title, f"{right:.1%} of {total:.0f} samples on the diagonal"]
    axes.set_title("\n".join(filter(None, lines)), fontsize=10)
    save_figure(figure, path, cropped=True)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length - 1]}…"


def _name_classes(axes: Axes, names: list[str], cell: float) -> None:
    """Write the classes at both axes, evenly spread ones where there are too many; ``cell`` is in inches."""
    n = len(names)
    every = 1 if n <= MOST_CLASSES else math.ceil(n / MOST_CLASSES)
    size = min(9.0, max(4.0, 72 * cell * 0.55))  # points, 72 an inch: a little more than half a cell
    axes.set_xticks(range(0, n, every), names[::every], rotation=90, fontsize=size)
    axes.set_yticks(range(0, n, every), names[::every], fontsize=size)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for side in axes.spines.values():
        side.set_color("#cccccc")


def _draw_grid(axes: Axes, n: int) -> None:
    """Lines between the cells: the grid of minor ticks, since the major ones are in the middle of the cells."""
    import numpy as np

    axes.set_xticks(np.arange(0.5, n - 1), minor=True)
    axes.set_yticks(np.arange(0.5, n - 1), minor=True)
    axes.grid(which="minor", color="#e8e8e8", linewidth=0.5)
    axes.tick_params(which="minor", length=0)


def _write_counts(axes: Axes, counts: Any, shares: Any, cell: float) -> None:
    """Write the number of samples into each cell that has some."""
    import numpy as np

    digits = max(2, len(f"{counts.max():.0f}"))
    size = min(9.0, 72 * cell / (0.75 * digits))
    for i, j in np.argwhere(counts > 0):
        colour = "white" if shares[i, j] > 0.55 else "#222222"
        axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=size)


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
    caption_lines = max((text.count("\n") + 1 for text in captions), default=1)
    line_height = 1.35 + 0.16 * caption_lines  # inches, as is the width of a column
    width = max(3.6, 1.35 * columns)
    height = 0.5 + line_height * max(1, lines)
    figure = new_figure(width, height)
    for place, (picture, text) in enumerate(zip(shown, captions, strict=True)):
        axes = figure.add_subplot(lines, columns, place + 1)
        # Smoothing would make a blur of the few pixels of a small picture.
        interpolation = "nearest" if max(picture.shape) < 100 else "antialiased"
        axes.imshow(picture, interpolation=interpolation)
        axes.set_xticks([])
        axes.set_yticks([])
        mark = None if right is None else right[place]
        _frame(axes, mark)
        _write_caption(axes, text, mark)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def _frame(axes: Axes, mark: bool | None) -> None:
    """A green frame for True, a red one for False, none for None."""
    for side in axes.spines.values():
        side.set_visible(mark is not None)
        side.set_color(RIGHT if mark else WRONG)
        side.set_linewidth(2.5)


def _write_caption(axes: Axes, text: str, mark: bool | None) -> None:
    lines = [_shortened(line, 20) for line in text.splitlines()]
    colour = "#222222"
    if mark is not None:
        colour = RIGHT if mark else WRONG
    # A class's name may hold dollar signs, which matplotlib would read as formulas.
    axes.set_xlabel("\n".join(lines), fontsize=7, parse_math=False, color=colour)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    """Give ``axes`` the look of all curves: a light grid, no box, whole numbers at the bottom."""
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

    def save(temporary: Path) -> None:
        figure.savefig(temporary, format="png", metadata=metadata, pad_inches=0.1, bbox_inches=edges)

    write_whole(path, save)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file, whole or not at all, in a folder that is made where it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
