"""A domain whose samples, targets and outputs are mappings, with two named losses, two test sets and a task of its own,
goes through everything that a run of classes goes through; the core does not know its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from core.adapters.swap import swap
from core.cli import main
from core.config import points
from core.errors import ScionError
from core.files import read_json
from core.training import load_run, run
from tests.core.tiny_run import child, finish, weights

PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"
BLOCKS = dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
DOMAIN, CONFIG = BLOCKS["domains/mixture/__init__.py"], BLOCKS["mixture.yaml"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration for the domain, which is on the import path."""
    folder = tmp_path / "path" / "domains" / "mixture"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(DOMAIN)
    file = tmp_path / "mixture.yaml"
    file.write_text(CONFIG)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield file
    for name in [name for name in sys.modules if name.startswith("domains.mixture")]:
        del sys.modules[name]


def test_the_core_does_not_know_it() -> None:
    core = Path(__file__).parents[2] / "core"
    assert not any("mixture" in file.read_text().lower() and "Mixture(" in file.read_text() for file in core.rglob("*"
                   ) if file.suffix == ".py" and "Pairs" in file.read_text())


def test_a_run_and_what_is_done_with_it(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["run", str(config), "--run_dir", str(folder)]) == 0
    closing = capsys.readouterr().out
    record = read_json(folder / "metrics.json")
    test = record["metrics"]["test"]
    names = {f"{which}/{name}" for which in ("base", "novel")
             for name in ("right", "error", "loss", "loss/place", "loss/level")}
    assert set(test) == {*names, "harmonic_mean"}
    assert test["harmonic_mean"] == pytest.approx(2 / (1 / test["base/right"] + 1 / test["novel/right"]))
    for which in ("base", "novel"):
        parts = test[f"{which}/loss/place"] + 0.5 * test[f"{which}/loss/level"]
        assert test[f"{which}/loss"] == pytest.approx(parts, abs=1e-6)
    assert "test base" in closing and "test novel" in closing and "harmonic_mean" in closing
    assert record["parameters"]["head"] == 2 * 17
    assert record["parameters"]["head/place"] == record["parameters"]["head/level"] == 17

    tuner = load_run.load_run(str(folder))
    inputs = {"patches": torch.full((1, 4, 16), 0.5), "mask": torch.ones(1, 4, dtype=torch.bool)}
    with torch.inference_mode():
        expected = tuner.task.predict(tuner(inputs))[0]
    (tmp_path / "half.txt").write_text("0.5")
    (tmp_path / "bad.txt").write_text("nan")
    assert main(["predict", str(folder), str(tmp_path / "half.txt"), str(tmp_path / "bad.txt"), "--json"]) == 2
    output = capsys.readouterr()
    good, bad = json.loads(output.out)
    assert good["label"] == expected["label"] and good["level"] == pytest.approx(expected["level"], abs=1e-6)
    assert "not finite" in bad["error"]

    assert main(["merge", str(folder), str(tmp_path / "plain")]) == 0
    assert (tmp_path / "plain" / "head.safetensors").is_file()


def test_describe_names_the_shapes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(config)]) == 0
    text = capsys.readouterr().out
    assert "one step on a batch patches [6, 4, 16], mask [6, 4]" in text and "FLOPs forward" in text
    assert main(["describe", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch"] == {"patches": [6, 4, 16], "mask": [6, 4]}


def test_over_shows_both_test_sets(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "over"
    arguments = ["--over", "peft=LoRA,LinearProbe", "--trainer.max_epochs", "1"]
    assert main(["run", str(config), "--run_dir", str(folder), *arguments]) == 0
    table = (folder / "table.md").read_text()
    assert all(f"test {name}" in table for name in ("base/right", "novel/right", "harmonic_mean"))
    assert "loss" not in table and "test base/right" in capsys.readouterr().out


def test_killed_in_mid_epoch_it_ends_as_unbroken(config: Path, tmp_path: Path) -> None:
    [point] = points(str(config), [])
    run.execute(point, tmp_path / "unbroken")
    for stop in (1, 3):
        folder = tmp_path / f"stop{stop}"
        assert os.waitpid(child(point, folder, stop), 0)[1] & 127 == signal.SIGKILL
        assert finish(point, folder) == weights(tmp_path / "unbroken")
        broken, unbroken = (read_json(place / "metrics.json")["metrics"] for place in (folder, tmp_path / "unbroken"))
        assert broken == unbroken


def test_a_reading_that_is_not_there(config: Path, tmp_path: Path) -> None:
    text = config.read_text().replace("task: Both", "task: Classification")
    config.write_text(text.replace("peft: {class: LoRA, rank: 2, dropout: 0.1}", "peft: VQT"))
    assert main(["run", str(config), "--run_dir", str(tmp_path / "run")]) == 2  # no classes
    assert not (tmp_path / "run").exists()
    config.write_text(CONFIG.replace("{class: LoRA, rank: 2, dropout: 0.1}", "VQT"))
    [point] = points(str(config), [])
    with pytest.raises(ScionError, match="VQT: works with tasks that read feature, and Both reads 'tokens'"):
        run.execute(point, tmp_path / "run")
    module = config.parent / "path" / "domains" / "mixture" / "__init__.py"
    module.write_text(DOMAIN.replace('readings = ("feature", "tokens")', 'readings = ("feature", "token")'))
    for name in [name for name in sys.modules if name.startswith("domains.mixture")]:
        del sys.modules[name]
    config.write_text(CONFIG)
    [point] = points(str(config), [])
    with pytest.raises(ScionError, match="reads 'tokens', which the backbone Mixture does not have.*'token'"):
        run.execute(point, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # two more processes that import everything
def test_two_processes(config: Path, tmp_path: Path) -> None:
    [single] = points(str(config), ["--peft.dropout", "0"])
    run.execute(single, tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints")
    arguments = ["--peft.dropout", "0", "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "3"]
    command = [sys.executable, "-m", "core", "run", str(config), "--run_dir", str(tmp_path / "two"), *arguments]
    subprocess.run(command, check=True, capture_output=True)  # Lightning starts the second process by this command
    one, two = (read_json(tmp_path / name / "metrics.json")["metrics"]["test"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-4)


def test_named_parts_of_a_loss_that_is_not_finite(config: Path, tmp_path: Path) -> None:
    module = config.parent / "path" / "domains" / "mixture" / "__init__.py"
    module.write_text(DOMAIN.replace('targets["level"])}', 'targets["level"]) * float("nan")}'))
    [point] = points(str(config), [])
    with pytest.raises(ScionError, match="the part level of the loss of the task is nan"):
        run.execute(point, tmp_path / "run")




def test_measured_again(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("0", "1"):
        assert main(["run", str(config), "--run_dir", str(tmp_path / seed), "--peft.seed", seed]) == 0
    capsys.readouterr()
    assert main(["test", str(tmp_path / "0"), "--data.batch_size", "7"]) == 0
    again = read_json(tmp_path / "0" / "tests" / "0" / "metrics.json")
    first = read_json(tmp_path / "0" / "metrics.json")["metrics"]["test"]
    assert again["metrics"]["test"] == pytest.approx(first, abs=1e-6) and again["changed"] == []
    assert "base/right" in capsys.readouterr().out
    lines = (tmp_path / "0" / "tests" / "0" / "predictions.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert [entry["set"] for entry in said] == ["base"] * 20 + ["novel"] * 12 and said[3]["sample"] == "sample 3"

    assert main(["test", str(tmp_path / "0"), "--swap", f"LoRA={tmp_path / '1'}"]) == 0
    swapped = read_json(tmp_path / "0" / "tests" / "1" / "metrics.json")
    assert swapped["changed"] == ["LoRA"] and swapped["metrics"]["test"] != again["metrics"]["test"]
    capsys.readouterr()
    assert main(["test", str(tmp_path / "0"), "--swap", f"LoRRA={tmp_path / '1'}"]) == 2
    assert "'LoRA'" in capsys.readouterr().err
    assert main(["test", str(tmp_path / "0"), "--peft.rank", "4"]) == 2
    assert "test can change data, task and trainer" in capsys.readouterr().err


def test_a_swap_and_back(config: Path, tmp_path: Path) -> None:
    for seed in ("0", "1"):
        assert main(["run", str(config), "--run_dir", str(tmp_path / seed), "--peft.seed", seed]) == 0
    assert main(["run", str(config), "--run_dir", str(tmp_path / "wide"), "--peft.rank", "4"]) == 0
    tuner = load_run.load_run(str(tmp_path / "0"))
    inputs = {"patches": torch.randn(3, 4, 16), "mask": torch.ones(3, 4, dtype=torch.bool)}
    [method] = tuner.methods
    heads = {name: tensor.clone() for name, tensor in tuner.task.state_dict().items()}
    with torch.inference_mode():
        before = tuner(inputs)["place"]
        swap(method, tmp_path / "1")
        between = tuner(inputs)["place"]
        swap(method, tmp_path / "0")
        after = tuner(inputs)["place"]
    assert torch.equal(before, after) and not torch.allclose(before, between)
    assert all(torch.equal(tensor, heads[name]) for name, tensor in tuner.task.state_dict().items())
    with pytest.raises(ScionError, match="rank 4, and LoRA has 2"):
        swap(method, tmp_path / "wide")
