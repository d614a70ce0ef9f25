"""What Lightning's Trainer and torch's optimizers would refuse, told before a run begins."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

from core.component import cut, short
from core.config.build import first_line_of, typed
from core.config.schema import Optimizer, Schedule, check, check_trainer_shape
from core.errors import ScionError, called, listed, nearest
from core.json_types import shown
from core.record import is_finite, signature

OUR_ARGUMENTS = ("checkpoint_every_n_steps",)
"""Arguments under ``trainer`` that Lightning does not know: a checkpoint within the epoch."""

SET_BY_RUN = {
    "callbacks": "the methods are those of the key peft, other callbacks those of the key callbacks",
    "logger": "it writes history.json, log.txt, curves.png and what the key loggers names",
    "plugins": "its checkpoints have one of their own", "default_root_dir": "its folder is --run_dir",
    "barebones": "it could not write its checkpoints", "model_registry": "it writes into its folder alone"}
"""Arguments of the Trainer that a run sets itself, or cannot do with, and why."""


def check_trainer(arguments: dict[str, Any], construct: bool = True) -> None:
    """Refuse arguments that the Trainer does not have, cannot take, or cannot do a run with.

    Args:
        arguments: what stands under ``trainer``.
        construct: whether a Trainer is made of them and thrown away. It refuses what this machine does not have.

    Raises:
        ScionError: names the argument.
    """
    check_trainer_shape(arguments)
    check_length(arguments)
    text = json.dumps(arguments, sort_keys=True, default=str)
    problem = _trainer_problem(text, construct)
    if problem:
        raise ScionError(problem)


@functools.cache  # all points of a table ask alike
def _trainer_problem(arguments_as_json: str, construct: bool) -> str:
    """What is wrong with a Trainer's arguments, or an empty text."""
    import lightning.pytorch as L

    arguments = json.loads(arguments_as_json)
    known = [name for name in signature(L.Trainer).parameters if name not in SET_BY_RUN]
    # before the types: of an argument that a run sets itself the type does not matter
    for name in arguments:
        if name in SET_BY_RUN:
            return f"trainer.{name}: a run sets this itself ({SET_BY_RUN[name]}); leave it out"
        if name not in (*known, *OUR_ARGUMENTS):
            return f"trainer.{cut(name)}: Lightning's Trainer has no such argument{called(name, known)}"
    own = {name: value for name, value in arguments.items() if name not in OUR_ARGUMENTS}
    try:
        strategy = str(arguments.get("strategy", ""))
        if re.match("ddp_(spawn|fork|notebook)", strategy, re.IGNORECASE):
            return f"trainer.strategy: {_copies(arguments['strategy'])}"
        own = typed(L.Trainer, own, "trainer")
        if construct:
            _make_trainer(own)
    except ScionError as error:
        return str(error)
    return ""


def _make_trainer(arguments: dict[str, Any]) -> None:
    """Make a Trainer without consequences: what it would set in torch for the whole process is left out."""
    arguments = {name: value for name, value in arguments.items() if name not in ("deterministic", "benchmark")}
    problem = _refusal(arguments)
    if not problem:
        return
    # Lightning does not say which argument it refuses: it is the one that is refused without the others, too, or else
    # the first one in the message
    refused = [name for name, value in arguments.items() if _refusal({name: value})]
    named = [name for name in arguments if re.search(rf"\b{name}\b", problem)]
    named.sort(key=problem.find)
    blamed = (refused or named)[:1]
    hint = ""
    if blamed == ["accelerator"]:
        hint = f" ({shown(arguments['accelerator'])} asked for; auto takes what this machine has)"
    place = ".".join(["trainer", *blamed])
    raise ScionError(f"{place}: {problem}{hint}")


def _refusal(arguments: dict[str, Any]) -> str:
    """What Lightning says against a Trainer with these arguments, or an empty text."""
    import lightning.pytorch as L

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                             "enable_model_summary": False}
    usual: dict[str, Any] = {"devices": 1, "num_sanity_val_steps": 0}
    with _unchanged(), _silent():
        try:
            trainer = L.Trainer(**{**usual, **arguments, **quiet})
        except (Exception, SystemExit) as error:
            said = first_line_of(error)
            return said.partition(": ")[2] or said  # without the exception's name
    launcher = type(trainer.strategy.launcher).__name__
    if "MultiProcessing" in launcher or "XLA" in launcher:
        return _copies(arguments.get("strategy", "auto"))
    return ""


def _copies(strategy: str) -> str:
    """What is wrong with a strategy that trains in processes of its making."""
    return f"{strategy} trains in copies of this process, which bring nothing back; write ddp"


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """Put the environment back as it was."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep what Lightning says of a Trainer off the screen."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def check_optimizer(optimizer: dict[str, Any], lr_scheduler: dict[str, Any] | None = None) -> None:
    """Refuse an optimizer and a schedule that can be known to be wrong without a model.

    Methods with an optimizer of their own take the options as well; of these nothing is said here.

    Args:
        optimizer: what stands under ``optimizer``.
        lr_scheduler: what stands under ``lr_scheduler``.

    Raises:
        ScionError: names the setting.
    """
    check(optimizer, Optimizer, "optimizer")
    check(lr_scheduler or {}, Schedule, "lr_scheduler")
    problem = _optimizer_problem(json.dumps(optimizer, sort_keys=True, default=str))
    if problem:
        raise ScionError(problem)


@functools.cache
def _optimizer_problem(settings_as_json: str) -> str:
    """What is wrong with an optimizer, found by a step with it on two small tensors; or an empty text."""
    import torch

    settings = json.loads(settings_as_json)
    name = settings.get("name", "AdamW")
    options = settings.get("options", {})
    known = [one for one in dir(torch.optim) if isinstance(getattr(torch.optim, one), type) and one != "Optimizer"]
    if name not in known:
        return f"optimizer.name: torch.optim has no {short(name)}{nearest(name, known)}; it has {listed(known, 40)}"
    kind = getattr(torch.optim, name)
    accepted = [one for one in inspect.signature(kind).parameters if one not in ("params", "lr", "weight_decay")]
    for option in options:
        if option not in accepted:
            return (f"optimizer.options.{cut(option)}: {name} has no option {short(option)}"
                    f"{nearest(option, accepted)}; it has {listed(accepted, 40)}")
    if not is_finite(options):
        return "optimizer.options: a number that is not finite"
    try:
        _try_step(kind, settings, options)
    except Exception as error:
        return f"optimizer: {name} refuses these settings ({first_line_of(error)})"
    return ""


def _try_step(kind: Any, settings: dict[str, Any], options: dict[str, Any]) -> None:
    """Make an optimizer as a run would, and take a step with it on a matrix and a vector."""
    import torch

    # some optimizers refuse what is no matrix, and a model has vectors too
    tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    numbers = {"lr": 1e-3, "weight_decay": 0.0}
    for name in numbers:
        if settings.get(name, "auto") != "auto":
            numbers[name] = settings[name]
    groups = [{"params": [tensor], **numbers} for tensor in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = kind(groups, **options)
        if options.get("fused") or options.get("capturable"):  # these need the device that is trained on
            return
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()


def check_length(trainer: dict[str, Any]) -> None:
    """Refuse a training that is of no length, or of none that is known: the rate falls over all of its steps."""
    duration = trainer.get("max_time")
    if duration is not None and _seconds(duration, "trainer.max_time") <= 0:
        raise ScionError(f"trainer.max_time: {shown(duration)} leaves no time to train")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, (str, dict)) and _seconds(interval, "trainer.val_check_interval") <= 0:
        raise ScionError(f"trainer.val_check_interval: {shown(interval)} is no time between two validations")
    epochs = trainer.get("max_epochs")
    # with a time Lightning trains without a limit of epochs, unless one is given
    is_endless = epochs == -1 or (epochs is None and duration is not None)
    if is_endless and trainer.get("max_steps", -1) == -1:
        raise ScionError("trainer.max_epochs: give it, or max_steps, a number of at least 1: the learning rate follows "
                         "the length of the training, which max_time can only cut short")


def _seconds(duration: Any, key: str) -> float:
    """The seconds of what Lightning takes for a duration."""
    import datetime

    if isinstance(duration, str):
        match = re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d):(\d\d)", duration.strip())
        if match:
            days, hours, minutes, seconds = map(int, match.groups())
            return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if isinstance(duration, dict):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return datetime.timedelta(**duration).total_seconds()
    raise ScionError(f"{key}: {shown(duration)} is no duration; write DD:HH:MM:SS, or {{hours: 2}}")
