"""What is printed when a run has ended. Numbers from a mini or a nano say so wherever they are shown."""

from __future__ import annotations

from typing import Any

from core.report.text import bytes_text, data_named, duration_text, methods_named, scalars

CHECKPOINTS = {"last": "the last epoch's", "best": "the best by validation"}
Row = tuple[str, str]


def reasons(metrics: dict[str, Any]) -> list[str]:
    """Why the numbers of a run (its metrics.json) are no benchmark result; empty where they are one."""
    data = metrics.get("data") or {}
    backbone = metrics.get("backbone") or {}
    found = []
    if data.get("source") == "mini":
        found.append(f"the data are a generated mini ({data.get('name', 'unnamed')})")
    if backbone.get("kind") == "nano" or backbone.get("name") == "nano":
        found.append("the backbone is the built-in nano")
    # Only False: the record of an unfinished run does not say ``pretrained``.
    if backbone.get("kind") == "random" or backbone.get("pretrained") is False:
        found.append("the backbone's weights are random")
    return found


def caution(found: list[str]) -> str:
    """The loud line for these reasons, or an empty string."""
    return f"NOT A BENCHMARK RESULT: {', and '.join(found)}" if found else ""


def summary(metrics: dict[str, Any]) -> str:
    """The closing summary of a run for a person, from the content of its metrics.json; what is missing is left out."""
    data = metrics.get("data") or {}
    backbone = metrics.get("backbone") or {}
    methods = methods_named(metrics.get("peft")) or "run"
    backbone_name = backbone.get("name", "an unnamed backbone")
    status = metrics.get("status", "status unknown")
    lines = [f"{methods} on {backbone_name}, {data_named(data)}: {status}"]
    why = reasons(metrics)
    if why:
        lines.append(f"*** {caution(why)} ***")
    rows = _parameter_rows(metrics.get("parameters") or {})
    rows += _result_rows(metrics)
    rows += _effort_rows(metrics)
    rows += [("warning", str(text)) for text in metrics.get("warnings") or []]
    width = max((len(name) for name, _ in rows), default=0)
    lines += [f"  {name:<{width}}  {text}" for name, text in rows]
    return "\n".join(lines)


def _parameter_rows(counts: dict[str, int]) -> list[Row]:
    """What was trained, as a share of the backbone (of the model where the backbone was not counted)."""
    if not counts:
        return []
    own = sum(counts.get(owner) or 0 for owner in ("method", "norms", "other"))
    rows = [("trained", "; ".join(_trained_parts(counts, own)))]
    # Methods may store more than they train: the buffers of a normalization, for example.
    if counts.get("stored") not in (None, own):
        rows.append(("stored", f"{counts['stored']:,} numbers"))
    return rows


def _trained_parts(counts: dict[str, int], own: int) -> list[str]:
    first = f"{own:,} parameters"
    if counts.get("backbone"):
        first += f", {own / counts['backbone']:.4%} of the backbone's {counts['backbone']:,}"
    elif counts.get("total"):
        first += f", {own / counts['total']:.4%} of the model's {counts['total']:,}"
    parts = [first]
    if counts.get("norms"):
        parts.append(f"{counts['norms']:,} of them in norms")
    if counts.get("head"):
        parts.append(f"and a head of {counts['head']:,}")
    if counts.get("beside"):
        parts.append(f"beside the model, for training alone, {counts['beside']:,}")
    return parts


def _result_rows(metrics: dict[str, Any]) -> list[Row]:
    """The size of the adapter, and the metrics of each split with the checkpoint that they were measured on."""
    rows = []
    size = metrics.get("adapter_bytes")
    if size is not None:
        rows.append(("adapter", f"{bytes_text(size)} ({size:,} bytes)"))
    by_split = metrics.get("metrics") or {}
    for split in ("validation", "test"):
        values = scalars(by_split.get(split))
        for name, own in _by_set(values).items():  # a run may have no test set, or may not have validated
            numbers = [f"{metric} {value:.4f}" for metric, value in own.items()]
            rows.append((f"{split} {name}".rstrip(), "   ".join(numbers)))
    select = metrics.get("select")
    if select:
        rows.append(("checkpoint", CHECKPOINTS.get(select, str(select))))
    return rows


def _by_set(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Metrics by the name of their test set; those of the only one, and parts of its loss, under no name."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        first, _, rest = name.partition("/")
        if not rest or first == "loss":
            first, rest = "", name
        found.setdefault(first, {})[rest] = value
    return found


def _effort_rows(metrics: dict[str, Any]) -> list[Row]:
    rows = []
    seconds = metrics.get("seconds")
    if seconds is not None:
        rows.append(("time", duration_text(seconds)))
    peak = metrics.get("peak_memory_bytes")
    if peak:  # 0 on a machine whose GPU the run did not use
        rows.append(("peak memory", bytes_text(peak)))
    return rows
