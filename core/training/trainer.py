"""The Trainer of a run, with what it writes and shows on the way."""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar

from core.config import OUR_ARGUMENTS, make_loggers
from core.errors import Interrupted, ScionError, listed, nearest
from core.training.checkpoints import AtomicCheckpointIO, RunCheckpoints
from core.training.finetuner import FineTuner

log = logging.getLogger("scion")


class History(Checkpoint):
    """What was logged, epoch by epoch, and the time spent; both go on after a resume.

    It is a ``Checkpoint`` so that Lightning runs it after the module's own end of the epoch.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.before = 0.0
        self.started = time.perf_counter()
        self._validated = False

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = {key: round(float(value), 6) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
        if not self._validated:  # Lightning keeps those of an earlier epoch
            row = {key: value for key, value in row.items() if not key.startswith("validation/")}
        self._validated = False
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **row, "lr": rate})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.before = list(state["rows"]), state["seconds"]
        self.started = time.perf_counter()


class Progress(TQDMProgressBar):
    """Lightning's bar without the logger's version in it."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}


class EpochLines(Checkpoint):
    """One line an epoch: in the log, and on the screen where no moving bar can be seen.

    Args:
        shown: whether the line goes to the screen.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        main = pl_module.task.selects[0] if isinstance(pl_module, FineTuner) else ""
        shown = {key: float(value) for key, value in trainer.callback_metrics.items()
                 if key in ("train/loss", "validation/loss") or key.endswith(f"/{main}")}
        text = "  ".join(f"{key} {value:.3f}" for key, value in sorted(shown.items()))
        line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}"
        log.info(line)
        if self.shown and trainer.is_global_zero:
            print(line, flush=True)


def make_checkpoints(config: dict[str, Any], folder: Path, selects: tuple[str, str]) -> RunCheckpoints:
    arguments = config["trainer"]
    metric, mode = selects
    best = (f"validation/{metric}", mode) if config["select"] == "best" else None
    writes = arguments.get("enable_checkpointing") is not False and not arguments.get("fast_dev_run")
    return RunCheckpoints(folder, arguments.get("checkpoint_every_n_steps"), best, last=writes)


def make_trainer(config: dict[str, Any], home: Path, callbacks: list[L.Callback], stamp: dict[str, Any],
                 domain: str = "") -> L.Trainer:
    """The Trainer of a run, or of a stage.

    Args:
        config: of the run or the stage.
        home: its folder.
        callbacks: in order; what the screen shows is added behind them.
        stamp: what checkpoints say of the run.
        domain: where bare names of loggers are looked up.
    """
    loggers = make_loggers(config, domain, home)
    arguments = {key: value for key, value in config["trainer"].items()
                 if key not in (*OUR_ARGUMENTS, "enable_checkpointing")}
    shows = arguments.pop("enable_progress_bar", None) is not False
    has_bar = shows and sys.stderr.isatty()
    callbacks = [*callbacks, EpochLines(shows and not has_bar), *([Progress(refresh_rate=5)] if has_bar else [])]
    arguments = {"devices": 1, "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False,
                 **arguments}
    try:
        return L.Trainer(callbacks=callbacks, logger=loggers, plugins=[AtomicCheckpointIO(stamp)],
                         default_root_dir=home, enable_progress_bar=has_bar,
                         enable_checkpointing=True, **arguments)
    except Exception as error:  # Lightning refuses bad values by exceptions of many kinds
        raise ScionError(f"trainer: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def call_trainer(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
    """What ``work`` with a Trainer returns. Lightning makes an exit of the process of a signal, and of its complaints
    exceptions of its own."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        return work()
    except SIGTERMException:
        raise Interrupted(signal.SIGTERM) from None
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise Interrupted.last() from None
    except MisconfigurationException as error:
        raise ScionError(f"trainer: {str(error).splitlines()[0]}") from None
    except RuntimeError as error:
        pattern = r"conditioned on metric `(.*?)` which is not available.*following: (.*)"  # EarlyStopping's words
        never = re.search(pattern, str(error), re.DOTALL)
        if never is None:
            raise
        monitor = never.group(1)
        logged = re.findall("`(.*?)`", never.group(2))
        raise ScionError(f"callbacks.monitor: EarlyStopping waits for {monitor!r}, which is never logged"
                         f"{nearest(monitor, logged)}; logged are {listed(sorted(logged), 30)}") from None
