"""The shape of a configuration in its normal form, as types that `core.json_types` checks; and the way into that form.

Every class is ``{class_path, init_args}`` there, every optimizer and schedule a mapping.
"""


import copy
import re
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from core.component import ClassName, Component, class_and_arguments, cut, short
from core.errors import ScionError, listed, nearest
from core.json_types import Rule, UnknownKey, fields_of, mismatch, shown

LONGEST_NAME = 64


def is_file_name(name: str) -> bool:
    """Whether ``name`` can be part of a path wherever it stands."""
    return re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}", name) is not None


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


Stack = Annotated[list[Component], Rule(bool, "a list of methods; an empty one would train nothing: LinearProbe is the "
                                              "method that trains the head alone")]
Components = list[Component]
"""Callbacks or loggers; an empty list is none."""


class Model(TypedDict):
    backbone: Component
    task: NotRequired[Component]
    checkpointing: NotRequired[bool]


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


class Stage(TypedDict, total=False):
    """One fit within a run: what it has otherwise than the whole configuration."""

    model: Model
    data: Component
    peft: Component | Stack
    callbacks: Components
    loggers: Components
    optimizer: Optimizer
    lr_scheduler: Schedule
    trainer: dict[str, Any]
    select: Literal["last", "best"]
    start: Text
    carry: list[Literal["weights", "head"]]
    objective: Literal["task", "method", "none"]
    repeat: Count


Over = dict[Text, Annotated[list[Any], Rule(bool, "a list of values")]]
Settings = dict[Text, Any]
Per = dict[Text, dict[str, Settings]]


class Configuration(TypedDict):
    model: Model
    data: Component
    peft: Component | Stack
    callbacks: NotRequired[Components]
    loggers: NotRequired[Components]
    optimizer: Optimizer
    lr_scheduler: Schedule
    trainer: dict[str, Any]
    seed_everything: Seed
    stages: NotRequired[Annotated[dict[StageName, Stage], Rule(bool, "a mapping from names to stages, at least one")]]
    over: NotRequired[Over | None]
    run_dir: NotRequired[Text | None]
    select: Literal["last", "best"]
    domain: NotRequired[DomainName | None]
    per: NotRequired[Per | None]


ELSEWHERE = {
    "lr": "optimizer.lr", "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "epochs": "trainer.max_epochs", "num_epochs": "trainer.max_epochs", "max_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps", "devices": "trainer.devices", "gpus": "trainer.devices",
    "accelerator": "trainer.accelerator", "precision": "trainer.precision", "batch_size": "data.batch_size",
    "num_workers": "data.num_workers", "root": "data.root", "data_dir": "data.root", "dataset": "data",
    "seed": "seed_everything", "backbone": "model.backbone", "task": "model.task", "method": "peft",
    "rank": "peft.rank", "targets": "peft.targets", "output_dir": "run_dir", "out": "run_dir", "save_dir": "run_dir",
    "scheduler": "lr_scheduler"}
"""Keys that people look for at the top, and where they are."""
RESUMING = ("resume", "ckpt_path", "checkpoint", "resume_from_checkpoint")


def place_of(word: str, known: tuple[str, ...]) -> str:
    """A hint for an unknown key at the top of a configuration: where what is meant is set, or the nearest names."""
    if word in RESUMING:
        return " (the same command with the same --run_dir goes on from its last checkpoint)"
    if word in ELSEWHERE:
        return f" (did you mean {ELSEWHERE[word]!r}?)"
    return nearest(word, known)


KEYS = tuple(fields_of(Configuration))
STAGE_KEYS = tuple(fields_of(Stage))
LISTS = ("callbacks", "loggers")
"""Keys that are a list of classes, in normal form always."""
STACKS = ("peft", *LISTS)
"""Keys that may be a list of classes."""
COMPONENTS = ("model.backbone", "model.task", "data", *STACKS)
DEFAULTS: dict[str, Any] = {"optimizer": {}, "lr_scheduler": {}, "trainer": {}, "seed_everything": 0, "select": "last"}


# ------------------------------------------------------------------------------------------------- the check


def check(value: Any, kind: Any, place: str) -> None:
    """Refuse a value that is not of a type.

    Args:
        value: plain data.
        kind: the type; a TypedDict is a mapping with these keys.
        place: the key, for messages.

    Raises:
        ScionError: names the innermost key that is wrong, what it is and what it must be.
    """
    found = mismatch(value, kind)
    if found is None:
        return
    at = f"{place}{found.place}".lstrip(".")
    if isinstance(found, UnknownKey):
        key = f"{at}.{cut(found.key)}" if at else cut(found.key)
        hint = nearest(found.key, found.known)
        if not hint and at.endswith("optimizer"):
            hint = f" (an optimizer's own arguments: {at}.options.{cut(found.key)})"
        raise ScionError(f"{key}: unknown key{hint}; the keys are {listed(found.known, 20)}")
    raise ScionError(f"{at}: must be {found.wanted}, not {shown(found.value)}")


def check_whole(config: dict[str, Any]) -> None:
    """Refuse a configuration that no run can have, whatever its classes are.

    Raises:
        ScionError: names the key.
    """
    for key in ("model", "data", "peft"):
        if key not in config:
            raise ScionError(f"the key {key!r} is missing")
    check(config, Configuration, "")
    _check_trainers(config)


def check_trainer_shape(arguments: dict[str, Any], place: str = "trainer") -> None:
    """Refuse values of the Trainer's arguments of which `Trainer` says more than Lightning does."""
    known = fields_of(Trainer)
    of_known = {name: value for name, value in arguments.items() if name in known}
    check(of_known, Trainer, place)


def _check_trainers(config: dict[str, Any]) -> None:
    check_trainer_shape(config.get("trainer", {}))
    for name, stage in config.get("stages", {}).items():
        check_trainer_shape(stage.get("trainer", {}), f"stages.{name}.trainer")


# ------------------------------------------------------------------------------------------------- the normal form


def component(value: Any, key: str) -> Any:
    """A class and its arguments in normal form (`core.component`); a list for a stack of methods, and for callbacks and
    loggers.

    Raises:
        ScionError: the value names no class, or has keys beside ``class_path`` that would be dropped.
    """
    slot = key.rpartition(".")[2]
    if slot in LISTS:
        return _normal_list(value, key)
    if isinstance(value, list) and slot == "peft":
        stack = [component(one, f"{key}[{i}]") for i, one in enumerate(value)]
        check(stack, Stack, key)
        return stack
    found = class_and_arguments(value, key)
    check(found, Component, key)
    return {"class_path": found["class_path"], "init_args": dict(found["init_args"])}


def _normal_list(value: Any, key: str) -> Any:
    """Callbacks or loggers in normal form: one without brackets is a list of one, null an empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        value = [value]
    found = [component(one, f"{key}[{i}]") for i, one in enumerate(value)]
    check(found, Components, key)
    return found


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
        return _normal_model(value)
    if slot == "stages" and isinstance(value, dict):
        return {name: normal_stage(name, stage) for name, stage in value.items()}
    if slot == "over" and isinstance(value, dict):
        return _normal_over(value)
    if slot == "per" and value is not None:
        return _normal_per(value)
    return copy.deepcopy(value)


def _normal_model(value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key, one in value.items():  # any other key stays as it is, for `check` to look at
        found[key] = component(one, f"model.{key}") if key in ("backbone", "task") else one
    return found


def _normal_over(value: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for axis, values in value.items():  # one value without brackets is an axis of one
        found[axis] = values if isinstance(values, list) else [values]
    return found


def _normal_per(value: Any) -> Any:
    """A copy of what is written under ``per``, checked here for messages with an example."""
    if not isinstance(value, dict):
        raise ScionError("per is a mapping, as in {data.task: {svhn: {peft.scale: 10}}}")
    for axis, table in value.items():
        is_table = isinstance(table, dict) and all(isinstance(settings, dict) for settings in table.values())
        if not is_table:
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
            raise ScionError(f"{where}: unknown key {short(key)}{place_of(key, KEYS)}; the keys are {listed(KEYS, 20)}")
    try:
        config = copy.deepcopy(DEFAULTS)
        for key, value in raw.items():
            config[key] = normal_value(key, value)
        if config.get("stages", "") is None:  # written down, and left empty
            del config["stages"]
        for key, value in config.items():
            check(value, fields_of(Configuration)[key], key)
        _check_trainers(config)
    except ScionError as error:
        raise ScionError(f"{where}: {error}") from None
    return config
