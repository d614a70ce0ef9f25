"""Callbacks and loggers of a configuration: where their names are looked up, what a run cannot have, that their state
comes back exactly, and whose their files are."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import Point, points, rehearse
from core.errors import ScionError
from core.training import run
from core.training.checkpoints import read_checkpoint
from core.training.run_folder import RunFolder
from tests.core.tiny_run import PointOf, child, finish, results, weights

COUNTING = '''
import lightning.pytorch as L
import torch


class Counting(L.Callback):
    """Counts steps and draws a number at each; logs what it has at an epoch's end, and shakes the weights by it."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.steps, self.sum = scale, 0, torch.zeros(())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        self.sum = self.sum + self.scale * torch.rand(())
        with torch.no_grad():
            for parameter in pl_module.task.head.parameters():
                parameter.add_(1e-3 * self.sum)

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("train/counted", self.sum / self.steps)

    def state_dict(self):
        return {"steps": self.steps, "sum": self.sum}

    def load_state_dict(self, state_dict):
        self.steps, self.sum = state_dict["steps"], state_dict["sum"]


class Unplain(L.Callback):
    def state_dict(self):
        return {"inner": [object()]}


class EarlyStopping(L.Callback):
    """Of a name that Lightning has too."""


__all__ = ["Counting", "EarlyStopping", "Unplain"]
'''


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A domain that publishes callbacks, and a task."""
    home = tmp_path_factory.mktemp("with_domain")
    folder = home / "domains" / "counting"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(COUNTING.replace('"Unplain"]', '"Sorting", "Unplain"]')
                                        + "\nfrom core.tasks import Classification\n\n\n"
                                        "class Sorting(Classification):\n    pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        yield "counting"
    for name in [name for name in sys.modules if name.startswith("domains.counting")]:
        del sys.modules[name]


EARLY = ["--callbacks+=EarlyStopping", "--callbacks.monitor", "validation/loss", "--callbacks.patience", "1",
         "--callbacks.min_delta", "10"]
"""It stops behind the second epoch of three."""


# ------------------------------------------------------------------------------------------------- exact resuming


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_state_comes_back_exactly(point_of: PointOf, domain: str, tmp_path: Path, stop: int) -> None:
    """A callback of the core, one of a domain and one of Lightning; the last of 6 checkpoints is that of the epoch with
    which the training ends early."""
    point = point_of("--domain", domain, "--callbacks", "GradientNorm", "--callbacks+=Counting", "--callbacks.scale",
                     "0.5", "--callbacks+=lightning.pytorch.callbacks.EarlyStopping", *EARLY[1:])
    run.execute(point, tmp_path / "unbroken")
    rows = json.loads((tmp_path / "unbroken" / "history.json").read_text())
    assert len(rows) == 2 and {"train/counted", "train/gradient_norm", "train/gradient_norm_max"} <= rows[0].keys()
    os.waitpid(child(point, tmp_path / "killed", stop), 0)
    assert not (tmp_path / "killed" / "adapter").exists()
    finish(point, tmp_path / "killed")
    assert results(tmp_path / "killed") == results(tmp_path / "unbroken")


def test_they_change_nothing_that_they_do_not_touch(point_of: PointOf, tmp_path: Path) -> None:
    run.execute(point_of(), tmp_path / "plain")
    point = point_of("--callbacks", "[GradientNorm, LearningRateMonitor]", "--loggers", "[CSVLogger]")
    run.execute(point, tmp_path / "watched")
    assert weights(tmp_path / "watched") == weights(tmp_path / "plain")


@pytest.mark.parametrize(("name", "stops"), [
    ("StochasticWeightAveraging", (4, 6, 8, 9)), ("EMAWeightAveraging", (5, 9))])
def test_averaged_weights(point_of: PointOf, tmp_path: Path, name: str, stops: tuple[int, ...]) -> None:
    """Within the epochs that are averaged, at their ends, and behind the last."""
    options = {"StochasticWeightAveraging": "swa_lrs: 0.05, swa_epoch_start: 2, annealing_epochs: 2",
               "EMAWeightAveraging": "decay: 0.7"}
    point = point_of("--callbacks", f"{{class: {name}, {options[name]}}}", "--trainer.max_epochs", "3")
    run.execute(point, tmp_path / "unbroken")
    run.execute(point_of(), tmp_path / "plain")
    assert weights(tmp_path / "unbroken") != weights(tmp_path / "plain")
    for stop in stops:
        folder = tmp_path / f"stop{stop}"
        os.waitpid(child(point, folder, stop), 0)
        assert finish(point, folder) == weights(tmp_path / "unbroken"), f"killed behind checkpoint {stop}"


def test_a_state_that_no_checkpoint_can_hold(point_of: PointOf, domain: str, tmp_path: Path) -> None:
    point = point_of("--domain", domain, "--callbacks", "Unplain")
    with pytest.raises(ScionError, match="callbacks: the state of Unplain holds an object, .*tensors, numbers"):
        run.execute(point, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stages_have_their_own(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of("--callbacks", "[GradientNorm]", "--stages", "{one: {callbacks: []}, two: {}, three: {callbacks: "
                     "Timer, loggers: CSVLogger}}", "--trainer.max_epochs", "1")
    assert point.config["stages"]["one"]["callbacks"] == []
    run.execute(point, tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "history.json").read_text())
    assert ["train/gradient_norm" in row for row in rows] == [False, True, False]
    states = [read_checkpoint(tmp_path / "run" / "stages" / name / "checkpoints" / "last.ckpt")["callbacks"]
              for name in ("one", "two", "three")]
    assert [("GradientNorm" in state, "Timer" in state) for state in states] == [(False, False), (True, False),
                                                                               (False, True)]
    assert (tmp_path / "run" / "stages" / "three" / "logged" / "CSVLogger" / "metrics.csv").is_file()
    assert not (tmp_path / "run" / "stages" / "three" / "tensorboard").exists()


# ------------------------------------------------------------------------------------------------- the configuration


def named(point: Point, key: str = "callbacks") -> list[tuple[str, dict[str, Any]]]:
    return [(part["class_path"], part["init_args"]) for part in point.config[key]]


@pytest.mark.parametrize(("words", "wanted"), [
    (["--callbacks", "EarlyStopping", "--callbacks.monitor", "validation/loss"],
     [("EarlyStopping", {"monitor": "validation/loss"})]),
    (["--callbacks", "GradientNorm", "--callbacks+=Timer", "--callbacks.GradientNorm.order", "1"],
     [("GradientNorm", {"order": 1}), ("Timer", {})]),
    (["--callbacks+=GradientNorm", "--callbacks+=[Timer, LearningRateMonitor]"],
     [("GradientNorm", {}), ("Timer", {}), ("LearningRateMonitor", {})]),
    (["--callbacks", "null"], []), (["--callbacks", "[]"], []),
    (["--callbacks", "[GradientNorm, {class: Timer, verbose: true}]"],
     [("GradientNorm", {}), ("Timer", {"verbose": True})]),
    (["--callbacks=Timer", "--callbacks.init_args.verbose", "true"], [("Timer", {"verbose": True})]),
])
def test_the_command_line(point_of: PointOf, words: list[str], wanted: list[Any]) -> None:
    assert named(point_of(*words)) == wanted
    loggers = [word.replace("callbacks", "loggers") for word in words]
    assert named(point_of(*loggers), "loggers") == wanted  # they are looked up later


def test_a_stage_starts_from_those_of_the_whole(point_of: PointOf) -> None:
    point = point_of("--callbacks", "GradientNorm", "--stages", "{one: {}, two: {}}", "--stages.two.callbacks+=Timer",
                     "--stages.one.callbacks.order", "1")
    stages = point.config["stages"]
    assert [part["class_path"] for part in stages["two"]["callbacks"]] == ["GradientNorm", "Timer"]
    assert stages["one"]["callbacks"][0]["init_args"] == {"order": 1} and named(point) == [("GradientNorm", {})]


def test_an_axis(tiny_config: Path) -> None:
    found = points(str(tiny_config), ["--over", "callbacks=null,GradientNorm,[GradientNorm,Timer]"])
    assert [point.axes["callbacks"] for point in found] == ["none", "GradientNorm", "GradientNorm + Timer"]
    assert [point.name for point in found] == [f"LoRA-callbacks={name}-seed0"
                                               for name in ("none", "GradientNorm", "GradientNorm_+_Timer")]


def test_old_configurations_keep_their_hash(point_of: PointOf, tmp_path: Path) -> None:
    """Runs of earlier versions are found as finished."""
    assert point_of().hash == point_of("--callbacks", "null").hash == "109f4a65aaf8"
    others = [point_of("--callbacks", "GradientNorm").hash, point_of("--loggers", "[]").hash]
    assert len({point_of().hash, *others}) == 3


@pytest.mark.parametrize(("words", "told"), [
    (["--callbacks", "GradientNrm"], "callbacks: no class is called 'GradientNrm' (did you mean 'GradientNorm'"),
    (["--callbacks", "EarlyStoping"], "did you mean 'EarlyStopping'"),
    (["--callbacks", "Countin"], "did you mean 'Counting'"),
    (["--callbacks", "Nothing"], "GradientNorm, StochasticWeightAveraging in core.callbacks; Counting, "),
    (["--callbacks", "LoRA"], "callbacks: no class is called 'LoRA': LoRA is a method; write it under peft"),
    (["--callbacks", "core.peft.LoRA"], "callbacks: LoRA is not for a run (it is a method; write it under peft)"),
    (["--callbacks", "ModelCheckpoint"], "trainer.checkpoint_every_n_steps how often more"),
    (["--callbacks", "RichProgressBar"], "trainer.enable_progress_bar says whether"),
    (["--callbacks", "core.callbacks.exact_resume.ExactResume"], "a run has one already"),
    (["--callbacks", "BackboneFinetuning"], "the methods under peft say what is trained"),
    (["--callbacks", "collections.OrderedDict"], "callbacks: collections.OrderedDict is no Callback"),
    (["--callbacks", "{class: EarlyStopping, patiense: 3}"], "callbacks.patiense: EarlyStopping has no option"),
    (["--callbacks", "lightning.pytorch.callbacks.EarlyStopping"], "callbacks.monitor: EarlyStopping needs it"),
    (["--callbacks", "{class: lightning.pytorch.callbacks.EarlyStopping, monitor: a, patience: few}"],
     "callbacks.patience: must be"),
    (["--callbacks", "{class: lightning.pytorch.callbacks.EarlyStopping, monitor: a, mode: up}"],
     "EarlyStopping refuses its arguments (`mode` can be min, max, got up)"),
    (["--callbacks", "{class: GradientNorm, order: 0}"], "GradientNorm: order 0.0 must be positive"),
    (["--callbacks", "[GradientNorm, GradientNorm]"], "callbacks: two GradientNorm would have one state"),
    (["--callbacks", "{class: StochasticWeightAveraging, swa_lrs: 0.1}", "--select", "best"], "write select: last"),
    (["--callbacks", "GradientNorm,Timer"], "several are written [GradientNorm, Timer]"),
    (["--callbacks.order", "3"], "there are no callbacks of which to set one; write --callbacks NAME before it"),
    (["--callbacks", "3"], "callbacks[0]: 3 names no class"),
    (["--callbacks", "[{class: Timer}, null]"], "callbacks[1]: None names no class"),
    (["--stages", "{one: {callbacks: GradientNrm}}"], "'GradientNrm' (did you mean 'GradientNorm'"),
    (["--loggers", "CSVLoger"], "loggers: no class is called 'CSVLoger' (did you mean 'CSVLogger'"),
    (["--loggers", "GradientNorm"], "loggers: no class is called 'GradientNorm'"),
    (["--loggers", "core.callbacks.GradientNorm"], "loggers: core.callbacks.GradientNorm is no Logger"),
    (["--loggers", "WandbLogger"], "WandbLogger needs the package wandb, which is not installed; pip install wandb"),
    (["--loggers", "MLFlowLogger"], "pip install mlflow"),
    (["--loggers", "CometLogger"], "pip install comet-ml"),
    (["--loggers", "{class: CSVLogger, flush: 3}"], "loggers.flush: CSVLogger has no option"),
    (["--loggers", "{class: TensorBoardLogger, nam: x}"], "loggers.nam: TensorBoardLogger has no option 'nam'"),
    (["--loggers", "[CSVLogger, CSVLogger]"], "loggers: two CSVLogger would write into the same files"),
    (["--callback", "Timer"], "did you mean 'callbacks'"),
])
def test_what_a_run_cannot_have(point_of: PointOf, domain: str, words: list[str], told: str) -> None:
    with pytest.raises(ScionError) as caught:
        rehearse([point_of("--domain", domain, *words)])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_homes_in_their_order(point_of: PointOf, domain: str) -> None:
    from core.config import find_class

    assert find_class("StochasticWeightAveraging", "callbacks", domain).__module__ == "core.callbacks.weight_averaging"
    assert find_class("EarlyStopping", "callbacks", domain).__module__ == "domains.counting"
    assert find_class("EarlyStopping", "callbacks", "").__module__.startswith("lightning.")
    assert find_class("LearningRateMonitor", "callbacks", domain).__module__.startswith("lightning.")


def test_a_task_of_a_domain(point_of: PointOf, domain: str, tmp_path: Path) -> None:
    from core.config import find_class
    from core.tasks import Classification

    assert find_class("Classification", "model.task", domain) is Classification
    with pytest.raises(ScionError) as caught:
        find_class("Sortin", "model.task", domain)
    assert "did you mean 'Sorting'" in str(caught.value) and "Classification, Embedding" in str(caught.value)
    assert "core.tasks; Counting" in str(caught.value) and "Sorting, Unplain in domains.counting" in str(caught.value)
    record = run.execute(point_of("--domain", domain, "--model.task", "Sorting"), tmp_path / "run")
    assert record["status"] == "finished"
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert adapter["model"]["task"]["class"] == "counting:Sorting"


def test_what_is_never_logged(point_of: PointOf, tmp_path: Path) -> None:
    early = "{class: lightning.pytorch.callbacks.EarlyStopping, monitor: validation/%s}"
    with pytest.raises(ScionError) as caught:
        run.execute(point_of("--callbacks", early % "los"), tmp_path / "run")
    told = str(caught.value)
    assert told.startswith("callbacks.monitor: EarlyStopping waits for 'validation/los', which is never logged (did ")
    assert "you mean 'validation/loss'" in told and "\n" not in told
    with pytest.raises(ScionError, match="waits for 'validation/loss', and these data have no validation set"):
        run.execute(point_of("--callbacks", early % "loss", "--data.no_validation", "true"), tmp_path / "other")


# ------------------------------------------------------------------------------------------------- loggers


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "logged" / "CSVLogger" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_goes_on(point_of: PointOf, tmp_path: Path) -> None:
    """Of steps that are done twice the rows stand once."""
    point = point_of("--loggers", "{class: CSVLogger, flush_logs_every_n_steps: 1}", "--trainer.log_every_n_steps", "1",
                     "--callbacks", "LearningRateMonitor")
    run.execute(point, tmp_path / "unbroken")
    os.waitpid(child(point, tmp_path / "killed", 5), 0)
    begun = table(tmp_path / "killed")
    finish(point, tmp_path / "killed")
    rows = table(tmp_path / "killed")
    assert 0 < len(begun) < len(rows) and rows[:6] == [{**dict.fromkeys(rows[0], ""), **row} for row in begun[:6]]
    steps = [row["step"] for row in rows if row["lr-AdamW/pg1"]]
    assert steps == [str(step) for step in range(18)]
    assert not (tmp_path / "killed" / "tensorboard").exists()


def test_whose_files_they_are(point_of: PointOf, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    point = point_of("--loggers", "[CSVLogger, {class: CSVLogger, name: other}, TensorBoardLogger]",
                     "--trainer.max_epochs", "1")
    run.execute(point, folder)
    logged = folder / "logged"
    (logged / "SomeLogger" / "deep").mkdir(parents=True)
    for name in ("notes.txt", "CSVLogger/notes.txt", "SomeLogger/deep/run-1.bin"):
        (logged / name).write_text("x")
    assert (logged / "CSVLogger" / "other" / "version_0" / "metrics.csv").is_file()
    assert list((folder / "tensorboard").iterdir())
    RunFolder(folder, point.hash).clear()
    left = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert left == ["logged/CSVLogger/notes.txt", "logged/notes.txt"]
    (logged / "CSVLogger" / "notes.txt").unlink()
    (logged / "notes.txt").unlink()
    run.execute(point, folder)
    run.execute(point, folder, overwrite=True)
    RunFolder(folder, point.hash).clear()
    assert not logged.exists()


def test_a_link_in_the_place_of_loggers(point_of: PointOf, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logged").symlink_to(tmp_path)
    with pytest.raises(ScionError, match="logged is a link, and a run writes there"):
        run.execute(point_of(), tmp_path / "run")


def test_the_default_is_tensorboard(point_of: PointOf, tmp_path: Path) -> None:
    from core.config import make_loggers

    [usual] = make_loggers(point_of().config, "", tmp_path)
    assert type(usual).__name__ == "TensorBoardLogger" and usual.log_dir == f"{tmp_path}/tensorboard/"
    assert make_loggers(point_of("--loggers", "null").config, "", tmp_path) == []
    [own] = make_loggers(point_of("--loggers", "{class: CSVLogger, save_dir: elsewhere}").config, "", tmp_path)
    assert own.save_dir == "elsewhere"


def test_no_logger_at_all(point_of: PointOf, tmp_path: Path) -> None:
    run.execute(point_of("--loggers", "null", "--trainer.max_epochs", "1"), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists() and not (tmp_path / "run" / "logged").exists()
    with pytest.raises(ScionError, match="LearningRateMonitor` callback with `Trainer` that has no logger"):
        run.execute(point_of("--loggers", "null", "--callbacks", "LearningRateMonitor"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_argument_of_the_package(point_of: PointOf, tmp_path: Path) -> None:
    """What the logger does not know and hands on to its package, as TensorBoardLogger and WandbLogger do."""
    from core.config import make_loggers

    config = point_of("--loggers", "{class: TensorBoardLogger, flush_secs: 7}").config
    [logger] = make_loggers(config, "", tmp_path)
    assert logger._kwargs["flush_secs"] == 7  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------- the norm


def test_the_gradients_norm() -> None:
    from types import SimpleNamespace

    from core.callbacks import GradientNorm

    logged: dict[str, float] = {}
    module: Any = torch.nn.Linear(2, 1)
    module.log_dict = lambda found, **_: logged.update(found)
    trainer: Any = SimpleNamespace(world_size=1)
    norm = GradientNorm()
    norm.on_train_epoch_start(trainer, module)
    for scale in (3.0, 1.0, float("inf")):
        module.weight.grad, module.bias.grad = torch.full((1, 2), scale), torch.full((1,), 2 * scale)
        norm.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
    again = GradientNorm()
    again.load_state_dict(norm.state_dict())
    again.on_train_epoch_end(trainer, module)
    assert logged == pytest.approx({"train/gradient_norm": 2 * 6**0.5, "train/gradient_norm_max": 3 * 6**0.5})


def test_they_are_found_without_an_import() -> None:
    code = ("import sys, core.callbacks, core.loggers; print(core.callbacks.__all__, core.loggers.__all__, "
            "'torch' in sys.modules or 'lightning' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['GradientNorm', 'StochasticWeightAveraging'] ['CSVLogger'] False"
