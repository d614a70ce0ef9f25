"""One run, or all runs of ``over``: where they go, what is printed, and what happens when one of them fails."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch

from core import report
from core.config import Point
from core.errors import Interrupted, ScionError, bad_input, one_line
from core.files import locked, read_json
from core.training.run import execute, is_main_process
from core.training.run_folder import LOCK, finished_record

FOLDER_OF_PROCESSES = "SCION_RUN_DIR"
"""Environment variable by which the first of several processes tells the others its folder."""


def run(points: list[Point], run_dir: str | None = None, overwrite: bool = False) -> int:
    """Run one point, or all points of ``over``, and print what came out.

    Returns:
        The exit code: 0, or 2 where a point of several has failed.

    Raises:
        ScionError: the one run has failed.
        Interrupted: by a signal; its text says how to go on.
    """
    first = points[0]
    is_table = _is_table(points)
    name = "over" if is_table else first.name
    folder = _folder(first, run_dir, name)
    try:
        if is_table:
            return _table(points, folder, overwrite)
        return _single(first, folder, overwrite)
    except (KeyboardInterrupt, Exception) as error:
        stop = Interrupted.behind(error)  # a signal may come out as the error of whatever it interrupted
        if stop is None:
            raise
        raise Interrupted.after(stop, _how_to_go_on(folder)) from None


def folders_of(points: list[Point], run_dir: str | None) -> list[Path | None]:
    """The folders that runs are told to use, in their order; None where one will be chosen."""
    first = points[0]
    given = run_dir or first.config.get("run_dir")
    if not given:
        return [None for _ in points]
    if _is_table(points):
        return [Path(given) / point.name for point in points]
    return [Path(given)]


def _is_table(points: list[Point]) -> bool:
    return len(points) > 1 or bool(points[0].axes)


def _how_to_go_on(folder: Path) -> str:
    if not folder.exists():
        return "nothing was begun"
    return f"the same command with --run_dir {folder} (and without --overwrite) goes on from the last checkpoint"


def _folder(point: Point, run_dir: str | None, name: str) -> Path:
    """The folder of this command, the same in all of its processes."""
    given = run_dir or point.config.get("run_dir")
    if given:
        return Path(given)
    if is_main_process():
        file = Path(point.source).stem
        folder = _free(Path("runs") / file / name)
        os.environ[FOLDER_OF_PROCESSES] = str(folder)  # those that a Trainer starts inherit it
        return folder
    if FOLDER_OF_PROCESSES not in os.environ:
        raise ScionError("run_dir: several processes were started from outside, and each would choose a folder of its "
                         "own; give --run_dir")
    return Path(os.environ[FOLDER_OF_PROCESSES])


def _free(path: Path) -> Path:
    """``path`` with the first number behind it that is not taken."""
    number = 0
    while True:
        candidate = path.with_name(f"{path.name}-{number}")
        if not os.path.lexists(candidate):  # `exists` would say no of a link whose target is gone
            return candidate
        number += 1


def _single(point: Point, folder: Path, overwrite: bool) -> int:
    metrics = execute(point, folder, overwrite)
    if is_main_process():
        print(report.summary(metrics))
        print(f"Everything is in {folder}")
    return 0


# ------------------------------------------------------------------------------------------------- several runs


def _table(points: list[Point], folder: Path, overwrite: bool) -> int:
    """Run all points, in every process; the main one also prints the table and writes it into ``folder``."""
    if not is_main_process():
        for point in points:
            _attempt(point, folder / point.name, overwrite)
        return 0
    _check_table(folder)
    is_new = not folder.exists()
    busy = f"run_dir: another process is working on the table in {folder}; wait for it, or choose another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / LOCK, busy):
            results = []
            for number, point in enumerate(points, start=1):
                print(f"[{number}/{len(points)}] {point.name}", flush=True)
                results.append(_attempt(point, folder / point.name, overwrite))
            print(report.table(results, folder))
    except OSError as error:
        place = error.filename or folder
        raise ScionError(f"run_dir: {place} cannot be written ({error.strerror or error})") from None
    finally:
        if is_new:
            _remove_if_empty(folder)
    print(f"Everything is in {folder}")
    return 2 if any(result["error"] for result in results) else 0


def _check_table(folder: Path) -> None:
    """Refuse to write a table over a file of somebody else's."""
    file = folder / "table.json"
    if not file.exists():
        # A table of ours is written table.json first: the others without it are somebody else's.
        found = [name for name in ("table.md", "table.png") if (folder / name).exists()]
        if found:
            raise ScionError(f"run_dir: {folder} holds {found[0]}, and no table of runs; choose another folder")
        return
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("points"), list):
        raise ScionError(f"{file}: no table of runs; choose another folder")


def _attempt(point: Point, path: Path, overwrite: bool) -> dict[str, Any]:
    """Run a point of a table; whatever stops it, the others can still run."""
    metrics, error = None, None
    try:
        if not overwrite:
            metrics = finished_record(path, point.hash)
        metrics = metrics or execute(point, path, overwrite)
    except Exception as problem:
        if Interrupted.received is not None:
            raise
        text: object = problem if isinstance(problem, ScionError) else bad_input(problem)
        if text is None:
            text = f"unexpected {type(problem).__name__}: {problem} (log.txt has the whole of it)"
        error = one_line(text)
        print(f"{point.name}: {error}", flush=True)
    gc.collect()  # a failed attempt's tensors hang in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"axes": point.axes, "metrics": metrics, "error": error}


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass
