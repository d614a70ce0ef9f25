"""Attributes of modules that grafts hold at another value while they are active, and give back afterwards."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch import nn


class _Absent(Enum):
    """Stands for an attribute that a module does not have itself; the same object after pickling."""

    OF_THE_CLASS = "what the class says"


_HELD = "_held_for_grafts"
"""Attribute of a module that keeps what is held there: name -> [the module's own value, how many hold it]."""


def hold(module: nn.Module, name: str, value: Any) -> None:
    """Give a module another value of an attribute, until as many let go of it."""
    held = module.__dict__.setdefault(_HELD, {})
    own = vars(module).get(name, _Absent.OF_THE_CLASS)
    entry = held.setdefault(name, [own, 0])
    entry[1] += 1
    setattr(module, name, value)


def release(module: nn.Module, name: str) -> None:
    """Let go of an attribute; the last one gives the module its own value back."""
    held = module.__dict__[_HELD]
    held[name][1] -= 1
    if held[name][1] > 0:
        return
    own, _ = held.pop(name)
    if own is _Absent.OF_THE_CLASS:
        delattr(module, name)
    else:
        setattr(module, name, own)
    if not held:
        del module.__dict__[_HELD]
