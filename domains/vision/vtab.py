"""VTAB-1k, nineteen tasks of a thousand pictures each, in the layout in which the papers on adapters share it; or one
of five rendered tasks that are made on the spot.

    >>> data = VTAB1k(root="vtab-1k", task="dtd")                     # train on 1000, test: what papers report
    >>> data = VTAB1k(root="vtab-1k", task="dtd", protocol="tune")    # train on 800, validate on 200: to search by

X. Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019,
https://arxiv.org/abs/1910.04867. Layout from documentation: a folder for each task with the lists ``train800.txt``,
``val200.txt``, ``train800val200.txt`` and ``test.txt``, whose lines are a picture's path in that folder and its label,
a number. The lists name no classes; a file ``classes.txt`` (or ``labels.txt``) beside them may, one on each line.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core.data import Source
from core.data.sample import Parts, Sample
from core.errors import ScionError, listed, nearest
from core.files import read_text
from domains.vision.images import ImageData, Normalise

Protocol = Literal["final", "tune"]


@dataclass(frozen=True)
class Task:
    """One task: VTAB's group, how many classes and test pictures it has, and other names of its folder."""

    group: Literal["natural", "specialized", "structured"]
    classes: int
    tested: int
    aliases: tuple[str, ...] = ()


TASKS = {
    "caltech101": Task("natural", 102, 6084, ("caltech",)),
    "cifar": Task("natural", 100, 10_000, ("cifar100", "cifar_100")),
    "dtd": Task("natural", 47, 1880),
    "oxford_flowers102": Task("natural", 102, 6149, ("flowers", "flowers102", "oxford_flowers")),
    "oxford_iiit_pet": Task("natural", 37, 3669, ("pets", "pet", "oxford_pet", "oxford_iiit_pets")),
    "svhn": Task("natural", 10, 26_032),
    "sun397": Task("natural", 397, 21_750, ("sun",)),
    "patch_camelyon": Task("specialized", 2, 32_768, ("camelyon", "pcam")),
    "eurosat": Task("specialized", 10, 5400),
    "resisc45": Task("specialized", 45, 6300, ("resisc",)),
    "diabetic_retinopathy": Task("specialized", 5, 42_670, ("retinopathy", "retino")),
    "clevr_count": Task("structured", 8, 15_000),
    "clevr_dist": Task("structured", 6, 15_000, ("clevr_distance",)),
    "dmlab": Task("structured", 6, 22_735),
    "kitti": Task("structured", 4, 711, ("kitti_dist",)),
    "dsprites_loc": Task("structured", 16, 73_728, ("dsprites_location",)),
    "dsprites_ori": Task("structured", 16, 73_728, ("dsprites_orientation",)),
    "smallnorb_azi": Task("structured", 18, 12_150, ("smallnorb_azimuth",)),
    "smallnorb_ele": Task("structured", 9, 12_150, ("smallnorb_elevation",)),
}
"""The nineteen tasks in the order of the papers' tables."""
LISTS: dict[str, dict[str, tuple[str, int]]] = {
    "final": {"train": ("train800val200", 1000), "test": ("test", 0)},
    "tune": {"train": ("train800", 800), "validation": ("val200", 200)}}
"""The list of each set by protocol, and how many pictures it has (0: as many as the task's test set)."""
INSIDE = "vtab-1k"
"""A folder of this name around the tasks' may stand in ``root``."""


@dataclass(frozen=True)
class Entry(Sample):
    """One line of a list; ``group`` is the set.

    Args:
        file, name, labels, group: see `Sample`.
        where: list and line, for messages.
    """

    where: str = ""


class VTAB1k(ImageData):
    """One task of VTAB-1k, or of the mini.

    Args:
        task: one of ``TASKS`` (``cifar``, ``dtd``, ``svhn`` ...), of the mini digits, textures, orientation, position,
            count. Null is ``cifar``, and ``digits`` of the mini. ``--over data.task=all`` runs all of them.
        protocol: ``final`` trains on the 1000 pictures of train800val200 and tests; ``tune`` trains on train800 and
            validates on val200, without ever reading the test list: settings are searched so.
        normalise: null is ``none``, as in the paper of the 1-bit adapters (https://arxiv.org/abs/2307.16867) and in
            VPT's, and of the mini ``inception``, as the nano knows its pictures; Hydra's and VQT's authors take
            ``imagenet``, SSF's ``inception``.
        root: folder that holds the tasks' folders.
        source, size, resize and all others: see ``ImageData``.
    """

    title = "VTAB-1k"
    folder = INSIDE
    obtain = "give the folder of VTAB-1k's tasks, with their lists of pictures, as data.root"
    mini_name = "mini VTAB"
    mini_is = "five tasks of rendered pictures"
    every_class = False  # 1000 pictures of sun397's 397 classes leave some out

    def __init__(self, root: str | None = None, source: Source = "auto", task: str | None = None,
                 protocol: Protocol = "final", normalise: Normalise | None = None, **common: Any) -> None:
        super().__init__(root, source, normalise=normalise or "none", **common)
        self._usual = normalise is None
        if protocol not in LISTS:
            raise ScionError(f"data.protocol: {protocol!r}{nearest(protocol, LISTS)} is none of {listed(LISTS)}")
        self.task, self.protocol = task, protocol
        if task is not None and task not in TASKS and task not in _mini_tasks():
            known = next((name for name, one in TASKS.items() if task.lower() in (name, *one.aliases)), None)
            hint = f" (it is called {known!r} here)" if known else nearest(task, [*TASKS, *_mini_tasks()])
            raise ScionError(f"data.task: VTAB-1k has no task {task!r}{hint}; it has {listed(TASKS, 19)}; and the mini "
                             f"{listed(_mini_tasks())}")

    @classmethod
    def choices(cls, argument: str, arguments: dict[str, Any]) -> list[Any]:
        """The nineteen tasks, or the mini's five where it will take their place."""
        if argument != "task":
            return super().choices(argument, arguments)
        source = arguments.get("source", "auto")
        data = cls(cache=arguments.get("cache"))
        absent = source == "auto" and arguments.get("root") is None and not os.path.isdir(data.cache / cls.folder)
        return list(_mini_tasks() if source == "mini" or absent else TASKS)

    # ------------------------------------------------------------------------------ what the layout says

    def where(self) -> Path | Literal["mini", "download"]:
        place = super().where()
        if place == "mini" and self.task is not None and self.task not in _mini_tasks():
            raise ScionError(f"data.task: the mini has no task {self.task!r}, it has {listed(_mini_tasks())}; for "
                             f"VTAB-1k's own, {self.obtain}")
        if place == "mini" and self._usual:
            self.normalise = "inception"
        return place

    @property
    def real_task(self) -> str:
        """The name of the task in ``TASKS``."""
        task = self.task or "cifar"
        if task not in TASKS:
            raise ScionError(f"data.task: {task!r} is a task of the mini (data.source: mini); VTAB-1k has "
                             f"{listed(TASKS, 19)}")
        return task

    def layout(self, root: Path) -> Path:
        names = self.real_task, *TASKS[self.real_task].aliases
        if not os.path.isdir(root):
            raise ScionError(f"data.root: no folder {root}")
        for folder in (root / inside / name for inside in ("", INSIDE) for name in names):
            if os.path.isdir(folder):
                return folder
        there = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] != ".")
        raise ScionError(f"data.root: no folder {names[0]} in {root} (wanted: a folder for each task of VTAB-1k), "
                         f"it has {listed(there) or 'no folders'}")

    def table(self, root: Path) -> tuple[list[Entry], list[str]]:
        task = TASKS[self.real_task]
        classes = _class_names(root, task.classes)
        entries: list[Entry] = []
        for which, (name, size) in LISTS[self.protocol].items():
            file, wanted = root / f"{name}.txt", size or task.tested
            found = list(_entries(file, which, classes))
            if len(found) != wanted:
                self.notes.append(f"{file.name} lists {len(found)} pictures, VTAB-1k's {wanted}")
            absent = task.classes - len({entry.labels for entry in found})
            if which == "train" and absent:
                self.notes.append(f"{file.name} has pictures of {task.classes - absent} of {task.classes} classes")
            entries += found
        return entries, classes

    def parts(self, samples: list[Entry], bad: set[int]) -> Parts:
        return {which: [row for row, entry in enumerate(samples) if entry.group == which]
                for which in LISTS[self.protocol]}

    def lister(self, sample: Entry) -> str:
        return sample.where

    def named(self, samples: list[Entry], classes: list[str]) -> str:
        whole = sum(size or TASKS[self.real_task].tested for _, size in LISTS[self.protocol].values())
        name = self.title if len(samples) == whole else f"{len(samples)} pictures in {self.title}'s layout"
        return name if self.protocol == "final" else f"{name}, settings searched on val200"

    # ------------------------------------------------------------------------------ the sets

    def mini_task(self) -> str:
        """The name of the task in the mini's ``TASKS``."""
        return self.task or "digits"

    def mini_classes(self) -> list[str]:
        return list(_mini_tasks()[self.mini_task()].classes)

    def mini_parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        from domains.vision import mini

        train, validation = (mini.split(self.mini_task(), which) for which in ("train", "validation"))
        if self.protocol == "tune":
            return {"train": train, "validation": validation}
        both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
        return {"train": both, "test": mini.split(self.mini_task(), "test")}

    def set_parts(self, parts: dict[str, Any]) -> None:
        real = self.where() != "mini"
        task = self.real_task if real else self.mini_task()
        self.origin.update(task=task, group=TASKS[task].group if real else _mini_tasks()[task].group)
        super().set_parts(parts)


def _mini_tasks() -> dict[str, Any]:
    from domains.vision import mini

    return mini.TASKS


def _class_names(folder: Path, count: int) -> list[str]:
    file = next((file for name in ("classes", "labels") if os.path.lexists(file := folder / f"{name}.txt")), None)
    if file is None:
        return [str(number) for number in range(count)]
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if len(names) != count or len(set(names)) != count:
        raise ScionError(f"{file}: {len(set(names))} different names on {len(names)} lines, the task has {count} "
                         "classes: one name on each line wanted")
    return names


def _entries(file: Path, which: str, classes: list[str]) -> list[Entry]:
    """The lines of a list, checked."""
    if not os.path.lexists(file):
        raise ScionError(f"{file}: no such list of pictures (VTAB-1k's layout has train800.txt, val200.txt, "
                         "train800val200.txt and test.txt in the folder of each task)")
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        words = line.strip().rsplit(maxsplit=1)
        if len(words) < 2 or re.fullmatch(r"[+-]?\d{1,9}", words[1]) is None:
            raise ScionError(f"{where}: {line.strip()[:80]!r} has no label; a picture's path, a space and the number "
                             "of its class wanted")
        name, label = words[0], int(words[1])
        if not 0 <= label < len(classes):
            raise ScionError(f"{where}: {label} is no label; the task has {len(classes)} classes, 0 to "
                             f"{len(classes) - 1}")
        found.append(Entry(file.parent / name, name, (classes[label],), which, where))
    if not found:
        raise ScionError(f"{file}: empty; lines of a picture's path and the number of its class wanted")
    return found
