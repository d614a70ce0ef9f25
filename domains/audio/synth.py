"""Building stones of synthetic sound, shared by the mini (``mini.py``) and the nano's pretraining (``make_nano.py``).

Everything is a function of a numpy generator; arrays are mono at 16 kHz, [samples]. The two users share these stones
and no class: see ``mini.CLASSES`` and ``make_nano.CLASSES``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from domains.audio.features import RATE

Wave = NDArray[np.floating]
Random = np.random.Generator


def loguniform(rng: Random, low: float, high: float) -> float:
    """A draw that is uniform on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def seconds(n: int) -> Wave:
    """Time of each of ``n`` samples."""
    return np.arange(n) / RATE


def shaped(wave: Wave, gain: Callable[[Wave], Wave]) -> Wave:
    """``wave`` with ``gain(Hz)`` applied to its spectrum."""
    size = 2048 * -(-len(wave) // 2048)  # a length that the transform is fast at
    return np.fft.irfft(np.fft.rfft(wave, size) * gain(np.fft.rfftfreq(size, 1 / RATE)), size)[: len(wave)]


def noise(rng: Random, n: int, tilt: float = 0.0) -> Wave:
    """Gaussian noise whose power falls as frequency to the power ``tilt`` (0 white, 1 pink, 2 brown)."""
    return unit(shaped(rng.standard_normal(n), lambda hz: np.maximum(hz, 30.0) ** (-tilt / 2)))


def band(wave: Wave, low: float, high: float) -> Wave:
    """``wave`` with what lies outside ``low`` .. ``high`` Hz taken out, edges a third of an octave soft."""
    def gain(hz: Wave) -> Wave:
        octave = np.log2(np.maximum(hz, 1.0))
        return np.clip(1 + 3 * np.minimum(octave - np.log2(low), np.log2(high) - octave), 0, 1)

    return shaped(wave, gain)


def tones(rng: Random, pitch: Wave, partials: list[tuple[float, float]]) -> Wave:
    """A sum of sines over a moving ``pitch`` [samples, Hz]; ``partials`` are (multiple of the pitch, amplitude)."""
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    out = np.zeros(len(pitch))
    for multiple, amplitude in partials:
        audible = pitch * multiple < 0.48 * RATE
        if audible.any():
            out += amplitude * audible * np.sin(multiple * phase + rng.uniform(0, 2 * np.pi))
    return out


def harmonics(rng: Random, count: int, slope: float, odd: bool = False) -> list[tuple[float, float]]:
    """``count`` harmonics whose amplitudes fall with ``slope`` and vary by chance; ``odd``: 1, 3, 5, ..."""
    numbers = range(1, 2 * count, 2) if odd else range(1, count + 1)
    return [(float(k), float(k**-slope * rng.uniform(0.5, 1.5))) for k in numbers]


def clicks(rng: Random, n: int, times: list[float], decay: float, low: float, high: float, fade: float = 0.0) -> Wave:
    """Short bursts of noise between ``low`` and ``high`` Hz at ``times`` (s), each dying away within ``decay`` s.

    ``fade`` makes each burst weaker than the one before by that many decibels.
    """
    length = max(int(6 * decay * RATE), 16)
    shape = np.exp(-np.arange(length) / (decay * RATE))
    out = np.zeros(n + length)
    for number, time in enumerate(times):
        start = int(time * RATE)
        if 0 <= start < n:
            out[start:start + length] += 10 ** (-fade * number / 20) * shape * rng.standard_normal(length)
    return band(out, low, high)[:n]


def smooth(steps: Wave, width: float = 0.004) -> Wave:
    """``steps`` averaged over ``width`` s, so that gates do not click."""
    size = max(int(width * RATE), 1)
    total = np.cumsum(np.concatenate([np.full(size, steps[0]), steps]))
    return (total[size:] - total[:-size]) / size


def through(wave: Wave, mask: Callable[[Wave, Wave], Wave]) -> Wave:
    """``wave`` under a filter that moves in time: ``mask(place [frames, 1] in 0 .. 1, Hz [1, bins])`` gives gains."""
    size, hop = 512, 256
    padded = np.pad(wave, (hop, size + hop))
    frames = (len(padded) - size) // hop + 1
    window = np.sin(np.pi * (np.arange(size) + 0.5) / size)  # squared it sums to one over half-overlapping frames
    rows = np.stack([padded[i * hop:i * hop + size] for i in range(frames)]) * window
    place, frequency = np.linspace(0, 1, frames)[:, None], np.fft.rfftfreq(size, 1 / RATE)[None]
    rows = np.fft.irfft(np.fft.rfft(rows) * mask(place, frequency), size) * window
    out = np.zeros(len(padded))
    for i, row in enumerate(rows):
        out[i * hop:i * hop + size] += row
    return out[hop:hop + len(wave)]


def unit(wave: Wave) -> Wave:
    """``wave`` at a root mean square of one."""
    return wave / (np.sqrt(np.mean(wave**2)) + 1e-9)


def record(rng: Random, sound: Wave, snr: tuple[float, float]) -> NDArray[np.float32]:
    """``sound`` as a microphone might have it: coloured, over background noise, at any level.

    Args:
        rng: the only source of chance.
        sound: the clean sound.
        snr: range of the ratio of sound to background in decibels.
    """
    colour = rng.uniform(-0.5, 0.5)
    sound = unit(shaped(sound, lambda hz: (np.maximum(hz, 50.0) / 1000) ** colour))
    mixed = sound + noise(rng, len(sound), rng.uniform(0, 2)) * 10 ** (-rng.uniform(*snr) / 20)
    level = 10 ** (rng.uniform(-30, -3) / 20)
    return (level * mixed / (np.abs(mixed).max() + 1e-9)).astype(np.float32)
