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
from core.config.schema import COMPONENTS, KEYS, STAGE_KEYS, component, normal_stage, normal_value, place_of
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
            operator, value = "=", rest.pop(0)
        found.append((key, operator, value))
    return found


def split_commas(text: str) -> list[str]:
    """The parts between commas; those in brackets and in quotes stay together."""
    parts, depth, start, quote = [], 0, 0, ""
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not text[start:i].strip(" [{(:,"):  # an apostrophe within a word is no quote
            quote = letter
        elif letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
        else:
            depth = max(0, depth + (letter in "[{(") - (letter in ")}]"))
    return [part.strip() for part in [*parts, text[start:]]]


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
            if any(path_of(axis) == path_of(other) for other in found.axes):
                raise ScionError(f"--over {axis}: the axis stands twice; write all of its values behind one --over")
            found.axes[axis] = values
        elif key == "per" or key.startswith("per."):
            if operator != "=":
                raise ScionError(f"--{key}+=: per is set as a whole, or one axis of it: --per.data.task '{{...}}'")
            found.per.append((key, parse(text, f"--{key}")))
        elif key.startswith("over."):
            raise ScionError(f"--{key}: write --over {key.removeprefix('over.')}=VALUE,VALUE,...")
        else:
            found.changes.append(Change(key, parse(text, f"--{key}"), operator == "+="))
    _check_lost(found)
    return found


def _axis(operator: str, text: str) -> tuple[str, list[Any]]:
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
        for early in found.changes[:i]:
            if not late.append and (_is_below(early.path, late.path) or early.append and early.path == late.path):
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
    base = part.rpartition(".")[2] or part
    return last == "name" and base in BELONGS and f"{path}.".startswith(f"{part}.{BELONGS[base][1]}.")


def in_order(changes: Iterable[Change], axes: Iterable[Change]) -> list[Change]:
    """The order in which all of them hold: what an axis would take away comes behind it, a stage's own values behind
    those of the whole."""
    axes = sorted(axes, key=lambda axis: axis.path.count("."))
    early: list[Change] = []
    late: list[Change] = []
    for change in changes:
        undone = any(_is_below(change.path, axis.path) or change.path == axis.path for axis in axes)
        (late if undone else early).append(change)
    return sorted([*early, *axes, *late], key=lambda change: change.key.startswith("stages."))


def whole_first(settings: dict[str, Any]) -> list[Change]:
    """Settings of a mapping, which has no order: what would take others away comes first."""
    changes = [Change(key, value) for key, value in settings.items()]
    found: list[Change] = []
    for change in changes:
        place = next((i for i, other in enumerate(found) if _is_below(other.path, change.path)), len(found))
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
    holder = config
    if parts[0] == "stages" and len(parts) == 2 and isinstance(config.get("stages", {}), dict):
        config.setdefault("stages", {})[parts[1]] = normal_stage(parts[1], value)
        return
    if parts[0] == "stages" and len(parts) > 2:
        holder, parts = _stage(config, parts, append, key), parts[2:]
    node: Any = holder
    for i, part in enumerate(parts[:-1]):
        node = _into(node, part, parts[:i], key)
    try:
        _set(node, parts, value, append, key)
    except ScionError as error:
        place = key.removesuffix(".".join(parts))
        raise ScionError(str(error) if str(error).startswith("--") else f"{place}{error}") from None


def _stage(config: dict[str, Any], parts: list[str], append: bool, key: str) -> dict[str, Any]:
    """The stage that a key names, with its own copy of what the key is part of."""
    stages = config.get("stages")
    stages = stages if isinstance(stages, dict) else {}
    stage = stages.get(parts[1])
    if not isinstance(stage, dict):
        raise ScionError(f"--{key}: no stage is called {short(parts[1])}{nearest(parts[1], stages)}; there are "
                         f"{listed(stages) or 'none'}")
    if parts[2] not in STAGE_KEYS:
        raise ScionError(f"--{key}: unknown key {short(parts[2])}{nearest(parts[2], STAGE_KEYS)}; the keys of a stage "
                         f"are {listed(STAGE_KEYS, 20)}")
    if parts[2] not in stage and parts[2] in config and (append or len(parts) > 3):
        stage[parts[2]] = copy.deepcopy(config[parts[2]])
    return stage


def _leaf(method: dict[str, Any]) -> str:
    return method["class_path"].rpartition(".")[2]


def _into(node: Any, part: str, before: list[str], key: str) -> Any:
    """What stands under ``part`` in ``node``, made where there is nothing."""
    if isinstance(node, list) and before == ["peft"]:  # a stack: the method of that name, or the last one
        named = [one for one in node if part in (_leaf(one), one["init_args"].get("name"))]
        if len(named) > 1:
            raise ScionError(f"--{key}: {len(named)} methods are called {part!r}; give each a name of its own (name: "
                             "...) and set it by that")
        if named:
            return named[0]
        node = node[-1]
    if isinstance(node, dict) and "class_path" in node and part not in node:
        if before == ["peft"] and _leaf(node) == part:
            return node
        node = node["init_args"]
    if not isinstance(node, dict):
        raise ScionError(f"--{key}: {'.'.join(before)} is {shown(node)}, which has no {short(part)}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _set(node: Any, parts: list[str], value: Any, append: bool, key: str) -> None:
    last, slot, place = parts[-1], ".".join(parts), ".".join(parts[:-1])
    if isinstance(node, list) and place == "peft":
        node = node[-1]
    if isinstance(node, dict) and "class_path" in node and slot not in COMPONENTS:
        if last in ("class_path", "init_args"):
            node.update(component({**node, last: value}, place))
            return
        node = node["init_args"]
    if not isinstance(node, dict):
        raise ScionError(f"--{key}: {place} is {shown(node)}, which has no {short(last)}")
    if append:
        value = _appended(node, last, value, slot, key)
    if place in BELONGS and last == "name" and value != node.get("name", BELONGS[place][0]):
        node.pop(BELONGS[place][1], None)
    node[last] = normal_value(slot, value)


def _appended(node: dict[str, Any], last: str, value: Any, slot: str, key: str) -> list[Any]:
    """The list at hand with one value more, or with those of a list."""
    present = node.get(last)
    more = value if isinstance(value, list) else [value]
    if slot == "peft":
        present = [] if present is None else present
        return [*(present if isinstance(present, list) else [present]), *(component(one, slot) for one in more)]
    if not isinstance(present, list):
        what = "says nothing of it" if present is None else f"has {shown(present)} there"
        raise ScionError(f"--{key}+=: the configuration {what}, and not a list; write the whole list with --{key}")
    return [*present, *more]
