"""The folder of one run: whose it is, what in it is ours, and what this call has made.

A folder may hold other people's files beside a run. Nothing but the files named here is ever written over or taken
away, one by one; a folder goes only where this call has made it, or where it is one of ours and empty.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from core.config import LOGGED, dump
from core.errors import ScionError
from core.files import locked, read_json, write_atomically, write_json

FORMAT = 1
RECORD = "metrics.json"
LOCK = ".lock"
FILES = (RECORD, "config.yaml", "log.txt", "history.json", "data_state.json", "curves.png", "confusion.png",
         "pictures.png", "predictions.png", "examples.md")
"""What a run has at the top of its folder."""
STAGE_FILES = ("done.json",)
"""What a stage has at the top of its own."""
INSIDE = {"adapter": ("adapter.safetensors", "adapter.json"), "checkpoints": ("*.ckpt",),
          "tensorboard": ("events.out.tfevents.*", "hparams.yaml")}
"""The folders of a run or a stage, and what is in them."""
LOGGERS = {"CSVLogger": ("metrics.csv", "hparams.yaml"), "TensorBoardLogger": INSIDE["tensorboard"]}
"""What loggers write below their own folder in `LOGGED`; any other one may write anything there."""
STAGES = "stages"
TRAINED = "trained"
"""The folder with copies of the trained adapters that the configuration names, each in a folder of its own."""

State = Literal["new", "unfinished", "other"]


class RunFolder:
    """One run's folder.

    Args:
        path: the folder; it need not be there.
        config_hash: of the run's configuration.
        is_main: whether this process writes; of several processes the first one does.
    """

    def __init__(self, path: Path, config_hash: str, is_main: bool = True) -> None:
        self.path, self.config_hash, self.is_main = path, config_hash, is_main
        self._made: list[Path] = []

    # ------------------------------------------------------------------------------ looking

    def state(self, overwrite: bool = False) -> State:
        """What the folder holds: nothing of a run (``new``), this run unfinished, or, with ``overwrite``, any run
        (``other``).

        Raises:
            ScionError: it holds another run, this one finished, or files of a run's names that no run has written.
        """
        self._check_places()
        ours = our_files(self.path)
        if not ours:
            return "new"
        there = self._hashes(ours)
        if not there:
            raise ScionError(f"run_dir: {self.path} holds {ours[0].relative_to(self.path)}, and no record of a run; "
                             "choose another folder")
        if overwrite:
            return "other"
        other = [found for found in there if found != self.config_hash]
        if other:
            raise ScionError(f"run_dir: {self.path} holds another run (config {other[0]}, this is {self.config_hash}); "
                             "choose another folder or pass --overwrite")
        if self._record().get("status") == "finished":
            raise ScionError(f"run_dir: {self.path} holds this run, finished; choose another folder or pass "
                             "--overwrite")
        return "unfinished"

    def _check_places(self) -> None:
        """Refuse what stands where a run writes and is not its own: a link would lead out of the folder."""
        folders = [self.path / STAGES, self.path / TRAINED, *_copies(self.path)]
        folders += [home / name for home in homes(self.path) for name in (*INSIDE, LOGGED)]
        wrong = [place for place in folders if place.is_symlink() or (os.path.lexists(place) and not place.is_dir())]
        log = self.path / "log.txt"
        if os.path.lexists(log) and not stat.S_ISREG(os.lstat(log).st_mode):
            wrong.append(log)
        if wrong:
            kind = "a link" if wrong[0].is_symlink() else "a pipe or a file of another kind"
            raise ScionError(f"run_dir: {wrong[0]} is {kind}, and a run writes there; choose another folder")

    def _record(self) -> dict[str, Any]:
        """The content of metrics.json; empty where there is none.

        Raises:
            ScionError: it is damaged, or no record of ours.
        """
        file = self.path / RECORD
        if not file.exists():
            return {}
        record = read_json(file)
        if not is_record(record):
            raise ScionError(f"{file}: no record of a run (no format and config_hash of ours); choose another folder")
        return record

    def _hashes(self, ours: list[Path]) -> list[str]:
        """The configurations that the files of ours name, the record's first."""
        from core.training.checkpoints import stamp_of  # start-up time

        record = self._record()
        found = [record["config_hash"]] if record else []
        for file in ours:
            if LOGGED in file.relative_to(self.path).parts:
                continue
            if file.name == "done.json":
                found.append(str(read_done(file).get("config_hash", "")))
            elif file.suffix == ".ckpt" and not record:  # metrics.json is gone: the checkpoint says whose it is
                found.append(str(stamp_of(file).get("config_hash", "")))
        return list(dict.fromkeys(filter(None, found)))

    def has_checkpoint(self) -> bool:
        """Whether there is something to go on from."""
        return any(file.suffix == ".ckpt" and file.parent.name == "checkpoints" for file in our_files(self.path))

    # ------------------------------------------------------------------------------ writing

    @contextlib.contextmanager
    def opened(self, config: dict[str, Any], overwrite: bool = False) -> Iterator[None]:
        """Hold the folder for this process, with the records of an unfinished run in it.

        What stops the run by a `ScionError` before there is a checkpoint leaves nothing behind that this call has made.

        Raises:
            ScionError: see `state`; another process has the folder, or it cannot be written.
        """
        if not self.is_main:
            yield
            return
        state: State | None = None
        with contextlib.ExitStack() as stack:
            try:
                stack.callback(self._unmake)
                self._make(self.path)
                stack.enter_context(locked(self.path / LOCK, f"run_dir: another process is working in {self.path}; "
                                           "wait for it, or choose another folder"))
                state = self.state(overwrite)
                self._begin(state, config)
            except OSError as error:
                if state == "new":
                    self.clear()
                raise ScionError(f"run_dir: {self.path} cannot be written ({error.strerror or error})") from None
            try:
                yield
            except ScionError as error:
                if state != "unfinished" and not self.has_checkpoint():
                    self.clear()
                else:
                    self.note("failed", str(error))
                raise
            except Exception as error:
                logging.getLogger("scion").error("the run has failed", exc_info=True)
                self.note("failed", f"{type(error).__name__}: {error}")
                raise

    def _begin(self, state: State, config: dict[str, Any]) -> None:
        """Write the records; the one that says whose folder this is comes first."""
        if state == "other":
            self.clear()
        for leftover in unfinished_files(self.path):
            leftover.unlink(missing_ok=True)
        write_json(self.path / RECORD, self._unfinished("running"))
        if state != "unfinished":
            text = dump(config)
            write_atomically(self.path / "config.yaml", lambda file: file.write_text(text, encoding="utf-8"))

    def _unfinished(self, status: str) -> dict[str, Any]:
        return {"format": FORMAT, "status": status, "config_hash": self.config_hash}

    def note(self, status: Literal["failed"], error: str) -> None:
        """Write into the record why the run stopped. Where even that fails, the error is told all the same."""
        with contextlib.suppress(OSError):
            write_json(self.path / RECORD, {**self._unfinished(status), "error": error})

    def clear(self) -> None:
        """Take away what is ours, file by file, and the folders of ours that are empty then."""
        for file in [*our_files(self.path), *unfinished_files(self.path)]:
            file.unlink(missing_ok=True)
        for home in homes(self.path):
            for name in INSIDE:
                _remove_empty(home / name)
            for folder in reversed(_folders_below(home / LOGGED)):
                _remove_empty(folder)
            if home != self.path:
                _remove_empty(home)
        _remove_empty(self.path / STAGES)
        for copy in _copies(self.path):
            _remove_empty(copy)
        _remove_empty(self.path / TRAINED)

    def _make(self, folder: Path) -> None:
        """Make ``folder`` and those above it, and remember which were not there."""
        lacking = [one for one in (folder, *folder.parents) if not one.exists()]
        for one in reversed(lacking):
            one.mkdir(exist_ok=True)
            self._made.append(one)
        if not folder.is_dir():
            raise NotADirectoryError(0, "not a folder", str(folder))

    def _unmake(self) -> None:
        """Take away the folders that this call has made and that are still empty."""
        for folder in reversed(self._made):
            _remove_empty(folder)


# ------------------------------------------------------------------------------------------------- what is ours


def homes(path: Path) -> list[Path]:
    """The folders of a run's stages, and last its own; none behind a link."""
    stages = path / STAGES
    found = sorted(stages.iterdir()) if stages.is_dir() and not stages.is_symlink() else []
    return [*(one for one in found if one.is_dir() and not one.is_symlink()), path]


def our_files(path: Path) -> list[Path]:
    """The files of a run below ``path``, by their names; none behind a link to a folder."""
    found: list[Path] = []
    for home in homes(path):
        names = FILES if home == path else STAGE_FILES
        found += [home / name for name in names if _is_file(home / name)]
        for name, patterns in INSIDE.items():
            found += [file for file in _inside(home / name)
                      if file.name[0] != "." and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)]
        found += _logged_files(home / LOGGED)
    for copy in _copies(path):
        found += [file for file in _inside(copy) if file.name in INSIDE["adapter"]]
    return found


def _copies(path: Path) -> list[Path]:
    """The copies of trained adapters in a run's folder; none behind a link."""
    home = path / TRAINED
    if home.is_symlink() or not home.is_dir():
        return []
    return sorted(one for one in home.iterdir() if one.is_dir() or one.is_symlink())


def _logged_files(logged: Path) -> list[Path]:
    """What loggers have written, each into a folder of its own."""
    found: list[Path] = []
    for folder in _folders_below(logged)[1:]:
        logger = folder.relative_to(logged).parts[0]
        patterns = LOGGERS.get(logger, ("*",))
        found += [file for file in _inside(folder) if any(fnmatch.fnmatch(file.name, name) for name in patterns)]
    return found


def _folders_below(folder: Path) -> list[Path]:
    """A folder and all in it, each before what it holds; none behind a link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    found = [folder]
    for inner in sorted(folder.iterdir()):
        found += _folders_below(inner)
    return found


def unfinished_files(path: Path) -> list[Path]:
    """Files of a run that were being written when it was stopped (see `core.files.write_atomically`)."""
    found: list[Path] = []
    for home in homes(path):
        wanted = {home: FILES if home == path else STAGE_FILES, **{home / name: INSIDE[name] for name in INSIDE}}
        for folder, names in wanted.items():
            found += [file for file in _inside(folder)
                      if any(fnmatch.fnmatch(file.name, f".{name}.*") for name in names)]
    for copy in _copies(path):
        found += [file for file in _inside(copy)
                  if any(fnmatch.fnmatch(file.name, f".{name}.*") for name in INSIDE["adapter"])]
    return found


def _is_file(path: Path) -> bool:
    """Also a link that leads nowhere, which we would write over."""
    return os.path.lexists(path) and not path.is_dir()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _inside(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if _is_file(file))


def is_record(record: Any) -> bool:
    """Whether the content of a metrics.json is one of ours: other programs write files of that name."""
    return (isinstance(record, dict) and isinstance(record.get("format"), int) and isinstance(record.get("status"), str)
            and isinstance(record.get("config_hash"), str))


def finished_record(path: Path, config_hash: str) -> dict[str, Any] | None:
    """The metrics.json of a finished run with this configuration, or None.

    Raises:
        ScionError: the file is damaged, or no record of ours.
    """
    record = RunFolder(path, config_hash)._record()
    return record if record.get("status") == "finished" and record["config_hash"] == config_hash else None


def read_done(file: Path) -> dict[str, Any]:
    """What a finished stage has left for the run's record.

    Raises:
        ScionError: the file is damaged.
    """
    record = read_json(file)
    kinds = {"rows": list, "parameters": dict, "metrics": dict, "seconds": (int, float)}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        raise ScionError(f"{file}: damaged; delete it, and the stage is trained again")
    return record


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter's two files, each whole or not at all, the record last."""
    target.mkdir(exist_ok=True)
    for name in INSIDE["adapter"]:
        write_atomically(target / name, lambda file, name=name: shutil.copyfile(source / name, file))
