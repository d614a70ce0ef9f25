"""A run: from a point's configuration to a folder with an adapter, metrics, pictures and a log.

A run continues where it was interrupted, at any step of any stage: everything is built again from the configuration and
its seed, and the last checkpoint brings back weights, optimizer, schedule, random states and the place in the data.
"""

from __future__ import annotations

import importlib
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint, TQDMProgressBar

from core import report
from core.adapters.load import adapter_bytes, read_adapter, restore, save_adapter, versions
from core.backbone import Backbone
from core.config import OUR_ARGUMENTS, Point, check_optimizer, check_trainer, find_class, make, typed
from core.config.optimizer import OptimizerSettings, ScheduleSettings
from core.data import DataModule, bounded
from core.errors import Interrupted, ScionError, listed
from core.files import write_json
from core.method import Home, PEFTMethod, Scheduled, methods_on
from core.method.beside import OUTSIDE
from core.record import signature
from core.tasks import Task
from core.training import gallery as pictures
from core.training.checkpoints import AtomicCheckpointIO, RunCheckpoints, read_checkpoint
from core.training.finetuner import FineTuner
from core.training.head_files import load_outside, outside
from core.training.recorded_model import model_record
from core.training.run_folder import FORMAT, RunFolder, copy_adapter, read_done
from core.training.run_log import RunLog

log = logging.getLogger("scion")


# ------------------------------------------------------------------------------------------------- building


@dataclass
class Assembly:
    """The objects of one run; the methods are made but not attached."""

    data: DataModule
    backbone: Backbone
    task: Task
    methods: list[PEFTMethod]
    tuner: FineTuner


def assemble(point: Point, config: dict[str, Any] | None = None, read: bool = True) -> Assembly:
    """Build what a configuration asks for. The data is read, for it knows the classes; with ``read=False`` only as far
    as it can name them without its samples.

    An argument of the backbone that is None is taken from the datamodule where that has an attribute of its name.
    """
    config = config or point.config
    seed = config["seed_everything"]
    L.seed_everything(seed, verbose=False)
    # What is wrong is told as early as it can be known: before the backbone's library is imported, before the backbone
    # is built, before the data is read.
    check_trainer(config["trainer"], construct=read)
    if read:
        check_optimizer(config["optimizer"], config["lr_scheduler"])
    methods = make_methods(config, point.domain)
    data: DataModule = make(config["data"], "data", point.domain, DataModule)
    if data.seed is None:
        data.seed = seed
    part = config["model"]["backbone"]
    cls = find_class(part["class_path"], "model.backbone", point.domain)
    outline = cls.outline(str(part["init_args"].get("name", "auto"))) if issubclass(cls, Backbone) else None
    if outline:
        for method in methods:
            method.check_outline(*outline, cls.__name__)
    task: Task = make(config["model"].get("task") or {"class_path": "Classification", "init_args": {}}, "model.task",
                      point.domain, Task)
    classes = data.peek()
    if classes is not None:
        task.check(classes)
    wanted = [name for name, p in signature(cls).parameters.items()
              if p.default is None and part["init_args"].get(name) is None]
    linked = {name: getattr(data, name) for name in wanted if getattr(data, name, None) is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Backbone = make(part, "model.backbone", point.domain, Backbone, **linked)
    for method in methods:
        method.plan_for(backbone)
    if read or classes is None:
        data.setup("fit")
        classes = data.classes
    L.seed_everything(seed, verbose=False)
    tuner = FineTuner(backbone, task, classes, data.multilabel,
                      OptimizerSettings(**typed(OptimizerSettings, config["optimizer"], "optimizer")),
                      ScheduleSettings(**typed(ScheduleSettings, config["lr_scheduler"], "lr_scheduler")),
                      checkpointing=config["model"].get("checkpointing", False), seed=seed)
    return Assembly(data, backbone, task, methods, tuner)


def make_methods(config: dict[str, Any], domain: str) -> list[PEFTMethod]:
    """The methods of a configuration, in order; random values follow the run's seed where they have none of their
    own."""
    seed = {"seed": config["seed_everything"]}
    return [make(part, "peft", domain, PEFTMethod, **({} if "seed" in part["init_args"] else seed))
            for part in _parts(config)]


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["peft"] if isinstance(config["peft"], list) else [config["peft"]]


# ------------------------------------------------------------------------------------------------- stages


@dataclass
class Stage:
    """One fit within a run. ``start`` names the stage whose result it begins with, ``carry`` what of it."""

    name: str
    config: dict[str, Any]
    start: str | None = None
    carry: tuple[str, ...] = ("weights", "head")
    advance: bool = False
    """Whether the methods are carried on into their own next stage after it."""


def stages_of(point: Point) -> list[Stage]:
    """The stages that a configuration lists, or those that its method needs; one nameless stage otherwise."""
    config = {key: value for key, value in point.config.items() if key != "stages"}
    listed_stages = point.config.get("stages")
    if not listed_stages:
        staged = [method.stages for method in make_methods(config, point.domain) if method.stages]
        if not staged:
            return [Stage("", config)]
        names = staged[0]
        return [Stage(name, config, start=names[i - 1] if i else None, carry=("weights",), advance=name != names[-1])
                for i, name in enumerate(names)]
    found: list[Stage] = []
    for name, own in listed_stages.items():
        own = dict(own)
        start, carry = own.pop("start", "previous"), own.pop("carry", ["weights", "head"])
        known = [stage.name for stage in found]
        if start not in ("previous", "base", *known):
            raise ScionError(f"stages.{name}.start: {start!r} is neither 'previous', 'base' nor an earlier stage "
                             f"({listed(known)})")
        wrong = [word for word in carry if word not in ("weights", "head")]
        if wrong:
            raise ScionError(f"stages.{name}.carry: {wrong[0]!r} is neither 'weights' nor 'head'")
        begin = None if start == "base" or not found else found[-1].name if start == "previous" else start
        found.append(Stage(name, {**config, **own}, begin, tuple(carry)))
    return found


# ------------------------------------------------------------------------------------------------- callbacks


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


# ------------------------------------------------------------------------------------------------- one run


@dataclass
class Outcome:
    """What a finished stage leaves for the report."""

    tuner: FineTuner
    data: DataModule
    rows: list[dict[str, float]]
    parameters: dict[str, int]
    metrics: dict[str, dict[str, float]]
    seconds: float
    best_epoch: int | None = None
    """The epoch that ``select: best`` has chosen."""
    tables: dict[str, Any] = field(default_factory=dict)


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
        stages = stages_of(point)
        results = _finished_stages(point, folder, stages) if goes_on or not folder.is_main and not overwrite else []
        assembly = assemble(point, stages[len(results)].config)
        config = {**point.config, "domain": point.domain, "run_dir": str(path)}
        with folder.opened(config, overwrite):
            if folder.is_main:
                messages.write_to(folder.path / "log.txt")
            if goes_on:
                log.info("going on with the run in %s", folder.path)
            return _run_stages(point, folder, stages, results, assembly)


def is_main_process() -> bool:
    """Whether this is the only or the first of the processes of a run; known from the environment that started it."""
    from lightning.fabric.utilities.rank_zero import _get_rank

    return not _get_rank()


@dataclass
class StageResult:
    """What a finished stage leaves for the run's record."""

    rows: list[dict[str, Any]]
    parameters: dict[str, int]
    metrics: dict[str, dict[str, float | None]]
    seconds: float


def _stage_home(folder: RunFolder, stage: Stage) -> Path:
    return folder.path / "stages" / stage.name if stage.name else folder.path


def _finished_stages(point: Point, folder: RunFolder, stages: list[Stage]) -> list[StageResult]:
    """The results of the stages, from the first on, that were finished before an interruption."""
    found: list[StageResult] = []
    for stage in stages[:-1]:
        done = _stage_home(folder, stage) / "done.json"
        if not done.is_file():
            break
        record = read_done(done)
        if record.get("config_hash", point.hash) != point.hash:
            raise ScionError(f"{done}: of another configuration ({record['config_hash']}, this is {point.hash}); "
                             "choose another folder or pass --overwrite")
        found.append(StageResult(record["rows"], record["parameters"], record["metrics"], record["seconds"]))
    return found


def _run_stages(point: Point, folder: RunFolder, stages: list[Stage], results: list[StageResult], assembly: Assembly
                ) -> dict[str, Any]:
    """Fit the stages that have no result yet, the first of them with ``assembly``, and write the run's record."""
    outcome: Outcome | None = None
    for stage in stages[len(results):]:
        is_last = stage is stages[-1]
        outcome = _fit(point, stage, folder, assembly if outcome is None else assemble(point, stage.config), is_last)
        metrics: dict[str, Any] = outcome.metrics
        result = StageResult(outcome.rows, outcome.parameters, metrics, outcome.seconds)
        if not is_last and folder.is_main:
            write_json(_stage_home(folder, stage) / "done.json", {"config_hash": point.hash, **vars(result)})
        results.append(result)
    assert outcome is not None
    return _finish(point, folder, stages, results, outcome) if folder.is_main else {}


def _fit(point: Point, stage: Stage, folder: RunFolder, assembly: Assembly, is_last: bool) -> Outcome:
    """Train one stage, from its start or its last checkpoint, and test it where it is the last and there is a test."""
    tuner, data = assembly.tuner, assembly.data
    if stage.config["select"] == "best" and data.validation_set is None:
        raise ScionError("select: best chooses by validation, and these data have no validation set; take 'last'")
    methods = _attach(stage, folder, tuner, assembly.methods)
    if stage.name:
        log.info("stage %s", stage.name)
    home = _stage_home(folder, stage)
    history = History()
    stamp = {"format": FORMAT, "config_hash": point.hash, "stage": stage.name, "listing": _listing(data)}
    checkpoints = _checkpoints(stage.config, home / "checkpoints", tuner.task.selects)
    trainer = _trainer(stage.config, home, [*methods, history, checkpoints], stamp)
    _train(trainer, assembly, checkpoints, stamp)
    metrics = {"validation": _validation(history.rows, checkpoints.best_epoch), "test": {}}
    if stage.config["select"] == "best":
        _take_best(tuner, checkpoints, stamp)
    if is_last and data.test_set is not None:
        found = _undisturbed(trainer, lambda: trainer.test(tuner, datamodule=data, verbose=False))
        metrics["test"] = _split(found[0] if found else {}, "test")
    parameters = count(tuner)
    for method in methods:
        if stage.advance and stage.name in method.stages:
            method.advance(tuner)
    if folder.is_main:
        save_run_adapter(tuner, home / "adapter")
    trainer.strategy.barrier("the adapter is written")  # the other processes read it in the next stage
    return Outcome(tuner, data, history.rows, parameters, metrics, history.seconds, checkpoints.best_epoch,
                   tuner.tables if is_last else {})


def _attach(stage: Stage, folder: RunFolder, tuner: FineTuner, methods: list[PEFTMethod]) -> list[PEFTMethod]:
    """Attach what an earlier stage left and this one's methods, and fit the head to them; returns all methods."""
    before = folder.path / "stages" / stage.start / "adapter" if stage.start is not None else None
    if before is not None:
        methods = _begin_with(before, stage, tuner, methods)
    for method in methods:
        method.attach(tuner.backbone)
    tuner.fit_head()
    if before is not None and "head" in stage.carry:
        load_outside(tuner, read_adapter(before)[1], str(before))
    return methods


def _listing(data: DataModule) -> str:
    """What the data are, as a short hash."""
    return getattr(data, "listing", "")


def _train(trainer: L.Trainer, assembly: Assembly, checkpoints: RunCheckpoints, stamp: dict[str, Any]) -> None:
    """Fit, from the last checkpoint where there is one."""
    last = checkpoints.last_file if checkpoints.last_file.is_file() else None
    if last is not None:
        read_checkpoint(last, stamp)
    _undisturbed(trainer, lambda: trainer.fit(assembly.tuner, datamodule=assembly.data, ckpt_path=last,
                                              weights_only=True))
    if not trainer.fast_dev_run and not trainer.global_step:  # type: ignore[attr-defined]
        raise ScionError("trainer: not one step was made; check max_epochs, max_steps, max_time, limit_train_batches "
                         "and the size of the data")


def _undisturbed(trainer: L.Trainer, work: Callable[[], Any]) -> Any:
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
    earlier = restore(record, own, tuner.backbone, where=str(adapter))
    names = {method.name for method in methods}
    for method in earlier:
        if method.name not in names:
            method.freeze()
    kept = {method.name: method for method in earlier}
    return [*(method for method in earlier if method.name not in names),
            *(kept.get(method.name, method) for method in methods)]


def _checkpoints(config: dict[str, Any], folder: Path, selects: tuple[str, str]) -> RunCheckpoints:
    arguments = config["trainer"]
    metric, mode = selects
    best = (f"validation/{metric}", mode) if config["select"] == "best" else None
    writes = arguments.get("enable_checkpointing") is not False and not arguments.get("fast_dev_run")
    return RunCheckpoints(folder, arguments.get("checkpoint_every_n_steps"), best, last=writes)


def _trainer(config: dict[str, Any], home: Path, callbacks: list[L.Callback], stamp: dict[str, Any]) -> L.Trainer:
    from lightning.pytorch.loggers import TensorBoardLogger

    arguments = {key: value for key, value in config["trainer"].items()
                 if key not in (*OUR_ARGUMENTS, "enable_checkpointing")}
    shows = arguments.pop("enable_progress_bar", None) is not False
    has_bar = shows and sys.stderr.isatty()
    callbacks = [*callbacks, EpochLines(shows and not has_bar), *([Progress(refresh_rate=5)] if has_bar else [])]
    arguments = {"devices": 1, "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False,
                 **arguments}
    try:
        return L.Trainer(callbacks=callbacks, logger=TensorBoardLogger(save_dir=home, name="tensorboard", version=""),
                         plugins=[AtomicCheckpointIO(stamp)], default_root_dir=home, enable_progress_bar=has_bar,
                         enable_checkpointing=True, **arguments)
    except Exception as error:  # Lightning refuses bad values by exceptions of many kinds
        raise ScionError(f"trainer: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def count(tuner: FineTuner) -> dict[str, int]:
    """Trained parameters by owner, over all methods (``beside`` are those that only training needs), and the size of
    the backbone."""
    counts = {"method": 0, "norms": 0, "head": 0, "stored": 0}
    for method in tuner.methods:
        for key, value in method.counts().items():
            counts[key] = counts[key] + value if key != "head" else max(counts[key], value)
    beside = {id(p): p for p in tuner.beside_inference()}
    counts["beside"] = sum(p.numel() for p in beside.values() if p.requires_grad)
    inside = {id(p) for p in tuner.backbone.parameters()} | set(beside)
    counts["head"] += sum(p.numel() for p in tuner.parameters() if p.requires_grad and id(p) not in inside)
    added = {id(p) for p in tuner.backbone.peft.parameters()} if hasattr(tuner.backbone, "peft") else set()  # type: ignore[union-attr]
    counts["backbone"] = sum(p.numel() for p in tuner.backbone.parameters() if id(p) not in added)
    return counts


def save_run_adapter(tuner: FineTuner, folder: Path) -> None:
    """The adapter of a run: its methods, the task head, and what rebuilds backbone and task."""
    save_adapter(methods_on(tuner), folder, outside(tuner), model_record(tuner))


def _finish(point: Point, folder: RunFolder, stages: list[Stage], results: list[StageResult], outcome: Outcome
            ) -> dict[str, Any]:
    """Write pictures and metrics.json, the latter last: it makes the run a finished one."""
    tuner, data, path = outcome.tuner, outcome.data, folder.path
    home: Home = tuner.backbone.peft  # type: ignore[assignment]
    title = f"{point.name} on {tuner.backbone.origin.get('name')}, {report.data_named(data.origin)}"
    rows = [{**row, **({"stage": stage.name} if stage.name else {})}
            for stage, result in zip(stages, results, strict=True) for row in result.rows]
    report.curves(rows, path / "curves.png", title)
    confusion = outcome.tables.get("test/confusion")
    if confusion is not None:
        report.confusion(confusion, data.classes, path / "confusion.png", title)
    pictures.of_run(tuner, data, path / "pictures.png", title)
    write_json(path / "data_state.json", data.state(), indent=None)
    write_json(path / "history.json", [_finite(row) for row in rows], indent=None)
    if stages[-1].name:  # the last stage's adapter is the run's
        copy_adapter(_stage_home(folder, stages[-1]) / "adapter", path / "adapter")
    notes = [origin["note"] for origin in (data.origin, tuner.backbone.origin) if "note" in origin]
    notes += _shortened(stages[-1].config["trainer"])
    metrics = {
        "format": FORMAT, "status": "finished", "config_hash": point.hash, "select": point.config["select"],
        "data": dict(data.origin), "backbone": {**tuner.backbone.origin, "fingerprint": home.fingerprint},
        "peft": [method.spec() for method in tuner.methods], "parameters": outcome.parameters,
        "adapter_bytes": adapter_bytes(path / "adapter"),
        "metrics": {split: _finite(values) for split, values in outcome.metrics.items()},
        "seconds": round(sum(result.seconds for result in results), 2), "peak_memory_bytes": peak_memory(),
        "versions": versions(), "warnings": notes,
    }
    if data.skipped:
        metrics["data"]["skipped"] = bounded(data.skipped, 1000)
    if outcome.best_epoch is not None:
        metrics["selected_epoch"] = outcome.best_epoch
    if len(stages) > 1:
        metrics["stages"] = {stage.name: {"parameters": result.parameters, "metrics": result.metrics,
                                          "seconds": result.seconds}
                             for stage, result in zip(stages, results, strict=True)}
    figures = {method.name: _finite(method.figures()) for method in tuner.methods}
    if any(figures.values()):
        metrics["figures"] = {name: found for name, found in figures.items() if found}
    write_json(path / "metrics.json", metrics)
    return metrics


def _shortened(arguments: dict[str, Any]) -> list[str]:
    """What of the Trainer's arguments lets a run see only a part of its data."""
    whole = {"fast_dev_run": (None, False, 0), "overfit_batches": (None, 0), "limit_train_batches": (None, 1.0),
             "limit_val_batches": (None, 1.0), "limit_test_batches": (None, 1.0)}
    given = {name: arguments[name] for name in whole if name in arguments}
    return [f"trainer.{name} {value}: not all of the data was used" for name, value in given.items()
            if not any(value == one and type(value) is type(one) for one in whole[name])]


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with None for numbers that JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()}


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def __getattr__(name: str) -> Any:
    if name == "run":  # which runs several; it stood here before, and what imports this module cannot be imported by it
        return importlib.import_module("core.training.many_runs").run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
