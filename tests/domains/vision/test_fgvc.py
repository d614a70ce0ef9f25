"""FGVC's five benchmarks on generated trees of their documented layouts, and its mini."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.errors import ScionError
from domains.vision import FGVC, fgvc, mini
from domains.vision.fgvc import BENCHMARKS
from tests.domains.vision.conftest import write_picture

HOME = Path(fgvc.__file__).parent
PATHS = {"cub": "{:03d}.Bird_{}/picture_{}.jpg", "nabirds": "{:04d}/{}_{}.jpg", "flowers": "jpg/image_{:02d}{}{}.jpg",
         "dogs": "n0208{}-dog_{}/n_{}.jpg", "cars": "cars_train/{:02d}{}{}.jpg"}


def write(root: Path, dataset: str, inside: bool = True) -> Path:
    """Three classes whose labels have holes; of each four pictures to train, one to validate, two to test."""
    benchmark = BENCHMARKS[dataset]
    folder = root / benchmark.folder
    for number, (name, size) in enumerate((("train", 4), ("val", 1), ("test", 2))):
        found: dict[str, int] = {}
        for label in (11, 2, 7):
            for index in range(size):
                path = PATHS[dataset].format(label, label, 10 * number + index)
                write_picture(folder / (benchmark.place if inside else "") / path, 20, 16, seed=label)
                found[path] = label
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


def ready(root: Path | None = None, **options: Any) -> Any:
    data = FGVC(root=str(root) if root else None, **{"size": 16, **options})
    data.setup()
    return data


def fails(words: str, **options: Any) -> None:
    with pytest.raises(ScionError, match=words) as caught:
        ready(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dataset", BENCHMARKS)
@pytest.mark.parametrize("inside", [True, False])
def test_layout(dataset: str, inside: bool, tmp_path: Path, cache: str) -> None:
    folder = write(tmp_path, dataset, inside)
    for root in (folder, tmp_path):  # the benchmark's folder, or the one around all five
        data = ready(root, dataset=dataset, cache=cache)
        assert [len(found) for found in (data.train_set, data.validation_set, data.test_set)] == [12, 3, 6]
    assert data.classes == data.peek() and len(data.classes) == 3
    names = {"cub": ["002.Bird_2", "007.Bird_7", "011.Bird_11"], "nabirds": ["0002", "0007", "0011"],
             "dogs": ["n02082-dog_2", "n02087-dog_7", "n020811-dog_11"]}
    assert data.classes == names.get(dataset, ["2", "7", "11"])  # by number, not by letter
    assert data.test_set.targets == [2, 2, 0, 0, 1, 1]
    picture, target = data.train_set[0]
    assert picture.shape == (3, 16, 16) and target == 2 and picture.min() >= -1
    assert data.origin["name"] == f"21 pictures in {BENCHMARKS[dataset].title}'s layout"
    assert data.origin["task"] == dataset and data.origin["group"] == "FGVC"


def test_whole_benchmarks_are_known_by_their_sizes(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = fgvc.Benchmark("CUB-200-2011", "CUB_200_2011", "images", 3, (12, 3, 6), ())
    monkeypatch.setitem(BENCHMARKS, "cub", small)
    assert ready(write(tmp_path, "cub"), cache=cache).origin["name"] == "FGVC"
    sizes = {key: (one.classes, *one.sizes) for key, one in BENCHMARKS.items()}
    assert sizes["nabirds"] == (555, 21536, 2393, 24633) and sizes["cars"] == (196, 7329, 815, 8041)
    assert sizes["flowers"] == (102, 1020, 1020, 6149) and sizes["dogs"] == (120, 10800, 1200, 8580)


def test_usual_spellings(tmp_path: Path) -> None:
    for key, names in {"cub": ("CUB", "CUB_200_2011", "cub-200"), "nabirds": ("NABirds",), "cars": ("Stanford-Cars",),
                       "dogs": ("stanford_dogs",), "flowers": ("OxfordFlower", "flowers-102")}.items():
        assert {fgvc.key_of(name) for name in (key, *names)} == {key}
    fails(r"FGVC has no 'car' \(did you mean 'cars'", dataset="car")
    write(tmp_path, "dogs").rename(tmp_path / "stanford_dogs")
    assert len(ready(tmp_path, dataset="dogs", cache=str(tmp_path)).classes) == 3


def test_wrong_lists_give_one_line(tmp_path: Path, cache: str) -> None:
    root = write(tmp_path, "cub")
    common: dict[str, Any] = {"root": root, "cache": cache}
    listing = root / "val.json"
    good = json.loads(listing.read_text())
    first, *rest = good
    trained = next(iter(json.loads((root / "train.json").read_text())))
    for found, words in (({**good, first: "seven"}, f"val.json: the label of {first} is 'seven', a whole number"),
                         ({**good, first: 2.5}, "is 2.5, a whole number"), ({**good, first: True}, "is True, a whole"),
                         ({**good, first: 9}, f"val.json: {first} has label 9, which none in train.json"),
                         ({**good, trained: 11}, f"val.json: {trained} stands in train.json already"),
                         (rest, "val.json: an object of paths and labels wanted.*found list"), ({}, "an empty one")):
        listing.write_text(json.dumps(found))
        fails(words, **common)
    listing.write_text('{"a": ')
    fails("val.json: cannot be read as JSON", **common)
    listing.unlink()
    fails("no val.json in .*VPT's lists are", **common)
    listing.write_text(json.dumps({key: str(value) for key, value in good.items()}))  # numbers in quotation marks
    assert len(ready(**common).classes) == 3
    (root / "images" / first).unlink()
    fails(f"{Path(first).name}: val.json lists it, but there is no such file.*skip_bad", **common)
    fails("no train.json in .*Stanford Cars and VPT's lists", root=tmp_path, dataset="cars", cache=cache)
    fails("no folder", root=tmp_path / "nowhere", cache=cache)


def test_mini(tmp_path: Path) -> None:
    data = ready(source="mini", size=None, dataset="cars", cache=str(tmp_path))
    assert data.origin["source"] == "mini" and "mini FGVC" in data.origin["name"] and data.size == mini.SIZE
    assert data.classes == mini.FINE_CLASSES == data.peek()
    assert len(data.train_set) == 300 and len(data.test_set) == 300
    assert len(data.validation_set) == 100
    assert len(ready(source="mini", shots=3).train_set) == 30
    with pytest.warns(UserWarning, match="CUB-200-2011 is not in the cache.*built-in mini"):
        FGVC(cache=str(tmp_path)).where()
    fails("data.source real: .*VPT's lists as data.root", source="real", cache=str(tmp_path))


def test_training_pictures_are_augmented_by_seed_and_epoch(tmp_path: Path, cache: str) -> None:
    root = write(tmp_path, "cub")
    first, again = ready(root, cache=cache), ready(root, cache=cache)
    assert torch.equal(first.train_set[0][0], again.train_set[0][0])
    assert torch.equal(first.test_set[0][0], ready(root, cache=cache, augment="none").test_set[0][0])
    again.train_set.set_epoch(1)
    assert not torch.equal(first.train_set[0][0], again.train_set[0][0])


def test_all_of_them(tmp_path: Path) -> None:
    common = {"cache": str(tmp_path)}
    assert FGVC.choices("dataset", {"root": "x", **common}) == list(BENCHMARKS)
    assert FGVC.choices("dataset", {"source": "real", **common}) == list(BENCHMARKS)
    assert FGVC.choices("dataset", common) == FGVC.choices("dataset", {"source": "mini", **common}) == ["cub"]
    with pytest.raises(ScionError, match="data.size=all"):
        FGVC.choices("size", common)


def test_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    config = yaml.safe_load((HOME / "fgvc.yaml").read_text())
    data = config["data"]["init_args"]
    assert data["augment"] == "crop_flip" and config["model"]["task"]["init_args"]["label_smoothing"] == 0.1
    quick = [f"--trainer.limit_{which}_batches=1" for which in ("train", "val", "test")]
    assert main(["run", str(HOME / "fgvc.yaml"), "--data.source", "mini", "--model.backbone.name", "nano",
                 "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", *[word for pair in quick for word in
                 pair.split("=")], "--run_dir", str(tmp_path / "run")]) == 0
    assert "NOT A BENCHMARK RESULT: the data are a generated mini" in capsys.readouterr().out
