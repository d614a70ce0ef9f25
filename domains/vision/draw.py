"""Building stones of synthetic pictures, shared by the mini (``mini.py``) and the pretraining (``make_nano.py``).

Everything is a function of a numpy generator and works on many pictures at once: a canvas is [n, 3, 48, 48] in 0 .. 1,
a mask [n, 48, 48] in 0 .. 1. Places and lengths are in pixels, x to the right and y down, angles in radians. Forms are
kept as signed distances (negative inside) on a fine grid, sampled under any shift, turn and size: edges are smooth.
The two users share these stones and no class: see ``mini.TASKS`` and ``make_nano.FORMS``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Random = np.random.Generator

SIZE = 48
"""Pixels along each side of a picture."""
FINE, REACH = 80, 1.4
"""Points along each side of a form's grid, and how far it reaches: -1.4 .. 1.4, for forms of radius one."""
_Y, _X = (np.mgrid[:SIZE, :SIZE] + 0.5).astype(np.float32)
_V, _U = np.mgrid[-REACH:REACH:FINE * 1j, -REACH:REACH:FINE * 1j]


def generator(*seed: object) -> Random:
    """A generator that is a function of ``seed`` alone."""
    from core.random_state import seed_of

    return np.random.Generator(np.random.PCG64(seed_of(*seed)))


# ---- forms: signed distances on the fine grid, [80, 80]; union is the minimum, intersection the maximum


def disc(x: float = 0, y: float = 0, radius: float = 1) -> Array:
    """A disc around (x, y)."""
    return np.hypot(_U - x, _V - y) - radius


def polygon(corners: Sequence[tuple[float, float]] | Array) -> Array:
    """The polygon through ``corners`` [n, 2]; it need not be convex."""
    points = np.asarray(corners, dtype=float)
    distance, inside = np.full(_U.shape, np.inf), np.zeros(_U.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, axis=0), strict=True):
        distance = np.minimum(distance, _to_segment(ax, ay, bx, by))
        if ay != by:
            crosses = (ay > _V) != (by > _V)
            inside ^= crosses & ((bx - ax) * (_V - ay) / (by - ay) + ax > _U)
    return np.where(inside, -distance, distance)


def strokes(lines: Sequence[tuple[float, float, float, float]], width: float = 0.2) -> Array:
    """Round-ended strokes from (x, y) to (x, y), ``width`` to either side."""
    return np.min([_to_segment(*line) for line in lines], axis=0) - width


def radial(radii: Array) -> Array:
    """The form whose edge lies at ``radii`` [angles], at equal steps of angle; the distance is close near the edge."""
    angle = np.arctan2(_V, _U) % (2 * np.pi)
    steps = np.linspace(0, 2 * np.pi, len(radii) + 1)
    edge = np.interp(angle, steps, np.append(radii, radii[0]))
    slope = np.interp(angle, steps, np.gradient(np.append(radii, radii[0]), steps))
    return (np.hypot(_U, _V) - edge) / np.sqrt(1 + (slope / edge) ** 2)


def star(points: int, inner: float) -> Array:
    """A star with ``points`` tips at radius one and as many notches at radius ``inner``; 2 x points corners."""
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return polygon(np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1))


def regular(corners: int) -> Array:
    """The regular polygon with ``corners`` corners at radius one."""
    angle = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return polygon(np.stack([np.cos(angle), np.sin(angle)], axis=1))


def box(width: float, height: float, x: float = 0, y: float = 0) -> Array:
    """A rectangle around (x, y), ``width`` and ``height`` to either side."""
    return polygon([(x - width, y - height), (x + width, y - height), (x + width, y + height), (x - width, y + height)])


def _to_segment(ax: float, ay: float, bx: float, by: float) -> Array:
    along = ((_U - ax) * (bx - ax) + (_V - ay) * (by - ay)) / max((bx - ax) ** 2 + (by - ay) ** 2, 1e-9)
    along = np.clip(along, 0, 1)
    return np.hypot(_U - ax - along * (bx - ax), _V - ay - along * (by - ay))


def bank(forms: Sequence[Array]) -> Array:
    """``forms`` stacked for ``place``, [forms, 80, 80]."""
    return np.stack(forms).astype(np.float32)


# ---- placing forms


def frame(x: Array, y: Array, size: Array, angle: Array, squeeze: Array | float = 1.0) -> tuple[Array, Array]:
    """Each picture's pixels as a form at (x, y) sees them: two arrays [n, 48, 48], the form's edge about one away.

    Args:
        x, y, size, angle: [n]; ``size`` is the form's radius in pixels, ``angle`` turns it clockwise as seen.
        squeeze: height over width.
    """
    x, y, size, angle, squeeze = (np.asarray(a, dtype=np.float32).reshape(-1, 1, 1)
                                  for a in (x, y, size, angle, squeeze))
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    dx, dy = _X - x, _Y - y
    return cos * dx + sin * dy, (cos * dy - sin * dx) / squeeze


def sample(pictures: Array, which: NDArray[np.integer], u: Array, v: Array) -> Array:
    """``pictures[which]`` [n, rows, columns] at u, v in -1 .. 1 (their outermost points), bilinear, [n, 48, 48]."""
    rows, columns = pictures.shape[1:]
    column = np.clip((u + 1) * np.float32((columns - 1) / 2), 0, columns - 1.001)
    row = np.clip((v + 1) * np.float32((rows - 1) / 2), 0, rows - 1.001)
    left, top = column.astype(np.int32), row.astype(np.int32)
    column -= left
    row -= top
    flat = pictures.reshape(-1)
    place = np.asarray(which, dtype=np.int32).reshape(-1, 1, 1) * np.int32(rows * columns) + top * columns + left
    upper, lower = flat.take(place), flat.take(place + columns)
    upper += column * (flat.take(place + 1) - upper)
    lower += column * (flat.take(place + columns + 1) - lower)
    return upper + row * (lower - upper)


def place(forms: Array, which: NDArray[np.integer], x: Array, y: Array, size: Array, angle: Array,
          squeeze: Array | float = 1.0) -> tuple[Array, Array, Array]:
    """Signed distance in pixels and the two coordinates of ``frame`` of one form per picture, each [n, 48, 48].

    Args:
        forms: ``bank(...)``.
        which: [n], the form of each picture; the rest as in ``frame``.
    """
    u, v = frame(x, y, size, angle, squeeze)
    limit = np.float32(1 / REACH)
    distance = sample(forms, which, u * limit, v * limit)
    scale = np.asarray(size, dtype=np.float32) * np.minimum(np.asarray(squeeze, dtype=np.float32), 1)
    return distance * scale.reshape(-1, 1, 1), u, v


def cover(distance: Array) -> Array:
    """How much of each pixel lies inside, from the signed distance in pixels."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def discs(x: Array, y: Array, radius: Array, shown: NDArray[np.bool_]) -> Array:
    """Mask [n, 48, 48] of several discs a picture; all arguments are [n, discs]."""
    mask = np.zeros((len(x), SIZE, SIZE), dtype=np.float32)
    for k in range(x.shape[1]):
        rows = np.flatnonzero(shown[:, k])
        if len(rows):
            across, down, reach = (a[rows, k].astype(np.float32).reshape(-1, 1, 1) for a in (x, y, radius))
            mask[rows] = np.maximum(mask[rows], cover(np.hypot(_X - across, _Y - down) - reach))
    return mask


def paint(canvas: Array, colour: Array, mask: Array) -> None:
    """Lay ``colour`` ([n, 3], or [n, 3, 48, 48] for a pattern) over ``canvas`` where ``mask`` covers it, in place."""
    if colour.ndim == 2:
        colour = colour[:, :, None, None]
    canvas += mask[:, None] * (colour - canvas)


# ---- colours, backgrounds, light


def colours(rng: Random, n: int, bright: tuple[float, float] = (0.15, 1.0)) -> Array:
    """``n`` colours [n, 3] of any hue, from grey to vivid, of brightness within ``bright``."""
    hue, vivid, value = rng.uniform(0, 6, (n, 1)), rng.uniform(0, 1, (n, 1)) ** 0.7, rng.uniform(*bright, (n, 1))
    wheel = np.clip(np.abs((hue + [[0, 4, 2]]) % 6 - 3) - 1, 0, 1)
    return (value * (1 - vivid * (1 - wheel))).astype(np.float32)


def unlike(rng: Random, *others: Array, tries: int = 6) -> Array:
    """Colours [n, 3] that can be told from all ``others`` [n, 3]: the farthest of ``tries`` draws."""
    draws = np.stack([colours(rng, len(others[0])) for _ in range(tries)])
    apart = np.min([_apart(draws, other) for other in others], axis=0)
    return draws[apart.argmax(axis=0), np.arange(len(others[0]))]


def _apart(a: Array, b: Array) -> Array:
    """Distance of colours, brightness counted most, as eyes do."""
    difference = a - b
    return np.abs(difference @ np.array([0.3, 0.6, 0.1], dtype=np.float32)) + 0.4 * np.abs(difference).mean(axis=-1)


def clouds(rng: Random, n: int, cells: int, channels: int = 1) -> Array:
    """Smooth noise [n, channels, 48, 48] of about unit spread that varies over 48 / ``cells`` pixels."""
    place = np.linspace(0, cells, SIZE)
    weight = np.maximum(1 - np.abs(place[:, None] - np.arange(cells + 1)), 0)
    weight = (weight * weight * (3 - 2 * weight)).astype(np.float32)  # eased, so that the grid does not show
    grid = rng.standard_normal((n, channels, cells + 1, cells + 1), dtype=np.float32)
    return 1.3 * (weight @ grid @ weight.T)


def ramp(rng: Random, n: int) -> Array:
    """A steady slope in a random direction, [n, 48, 48], from about -1 to 1."""
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    return (np.cos(angle) * (_X - SIZE / 2) + np.sin(angle) * (_Y - SIZE / 2)) / np.float32(SIZE / 2)


def backgrounds(rng: Random, n: int, first: Array, second: Array, rough: float = 0.12) -> Array:
    """Canvases [n, 3, 48, 48] that run from colour ``first`` to ``second`` [n, 3], clouded by up to ``rough``."""
    mixed = np.clip(0.5 + 0.5 * ramp(rng, n), 0, 1)
    canvas = np.repeat(first[:, :, None, None], SIZE, axis=2).repeat(SIZE, axis=3)
    paint(canvas, second, mixed)
    for cells in (3, 10):
        canvas += rng.uniform(0, rough, (n, 1, 1, 1)).astype(np.float32) * clouds(rng, n, cells)
    return canvas


def photograph(rng: Random, canvas: Array, noise: float = 0.06) -> NDArray[np.uint8]:
    """``canvas`` as a camera might give it, [n, 3, 48, 48]: light from one side, more or less of it, a tint, noise.

    Args:
        rng: the only source of chance.
        canvas: [n, 3, 48, 48]; changed.
        noise: the most that a picture's noise may spread.
    """
    n = len(canvas)
    canvas *= (1 + rng.uniform(0, 0.25, (n, 1, 1)).astype(np.float32) * ramp(rng, n))[:, None]
    canvas *= rng.uniform(0.75, 1.1, (n, 1, 1, 1)).astype(np.float32) * rng.uniform(0.9, 1.1, (n, 3, 1, 1)).astype(
        np.float32)
    canvas += rng.uniform(0, noise, (n, 1, 1, 1)).astype(np.float32) * rng.standard_normal(canvas.shape,
                                                                                          dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
