"""From a YAML file and the command line to points: one plain, checked configuration for each run.

A class stands in a configuration by its bare name, with or without arguments::

    peft: LoRA                                              # or
    peft: {class_path: LoRA, init_args: {rank: 16}}         # or
    peft: {class: LoRA, rank: 16}

``per`` holds settings that go with a value of another one, as papers give them for each task of a suite::

    per:
      data.task:
        svhn: {peft.scale: 10, optimizer.lr: 0.01}

What the command line says comes before them, and where it replaces a method, nothing of that method's is set.

Everything here works on plain dictionaries and imports no torch, so that a mistake is told at once. Types are checked
by jsonargparse against the constructors' annotations when the objects are made (`make`).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from core.errors import ScionError, listed, nearest

KEYS = ("model", "data", "peft", "optimizer", "lr_scheduler", "trainer", "seed_everything", "stages", "over", "run_dir",
        "select", "domain", "per")
COMPONENTS = ("model.backbone", "model.task", "data", "peft")
STAGE_KEYS = ("model", "data", "peft", "optimizer", "lr_scheduler", "trainer", "select", "start", "carry")
DEFAULTS: dict[str, Any] = {"optimizer": {}, "lr_scheduler": {}, "trainer": {}, "seed_everything": 0, "select": "last"}


@dataclass
class Point:
    """One run: its configuration in normal form, and the values of the axes that lead to it."""

    config: dict[str, Any]
    source: str
    domain: str
    axes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """``<method>-seed<n>``, with the values of other axes."""
        methods = self.config["peft"] if isinstance(self.config["peft"], list) else [self.config["peft"]]
        parts = ["+".join(_word(label(method)) for method in methods)]
        parts += [f"{axis.rpartition('.')[2]}={_word(label(value))}" for axis, value in self.axes.items()
                  if axis not in ("peft", "seed_everything")]
        return "-".join([*parts, f"seed{self.config['seed_everything']}"])

    @property
    def hash(self) -> str:
        """12 digits of what determines the results; where they are written does not."""
        kept = {key: value for key, value in self.config.items() if key not in ("run_dir", "over")}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def label(value: Any) -> Any:
    """A class in a configuration as a person would write it, arguments included; other values as they are."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    given = ", ".join(f"{key}={argument}" for key, argument in value["init_args"].items())
    return value["class_path"].rpartition(".")[2] + (f"({given})" if given else "")


def _word(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def points(config: str, overrides: list[str] | None = None) -> list[Point]:
    """The runs that a configuration file and command-line overrides ask for: one, or one for each point of ``over``."""
    file = find(config)
    raw = read(file)
    axes: dict[str, list[Any]] = {}
    base = normal(raw, str(file.name))
    domain = str(base.get("domain") or _domain_of(file))
    changes: list[tuple[str, Any, bool]] = []
    for key, operator, text in _split(overrides or []):
        if key == "over":
            axis, _, values = text.partition("=")
            if not values:
                raise ScionError(f"--over {text}: wanted AXIS=VALUE,VALUE,..., as in --over data.fold=1,2,3")
            axes[axis] = [parse(value) for value in _split_commas(values)]
        else:
            changes.append((key, parse(text), operator == "+="))
    for axis, values in (base.pop("over", None) or {}).items():
        axes.setdefault(axis, values if isinstance(values, list) else [values])
    per = base.pop("per", None) or {}

    def made(point: list[tuple[str, Any]], settings: list[tuple[str, Any]]) -> dict[str, Any]:
        """The file's configuration, then ``settings``, then what the command line changes, then the point's values."""
        one = copy.deepcopy(base)
        for key, value, append in [*((key, value, False) for key, value in settings), *changes,
                                   *((axis, value, False) for axis, value in point)]:
            assign(one, key, copy.deepcopy(value), append)
        return one

    plain = made([], [])
    for key in ("model", "data", "peft"):
        if key not in plain:
            raise ScionError(f"{file.name}: the key {key!r} is missing")
    axes = {axis: _every(axis, plain, domain) if values == ["all"] else values for axis, values in axes.items()}
    found = []
    for values in itertools.product(*axes.values()):
        point = list(zip(axes, values, strict=True))
        one = made(point, _settings(per, made(point, []), file.name))
        shown = {axis: label(component(value, axis) if axis in COMPONENTS else value) for axis, value in point}
        found.append(Point(one, str(file), domain, shown))
    for point in found:
        check(point)
    return found


def _every(axis: str, config: dict[str, Any], domain: str) -> list[Any]:
    """What ``all`` stands for on an axis: the class of the data knows."""
    place, _, name = axis.rpartition(".")
    if place != "data":
        raise ScionError(f"--over {axis}=all: only an argument of the data, as data.task, has all of its values known; "
                         "list them")
    return find_class(config["data"]["class_path"], "data", domain).choices(name, config["data"]["init_args"])


def _settings(per: Any, config: dict[str, Any], where: str) -> list[tuple[str, Any]]:
    """What ``per`` says for the values that ``config`` has."""
    if not isinstance(per, dict):
        raise ScionError(f"{where}: per is a mapping, as in {{data.task: {{svhn: {{peft.scale: 10}}}}}}")
    found: list[tuple[str, Any]] = []
    for key, table in per.items():
        if not isinstance(table, dict) or not all(isinstance(settings, dict) for settings in table.values()):
            raise ScionError(f"{where}: per.{key} is a mapping from its values to settings, as in "
                             "{svhn: {peft.scale: 10}}")
        node: Any = config
        for part in str(key).split("."):
            node = node["init_args"] if isinstance(node, dict) and "init_args" in node and part not in node else node
            if not isinstance(node, dict) or part not in node:
                raise ScionError(f"{where}: per.{key}: the configuration does not say {key}; write its value, or null")
            node = node[part]
        found += {str(value): settings for value, settings in table.items()}.get(str(node), {}).items()
    return found


def find(config: str) -> Path:
    """A configuration on disk, or, where there is none, among the installed domains."""
    path = Path(config)
    if path.is_file():
        return path
    spec = importlib.util.find_spec("domains")
    homes = [Path(home) for home in (spec.submodule_search_locations if spec else []) or []]
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("domains",) else path
    for home in homes:
        for candidate in (home / inside, home / inside.with_suffix(".yaml")):
            if candidate.is_file() and candidate.suffix in (".yaml", ".yml"):
                return candidate
    known = [f"domains/{file.relative_to(home)}" for home in homes for file in sorted(home.glob("*/*.yaml"))]
    raise ScionError(f"{config}: no such configuration{nearest(config, known)}; there are {listed(known, 20)}")


def read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        at = f", line {where.line + 1}" if where is not None else ""
        raise ScionError(f"{file}{at}: not valid YAML ({getattr(error, 'problem', None) or error})") from None
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise ScionError(f"{file}: a configuration is a mapping with the keys {listed(KEYS, 20)}")
    return raw


def normal(raw: dict[str, Any], where: str, keys: tuple[str, ...] = KEYS) -> dict[str, Any]:
    """The normal form: known keys only, every class as ``{class_path, init_args}``."""
    for key in raw:
        if key not in keys:
            raise ScionError(f"{where}: unknown key {key!r}{nearest(str(key), keys)}; the keys are {listed(keys, 20)}")
    full = keys is KEYS
    config = {**(copy.deepcopy(DEFAULTS) if full else {}), **copy.deepcopy(raw)}
    for key in ("data", "peft"):
        if key in config:
            config[key] = component(config[key], key)
    if isinstance(config.get("model"), dict):
        for key, value in config["model"].items():
            if key not in ("backbone", "task"):
                raise ScionError(f"{where}: model has no key {key!r}{nearest(key, ('backbone', 'task'))}")
            config["model"][key] = component(value, f"model.{key}")
    for key in ("optimizer", "lr_scheduler"):
        if isinstance(config.get(key), str):
            config[key] = {"name": config[key]}
    for name, stage in (config.get("stages") or {}).items():
        config["stages"][name] = normal(stage or {}, f"{where}: stages.{name}", STAGE_KEYS)
    return config


def component(value: Any, key: str) -> Any:
    """A class and its arguments in normal form; a list for a stack of methods."""
    if isinstance(value, list) and key == "peft":
        return [component(one, key) for one in value]
    if isinstance(value, str):
        return {"class_path": value, "init_args": {}}
    if isinstance(value, dict) and "class_path" in value:
        return {"class_path": value["class_path"], "init_args": dict(value.get("init_args") or {})}
    if isinstance(value, dict) and "class" in value:
        return {"class_path": value["class"], "init_args": {k: v for k, v in value.items() if k != "class"}}
    raise ScionError(f"{key}: {value!r} names no class; write a name, or class_path and init_args")


def parse(text: str) -> Any:
    """A value from the command line, as YAML reads it; ``1e-3`` is a number."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if not value and value in ("", None) and text.strip(" \"'").lower() not in ("", "~", "null"):
        return text  # to YAML a lone "|" opens a block of text, and "#" a remark
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _split_commas(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _split(arguments: list[str]) -> list[tuple[str, str, str]]:
    """``--key value``, ``--key=value`` and ``--key+=value`` as (key, operator, value)."""
    found: list[tuple[str, str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        match = re.fullmatch(r"--([\w.\-]+?)(?:(\+?=)(.*))?", word, re.DOTALL)
        if not match:
            raise ScionError(f"{word}: not an override; wanted --key value, as in --peft LoRA --peft.rank 16")
        key, operator, value = match.groups()
        if operator is None:
            if not rest:
                raise ScionError(f"--{key}: a value is missing")
            operator, value = "=", rest.pop(0)
        found.append((key, operator, value))
    return found


def assign(config: dict[str, Any], key: str, value: Any, append: bool = False) -> None:
    """Set ``key`` (dotted; through the arguments of classes) in a configuration in normal form, in place.

    A class that is set by its name starts from its own defaults, not from what the file gave the former one.
    """
    parts = key.split(".")
    if parts[0] not in KEYS:
        raise ScionError(f"--{key}: unknown key {parts[0]!r}{nearest(parts[0], KEYS)}; the keys are {listed(KEYS, 20)}")
    node: Any = config
    place = ""
    for i, part in enumerate(parts[:-1]):
        node = _into(node, part, place, key)
        place = ".".join(parts[: i + 1])
    if isinstance(node, list):
        node = node[-1]
    last = parts[-1]
    slot = re.sub(r"^stages\.[^.]+\.", "", key)
    if slot in COMPONENTS:
        value = component(value, slot)
        if append:
            present = node.get(last, [])
            node[last] = [*(present if isinstance(present, list) else [present]), value]
            return
    elif append:
        value = [*(node.get("init_args", node).get(last) or []), value]
    if isinstance(node, dict) and "class_path" in node and last not in ("class_path", "init_args"):
        node["init_args"][last] = value
    elif isinstance(node, dict):
        if slot in ("optimizer", "lr_scheduler") and isinstance(value, str):
            value = {"name": value}
        node[last] = value
    else:
        raise ScionError(f"--{key}: {place} is {node!r}, which has no {last!r}")


def _into(node: Any, part: str, place: str, key: str) -> Any:
    if isinstance(node, list):  # a stack: the last method, or the one of that name
        named = [one for one in node if one["class_path"].rpartition(".")[2] == part]
        if named:
            return named[0]
        node = node[-1]
    if isinstance(node, dict) and "class_path" in node and part not in node:
        if re.sub(r"^stages\.[^.]+\.", "", place) == "peft" and node["class_path"].rpartition(".")[2] == part:
            return node
        node = node["init_args"]
    if not isinstance(node, dict):
        raise ScionError(f"--{key}: {place} is {node!r}, which has no {part!r}")
    if place == "stages" and part not in node:
        raise ScionError(f"--{key}: no stage is called {part!r}{nearest(part, node)}; there are {listed(node)}")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _domain_of(file: Path) -> str:
    parts = file.resolve().parts
    return parts[parts.index("domains") + 1] if "domains" in parts[:-2] else ""


# ------------------------------------------------------------------------------------------------- checks and objects


def check(point: Point) -> None:
    """What can be said against a configuration without building anything: names, folders."""
    from core.peft import options

    config = point.config
    stages = [config, *({**config, **stage} for stage in (config.get("stages") or {}).values())]
    for stage in stages:
        for method in stage["peft"] if isinstance(stage["peft"], list) else [stage["peft"]]:
            name = method["class_path"]
            if "." in name:
                continue
            known = options(name)  # says so where there is no such method
            for option in method["init_args"]:
                if option not in known:
                    raise ScionError(f"peft.{option}: {name} has no option {option!r}{nearest(option, known)}; "
                                     f"it has {listed(known, 40)}")
    if config["select"] not in ("last", "best"):
        raise ScionError(f"select: {config['select']!r} is neither 'last' nor 'best'")
    if not isinstance(config["seed_everything"], int):
        raise ScionError(f"seed_everything: {config['seed_everything']!r} is not a whole number")
    root = config["data"]["init_args"].get("root")
    if root is not None and not Path(root).exists():
        raise ScionError(f"data.root: no folder {root}")
    if point.domain and importlib.util.find_spec(f"domains.{point.domain}") is None:
        raise ScionError(f"domain: no domain is called {point.domain!r}")


def find_class(name: str, key: str, domain: str) -> type:
    """The class that ``name`` means under ``key``: a method, a task, something of the domain, or a full path."""
    if "." in name:
        module, _, leaf = name.rpartition(".")
        try:
            return getattr(importlib.import_module(module), leaf)
        except (ImportError, AttributeError) as error:
            raise ScionError(f"{key}: {name} cannot be imported ({error})") from None
    if key == "peft":
        from core.peft import method_class

        return method_class(name)
    if key == "model.task":
        homes = ["core.tasks"]
    elif domain:
        homes = [f"domains.{domain}"]
    else:
        raise ScionError(f"{key}: {name!r} by its bare name needs a domain; write `domain: audio`, or the full path")
    known: list[str] = []
    for home in homes:
        module = importlib.import_module(home)
        known += list(getattr(module, "__all__", ()))
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
    raise ScionError(f"{key}: no class is called {name!r}{nearest(name, known)}; there are {listed(known)}")


def make(part: dict[str, Any], key: str, domain: str, base: type, **linked: Any) -> Any:
    """The object that a component describes, its arguments checked against the constructor's types."""
    cls = find_class(part["class_path"], key, domain)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ScionError(f"{key}: {part['class_path']} is no {base.__name__}")
    arguments = {**linked, **typed(cls, part["init_args"], key)}
    try:
        return cls(**arguments)
    except ScionError as error:
        text = str(error)
        told = text.startswith((key, cls.__name__, key.partition(".")[2] or key))
        raise ScionError(text if told else f"{key}: {text}") from None


def typed(cls: Any, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """``arguments`` converted to the types that ``cls``'s constructor declares."""
    import jsonargparse

    from core.spec import signature

    known = signature(cls).parameters
    for name in arguments:
        if name not in known:
            raise ScionError(f"{key}.{name}: {cls.__name__} has no option {name!r}{nearest(name, known)}; it has "
                             f"{listed(known, 40)}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ScionError(f"{key}.{missing[0]}: {cls.__name__} needs it")
    try:
        return _parser(cls, frozenset(known) - set(arguments)).parse_object(arguments).as_dict()
    except jsonargparse.ArgumentError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        bad = re.search(r'key "([\w.]+)"', lines[0])
        name = bad.group(1) if bad else "?"
        said = next((line for line in lines if "xpected" in line), lines[-1])
        raise ScionError(f"{key}.{name}: {said.partition('. Got')[0]}, got {arguments.get(name)!r}") from None


@functools.cache  # jsonargparse reads the sources of all of a class's bases; a table of runs asks again and again
def _parser(cls: Any, left_out: frozenset[str]) -> Any:
    """A parser of ``cls``'s arguments but those."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip=set(left_out))
    return parser
