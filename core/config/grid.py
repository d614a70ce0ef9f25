"""The runs that a file and a command line ask for: one, or one for each point of ``over``."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.component import TRAINED, short
from core.config.build import choices
from core.config.checks import check_points
from core.config.document import find, parse, read
from core.config.overrides import Change, CommandLine, assign, command_line, in_order, path_of, whole_first
from core.config.schema import COMPONENTS, LISTS, Over, Per, check, check_whole, component, normal, normal_value
from core.errors import ScionError, listed, nearest
from core.json_types import shown

LONGEST = 240
"""Bytes of a point's folder name; a file system takes 255, and locks and numbers are added."""
MOST_POINTS = 5000
SETTINGS = ("model", "data", "peft", "callbacks", "loggers", "optimizer", "lr_scheduler", "trainer", "seed_everything",
            "stages", "select")
"""Keys that ``per`` can set."""
NO_AXES = ("over", "per", "run_dir")
"""Keys that say where and how often, and not what is run."""


@dataclass
class Point:
    """One run: its configuration in normal form, and the values of the axes that lead to it."""

    config: dict[str, Any]
    source: str
    domain: str
    axes: dict[str, Any] = field(default_factory=dict)
    ambiguous: bool = False
    """Whether another point of the grid would have the same name without the configuration's hash in it."""

    @property
    def name(self) -> str:
        """``<method>-seed<n>``, with the values of other axes; the name of the point's folder.

        A name that is too long, or another point's as well, has the configuration's hash in it.
        """
        methods = self.config["peft"]
        if not isinstance(methods, list):
            methods = [methods]
        parts = ["+".join(_word(label(method)) for method in methods)]
        for axis, value in self.axes.items():
            if axis not in ("peft", "seed_everything"):  # these two are in every name
                argument = axis.rpartition(".")[2]
                parts.append(f"{argument}={_word(label(value))}")
        seed = f"seed{self.config['seed_everything']}"
        name = "-".join([*parts, seed])
        if not self.ambiguous and len(name.encode()) <= LONGEST:
            return name
        end = f"-{self.hash}-{seed}"
        # cut by bytes, as file systems count; of a letter that is cut in two nothing stays
        begin = "-".join(parts).encode()[:LONGEST - len(end)].decode(errors="ignore")
        return begin + end

    @property
    def hash(self) -> str:
        """12 digits of what determines the results; where they are written does not."""
        kept = {key: value for key, value in self.config.items() if key not in ("run_dir", "over")}
        if not kept.get("callbacks"):  # none is what a configuration has that does not say so
            kept.pop("callbacks", None)
        text = json.dumps(kept, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def label(value: Any) -> Any:
    """A class in a configuration as a person would write it, arguments included; other values as they are."""
    if not isinstance(value, dict) or value.keys() != {"class_path", "init_args"}:
        return value
    name = value["class_path"].rpartition(".")[2]
    if name == TRAINED:  # its folder says what it is
        options = dict(value["init_args"])
        value = {**value, "init_args": options}
        name = str(options.pop("adapter", name))
    given = ", ".join(f"{key}={argument}" for key, argument in value["init_args"].items())
    return f"{name}({given})" if given else name


def _word(value: Any) -> str:
    """A value as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def points(config: str, overrides: list[str] | None = None) -> list[Point]:
    """The runs that a configuration file and command-line overrides ask for: one, or one for each point of ``over``.

    Raises:
        ScionError: whatever can be said against them without building anything.
    """
    file = find(config)
    base = normal(read(file), file.name)
    asked = command_line(overrides or [])
    axes = _axes(base.pop("over", None) or {}, asked)
    per = _per(base.pop("per", None) or {}, asked, file.name)
    grid = Grid(base, per, asked.changes, file)
    return grid.points(axes)


def _axes(in_file: dict[str, list[Any]], asked: CommandLine) -> dict[str, list[Any]]:
    """The axes: the command line's, and of the file's those of which it says nothing."""
    said = {path_of(axis) for axis in asked.axes} | {change.path for change in asked.changes}
    axes = dict(asked.axes)
    for axis, values in in_file.items():
        if path_of(axis) not in said:
            axes[axis] = values
    check(axes, Over, "over")
    for axis, values in axes.items():
        _check_axis(axis, values)
    count = math.prod(len(values) for values in axes.values())
    if count > MOST_POINTS:
        raise ScionError(f"--over: {count} runs; {MOST_POINTS} at most")
    return axes


def _check_axis(axis: str, values: list[Any]) -> None:
    """Refuse what is no axis, and values that are one."""
    first_word = axis.partition(".")[0]
    if first_word in NO_AXES:
        raise ScionError(f"--over {axis}: {first_word} is no axis; it is the same for all runs")
    if axis in COMPONENTS:  # a table shows a class by its name, without the module
        values = [_component_label(axis, value) for value in values]
    seen: set[str] = set()
    for value in values:
        identity = json.dumps(_same(value), sort_keys=True)
        if identity in seen:
            raise ScionError(f"--over {axis}: the value {shown(value)} stands twice, and a run counts once")
        seen.add(identity)


def _same(value: Any) -> Any:
    """The same for values that mean the same, as 0 and 0.0."""
    if isinstance(value, str):
        value = _number(value)
    if _is_number(value):
        # a larger whole number would be rounded to another one's float
        return float(value) if abs(value) < 2**53 else str(value)
    if isinstance(value, list):
        return [_same(part) for part in value]
    if isinstance(value, dict):
        return {key: _same(part) for key, part in value.items()}
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(text: str) -> Any:
    """Text that says a number, as that number."""
    try:
        value = parse(text)
    except ScionError:
        return text
    return value if _is_number(value) else text


def _per(in_file: dict[str, Any], asked: CommandLine, where: str) -> dict[str, Any]:
    """The settings that go with values: the file's, with what the command line sets anew."""
    per = in_file
    for key, value in asked.per:
        axis = key.removeprefix("per").removeprefix(".")
        if axis:
            value = {**per, axis: value}
        per = normal_value("per", value) or {}
        where = f"--{key}"
    check(per, Per, "per")
    for axis, table in per.items():
        for value, settings in table.items():
            for key in settings:
                if key.partition(".")[0] not in SETTINGS:
                    raise ScionError(f"{where}: per.{axis}.{value}: {short(key)} is no setting"
                                     f"{nearest(key, SETTINGS)}; settings begin with {listed(SETTINGS)}")
    return per


@dataclass
class Grid:
    """What all points share: the file's configuration, its ``per``, and the command line's changes."""

    base: dict[str, Any]
    per: dict[str, Any]
    changes: list[Change]
    file: Path

    def points(self, axes: dict[str, list[Any]]) -> list[Point]:
        """The points of all axes, checked."""
        every = {}
        for axis, values in axes.items():
            every[axis] = self.every(axis) if values == ["all"] else values
        found: list[Point] = []
        for values in itertools.product(*every.values()):
            at = [Change(axis, value) for axis, value in zip(every, values, strict=True)]
            settings: list[Change] = []
            if self.per:
                # what goes with a value is known only when the command line and the axes have had their say
                settings = self.settings(self.config(at, []))
            config = self.config(at, settings)
            check_whole(config)
            labels = {change.key: _value_label(change) for change in at}
            found.append(Point(config, str(self.file), self.domain(config), labels))
        check_points(found)
        _tell_apart(found)
        return found

    def domain(self, config: dict[str, Any]) -> str:
        """The domain that bare names belong to: the one that is named, or that in whose folder the file lies."""
        return config.get("domain") or _domain_of(self.file)

    def config(self, at: list[Change], settings: list[Change]) -> dict[str, Any]:
        """The file's configuration, then ``settings``, then the command line's changes and the values of a point."""
        config = copy.deepcopy(self.base)
        for change in [*settings, *in_order(self.changes, at)]:
            assign(config, change.key, copy.deepcopy(change.value), change.append)
        return config

    def every(self, axis: str) -> list[Any]:
        """What ``all`` stands for on an axis: the class of the data knows."""
        place, _, name = axis.rpartition(".")
        if place != "data":
            raise ScionError(f"--over {axis}=all: only an argument of the data, as data.task, has all of its values "
                             "known; list them")
        config = self.config([], [])
        check_whole(config)
        return choices(config["data"], name, self.domain(config))

    def settings(self, config: dict[str, Any]) -> list[Change]:
        """What ``per`` says for the values that ``config`` has."""
        found: list[Change] = []
        for key, table in self.per.items():
            value = self._value_of(config, key)
            fitting = [text for text in table if _says(text, value)]
            if len(fitting) > 1:
                raise ScionError(f"{self.file.name}: per.{key}: {listed(fitting)} are the same value")
            if fitting:
                found += whole_first(table[fitting[0]])
        return found

    def _value_of(self, config: dict[str, Any], key: str) -> Any:
        """What a configuration says under a key of ``per``."""
        node: Any = config
        for part in key.split("."):
            if isinstance(node, dict) and "init_args" in node and part not in node:
                node = node["init_args"]
            if not isinstance(node, dict) or part not in node:
                raise ScionError(f"{self.file.name}: per.{key}: the configuration does not say {key}; write its "
                                 "value, or null")
            node = node[part]
        return node


def _value_label(change: Change) -> Any:
    """The value of an axis as a table shows it."""
    if change.key in COMPONENTS:
        return _component_label(change.key, change.value)
    return label(change.value)


def _component_label(key: str, value: Any) -> Any:
    """A class, or several, as a table shows them."""
    found = component(value, key)
    if key in LISTS:
        return " + ".join(label(one) for one in found) or "none"
    return label(found)


def _says(text: str, value: Any) -> bool:
    """Whether a key of ``per`` means a value: numbers by what they print as, classes by their names."""
    if isinstance(value, (dict, list)) and text == label(value):
        return True
    if isinstance(value, dict):  # a class also without its arguments
        return text == label({**value, "init_args": {}})
    if isinstance(value, list):
        return False
    if text == str(value):
        return True
    meant = parse(text)
    return meant == value and type(meant) is type(value)  # True == 1, and they are not the same


@functools.cache  # all points of a grid ask
def _domain_of(file: Path) -> str:
    """The domain in whose folder a file lies; empty where it lies in none."""
    parts = file.resolve().parts
    if "domains" not in parts[:-2]:
        return ""
    return parts[parts.index("domains") + 1]


def _tell_apart(found: list[Point]) -> None:
    """Refuse points that are one run, and give those a name with a hash whose names are one on some file system."""
    seen: dict[str, Point] = {}
    for point in found:
        twin = seen.setdefault(point.hash, point)
        if twin is not point:
            raise ScionError(f"--over: {short(twin.name)} and {short(point.name)} are the same run: what one axis "
                             "sets, another sets anew")
    # file systems differ in what they take for one name: in capitals, and in how a letter with an accent is written
    folded = [unicodedata.normalize("NFKC", point.name).casefold() for point in found]
    counts = Counter(folded)
    for point, name in zip(found, folded, strict=True):
        point.ambiguous = counts[name] > 1
