"""Copies of the trained adapters that a run's configuration names, kept in its folder: an interrupted run goes on, and
its later stages begin, also when their own folders are gone or hold something else by then."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.config import Point
from core.config.entries import adapters_in, with_adapters
from core.errors import ScionError
from core.method.saving import RECORD
from core.training.run_folder import TRAINED, copy_adapter


def keep_adapters(config: dict[str, Any], run: Path) -> None:
    """Copy the folders of trained adapters that ``config`` names into the folder of its run, where they are not there
    yet.

    Raises:
        ScionError: one cannot be copied.
    """
    for adapter in adapters_in(config):
        target, source = _copy_of(adapter, run), _adapter_folder(adapter)
        if source is None or _is_whole(target):
            continue
        try:
            target.parent.mkdir(exist_ok=True)
            copy_adapter(source, target)
        except OSError as error:
            raise ScionError(f"run_dir: {adapter} cannot be copied to {target} ({error.strerror or error})") from None


def from_copies(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """The configuration with a run's copies in the place of the folders of which it has any."""

    def copy_or_folder(adapter: str) -> str:
        copy = _copy_of(adapter, run)
        return str(copy) if _is_whole(copy) else adapter

    return with_adapters(config, copy_or_folder)


def points_from_copies(points: Sequence[Point], folders: Sequence[Path | None]) -> list[Point]:
    """Runs as they will be built in their folders (`from_copies`); None is a folder that is not chosen yet."""
    found: list[Point] = []
    for point, folder in zip(points, folders, strict=True):
        found.append(point if folder is None else replace(point, config=from_copies(point.config, folder)))
    return found


def _copy_of(adapter: str, run: Path) -> Path:
    """Where a run keeps its copy; by what is written in the configuration, so that it does not depend on where the
    command is called."""
    return run / TRAINED / hashlib.sha256(adapter.encode()).hexdigest()[:12]


def _adapter_folder(adapter: str) -> Path | None:
    """The folder with the two files; None for what is no folder (a checkpoint in a composition)."""
    for folder in (Path(adapter) / "adapter", Path(adapter)):
        if os.path.isfile(folder / RECORD):
            return folder
    return None


def _is_whole(copy: Path) -> bool:
    return os.path.isfile(copy / RECORD)  # the record is written last
