"""Suites of tasks: settings that go with a task, all tasks of an axis, and the table with the means of groups."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import report
from core.config import Point, points
from core.data import DataModule
from core.errors import ScionError

Write = Callable[..., Path]


class Suite(DataModule):
    """Three tasks; reads nothing."""

    @classmethod
    def choices(cls, argument: str, arguments: dict[str, Any]) -> list[Any]:
        return ["a", "b", "c"][:arguments.get("most", 3)] if argument == "task" else super().choices(argument,
                                                                                                      arguments)


FILE = """
model: {backbone: {class: NoMatter}}
data: {class: tests.core.test_suite.Suite, task: a}
peft: {class: AdaptFormer, scale: 1.0}
optimizer: {name: AdamW, lr: 0.5}
per:
  data.task:
    a: {peft.AdaptFormer.scale: 10.0, optimizer.lr: 0.25}
    b: {peft.scale: 0.01, data.batch_size: 16}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(FILE)
    return path


def settings(point: Point) -> tuple[Any, ...]:
    config = point.config
    peft = config["peft"][0] if isinstance(config["peft"], list) else config["peft"]
    return (config["data"]["init_args"]["task"], peft["class_path"], peft["init_args"].get("scale"),
            config["optimizer"]["lr"], config["data"]["init_args"].get("batch_size"))


def test_settings_go_with_the_task_and_the_command_line_comes_before_them(file: Path) -> None:
    def run(*overrides: str) -> list[tuple[Any, ...]]:
        return [settings(point) for point in points(str(file), list(overrides))]

    assert run() == [("a", "AdaptFormer", 10.0, 0.25, None)]
    assert run("--data.task", "b") == [("b", "AdaptFormer", 0.01, 0.5, 16)]
    assert run("--over", "data.task=all") == [("a", "AdaptFormer", 10.0, 0.25, None),
                                              ("b", "AdaptFormer", 0.01, 0.5, 16), ("c", "AdaptFormer", 1.0, 0.5, None)]
    assert run("--optimizer.lr", "0.1", "--peft.scale", "3") == [("a", "AdaptFormer", 3, 0.1, None)]
    assert run("--over", "peft.scale=1,2") == [("a", "AdaptFormer", scale, 0.25, None) for scale in (1, 2)]
    assert run("--data.task", "b", "--data.init_args.batch_size", "3") == [("b", "AdaptFormer", 0.01, 0.5, 3)]
    assert run("--peft.AdaptFormer.scale", "3") == [("a", "AdaptFormer", 3, 0.25, None)]
    assert run("--peft", "LoRA") == [("a", "LoRA", None, 0.25, None)]
    assert run("--over", "peft=LoRA") == [("a", "LoRA", None, 0.25, None)]
    assert run("--optimizer", "{name: SGD, lr: 1.0}") == [("a", "AdaptFormer", 10.0, 1.0, None)]
    assert run("--peft+=IST")[0][:4] == ("a", "AdaptFormer", 10.0, 0.25)
    assert run("--data.task", "b", "--peft+=IST")[0][:4] == ("b", "AdaptFormer", 0.01, 0.5)
    assert "per" not in points(str(file))[0].config


def test_all_is_what_the_data_say(file: Path) -> None:
    assert [point.axes for point in points(str(file), ["--data.most", "2", "--over", "data.task=all"])] == [
        {"data.task": "a"}, {"data.task": "b"}]
    with pytest.raises(ScionError, match="data.most=all: Suite does not say what all of them are"):
        points(str(file), ["--over", "data.most=all"])
    with pytest.raises(ScionError, match="optimizer.lr=all: only an argument of the data"):
        points(str(file), ["--over", "optimizer.lr=all"])


def test_settings_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for per, words in (("{data.task: {a: 3}}", "per.data.task is a mapping from its values to settings"),
                       ("[1]", "per is a mapping"), ("{data.tsak: {a: {optimizer.lr: 1}}}",
                                                     "per.data.tsak: the configuration does not say data.tsak")):
        path.write_text(FILE.partition("per:")[0] + f"per: {per}\n")
        with pytest.raises(ScionError, match=f"bad.yaml: {words}"):
            points(str(path))
    path.write_text(FILE.partition("per:")[0] + "per: {seed_everything: {1: {optimizer.lr: 9.0}}}\n")
    found = points(str(path), ["--over", "seed_everything=0,1"])  # numbers are known by what they print as
    assert [point.config["optimizer"]["lr"] for point in found] == [0.5, 9.0]


def made(results: dict[str, dict[str, list[float]]], split: str = "test") -> list[dict[str, Any]]:
    """Points of settings x tasks x seeds, in two groups."""
    groups = {"a": "first", "b": "first", "c": "second"}
    return [{"axes": {"peft": setting, "data.task": task, "seed_everything": seed}, "error": None, "metrics": {
        "data": {"source": "real", "name": "Suite", "task": task, "group": groups[task]}, "adapter_bytes": 1000,
        "backbone": {"name": "vit"}, "parameters": {"method": 10, "head": 5}, "seconds": 30.0,
        "metrics": {split: {f"{split}/accuracy" if split == "test" else "accuracy": value, "loss": 1.0}}}}
        for setting, tasks in results.items() for task, values in tasks.items() for seed, value in enumerate(values)]


def test_both_means_are_named_and_told_apart(tmp_path: Path) -> None:
    text = report.table(made({"LoRA": {"a": [0.5, 0.7], "b": [0.7, 0.7], "c": [0.9, 0.9]},
                              "SSF": {"a": [0.1, 0.1], "b": [0.2, 0.2], "c": [0.4, 0.4]}}), tmp_path)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert lines["mean of 3 tasks"].split()[4:7] == ["73.3", "±", "4.7"]  # (60 + 70 + 90) / 3
    assert lines["mean of 2 groups"].split()[4:7] == ["77.5", "±", "3.5"]  # (65 + 90) / 2
    assert lines["first mean"].split()[2:5] == ["65.0", "±", "7.1"] and "15.0 ± 0.0" in lines["first mean"]
    assert "NOT ALL ROWS" not in text and "test accuracy, %" in text
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["suite"][0]["metrics"]["mean of 3 tasks"]["mean"] == pytest.approx(2.2 / 3)
    assert record["suite"][0]["trained"] == 10 and record["suite"][0]["seconds"] == 180
    assert (tmp_path / "table.png").stat().st_size > 5000


def test_a_mean_that_lacks_a_task_is_not_shown() -> None:
    some = made({"LoRA": {"a": [0.5], "b": [0.7], "c": [0.9]}, "SSF": {"a": [0.1], "c": [0.4]}})
    some.append({"axes": {"peft": "SSF", "data.task": "b", "seed_everything": 0}, "metrics": None, "error": "broken"})
    lines = {line.split("  ")[0]: line.split() for line in report.table(some).splitlines()}
    assert lines["mean of 3 tasks"][-2:] == ["70.0", "-"] and lines["second mean"][-1] == "40.0"
    assert "failed:" in " ".join(lines) and lines["b"][-1] == "-"


def test_a_task_that_fails_everywhere_leaves_no_mean() -> None:
    """It may belong to any group, and a mean over what is left would look like the whole one."""
    some = made({"LoRA": {"a": [0.5], "c": [0.9]}})
    some.append({"axes": {"peft": "LoRA", "data.task": "b", "seed_everything": 0}, "metrics": None, "error": "broken"})
    lines = {line.split("  ")[0]: line.split() for line in report.table(some).splitlines()}
    assert lines["a"][-1] == "50.0" and lines["b"][-1] == "-"
    assert all(lines[name][-1] == "-" for name in ("first mean", "second mean", "mean of 3 tasks", "mean of 2 groups"))


def test_many_settings_take_a_row_each_and_validation_names_the_best() -> None:
    results = {f"scale={scale}": {"a": [0.5], "b": [0.1 * scale], "c": [0.9 - 0.1 * scale]} for scale in range(1, 3)}
    text = report.table(made(results, "validation"))
    assert "best on validation: a: scale=1; b: scale=2; c: scale=1" in text
    many = report.table(made({f"m{i}": {"a": [0.5], "b": [0.5], "c": [0.5]} for i in range(9)}))
    assert many.splitlines()[0].split()[:5] == ["test", "accuracy,", "%", "a", "b"] and many.splitlines()[2][:2] == "m0"


def test_other_tables_stay_as_they_are() -> None:
    some = made({"LoRA": {"a": [0.5]}})
    for point in some:
        del point["axes"]["data.task"]
    assert "mean of" not in report.table(some)
