"""What can be said against a configuration without building it, and a rehearsal of all that needs no data."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.component import TRAINED, TRAINED_OPTIONS, cut, short
from core.config.build import find_class, make, make_stack, typed
from core.config.entries import parts_of
from core.config.trainer_checks import check_length, check_optimizer, check_trainer
from core.config.trainer_parts import check_trainer_parts
from core.errors import ScionError, called, listed
from core.json_types import shown

if TYPE_CHECKING:
    from core.config.grid import Point
    from core.method import PEFTMethod


def check_points(points: Iterable[Point]) -> None:
    """What can be said against configurations without building anything: names, folders, what would be lost."""
    for point in points:
        stages = point.config.get("stages") or {}
        _check_stages(stages)
        for name, stage in stages.items() or [("", {})]:
            try:
                _check_stage({**point.config, **stage})
            except ScionError as error:
                raise ScionError(f"stages.{name}.{error}" if name else str(error)) from None
        if point.domain and not _has_domain(point.domain):
            raise ScionError(f"domain: no domain is called {short(point.domain)}")


@functools.cache
def _has_domain(name: str) -> bool:
    return name.isidentifier() and importlib.util.find_spec(f"domains.{name}") is not None


def _check_stages(stages: dict[str, Any]) -> None:
    """Refuse stages that share a folder, or start from what is not there."""
    folded: dict[str, str] = {}
    for name in stages:
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise ScionError(f"stages: {other} and {name} are one folder where capitals do not count; choose other "
                             "names")
    earlier: list[str] = []
    for name, stage in stages.items():
        start = stage.get("start", "previous")
        if start not in ("previous", "base", *earlier):
            raise ScionError(f"stages.{name}.start: {short(start)} is neither 'previous', 'base' nor an earlier stage "
                             f"({listed(earlier)})")
        earlier.append(name)


def _check_stage(config: dict[str, Any]) -> None:
    """Refuse what one fit cannot have; its shape is known to be right."""
    methods = list(parts_of(config["peft"]))
    _check_names(methods)
    rate = config["optimizer"].get("lr", "auto")
    for method in methods:
        _check_method(method)
        if rate != "auto" and method["init_args"].get("lr") is not None:
            raise ScionError(f"peft.lr: optimizer.lr is {rate} for all methods, and this one's would be lost; write "
                             "optimizer.lr: auto, or leave it out")
    _check_root(config["data"]["init_args"].get("root"))
    schedule = config["lr_scheduler"]
    if schedule.get("name") == "constant" and schedule.get("final"):
        raise ScionError(f"lr_scheduler.final: a constant rate ends as it began, and not at {schedule['final']} of it; "
                         "leave it out")
    options = config["optimizer"].get("options", {})
    for key in ("lr", "weight_decay", "params"):
        if key in options:
            raise ScionError(f"optimizer.options.{key}: write optimizer.{key}")
    trainer = config["trainer"]
    check_length(trainer)
    if trainer.get("checkpoint_every_n_steps") and trainer.get("enable_checkpointing") is False:
        raise ScionError("trainer.checkpoint_every_n_steps: enable_checkpointing is false; write one of the two")
    if config["select"] == "best" and config.get("objective") == "none":
        raise ScionError("select: 'best' chooses among epochs, and objective: none has none; take 'last'")
    if config["select"] == "best" and trainer.get("limit_val_batches") == 0:
        raise ScionError("select: 'best' is chosen by the validation set, and trainer.limit_val_batches is 0")


def _check_root(root: Any) -> None:
    """Refuse a folder of the data that is not there."""
    if not isinstance(root, str):
        return
    try:
        is_there = Path(root).exists()
    except (OSError, ValueError):  # a name that no file system takes
        is_there = False
    if not is_there:
        raise ScionError(f"data.root: no folder {root if len(root) <= 300 else short(root)}")


def _check_names(methods: list[dict[str, Any]]) -> None:
    """Refuse a stack in which two methods have one name."""
    names = []
    for method in methods:
        class_name = method["class_path"].rpartition(".")[2]
        name = method["init_args"].get("name")
        if name or class_name != TRAINED:  # what a folder holds has names that only the folder says
            names.append(name or class_name)
    for name in names:
        if names.count(name) > 1:
            raise ScionError(f"peft: two methods are called {shown(name)}; give one of them another name, as in "
                             f"{{class: {cut(str(name))}, name: second}}")


def _check_method(method: dict[str, Any]) -> None:
    """Refuse options that a method does not have; those of a stranger's class are known only when it is imported."""
    from core.peft import options  # start-up time

    name, arguments = method["class_path"], method["init_args"]
    if name == TRAINED:
        _check_trained(arguments)
        return
    if "." not in name:
        known = options(name)  # says so where there is no such method
        for option in arguments:
            if option not in known:
                raise ScionError(f"peft.{cut(option)}: {name} has no option {short(option)}"
                                 f"{called(option, known)}; it has {listed(known, 40)}")
    if arguments.get("on") not in (None, "backbone"):
        raise ScionError(f"peft.on: a run attaches its methods to the backbone, and not to {shown(arguments['on'])}; "
                         "leave it out")


def _check_trained(arguments: dict[str, Any]) -> None:
    """Refuse an entry of a trained adapter; whether its folder is there is known when it is opened."""
    for option in arguments:
        if option not in TRAINED_OPTIONS:
            raise ScionError(f"peft.{cut(option)}: a trained adapter has no option {short(option)}"
                             f"{called(option, TRAINED_OPTIONS)}; it has {listed(TRAINED_OPTIONS)}")
    folder, trainable = arguments.get("adapter"), arguments.get("trainable", False)
    if not isinstance(folder, str) or not folder:
        raise ScionError(f"peft.adapter: must be a folder, not {shown(folder)}")
    if not isinstance(trainable, bool):
        raise ScionError(f"peft.trainable: must be true or false, not {shown(trainable)}")


def _check_own_stages(methods: list[PEFTMethod]) -> None:
    """Refuse methods that would not come through all of their stages."""
    staged = [method for method in methods if method.stages]
    for method in staged[1:]:
        if method.stages != staged[0].stages:
            raise ScionError(f"peft: {staged[0].name} has the stages {listed(staged[0].stages)} and {method.name} "
                             f"{listed(method.stages)}; one run goes through the same for all")


def check_objective(objective: str, methods: Sequence[PEFTMethod], place: str = "") -> None:
    """Refuse an objective that none of a stage's methods can have; ``place`` is what the key begins with.

    Raises:
        ScionError: they add nothing to the loss, or compute nothing from data.
    """
    from core.method import AddsLoss, OwnLoss  # start-up time

    names = listed(method.name for method in methods)
    if objective == "method":
        giving = [method for method in methods if method.is_trained
                  and (isinstance(method, OwnLoss) or isinstance(method, AddsLoss) and method.adds_loss)]
        if not giving:
            raise ScionError(f"{place}objective: 'method' trains on what methods add to the loss, and {names} adds "
                             "nothing")
    if objective == "none" and not any(method.prepares for method in methods):
        raise ScionError(f"{place}objective: 'none' is for methods that compute something from data before they are "
                         f"trained (SensitivityTuning, say), and {names} does not")


def rehearse(points: Iterable[Point]) -> None:
    """Build what needs neither data nor a backbone, and throw it away: what is wrong is told before anything is
    written. The same part of several points is built once.

    Raises:
        ScionError: the first mistake.
    """
    from core.backbone import Backbone  # start-up time
    from core.data import DataModule  # start-up time
    from core.tasks import Task  # start-up time

    done: set[str] = set()

    def once(*parts: Any) -> bool:
        text = json.dumps(parts, sort_keys=True, default=str)
        is_new = text not in done
        done.add(text)
        return is_new

    fits: list[tuple[dict[str, Any], str, str]] = []
    for point in points:
        stages = point.config.get("stages") or {"": {}}  # a run without stages is one fit
        for name, stage in stages.items():
            fits.append(({**point.config, **stage}, point.domain, f"stages.{name}." if name else ""))
    for config, domain, place in fits:
        check_trainer(config["trainer"])
        if once("peft", config["peft"], domain, config.get("objective")):
            methods = make_stack(config["peft"], domain)
            _check_own_stages(methods)
            check_objective(config.get("objective", "task"), methods, place)
        if once("callbacks", config.get("callbacks"), config.get("loggers"), config["select"], domain):
            check_trainer_parts(config, domain)
        if once("data", config["data"], domain):
            make(config["data"], "data", domain, DataModule)
        task = config["model"].get("task")
        if task and once("task", task, domain):
            make(task, "model.task", domain, Task)
        backbone = config["model"]["backbone"]
        if once("backbone", backbone, domain):
            cls = find_class(backbone["class_path"], "model.backbone", domain)
            if not issubclass(cls, Backbone):
                raise ScionError(f"model.backbone: {backbone['class_path']} is no Backbone")
            typed(cls, backbone["init_args"], "model.backbone")
    for config, _, _ in fits:  # last: torch imports its compiler with the first optimizer
        check_optimizer(config["optimizer"], config["lr_scheduler"])
