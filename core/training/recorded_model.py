"""How to build a backbone and a task again: as a record, and from one."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from core.backbone import Backbone
from core.errors import ScionError, listed, nearest, one_line
from core.record import check_arguments, plain

if TYPE_CHECKING:
    from core.training.finetuner import FineTuner


def model_record(tuner: FineTuner) -> dict[str, Any]:
    """How to build the backbone and the task of ``tuner``, as adapters and patches record it."""
    found = {"backbone": spec(tuner.backbone), "task": spec(tuner.task),
             "classes": list(getattr(tuner.task, "classes", [])), "multilabel": tuner.hparams["multilabel"],
             "seed": tuner.hparams["seed"]}
    further = tuner.info.further()
    if further:
        found["info"] = further
    return found


def spec(part: nn.Module) -> dict[str, Any] | None:
    """How to build a domain's backbone or a task again: ``{"class": "audio:AST", arguments}``, or None for a class that
    belongs to neither. A name that was ``auto`` is recorded as what it stood for, a path as an absolute one."""
    module = type(part).__module__.split(".")
    home = {"domains": module[1] if len(module) > 1 else "", "core": "core.tasks"}.get(module[0])
    config = getattr(part, "config", None)
    if not home or not isinstance(config, dict):
        return None
    found = {"class": f"{home}:{type(part).__name__}", **plain(config)}
    if isinstance(part, Backbone) and "name" in part.origin:
        name = str(part.origin["name"])
        if part.origin.get("kind") == "local":
            start = 0 if Path(name).expanduser().exists() else name.find("@") + 1  # a path, or ARCHITECTURE@PATH
            name = name[:start] + str(Path(name[start:]).expanduser().absolute())
        found["name"] = name
    return found


def published(recorded: dict[str, Any], base: type) -> type:
    """The class that a record names, ``"audio:AST"`` or ``"core.tasks:Classification"``: one that ``core.tasks`` or an
    installed domain publishes. No other module is imported.

    Raises:
        ScionError: there is no such class, or it is no ``base``.
    """
    home, _, name = one_line(recorded.get("class")).partition(":")
    module = importlib.import_module("core.tasks") if home == "core.tasks" else _domain(home)
    names = list(getattr(module, "__all__", ()))
    if name not in names:
        raise ScionError(f"{home} publishes no class {name!r}{nearest(name, names)}")
    found = getattr(module, name)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ScionError(f"{home}:{name} is no {base.__name__}")
    return found


def _domain(name: str) -> Any:
    """An installed domain's package."""
    import pkgutil

    try:
        import domains
    except ImportError:
        installed = []
    else:
        installed = [info.name for info in pkgutil.iter_modules(domains.__path__)]
    if name not in installed:
        raise ScionError(f"no domain is called {name!r}{nearest(name, installed)}; installed are "
                         f"{listed(installed) or 'none'}")
    try:
        return importlib.import_module(f"domains.{name}")
    except ImportError as error:
        raise ScionError(f"the domain {name} cannot be imported ({one_line(error)})") from None


def build(recorded: dict[str, Any], seed: int = 0, base: type = nn.Module) -> Any:
    """The part that `spec` described: a class that ``core.tasks`` or a domain publishes, with arguments of the right
    types. Random weights are those of ``seed``; the global random state stays as it is.

    Raises:
        ScionError: no such class, none of this ``base``, or wrong arguments.
    """
    cls = published(recorded, base)
    arguments = {key: value for key, value in recorded.items() if key != "class"}
    check_arguments(cls, arguments, recorded["class"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**arguments)
