"""ImageFolder: subfolders, tables and patterns; one label or several; awkward pictures; what is told of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import points
from core.errors import ScionError
from core.training.run import execute
from domains.vision import images
from domains.vision.folder import ImageFolder
from tests.domains.vision.conftest import write_picture

CLASSES = ("bird", "frog", "rain")


@pytest.fixture(autouse=True)
def own_cache(private_cache: Path) -> None:
    """Every test has a cache of its own."""


@pytest.fixture
def fails() -> Callable[..., None]:
    """What is wrong with a folder is one line."""

    def check(words: str, root: Path, **options: Any) -> None:
        with pytest.raises(ScionError, match=words) as caught:
            _ready(root, **options)
        assert "\n" not in str(caught.value)

    return check


def _ready(root: Path, **options: Any) -> Any:
    data = ImageFolder(str(root), **{"size": 16, **options})
    data.setup()
    return data


def _pictures(root: Path, each: int = 10, classes: tuple[str, ...] = CLASSES, suffix: str = "png") -> Path:
    for number, name in enumerate(classes):
        for index in range(each):
            write_picture(root / name / f"{index}.{suffix}", seed=100 * number + index)
    return root


def _names(data: Any, which: str) -> set[str]:
    return {f"{file.parent.name}/{file.name}" for file in getattr(data, f"{which}_set").pictures}


# ------------------------------------------------------------------------------------------------- sets


def test_subfolders_are_classes_and_a_part_of_each_is_set_apart(tmp_path: Path) -> None:
    data = _ready(_pictures(tmp_path / "pond"))
    assert data.classes == list(CLASSES) == data.peek()
    assert data.origin == {"source": "real", "name": "pond (30 pictures, 3 classes)", "normalise": "imagenet",
                           "input": "16 x 16, squash, bicubic"}
    sets = {which: _names(data, which) for which in ("train", "validation", "test")}
    assert [len(names) for names in sets.values()] == [21, 3, 6] and len(set().union(*sets.values())) == 30
    for part in (data.train_set, data.validation_set, data.test_set):
        for index, file in enumerate(part.pictures):
            inputs, target = part[index]
            assert inputs.shape == (3, 16, 16) and CLASSES[target] == file.parent.name
    assert _names(_ready(tmp_path / "pond", seed=3), "test") == sets["test"]  # the run's seed has no say


def test_folders_of_sets(tmp_path: Path) -> None:
    for name, each in (("Train", 3), ("val", 1), ("test", 2)):
        _pictures(tmp_path / "pond" / name, each, suffix="jpg")
    data = _ready(tmp_path / "pond")
    assert [len(_names(data, which)) for which in ("train", "validation", "test")] == [9, 3, 6]


def test_tables_with_several_labels(tmp_path: Path) -> None:
    rows = ["bird|rain", "rain", "bird | frog", "", "frog"] * 6
    for index in range(len(rows)):
        write_picture(tmp_path / "scene" / f"{index}.bmp", seed=index)
    (tmp_path / "scene" / "labels.csv").write_text("file,tags\n" + "".join(
        f"{index}.bmp,{labels}\n" for index, labels in enumerate(rows)))
    data = _ready(tmp_path / "scene", table="labels.csv", separator="|")
    assert data.multilabel and data.classes == list(CLASSES) and "3 labels" in data.origin["name"]
    for part in (data.train_set, data.validation_set, data.test_set):
        for index, file in enumerate(part.pictures):
            assert part[index][1].tolist() == [float(name in rows[int(file.stem)]) for name in CLASSES]
    targets = next(iter(data.train_dataloader()))[1]
    assert targets.is_floating_point() and targets.shape[1] == 3
    few = _ready(tmp_path / "scene", table="labels.csv", separator="|", shots=2)
    assert len(few.train_set) <= 6 and len(few.test_set) == len(data.test_set)


def test_labels_and_sets_from_names(tmp_path: Path) -> None:
    for kind in ("cell", "vessel"):
        for site in ("north", "south"):
            for index in range(3):
                write_picture(tmp_path / "scans" / f"{kind}_{site}_{index}.tiff")
    data = _ready(tmp_path / "scans", label_pattern=r"^([a-z]+)_", test_pattern="_south_", validation_share=0.0)
    assert data.classes == ["cell", "vessel"] and data.validation_set is None
    assert len(data.train_set) == len(data.test_set) == 6
    assert all("south" in file.name for file in data.test_set.pictures)


def test_shots_leave_the_tests_whole(tmp_path: Path) -> None:
    root = _pictures(tmp_path / "pond")
    two, one = _ready(root, shots=2), _ready(root, shots=1)
    assert len(two.train_set) == 6 and len(one.train_set) == 3 and _names(one, "train") < _names(two, "train")
    assert len(one.test_set) == 6 and "1 training pictures a class" in one.origin["name"]


# ------------------------------------------------------------------------------------------------- awkward files


def test_what_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    root = _pictures(tmp_path / "pond", suffix="jpg")
    (root / "bird" / "0.jpg").write_bytes(b"")
    (root / "frog" / "1.jpg").write_text("no picture at all")
    short = root / "rain" / "2.jpg"
    write_picture(short, 300, 200)
    short.write_bytes(short.read_bytes()[:-1500])
    (root / "notes.txt").write_text("not a picture, and not asked for")
    write_picture(root / ".trash" / "bird.png")
    data = _ready(root)
    assert len(data.skipped) == 3 and len(data.train_set) + len(data.validation_set) + len(data.test_set) == 27
    for name, words in (("0.jpg", "0 bytes"), ("1.jpg", "no readable picture"), ("2.jpg", "cut short")):
        assert any(name in reason and words in reason and "\n" not in reason for reason in data.skipped)
    assert "3 of 30 files could not be read" in data.origin["note"]
    with pytest.raises(ScionError, match=r"0\.jpg: .*0 bytes.*skip_bad"):
        _ready(root, skip_bad=False)
    for file in (root / "bird" / "0.jpg", root / "frog" / "1.jpg"):
        file.unlink()
    with pytest.raises(ScionError, match=r"2\.jpg: .*cut short.*skip_bad"):  # seen only by decoding it
        _ready(root, skip_bad=False)


def test_files_are_decoded_once_in_their_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _pictures(tmp_path / "pond", 4)
    write_picture(tmp_path / "whole.jpg", 300, 200)
    (root / "frog" / "1.png").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-1500])
    calls: list[str] = []
    original, opened = images.load_picture, images._opened
    monkeypatch.setattr(images, "load_picture", lambda file: (calls.append("load"), original(file))[1])
    monkeypatch.setattr(images, "_opened", lambda file: (calls.append("open"), opened(file))[1])
    first = _ready(root)
    assert calls.count("load") == 12
    calls.clear()
    again = _ready(root, size=24, seed=4)
    assert calls == [] and again.skipped == first.skipped and len(first.skipped) == 1
    with pytest.raises(ScionError, match="cut short"):  # what is remembered is not hidden
        _ready(root, skip_bad=False)
    assert calls == []
    write_picture(root / "frog" / "1.png", 50, 50)  # another file
    assert _ready(root).skipped == [] and calls.count("load") == 12


def test_pictures_of_all_kinds_in_one_folder(tmp_path: Path) -> None:
    root = _pictures(tmp_path / "pond", 5)
    for number, (mode, suffix) in enumerate((("L", "png"), ("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png"),
                                             ("1", "tiff"), ("LA", "png"), ("I;16", "png"))):
        file = root / "bird" / f"kind{number}.{suffix}"
        if mode == "I;16":
            images.Image.fromarray(torch.arange(64 * 100, dtype=torch.int32).view(64, 100).numpy().astype("uint16")
                                   ).save(file)
        else:
            write_picture(file, mode=mode)
    write_picture(root / "frog" / "thread.png", 1, 5000)
    write_picture(root / "frog" / "wide.png", 5000, 1)
    for options in ({"resize": "crop"}, {"resize": "squash"}, {"augment": "crop_flip"}):
        data = _ready(root, **options)
        assert data.skipped == []
        seen = [inputs for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
                for inputs, _ in loader]
        assert all(inputs.shape[1:] == (3, 16, 16) and inputs.isfinite().all() for inputs in seen)
        assert sum(len(inputs) for inputs in seen) == 24


def test_bad_folders_give_one_line(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = tmp_path / "pond"
    fails("no folder", root)
    root.mkdir()
    fails("no subfolders", root)
    _pictures(root, 4, ("bird",))
    fails("one class only", root)
    (root / "frog").mkdir()
    fails("no picture in the folder .*frog", root)
    write_picture(root / "frog" / "a.png")
    (root / "labels.csv").write_text("file,label\nbird/0.png,bird\nbird/77.png,frog\n")
    fails(r"77\.png: the table lists it, but there is no such file", root, table="labels.csv", skip_bad=False)
    fails("data.test_share", root, test_share=1.0)


def test_folders_of_other_files_and_tables_of_absent_ones(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = tmp_path / "pond"
    _pictures(root, 4, ("bird", "frog"))
    (root / "notes").mkdir()
    (root / "notes" / "monday.txt").write_text("rain")
    with pytest.warns(UserWarning, match="notes is left out: it holds .txt and no picture"):
        assert _ready(root).classes == ["bird", "frog"]
    (root / "images.txt").write_text("file,label\n1.jpg,a\n2.jpg,b\n")
    fails("none of the 2 files in .*metric.yaml --data.dataset cub --data.root", root, table="images.txt")


def test_without_a_folder_the_mini_stands_in_loudly(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no folder of pictures, so this is the built-in mini.*give the folder"):
        data = ImageFolder(separator="|")
        assert data.size == 48
    assert not data.multilabel and data.peek() == data.mini_classes() and len(data.peek() or []) == 8
    data.setup()
    assert data.origin["source"] == "mini" and "textures" in data.origin["name"]
    assert [len(part) for part in (data.train_set, data.validation_set, data.test_set)] == [800, 200, 500]  # type: ignore[arg-type]
    inputs, target = data.train_set[0]
    assert inputs.shape == (3, 48, 48) and isinstance(target, int)
    few = ImageFolder(source="mini", shots=3, augment="crop_flip", size=32)
    few.setup()
    assert len(few.train_set) == 24 and few.train_set[0][0].shape == (3, 32, 32)  # type: ignore[arg-type]
    with pytest.raises(ScionError, match="data.source real: there is no folder of pictures; give the folder"):
        ImageFolder(source="real").setup()


def test_a_run_on_ones_own_pictures(tmp_path: Path) -> None:
    root = _pictures(tmp_path / "pond", 6)
    point = points("domains/vision/folder.yaml", [
        "--data.root", str(root), "--data.size", "48", "--model.backbone.name", "nano", "--model.backbone.pretrained",
        "false", "--trainer.max_epochs", "1", "--data.augment", "crop_flip", "--trainer.accelerator", "cpu"])[0]
    metrics = execute(point, tmp_path / "run")
    assert metrics["data"]["name"] == "pond (18 pictures, 3 classes)" and metrics["data"]["normalise"] == "inception"
    assert 0 <= metrics["metrics"]["test"]["accuracy"] <= 1
    assert (tmp_path / "run" / "pictures.png").is_file()
    assert json.loads((tmp_path / "run" / "data_state.json").read_text())["size"] == 48


@pytest.mark.data
def test_real_photographs(cifar10: Path) -> None:
    data = _ready(cifar10, size=32, normalise="none")
    assert len(data.classes) == 10 and data.classes[0] == "airplane" and data.skipped == []
    assert len(data.train_set) == 6000 and len(data.test_set) == 1000 and data.validation_set is None
    targets = torch.tensor(data.test_set.targets)
    assert targets.bincount().tolist() == [100] * 10
    inputs, target = data.test_set[0]
    assert torch.equal(inputs, images.read_picture(data.test_set.pictures[0]) / 255)
    sample = torch.stack([data.train_set[index][0] for index in range(0, 6000, 60)])
    # channel means of CIFAR-10 as everybody quotes them
    torch.testing.assert_close(sample.mean(dim=(0, 2, 3)), torch.tensor([0.491, 0.482, 0.447]), atol=0.05, rtol=0)
