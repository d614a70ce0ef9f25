"""A run: from a point's configuration to a folder with an adapter, metrics, pictures and a log.

A run continues where it was interrupted, at any step of any stage: everything is built again from the configuration and
its seed, and the last checkpoint brings back weights, optimizer, schedule, random states and the place in the data.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, TQDMProgressBar

from core import pictures, report
from core.artifact import adapter_bytes, read_adapter, restore, save_adapter, versions
from core.backbone import Backbone
from core.config import Point, find_class, make, typed
from core.data import DataModule, bounded
from core.errors import ScionError, listed, nearest
from core.files import write_atomically
from core.method import Home, PEFTMethod, methods_on
from core.module import OUTSIDE, FineTuner, OptimizerSettings, ScheduleSettings, load_outside, outside, spec
from core.spec import signature
from core.tasks import Task

FORMAT = 1
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
    check_trainer(config["trainer"])
    methods = make_methods(config, point.domain)
    data: DataModule = make(config["data"], "data", point.domain, DataModule)
    if data.seed is None:
        data.seed = seed
    part = config["model"]["backbone"]
    cls = find_class(part["class_path"], "model.backbone", point.domain)
    outline = cls.outline(str(part["init_args"].get("name", "auto"))) if issubclass(cls, Backbone) else None
    if outline:
        for method in methods:
            method.foresee(*outline, cls.__name__)
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
        method.examine(backbone)
    if read or classes is None:
        data.setup("fit")
        classes = data.classes
    L.seed_everything(seed, verbose=False)
    tuner = FineTuner(backbone, task, classes, data.multilabel,
                      OptimizerSettings(**typed(OptimizerSettings, config["optimizer"], "optimizer")),
                      ScheduleSettings(**typed(ScheduleSettings, config["lr_scheduler"], "lr_scheduler")), seed=seed)
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


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are either whole or not there."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


class History(Checkpoint):
    """What was logged, epoch by epoch, and the time spent; both go on after a resume.

    It is a ``Checkpoint`` so that Lightning runs it after the module's own end of the epoch.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.before = 0.0
        self.started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = {key: round(float(value), 6) for key, value in trainer.callback_metrics.items() if value.numel() == 1}
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
    """One line an epoch, for where a moving bar cannot be seen."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        main = pl_module.task.selects[0] if isinstance(pl_module, FineTuner) else ""
        shown = {key: float(value) for key, value in trainer.callback_metrics.items()
                 if key in ("train/loss", "validation/loss") or key.endswith(f"/{main}")}
        text = "  ".join(f"{key} {value:.3f}" for key, value in sorted(shown.items()))
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {text}", flush=True)


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
    tables: dict[str, Any] = field(default_factory=dict)


def execute(point: Point, folder: Path, overwrite: bool = False) -> dict[str, Any]:
    """Run a point in ``folder``, or go on with it there; returns the content of metrics.json.

    Raises:
        ScionError: the folder holds a finished or another run and ``overwrite`` is off, or it cannot be written.
    """
    fresh = prepare_folder(point, folder, overwrite)
    try:
        return _execute(point, folder)
    except ScionError:
        if fresh and not list(folder.rglob("*.ckpt")):  # a mistake, told before anything was trained, leaves nothing
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _execute(point: Point, folder: Path) -> dict[str, Any]:
    with logged(folder / "log.txt"):
        stages = stages_of(point)
        rows: list[dict[str, Any]] = []
        parts: dict[str, dict[str, Any]] = {}
        outcome: Outcome | None = None
        for i, stage in enumerate(stages):
            home = folder / "stages" / stage.name if stage.name else folder
            done = home / "done.json"
            last = i == len(stages) - 1
            if not last and done.is_file():
                record = json.loads(done.read_text())
            else:
                outcome = _fit(point, stage, home, folder, test=last)
                record = {"rows": outcome.rows, "parameters": outcome.parameters, "metrics": outcome.metrics,
                          "seconds": outcome.seconds}
                if not last:
                    write_atomically(done, lambda path, record=record: path.write_text(json.dumps(record)))
            rows += [{**row, **({"stage": stage.name} if stage.name else {})} for row in record["rows"]]
            parts[stage.name] = {key: record[key] for key in ("parameters", "metrics", "seconds")}
        assert outcome is not None
        metrics = _finish(point, folder, outcome, rows, parts)
    return metrics


def prepare_folder(point: Point, folder: Path, overwrite: bool) -> bool:
    """Make the run folder (True), or check that the run in it is this one, unfinished (False)."""
    record = folder / "metrics.json"
    if record.is_file() and not overwrite:
        try:
            before = json.loads(record.read_text())
        except ValueError:
            before = {}
        if before.get("config_hash") != point.hash:
            raise ScionError(f"run_dir: {folder} holds another run (config {before.get('config_hash')}, this is "
                             f"{point.hash}); choose another folder or pass --overwrite")
        if before.get("status") == "finished":
            raise ScionError(f"run_dir: {folder} holds this run, finished; choose another folder or pass --overwrite")
        log.info("going on with the run in %s", folder)
        return False
    try:
        if overwrite and record.is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**point.config, "domain": point.domain, "run_dir": str(folder)}
        write_atomically(folder / "config.yaml", lambda path: path.write_text(yaml.safe_dump(config, sort_keys=False)))
        start = {"format": FORMAT, "status": "running", "config_hash": point.hash}
        write_atomically(record, lambda path: path.write_text(json.dumps(start)))
    except OSError as error:
        raise ScionError(f"run_dir: {folder} cannot be written ({error.strerror})") from None
    return True


def _fit(point: Point, stage: Stage, home: Path, folder: Path, test: bool) -> Outcome:
    """Train one stage, from its start or its last checkpoint, and test it where it is the last and there is a test."""
    assembly = assemble(point, stage.config)
    tuner, methods = assembly.tuner, assembly.methods
    if stage.start is not None:
        methods = _begin_with(folder / "stages" / stage.start / "adapter", stage, tuner, methods)
    for method in methods:
        method.attach(tuner.backbone)
    tuner.fit_head()
    if stage.start is not None and "head" in stage.carry:
        adapter = folder / "stages" / stage.start / "adapter"
        load_outside(tuner, read_adapter(adapter)[1], str(adapter))
    if stage.name:
        log.info("stage %s", stage.name)
    history = History()
    trainer = _trainer(stage.config, home, [*methods, history], tuner.task.selects)
    last = home / "checkpoints" / "last.ckpt"
    for leftover in (home / "checkpoints").glob(".*"):
        leftover.unlink()
    trainer.fit(tuner, datamodule=assembly.data, ckpt_path=str(last) if last.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    rows = history.rows
    validation = {key: value for key, value in (rows[-1] if rows else {}).items() if key.startswith("validation/")}
    best = home / "checkpoints" / "best.ckpt"
    if stage.config["select"] == "best" and best.is_file():
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        tuner.load_state_dict(state)
        metric, mode = tuner.task.selects
        validation = (max if mode == "max" else min)((row for row in rows if f"validation/{metric}" in row),
                         key=lambda row: row[f"validation/{metric}"], default=validation)
        validation = {key: value for key, value in validation.items() if key.startswith("validation/")}
    tested: dict[str, float] = {}
    tables: dict[str, Any] = {}
    if test and assembly.data.test_set is not None:
        found = trainer.test(tuner, datamodule=assembly.data, verbose=False)
        tested = {key: float(value) for key, value in (found[0] if found else {}).items()}
        tables = tuner.tables
    parameters = count(tuner)
    for method in methods:
        if stage.advance and stage.name in method.stages:
            method.advance(tuner)
    save_run_adapter(tuner, home / "adapter")
    metrics = {"validation": _strip(validation), "test": _strip(tested)}
    return Outcome(tuner, assembly.data, rows, parameters, metrics, history.seconds, tables)


def _strip(metrics: dict[str, float]) -> dict[str, float]:
    return {key.partition("/")[2]: value for key, value in metrics.items()}


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


OUR_ARGUMENTS = ("checkpoint_every_n_steps",)
"""Arguments under ``trainer`` that Lightning does not know: a checkpoint within the epoch."""


def check_trainer(arguments: dict[str, Any]) -> None:
    """Refuse an argument that is neither the Trainer's nor ours."""
    known = [name for name in signature(L.Trainer).parameters if name not in ("callbacks", "logger", "plugins")]
    for name in arguments:
        if name not in (*known, *OUR_ARGUMENTS):
            raise ScionError(f"trainer.{name}: Lightning's Trainer has no such argument{nearest(name, known)}")


def _trainer(config: dict[str, Any], home: Path, callbacks: list[L.Callback], selects: tuple[str, str]) -> L.Trainer:
    arguments = dict(config["trainer"])
    every = arguments.pop("checkpoint_every_n_steps", None)
    (home / "checkpoints").mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"dirpath": home / "checkpoints", "enable_version_counter": False}
    if arguments.pop("enable_checkpointing", True):
        callbacks.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, every_n_epochs=1, **where))
        if every:
            callbacks.append(ModelCheckpoint(filename="last", every_n_train_steps=every, **where))
    if config["select"] == "best":
        callbacks.append(ModelCheckpoint(filename="best", monitor=f"validation/{selects[0]}", mode=selects[1],
                                         save_weights_only=True, **where))
    if arguments.pop("enable_progress_bar", True):
        callbacks.append(Progress(refresh_rate=5) if sys.stderr.isatty() else EpochLines())
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(save_dir=home, name="tensorboard", version="")
    arguments = {"devices": 1, "log_every_n_steps": 10, "num_sanity_val_steps": 0, "enable_model_summary": False,
                 **arguments}
    try:
        return L.Trainer(callbacks=callbacks, logger=logger, plugins=[AtomicCheckpointIO()], default_root_dir=home,
                         enable_progress_bar=any(isinstance(c, TQDMProgressBar) for c in callbacks),
                         enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **arguments)
    except (TypeError, ValueError, L.pytorch.utilities.exceptions.MisconfigurationException) as error:  # type: ignore[attr-defined]
        raise ScionError(f"trainer: {str(error).splitlines()[0]}") from None


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
    model = {"backbone": spec(tuner.backbone), "task": spec(tuner.task), "classes": tuner.task.classes,  # type: ignore[attr-defined]
             "multilabel": tuner.hparams["multilabel"], "seed": tuner.hparams["seed"]}
    save_adapter(methods_on(tuner), folder, outside(tuner), model)


def _finish(point: Point, folder: Path, outcome: Outcome, rows: list[dict[str, Any]], parts: dict[str, Any]
            ) -> dict[str, Any]:
    """Write pictures and metrics.json, the latter last: it makes the run a finished one."""
    tuner, data = outcome.tuner, outcome.data
    home: Home = tuner.backbone.peft  # type: ignore[assignment]
    title = f"{point.name} on {tuner.backbone.origin.get('name')}, {report.data_named(data.origin)}"
    report.curves(rows, folder / "curves.png", title)
    confusion = outcome.tables.get("test/confusion")
    if confusion is not None:
        report.confusion(confusion, data.classes, folder / "confusion.png", title)
    pictures.of_run(tuner, data, folder / "pictures.png", title)
    write_atomically(folder / "data_state.json", lambda path: path.write_text(json.dumps(data.state())))
    notes = [origin["note"] for origin in (data.origin, tuner.backbone.origin) if "note" in origin]
    metrics = {
        "format": FORMAT, "status": "finished", "config_hash": point.hash, "select": point.config["select"],
        "data": {**data.origin, **({"skipped": bounded(data.skipped, 1000)} if data.skipped else {})},
        "backbone": {**tuner.backbone.origin, "fingerprint": home.fingerprint},
        "peft": [method.spec() for method in tuner.methods], "parameters": outcome.parameters,
        "adapter_bytes": adapter_bytes(_last_adapter(folder, parts)),
        "metrics": outcome.metrics, "seconds": round(sum(part["seconds"] for part in parts.values()), 2),
        "peak_memory_bytes": peak_memory(), "versions": versions(), "warnings": notes,
        **({"stages": parts} if len(parts) > 1 else {}),
    }
    if len(parts) > 1:  # the last stage's adapter is the run's
        shutil.copytree(_last_adapter(folder, parts), folder / "adapter", dirs_exist_ok=True)
    write_atomically(folder / "history.json", lambda path: path.write_text(json.dumps(rows)))
    write_atomically(folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1) + "\n"))
    return metrics


def _last_adapter(folder: Path, parts: dict[str, Any]) -> Path:
    name = list(parts)[-1]
    return folder / "stages" / name / "adapter" if name else folder / "adapter"


def peak_memory() -> int:
    """Peak bytes: allocated on the GPU where there is one, else resident in this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ------------------------------------------------------------------------------------------------- many runs


def run(points: list[Point], run_dir: str | None = None, overwrite: bool = False) -> int:
    """Run one point, or all points of ``over``, and print what came out. Returns the exit code."""
    point = points[0]
    stem = Path(point.source).stem
    if len(points) == 1 and not point.axes:
        folder = Path(run_dir or point.config.get("run_dir") or _free(Path("runs") / stem / point.name))
        metrics = execute(point, folder, overwrite)
        print(report.summary(metrics))
        print(f"Everything is in {folder}")
        return 0
    folder = Path(run_dir or point.config.get("run_dir") or _free(Path("runs") / stem / "over"))
    results: list[dict[str, Any]] = []
    failed = 0
    for i, one in enumerate(points):
        home = folder / one.name
        print(f"[{i + 1}/{len(points)}] {one.name}", flush=True)
        before = _finished(home, one)
        error = None
        try:
            metrics = before if before and not overwrite else execute(one, home, overwrite)
        except ScionError as problem:  # the other points can still run
            metrics, error, failed = None, str(problem), failed + 1
            print(f"{one.name}: {problem}", flush=True)
        results.append({"axes": one.axes, "metrics": metrics, "error": error})
    print(report.table(results, folder))
    print(f"Everything is in {folder}")
    return 2 if failed else 0


def _finished(folder: Path, point: Point) -> dict[str, Any] | None:
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError):
        return None
    return metrics if metrics.get("status") == "finished" and metrics.get("config_hash") == point.hash else None


def _free(path: Path) -> Path:
    """``path`` with the first number behind it that is not taken."""
    k = 0
    while (candidate := path.with_name(f"{path.name}-{k}")).exists():
        k += 1
    return candidate


# ------------------------------------------------------------------------------------------------- log


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """Write our log and Python's warnings to ``file``, and keep Lightning's chatter off the screen."""
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [log, logging.getLogger("lightning.pytorch"), logging.getLogger("py.warnings")]
    chatter = logging.getLogger("lightning.pytorch")
    level, propagate = chatter.level, chatter.propagate
    for logger in loggers:
        logger.addHandler(handler)
    log.setLevel(logging.INFO)
    chatter.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in (".*does not have many workers.*", ".*LeafSpec.*", ".*isinstance.treespec.*", ".*is not a Tensor.*",
                     ".*eval mode.*", ".*Total length of .*zero.*", ".*smaller than the logging interval.*",
                     ".*Checkpoint directory.*", ".*Detected call of .lr_scheduler.*"):
            warnings.filterwarnings("ignore", text)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()
            chatter.setLevel(level)
            chatter.propagate = propagate
