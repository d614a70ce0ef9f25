"""What is printed when a run has ended. Numbers from a mini or a nano say so wherever they are shown."""

from __future__ import annotations

from typing import Any

from core.report.text import bytes_text, data_named, duration_text, methods_named, scalars


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
