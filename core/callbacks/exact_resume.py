"""What Lightning's checkpoints leave out, so that a resumed run goes on exactly as the unbroken one would have.

A checkpoint keeps under ``resume``: of each process its random states and what the module adds (the running sums of an
epoch), the place in the data, the last values that were logged, and the methods' own training state. Lightning's loops
(2.6) are put right when training starts again:

- With ``max_steps`` a checkpoint of an epoch's end is taken for one in mid-epoch: the epoch would end once more.
- Behind an epoch's last batch, or the last step of all, validation and the epoch's end would be left out.
- Behind any other batch that validation follows, that would be left out.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loops.evaluation_loop import RestartStage as ValidationRestart
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import RestartStage as BatchRestart
from lightning.pytorch.plugins.precision import DoublePrecision

from core.random_state import part_random_states, random_states, restore_random_states


@runtime_checkable
class KeepsRunningState(Protocol):
    """A LightningModule that adds something up over an epoch."""

    def running_state(self) -> dict[str, Any]:
        """What a checkpoint in mid-epoch must hold of this process."""
        ...

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Undo of `running_state`; an empty one changes nothing."""
        ...


class ExactResume(L.Callback):
    """Keeps in checkpoints what makes a resumed run go on exactly, and restores it.

    One of these belongs to a Trainer, behind all callbacks that draw random numbers when training starts; `ensure` adds
    it. A LightningModule with running sums of its own (`KeepsRunningState`, as `core.FineTuner` is) gets them back as
    well.
    """

    def __init__(self) -> None:
        self.resume: dict[str, Any] | None = None
        """What the checkpoint holds that this run goes on from."""

    @classmethod
    def ensure(cls, trainer: L.Trainer) -> None:
        """Add one to ``trainer`` where it has none."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.append(cls())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.resume = None
        convert_early(trainer, pl_module)  # all methods are attached: they begin with the weights as they are

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.resume = checkpoint.get("resume")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        keep_open(trainer, self.resume)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        resume, self.resume = self.resume, None
        if resume is not None:
            own = restore(trainer, resume)
            if isinstance(pl_module, KeepsRunningState):
                pl_module.load_running_state(own)
        elif isinstance(pl_module, KeepsRunningState):
            go_on_with_loops(trainer)
            part_random_states(trainer.global_rank)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.resume is None:
            return
        # The checkpoint was the last one: Lightning leaves the training out, and with it what stands at its end.
        self.resume = None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, ProgressBar):  # it has shown nothing that it could end
                callback.on_train_end(trainer, pl_module)
        pl_module.on_train_end()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if "optimizer_states" in checkpoint:  # else it holds weights only, from which no run goes on
            own = pl_module.running_state() if isinstance(pl_module, KeepsRunningState) else {}
            save(trainer, checkpoint, own)
            written = zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True)
            checkpoint["optimizer_states"] = [_with_plain_steps(state, optimizer) for state, optimizer in written]


def _with_plain_steps(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with the number of steps of each tensor as a number: as a tensor it takes a record of its
    own in the file, of more bytes than many a bias. torch's optimizers make tensors of them again."""
    if not type(optimizer).__module__.startswith("torch.optim"):
        return state
    short: dict[Any, Any] = {}
    for key, values in state["state"].items():
        short[key] = dict(values)  # the optimizer's own mapping stays as it is
        step = values.get("step")
        if isinstance(step, torch.Tensor):
            short[key]["step"] = step.item()
    return {**state, "state": short}


def gather(value: Any, trainer: L.Trainer) -> list[Any]:
    """``value`` of each process, in their order; all call this together. Tensors must lie on the CPU."""
    if trainer.world_size == 1 or not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(found, value)
    return found


def save(trainer: L.Trainer, checkpoint: dict[str, Any], own: dict[str, Any] | None = None) -> None:
    """Put into ``checkpoint`` what `restore` needs, and what this process adds; all processes call this together."""
    resume = checkpoint.setdefault("resume", {"methods": {}})
    loader: Any = trainer.train_dataloader
    resume["loader"] = loader.state_dict() if hasattr(loader, "state_dict") else None
    resume["processes"] = gather({"random_states": random_states(), **(own or {})}, trainer)
    resume["step"], resume["within_epoch"] = trainer.global_step, _within_epoch(trainer)
    resume["should_stop"] = bool(trainer.should_stop)
    resume["logged"] = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}


def restore(trainer: L.Trainer, resume: dict[str, Any]) -> dict[str, Any]:
    """Go on where `save` was called; gives back what this process had added. To be called when training starts."""
    go_on_with_loops(trainer)
    trainer.should_stop = resume.get("should_stop", False)  # a callback has ended the training with this very epoch
    loader: Any = trainer.train_dataloader
    if resume["loader"] is not None and hasattr(loader, "load_state_dict"):
        loader.load_state_dict(resume["loader"])
    trainer.callback_metrics.update({name: value.to(trainer.strategy.root_device)
                                     for name, value in resume.get("logged", {}).items()})
    processes = resume.get("processes") or [{"random_states": resume["random_states"]}]  # as checkpoints once were
    rank, number = trainer.global_rank, trainer.world_size
    if number == len(processes):
        restore_random_states(processes[rank]["random_states"])
        return processes[rank]
    warnings.warn(f"the checkpoint was written by {len(processes)} processes, and this run has {number}: it goes on, "
                  "but not exactly as the unbroken run would have", stacklevel=2)
    restore_random_states(processes[0]["random_states"])
    part_random_states(rank)
    return {}


def convert_early(trainer: L.Trainer, module: torch.nn.Module) -> None:
    """Make ``module`` double where the Trainer will: it loads a checkpoint first, into tensors that would round it."""
    if isinstance(trainer.precision_plugin, DoublePrecision):
        module.double()


# ------------------------------------------------------------------------------------------------- Lightning's loops


class OneMoreStep(L.Callback):
    """Keeps a run open whose last step is taken while its epoch has not ended: the epoch's end is yet to come."""

    def __init__(self, trainer: L.Trainer) -> None:
        self.max_steps, self.open = trainer.max_steps, True
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps + 1
        trainer.callbacks.append(self)  # type: ignore[attr-defined]

    def close(self, trainer: L.Trainer) -> None:
        """Let ``max_steps`` be what it was."""
        if self.open:
            trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        self.open = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.close(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.close(trainer)


def keep_open(trainer: L.Trainer, resume: dict[str, Any] | None) -> None:
    """To be called when fitting starts, before Lightning finds that ``max_steps`` is reached."""
    if resume is not None and resume.get("within_epoch") and resume["step"] == trainer.max_steps:
        OneMoreStep(trainer)


def _within_epoch(trainer: L.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return progress.processed < progress.started


def go_on_with_loops(trainer: L.Trainer) -> None:
    """Let Lightning's loops, loaded from a checkpoint and reset, go on where the checkpoint was written; a second call
    changes nothing."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    if _all_steps_taken(trainer) and fit._data_fetcher is not None:
        fit._data_fetcher.done = True
    if fit.restarted_on_epoch_end:
        _begin_next_epoch(trainer)
    elif fit.restarted_mid_epoch and epoch.restarted_on_train_batch_end:
        _finish_batch(trainer)


def _begin_next_epoch(trainer: L.Trainer) -> None:
    """The checkpoint was written at an epoch's end, before that was counted as completed."""
    fit = trainer.fit_loop
    fit.epoch_progress.increment_completed()
    _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]  # FitLoop's own setter refuses under max_steps
    fit.reset_restart_stage()
    fit.epoch_loop.reset_restart_stage()


def _finish_batch(trainer: L.Trainer) -> None:
    """The checkpoint was written behind a batch, before what follows it: validation, and the epoch's end."""
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    fetcher = fit._data_fetcher
    assert fetcher is not None
    last = epoch.batch_progress.is_last_batch or _all_steps_taken(trainer)
    if epoch.batch_progress.is_last_batch:  # FitLoop.reset has taken the epoch for completed
        for progress in (fit.epoch_progress.total, fit.epoch_progress.current):
            progress.processed -= 1  # type: ignore[attr-defined]
            progress.completed -= 1
    due = epoch._should_check_val_fx(fetcher)
    if not (last or due):
        return
    epoch.batch_progress.increment_completed()
    epoch._restart_stage = BatchRestart.RESTARTED_ON_LAST
    if due:  # as if it had been interrupted before its first batch
        epoch.val_loop.batch_progress.reset_on_run()
        epoch.val_loop._restart_stage = ValidationRestart.RESTARTED_MID_EVALUATION
        return
    fetcher.done = True
    if not epoch._should_accumulate():
        epoch._batches_that_stepped += 1


def _all_steps_taken(trainer: L.Trainer) -> bool:
    return any(isinstance(one, OneMoreStep) and one.open for one in trainer.callbacks)  # type: ignore[attr-defined]
