"""From a YAML file and the command line to points: one plain, checked configuration for each run.

A class stands in a configuration by its bare name, with or without arguments::

    peft: LoRA                                              # or
    peft: {class_path: LoRA, init_args: {rank: 16}}         # or
    peft: {class: LoRA, rank: 16}

``per`` holds settings that go with a value of another one, as papers give them for each task of a suite::

    per:
      data.task:
        svhn: {peft.scale: 10, optimizer.lr: 0.01}

Four layers make a configuration, each before the next: the file, what ``per`` says for it, the command line, and the
values of a point of ``over``. What the command line says of an axis's class (``--over peft=LoRA,DoRA --peft.rank 4``)
comes behind the axis. Where a class is replaced, nothing of the former one's is set.

``document`` reads YAML, ``schema`` says which shape a configuration has, ``overrides`` sets keys in one, ``grid`` makes
the points, and ``build`` the objects. Everything before ``build`` works on plain dictionaries and imports no torch, so
that a mistake is told at once.
"""

from core.config.build import find_class, make, make_stack, typed
from core.config.checks import check_objective, rehearse
from core.config.document import dump, find, parse, read
from core.config.grid import Point, label, points
from core.config.overrides import assign
from core.config.schema import KEYS, STAGE_KEYS, component, normal
from core.config.trainer_checks import OUR_ARGUMENTS, check_optimizer, check_trainer
from core.config.trainer_parts import LOGGED, make_callbacks, make_loggers

__all__ = ["KEYS", "LOGGED", "OUR_ARGUMENTS", "STAGE_KEYS", "Point", "assign", "check_objective", "check_optimizer",
           "check_trainer", "component", "dump", "find", "find_class", "label", "make", "make_callbacks",
           "make_loggers", "make_stack", "normal", "parse", "points", "read", "rehearse", "typed"]
