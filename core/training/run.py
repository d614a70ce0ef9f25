"""A run: from a point's configuration to a folder with an adapter, metrics, pictures and a log.

A run continues where it was interrupted, at any step of any stage: everything is built again from the configuration and
its seed, and the last checkpoint brings back weights, optimizer, schedule, random states and the place in the data.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from core.adapters.load import read_adapter, restore
from core.config import Point, make_callbacks
from core.data import DataModule
from core.errors import ScionError, listed
from core.files import write_json
from core.method import PEFTMethod, Scheduled
from core.method.abilities import Staged
from core.method.beside import OUTSIDE
from core.training.assemble import Assembly, assemble, make_methods
from core.training.checkpoints import RunCheckpoints, read_checkpoint
from core.training.finetuner import FineTuner
from core.training.head_files import head_fits, load_outside
from core.training.kept_adapters import from_copies, keep_adapters
from core.training.objective import PreparesOnly
from core.training.run_folder import FORMAT, RunFolder
from core.training.run_log import RunLog
from core.training.run_record import Outcome, count, save_run_adapter, write_record
from core.training.stage_checks import check_stages
from core.training.stages import Stage, StageResult, finished_stages, stage_folder, stages_of
from core.training.trainer import History, call_trainer, make_checkpoints, make_trainer

log = logging.getLogger("scion")


def execute(point: Point, path: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run a point in the folder ``path``, or go on with it there; returns the content of metrics.json.

    Of several processes the first one writes; the others get an empty dictionary.

    Nothing is written before the configuration, the data and the backbone have been found good.

    Raises:
        ScionError: the folder holds a finished or another run and ``overwrite`` is off, it cannot be written, or
            something is wrong with the run.
    """
    folder = RunFolder(Path(path), point.hash, is_main_process())
    goes_on = folder.state(overwrite) == "unfinished"
    with RunLog() as messages:

        def make(config: dict[str, Any]) -> list[PEFTMethod]:
            return make_methods(from_copies(config, folder.path) if goes_on else config, point.domain)

        methods = None if point.config.get("stages") else make(point.config)
        stages = stages_of(point, methods, make)
        results = finished_stages(point, folder, stages) if goes_on or not folder.is_main and not overwrite else []
        first = stages[len(results)].config
        if methods is None:
            if not goes_on:
                check_stages(point, stages, make)
            methods = make(first)
        assembly = assemble(point, first, methods=methods)
        config = {**point.config, "domain": point.domain, "run_dir": str(path)}
        with folder.opened(config, overwrite):
            if folder.is_main:
                messages.write_to(folder.path / "log.txt")
            if goes_on:
                log.info("going on with the run in %s", folder.path)
            if folder.is_main:
                keep_adapters(point.config, folder.path)
            return _run_stages(point, folder, stages, results, assembly)


def is_main_process() -> bool:
    """Whether this is the only or the first of the processes of a run; known from the environment that started it."""
    from lightning.fabric.utilities.rank_zero import _get_rank

    return not _get_rank()


def _run_stages(point: Point, folder: RunFolder, stages: list[Stage], results: list[StageResult], assembly: Assembly
                ) -> dict[str, Any]:
    """Fit the stages that have no result yet, the first of them with ``assembly``, and write the run's record."""
    outcome: Outcome | None = None
    for stage in stages[len(results):]:
        is_last = stage is stages[-1]
        if outcome is not None:
            methods = make_methods(from_copies(stage.config, folder.path), point.domain)
            assembly = assemble(point, stage.config, methods=methods)
        outcome = _fit(point, stage, folder, assembly, is_last)
        metrics: dict[str, Any] = outcome.metrics
        result = StageResult(outcome.rows, outcome.parameters, metrics, outcome.seconds)
        if not is_last and folder.is_main:
            write_json(stage_folder(folder, stage) / "done.json", {"config_hash": point.hash, **vars(result)})
        results.append(result)
    assert outcome is not None
    return write_record(point, folder, stages, results, outcome) if folder.is_main else {}


def _fit(point: Point, stage: Stage, folder: RunFolder, assembly: Assembly, is_last: bool) -> Outcome:
    """Train one stage, from its start or its last checkpoint, and test it where it is the last and there is a test."""
    tuner, data = assembly.tuner, assembly.data
    takes_best = stage.config["select"] == "best"
    if takes_best and data.validation_set is None:
        raise ScionError("select: best chooses by validation, and these data have no validation set; take 'last'")
    if stage.name:
        log.info("stage %s", stage.name)
    home = stage_folder(folder, stage)
    history = History()
    stamp = {"format": FORMAT, "config_hash": point.hash, "stage": stage.name, "listing": _listing(data)}
    checkpoints = make_checkpoints(stage.config, home / "checkpoints", tuner.task.selects)

    tuner.objective = stage.objective
    # By hand and not by the Trainer: what an earlier stage left comes below this one's methods.
    methods = _attach(stage, folder, tuner, assembly.methods)
    callbacks = make_callbacks(stage.config, point.domain, data.validation_set is not None)
    if stage.objective == "none":
        callbacks.append(PreparesOnly())
    trainer = make_trainer(stage.config, home, [*methods, *callbacks, history, checkpoints], stamp, point.domain)
    _train(trainer, assembly, checkpoints, stamp, makes_steps=stage.objective != "none")
    if takes_best:
        _take_best(tuner, checkpoints, stamp)
    metrics = {"validation": _validation(history.rows, checkpoints.best_epoch), "test": {}}
    if is_last and data.test_sets:
        metrics["test"] = _test(trainer, assembly)
    parameters = count(tuner)
    own = {method.name for method in assembly.methods}  # what an earlier stage left in the forward stays as it is
    _save(stage, [method for method in methods if method.name in own], tuner, folder, trainer)
    tables = tuner.tables if is_last else {}
    return Outcome(tuner, data, history.rows, parameters, metrics, history.seconds, checkpoints.best_epoch, tables)


def _test(trainer: L.Trainer, assembly: Assembly) -> dict[str, float]:
    found = call_trainer(trainer, lambda: trainer.test(assembly.tuner, datamodule=assembly.data, verbose=False))
    return _split(found[0] if found else {}, "test")


def _save(stage: Stage, methods: list[PEFTMethod], tuner: FineTuner, folder: RunFolder, trainer: L.Trainer) -> None:
    """Carry methods on into their next stage, and write the adapter."""
    for method in methods:
        if isinstance(method, Staged) and stage.own_stage in method.stages:
            method.advance(tuner)
    if folder.is_main:
        save_run_adapter(tuner, stage_folder(folder, stage) / "adapter")
    trainer.strategy.barrier("the adapter is written")  # the other processes read it in the next stage


def _attach(stage: Stage, folder: RunFolder, tuner: FineTuner, methods: list[PEFTMethod]) -> list[PEFTMethod]:
    """Attach what an earlier stage left and this one's methods, and fit the head to them; returns all methods."""
    before = folder.path / "stages" / stage.start / "adapter" if stage.start is not None else None
    if before is not None:
        methods = _begin_with(before, stage, tuner, methods)
    for method in methods:
        method.attach(tuner.backbone)
    tuner.fit_head()
    if before is not None and "head" in stage.carry:
        tensors = read_adapter(before)[1]
        if stage.asks_for_head or head_fits(tuner, tensors):
            load_outside(tuner, tensors, str(before))
        else:
            log.info("stage %s: a new head, for that of %s has other shapes", stage.name, stage.start)
    return methods


def _listing(data: DataModule) -> str:
    """What the data are, as a short hash."""
    return getattr(data, "listing", "")


def _train(trainer: L.Trainer, assembly: Assembly, checkpoints: RunCheckpoints, stamp: dict[str, Any],
           makes_steps: bool = True) -> None:
    """Fit, from the last checkpoint where there is one."""
    last = checkpoints.last_file if checkpoints.last_file.is_file() else None
    if last is not None:
        read_checkpoint(last, stamp)
    call_trainer(trainer, lambda: trainer.fit(assembly.tuner, datamodule=assembly.data, ckpt_path=last,
                                              weights_only=True))
    if makes_steps and not trainer.fast_dev_run and not trainer.global_step:  # type: ignore[attr-defined]
        raise ScionError("trainer: not one step was made; check max_epochs, max_steps, max_time, limit_train_batches "
                         "and the size of the data")


def _take_best(tuner: FineTuner, checkpoints: RunCheckpoints, stamp: dict[str, Any]) -> None:
    if checkpoints.best_epoch is None:
        rising = [method.name for method in tuner.methods if isinstance(method, Scheduled) and method.settles_late]
        behind = f" once {listed(rising)} had reached the end of its schedule" if rising else ""
        raise ScionError(f"select: best, but no epoch was validated{behind}; validate, or take 'last'")
    tuner.load_state_dict(read_checkpoint(checkpoints.best_file, stamp)["state_dict"])


def _validation(rows: list[dict[str, float]], best_epoch: int | None) -> dict[str, float]:
    """The validation metrics of the epoch that was chosen; without a choice the last ones."""
    measured = [row for row in rows if any(key.startswith("validation/") for key in row)]
    if best_epoch is not None:
        measured = [row for row in measured if row["epoch"] == best_epoch]
    return _split(measured[-1] if measured else {}, "validation")


def _split(metrics: Any, split: str) -> dict[str, float]:
    """The metrics of one split, by their names without it."""
    start = f"{split}/"
    return {key.removeprefix(start): float(value) for key, value in metrics.items() if key.startswith(start)}


def _begin_with(adapter: Path, stage: Stage, tuner: FineTuner, methods: list[PEFTMethod]) -> list[PEFTMethod]:
    """Attach what an earlier stage left. A method that this stage lists by the same name goes on training; others stay
    in the forward, frozen."""
    if "weights" not in stage.carry:
        return methods
    record, tensors = read_adapter(adapter)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    here = {method.name: method for method in methods}
    for spec in record["methods"]:
        if spec["name"] in here:
            spec["config"]["trainable"] = here[spec["name"]].is_trained
    earlier = restore(record, own, tuner.backbone, where=str(adapter))
    for method in earlier:
        if method.name not in here:
            method.freeze()
    kept = {method.name: method for method in earlier}
    return [*(method for method in earlier if method.name not in here),
            *(kept.get(method.name, method) for method in methods)]
