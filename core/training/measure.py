"""A finished run measured again: on other data, or with one of its methods replaced by another trained one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from core.adapters.load import versions
from core.adapters.swap import swap
from core.config import Point, make
from core.config.entries import last_stage
from core.data import DataModule
from core.data.batch import batch_size, rows_of
from core.errors import ScionError, called, listed
from core.files import write_atomically, write_json
from core.method.fingerprint import fingerprint
from core.training.finetuner import FineTuner
from core.training.load_run import load_run
from core.training.run_folder import FORMAT
from core.training.trainer import Progress, call_trainer

FOLDER = "tests"
"""Where in a run's folder its further measurements are, each in a folder with a number."""


@dataclass(frozen=True)
class Swap:
    """A method of the run, by its name, and the folder of the one that takes its place."""

    name: str
    folder: str


def measure(run: Path, point: Point, swaps: Sequence[Swap] = (), task: Mapping[str, Any] | None = None) -> Path:
    """Measure the model of a finished run on the data of a configuration, and write what came out.

    Args:
        run: the run's folder.
        point: the configuration; its data are measured, on its Trainer's device.
        swaps: methods that are replaced before.
        task: arguments of the task that are other ones than in the run (its metrics, say).

    Returns:
        ``RUN/tests/<n>`` with metrics.json and predictions.jsonl.

    Raises:
        ScionError: the run is not finished, data of other classes, or a method that cannot be replaced.
    """
    tuner = load_run(str(run), task=dict(task or {}))
    before = fingerprints(tuner)
    for one in swaps:
        swap(_method_called(tuner, one.name), one.folder)
    data = _data(point, tuner)
    predictions = Predictions()
    found = _test(point, tuner, data, predictions)
    after = fingerprints(tuner)
    record = {
        "format": FORMAT,
        "status": "finished",
        "run": str(run),
        "data": dict(data.origin),
        "swaps": {one.name: one.folder for one in swaps},
        "methods": after,
        "changed": [name for name in after if after[name] != before[name]],
        "metrics": {"test": found},
        "versions": versions(),
    }
    folder = _next_folder(run / FOLDER)
    predictions.write(folder / "predictions.jsonl")
    write_json(folder / "metrics.json", record)
    return folder


def fingerprints(tuner: FineTuner) -> dict[str, str]:
    """A fingerprint of each method's values, by its name."""
    return {method.name: str(fingerprint(method.module)) for method in tuner.methods}


def _method_called(tuner: FineTuner, name: str) -> Any:
    methods = {method.name: method for method in tuner.methods}
    if name not in methods:
        raise ScionError(f"--swap: the run has no method {name!r}{called(name, methods)}; it has {listed(methods)}")
    return methods[name]


def _data(point: Point, tuner: FineTuner) -> DataModule:
    """The data of the configuration, loaded, if the run's task fits them."""
    config = {**point.config, **last_stage(point.config)}
    data: DataModule = make(config["data"], "data", point.domain, DataModule)
    if data.seed is None:
        data.seed = config["seed_everything"]
    data.bind(tuner.backbone)
    data.setup("test")
    if not data.test_sets:
        raise ScionError("data: there is no test set to measure")
    own = list(tuner.info.classes)
    there = list(data.info.classes)
    # where samples are compared, the classes are others in every set
    if own != there and not tuner.task.compares:
        strange = [name for name in there if name not in own] or [name for name in own if name not in there]
        what = f"the first that differs is {strange[0]!r}" if strange else "their order differs"
        raise ScionError(f"data: {len(there)} classes, and the run was trained on {len(own)}; {what}")
    return data


def _test(point: Point, tuner: FineTuner, data: DataModule, predictions: Predictions) -> dict[str, float]:
    has_bar = sys.stderr.isatty()
    callbacks: list[L.Callback] = [predictions]
    if has_bar:
        callbacks.append(Progress(refresh_rate=5))
    wanted = ("accelerator", "precision", "limit_test_batches", "devices")
    config = {**point.config, **last_stage(point.config)}
    settings = {key: value for key, value in config["trainer"].items() if key in wanted}
    trainer = L.Trainer(**{"devices": 1, **settings}, logger=False, enable_checkpointing=False, callbacks=callbacks,
                        enable_model_summary=False, enable_progress_bar=has_bar)
    if trainer.world_size > 1:
        raise ScionError("trainer.devices: a run is measured in one process; set it to 1")
    found = call_trainer(trainer, lambda: trainer.test(tuner, datamodule=data, verbose=False))
    metrics = found[0] if found else {}
    return {key.removeprefix("test/"): float(value) for key, value in metrics.items() if key.startswith("test/")}


class Predictions(L.Callback):
    """What the model says of each test sample, as lines of JSON."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int,
                          dataloader_idx: int = 0) -> None:
        stage = pl_module.test_stages()[dataloader_idx]
        loader = pl_module.loader_of(stage)
        places = loader.indices(batch_idx) if loader is not None else []
        said = pl_module.task.predict(outputs)
        for row in range(min(batch_size(batch), len(said))):
            entry: dict[str, Any] = {}
            which = stage.partition("/")[2]
            if which:
                entry["set"] = which
            if loader is not None and places:
                entry["sample"] = trainer.datamodule.name_of(loader.dataset, places[row])
            truth = pl_module.task.truth(rows_of(batch[1], row))
            if truth is not None:
                entry["truth"] = truth
            self.rows.append({**entry, **said[row]})

    def write(self, file: Path) -> None:
        """Write one line a sample, in the order of the data."""
        text = "".join(f"{json.dumps(row)}\n" for row in self.rows)
        write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def _next_folder(home: Path) -> Path:
    """The folder with the first number that is free, made."""
    number = 0
    while True:
        folder = home / str(number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise ScionError(f"{home}: cannot be written ({error.strerror or error})") from None


