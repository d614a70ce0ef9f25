"""The callbacks and loggers of a configuration: made, and refused where a run cannot have them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.config.build import construct, find_class, first_line_of, make, typed
from core.errors import ScionError, called
from core.json_types import shown
from core.record import signature

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger

UNFIT = {
    "core.method.PEFTMethod": "it is a method; write it under peft",
    "core.callbacks.exact_resume.ExactResume": "a run has one already",
    "lightning.pytorch.callbacks.ModelCheckpoint":
        "a run writes its checkpoints itself: `select` says which weights are kept, trainer.checkpoint_every_n_steps "
        "how often more of them are written",
    "lightning.pytorch.callbacks.OnExceptionCheckpoint":
        "a run writes its checkpoints itself; trainer.checkpoint_every_n_steps says how often",
    "lightning.pytorch.callbacks.ProgressBar": "a run shows its own bar; trainer.enable_progress_bar says whether",
    "lightning.pytorch.callbacks.BaseFinetuning": "the methods under peft say what is trained",
    "lightning.pytorch.callbacks.ModelPruning":
        "it renames parameters, and checkpoints and adapters know them by name; methods that prune are under peft",
    "lightning.pytorch.callbacks.BatchSizeFinder": "data.batch_size says it",
    "lightning.pytorch.callbacks.LearningRateFinder": "optimizer.lr says it",
    "lightning.pytorch.callbacks.BasePredictionWriter": "a run predicts nothing; `lightning predict` does",
}
"""Callbacks that a run sets itself, or cannot do with, and why."""
AVERAGES = ("lightning.pytorch.callbacks.StochasticWeightAveraging", "lightning.pytorch.callbacks.WeightAveraging")
"""Callbacks whose result are the weights of several epochs."""
PACKAGES = {"CometLogger": ("comet_ml", "comet-ml"), "LitLogger": ("litlogger", "litlogger"),
            "MLFlowLogger": ("mlflow", "mlflow"), "WandbLogger": ("wandb", "wandb")}
"""Packages that loggers of Lightning need: the module, and what pip calls it."""
FOLDERS = ("save_dir", "root_dir", "offline_directory")
"""What loggers call the folder that they write into."""
PLACE = ("save_dir", "name", "version", "sub_dir")
"""Arguments that say where a logger writes."""
LOGGED = "logged"
"""The folder, in that of a run or a stage, of all loggers but TensorBoard's."""
Part = dict[str, Any]


def check_trainer_parts(config: dict[str, Any], domain: str) -> None:
    """Refuse callbacks and loggers that no run can have, before anything is written.

    Raises:
        ScionError: names the callback or the logger, and its argument.
    """
    made = make_callbacks(config, domain)
    for callback in made:
        is_average = any(isinstance(callback, _class_of(path)) for path in AVERAGES)
        if is_average and config.get("select") == "best":
            raise ScionError(f"callbacks: {type(callback).__name__} averages the weights of several epochs, and "
                             "select: best takes those of one; write select: last")
    places: list[tuple[Any, ...]] = []
    for part in config.get("loggers") or []:
        cls = _logger_class(part, domain)
        _logger_arguments(cls, part["init_args"], Path())
        place = (cls, *(part["init_args"].get(name) for name in PLACE))
        if place in places:
            raise ScionError(f"loggers: two {cls.__name__} would write into the same files; give one of them another "
                             "name, as in {class: " + cls.__name__ + ", name: second}")
        places.append(place)


# ------------------------------------------------------------------------------------------------- callbacks


def make_callbacks(config: dict[str, Any], domain: str, has_validation: bool = True) -> list[Callback]:
    """The callbacks of a configuration, in its order.

    Args:
        config: in normal form.
        domain: where bare names are looked up behind ``core.callbacks`` and before Lightning's.
        has_validation: whether the data have a validation set.

    Raises:
        ScionError: no such class, one that is no callback or that a run cannot have, arguments that it refuses, two
            that would share their state, one that waits for what is never logged.
    """
    found: list[Callback] = []
    for part in config.get("callbacks") or []:
        found.append(_make_callback(part, domain))
    _check_states(found)
    for callback in found:
        monitor = getattr(callback, "monitor", None)
        if not has_validation and str(monitor).startswith("validation/"):
            raise ScionError(f"callbacks.monitor: {type(callback).__name__} waits for {shown(monitor)}, and these data "
                             "have no validation set")
    return found


def _make_callback(part: Part, domain: str) -> Callback:
    from lightning.pytorch.callbacks import Callback

    cls = find_class(part["class_path"], "callbacks", domain)
    for path, reason in UNFIT.items():
        if issubclass(cls, _class_of(path)):
            raise ScionError(f"callbacks: {cls.__name__} is not for a run ({reason})")
    return _told(lambda: make(part, "callbacks", domain, Callback), f"callbacks: {cls.__name__}")


def _check_states(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks of which a checkpoint would hold one state."""
    from lightning.pytorch.callbacks import Callback

    keys: set[str] = set()
    for callback in callbacks:
        has_state = type(callback).state_dict is not Callback.state_dict
        if has_state and callback.state_key in keys:
            raise ScionError(f"callbacks: two {type(callback).__name__} would have one state in a checkpoint "
                             f"({callback.state_key[:200]}); leave one out")
        if has_state:
            keys.add(callback.state_key)


def _class_of(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------------------------------------- loggers


def make_loggers(config: dict[str, Any], domain: str, home: Path) -> list[Logger]:
    """The loggers of a configuration; TensorBoard's where it says nothing of them.

    Args:
        config: in normal form.
        domain: where bare names are looked up behind ``core.loggers`` and before Lightning's.
        home: the folder of the run or the stage: they write inside, where they are given no folder of their own.
    """
    parts = config.get("loggers")
    if parts is None:
        parts = [{"class_path": "TensorBoardLogger", "init_args": {}}]
    found: list[Logger] = []
    for part in parts:
        cls = _logger_class(part, domain)
        given = part["init_args"]
        make_it = functools.partial(construct, cls, _logger_arguments(cls, given, home), given, "loggers")
        found.append(_told(make_it, f"loggers: {cls.__name__}"))
    return found


def _logger_arguments(cls: type, given: dict[str, Any], home: Path) -> dict[str, Any]:
    """What a logger is made with: what is written, checked, and the folder."""
    own, passed_on = _split(cls, given)
    place = _folder_of(cls, given, home)
    inherited = signature(cls).parameters.keys() - _own_parameters(cls).keys()  # the class fills these in itself
    return {**place, **typed(cls, own, "loggers", others={*place, *inherited}), **passed_on}


def _logger_class(part: Part, domain: str) -> type:
    """The class of a logger whose package is installed."""
    from lightning.pytorch.loggers import Logger

    cls = find_class(part["class_path"], "loggers", domain)
    if not issubclass(cls, Logger):
        raise ScionError(f"loggers: {part['class_path']} is no Logger")
    for ancestor in cls.__mro__:
        module, package = PACKAGES.get(ancestor.__name__, ("", ""))
        is_lightnings = ancestor.__module__.startswith("lightning.")
        if module and is_lightnings and importlib.util.find_spec(module) is None:
            raise ScionError(f"loggers: {cls.__name__} needs the package {package}, which is not installed; "
                             f"pip install {package}")
    return cls


def _folder_of(cls: type, given: dict[str, Any], home: Path) -> dict[str, Any]:
    """The arguments that let a logger write inside ``home``, as far as they are not given."""
    where = home / LOGGED / cls.__name__
    usual: dict[str, Any] = {}
    if cls.__name__ == "TensorBoardLogger":
        usual = {"save_dir": str(home), "name": "tensorboard", "version": ""}
    elif cls.__name__ == "CSVLogger":
        usual = {"save_dir": str(where), "name": "", "version": ""}
    if usual and not given.keys() & set(PLACE):
        return usual
    known = signature(cls).parameters
    for argument in FOLDERS:
        if argument in known:
            return {} if argument in given else {argument: str(where)}
    return {}


def _split(cls: type, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that a logger has, and those that it passes on to its package: WandbLogger's ``entity``, say. What
    is nearly the name of one that it has is a mistake, and stays among the former."""
    known = signature(cls).parameters
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in _own_parameters(cls).values())
    own: dict[str, Any] = {}
    passed_on: dict[str, Any] = {}
    for name, value in given.items():
        is_own = name in known or not passes_on or bool(called(name, known))
        into = own if is_own else passed_on
        into[name] = value
    return own, passed_on


def _own_parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(cls.__init__).parameters


def _told(work: Callable[[], Any], what: str) -> Any:
    """What ``work`` makes, with what Lightning's classes refuse in their own ways told in one line as well."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return work()
    except ImportError as error:
        raise ScionError(f"{what} needs a package that is not installed ({first_line_of(error)})") from error
    except (MisconfigurationException, RuntimeError) as error:
        raise ScionError(f"{what} refuses its arguments ({str(error).splitlines()[0]})") from error
