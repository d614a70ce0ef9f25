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

from core.component import short
from core.config.build import choices
from core.config.checks import check_points
from core.config.document import find, parse, read
from core.config.overrides import Change, CommandLine, assign, command_line, in_order, path_of, whole_first
from core.config.schema import COMPONENTS, Over, Per, check, check_whole, component, normal, normal_value
from core.errors import ScionError, listed, nearest
from core.json_types import shown

LONGEST = 240
"""Bytes of a point's folder name; a file system takes 255, and locks and numbers are added."""
MOST_POINTS = 5000
SETTINGS = ("model", "data", "peft", "optimizer", "lr_scheduler", "trainer", "seed_everything", "stages", "select")
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
        methods = self.config["peft"] if isinstance(self.config["peft"], list) else [self.config["peft"]]
        parts = ["+".join(_word(label(method)) for method in methods)]
        parts += [f"{axis.rpartition('.')[2]}={_word(label(value))}" for axis, value in self.axes.items()
                  if axis not in ("peft", "seed_everything")]
        seed = f"seed{self.config['seed_everything']}"
        name = "-".join([*parts, seed])
        if not self.ambiguous and len(name.encode()) <= LONGEST:
            return name
        end = f"-{self.hash}-{seed}"
        return "-".join(parts).encode()[:LONGEST - len(end)].decode(errors="ignore") + end

    @property
    def hash(self) -> str:
        """12 digits of what determines the results; where they are written does not."""
        kept = {key: value for key, value in self.config.items() if key not in ("run_dir", "over")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def label(value: Any) -> Any:
    """A class in a configuration as a person would write it, arguments included; other values as they are."""
    if not isinstance(value, dict) or value.keys() != {"class_path", "init_args"}:
        return value
    given = ", ".join(f"{key}={argument}" for key, argument in value["init_args"].items())
    return value["class_path"].rpartition(".")[2] + (f"({given})" if given else "")


def _word(value: Any) -> str:
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
    axes = {**asked.axes, **{axis: values for axis, values in in_file.items() if path_of(axis) not in said}}
    check(axes, Over, "over")
    for axis, values in axes.items():
        if axis.partition(".")[0] in NO_AXES:
            raise ScionError(f"--over {axis}: {axis.partition('.')[0]} is no axis; it is the same for all runs")
        if axis in COMPONENTS:  # a table shows a class by its name, without the module
            values = [label(component(value, axis)) for value in values]
        kept = [_identity(value) for value in values]
        twice = [value for i, value in enumerate(values) if kept[i] in kept[:i]]
        if twice:
            raise ScionError(f"--over {axis}: the value {shown(twice[0])} stands twice, and a run counts once")
    count = math.prod(len(values) for values in axes.values())
    if count > MOST_POINTS:
        raise ScionError(f"--over: {count} runs; {MOST_POINTS} at most")
    return axes


def _identity(value: Any) -> str:
    """The same text for values that mean the same, as 0 and 0.0."""
    def same(one: Any) -> Any:
        if isinstance(one, str):
            one = _number(one)
        if isinstance(one, (int, float)) and not isinstance(one, bool):
            return float(one) if abs(one) < 2**53 else str(one)
        if isinstance(one, list):
            return [same(part) for part in one]
        return {key: same(part) for key, part in one.items()} if isinstance(one, dict) else one

    return json.dumps(same(value), sort_keys=True)


def _number(text: str) -> Any:
    """Text that says a number, as that number."""
    try:
        value = parse(text)
    except ScionError:
        return text
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else text


def _per(in_file: dict[str, Any], asked: CommandLine, where: str) -> dict[str, Any]:
    """The settings that go with values: the file's, with what the command line sets anew."""
    per = in_file
    for key, value in asked.per:
        axis = key.removeprefix("per").removeprefix(".")
        per = {**per, axis: value} if axis else value
        per = normal_value("per", per) or {}
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
        axes = {axis: self.every(axis) if values == ["all"] else values for axis, values in axes.items()}
        found: list[Point] = []
        for values in itertools.product(*axes.values()):
            at = [Change(axis, value) for axis, value in zip(axes, values, strict=True)]
            config = self.config(at, self.settings(self.config(at, [])) if self.per else [])
            check_whole(config)
            labels = {one.key: label(component(one.value, one.key) if one.key in COMPONENTS else one.value)
                      for one in at}
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
            node: Any = config
            for part in key.split("."):
                if isinstance(node, dict) and "init_args" in node and part not in node:
                    node = node["init_args"]
                if not isinstance(node, dict) or part not in node:
                    raise ScionError(f"{self.file.name}: per.{key}: the configuration does not say {key}; write its "
                                     "value, or null")
                node = node[part]
            fitting = [value for value in table if _says(value, node)]
            if len(fitting) > 1:
                raise ScionError(f"{self.file.name}: per.{key}: {listed(fitting)} are the same value")
            found += whole_first(table[fitting[0]]) if fitting else []
        return found


def _says(text: str, value: Any) -> bool:
    """Whether a key of ``per`` means a value: numbers by what they print as, classes by their names."""
    if isinstance(value, (dict, list)):
        return text == label(value) or isinstance(value, dict) and text == label({**value, "init_args": {}})
    return text == str(value) or parse(text) == value and type(parse(text)) is type(value)


@functools.cache  # all points of a grid ask
def _domain_of(file: Path) -> str:
    parts = file.resolve().parts
    return parts[parts.index("domains") + 1] if "domains" in parts[:-2] else ""


def _tell_apart(found: list[Point]) -> None:
    """Refuse points that are one run, and give those a name with a hash whose names are one on some file system."""
    seen: dict[str, Point] = {}
    for point in found:
        twin = seen.setdefault(point.hash, point)
        if twin is not point:
            raise ScionError(f"--over: {short(twin.name)} and {short(point.name)} are the same run: what one axis "
                             "sets, another sets anew")
    folded = [unicodedata.normalize("NFKC", point.name).casefold() for point in found]
    counts = Counter(folded)
    for point, name in zip(found, folded, strict=True):
        point.ambiguous = counts[name] > 1
