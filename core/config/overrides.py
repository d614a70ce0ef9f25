"""Keys set in a configuration: what the command line says, the order in which it is done, and how a key finds its
place."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.component import short
from core.config.document import parse
from core.config.schema import (
    COMPONENTS,
    KEYS,
    LISTS,
    STACKS,
    STAGE_KEYS,
    component,
    normal_stage,
    normal_value,
    place_of,
)
from core.errors import ScionError, listed, nearest
from core.json_types import shown

SETTABLE = tuple(key for key in KEYS if key not in ("over", "per"))
LONGEST_KEY = 200
BELONGS = {"optimizer": ("AdamW", "options"), "lr_scheduler": ("cosine", "final")}
"""What has a name and settings that are written for that name: the name by default, and the key of the settings."""


@dataclass(frozen=True)
class Change:
    """A value for a key (dotted), or, with ``append``, one more in its list."""

    key: str
    value: Any
    append: bool = False

    @property
    def path(self) -> str:
        """See `path_of`."""
        return path_of(self.key)


def path_of(key: str) -> str:
    """The key without ``init_args``, which may be left out."""
    return re.sub(r"\.init_args(?=\.)", "", key)


# ------------------------------------------------------------------------------------------------- the command line


def split(arguments: list[str]) -> list[tuple[str, str, str]]:
    """``--key value``, ``--key=value`` and ``--key+=value`` as (key, operator, value)."""
    found: list[tuple[str, str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        match = re.fullmatch(r"--([\w.\-]+?)(?:(\+?=)(.*))?", word, re.DOTALL)
        if not match:
            raise ScionError(f"{short(word)}: not an override; write --key value, as in --peft LoRA --peft.rank 16")
        key, operator, value = match.groups()
        if len(key) > LONGEST_KEY:
            raise ScionError(f"--{key[:LONGEST_KEY]}...: no key is that long")
        if operator is None:
            if not rest:
                raise ScionError(f"--{key}: a value is missing")
            if re.match(r"--\w", rest[0]):
                raise ScionError(f"--{key}: a value is missing before {short(rest[0])}; one that begins with -- stands "
                                 "behind an equals sign")
            operator = "="
            value = rest.pop(0)
        found.append((key, operator, value))
    return found


def split_commas(text: str) -> list[str]:
    """The parts between commas; those in brackets and in quotes stay together."""
    parts: list[str] = []
    depth, start, quote = 0, 0, ""
    for i, letter in enumerate(text):
        if quote:
            if letter == quote:
                quote = ""
        elif letter in "'\"" and not text[start:i].strip(" [{(:,"):  # an apostrophe within a word is no quote
            quote = letter
        elif letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth = max(0, depth - 1)  # one closed and never opened is a letter like others
    parts.append(text[start:])
    return [part.strip() for part in parts]


@dataclass
class CommandLine:
    """What the command line asks for: axes, what it says of ``per``, and changes in their order."""

    axes: dict[str, list[Any]]
    per: list[tuple[str, Any]]
    changes: list[Change]


def command_line(arguments: list[str]) -> CommandLine:
    """The arguments behind the configuration's name.

    Raises:
        ScionError: what cannot be read, is said twice, or would be lost.
    """
    found = CommandLine({}, [], [])
    for key, operator, text in split(arguments):
        if key == "over":
            axis, values = _axis(operator, text)
            paths = [path_of(other) for other in found.axes]
            if path_of(axis) in paths:
                raise ScionError(f"--over {axis}: the axis stands twice; write all of its values behind one --over")
            found.axes[axis] = values
        elif key == "per" or key.startswith("per."):
            if operator != "=":
                raise ScionError(f"--{key}+=: per is set as a whole, or one axis of it: --per.data.task '{{...}}'")
            found.per.append((key, parse(text, f"--{key}")))
        elif key.startswith("over."):
            raise ScionError(f"--{key}: write --over {key.removeprefix('over.')}=VALUE,VALUE,...")
        else:
            value = parse(text, f"--{key}")
            found.changes.append(Change(key, value, append=operator == "+="))
    _check_lost(found)
    return found


def _axis(operator: str, text: str) -> tuple[str, list[Any]]:
    """The axis and the values of what follows ``--over``."""
    axis, equals, values = text.partition("=")
    axis = axis.strip()
    if operator != "=" or not axis or not equals:
        raise ScionError(f"--over {short(text)}: write AXIS=VALUE,VALUE,..., as in --over data.fold=1,2,3")
    parts = split_commas(values)
    if not all(parts):
        raise ScionError(f"--over {axis}: a value is missing; write {axis}=VALUE,VALUE,..., and '' for empty text")
    return axis, [parse(value, f"--over {axis}") for value in parts]


def _check_lost(found: CommandLine) -> None:
    """Refuse what a later word would undo. The same key again is no mistake: the last one holds."""
    for i, late in enumerate(found.changes):
        if late.append:
            continue
        for early in found.changes[:i]:
            is_replaced = early.append and early.path == late.path
            if is_replaced or _is_below(early.path, late.path):
                raise ScionError(f"--{early.key} stands before --{late.key}, which would undo it; write it behind")
    for axis in found.axes:
        for change in found.changes:
            if change.path == path_of(axis) and not change.append:
                raise ScionError(f"--{change.key}: {axis} is an axis of --over as well; write one of the two")


def _is_below(path: str, other: str) -> bool:
    """Whether setting ``other`` anew takes away what was set at ``path``."""
    if path.startswith(f"{other}."):
        return True
    part, _, last = other.rpartition(".")
    base = part.rpartition(".")[2] or part  # without the stage that it may be in
    if last != "name" or base not in BELONGS:
        return False
    settings = BELONGS[base][1]
    return f"{path}.".startswith(f"{part}.{settings}.")


def in_order(changes: Iterable[Change], axes: Iterable[Change]) -> list[Change]:
    """The order in which all of them hold: what an axis would take away comes behind it, a stage's own values behind
    those of the whole."""
    axes = sorted(axes, key=lambda axis: axis.path.count("."))
    early: list[Change] = []
    late: list[Change] = []
    for change in changes:
        if any(change.path == axis.path or _is_below(change.path, axis.path) for axis in axes):
            late.append(change)
        else:
            early.append(change)
    # the sort is stable: it only takes the stages to the end, since a new one starts from the whole configuration
    return sorted([*early, *axes, *late], key=lambda change: change.key.startswith("stages."))


def whole_first(settings: dict[str, Any]) -> list[Change]:
    """Settings of a mapping, which has no order: what would take others away comes first."""
    changes = [Change(key, value) for key, value in settings.items()]
    found: list[Change] = []
    for change in changes:
        undone = [i for i, other in enumerate(found) if _is_below(other.path, change.path)]
        place = undone[0] if undone else len(found)
        found.insert(place, change)
    return found


# ------------------------------------------------------------------------------------------------- setting a key


def assign(config: dict[str, Any], key: str, value: Any, append: bool = False) -> None:
    """Set ``key`` (dotted; through the arguments of classes) in a configuration in normal form, in place.

    A class that is set by its name starts from its own defaults, not from what the file gave the former one; so do an
    optimizer's options and a schedule's ``final`` where the name changes. A stage that does not say what the key is
    part of starts from that of the whole configuration.

    Raises:
        ScionError: there is no such key.
    """
    parts = key.split(".")
    if parts[0] not in SETTABLE:
        raise ScionError(f"--{key}: unknown key {short(parts[0])}{place_of(parts[0], SETTABLE)}; the keys are "
                         f"{listed(SETTABLE, 20)}")
    if not all(parts):
        raise ScionError(f"--{key}: a word is missing between two dots")
    if parts[0] == "stages" and len(parts) == 2 and isinstance(config.get("stages", {}), dict):
        stage = normal_stage(parts[1], value)
        config.setdefault("stages", {})[parts[1]] = stage
        return
    node: Any = config
    if parts[0] == "stages" and len(parts) > 2:
        node = _stage(config, parts, append, key)
        parts = parts[2:]
    for i, part in enumerate(parts[:-1]):
        node = _into(node, part, parts[:i], key)
    try:
        _set(node, parts, value, append, key)
    except ScionError as error:
        text = str(error)
        if not text.startswith("--"):  # it names the key without the stage
            text = key.removesuffix(".".join(parts)) + text
        raise ScionError(text) from None


def _stage(config: dict[str, Any], parts: list[str], append: bool, key: str) -> dict[str, Any]:
    """The stage that a key names, with its own copy of what the key is part of."""
    stages = config.get("stages")
    if not isinstance(stages, dict):
        stages = {}
    name, slot = parts[1], parts[2]
    stage = stages.get(name)
    if not isinstance(stage, dict):
        raise ScionError(f"--{key}: no stage is called {short(name)}{nearest(name, stages)}; there are "
                         f"{listed(stages) or 'none'}")
    if slot not in STAGE_KEYS:
        raise ScionError(f"--{key}: unknown key {short(slot)}{nearest(slot, STAGE_KEYS)}; the keys of a stage "
                         f"are {listed(STAGE_KEYS, 20)}")
    # a key that is set as a whole needs no copy of what it replaces
    sets_a_part = append or len(parts) > 3
    if sets_a_part and slot not in stage and slot in config:
        stage[slot] = copy.deepcopy(config[slot])
    return stage


def _leaf(method: dict[str, Any]) -> str:
    """The name of a method's class, without its module."""
    return method["class_path"].rpartition(".")[2]


def _into(node: Any, part: str, before: list[str], key: str) -> Any:
    """What is under ``part`` in ``node``, made where there is nothing."""
    if not before and part in LISTS and not node.get(part):
        raise ScionError(f"--{key}: there are no {part} of which to set one; write --{part} NAME before it")
    if isinstance(node, list) and before and before[0] in STACKS and len(before) == 1:  # that of the name, or the last
        named = [one for one in node if part in (_leaf(one), one["init_args"].get("name"))]
        if len(named) > 1:
            what = "methods" if before == ["peft"] else before[0]
            raise ScionError(f"--{key}: {len(named)} {what} are called {part!r}; give each a name of its own (name: "
                             "...) and set it by that")
        if named:
            return named[0]
        node = node[-1]
    if isinstance(node, dict) and "class_path" in node and part not in node:
        if before == ["peft"] and _leaf(node) == part:  # one method, named as in a stack
            return node
        node = node["init_args"]
    if not isinstance(node, dict):
        raise ScionError(f"--{key}: {'.'.join(before)} is {shown(node)}, which has no {short(part)}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _set(node: Any, parts: list[str], value: Any, append: bool, key: str) -> None:
    """Set the last of ``parts`` in ``node``, to which the others have led."""
    last = parts[-1]
    slot = ".".join(parts)
    place = ".".join(parts[:-1])
    if isinstance(node, list) and place in STACKS:
        node = node[-1]
    if isinstance(node, dict) and "class_path" in node and slot not in COMPONENTS:
        if last in ("class_path", "init_args"):
            changed = {**node, last: value}
            node.update(component(changed, place))
            return
        node = node["init_args"]
    if not isinstance(node, dict):
        raise ScionError(f"--{key}: {place} is {shown(node)}, which has no {short(last)}")
    if append:
        value = _appended(node, last, value, slot, key)
    if place in BELONGS and last == "name":
        usual_name, settings = BELONGS[place]
        if value != node.get("name", usual_name):
            node.pop(settings, None)
    node[last] = normal_value(slot, value)


def _appended(node: dict[str, Any], last: str, value: Any, slot: str, key: str) -> list[Any]:
    """The present list with one value more, or with those of a list."""
    present = node.get(last)
    more = value if isinstance(value, list) else [value]
    if slot in STACKS:
        if present is None:
            present = []
        elif not isinstance(present, list):
            present = [present]
        place = f"{slot}[{len(present)}]" if slot in LISTS else slot
        return [*present, *(component(one, place) for one in more)]
    if not isinstance(present, list):
        what = "says nothing of it" if present is None else f"has {shown(present)} there"
        raise ScionError(f"--{key}+=: the configuration {what}, and not a list; write the whole list with --{key}")
    return [*present, *more]
