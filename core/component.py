"""A class by its name, with its arguments, as people write it: ``LoRA``, or ``{class: LoRA, rank: 16}``."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from core.errors import ScionError, listed
from core.json_types import Rule, shown

TRAINED = "Trained"
"""The class that a trained adapter among the methods stands for: ``{adapter: FOLDER}`` is short for it."""
TRAINED_OPTIONS = ("adapter", "name", "trainable", "base")
CLASS_KEYS = {"class_path", "class", "init_args"}
"""Keys that say which class, in the long form and the short one; beside ``class`` all others are arguments."""


def is_class_name(name: str) -> bool:
    """Whether ``name`` can be that of a class, bare or as a full path."""
    return len(name) <= 255 and all(part.isidentifier() for part in name.split("."))


ClassName = Annotated[str, Rule(is_class_name, "the name of a class")]


class ClassAndArguments(TypedDict):
    """A class in normal form."""

    class_path: ClassName
    init_args: dict[str, Any]


Component = Annotated[ClassAndArguments, Rule(bool, "a class, as LoRA or {class: LoRA, rank: 16}")]


def is_trained_adapter(value: Any) -> bool:
    """Whether an entry names the folder of a trained adapter and no class."""
    return isinstance(value, dict) and "adapter" in value and not value.keys() & CLASS_KEYS


def short(text: str) -> str:
    """Text in quotes, cut where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def cut(text: str) -> str:
    """Text, cut where it is long."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def class_and_arguments(value: Any, key: str) -> dict[str, Any]:
    """A class and its arguments in normal form, whose types `Component` says and the caller checks.

    Raises:
        ScionError: the value names no class, or has keys beside ``class_path`` that would be dropped.
    """
    if isinstance(value, str):
        value = {"class_path": value}
    if is_trained_adapter(value) and key.partition("[")[0] == "peft":
        return {"class_path": TRAINED, "init_args": dict(value)}
    if not isinstance(value, dict) or not value.keys() & {"class_path", "class"}:
        instead = "write a name, or class_path and init_args"
        if key == "peft" and value is None:  # who writes `peft: null` wants no method
            instead = "write a method's name: LinearProbe trains the head alone, FullFineTuning everything"
        raise ScionError(f"{key}: {shown(value)} names no class; {instead}")
    name = value.get("class_path", value.get("class"))
    rest = {argument: given for argument, given in value.items() if argument not in CLASS_KEYS}
    if "class_path" in value and "class" in value:
        raise ScionError(f"{key}: both class_path and class; write one of them")
    if "init_args" in value and "class" in value:
        raise ScionError(f"{key}: init_args belongs to class_path; beside class the arguments stand themselves")
    if "class_path" in value and rest:
        raise ScionError(f"{key}: {listed(rest, 4)} beside class_path; write {{class_path: {name}, init_args: "
                         f"{{...}}}}, or {{class: {name}, {next(iter(rest))}: ...}}")
    arguments = value.get("init_args") if "class_path" in value else rest
    # On a command line a stack looks like a list of values of an axis, and is often written like one.
    is_list = key.partition("[")[0] in ("peft", "callbacks", "loggers")
    if is_list and isinstance(name, str) and "," in name:
        names = ", ".join(part.strip() for part in name.split(","))
        several = "a stack of methods is" if key.startswith("peft") else "several are"
        raise ScionError(f"{key}: {short(name)} must be the name of a class; {several} written [{cut(names)}]")
    return {"class_path": name, "init_args": {} if arguments is None else arguments}
