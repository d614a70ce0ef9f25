"""Pretrain the nano AST: ``python -m domains.audio.make_nano [FOLDER] [--threads 2]``, under half an hour on two cores.

It learns sixty-four synthetic classes, every pairing of eight sources with eight gestures (a hiss that trembles, a reed
that climbs in steps, ...), with one head for the source and one for the gesture. None of the classes is one of the
mini's (``mini.py``): there a pitch glides or wails evenly, one note dies or grows, a rhythm changes its tempo; here
nothing does. Two lengths of clip take turns, 1.1 s and 5.1 s, so that the position table serves both the mini and the
five seconds of ESC-50.

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
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from core.random_state import seed_of
from domains.audio import synth
from domains.audio.backbones import NANO, _random, grid_of, resize_positions
from domains.audio.features import BINS, RATE, filterbank, normalise, samples, specaugment
from domains.audio.synth import Random, Wave, loguniform, seconds

LENGTHS = {112: (12_000, 32), 512: (1_200, 8)}
"""Frames of a clip: (clips made, batch)."""
STEPS, LONG_EVERY = 3_600, 6
"""Optimizer steps, and which of them take long clips."""
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 1e-3, 100, 0.05

# ---- sources: what sounds. Each takes a path of pitch in octaves [samples], which noises follow with their band.


def _noise_at(rng: Random, path: Wave, low: float, high: float, width: float) -> Wave:
    """Noise in a band of ``width`` octaves whose centre, drawn between ``low`` and ``high`` Hz, follows ``path``."""
    centre = math.log2(loguniform(rng, low, high))

    def mask(place: Wave, hz: Wave) -> Wave:
        moved = centre + np.interp(place, np.linspace(0, 1, len(path)), path)
        return np.exp(-0.5 * ((np.log2(np.maximum(hz, 20.0)) - moved) / (width / 2)) ** 2)

    return synth.through(synth.noise(rng, len(path), 1.0), mask)


def _hiss(rng: Random, path: Wave) -> Wave:
    return _noise_at(rng, path, 1500, 4500, rng.uniform(1.5, 3))


def _rumble(rng: Random, path: Wave) -> Wave:
    return _noise_at(rng, path, 80, 400, rng.uniform(1.0, 2))


def _whisper(rng: Random, path: Wave) -> Wave:
    return _noise_at(rng, path, 400, 3000, rng.uniform(0.15, 0.4))


def _pure(rng: Random, path: Wave) -> Wave:
    return synth.tones(rng, loguniform(rng, 200, 3000) * 2**path, [(1.0, 1.0)])


def _reed(rng: Random, path: Wave) -> Wave:
    partials = synth.harmonics(rng, int(rng.integers(3, 8)), rng.uniform(0.5, 1.2), odd=True)
    return synth.tones(rng, loguniform(rng, 120, 800) * 2**path, partials)


def _string(rng: Random, path: Wave) -> Wave:
    partials = synth.harmonics(rng, int(rng.integers(6, 16)), rng.uniform(0.5, 1.5))
    return synth.tones(rng, loguniform(rng, 100, 700) * 2**path, partials)


def _metal(rng: Random, path: Wave) -> Wave:
    partials = [(float(ratio), float(rng.uniform(0.3, 1))) for ratio in np.cumsum(rng.uniform(0.3, 1.4, 8)) + 0.5]
    return synth.tones(rng, loguniform(rng, 200, 900) * 2**path, partials)


def _motor(rng: Random, path: Wave) -> Wave:
    """Rough pulses at 15 to 60 a second through one resonance."""
    rate = loguniform(rng, 15, 60) * 2 ** (path / 2)
    turns = np.cumsum(rate * (1 + 0.3 * synth.noise(rng, len(path), 2.0))) / RATE
    pulses = np.diff(np.floor(turns), prepend=0.0) * rng.uniform(0.6, 1, len(path))
    low = loguniform(rng, 80, 800)
    return synth.band(pulses + 0.02 * rng.standard_normal(len(path)), low, low * rng.uniform(2, 8))


SOURCES = {"hiss": _hiss, "rumble": _rumble, "whisper": _whisper, "pure": _pure, "reed": _reed, "string": _string,
           "metal": _metal, "motor": _motor}

# ---- gestures: how it moves. Each returns the path of pitch and what is done to the finished sound.


def _stairs(rng: Random, n: int, up: bool) -> Wave:
    """Three to six level steps over the clip, all up or all down, 0.2 to 0.6 octaves each."""
    count = int(rng.integers(3, 7))
    edges = np.sort(rng.uniform(0, 1, count - 1))
    edges = 0.6 * edges + 0.4 * np.arange(1, count) / count
    height = np.concatenate([[0.0], np.cumsum(rng.uniform(0.2, 0.6, count - 1))])
    steps = height[np.searchsorted(edges, np.linspace(0, 1, n))]
    return steps - height[-1] / 2 if up else height[-1] / 2 - steps


def _wander(rng: Random, n: int) -> Wave:
    """A pitch that drifts at random, back and forth, and comes back."""
    time = seconds(n)
    return sum((rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.5, 4) * time + rng.uniform()))
                for _ in range(4)), np.zeros(n))


def _tremble(rng: Random, n: int) -> Wave:
    depth, rate = rng.uniform(0.6, 1), loguniform(rng, 3, 14)
    return 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * (rate * seconds(n) + rng.uniform())))


def _gate(rng: Random, n: int) -> Wave:
    """On and off at an even beat."""
    rate, share = loguniform(rng, 2, 8), rng.uniform(0.3, 0.7)
    return synth.smooth(((rate * seconds(n) + rng.uniform()) % 1 < share).astype(float))


def _strikes(rng: Random, n: int) -> Wave:
    """Hits at random moments, none following from the last, each dying away."""
    out = np.zeros(n)
    for _ in range(max(2, rng.poisson(5 * n / RATE))):
        start = int(rng.integers(n))
        tail = rng.uniform(0.3, 1) * np.exp(-np.arange(n - start) / (rng.uniform(0.02, 0.1) * RATE))
        out[start:] = np.maximum(out[start:], tail)
    return out


def _shutter(rng: Random, wave: Wave, opens: bool) -> Wave:
    """A low-pass filter that opens or closes."""
    low, span = math.log2(loguniform(rng, 150, 400)), rng.uniform(2.5, 4.5)

    def mask(place: Wave, hz: Wave) -> Wave:
        cut = low + span * (place if opens else 1 - place)
        return 1 / (1 + np.exp(4 * (np.log2(np.maximum(hz, 20.0)) - cut)))

    return synth.through(wave, mask)


GESTURES = ("steady", "trembling", "gated", "struck", "opening", "closing", "climbing", "wandering")


def perform(rng: Random, source: str, gesture: str, n: int) -> Wave:
    """``n`` samples of ``source`` moved by ``gesture``."""
    path = np.zeros(n)
    if gesture == "climbing":  # stairs in either direction are one class: which way they go is not asked
        path = _stairs(rng, n, up=bool(rng.integers(2)))
    elif gesture == "wandering":
        path = _wander(rng, n)
    wave = SOURCES[source](rng, path)
    if gesture == "trembling":
        wave = wave * _tremble(rng, n)
    elif gesture == "gated":
        wave = wave * _gate(rng, n)
    elif gesture == "struck":
        wave = wave * _strikes(rng, n)
    elif gesture in ("opening", "closing"):
        wave = _shutter(rng, wave + 0.3 * synth.noise(rng, n, 0.5) * wave.std(), gesture == "opening")
    return wave


CLASSES = [f"{source}_{gesture}" for source in SOURCES for gesture in GESTURES]


def clip(target: int, frames: int, *seed: object) -> NDArray[np.float32]:
    """One clip of class ``target``, [samples], a function of ``seed`` alone."""
    rng = np.random.Generator(np.random.PCG64(seed_of("nano", target, frames, *seed)))
    source, gesture = CLASSES[target].split("_")
    whole = samples(frames)
    n = int(whole * rng.uniform(0.5, 1.0))
    sound = np.zeros(whole)
    start = int(rng.integers(0, whole - n + 1))
    sound[start:start + n] = synth.unit(perform(rng, source, gesture, n))
    return synth.record(rng, sound, snr=(-3, 20))


def make(frames: int, count: int, *seed: object) -> tuple[Tensor, Tensor]:
    """``count`` normalised filterbanks (half precision, to save memory) and their targets."""
    targets = torch.arange(count) % len(CLASSES)
    banks = torch.empty(count, frames, BINS, dtype=torch.float16)
    for index, target in enumerate(tqdm(targets.tolist(), f"clips of {frames} frames", mininterval=5, disable=None)):
        banks[index] = normalise(filterbank(torch.from_numpy(clip(target, frames, *seed, index)), frames=frames))
    return banks, targets


class Pretraining(nn.Module):
    """The AST with its two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _random("nano")
        width = self.model.config.hidden_size
        self.source, self.gesture = nn.Linear(width, len(SOURCES)), nn.Linear(width, len(GESTURES))

    def forward(self, banks: Tensor) -> tuple[Tensor, Tensor]:
        """banks [batch, frames, bins] -> logits [batch, sources] and [batch, gestures]"""
        config = self.model.config
        rows, columns = grid_of(config)
        table = resize_positions(self.model.embeddings.position_embeddings, (rows, columns),
                                 (rows, banks.shape[1] // config.time_stride))
        tokens = functional_call(self.model, {"embeddings.position_embeddings": table}, (banks,)).last_hidden_state
        feature = tokens.mean(dim=1)
        return self.source(feature), self.gesture(feature)


def train(seed: int = 0, steps: int = STEPS) -> tuple[Pretraining, dict[str, float]]:
    """The trained network and what it reached on clips that it did not hear."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    data = {frames: make(frames, count, seed, "train") for frames, (count, _) in LENGTHS.items()}
    network = Pretraining().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        (step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
    progress, seen = tqdm(range(steps), "pretraining", mininterval=5, disable=None), []
    for step in progress:
        frames = max(LENGTHS) if step % LONG_EVERY == 0 else min(LENGTHS)
        banks, targets = data[frames]
        pick = torch.randint(len(banks), (LENGTHS[frames][1],), generator=generator)
        batch = torch.stack([specaugment(bank, generator, 8, frames // 16) for bank in banks[pick].float()])
        wanted = targets[pick] // len(GESTURES), targets[pick] % len(GESTURES)
        logits = network(batch)
        loss = nn.functional.cross_entropy(logits[0], wanted[0]) + nn.functional.cross_entropy(logits[1], wanted[1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen = [*seen[-99:], [loss.item(), *_right(logits, wanted)]]
        if step % 50 == 0:
            loss_, source, gesture = np.mean(seen, axis=0)
            progress.set_postfix_str(f"loss {loss_:.3f}, source {source:.2f}, gesture {gesture:.2f}")
    network.eval()
    report: dict[str, float] = {}
    for frames in LENGTHS:
        report[f"source_{frames}"], report[f"gesture_{frames}"] = _accuracy(network, frames, seed)
    return network, report


def _right(logits: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> list[float]:
    return [(part.argmax(1) == goal).float().mean().item() for part, goal in zip(logits, wanted, strict=True)]


@torch.no_grad()
def _accuracy(network: Pretraining, frames: int, seed: int) -> list[float]:
    banks, targets = make(frames, 5 * len(CLASSES), seed, "held out")
    parts = [network(batch) for batch in banks.float().split(32)]
    logits = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    return _right(logits, (targets // len(GESTURES), targets % len(GESTURES)))


def save(network: Pretraining, report: dict[str, float], folder: Path) -> None:
    """config.json, model.safetensors and training.json in ``folder``, each put in place whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        network.model.save_pretrained(scratch)
        (Path(scratch) / "training.json").write_text(json.dumps(report, indent=2) + "\n")
        for file in ("config.json", "model.safetensors", "training.json"):
            (Path(scratch) / file).chmod(0o644)  # safetensors writes for its owner alone
            os.replace(Path(scratch) / file, folder / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=NANO)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    network, reached = train(options.seed, options.steps)
    report = {"seed": options.seed, "steps": options.steps, "threads": options.threads,
              **{key: round(value, 3) for key, value in reached.items()},
              "seconds": round(time.monotonic() - start)}
    save(network, report, options.folder)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
