"""Sounds to read, and the real recordings where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

DATA = Path(os.environ.get("SCION_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(scope="session")
def esc10() -> Path:
    folder = DATA / "esc10"
    if not folder.is_dir():
        pytest.skip("the ESC-10 recordings are not at hand (SCION_DATA)")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One cache for all tests, so that the real recordings are decoded once."""
    return str(tmp_path_factory.mktemp("cache"))


def write_sound(file: Path, seconds: float = 0.1, rate: int = 16_000, channels: int = 1, seed: int = 0) -> Path:
    """Noise in a file of the format that its name says."""
    import soundfile

    file.parent.mkdir(parents=True, exist_ok=True)
    sound = 0.1 * np.random.default_rng(seed).standard_normal((round(rate * seconds), channels))
    soundfile.write(file, sound.astype(np.float32), rate)
    return file


def write_tree(root: Path, folds: int = 5, targets: tuple[int, ...] = (3, 17, 40), takes: int = 2,
               rate: int = 16_000, suffix: str = "wav") -> Path:
    """A small benchmark in ESC-50's layout with clips of 0.3 s; target 40 is of the ESC-10 subset."""
    import soundfile

    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rng = np.random.default_rng(0)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in range(1, folds + 1):
        for target in targets:
            for take in "ABCDEFGH"[:takes]:
                name = f"{fold}-{100 + target}-{take}-{target}.{suffix}"
                sound = 0.1 * rng.standard_normal(rate * 3 // 10)
                soundfile.write(root / "audio" / name, sound.astype(np.float32), rate)
                lines.append(f"{name},{fold},{target},class_{target},{target == 40},{100 + target},{take}")
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    return lambda **options: write_tree(tmp_path / "tree", **options)
