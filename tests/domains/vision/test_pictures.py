"""What a person sees of a run: a grid of predictions, queries with their neighbours, and the same of new files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from core import report
from core.cli import commands
from core.config import points
from core.errors import ScionError
from core.training import many_runs
from domains.vision import ImageFolder
from tests.domains.vision.conftest import write_picture
from tests.domains.vision.real import DATA, TASKS, prepare

CLASSES = ("blue", "red", "stripes", "yellow")
QUICK = ["--model.backbone.name", "nano", "--trainer.max_epochs", "1", "--data.size", "48", "--data.batch_size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(CLASSES):
        for index in range(8):
            write_picture(home / name / f"{index}.png", 40, 30 + index, 10 * number + index)
    return home


def finished(name: str, home: Path, folder: Path, *overrides: str) -> Path:
    found = points(f"domains/vision/{name}.yaml", ["--data.root", str(folder), *QUICK, *overrides])
    assert many_runs.run(found, str(home)) == 0
    return home


@pytest.fixture(scope="module")
def classified(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("folder", tmp_path_factory.mktemp("run") / "labels", folder)


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("metric", tmp_path_factory.mktemp("run") / "metric", folder, "--data.dataset", "folder")


def test_a_run_shows_its_test_pictures_with_what_it_says_of_them(folder: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    original = report.gallery
    monkeypatch.setattr(report, "gallery", lambda *given, **options: (drawn.append(given), original(*given, **options)))
    home = finished("folder", tmp_path / "run", folder)
    (pictures, texts, file, title, right), = drawn
    assert file == home / "pictures.png" and Image.open(file).size[0] > 300 and "LoRA" in title
    data = ImageFolder(root=str(folder), size=48, resize="crop", normalise="inception")
    data.setup()
    truths = [data.classes[target] for _, target in data.test_set]  # type: ignore[union-attr]
    assert pictures.dtype == torch.uint8 and pictures.shape == (len(truths), 3, 48, 48)
    assert torch.equal(pictures, data.illustrate(torch.stack([one for one, _ in data.test_set])))  # type: ignore[union-attr]
    for text, ok, truth in zip(texts, right, truths, strict=True):
        said, score = text.splitlines()[0].rsplit(" ", 1)
        assert ok == (said == truth) and 0.25 <= float(score) <= 1 and text.endswith(f"is {truth}") is not ok


def test_predictions_of_files_are_shown(classified: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder.parent / "bad.png"
    bad.write_text("no picture")
    assert commands.predict(str(classified), [str(folder / "red"), str(bad)], False) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 8 and f"{bad}: no readable picture" in err
    assert err.endswith(f"pictures: {classified / 'predictions.png'}\n")
    assert Image.open(classified / "predictions.png").size[0] > 300


def test_queries_are_shown_with_their_neighbours(compared: Path) -> None:
    assert Image.open(compared / "pictures.png").size[1] > 600  # a row for each query
    metrics = json.loads((compared / "metrics.json").read_text())
    assert 0 < metrics["metrics"]["test"]["recall_8"] <= 1 and metrics["parameters"]["beside"] > 0


def test_new_files_are_compared_with_each_other(compared: Path, folder: Path, tmp_path: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "twin.png"
    twin.write_bytes((folder / "red" / "3.png").read_bytes())
    files = [str(folder / "blue"), str(folder / "red"), str(twin), str(tmp_path / "absent.png")]
    assert commands.predict(str(compared), files, True) == 2
    records = json.loads(capsys.readouterr().out)
    assert len(records) == 18 and "error" in records[-1]
    nearest = next(one for one in records if one["file"] == str(twin))["neighbours"]
    assert nearest[0] == {"file": str(folder / "red" / "3.png"), "score": 1.0} and len(nearest) == 5
    assert commands.predict(str(compared), files[:1], False) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(len(line.split("\t")) == 6 for line in lines)
    with pytest.raises(ScionError, match="1 readable file; this run compares files with each other"):
        commands.predict(str(compared), [str(twin)], False)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("task", TASKS)
def test_real_pictures_as_tasks(task: str, tmp_path: Path) -> None:
    if not (DATA / "nlvr").is_dir():
        pytest.skip("the real pictures are not at hand (SCION_DATA)")
    home = prepare(task, tmp_path, {"train": 40, "test": 20})
    data = ImageFolder(root=str(home), table="labels.csv", size=48, cache=str(tmp_path / "cache"), skip_bad=False)
    data.setup()
    assert data.validation_set is None and len(data.classes) in (3, 4, 6, 7, 10)
    assert {int(target) for _, target in data.train_set} == set(range(len(data.classes)))  # type: ignore[union-attr]
