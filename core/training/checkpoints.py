"""A run's checkpoints: written whole, stamped with the run they belong to, checked before anything is read from them.

``last.ckpt`` is where an interrupted run goes on; ``best.ckpt`` holds the weights of the best epoch so far, for
``select: best``. Which epoch that was is kept in ``last.ckpt``: ``best`` is written first, so that a run killed between
the two does the epoch again and comes to the same choice.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from core.errors import ScionError
from core.files import check_regular, write_atomically
from core.method import methods_on

STAMP = "scion"
"""Key of the stamp in a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are either whole or not there.

    Args:
        stamp: what each of them says of its run (see `read_checkpoint`).
    """

    def __init__(self, stamp: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.stamp = stamp or {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write ``checkpoint`` with the stamp.

        Raises:
            ScionError: it cannot be written; the file that was there before is still there.
        """
        for callback, state in checkpoint.get("callbacks", {}).items():
            _check_plain(state, callback)
        stamped = {**checkpoint, STAMP: self.stamp}
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: torch.save(stamped, temporary))
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError where the disk is full
            kept = ""
            if Path(path).exists():
                kept = "; the one before is kept, and the same command goes on from it"
            raise ScionError(f"{path}: the checkpoint cannot be written ({_why(error)}){kept}") from None


PLAIN = (torch.Tensor, bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
"""What a checkpoint holds beside lists and mappings: `read_checkpoint` makes no other objects."""


def _check_plain(state: Any, callback: str) -> None:
    """Refuse a callback's state that could be written and not read again."""
    if isinstance(state, dict):
        for key, value in state.items():
            _check_plain(key, callback)
            _check_plain(value, callback)
    elif isinstance(state, (list, tuple, set)):
        for value in state:
            _check_plain(value, callback)
    elif type(state) not in PLAIN and not isinstance(state, torch.Tensor):
        name = callback.partition("{")[0]
        raise ScionError(f"callbacks: the state of {name} holds an {type(state).__name__}, which a checkpoint cannot "
                         "bring back; its state_dict() may give tensors, numbers, text, lists and mappings of them")


def _why(error: Exception) -> str:
    """The reason in one short line: torch adds a trace of its C++ functions."""
    if "inline_container" in str(error):  # that is how torch's writer says that the disk took less than it was given
        return "no space left on the disk"
    return getattr(error, "strerror", None) or str(error).splitlines()[0][:200]


def read_checkpoint(path: Path, stamp: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a checkpoint of ours, on the CPU.

    Args:
        path: the file.
        stamp: what it has to say of its run. One without any stamp, of an earlier version, is taken as it is.

    Raises:
        ScionError: names the file that is damaged (each record in it has a checksum), or belongs to another
            configuration or other data.
    """
    damaged = f"{path}: the checkpoint is damaged; delete it to begin again from the start, or pass --overwrite"
    try:
        # torch.load does not compare the checksums, and would take damaged numbers for good ones.
        with zipfile.ZipFile(check_regular(path)) as packed:
            if packed.testzip() is not None:
                raise ScionError(damaged)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ScionError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ScionError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # torch.load, zipfile and zlib tell of damage in a dozen ways
        raise ScionError(damaged) from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ScionError(damaged)
    found = checkpoint.get(STAMP)
    if stamp and isinstance(found, dict):
        _compare(path, found, stamp)
    return checkpoint


def _compare(path: Path, found: dict[str, Any], stamp: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another configuration or of other data."""
    config_hash = found.get("config_hash")
    if config_hash != stamp["config_hash"] or found.get("stage") != stamp["stage"]:
        raise ScionError(f"{path}: the checkpoint belongs to another configuration ({config_hash}, this "
                         f"is {stamp['config_hash']}); choose another folder or pass --overwrite")
    if found.get("listing") != stamp["listing"]:
        raise ScionError(f"{path}: the run began with other data than there are now (files were added, removed or "
                         "changed); put them back, or start again with --overwrite")


def stamp_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run; empty where it says nothing.

    Raises:
        ScionError: it is damaged.
    """
    found = read_checkpoint(path).get(STAMP)
    return found if isinstance(found, dict) else {}


class RunCheckpoints(Checkpoint):
    """Writes ``last.ckpt`` at the end of each epoch and, where asked for, every so many steps, and ``best.ckpt``.

    It has to come after the callbacks whose state of the same moment a checkpoint should hold.

    Args:
        folder: where the checkpoints go.
        every_n_steps: optimizer steps between two checkpoints within an epoch; None is only at its end.
        best: metric and ``min`` or ``max`` by which the best epoch is chosen; None keeps only the last.
        last: whether ``last.ckpt`` is written.
    """

    def __init__(self, folder: Path, every_n_steps: int | None = None, best: tuple[str, str] | None = None,
                 last: bool = True) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.best = best
        self.writes_last = last
        self.best_epoch: int | None = None
        self.best_score: float | None = None
        self.validated: int | None = None
        """The epoch of the last validation."""
        self._steps = 0

    @property
    def last_file(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best_file(self) -> Path:
        return self.folder / "best.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        before = self._steps
        self._steps = trainer.global_step
        if not self.writes_last or not self.every_n_steps:
            return
        if self._steps % self.every_n_steps:
            return
        has_stepped = before != self._steps  # gradients that are still adding up are in no checkpoint
        if has_stepped and not self._is_followed_by_more(trainer):
            trainer.save_checkpoint(self.last_file)

    @staticmethod
    def _is_followed_by_more(trainer: L.Trainer) -> bool:
        """Whether the epoch's end or a validation comes next: a run that went on from here would leave that out."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.is_last_batch or loop._is_training_done or trainer.should_stop:
            return True
        # Lightning's private question; its answer covers validation by batches, by time and at the end.
        fetcher: Any = trainer.fit_loop._data_fetcher
        return loop._should_check_val_fx(fetcher)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validated = trainer.current_epoch

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The best first: see the top of this file.
        if self.best is not None:
            self._keep_best(trainer, *self.best)
        if self.writes_last:
            trainer.save_checkpoint(self.last_file)

    def _keep_best(self, trainer: L.Trainer, metric: str, mode: str) -> None:
        """Write ``best.ckpt`` where this epoch's ``metric`` is better than that of every epoch before."""
        # The Trainer keeps the metrics of the last validation, also through epochs without one.
        if metric not in trainer.callback_metrics or self.validated != trainer.current_epoch:
            return
        # Until its schedule has ended, a method is not yet the one that the run is about.
        if not all(method.settled for method in methods_on(trainer.lightning_module)):
            return
        score = float(trainer.callback_metrics[metric])
        if self.best_score is not None and not _is_better(score, self.best_score, mode):
            return
        self.best_epoch = trainer.current_epoch
        self.best_score = score
        trainer.save_checkpoint(self.best_file, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best_epoch": self.best_epoch, "best_score": self.best_score, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_epoch = state_dict["best_epoch"]
        self.best_score = state_dict["best_score"]
        self.validated = state_dict.get("validated")  # missing in checkpoints of earlier versions


def _is_better(score: float, before: float, mode: str) -> bool:
    # Strictly: of equal epochs the first is the best, and NaN is never better than a number.
    return score > before if mode == "max" else score < before
