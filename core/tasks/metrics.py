"""Further metrics of a task by their names: torchmetrics' classes, and those that installed domains publish."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import Metric

from core.component import class_and_arguments
from core.errors import ScionError, called, listed, nearest, one_line

MetricList = Sequence[str | dict[str, Any]]
"""Names of classes, or ``{class: NAME, ARGUMENT: value, ...}``."""


def metrics_by_name(wanted: MetricList, known: Mapping[str, Any], prefixes: Sequence[str] = ()) -> dict[str, Metric]:
    """The metrics that a configuration lists.

    Args:
        wanted: as written. ``CalibrationError`` stands for the first of ``MulticlassCalibrationError`` (with the prefix
            ``Multiclass``) and ``CalibrationError`` that there is.
        known: arguments that the task knows (``num_classes``), for the classes that take them.
        prefixes: of the names of torchmetrics' classes for this kind of target.

    Returns:
        The metrics by names in small letters, without the prefix: ``calibration_error``.

    Raises:
        ScionError: there is no such class, or it refuses its arguments.
    """
    found: dict[str, Metric] = {}
    for number, entry in enumerate(wanted):
        key = f"model.task.metrics[{number}]"
        part = class_and_arguments(entry, key)
        name = part["class_path"]
        cls = _find(name, key, prefixes)
        label = _label(cls.__name__, prefixes)
        if label in found:
            raise ScionError(f"{key}: {label} is in the list already")
        found[label] = _make(cls, part["init_args"], known, key)
    return found


def _find(name: Any, key: str, prefixes: Sequence[str]) -> type[Metric]:
    if not isinstance(name, str):
        raise ScionError(f"{key}: must be the name of a metric")
    library = _library()
    for candidate in [*(f"{prefix}{name}" for prefix in prefixes), name]:
        if candidate in library:
            return library[candidate]
    published = _published()
    if name in published:
        return published[name]
    raise ScionError(f"{key}: neither torchmetrics nor a domain has a metric {name!r}"
                     f"{nearest(name, [*library, *published])}")


def _library() -> dict[str, type[Metric]]:
    """torchmetrics' own metrics by the names of their classes."""
    import torchmetrics
    import torchmetrics.classification

    found: dict[str, type[Metric]] = {}
    for module in (torchmetrics, torchmetrics.classification):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, Metric):
                found[name] = value
    return found


def _published() -> dict[str, type[Metric]]:
    """The metrics that installed domains publish."""
    try:
        import domains
    except ImportError:
        return {}
    found: dict[str, type[Metric]] = {}
    for info in pkgutil.iter_modules(domains.__path__):
        module = importlib.import_module(f"domains.{info.name}")
        for name in getattr(module, "__all__", ()):
            # a name that ends otherwise may import a library for seconds
            if not name.endswith(("Metric", "Score", "Error")):
                continue
            value = getattr(module, name)
            if inspect.isclass(value) and issubclass(value, Metric):
                found[name] = value
    return found


def _label(name: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+", name)
    return "_".join(words).lower()


def _make(cls: type[Metric], arguments: dict[str, Any], known: Mapping[str, Any], key: str) -> Metric:
    parameters = inspect.signature(cls.__init__).parameters
    taken = {name: value for name, value in known.items() if name in parameters}
    wrong = [name for name in arguments if name not in parameters]
    if wrong:
        options = [name for name in parameters if name not in ("self", "kwargs")]
        raise ScionError(f"{key}.{wrong[0]}: {cls.__name__} has no option {wrong[0]!r}{called(wrong[0], options)}; it "
                         f"has {listed(options, 20)}")
    try:
        return cls(**{**taken, **arguments})
    except Exception as error:  # torchmetrics refuses by exceptions of many kinds, libraries may be missing
        raise ScionError(f"{key}: {cls.__name__} cannot be made ({one_line(error)})") from None
