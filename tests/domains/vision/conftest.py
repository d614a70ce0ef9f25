"""Pictures to read, and the real photographs where they are at hand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image

DATA = Path(os.environ.get("SCION_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's photographs, train/<class>/*.jpg and test/<class>/*.jpg."""
    archive = DATA / "cifar10_images" / "cifar10_images.zip"
    if not archive.is_file():
        pytest.skip("the CIFAR-10 photographs are not at hand (SCION_DATA)")
    folder = tmp_path_factory.mktemp("cifar10")
    with ZipFile(archive) as content:
        content.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is empty, for this test alone."""
    monkeypatch.setenv("SCION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noise(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Coloured noise in mode RGB, smooth enough to survive JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_picture(file: Path, width: int = 40, height: int = 30, seed: int = 0, mode: str = "RGB", **options: Any
                  ) -> Path:
    """Noise in a file of the format that its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(width, height, seed).convert(mode).save(file, **options)
    return file


SIZES = {"train800": 8, "val200": 4, "test": 6}


def write_task(root: Path, task: str, classes: int, sizes: dict[str, int] | None = None, suffix: str = "png") -> Path:
    """A small task in VTAB-1k's layout: its lists and pictures, whose labels go round the classes."""
    sizes = sizes or SIZES
    lines: dict[str, list[str]] = {}
    for number, (name, size) in enumerate(sizes.items()):
        for index in range(size):
            file = f"images/{name}/{index}.{suffix}"
            write_picture(root / task / file, 20 + index % 5, 16, 1000 * number + index)
            lines.setdefault(name, []).append(f"{file} {index % classes}")
    lines["train800val200"] = [*lines["train800"], *lines["val200"]]
    for name, found in lines.items():
        (root / task / f"{name}.txt").write_text("\n".join(found) + "\n")
    return root


@pytest.fixture
def vtab(tmp_path: Path) -> Callable[..., Path]:
    """``vtab("cifar", 10)`` writes a task and returns the root."""
    return lambda task="cifar", classes=4, **options: write_task(tmp_path / "vtab", task, classes, **options)
