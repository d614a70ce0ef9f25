"""From a configuration to objects: what can be said against one without building it, classes by their names, arguments
by their types, and a rehearsal of all that needs neither data nor a backbone."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.component import cut, short
from core.config.schema import Optimizer, Schedule, check, check_trainer_shape
from core.errors import ScionError, called, listed, nearest, one_line
from core.json_types import shown, wanted
from core.record import is_finite, signature, types_of

if TYPE_CHECKING:
    from core.config.grid import Point
    from core.method import PEFTMethod

OUR_ARGUMENTS = ("checkpoint_every_n_steps",)
"""Arguments under ``trainer`` that Lightning does not know: a checkpoint within the epoch."""
SET_BY_RUN = {
    "callbacks": "the methods are those of the key peft; other callbacks go with a Trainer of your own",
    "logger": "it writes history.json, log.txt, curves.png and a folder for TensorBoard",
    "plugins": "its checkpoints have one of their own", "default_root_dir": "its folder is --run_dir",
    "barebones": "it could not write its checkpoints", "model_registry": "it writes into its folder alone"}
"""Arguments of the Trainer that a run sets itself, or cannot do with, and why."""


# ------------------------------------------------------------------------------------------------- without building


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
    _check_names(_methods(config))
    rate = config["optimizer"].get("lr", "auto")
    for method in _methods(config):
        _check_method(method)
        if rate != "auto" and method["init_args"].get("lr") is not None:
            raise ScionError(f"peft.lr: optimizer.lr is {rate} for all methods, and this one's would be lost; write "
                             "optimizer.lr: auto, or leave it out")
    root = config["data"]["init_args"].get("root")
    if isinstance(root, str):
        try:
            there = Path(root).exists()
        except (OSError, ValueError):
            there = False
        if not there:
            raise ScionError(f"data.root: no folder {root if len(root) <= 300 else short(root)}")
    schedule = config["lr_scheduler"]
    if schedule.get("name") == "constant" and schedule.get("final"):
        raise ScionError(f"lr_scheduler.final: a constant rate ends as it began, and not at {schedule['final']} of it; "
                         "leave it out")
    both = [key for key in ("lr", "weight_decay", "params") if key in config["optimizer"].get("options", {})]
    if both:
        raise ScionError(f"optimizer.options.{both[0]}: write optimizer.{both[0]}")
    trainer = config["trainer"]
    _check_length(trainer)
    if trainer.get("checkpoint_every_n_steps") and trainer.get("enable_checkpointing") is False:
        raise ScionError("trainer.checkpoint_every_n_steps: enable_checkpointing is false; write one of the two")
    if config["select"] == "best" and trainer.get("limit_val_batches") == 0:
        raise ScionError("select: 'best' is chosen by the validation set, and trainer.limit_val_batches is 0")


def _methods(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["peft"] if isinstance(config["peft"], list) else [config["peft"]]


def _check_names(methods: list[dict[str, Any]]) -> None:
    """Refuse a stack in which two methods have one name."""
    names = [method["init_args"].get("name") or method["class_path"].rpartition(".")[2] for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ScionError(f"peft: two methods are called {shown(twice)}; give one of them another name, as in {{class: "
                         f"{cut(str(twice))}, name: second}}")


def _check_method(method: dict[str, Any]) -> None:
    from core.peft import options  # start-up time

    name, arguments = method["class_path"], method["init_args"]
    if "." not in name:
        known = options(name)  # says so where there is no such method
        for option in arguments:
            if option not in known:
                raise ScionError(f"peft.{cut(option)}: {name} has no option {short(option)}"
                                 f"{called(option, known)}; it has {listed(known, 40)}")
    if arguments.get("on") not in (None, "backbone"):
        raise ScionError(f"peft.on: a run attaches its methods to the backbone, and not to {shown(arguments['on'])}; "
                         "leave it out")


def _check_length(trainer: dict[str, Any]) -> None:
    """Refuse a training that is of no length, or of none that is known: the rate falls over all of its steps."""
    duration = trainer.get("max_time")
    if duration is not None and _seconds(duration, "trainer.max_time") <= 0:
        raise ScionError(f"trainer.max_time: {shown(duration)} leaves no time to train")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, (str, dict)) and _seconds(interval, "trainer.val_check_interval") <= 0:
        raise ScionError(f"trainer.val_check_interval: {shown(interval)} is no time between two validations")
    epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps", -1)
    if steps == -1 and (epochs == -1 or epochs is None and duration is not None):
        raise ScionError("trainer.max_epochs: give it, or max_steps, a number of at least 1: the learning rate follows "
                         "the length of the training, which max_time can only cut short")


def _seconds(duration: Any, key: str) -> float:
    """The seconds of what Lightning takes for a duration."""
    import datetime

    if isinstance(duration, str) and (match := re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d):(\d\d)", duration.strip())):
        days, hours, minutes, seconds = map(int, match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if isinstance(duration, dict):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return datetime.timedelta(**duration).total_seconds()
    raise ScionError(f"{key}: {shown(duration)} is no duration; write DD:HH:MM:SS, or {{hours: 2}}")


# ------------------------------------------------------------------------------------------------- classes


def find_class(name: str, key: str, domain: str) -> type:
    """The class that ``name`` means under ``key``: a method, a task, something of the domain, or a full path.

    Raises:
        ScionError: there is none, or its module cannot be imported, whatever the reason.
    """
    if "." in name:
        return _imported(name, key)
    if key == "peft":
        from core.peft import method_class  # start-up time

        return method_class(name)
    if key == "model.task":
        home = "core.tasks"
    elif domain:
        home = f"domains.{domain}"
    else:
        raise ScionError(f"{key}: {name!r} by its bare name needs a domain; write `domain: audio`, or the full path")
    module = _module(home, key)
    known = list(getattr(module, "__all__", ()))
    if name in known:
        return _imported(f"{home}.{name}", key)
    raise ScionError(f"{key}: no class is called {short(name)}{nearest(name, known)}; there are {listed(known)}")


def _module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ScionError(f"{key}: {name} cannot be imported ({_said(error)})") from error


def _imported(name: str, key: str) -> type:
    module, _, leaf = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ScionError(f"{key}: {short(name)} is not the name of a class")
    try:
        found = getattr(_module(module, key), leaf)
    except ScionError:
        raise
    except (Exception, SystemExit) as error:
        raise ScionError(f"{key}: {name} cannot be imported ({_said(error)})") from error
    if not isinstance(found, type):
        raise ScionError(f"{key}: {name} is no class")
    return found


def _said(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = one_line(error)
    text = text if len(text) <= 300 else f"{text[:297]}..."
    plain = isinstance(error, (ImportError, AttributeError))
    return text if plain and text else f"{type(error).__name__}: {text}" if text else type(error).__name__


def choices(part: dict[str, Any], argument: str, domain: str) -> list[Any]:
    """What ``all`` stands for as a value of an argument of the data."""
    cls: Any = find_class(part["class_path"], "data", domain)
    try:
        found = list(cls.choices(argument, part["init_args"]))
    except ScionError:
        raise
    except Exception as error:
        raise ScionError(f"--over data.{argument}=all: {cls.__name__} does not say what all of them are "
                         f"({_said(error)}); list them") from error
    return found


def make(part: dict[str, Any], key: str, domain: str, base: type, **linked: Any) -> Any:
    """The object that a component describes, its arguments checked against the constructor's types.

    Raises:
        ScionError: the class is not found or is of another kind, or it refuses its arguments, in whatever way.
    """
    cls = find_class(part["class_path"], key, domain)
    if not issubclass(cls, base):
        raise ScionError(f"{key}: {part['class_path']} is no {base.__name__}")
    arguments = {**linked, **typed(cls, part["init_args"], key)}
    try:
        return cls(**arguments)
    except ScionError as error:
        text = str(error)
        told = text.startswith((key, cls.__name__, key.partition(".")[2] or key))
        raise ScionError(text if told else f"{key}: {text}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        given = listed((f"{name}={shown(value)}" for name, value in part["init_args"].items()), 6)
        raise ScionError(f"{key}: {cls.__name__}({given}) cannot be made ({_said(error)})") from error


def typed(cls: Any, arguments: dict[str, Any], key: str) -> dict[str, Any]:
    """``arguments`` converted to the types that ``cls``'s constructor declares.

    Raises:
        ScionError: names the argument that ``cls`` does not have, lacks, or cannot take.
    """
    known = signature(cls).parameters
    for name in arguments:
        if name not in known:
            raise ScionError(f"{key}.{cut(name)}: {cls.__name__} has no option {short(name)}"
                             f"{called(name, known)}; it has {listed(known, 40)}")
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments
               and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if missing:
        raise ScionError(f"{key}.{missing[0]}: {cls.__name__} needs it")
    try:
        found = _parser(cls, frozenset(known) - set(arguments)).parse_object(arguments).as_dict()
    except (Exception, SystemExit) as error:  # mostly ArgumentError, but what it meets on its way comes through as well
        raise _untyped(cls, arguments, key, error) from error
    for name, value in found.items():
        if not is_finite(value):
            raise ScionError(f"{key}.{name}: {shown(arguments.get(name))} is not a finite number")
    return found


def _untyped(cls: Any, arguments: dict[str, Any], key: str, error: BaseException) -> ScionError:
    """The message for arguments of which jsonargparse has refused one."""
    bad = re.search(r'[kK]ey "([\w.]+)"', str(error))
    name = bad.group(1).partition(".")[0] if bad else ""
    if name not in arguments:
        return ScionError(f"{key}: {cls.__name__} cannot take these arguments ({_said(error)})")
    asked, value = wanted(types_of(cls)[name]), arguments[name]
    one = f"; write [{value}]" if asked.startswith("a list") and isinstance(value, str) and value.isprintable() else ""
    return ScionError(f"{key}.{name}: must be {asked}, not {shown(value)}{one if len(one) < 80 else ''}")


@functools.cache  # jsonargparse reads the sources of all of a class's bases; a table of runs asks again and again
def _parser(cls: Any, left_out: frozenset[str]) -> Any:
    """A parser of ``cls``'s arguments but those."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip=set(left_out))
    return parser


# ------------------------------------------------------------------------------------------------- training


def check_trainer(arguments: dict[str, Any], construct: bool = True) -> None:
    """Refuse arguments that the Trainer does not have, cannot take, or cannot do a run with.

    Args:
        arguments: what stands under ``trainer``.
        construct: whether a Trainer is made of them and thrown away. It refuses what this machine does not have.

    Raises:
        ScionError: names the argument.
    """
    check_trainer_shape(arguments)
    _check_length(arguments)
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
    for name in arguments:
        if name in SET_BY_RUN:
            return f"trainer.{name}: a run sets this itself ({SET_BY_RUN[name]}); leave it out"
        if name not in (*known, *OUR_ARGUMENTS):
            return f"trainer.{cut(name)}: Lightning's Trainer has no such argument{called(name, known)}"
    own = {name: value for name, value in arguments.items() if name not in OUR_ARGUMENTS}
    try:
        if re.match("ddp_(spawn|fork|notebook)", str(arguments.get("strategy", "")), re.IGNORECASE):
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
    if problem:
        alone = [name for name, value in arguments.items() if _refusal({name: value})]
        named = sorted((name for name in arguments if re.search(rf"\b{name}\b", problem)), key=problem.find)
        blamed = (alone or named)[:1]
        hint = f" ({shown(arguments['accelerator'])} asked for; auto takes what this machine has)" if (
            blamed == ["accelerator"]) else ""
        raise ScionError(f"{'.'.join(['trainer', *blamed])}: {problem}{hint}")


def _refusal(arguments: dict[str, Any]) -> str:
    """What Lightning says against a Trainer with these arguments, or an empty text."""
    import lightning.pytorch as L

    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                             "enable_model_summary": False}
    with _unchanged(), _silent():
        try:
            trainer = L.Trainer(**{"devices": 1, "num_sanity_val_steps": 0, **arguments, **quiet})
        except (Exception, SystemExit) as error:
            said = _said(error)
            return said.partition(": ")[2] or said
    launcher = type(trainer.strategy.launcher).__name__
    if "MultiProcessing" in launcher or "XLA" in launcher:
        return _copies(arguments.get("strategy", "auto"))
    return ""


def _copies(strategy: str) -> str:
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
    name, options = settings.get("name", "AdamW"), settings.get("options", {})
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
    tensors = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2,))]
    numbers = {one: settings[one] for one in ("lr", "weight_decay") if settings.get(one, "auto") != "auto"}
    groups = [{"params": [tensor], "lr": 1e-3, "weight_decay": 0.0, **numbers} for tensor in tensors]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = kind(groups, **options)
            if not options.get("fused") and not options.get("capturable"):  # which want the device that is trained on
                for tensor in tensors:
                    tensor.grad = torch.ones_like(tensor)
                made.step()
    except Exception as error:
        return f"optimizer: {name} refuses these settings ({_said(error)})"
    return ""


# ------------------------------------------------------------------------------------------------- the rehearsal


def _check_own_stages(methods: list[PEFTMethod], listed_stages: bool) -> None:
    """Refuse methods that would not come through all of their stages."""
    staged = [method for method in methods if method.stages]
    if staged and listed_stages:
        raise ScionError(f"stages: {staged[0].name} has stages of its own ({listed(staged[0].stages)}), and a run goes "
                         "through those or through listed ones")
    other = [method for method in staged if method.stages != staged[0].stages]
    if other:
        raise ScionError(f"peft: {staged[0].name} has the stages {listed(staged[0].stages)} and {other[0].name} "
                         f"{listed(other[0].stages)}; one run goes through the same for all")


def rehearse(points: Iterable[Point]) -> None:
    """Build what needs neither data nor a backbone, and throw it away: what is wrong is told before anything is
    written. The same part of several points is built once.

    Raises:
        ScionError: the first mistake.
    """
    from core.backbone import Backbone  # start-up time
    from core.data import DataModule  # start-up time
    from core.method import PEFTMethod  # start-up time
    from core.tasks import Task  # start-up time

    done: set[str] = set()

    def once(*parts: Any) -> bool:
        text = json.dumps(parts, sort_keys=True, default=str)
        is_new = text not in done
        done.add(text)
        return is_new

    fits = [({**point.config, **stage}, point.domain) for point in points
            for stage in (point.config.get("stages") or {"": {}}).values()]
    for config, domain in fits:
        check_trainer(config["trainer"])
        if once("peft", config["peft"], domain, "stages" in config):
            methods = [make(part, "peft", domain, PEFTMethod) for part in _methods(config)]
            _check_own_stages(methods, "stages" in config)
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
    for config, _ in fits:  # last: torch imports its compiler with the first optimizer
        check_optimizer(config["optimizer"], config["lr_scheduler"])
