"""The shape of a configuration in its normal form: types, one check that walks them, and the way into that form.

Every class is ``{class_path, init_args}`` there, every optimizer and schedule a mapping. ``Annotated`` types carry a
`Rule`: what else holds of the value, in words.
"""

# No `from __future__ import annotations`: a TypedDict would then not know which of its keys may be absent.

import copy
import functools
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from core.errors import ScionError, listed, nearest

LONGEST_NAME = 64


@dataclass(frozen=True)
class Rule:
    """A condition on a value of a type, and how one says type and condition together."""

    holds: Callable[[Any], bool]
    words: str


def is_class_name(name: str) -> bool:
    """Whether ``name`` can be that of a class, bare or as a full path."""
    return len(name) <= 255 and all(part.isidentifier() for part in name.split("."))


def is_file_name(name: str) -> bool:
    """Whether ``name`` can be part of a path wherever it stands."""
    return re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}", name) is not None


ClassName = Annotated[str, Rule(is_class_name, "the name of a class")]
StageName = Annotated[str, Rule(is_file_name, f"a name of letters, digits, '-' and '_', at most {LONGEST_NAME}")]
DomainName = Annotated[str, Rule(lambda name: name == "" or name.isidentifier() and name.isascii() and len(name) <= 64,
                                 "the name of a domain, as audio")]
Text = Annotated[str, Rule(bool, "text that is not empty")]
Positive = Annotated[float, Rule(lambda value: value > 0, "a number above 0")]
NotNegative = Annotated[float, Rule(lambda value: value >= 0, "a number that is not negative")]
Count = Annotated[int, Rule(lambda value: value >= 1, "a whole number of at least 1")]
Whole = Annotated[int, Rule(lambda value: value >= 0, "a whole number of at least 0")]
Limit = Annotated[int, Rule(lambda value: value == -1 or value >= 1, "a whole number of at least 1 or -1 (no limit)")]
All = Annotated[int, Rule(lambda value: value >= -1, "a whole number of at least 0 or -1 (all)")]
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**32, "a whole number from 0 to 4294967295")]


class Component(TypedDict):
    """A class and its arguments."""

    class_path: ClassName
    init_args: dict[str, Any]


Stack = Annotated[list[Component], Rule(bool, "a list of methods; an empty one would train nothing: LinearProbe is the "
                                              "method that trains the head alone")]


class Model(TypedDict):
    backbone: Component
    task: NotRequired[Component]


class Optimizer(TypedDict, total=False):
    name: ClassName
    lr: Positive | Literal["auto"]
    weight_decay: NotNegative | Literal["auto"]
    options: dict[str, Any]


class Schedule(TypedDict, total=False):
    name: Literal["cosine", "linear", "constant"]
    warmup: NotNegative
    final: NotNegative


class Trainer(TypedDict, total=False):
    """Of the Trainer's arguments those of which more is to be said than Lightning's types do; others may stand beside
    them."""

    max_epochs: Limit | None
    min_epochs: Whole | None
    max_steps: Limit
    min_steps: Whole | None
    limit_train_batches: Positive | None
    limit_val_batches: NotNegative | None
    limit_test_batches: NotNegative | None
    overfit_batches: NotNegative
    accumulate_grad_batches: Count
    gradient_clip_val: NotNegative | None
    check_val_every_n_epoch: Count | None
    val_check_interval: Positive | str | dict[str, Any] | None
    num_sanity_val_steps: All | None
    log_every_n_steps: Whole | None
    reload_dataloaders_every_n_epochs: Whole
    num_nodes: Count
    accelerator: Text
    strategy: Text
    checkpoint_every_n_steps: Count | None
    enable_checkpointing: bool
    enable_progress_bar: bool


OPEN = (Trainer,)
"""Mappings with further keys."""


class Stage(TypedDict, total=False):
    """One fit within a run: what it has otherwise than the whole configuration."""

    model: Model
    data: Component
    peft: Component | Stack
    optimizer: Optimizer
    lr_scheduler: Schedule
    trainer: Trainer
    select: Literal["last", "best"]
    start: Text
    carry: list[Literal["weights", "head"]]


Over = dict[Text, Annotated[list[Any], Rule(bool, "a list of values")]]
Settings = dict[Text, Any]
Per = dict[Text, dict[str, Settings]]


class Configuration(TypedDict):
    model: Model
    data: Component
    peft: Component | Stack
    optimizer: Optimizer
    lr_scheduler: Schedule
    trainer: Trainer
    seed_everything: Seed
    stages: NotRequired[Annotated[dict[StageName, Stage], Rule(bool, "a mapping from names to stages, at least one")]]
    over: NotRequired[Over | None]
    run_dir: NotRequired[Text | None]
    select: Literal["last", "best"]
    domain: NotRequired[DomainName | None]
    per: NotRequired[Per | None]


KEYS = tuple(get_type_hints(Configuration))
STAGE_KEYS = tuple(get_type_hints(Stage))
COMPONENTS = ("model.backbone", "model.task", "data", "peft")
DEFAULTS: dict[str, Any] = {"optimizer": {}, "lr_scheduler": {}, "trainer": {}, "seed_everything": 0, "select": "last"}


# ------------------------------------------------------------------------------------------------- the check


def check(value: Any, kind: Any, place: str, partial: bool = False) -> None:
    """Refuse a value that is not of a type.

    Args:
        value: plain data.
        kind: the type; a TypedDict is a mapping with these keys.
        place: the key, for messages.
        partial: whether keys may be absent that the type wants at its top.

    Raises:
        ScionError: names the innermost key that is wrong, what it is and what it must be.
    """
    fitting = [one for one in _alternatives(kind) if _is(value, one)]
    if not fitting:
        raise ScionError(f"{place}: must be {words(kind)}, not {shown(value)}")
    problem: ScionError | None = None
    for one in fitting:
        try:
            return _check_inside(value, one, kind, place, partial)
        except ScionError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _alternatives(kind: Any) -> list[Any]:
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, without a look at what is in it."""
    origin = get_origin(kind)
    if origin is Annotated:
        return _is(value, get_args(kind)[0])
    if kind is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(kind))
    if is_typeddict(kind) or origin is dict:
        return isinstance(value, dict)
    if origin is list:
        return isinstance(value, list)
    if kind in (None, types.NoneType):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


def _check_inside(value: Any, kind: Any, whole: Any, place: str, partial: bool) -> None:
    origin = get_origin(kind)
    if origin is Annotated:
        base, rule = get_args(kind)
        if not rule.holds(value):
            raise ScionError(f"{place}: must be {words(whole)}, not {shown(value)}")
        _check_inside(value, base, whole, place, partial)
    elif is_typeddict(kind):
        _check_keys(value, kind, place, partial)
    elif origin is dict:
        key_kind, value_kind = get_args(kind)
        for key, one in value.items():
            check(key, key_kind, place)
            check(one, value_kind, f"{place}.{key}")
    elif origin is list:
        for one in value:
            check(one, get_args(kind)[0], place)


def _check_keys(value: dict[str, Any], kind: Any, place: str, partial: bool) -> None:
    known = _keys(kind)
    before = f"{place}." if place else ""
    for key in value:
        if key not in known and kind not in OPEN:
            raise ScionError(f"{before}{cut(key)}: unknown key{nearest(key, known)}; the keys are "
                             f"{listed(known, 20)}")
    for key in kind.__required_keys__:
        if key not in value and not partial:
            raise ScionError(f"{before}{key}: the key {key!r} is missing")
    for key, one in value.items():
        if key in known:
            check(one, known[key], f"{before}{key}")


@functools.cache
def _keys(kind: Any) -> dict[str, Any]:
    """The keys of a TypedDict and their types."""
    hints = get_type_hints(kind, include_extras=True)
    return {key: get_args(one)[0] if get_origin(one) is NotRequired else one for key, one in hints.items()}


def words(kind: Any) -> str:
    """A type, as one says it."""
    alternatives = _alternatives(kind)
    if len(alternatives) > 1:
        said = list(dict.fromkeys(words(one) for one in alternatives))
        return f"{', '.join(said[:-1])} or {said[-1]}"
    origin = get_origin(kind)
    if origin is Annotated:
        rules = [rule.words for rule in get_args(kind)[1:] if isinstance(rule, Rule)]
        return rules[-1] if rules else words(get_args(kind)[0])
    if origin is Literal:
        return " or ".join(repr(one) for one in get_args(kind))
    if kind is Component:
        return "a class, as LoRA or {class: LoRA, rank: 16}"
    if is_typeddict(kind):
        keys = get_type_hints(kind)
        return "a mapping" if kind in OPEN else f"a mapping with the keys {listed(keys, 20)}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping",
             list: "a list", tuple: "a list", Sequence: "a list", types.NoneType: "null", None: "null"}
    found = plain.get(origin or kind) if isinstance(origin or kind, type) or kind is None else None
    return found or str(kind).replace("typing.", "").replace("collections.abc.", "")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return f"a mapping with the keys {listed(map(short, value), 4)}" if value else "an empty mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return short(value) if isinstance(value, str) else repr(value)


def short(text: str) -> str:
    """Text in quotes, cut where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def cut(text: str) -> str:
    """Text, cut where it is long."""
    return text if len(text) <= 60 else f"{text[:57]}..."


# ------------------------------------------------------------------------------------------------- the normal form


def component(value: Any, key: str) -> Any:
    """A class and its arguments in normal form; a list for a stack of methods.

    Raises:
        ScionError: the value names no class, or has keys beside ``class_path`` that would be dropped.
    """
    if isinstance(value, list) and key.rpartition(".")[2] == "peft":
        found: Any = [component(one, key) for one in value]
        check(found, Stack, key)
        return found
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, dict) or not value.keys() & {"class_path", "class"}:
        raise ScionError(f"{key}: {shown(value)} names no class; write a name, or class_path and init_args")
    name = value.get("class_path", value.get("class"))
    rest = {argument: one for argument, one in value.items() if argument not in ("class_path", "class", "init_args")}
    if "class_path" in value and "class" in value:
        raise ScionError(f"{key}: both class_path and class; write one of them")
    if "init_args" in value and "class" in value:
        raise ScionError(f"{key}: init_args belongs to class_path; beside class the arguments stand themselves")
    if "class_path" in value and rest:
        raise ScionError(f"{key}: {listed(rest, 4)} beside class_path; write {{class_path: {name}, init_args: "
                         f"{{...}}}}, or {{class: {name}, {next(iter(rest))}: ...}}")
    arguments = value.get("init_args") if "class_path" in value else rest
    found = {"class_path": name, "init_args": {} if arguments is None else arguments}
    check(found, Component, key)
    return {"class_path": name, "init_args": dict(found["init_args"])}


def normal_value(slot: str, value: Any) -> Any:
    """What is written under a key, in normal form; a value that has none stays, for `check` to refuse.

    Args:
        slot: the key, without the stage that it belongs to.
        value: as written.
    """
    if slot in COMPONENTS:
        return component(value, slot)
    if slot in ("optimizer", "lr_scheduler") and isinstance(value, str):
        return {"name": value}
    if slot == "model" and isinstance(value, dict):
        parts = _keys(Model)
        return {key: component(one, f"model.{key}") if key in parts else one for key, one in value.items()}
    if slot == "stages" and isinstance(value, dict):
        return {name: normal_stage(name, stage) for name, stage in value.items()}
    if slot == "over" and isinstance(value, dict):
        return {axis: values if isinstance(values, list) else [values] for axis, values in value.items()}
    if slot == "per" and value is not None:
        return _normal_per(value)
    return copy.deepcopy(value)


def _normal_per(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ScionError("per is a mapping, as in {data.task: {svhn: {peft.scale: 10}}}")
    for axis, table in value.items():
        if not isinstance(table, dict) or not all(isinstance(settings, dict) for settings in table.values()):
            raise ScionError(f"per.{axis} is a mapping from its values to settings, as in {{svhn: {{peft.scale: 10}}}}")
    return copy.deepcopy(value)


def normal_stage(name: str, stage: Any) -> Any:
    """A stage in normal form; null is a stage like the whole configuration."""
    if stage is None:
        return {}
    if not isinstance(stage, dict):
        return stage
    try:
        return {key: normal_value(key, value) for key, value in stage.items()}
    except ScionError as error:
        raise ScionError(f"stages.{name}.{error}") from None


def normal(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The normal form of what a file says, checked; keys that a run needs may still be absent.

    Raises:
        ScionError: with ``where``, the file's name.
    """
    for key in raw:
        if key not in KEYS:
            raise ScionError(f"{where}: unknown key {short(key)}{nearest(key, KEYS)}; the keys are {listed(KEYS, 20)}")
    try:
        config = {**copy.deepcopy(DEFAULTS), **{key: normal_value(key, value) for key, value in raw.items()}}
        if config.get("stages", "") is None:
            del config["stages"]
        check(config, Configuration, "", partial=True)
    except ScionError as error:
        raise ScionError(f"{where}: {error}") from None
    return config
