"""Summaries, pictures, tables and cards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from core import report
from core.errors import ScionError
from core.peft import registry
from core.report import plots


def metrics(accuracy: float = 0.8, source: str = "real", kind: str = "hub", method: str = "LoRA") -> dict[str, Any]:
    return {
        "format": 1, "status": "finished", "select": "last",
        "data": {"source": source, "name": "ESC-50" if source == "real" else "mini ESC"},
        "backbone": {"name": "nano" if kind == "nano" else "MIT/ast", "pretrained": kind != "random", "kind": kind},
        "peft": [{"class": method}],
        "parameters": {"method": 8192, "norms": 256, "head": 1290, "stored": 8448, "backbone": 844_800},
        "adapter_bytes": 41_234,
        "metrics": {"validation": {"loss": 0.5, "accuracy": accuracy}, "test": {"loss": 0.6, "accuracy": accuracy}},
        "seconds": 83.2, "peak_memory_bytes": 712_000_000, "warnings": ["something to know"],
    }


def history(epochs: int, stage: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"epoch": e, "step": 25 * (e + 1), "train/loss": math.exp(-e), "validation/loss": math.exp(-e / 2),
         "train/accuracy": 1 - math.exp(-e), "validation/accuracy": 0.5, "lr": 1e-3} for e in range(epochs)]
    return [{**row, "stage": stage} for row in rows] if stage else rows


def picture(path: Path) -> tuple[int, int, Any]:
    """(width, height, pixels [height, width, 4]) of a PNG."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    return pixels.shape[1], pixels.shape[0], pixels


# ------------------------------------------------------------------------------------------------- summary


def test_summary_says_all() -> None:
    text = report.summary(metrics())
    for wanted in ("LoRA on MIT/ast, ESC-50: finished", "8,448 parameters", "1.0000% of the backbone's 844,800",
                   "a head of 1,290", "41,234 bytes", "accuracy 0.8000", "1 min 23 s", "679.0 MiB", "to know"):
        assert wanted in text
    assert "BENCHMARK" not in text


@pytest.mark.parametrize(("source", "kind", "wanted"), [
    ("mini", "hub", "generated mini"), ("real", "nano", "built-in nano"), ("real", "random", "weights are random")])
def test_summary_is_loud_about_stand_ins(source: str, kind: str, wanted: str) -> None:
    second = report.summary(metrics(source=source, kind=kind)).splitlines()[1]
    assert second.startswith("*** NOT A BENCHMARK RESULT")
    assert wanted in second


def test_summary_of_an_unfinished_run() -> None:
    assert "running" in report.summary({"format": 1, "status": "running", "config_hash": "abc"})


# ------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("rows", [
    history(1), history(12), history(3, "dense") + history(5, "sparse"), [], [{"epoch": 0, "train/loss": math.nan}],
    [{"step": s, "train/loss": 1.0 / (s + 1)} for s in range(200)], [{"epoch": 0, "validation/perplexity": 12.0}],
], ids=["one", "many", "stages", "none", "nan", "steps", "other"])
def test_curves_draw(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    report.curves(rows, tmp_path / "curves.png", "a title")
    width, height, pixels = picture(tmp_path / "curves.png")
    assert width > 600 and height > 300
    assert pixels[..., :3].std() > 0.01  # not blank
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_stages_follow_one_another() -> None:
    sections, unit = plots._sections(history(3, "dense") + history(2, "sparse"))
    assert unit == "epoch"
    assert [(name, [x for x, _ in rows]) for name, rows in sections] == [("dense", [1, 2, 3]), ("sparse", [4, 5])]


def test_panels_hold_what_compares() -> None:
    rows = [{"train/loss": 2.0, "train/accuracy": 0.5, "validation/f1": 0.4, "validation/perplexity": 30.0, "lr-0": 1.0,
             "lr-1": 1.0, "lr-2": 2.0, "test/loss": 1.0}] * 2
    assert plots._panels(rows) == {
        "loss": ["train/loss"], "metrics": ["train/accuracy", "validation/f1"], "perplexity": ["validation/perplexity"],
        "learning rate": ["lr-0", "lr-2"]}


def test_same_numbers_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        report.curves(history(4), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_pyplot(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    before = pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)
    report.curves(history(2), tmp_path / "curves.png")
    report.confusion([[1, 0], [0, 1]], ["a", "b"], tmp_path / "confusion.png")
    assert (pyplot.get_fignums(), matplotlib.get_backend(), dict(matplotlib.rcParams)) == before


# ------------------------------------------------------------------------------------------------- confusion


@pytest.mark.parametrize("classes", [2, 10, 50, 120])
def test_confusion_draws(tmp_path: Path, classes: int) -> None:
    import torch

    matrix = torch.diag(torch.full((classes,), 8)) + torch.ones(classes, classes, dtype=torch.long).triu(classes - 1)
    matrix[0] = 0  # a class without samples
    report.confusion(matrix, [f"a_rather_long_class_name_{i}" for i in range(classes)], tmp_path / "c.png")
    width, height, pixels = picture(tmp_path / "c.png")
    assert 500 < width < 3000 and 450 < height < 3000
    assert pixels[..., :3].std() > 0.01


def test_confusion_refuses_other_sizes(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match=r"\[2, 2\], but there are 3 classes"):
        report.confusion([[1, 0], [0, 1]], ["a", "b", "c"], tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- table


def points(**runs: list[float]) -> list[dict[str, Any]]:
    return [{"axes": {"peft": name, "seed_everything": seed}, "metrics": metrics(value, method=name), "error": None}
            for name, values in runs.items() for seed, value in enumerate(values)]


def test_repetitions_are_averaged(tmp_path: Path) -> None:
    text = report.table(points(LoRA=[0.7, 0.8, 0.9], SSF=[0.5, 0.5, 0.5]), tmp_path)
    assert "0.8000 ± 0.1000" in text and "0.5000 ± 0.0000" in text
    assert "n - 1) over seed_everything" in text
    record = json.loads((tmp_path / "table.json").read_text())
    first = record["rows"][0]
    assert (first["label"], first["n"], first["trained"], first["bytes"]) == ("LoRA", 3, 8448, 41_234)
    assert first["metrics"]["test accuracy"]["sd"] == pytest.approx(0.1)
    assert len(record["points"]) == 6
    marked = (tmp_path / "table.md").read_text().splitlines()
    assert marked[0].startswith("| peft | test accuracy | n |") and len({line.count("|") for line in marked[:4]}) == 1
    picture(tmp_path / "table.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.json", "table.md", "table.png"]


@pytest.mark.parametrize(("axis", "repeats"), [
    ("seed_everything", True), ("data.fold", True), ("peft.seed", True), ("data.split_seed", True), ("peft", False),
    ("peft.rank", False), ("data.folder", False)])
def test_repetition_axes(axis: str, repeats: bool) -> None:
    assert report.is_repetition(axis) is repeats


def test_one_run_has_no_deviation() -> None:
    text = report.table(points(LoRA=[0.7]))
    assert "0.7000" in text and "± 0" not in text


def test_failed_points_are_named() -> None:
    some = points(LoRA=[0.7, 0.8])
    some[1] = {**some[1], "metrics": None, "error": "out of memory"}
    gone = {"axes": {"peft": "SSF", "seed_everything": 0}, "metrics": None, "error": "no such role"}
    text = report.table([*some, gone])
    assert "1 of 2" in text and "0 of 1" in text
    assert "failed: peft=LoRA, seed_everything=1: out of memory" in text


def test_only_failures_still_make_a_table(tmp_path: Path) -> None:
    report.table([{"axes": {"data.fold": 1}, "metrics": None, "error": "bad"}], tmp_path)
    width, height, pixels = picture(tmp_path / "table.png")
    assert width > 100 and height > 50 and pixels.std() > 0


def test_the_table_is_loud_about_stand_ins() -> None:
    minis = [{"axes": {"peft": name}, "metrics": metrics(source="mini", kind="nano", method=name), "error": None}
             for name in ("LoRA", "SSF")]
    assert "NOT A BENCHMARK RESULT: the data are a generated mini" in report.table(minis)
    mixed = report.table([minis[0], {"axes": {"peft": "SSF"}, "metrics": metrics(), "error": None}])
    assert "NOT ALL ROWS ARE COMPARABLE" in mixed and "measured on" in mixed
    assert "BENCHMARK" not in report.table(points(LoRA=[0.5]))


def test_axes_of_classes_and_stacks() -> None:
    stack = [{"class_path": "LoRA", "init_args": {}}, {"class_path": "core.peft.IST", "init_args": {"a": 1}}]
    text = report.table([{"axes": {"peft": stack, "peft.rank": 4}, "metrics": metrics(), "error": None}])
    assert "LoRA + IST" in text and "peft.rank" in text


def test_validation_stands_in_for_a_missing_test() -> None:
    run = metrics()
    run["metrics"]["test"] = {}
    assert "validation accuracy" in report.table([{"axes": {"peft": "LoRA"}, "metrics": run, "error": None}])


# ------------------------------------------------------------------------------------------------- cards


def test_every_method_has_a_whole_card() -> None:
    for card in report.methods_json():
        assert json.loads(json.dumps(card)) == card
        for key in ("summary", "equation", "trains", "merges", "source", "inference_cost", "recommended"):
            assert card.get(key), f"{card['name']}: its docstring has no {key}"
        for argument in card["arguments"]:
            assert argument["help"], f"{card['name']}.{argument['name']} is not documented"


def test_a_card() -> None:
    card = report.card_json("DoRA")
    assert card["family"] == "weights"
    assert card["equation"].endswith("m starts as ||W||")
    rank = next(argument for argument in card["arguments"] if argument["name"] == "rank")
    assert (rank["default"], rank["type"], rank["common"]) == (8, "int", False)
    assert next(a for a in card["arguments"] if a["name"] == "layers")["common"]
    text = report.card("DoRA")
    assert "arXiv:2402.09353" in text and "rank = 8" in text and "lr 0.005" in text


def test_continued_lines_are_joined() -> None:
    assert report.sections("""One line.

    Equation: a
        = b
    Source: c

    Args:
        x: y
    """) == {"summary": "One line.", "equation": "a = b", "source": "c"}


def test_the_table_of_methods_has_them_all() -> None:
    lines = report.methods_table().splitlines()
    assert {line.split()[0] for line in lines[2:]} == set(registry())


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ScionError, match="did you mean 'LoRA'"):
        report.card("Lora2")


def test_a_plugin_that_cannot_be_imported_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.peft.registry", lambda: {"LoRA": "core.peft.weights.lora", "Broken": "no_such_package"})
    assert "cannot be imported" in report.methods_table()
