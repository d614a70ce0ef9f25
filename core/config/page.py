"""What can be set in a configuration: every field with its type, default and meaning."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from core.config import Point, dump, find_class
from core.config.keys import KEYS, OF_STAGE
from core.config.schema import STACKS
from core.config.trainer_checks import SET_BY_RUN
from core.report.cards import argument_help, arguments, sections


def resolved(points: list[Point]) -> str:
    """The configurations of a command, as YAML documents; of several points each with its name."""
    documents = []
    for point in points:
        named = f"# {point.name}\n" if len(points) > 1 else ""
        # the domain may follow from the folder that the file is in, and has to be said anywhere else
        config = {**point.config, "domain": point.domain}
        documents.append(named + dump(config))
    return "---\n".join(documents)


def fields_text(point: Point) -> str:
    """Every field of a configuration that can be set on the command line: its type, its value here, what it means."""
    lines = [f"What can be set in {point.source}, as --KEY VALUE (the value here behind =):", ""]
    for key, text in KEYS.items():
        lines.append(f"{key}: {text}")
        for name, kind, value, meaning in _fields(point, key):
            given = "" if value is None else f" = {value}"
            lines.append(f"  --{name}  {kind}{given}")
            indent = " " * 8
            lines += textwrap.wrap(meaning, 110, initial_indent=indent, subsequent_indent=indent)
        lines.append("")
    return "\n".join(lines).rstrip()


SINGLE: dict[str, tuple[str, Any]] = {
    "model.checkpointing": ("bool", False), "seed_everything": ("int", 0), "select": ("last | best", "last"),
    "run_dir": ("str", None), "domain": ("str", None)}
"""Keys that are one value: its type, and its default."""
Field = tuple[str, str, Any, str]
"""Key, type, value (None where there is none), meaning."""


def _fields(point: Point, key: str) -> Iterator[Field]:
    """The fields below a key."""
    if key in ("model.backbone", "model.task", "data"):
        component = point.config
        for part in key.split("."):
            component = component.get(part) or {}
        if not component:  # only the task may be left out
            component = {"class_path": "Classification", "init_args": {}}
        yield from _of_component(component, key, point.domain)
    elif key in STACKS:
        given = point.config.get(key, [])
        components = given if isinstance(given, list) else [given]
        for number, component in enumerate(components):
            place = key if len(components) == 1 else f"{key}.{number}"
            yield from _of_component(component, place, point.domain)
    elif key in ("optimizer", "lr_scheduler"):
        from core.config.optimizer import OptimizerSettings, ScheduleSettings  # imports torch and lightning

        settings: Any = OptimizerSettings if key == "optimizer" else ScheduleSettings
        yield from _of_settings(settings, key, point.config[key])
    elif key == "trainer":
        yield from _of_trainer(point.config["trainer"])
    elif key == "stages":
        yield from _of_stages(point.config.get("stages") or {"NAME": {}})
    elif key in SINGLE:
        kind, default = SINGLE[key]
        given = point.config["model"] if key.startswith("model.") else point.config
        value = given.get(key.rpartition(".")[2], default)
        yield key, kind, value, ""


def _of_stages(stages: dict[str, Any]) -> Iterator[Field]:
    """What stages have beside the keys of a run."""
    for name, stage in stages.items():
        for key, (kind, default, meaning) in OF_STAGE.items():
            yield f"stages.{name}.{key}", kind, stage.get(key, default), meaning


def _of_component(component: dict[str, Any], key: str, domain: str) -> Iterator[Field]:
    """The class of a component, and its arguments."""
    cls = find_class(component["class_path"], key, domain)
    summary = sections(cls.__doc__ or "")["summary"]
    yield key, "class", component["class_path"], summary
    given = component["init_args"]
    for argument in arguments(cls):
        name = argument["name"]
        value = given.get(name, argument["default"])
        yield f"{key}.{name}", argument["type"] or "any", value, argument["help"]


def _of_settings(cls: Any, key: str, given: dict[str, Any]) -> Iterator[Field]:
    """The fields of a dataclass, whose docstring says what they mean."""
    meanings = argument_help(cls.__doc__ or "")
    defaults = cls()
    for field in fields(cls):
        value = given.get(field.name, getattr(defaults, field.name))
        yield f"{key}.{field.name}", str(field.type), value, meanings.get(field.name, "")


def _of_trainer(given: dict[str, Any]) -> Iterator[Field]:
    """The Trainer's arguments, without those that a run sets itself, and the one that is ours."""
    from lightning.pytorch import Trainer  # slow to import

    yield ("trainer.checkpoint_every_n_steps", "int | None", given.get("checkpoint_every_n_steps"),
           "optimizer steps between two checkpoints within an epoch; without it there is one at each epoch's end")
    meanings = argument_help(Trainer.__init__.__doc__ or "")
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items():
        if name == "self" or name in SET_BY_RUN:
            continue
        value = given.get(name, parameter.default)
        # Lightning's explanations go on for paragraphs
        first_sentence = meanings.get(name, "").partition(". ")[0]
        yield f"trainer.{name}", _type_text(parameter.annotation), value, first_sentence


def _type_text(annotation: Any) -> str:
    """A type as people write it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("typing.", "").replace("collections.abc.", "")
