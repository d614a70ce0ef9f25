"""Words and numbers as people read them; what all pages of a report share."""

from __future__ import annotations

from typing import Any


def methods_named(peft: Any) -> str:
    """``LoRA`` or ``LoRA + IST`` from whatever names methods: a name, a component, a recorded method, or a list."""
    if isinstance(peft, (list, tuple)):
        return " + ".join(map(methods_named, peft))
    if isinstance(peft, dict):
        # A component of a configuration has class_path, a method as metrics.json records it has class.
        name = peft.get("class_path") or peft.get("class") or peft.get("name") or "?"
        return str(name).rpartition(".")[2]
    return "" if peft is None else str(peft)


def scalars(values: Any) -> dict[str, float]:
    """The plain numbers of a split's metrics, names without the split, losses last."""
    metrics: dict[str, float] = {}
    losses: dict[str, float] = {}
    for key, value in (values or {}).items():
        # A boolean is an int to Python, and no number to a reader.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        name = str(key)
        for split in ("train/", "validation/", "test/"):
            name = name.removeprefix(split)
        if is_loss(name):
            losses[name] = float(value)
        else:
            metrics[name] = float(value)
    return {**metrics, **losses}


def is_loss(name: str) -> bool:
    """Whether a metric is a loss or a part of one: ``loss``, ``loss/mask``, ``base/loss``, ``penalty``."""
    return not {"loss", "penalty"}.isdisjoint(name.split("/"))


def bytes_text(count: float) -> str:
    """A size as people read it: ``1.4 KiB``."""
    if count < 1024:
        return f"{count:,.0f} bytes"
    count /= 1024
    for unit in ("KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration_text(seconds: float) -> str:
    """A time as people read it: ``2 min 5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def value_text(value: Any) -> str:
    """A value of an axis as a person reads it: a class by its name."""
    if isinstance(value, list):
        return " + ".join(map(value_text, value))
    if isinstance(value, dict) and ("class_path" in value or "class" in value):
        return methods_named(value)
    return str(value)


def data_named(data: dict[str, Any]) -> str:
    """The name of a run's data, and of the task in a suite."""
    name = data.get("name", "unnamed data")
    task = data.get("task")
    return f"{name}: {task}" if task else str(name)


def origin_of(metrics: dict[str, Any]) -> str:
    """Data and backbone of a run (its metrics.json)."""
    data = metrics.get("data") or {}
    backbone = metrics.get("backbone") or {}
    # Only False: the record of an unfinished run does not say ``pretrained``.
    is_random = backbone.get("pretrained") is False or backbone.get("kind") == "random"
    weights = ", random weights" if is_random else ""
    return f"{data_named(data)}; {backbone.get('name', '?')}{weights}"


def trained(metrics: dict[str, Any]) -> int:
    """The parameters that a run (its metrics.json) trained, without the head."""
    counts = metrics.get("parameters") or {}
    return sum(counts.get(owner) or 0 for owner in ("method", "norms", "other"))


def is_repetition(axis: str) -> bool:
    """Whether an axis of ``over`` repeats an experiment (seeds, folds) instead of comparing several."""
    option = axis.rpartition(".")[2]
    return axis == "seed_everything" or option.endswith(("seed", "fold"))


def aligned(header: list[str], body: list[list[str]], left: int = 1) -> list[str]:
    """The lines of a plain-text table; the first ``left`` columns are set left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    lines = []
    for cells in [header, *body]:
        padded = []
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True)):
            padded.append(cell.ljust(width) if number < left else cell.rjust(width))
        lines.append("  ".join(padded).rstrip())  # an empty last cell would leave blanks at the line's end
    rule = "  ".join("-" * width for width in widths)
    return [lines[0], rule, *lines[1:]]
