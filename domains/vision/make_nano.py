"""Pretrain a nano: ``python -m domains.vision.make_nano [nano|nano_swin] [FOLDER]``, under half an hour on two cores.

Each picture shows a main form with a filling, a small companion beside it, and crumbs of two tones, over any ground,
partly covered. Five linear heads on the pooled feature ask

- form: which of 24 silhouettes the main one is (polygons, stars, tools, made-up letters);
- filling: which of 12 ways it is filled (a fade, spokes, a spiral, a camouflage, ...);
- bearing: in which of eight directions the companion lies as seen from the main form;
- more: whether there are more light crumbs, more dark ones, or as many of each;
- sketch: how much of each of 12 x 12 cells is covered by the main form, and by the other things;
  a sixth head asks each token of the last layer for the part of the sketch that lies in its own patch.

None of the mini's classes (``mini.py``) is asked or shown: no digits, none of its surfaces, none of its emblems and
shapes; no bin of orientation or of position and no number of things is a target. The last three heads are relative or
spatial, so that the feature keeps place, turn and number all the same. No picture is seen twice.

The recipe was fixed before any method was tried on its result. One seed decides everything; another machine's
arithmetic may still round differently.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from domains.vision import draw
from domains.vision.backbones import NANOS
from domains.vision.draw import Array, Random

STEPS = {"nano": 8_000, "nano_swin": 7_000}
"""Optimizer steps, so many that one core takes about half an hour."""
BATCH, PEAK_RATE, WARM_UP, WEIGHT_DECAY = 64, 1e-3, 100, 0.05
HELD_OUT = 20
"""Batches that no training step saw, for the accuracies reported."""
CELLS = 12
"""Cells along each side of the sketch."""

# ---- forms


def _letter(number: int) -> Array:
    """Four strokes between random points of a 3 x 3 lattice, each from where the last one ended."""
    rng = draw.generator("nano", "letter", number)
    points = [(int(rng.integers(3)) - 1, int(rng.integers(3)) - 1)]
    while len(points) < 5:
        point = (int(rng.integers(3)) - 1, int(rng.integers(3)) - 1)
        if point not in points[-2:]:
            points.append(point)
    scale = 0.75
    return draw.strokes([(scale * a[0], scale * a[1], scale * b[0], scale * b[1])
                         for a, b in zip(points, points[1:], strict=False)], 0.17)


def _crescent() -> Array:
    return np.maximum(draw.disc(), -draw.disc(0.45, 0, 0.8))


def _arrow() -> Array:
    return draw.polygon([(0, -1), (0.7, -0.15), (0.27, -0.15), (0.27, 1), (-0.27, 1), (-0.27, -0.15), (-0.7, -0.15)])


def _bolt() -> Array:
    return draw.polygon([(0.25, -1), (-0.55, 0.15), (-0.05, 0.15), (-0.25, 1), (0.6, -0.25), (0.1, -0.25)])


def _key() -> Array:
    return np.minimum(np.abs(draw.disc(0, -0.55, 0.3)) - 0.14,
                      draw.strokes([(0, -0.2, 0, 0.9), (0, 0.85, 0.35, 0.85), (0, 0.5, 0.3, 0.5)], 0.11))


def _flower() -> Array:
    return draw.radial(0.72 + 0.28 * np.cos(5 * np.arange(256) * 2 * np.pi / 256))


def _gear() -> Array:
    return draw.radial(0.85 + 0.15 * np.tanh(3 * np.cos(9 * np.arange(256) * 2 * np.pi / 256)))


def _hook() -> Array:
    arc = np.maximum(np.abs(draw.disc(0, 0.35, 0.5)) - 0.15, -draw.box(1, 0.4, 0, -0.05))
    return np.minimum(arc, draw.strokes([(0.5, 0.35, 0.5, -0.85)], 0.15))


FORMS: dict[str, Callable[[], Array]] = {
    "pentagon": lambda: draw.regular(5),
    "three-pointed star": lambda: draw.star(3, 0.3),
    "four-pointed star": lambda: draw.star(4, 0.4),
    "five-pointed star": lambda: draw.star(5, 0.45),
    "eight-pointed star": lambda: draw.star(8, 0.65),
    "washer": lambda: np.abs(draw.disc(0, 0, 0.72)) - 0.25,
    "plus": lambda: np.minimum(draw.box(0.95, 0.3), draw.box(0.3, 0.95)),
    "crescent": _crescent,
    "arrow": _arrow,
    "bolt": _bolt,
    "key": _key,
    "flower": _flower,
    "gear": _gear,
    "hook": _hook,
    "house": lambda: draw.polygon([(0, -1), (0.85, -0.2), (0.6, -0.2), (0.6, 0.85), (-0.6, 0.85), (-0.6, -0.2),
                                   (-0.85, -0.2)]),
    "half moon": lambda: np.maximum(draw.disc(-0.3, 0, 1), draw.box(1, 1.3, 0.7, 0)),
    "wide mouth": lambda: np.maximum(draw.disc(), -draw.polygon([(0, 0), (1.3, -0.9), (1.3, 0.9)])),
    "hourglass": lambda: draw.polygon([(-0.75, -0.9), (0.75, -0.9), (0.15, 0), (0.75, 0.9), (-0.75, 0.9), (-0.15, 0)]),
    **{f"letter {number}": lambda number=number: _letter(number) for number in range(6)},
}


@lru_cache(maxsize=1)
def _forms() -> Array:
    return draw.bank([form() for form in FORMS.values()])


# ---- fillings: each gives 0 .. 1 between two colours, from the signed distance (in radii), coordinates and any noise


def _pluses(u: Array, v: Array) -> Array:
    u, v = np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)
    return _edge(np.minimum(0.36 - np.maximum(u, v), 0.13 - np.minimum(u, v)), 8)


def _edge(value: Array, sharp: float) -> Array:
    return np.clip(0.5 + sharp * value, 0, 1)


def _lattice(u: Array, v: Array) -> Array:
    return _edge(0.1 - np.minimum(np.abs(u % 1 - 0.5), np.abs(v % 1 - 0.5)), 8)


FILLINGS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "plain": lambda d, u, v, noise: np.zeros_like(d),
    "fade": lambda d, u, v, noise: np.clip(0.5 + 0.8 * u, 0, 1),
    "glow": lambda d, u, v, noise: np.clip(1.2 - 1.6 * np.hypot(u, v), 0, 1),
    "halves": lambda d, u, v, noise: _edge(u, 12),
    "rim": lambda d, u, v, noise: _edge(d + 0.2, 12),
    "hollow": lambda d, u, v, noise: np.zeros_like(d),  # its inside is left out of the mask
    "speckle": lambda d, u, v, noise: _edge(noise[:, 0] - 1.3, 4),
    "spokes": lambda d, u, v, noise: _edge(np.sin(6 * np.arctan2(v, u)), 3),
    "spiral": lambda d, u, v, noise: _edge(np.sin(3 * np.arctan2(v, u) + 9 * np.hypot(u, v)), 2),
    "lattice": lambda d, u, v, noise: _lattice(2.6 * u, 2.6 * v),
    "pluses": lambda d, u, v, noise: _pluses(2.6 * u, 2.6 * v),
    "camouflage": lambda d, u, v, noise: _edge(noise[:, 1], 4),
}

BEARINGS, MORE = 8, ("as many", "more light", "more dark")
HEADS = {"form": len(FORMS), "filling": len(FILLINGS), "bearing": BEARINGS, "more": len(MORE)}


def scenes(rng: Random, n: int) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.int64]], Array]:
    """``n`` pictures [n, 3, 48, 48], the target of each head [n], and the sketches [n, 2, 12, 12] in 0 .. 1."""
    wanted = {name: rng.integers(0, count, n) for name, count in HEADS.items()}
    first = draw.colours(rng, n, (0.05, 0.95))
    second = np.clip(first + rng.normal(0, 0.2, first.shape), 0, 1).astype(np.float32)
    canvas = draw.backgrounds(rng, n, first, second, 0.1)
    others = _crumbs(rng, canvas, wanted["more"])

    size, small = rng.uniform(11, 17, n), rng.uniform(4, 6, n)
    angle = (wanted["bearing"] + rng.uniform(-0.35, 0.35, n)) * 2 * np.pi / BEARINGS
    apart = 0.9 * size + small + rng.uniform(-1, 1, n)
    dx, dy = apart * np.cos(angle), apart * np.sin(angle)
    middle = draw.SIZE / 2
    x, y = (rng.uniform(np.minimum(np.maximum(0.8 * size, 4 - d), middle),
                        np.maximum(np.minimum(draw.SIZE - 0.8 * size, draw.SIZE - 4 - d), middle)) for d in (dx, dy))
    colour = draw.unlike(rng, first, second)
    distance, u, v = draw.place(_forms(), wanted["form"], x, y, size, rng.uniform(0, 2 * np.pi, n),
                                rng.uniform(0.75, 1, n))
    mask, pattern = draw.cover(distance), _fill(rng, wanted["filling"], distance, u, v, size, colour, first)
    hollow = wanted["filling"] == list(FILLINGS).index("hollow")
    draw.paint(canvas, pattern, np.where(hollow[:, None, None], mask - draw.cover(distance + 2.5), mask))

    near, _, _ = draw.place(_forms(), rng.integers(0, len(FORMS), n), x + dx, y + dy, small,
                            rng.uniform(0, 2 * np.pi, n))
    beside = draw.cover(near)
    draw.paint(canvas, draw.unlike(rng, first, second), beside)
    others = np.maximum(others, beside)
    _hide(rng, canvas)
    sketch = np.stack([mask, others * (1 - mask)], axis=1)
    step = draw.SIZE // CELLS
    return draw.photograph(rng, canvas), wanted, sketch.reshape(n, 2, CELLS, step, CELLS, step).mean(axis=(3, 5))


def _crumbs(rng: Random, canvas: Array, more: NDArray[np.int64]) -> Array:
    """Strew light and dark discs over ``canvas``, up to four of each tone; returns their mask."""
    n = len(canvas)
    fewer = rng.integers(0, 3, n)
    surplus = rng.integers(1, 3, n)
    numbers = {1.0: fewer + surplus * (more == 1), 0.0: fewer + surplus * (more == 2)}
    whole = np.zeros((n, draw.SIZE, draw.SIZE), dtype=np.float32)
    for tone, number in numbers.items():
        x, y, radius = rng.uniform(2, draw.SIZE - 2, (n, 5)), rng.uniform(2, draw.SIZE - 2, (n, 5)), rng.uniform(
            1.2, 2.2, (n, 5))
        mask = draw.discs(x, y, radius, np.arange(5) < number[:, None])
        draw.paint(canvas, np.full((n, 3), 0.05 + 0.9 * tone, dtype=np.float32), mask)
        whole = np.maximum(whole, mask)
    return whole


def _fill(rng: Random, filling: NDArray[np.int64], distance: Array, u: Array, v: Array, size: Array, colour: Array,
          ground: Array) -> Array:
    """The main form's colours, [n, 3, 48, 48]."""
    n = len(filling)
    turn = rng.uniform(0, 2 * np.pi, (n, 1, 1)).astype(np.float32)
    u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    depth = distance / size.astype(np.float32)[:, None, None]
    tone = np.zeros_like(distance)
    for target, fill in enumerate(FILLINGS.values()):
        rows = np.flatnonzero(filling == target)
        if len(rows):
            noise = np.concatenate([draw.clouds(rng, len(rows), 32), draw.clouds(rng, len(rows), 9)], axis=1)
            tone[rows] = fill(depth[rows], u[rows], v[rows], noise)
    pattern = np.repeat(colour[:, :, None], draw.SIZE**2, axis=2).reshape(n, 3, draw.SIZE, draw.SIZE)
    draw.paint(pattern, draw.unlike(rng, colour, ground), tone)
    return pattern


def _hide(rng: Random, canvas: Array) -> None:
    """Cover a rectangle of a third of the pictures with one colour."""
    rows = np.flatnonzero(rng.uniform(0, 1, len(canvas)) < 0.33)
    for row, colour in zip(rows, draw.colours(rng, len(rows)), strict=True):
        top, left = rng.integers(0, draw.SIZE - 8, 2)
        height, width = rng.integers(4, 13, 2)
        canvas[row, :, top:top + height, left:left + width] = colour[:, None, None]


CLASSES = [*FORMS, *FILLINGS, *(f"bearing {45 * k}" for k in range(BEARINGS)), *MORE]


def batch(*seed: object, n: int = BATCH) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Normalised pictures [n, 3, 48, 48], targets of the heads [n] and sketches [n, 2, 12, 12]; ``seed`` decides."""
    rng = draw.generator("nano", *seed)
    parts = [scenes(rng, min(32, n - start)) for start in range(0, n, 32)]  # so few that they stay in the cache
    pictures = torch.from_numpy(np.concatenate([part[0] for part in parts])).float().div_(127.5).sub_(1)
    wanted = {name: torch.from_numpy(np.concatenate([part[1][name] for part in parts])) for name in HEADS}
    return pictures, wanted, torch.from_numpy(np.concatenate([part[2] for part in parts]))


class Pretraining(nn.Module):
    """A nano with its heads.

    Args:
        name: ``nano`` or ``nano_swin``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        architecture, arguments = NANOS[name]
        self.model: Any = timm.create_model(architecture, **{**arguments, "num_classes": 0})
        for module in self.model.modules():  # at timm's 0.02 so narrow a network hardly starts to learn
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        self.heads = nn.ModuleDict({head: nn.Linear(self.model.num_features, n) for head, n in HEADS.items()})
        self.sketch = nn.Linear(self.model.num_features, 2 * CELLS**2)
        self.side = 6 if name == "nano" else 3  # of the last layer's tokens
        self.patch = nn.Linear(self.model.num_features, 2 * (CELLS // self.side) ** 2)

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """pictures [batch, 3, 48, 48] -> logits of each head [batch, classes], and two sketches [batch, 2, 12, 12]:
        one from the pooled feature, one that each token gives of its own patch."""
        tokens = self.model.forward_features(pictures)
        feature = self.model.forward_head(tokens)
        tokens = tokens.reshape(len(pictures), -1, tokens.shape[-1])[:, -self.side**2:]  # without the class token
        each, n = CELLS // self.side, len(pictures)
        patches = self.patch(tokens).view(n, self.side, self.side, 2, each, each).permute(0, 3, 1, 4, 2, 5)
        return {name: head(feature) for name, head in self.heads.items()}, (
            self.sketch(feature).view(n, 2, CELLS, CELLS), patches.reshape(n, 2, CELLS, CELLS))

    def loss(self, logits: dict[str, Tensor], sketches: tuple[Tensor, Tensor], wanted: dict[str, Tensor],
             drawn: Tensor) -> Tensor:
        """The cross-entropies of all heads, and three times those of the sketches for each cell."""
        whole, each = (nn.functional.binary_cross_entropy_with_logits(sketch, drawn) for sketch in sketches)
        return sum((nn.functional.cross_entropy(logits[name], wanted[name]) for name in HEADS), 3 * (whole + each))


def train(name: str, seed: int = 0, steps: int | None = None) -> tuple[Pretraining, dict[str, float]]:
    """The trained network, and what its heads reached on pictures that it did not see.

    Args:
        name: ``nano`` or ``nano_swin``.
        seed: decides the first weights and every picture.
        steps: optimizer steps; ``STEPS[name]`` where None.
    """
    steps = steps or STEPS[name]
    torch.manual_seed(seed)
    network = Pretraining(name).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    progress, seen = tqdm(range(steps), f"pretraining {name}", mininterval=5, disable=None), []
    for step in progress:
        pictures, wanted, drawn = batch(seed, "train", step)
        logits, sketches = network(pictures)
        loss = network.loss(logits, sketches, wanted, drawn)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen = [*seen[-99:], [loss.item(), *_right(logits, wanted)]]
        if step % 50 == 49:
            mean = np.mean(seen, axis=0)
            progress.set_postfix_str(f"loss {mean[0]:.3f}, " + ", ".join(
                f"{head} {score:.2f}" for head, score in zip(HEADS, mean[1:], strict=True)))
    network.eval()
    return network, _held_out(network, seed)


def _right(logits: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[float]:
    return [(logits[name].argmax(1) == wanted[name]).float().mean().item() for name in HEADS]


@torch.no_grad()
def _held_out(network: Pretraining, seed: int) -> dict[str, float]:
    rows = []
    for number in range(HELD_OUT):
        pictures, wanted, drawn = batch(seed, "held out", number)
        logits, (sketch, _) = network(pictures)
        rows.append([*_right(logits, wanted), (sketch.sigmoid() - drawn).abs().mean().item()])
    return dict(zip([*HEADS, "sketch_error"], np.mean(rows, axis=0).tolist(), strict=True))


def save(network: Pretraining, report: dict[str, Any], name: str, folder: Path) -> None:
    """config.json, model.safetensors and training.json in ``folder``, each put in place whole.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads the folder.
    """
    from timm.models import save_for_hf

    half = (0.5, 0.5, 0.5)
    described = {"input_size": (3, draw.SIZE, draw.SIZE), "mean": half, "std": half, "crop_pct": 1.0,
                 "interpolation": "bicubic", "tag": "scion", "license": "apache-2.0"}
    arguments = {**NANOS[name][1], "num_classes": 0}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        save_for_hf(network.model, scratch, {"pretrained_cfg": described}, arguments, safe_serialization=True,
                    data_config={key: described[key] for key in ("input_size", "mean", "std", "crop_pct",
                                                                 "interpolation")})
        (Path(scratch) / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        for file in ("config.json", "model.safetensors", "training.json"):
            (Path(scratch) / file).chmod(0o644)  # safetensors writes for its owner alone
            os.replace(Path(scratch) / file, folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", choices=list(NANOS), default="nano")
    parser.add_argument("folder", nargs="?", type=Path, help="default: the folder of that name beside this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start, work = time.monotonic(), time.process_time()
    network, reached = train(options.name, options.seed, options.steps)
    report = {"seed": options.seed, "steps": options.steps or STEPS[options.name], "threads": options.threads,
              **{key: round(value, 3) for key, value in reached.items()},
              "seconds": round(time.monotonic() - start), "core_seconds": round(time.process_time() - work)}
    save(network, report, options.name, options.folder or Path(__file__).parent / options.name)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
