"""Mini VTAB: five tasks of 48 x 48 pictures, made on the spot from a seed; no file, no download.

**A stand-in. It lets the whole way (data, backbone, method, tables) run anywhere in minutes, and it says nothing about
real pictures: no figure measured on it may be held against a published one.**

As VTAB-1k it has natural, specialised and structured tasks of 800 + 200 training pictures, here with 500 for the test:

- digits: scikit-learn's 8 x 8 scans of handwritten digits, enlarged and tinted; each split has its own originals;
- textures: eight rendered surfaces;
- orientation: which way an elongated shape lies, eight bins of 22.5 degrees, as dSprites' orientation;
- position: how far to the right a shape lies, eight bins of 4 pixels, as dSprites' x position;
- count: three to eight objects, as CLEVR's count.

Two more sets of rendered emblems stand for recognition between close kinds: ``fine_grained`` (ten varieties of one
species) and ``retrieval`` (forty species, those of the test never seen in training).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.errors import ScionError, listed, nearest
from domains.vision import draw
from domains.vision.draw import Array, Random

SIZE = draw.SIZE
"""Pixels along each side."""
SIZES = {"train": 800, "validation": 200, "test": 500}
"""Pictures of each split of a task, spread evenly over its classes."""
FINE_SIZES = {"train": 300, "validation": 100, "test": 300}
"""Pictures of each split of ``fine_grained``."""
EACH = 20
"""Pictures of each class of ``retrieval``."""
_CHUNK = 50


@dataclass(frozen=True)
class Task:
    """One task of the mini: VTAB's group that it stands for, and the names of its classes."""

    group: Literal["natural", "specialized", "structured"]
    classes: list[str]


COUNTS = range(3, 9)
TASKS = {
    "digits": Task("natural", [str(digit) for digit in range(10)]),
    "textures": Task("specialized", ["stripes", "checks", "dots", "cells", "bricks", "waves", "ripples", "scales"]),
    "orientation": Task("structured", [f"{22.5 * k:g} to {22.5 * (k + 1):g} degrees" for k in range(8)]),
    "position": Task("structured", [f"x of {8 + 4 * k} to {12 + 4 * k} pixels" for k in range(8)]),
    "count": Task("structured", [f"{count} objects" for count in COUNTS]),
}


def split(task: str, which: str, draw: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n, 3, 48, 48] and targets int64 [n] of one split of one task; both are shared, not copied.

    Args:
        task: a name of ``TASKS``.
        which: ``train``, ``validation`` or ``test``.
        draw: which of the endlessly many equal datasets.

    Raises:
        ScionError: the task or the split is unknown.
    """
    if task not in TASKS:
        raise ScionError(f"mini VTAB has no task {task!r}{nearest(task, TASKS)}; it has {listed(TASKS)}")
    return _split(task, _known(which, SIZES), draw)


@lru_cache(maxsize=24)
def _split(task: str, which: str, number: int) -> tuple[Tensor, Tensor]:
    return _make(_PAINTERS[task], len(TASKS[task].classes), SIZES[which], task, which, number)


def _known(which: str, sizes: dict[str, int]) -> str:
    if which not in sizes:
        raise ScionError(f"the mini has no split {which!r}{nearest(which, sizes)}; it has {listed(sizes)}")
    return which


def _make(painter: Callable[..., Array], classes: int, n: int, *seed: object) -> tuple[Tensor, Tensor]:
    """``n`` pictures, the classes in turn and then shuffled, painted a chunk at a time."""
    from tqdm import tqdm

    rng = draw.generator("mini", *seed)
    order = rng.permutation(n)
    targets, turns = order % classes, order // classes  # a picture's class, and its number within the class
    pictures = np.empty((n, 3, SIZE, SIZE), dtype=np.uint8)
    for start in tqdm(range(0, n, _CHUNK), f"mini {seed[0]}, {seed[1]}", leave=False, delay=1, disable=None):
        part = slice(start, start + _CHUNK)
        pictures[part] = draw.photograph(rng, painter(rng, targets[part], turns[part], *seed[1:]))
    return torch.from_numpy(pictures), torch.from_numpy(targets.astype(np.int64))


def _canvas(rng: Random, n: int, rough: float = 0.1) -> tuple[Array, Array, Array]:
    """Backgrounds of two close colours, and these colours."""
    first = draw.colours(rng, n, (0.1, 0.9))
    second = np.clip(first + rng.normal(0, 0.12, first.shape), 0, 1).astype(np.float32)
    return draw.backgrounds(rng, n, first, second, rough), first, second


# ---- digits


@lru_cache(maxsize=1)
def _originals() -> tuple[Array, NDArray[np.int64]]:
    """The 1797 scans in 0 .. 1 with an empty rim around them, [n, 14, 14], and their digits."""
    from sklearn.datasets import load_digits

    found = load_digits(return_X_y=True)
    scans = np.pad(np.asarray(found[0], dtype=np.float32).reshape(-1, 8, 8) / 16, ((0, 0), (3, 3), (3, 3)))
    return scans, np.asarray(found[1], dtype=np.int64)


@lru_cache(maxsize=24)
def digit_originals(which: str, number: int) -> NDArray[np.int64]:
    """The scans that a split of a draw uses, [10 digits, scans of each]; no two splits of a draw share any."""
    _, digits = _originals()
    order = draw.generator("mini", "digits", number).permutation(len(digits))
    names = list(SIZES)
    start = sum(SIZES[name] for name in names[:names.index(which)]) // 10
    return np.stack([order[digits[order] == digit][start:start + SIZES[which] // 10] for digit in range(10)])


def _digits(rng: Random, targets: NDArray[np.int64], turns: NDArray[np.int64], which: str, number: int) -> Array:
    n = len(targets)
    canvas, first, second = _canvas(rng, n)
    x, y = SIZE / 2 + rng.uniform(-5, 5, (2, n))
    u, v = draw.frame(x, y, rng.uniform(22, 32, n), rng.normal(0, 0.08, n), rng.uniform(0.9, 1.15, n))
    ink = draw.sample(_originals()[0], digit_originals(which, number)[targets, turns], u, v)
    draw.paint(canvas, draw.unlike(rng, first, second), np.clip(1.8 * ink - 0.4, 0, 1))
    return canvas


# ---- textures: each gives 0 .. 1 between two colours, from coordinates whose unit is the texture's period


def _edge(value: Array, sharp: float = 4.0) -> Array:
    return np.clip(0.5 + sharp * value, 0, 1)


def _bricks(u: Array, v: Array) -> Array:
    along = (u / 2 + 0.5 * (np.floor(v) % 2)) % 1
    return _edge(np.minimum(np.minimum(v % 1, 1 - v % 1), 2 * np.minimum(along, 1 - along)) - 0.1, 8)


def _dots(u: Array, v: Array) -> Array:
    row = np.floor(v)
    return _edge(0.3 - np.hypot((u + 0.5 * (row % 2)) % 1 - 0.5, v - row - 0.5), 6)


def _scales(u: Array, v: Array) -> Array:
    """Rows of overlapping round scales: the lowest row that reaches a point covers it, dark at its rim."""
    tone = np.zeros_like(u)
    for lower in (0, 1, 2):
        row = np.floor(2 * v) - lower
        reach = np.hypot((u + 0.5 * (row % 2)) % 1 - 0.5, v - row / 2)
        tone = np.where((reach < 0.6) & (tone == 0), 0.2 + _edge(0.5 - reach, 6) * (0.4 + 0.4 * reach / 0.5), tone)
    return np.clip(tone, 0, 1)


def _cells(u: Array, v: Array) -> Array:
    """Cells around scattered points, by the difference of the distances to the nearest two."""
    near = np.full((2, *u.shape), 9.0, dtype=np.float32)
    for across in (-1, 0, 1):
        for down in (-1, 0, 1):
            column, row = np.floor(u) + across, np.floor(v) + down
            jitter = np.sin(column * 127.1 + row * 311.7) * 43758.5, np.sin(column * 269.5 + row * 183.3) * 43758.5
            distance = np.hypot(column + jitter[0] % 1 - u, row + jitter[1] % 1 - v)
            near = np.stack([np.minimum(near[0], distance), np.clip(distance, near[0], near[1])])
    return _edge(near[1] - near[0] - 0.12, 6)


SURFACES: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": lambda u, v: _edge(np.sin(2 * np.pi * u), 1.5),
    "checks": lambda u, v: _edge(np.sin(np.pi * u) * np.sin(np.pi * v), 3),
    "dots": _dots,
    "cells": _cells,
    "bricks": _bricks,
    "waves": lambda u, v: _edge(np.sin(2 * np.pi * (u + 0.35 * np.sin(np.pi * v))), 1.5),
    "ripples": lambda u, v: _edge(np.sin(2 * np.pi * np.hypot(u, v)), 1.5),
    "scales": _scales,
}


def _textures(rng: Random, targets: NDArray[np.int64], *unused: object) -> Array:
    n = len(targets)
    canvas, first, second = _canvas(rng, n, rough=0.2)
    x, y = rng.uniform(0, SIZE, (2, n))
    u, v = draw.frame(x, y, rng.uniform(6, 14, n), rng.uniform(0, 2 * np.pi, n), rng.uniform(0.8, 1.25, n))
    tone = np.empty_like(u)
    for target, surface in enumerate(SURFACES.values()):
        rows = targets == target
        tone[rows] = surface(u[rows], v[rows])
    tone = np.where(rng.uniform(0, 1, (n, 1, 1)) < 0.5, tone, 1 - tone)
    draw.paint(canvas, draw.unlike(rng, first, second), tone * rng.uniform(0.4, 1, (n, 1, 1)).astype(np.float32))
    return canvas


# ---- structured tasks


def _drop() -> Array:
    return np.minimum(draw.disc(0, 0.3, 0.65), draw.polygon([(0, -1), (0.6, 0.05), (-0.6, 0.05)]))


def _heart() -> Array:
    return np.minimum(np.minimum(draw.disc(-0.42, -0.3, 0.5), draw.disc(0.42, -0.3, 0.5)),
                      draw.polygon([(-0.85, -0.05), (0.85, -0.05), (0, 1)]))


@lru_cache(maxsize=1)
def _shapes() -> Array:
    """Disc, square, heart, diamond, wedge, drop, and then eight blobs, for the emblems alone."""
    wedge = draw.polygon([(0, -1), (0.87, 0.6), (-0.87, 0.6)])
    plain = [draw.disc(radius=0.95), draw.box(0.8, 0.8), _heart(), draw.box(0.8, 0.8), wedge, _drop()]
    plain[3] = draw.polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)])
    return draw.bank(plain + [_blob(k) for k in range(8)])


def _blob(number: int) -> Array:
    rng, angle = draw.generator("mini", "blob", number), np.arange(128) * 2 * np.pi / 128
    radius = 0.8 + np.sum([rng.normal(0, 0.25) / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
                           for k in range(2, 6)], axis=0)
    return draw.radial(np.clip(radius / radius.max(), 0.3, 1))


def _orientation(rng: Random, targets: NDArray[np.int64], *unused: object) -> Array:
    n = len(targets)
    canvas, first, second = _canvas(rng, n)
    angle = -np.pi / 8 * (targets + rng.uniform(0.1, 0.9, n))  # counter-clockwise, as angles are read
    x, y = rng.uniform(14, SIZE - 14, (2, n))
    distance, _, _ = draw.place(_shapes(), rng.choice([0, 1, 3], n), x, y, rng.uniform(10, 17, n), angle,
                                rng.uniform(0.25, 0.5, n))
    draw.paint(canvas, draw.unlike(rng, first, second), draw.cover(distance))
    return canvas


def _position(rng: Random, targets: NDArray[np.int64], *unused: object) -> Array:
    n = len(targets)
    canvas, first, second = _canvas(rng, n)
    x = 8 + 4 * (targets + rng.uniform(0.05, 0.95, n))
    distance, _, _ = draw.place(_shapes(), rng.integers(0, 5, n), x, rng.uniform(8, SIZE - 8, n),
                                rng.uniform(5, 10, n), rng.uniform(0, 2 * np.pi, n))
    draw.paint(canvas, draw.unlike(rng, first, second), draw.cover(distance))
    return canvas


def _count(rng: Random, targets: NDArray[np.int64], *unused: object) -> Array:
    canvas, first, second = _canvas(rng, len(targets))
    counts = targets + COUNTS[0]
    spots = np.stack([_apart(rng, int(count)) for count in counts])  # [n, most, (x, y, radius)]
    for k in range(COUNTS[-1]):
        rows = np.flatnonzero(counts > k)
        if len(rows):
            x, y, radius = spots[rows, k].T
            distance, _, _ = draw.place(_shapes(), rng.integers(0, 5, len(rows)), x, y, radius,
                                        rng.uniform(0, 2 * np.pi, len(rows)))
            part = canvas[rows]
            draw.paint(part, draw.unlike(rng, first[rows], second[rows]), draw.cover(distance))
            canvas[rows] = part
    return canvas


def _apart(rng: Random, count: int) -> Array:
    """Centres and radii of ``count`` discs that do not touch, [8, 3]; the rest is zero."""
    found = np.zeros((COUNTS[-1], 3))
    have = 0
    while have < count:
        radius = rng.uniform(3.5, 6)
        x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
        if (np.hypot(found[:have, 0] - x, found[:have, 1] - y) > found[:have, 2] + radius + 1.5).all():
            found[have] = x, y, radius
            have += 1
    return found


# ---- emblems


@dataclass(frozen=True)
class _Part:
    """One form of an emblem, in units of the emblem's radius."""

    form: int
    x: float
    y: float
    size: float
    angle: float
    squeeze: float
    colour: int


_PALETTE = np.array([[0.85, 0.25, 0.2], [0.95, 0.75, 0.2], [0.25, 0.55, 0.3], [0.2, 0.4, 0.75], [0.55, 0.3, 0.6],
                     [0.92, 0.9, 0.85], [0.15, 0.15, 0.2], [0.6, 0.42, 0.28]], dtype=np.float32)


def _species(number: int) -> list[_Part]:
    """A body and three more forms, one of them in a mirrored pair."""
    rng = draw.generator("mini", "species", number)
    form, angle, squeeze = int(rng.integers(6, 14)), rng.uniform(0, 6.3), rng.uniform(0.65, 1)
    body = _Part(form, 0, 0, 0.8, angle, squeeze, int(rng.integers(0, 4)))
    parts = [body]
    for kind in ("pair", "top", "belly"):
        form, size, colour = int(rng.integers(0, 6)), rng.uniform(0.2, 0.42), int(rng.integers(0, 8))
        angle, squeeze = rng.uniform(-0.8, 0.8), rng.uniform(0.5, 1)
        if colour == body.colour:
            colour = (colour + 4) % 8
        if kind == "pair":
            x, y = rng.uniform(0.35, 0.8), rng.uniform(-0.5, 0.5)
            parts += [_Part(form, side * x, y, size, side * angle, squeeze, colour) for side in (1, -1)]
        else:
            y = rng.uniform(-0.95, -0.6) if kind == "top" else rng.uniform(0.0, 0.5)
            parts.append(_Part(form, 0, y, size, 0, squeeze, colour))
    return parts


def _variety(number: int) -> list[_Part]:
    """One body and eyes; crest, belly and feet differ, never left against right: training may mirror the pictures."""
    crest, belly, feet = number % 3, number // 3 % 2, number // 6
    eyes = [_Part(0, side * 0.3, -0.3, 0.13, 0, 1, 6) for side in (-1, 1)]
    legs = [_Part((0, 4)[feet], side * 0.45, 0.8, 0.28, 0, 1, 0) for side in (-1, 1)]
    return [_Part((4, 0, 2)[crest], 0, -0.85, 0.3, 0, 1, 1), *legs, _Part(0, 0, 0, 0.8, 0, 0.95, 3), *eyes,
            _Part(3, 0, 0.3, 0.3, 0, 1, (5, 1)[belly])]


FINE_CLASSES = [f"variety {number}" for number in range(10)]
RETRIEVAL_CLASSES = {"train": [f"species {number}" for number in range(20)],
                     "test": [f"species {number}" for number in range(20, 40)]}


def _emblems(rng: Random, kinds: list[list[_Part]], targets: NDArray[np.int64], spread: float) -> Array:
    """Pictures of ``kinds[target]`` at any place, size, light and, by ``spread``, turn, over a cluttered ground."""
    n = len(targets)
    canvas, first, second = _canvas(rng, n, rough=0.2)
    for _ in range(2):  # clutter behind
        x, y = rng.uniform(0, SIZE, (2, n))
        distance, _, _ = draw.place(_shapes(), rng.integers(0, 14, n), x, y, rng.uniform(4, 9, n),
                                    rng.uniform(0, 6.3, n))
        draw.paint(canvas, draw.colours(rng, n), draw.cover(distance))
    x, y = SIZE / 2 + rng.uniform(-6, 6, (2, n))
    size, turn = rng.uniform(13, 20, n), rng.normal(0, spread, n)
    shade = _PALETTE[None] * rng.uniform(0.75, 1.2, (n, 1, 1)) + rng.normal(0, 0.06, (n, 8, 3))
    for layer in range(max(len(kind) for kind in kinds)):
        rows = np.flatnonzero([layer < len(kinds[target]) for target in targets])
        parts = [kinds[target][layer] for target in targets[rows]]
        form, across, down, part, angle, squeeze = (
            np.array([getattr(one, name) for one in parts]) for name in ("form", "x", "y", "size", "angle", "squeeze"))
        cos, sin = np.cos(turn[rows]), np.sin(turn[rows])
        distance, _, _ = draw.place(_shapes(), form, x[rows] + size[rows] * (cos * across - sin * down),
                                    y[rows] + size[rows] * (sin * across + cos * down), size[rows] * part,
                                    turn[rows] + angle, squeeze)
        below = canvas[rows]
        draw.paint(below, np.clip(shade[rows, [one.colour for one in parts]], 0, 1).astype(np.float32),
                   draw.cover(distance))
        canvas[rows] = below
    return canvas


@lru_cache(maxsize=6)
def fine_grained(which: str, number: int = 0) -> tuple[Tensor, Tensor]:
    """Ten kinds of one family that differ in details: pictures uint8 [n, 3, 48, 48] and targets int64 [n].

    Args:
        which: ``train``, ``validation`` or ``test``.
        number: which of the endlessly many equal datasets.

    Raises:
        ScionError: the split is unknown.
    """
    kinds = [_variety(target) for target in range(len(FINE_CLASSES))]
    return _make(lambda rng, targets, *_: _emblems(rng, kinds, targets, 0.4), len(kinds),
                 FINE_SIZES[_known(which, FINE_SIZES)], "fine", which, number)


@lru_cache(maxsize=4)
def retrieval(which: str, number: int = 0) -> tuple[Tensor, Tensor]:
    """Twenty species, 20 pictures of each: pictures uint8 [400, 3, 48, 48] and targets int64 [400].

    Args:
        which: ``train`` or ``test``; these show different species (``RETRIEVAL_CLASSES``).
        number: which of the endlessly many equal datasets; the species stay the same.

    Raises:
        ScionError: the split is unknown.
    """
    names = RETRIEVAL_CLASSES[_known(which, dict.fromkeys(RETRIEVAL_CLASSES, EACH))]
    kinds = [_species(int(name.split()[1])) for name in names]
    return _make(lambda rng, targets, *_: _emblems(rng, kinds, targets, 0.6), len(kinds), EACH * len(kinds),
                 "retrieval", which, number)


_PAINTERS: dict[str, Callable[..., Array]] = {"digits": _digits, "textures": _textures, "orientation": _orientation,
                                              "position": _position, "count": _count}
