"""What is found in a configuration before its objects are made: folders of trained adapters, the last stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from core.component import TRAINED, is_trained_adapter

Change = Callable[[str], str]


def adapters_in(config: dict[str, Any]) -> list[str]:
    """The folders of trained adapters that a configuration names, its stages' too, each once and as it is written."""
    found: dict[str, None] = {}

    def note(folder: str) -> str:
        found[folder] = None
        return folder

    with_adapters(config, note)
    return list(found)


def with_adapters(config: dict[str, Any], change: Change) -> dict[str, Any]:
    """The configuration with other folders in the place of those of its trained adapters."""
    found = dict(config)
    if "peft" in config:
        found["peft"] = _changed(config["peft"], change)
    stages = config.get("stages")
    if isinstance(stages, dict):
        found["stages"] = {name: with_adapters(stage, change) for name, stage in stages.items()}
    return found


def parts_of(peft: Any) -> Iterator[dict[str, Any]]:
    """The methods of a configuration in normal form: one, or a stack of them."""
    yield from peft if isinstance(peft, list) else [peft]


def last_stage(config: dict[str, Any]) -> dict[str, Any]:
    """What the last stage has otherwise than the whole configuration: a run's result is its."""
    stages = config.get("stages")
    if not isinstance(stages, dict) or not stages:
        return {}
    last = list(stages.values())[-1]
    return last if isinstance(last, dict) else {}


def _changed(part: Any, change: Change) -> Any:
    """A method, a stack of them, or an entry of a composition, with other folders."""
    if isinstance(part, list):
        return [_changed(one, change) for one in part]
    if not isinstance(part, dict):
        return part
    if is_trained_adapter(part) and isinstance(part["adapter"], str):
        return {**part, "adapter": change(part["adapter"])}
    if "init_args" in part or "class_path" in part:
        arguments = part.get("init_args") or {}
        if part.get("class_path") == TRAINED and isinstance(arguments.get("adapter"), str):
            return {**part, "init_args": {**arguments, "adapter": change(arguments["adapter"])}}
        return {**part, "init_args": _in_arguments(arguments, change)} if arguments else part
    return _in_arguments(part, change)


def _in_arguments(arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    """Arguments of a class, in which a composition lists its methods; a word among those is a folder."""
    methods = arguments.get("methods")
    if not isinstance(methods, list):
        return arguments
    found: list[Any] = []
    for one in methods:
        found.append(change(one) if isinstance(one, str) else _changed(one, change))
    return {**arguments, "methods": found}
