"""From a configuration to objects: classes by their names, arguments by their types."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from core.component import TRAINED, cut, short
from core.config.entries import parts_of
from core.errors import ScionError, called, listed, nearest, one_line
from core.json_types import shown, wanted
from core.record import is_finite, signature, types_of

if TYPE_CHECKING:
    from core.method import PEFTMethod


def find_class(name: str, key: str, domain: str) -> type:
    """The class that ``name`` means under ``key``: a method, a task, something of the domain, or a full path.

    Raises:
        ScionError: there is none, or its module cannot be imported, whatever the reason.
    """
    if "." in name:
        return _imported(name, key)
    if key == "peft" and name == TRAINED:
        from core.adapters.entry import Trained  # start-up time

        return Trained
    if key == "peft":
        from core.peft import method_class  # start-up time

        return method_class(name)
    homes = _homes(key, domain)
    if not homes:
        raise ScionError(f"{key}: {name!r} by its bare name needs a domain; write `domain: audio`, or the full path")
    known: dict[str, list[str]] = {}
    for home in homes:
        module = _module(home, key)
        known[home] = list(getattr(module, "__all__", ()))
        if name in known[home]:
            return _imported(f"{home}.{name}", key)
    raise ScionError(f"{key}: no class is called {short(name)}{_elsewhere(name, key, known)}")


CORES = {"model.task": "core.tasks", "callbacks": "core.callbacks", "loggers": "core.loggers"}
LIGHTNINGS = {"callbacks": "lightning.pytorch.callbacks", "loggers": "lightning.pytorch.loggers"}
"""Where bare names under a key are looked up before the domain, and behind it."""


def _homes(key: str, domain: str) -> list[str]:
    """The packages in which a bare name under ``key`` is looked up, in order."""
    homes = [CORES.get(key, ""), f"domains.{domain}" if domain else "", LIGHTNINGS.get(key, "")]
    return [home for home in homes if home]


def _elsewhere(name: str, key: str, known: dict[str, list[str]]) -> str:
    """What is said of a name that no home has: the nearest one, and what there is in each."""
    from core.peft import registry  # start-up time

    if key in LIGHTNINGS and name in registry():
        return f": {name} is a method; write it under peft"
    every = [one for names in known.values() for one in names]
    if len(known) == 1:
        return f"{nearest(name, every)}; there are {listed(every)}"
    parts = [f"{listed(names, 40)} in {home}" for home, names in known.items() if names]
    return f"{nearest(name, every)}; there are {'; '.join(parts)}"


def _module(name: str, key: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ScionError(f"{key}: {name} cannot be imported ({first_line_of(error)})") from error


def _imported(name: str, key: str) -> type:
    module, _, leaf = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ScionError(f"{key}: {short(name)} is not the name of a class")
    try:
        found = getattr(_module(module, key), leaf)
    except ScionError:
        raise
    except (Exception, SystemExit) as error:
        raise ScionError(f"{key}: {name} cannot be imported ({first_line_of(error)})") from error
    if not isinstance(found, type):
        raise ScionError(f"{key}: {name} is no class")
    return found


def first_line_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    text = one_line(error)
    if not text:
        return type(error).__name__
    if len(text) > 300:
        text = f"{text[:297]}..."
    # these two say in their text already what is missing
    if isinstance(error, (ImportError, AttributeError)):
        return text
    return f"{type(error).__name__}: {text}"


def choices(part: dict[str, Any], argument: str, domain: str) -> list[Any]:
    """What ``all`` stands for as a value of an argument of the data."""
    cls: Any = find_class(part["class_path"], "data", domain)
    try:
        return list(cls.choices(argument, part["init_args"]))
    except ScionError:
        raise
    except Exception as error:  # it may be anybody's class
        raise ScionError(f"--over data.{argument}=all: {cls.__name__} does not say what all of them are "
                         f"({first_line_of(error)}); list them") from error


def make(part: dict[str, Any], key: str, domain: str, base: type, **linked: Any) -> Any:
    """The object that a component describes, its arguments checked against the constructor's types.

    Raises:
        ScionError: the class is not found or is of another kind, or it refuses its arguments, in whatever way.
    """
    cls = find_class(part["class_path"], key, domain)
    if not issubclass(cls, base):
        raise ScionError(f"{key}: {part['class_path']} is no {base.__name__}")
    return construct(cls, {**linked, **typed(cls, part["init_args"], key)}, part["init_args"], key)


def make_stack(peft: Any, domain: str, seed: int | None = None) -> list[PEFTMethod]:
    """The methods that a configuration lists under ``peft``, in order; a trained adapter is all of its methods.

    Args:
        peft: a method in normal form, or a list of them.
        domain: where bare names are looked up.
        seed: for methods that have none of their own.

    Raises:
        ScionError: a method cannot be made, or two have one name.
    """
    from core.adapters.entry import Trained  # start-up time
    from core.method import PEFTMethod  # start-up time

    found: list[PEFTMethod] = []
    for part in parts_of(peft):
        if part["class_path"] == TRAINED:
            found += make(part, "peft", domain, Trained).methods
            continue
        linked = {} if seed is None or "seed" in part["init_args"] else {"seed": seed}
        found.append(make(part, "peft", domain, PEFTMethod, **linked))
    names = [method.name for method in found]
    for method in found:
        if names.count(method.name) > 1:
            raise ScionError(f"peft: two methods are called {method.name!r}; give one of them another name, as in "
                             f"{{adapter: FOLDER, name: second}} or {{class: {type(method).__name__}, name: second}}")
    return found


def construct(cls: type, arguments: dict[str, Any], given: dict[str, Any], key: str) -> Any:
    """``cls(**arguments)``, with what the constructor refuses in one line.

    Args:
        cls: a class.
        arguments: checked already.
        given: those of them that are written down, for the message.
        key: where they are.

    Raises:
        ScionError: the class refuses its arguments, in whatever way.
    """
    try:
        return cls(**arguments)
    except ScionError as error:
        text = str(error)
        starts = (key, cls.__name__, key.partition(".")[2] or key)
        # most constructors say themselves what they refuse: the key would then be there twice
        if not text.startswith(starts):
            text = f"{key}: {text}"
        raise ScionError(text) from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        written = [f"{name}={shown(value)}" for name, value in given.items()]
        call = f"{cls.__name__}({listed(written, 6)})"
        raise ScionError(f"{key}: {call} cannot be made ({first_line_of(error)})") from error


def typed(cls: Any, arguments: dict[str, Any], key: str, others: Collection[str] = ()) -> dict[str, Any]:
    """``arguments`` converted to the types that ``cls``'s constructor declares.

    Args:
        cls: the class.
        arguments: as they are written.
        key: where they are.
        others: arguments that the class needs and gets otherwise.

    Raises:
        ScionError: names the argument that ``cls`` does not have, lacks, or cannot take.
    """
    known = signature(cls).parameters
    for name in arguments:
        if name not in known:
            raise ScionError(f"{key}.{cut(name)}: {cls.__name__} has no option {short(name)}"
                             f"{called(name, known)}; it has {listed(known, 40)}")
    for name, parameter in known.items():
        if name not in arguments and name not in others and _is_required(parameter):
            raise ScionError(f"{key}.{name}: {cls.__name__} needs it")
    left_out = frozenset(known) - set(arguments)
    try:
        found = _parser(cls, left_out).parse_object(arguments).as_dict()
    except (Exception, SystemExit) as error:  # mostly ArgumentError, but what it meets on its way comes through as well
        raise _untyped(cls, arguments, key, error) from error
    for name, value in found.items():
        if not is_finite(value):
            raise ScionError(f"{key}.{name}: {shown(arguments.get(name))} is not a finite number")
    return found


def _is_required(parameter: inspect.Parameter) -> bool:
    """Whether a call without this argument fails."""
    is_open = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not is_open


def _untyped(cls: Any, arguments: dict[str, Any], key: str, error: BaseException) -> ScionError:
    """The message for arguments of which jsonargparse has refused one."""
    # jsonargparse names the argument within its text only, in quotes behind the word key
    bad = re.search(r'[kK]ey "([\w.]+)"', str(error))
    name = bad.group(1).partition(".")[0] if bad else ""
    if name not in arguments:
        return ScionError(f"{key}: {cls.__name__} cannot take these arguments ({first_line_of(error)})")
    asked = wanted(types_of(cls)[name])
    value = arguments[name]
    hint = ""
    if asked.startswith("a list") and isinstance(value, str) and value.isprintable():
        hint = f"; write [{value}]"
    if len(hint) >= 80:
        hint = ""
    return ScionError(f"{key}.{name}: must be {asked}, not {shown(value)}{hint}")


@functools.cache  # jsonargparse reads the sources of all of a class's bases; a table of runs asks again and again
def _parser(cls: Any, left_out: frozenset[str]) -> Any:
    """A parser of ``cls``'s arguments but those."""
    import jsonargparse  # slow to import

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip=set(left_out))
    return parser
