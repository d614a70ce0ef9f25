"""Mini ESC: ten synthetic sounds of about a second, made on the spot from a seed; no file, no download.

A stand-in that lets the whole way (data, backbone, method, tables) run anywhere in minutes. It says nothing about real
recordings. The classes come in five pairs that share their ingredients and differ in how these move through time, so a
classifier on averaged features of a backbone that never heard them has to guess within a pair. Every clip draws its own
pitch, timbre, tempo, place, colour, background noise and level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.random_state import seed_of
from domains.audio import synth
from domains.audio.features import RATE, filterbank, one_thread, samples
from domains.audio.synth import Random, Wave, loguniform, seconds

FRAMES = 112
"""Frames of a clip: 1.1 s, seven patches of sixteen."""
SIZES = {"train": 400, "validation": 100, "test": 400}
"""Clips of each split, a tenth of them of each class."""


def _voice(rng: Random) -> list[tuple[float, float]]:
    return synth.harmonics(rng, int(rng.integers(1, 8)), rng.uniform(0.5, 2))


def _glide(rng: Random, n: int, up: bool) -> Wave:
    """One tone whose pitch moves steadily by half an octave to two octaves."""
    span, low = rng.uniform(0.5, 2.0), loguniform(rng, 200, 1200)
    path = np.linspace(0, span, n) if up else np.linspace(span, 0, n)
    return synth.tones(rng, low * 2**path, _voice(rng))


def _swell(rng: Random, n: int, rising: bool) -> Wave:
    """One steady tone, plucked and dying away, or the same backwards: growing and cut off."""
    shape = np.exp(-np.linspace(0, rng.uniform(3, 6), n))
    pitch = np.full(n, loguniform(rng, 150, 1500))
    return synth.tones(rng, pitch, _voice(rng)) * synth.smooth(shape[::-1].copy() if rising else shape)


def _bounce(rng: Random, n: int, faster: bool) -> Wave:
    """Knocks that follow each other ever faster, as of a dropped ball, or ever more slowly."""
    count, ratio = int(rng.integers(5, 9)), rng.uniform(0.65, 0.82)
    gaps = ratio ** np.arange(count)
    gaps *= n / RATE / gaps.sum()
    times = np.concatenate([[0.0], np.cumsum(gaps if faster else gaps[::-1])[:-1]])
    low = loguniform(rng, 150, 1500)
    return synth.clicks(rng, n, list(times), rng.uniform(0.004, 0.02), low, low * rng.uniform(1.5, 4))


def _siren(rng: Random, n: int, steps: bool) -> Wave:
    """A tone that wails smoothly between two pitches, or jumps between them."""
    swing = np.sin(2 * np.pi * (rng.uniform(2, 5) * seconds(n) + rng.uniform()))
    swing = synth.smooth(np.sign(swing), 0.01) if steps else swing
    return synth.tones(rng, loguniform(rng, 300, 1500) * 2 ** (rng.uniform(0.2, 0.5) * swing), _voice(rng))


def _blips(rng: Random, n: int, up: bool) -> Wave:
    """A handful of very short gliding tones at random moments: bubbles rise, zaps fall."""
    out = np.zeros(n)
    for _ in range(int(rng.integers(4, 9))):
        length = int(rng.uniform(0.05, 0.12) * RATE)
        path = np.linspace(0, rng.uniform(0.7, 1.5), length)
        start, low = int(rng.integers(0, n - length)), loguniform(rng, 300, 1500)
        wave = synth.tones(rng, low * 2 ** (path if up else path[::-1]), [(1.0, 1.0)])
        out[start:start + length] += wave * np.hanning(length) * rng.uniform(0.5, 1)
    return out


CLASSES: dict[str, Callable[[Random, int], Wave]] = {
    "rising_tone": lambda rng, n: _glide(rng, n, up=True),
    "falling_tone": lambda rng, n: _glide(rng, n, up=False),
    "pluck": lambda rng, n: _swell(rng, n, rising=False),
    "swell": lambda rng, n: _swell(rng, n, rising=True),
    "dropped_ball": lambda rng, n: _bounce(rng, n, faster=True),
    "slowing_wheel": lambda rng, n: _bounce(rng, n, faster=False),
    "wail": lambda rng, n: _siren(rng, n, steps=False),
    "two_tone_horn": lambda rng, n: _siren(rng, n, steps=True),
    "bubbles": lambda rng, n: _blips(rng, n, up=True),
    "zaps": lambda rng, n: _blips(rng, n, up=False),
}


def clip(name: str, *seed: object) -> NDArray[np.float32]:
    """One clip of class ``name`` at 16 kHz, [samples], a function of ``seed`` alone."""
    rng = np.random.Generator(np.random.PCG64(seed_of("mini", name, *seed)))
    whole = samples(FRAMES)
    n = int(whole * rng.uniform(0.6, 1.0))
    sound = np.zeros(whole)
    start = int(rng.integers(0, whole - n + 1))
    sound[start:start + n] = synth.unit(CLASSES[name](rng, n))
    return synth.record(rng, sound, snr=(-3, 15))


@lru_cache(maxsize=16)
def split(which: str, draw: int) -> tuple[Tensor, Tensor]:
    """Filterbanks [clips, 112, 128] before normalisation and targets [clips] of one split.

    Args:
        which: ``train``, ``validation`` or ``test``.
        draw: which of the endlessly many equal datasets; the folds of the benchmark take this place.
    """
    from tqdm import tqdm

    names = list(CLASSES)
    targets = torch.arange(SIZES[which]) % len(names)
    bar = tqdm(targets.tolist(), f"mini {which}", leave=False, disable=None)  # on a terminal alone
    with one_thread():
        banks = torch.stack([filterbank(torch.from_numpy(clip(names[target], which, draw, index)), frames=FRAMES)
                             for index, target in enumerate(bar)])
    return banks, targets
