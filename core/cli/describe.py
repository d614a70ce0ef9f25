"""``lightning describe``: what a configuration's methods cost, before anything is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.cli.failures import says_what_failed
from core.errors import ScionError, printable

CLASS_KEYS = ("class", "class_path", "backbone", "task", "data", "peft", "methods", "callbacks", "loggers")
"""Keys under which the name of a class can stand."""


@says_what_failed
def describe(config: str, overrides: list[str], as_json: bool, trust: bool = False) -> int:
    """Print what each run that a configuration asks for will cost: parameters, FLOPs, bytes.

    Args:
        config: a configuration, which may name any class: it is code. That of a run's folder may not.
        overrides: what the command line changes in it.
        as_json: print JSON.
        trust: whether a run's configuration may name any class too.
    """
    from core import cost  # start-up time
    from core.config import points  # start-up time
    from core.data.batch import shapes  # start-up time
    from core.report import value_text  # start-up time
    from core.training.assemble import assemble  # start-up time

    if not trust:
        check_published(config)
    found = points(config, overrides)
    records: list[dict[str, Any]] = []
    for point in found:
        assembly = assemble(point, read=False)
        for method in assembly.methods:
            method.attach(assembly.tuner.backbone)
        assembly.tuner.fit_head()
        assembly.tuner.fit_aside()
        batch = assembly.data.example(assembly.data.batch_size)
        counted = cost.describe(assembly.tuner.train(), batch)
        written = _written(assembly.tuner.backbone, batch)
        axes = {axis: value_text(value) for axis, value in point.axes.items()}
        if as_json:
            records.append({"axes": axes, "batch": _shapes(batch), **counted.to_dict()})
            if written is not None:
                records[-1]["generated_token"] = written.to_dict()
        else:
            values = ", ".join(f"{axis}={value}" for axis, value in axes.items())
            head = f"{values}: " if values else ""
            print(f"{head}one step on a batch {shapes(batch)}")
            if assembly.tuner.aside:
                print("training runs the backbone once more for what stands beside it; FLOPs and kept bytes leave it "
                      "out")
            print(counted)
            if written is not None:
                print(written)
            if point is not found[-1]:
                print()
    if as_json:
        # a list as soon as there are axes, even of one value: what reads it then need not look
        whole = records if len(records) > 1 or found[0].axes else records[0]
        print(json.dumps(whole, indent=1, default=str))
    return 0


def _written(backbone: Any, batch: Any) -> Any:
    """What a token costs that a language model writes behind as many as a sample of the batch has; None for others."""
    from core.report.token_cost import token_cost  # start-up time
    from core.text.backbones import LanguageModel  # start-up time

    if not isinstance(backbone, LanguageModel):
        return None
    return token_cost(backbone, batch["input_ids"].shape[1])


def _shapes(batch: Any) -> Any:
    """The shape of a batch, or of each of its tensors by name, as JSON."""
    if isinstance(batch, dict):
        return {name: _shapes(value) for name, value in batch.items()}
    return list(batch.shape)


def check_published(config: str) -> None:
    """Refuse the configuration in a run's folder where it names a class by its full path."""
    from core.config import read  # start-up time

    file = Path(config)
    if not (file.name == "config.yaml" and os.path.lexists(file.parent / "metrics.json") and file.is_file()):
        return
    raw = read(file)
    for name in _classes_named(raw):
        if "." in name:
            raise ScionError(f"{file}: {printable(name)} is a full path, and the configuration of a run imports none; "
                             "pass --trust if the run is your own")
    domain = raw.get("domain")
    if domain and not str(domain).isidentifier():
        raise ScionError(f"{file}: domain {printable(domain)} is no plain word")


def _classes_named(node: Any, key: str = "") -> Iterator[str]:
    """Everything in a configuration that stands where a class can stand."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _classes_named(value, str(name).rpartition(".")[2])
    elif isinstance(node, list):
        for value in node:
            yield from _classes_named(value, key)
    elif isinstance(node, str) and key in CLASS_KEYS:
        yield node
