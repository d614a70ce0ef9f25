"""The objects of one run, from its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch

from core.backbone import Backbone
from core.config import Point, check_optimizer, check_trainer, find_class, make, make_stack, typed
from core.config.optimizer import OptimizerSettings, ScheduleSettings
from core.data import DataModule
from core.errors import ScionError, listed
from core.method import PEFTMethod
from core.record import signature
from core.tasks import Task
from core.training.finetuner import FineTuner


@dataclass
class Assembly:
    """The objects of one run; the methods are made but not attached."""

    data: DataModule
    backbone: Backbone
    task: Task
    methods: list[PEFTMethod]
    tuner: FineTuner


def assemble(point: Point, config: dict[str, Any] | None = None, read: bool = True,
             methods: list[PEFTMethod] | None = None) -> Assembly:
    """Build what a configuration asks for.

    An argument of the backbone that is None is taken from the datamodule where that has an attribute of its name.

    Args:
        point: the run.
        config: of a stage of it; None is the run's.
        read: whether the data is read, for it knows the classes; else only as far as it can name them without its
            samples.
        methods: those of the configuration, where they are made already.
    """
    config = config or point.config
    seed = config["seed_everything"]
    L.seed_everything(seed, verbose=False)
    # What is wrong is told as early as it can be known: before the backbone's library is imported, before the backbone
    # is built, before the data is read.
    check_trainer(config["trainer"], construct=read)
    if read:
        check_optimizer(config["optimizer"], config["lr_scheduler"])
    if methods is None:
        methods = make_methods(config, point.domain)
    data: DataModule = make(config["data"], "data", point.domain, DataModule)
    if data.seed is None:
        data.seed = seed
    part = config["model"]["backbone"]
    cls = find_class(part["class_path"], "model.backbone", point.domain)
    _check_outline(cls, part, methods)
    task: Task = make(config["model"].get("task") or {"class_path": "Classification", "init_args": {}}, "model.task",
                      point.domain, Task)
    check_readings(task, cls, methods)
    classes = data.peek()
    if classes is not None:
        task.check(classes)
    backbone = make_backbone(config, point.domain, data)
    check_owners(backbone, methods)
    data.bind(backbone)
    if read or classes is None:
        data.setup("fit")
    L.seed_everything(seed, verbose=False)
    optimizer = OptimizerSettings(**typed(OptimizerSettings, config["optimizer"], "optimizer"))
    schedule = ScheduleSettings(**typed(ScheduleSettings, config["lr_scheduler"], "lr_scheduler"))
    checkpointing = config["model"].get("checkpointing", False)
    tuner = FineTuner(backbone, task, data.info, optimizer=optimizer, schedule=schedule, checkpointing=checkpointing,
                      seed=seed)
    return Assembly(data, backbone, task, methods, tuner)


def make_backbone(config: dict[str, Any], domain: str, data: DataModule) -> Backbone:
    """The backbone of a configuration, on its data; random weights are those of the seed."""
    part = config["model"]["backbone"]
    cls = find_class(part["class_path"], "model.backbone", domain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed_everything"])
        return make(part, "model.backbone", domain, Backbone, **_of_data(cls, part, data))


def check_readings(task: Task, backbone: type, methods: Sequence[PEFTMethod]) -> None:
    """Refuse a task that reads what backbones of a class do not have, or what a method does not work with."""
    if issubclass(backbone, Backbone):
        backbone.check_outline_reads(task.reads)
    for method in methods:
        method.check_reading(task.reads, type(task).__name__)


def check_owners(backbone: Backbone, methods: Sequence[PEFTMethod]) -> None:
    """Refuse methods that the backbone cannot have, and those of which two would own one of its tensors."""
    owners: dict[str, PEFTMethod] = {}
    for method in methods:
        plan = method.plan_for(backbone)
        both = [name for name in plan.base_parameters if name in owners]
        if both:
            raise ScionError(f"{method.name}: {listed(both, 2)} is trained by {owners[both[0]].name} already; a tensor "
                             "of the backbone has one owner")
        # A trained adapter may be in a stage in which it owns fewer.
        owned = plan.base_parameters if method.values is None else method.values.owned(plan.anatomy)
        owners |= dict.fromkeys(owned, method)


def _check_outline(cls: type, part: dict[str, Any], methods: list[PEFTMethod]) -> None:
    """Refuse methods that this backbone cannot have, as far as its name says."""
    outline = cls.outline(str(part["init_args"].get("name", "auto"))) if issubclass(cls, Backbone) else None
    if outline:
        for method in methods:
            method.check_outline(*outline, cls.__name__)


def _of_data(cls: type, part: dict[str, Any], data: DataModule) -> dict[str, Any]:
    """Arguments of the backbone that nobody has set and that the data know (their sampling rate, say)."""
    found = {}
    for name, parameter in signature(cls).parameters.items():
        is_open = parameter.default is None and part["init_args"].get(name) is None
        if is_open and getattr(data, name, None) is not None:
            found[name] = getattr(data, name)
    return found


def make_methods(config: dict[str, Any], domain: str) -> list[PEFTMethod]:
    """The methods of a configuration, in order; random values follow the run's seed where they have none of their
    own."""
    return make_stack(config["peft"], domain, config["seed_everything"])
