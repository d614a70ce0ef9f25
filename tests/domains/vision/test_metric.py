"""Metric learning: splits by classes on generated trees of the documented layouts, the mini, and real photographs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from core.data import ClassSampler
from core.errors import ScionError
from domains.vision import MetricLearning, metric, mini
from domains.vision.metric import BENCHMARKS
from tests.domains.vision.conftest import write_picture

HOME = Path(metric.__file__).parent
EACH = 4


def write_cub(root: Path, classes: int = 6) -> Path:
    """Classes in the folder images/, of EACH pictures."""
    names = [f"{number:03d}.Bird_{number}/Bird_{take:04d}.jpg" for number in range(1, classes + 1)
             for take in range(EACH)]
    for name in names:
        write_picture(root / "images" / name, 20, 16)
    (root / "images.txt").write_text("".join(f"{row} {name}\n" for row, name in enumerate(names, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{row} {int(name[:3])}\n" for row, name in
                                                         enumerate(names, 1)))
    return root


def write_cars(root: Path, classes: int = 6) -> Path:
    """``cars_annos.mat`` with the published fields; the pictures of the classes lie mixed in one folder."""
    from scipy.io import savemat

    fields = [("relative_im_path", object), ("bbox_x1", object), ("class", object), ("test", object)]
    rows = np.zeros((1, classes * EACH), dtype=fields)
    for row in range(classes * EACH):
        path = f"car_ims/{row + 1:06d}.jpg"
        write_picture(root / path, 20, 16)
        rows[0, row] = (path, 1, row % classes + 1, row % 2)
    names = np.array([[f"Car {letter} 2012" for letter in "FEDCBAGH"[:classes]]], dtype=object)
    savemat(root / "cars_annos.mat", {"annotations": rows, "class_names": names})
    return root


def write_products(root: Path) -> Path:
    for which, numbers in (("train", (1, 2, 10)), ("test", (11, 12))):
        lines = ["image_id class_id super_class_id path"]
        for number in numbers:
            for take in range(EACH):
                path = f"bicycle_final/{1000 + number}_{take}.JPG"
                write_picture(root / path, 20, 16)
                lines.append(f"{len(lines)} {number} 1 {path}")
        (root / f"Ebay_{which}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_inshop(root: Path, inside: bool = False) -> Path:
    lines = [f"{5 * EACH}", "image_name        item_id evaluation_status"]
    for item in range(1, 6):
        for take in range(EACH):
            path = f"img/WOMEN/Dresses/id_{item:08d}/{take:02d}_1_front.jpg"
            which = "train" if item < 4 else ("query", "gallery")[take % 2]
            write_picture(root / ("Img" if inside else "") / path, 20, 16)
            lines.append(f"{path}       id_{item:08d} {which}")
    file = root / ("Eval" if inside else "") / "list_eval_partition.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    return root


def write_folders(root: Path, names: str = "abcdef", each: int = EACH) -> Path:
    for name in names:
        for take in range(each):
            write_picture(root / name / f"{take}.png", 20, 16)
    return root


WRITERS = {"cub": write_cub, "cars": write_cars, "sop": write_products, "inshop": write_inshop,
           "folder": write_folders}


def ready(dataset: str = "cub", **options: Any) -> Any:
    data = MetricLearning(dataset, **{"size": 16, "batch_size": 4, **options})  # type: ignore[arg-type]
    data.setup()
    return data


def fails(words: str, dataset: str = "cub", **options: Any) -> None:
    with pytest.raises(ScionError, match=words) as caught:
        ready(dataset, **options)
    assert "\n" not in str(caught.value)


def names_of(data: Any, which: str) -> list[str]:
    """The class of each picture of a set, from its file."""
    samples = {sample.file: sample.labels[0] for sample in data._listing[0]}
    return [samples[file] for file in getattr(data, f"{which}_set").pictures]


# ------------------------------------------------------------------------------------------------- layouts


def test_the_first_half_of_the_birds_trains(tmp_path: Path, cache: str) -> None:
    write_cub(tmp_path / "CUB_200_2011")
    for root in (tmp_path, tmp_path / "CUB_200_2011"):
        data = ready(root=str(root), cache=cache)
        assert data.classes == ["001.Bird_1", "002.Bird_2", "003.Bird_3"] == data.peek()
        assert data.validation_set is None
        assert data.train_set.targets == [0] * 4 + [1] * 4 + [2] * 4
        assert data.test_set.targets == [3] * 4 + [4] * 4 + [5] * 4  # go on behind those of training
        assert set(names_of(data, "test")) == {"004.Bird_4", "005.Bird_5", "006.Bird_6"}
        assert data.origin["name"] == "24 pictures in CUB-200-2011's layout"


def test_cars_by_the_table_or_by_folders(tmp_path: Path, cache: str) -> None:
    data = ready("cars", root=str(write_cars(tmp_path / "cars")), cache=cache)
    assert data.classes == ["Car F 2012", "Car E 2012", "Car D 2012"]  # by their numbers
    assert data.train_set.targets == [0, 1, 2] * 4 and data.test_set.targets == [3, 4, 5] * 4
    root = tmp_path / "folders"  # as they are shared for classification
    for which in ("train", "test"):
        write_folders(root / which, "ABCD", 2)
    data = ready("cars", root=str(root), cache=cache)
    assert data.classes == ["A", "B"] and Counter(data.train_set.targets) == {0: 4, 1: 4}
    assert Counter(data.test_set.targets) == {2: 4, 3: 4}


def test_products_by_their_lists(tmp_path: Path, cache: str) -> None:
    root = write_products(tmp_path / "Stanford_Online_Products")
    data = ready("sop", root=str(root.parent), cache=cache)
    assert data.classes == ["1", "2", "10"] and data.train_set.targets == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test_set.targets == [3] * 4 + [4] * 4


@pytest.mark.parametrize("inside", [False, True])
def test_clothes_by_query_and_gallery(inside: bool, tmp_path: Path, cache: str) -> None:
    root = write_inshop(tmp_path / "In-shop Clothes Retrieval Benchmark", inside)
    data = ready("inshop", root=str(root.parent), cache=cache)
    assert data.classes == ["id_00000001", "id_00000002", "id_00000003"] and len(data.train_set) == 12
    _, targets = next(iter(data.test_dataloader()))
    assert targets.dtype == torch.int64 and targets.tolist() == [[3, 1], [3, 2], [3, 1], [3, 2]]
    assert data.train_set[0][1] == 0


def test_anybodys_folders(tmp_path: Path, cache: str) -> None:
    root = write_folders(tmp_path / "mine")
    common: dict[str, Any] = {"root": str(root), "cache": cache}
    data = ready("folder", **common)
    assert data.classes == ["a", "b", "c"] and set(names_of(data, "test")) == {"d", "e", "f"}
    assert data.origin["name"] == "mine (24 pictures, 3 + 3 classes)"
    assert ready("folder", test_share=0.3, **common).classes == ["a", "b", "c", "d"]
    data = ready("folder", test_classes=["c", "a"], **common)
    assert data.classes == ["b", "d", "e", "f"] and set(names_of(data, "test")) == {"a", "c"}
    assert len(ready("folder", shots=2, **common).train_set) == 6


def test_folders_that_are_sets(tmp_path: Path, cache: str) -> None:
    root = tmp_path / "sets"
    for which, names in (("train", "xyz"), ("val", "pq"), ("test", "ab")):
        write_folders(root / which, names)
    data = ready("folder", root=str(root), cache=cache)
    assert data.classes == ["x", "y", "z"] and set(names_of(data, "test")) == {"a", "b"}
    assert set(names_of(data, "validation")) == {"p", "q"}
    write_folders(root / "test", "x")  # a class of both: the folders say nothing of the classes' sets
    data = ready("folder", root=str(root), cache=cache)
    assert data.classes == ["a", "b", "p"] and set(names_of(data, "test")) == {"q", "x", "y", "z"}
    assert data.validation_set is None


def test_published_sizes() -> None:
    assert {key: (sum(one.classes), sum(one.sizes.values())) for key, one in BENCHMARKS.items() if one.sizes} == {
        "cub": (200, 11_788), "cars": (196, 16_185), "sop": (22_634, 120_053), "inshop": (7982, 52_712)}


@pytest.mark.parametrize("dataset", ["cub", "cars", "sop", "inshop"])
def test_whole_benchmarks_are_known_by_their_sizes(dataset: str, tmp_path: Path, cache: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    sizes = {"inshop": {"train": 12, "query": 4, "gallery": 4}, "sop": {"train": 12, "test": 8}}
    known = replace(BENCHMARKS[dataset], sizes=sizes.get(dataset, {"train": 12, "test": 12}),
                    classes=(3, 2) if dataset in sizes else (3, 3))
    monkeypatch.setitem(BENCHMARKS, dataset, known)
    root = str(WRITERS[dataset](tmp_path / "data"))
    assert ready(dataset, root=root, cache=cache).origin["name"] == known.title


# ------------------------------------------------------------------------------------------------- validation, batches


@pytest.mark.parametrize("dataset", BENCHMARKS)
def test_validation_holds_training_classes_out(dataset: str, tmp_path: Path, cache: str) -> None:
    root = tmp_path / "data"
    if dataset in ("sop", "inshop"):
        WRITERS[dataset](root)
        fails("0.5 of 3 training classes leaves fewer than two", dataset, root=str(root), cache=cache,
              validation_share=0.5)
        return
    writer: Any = WRITERS[dataset]
    writer(root, "abcdefgh") if dataset == "folder" else writer(root, 8)
    whole = ready(dataset, root=str(root), cache=cache)
    data = ready(dataset, root=str(root), cache=cache, validation_share=0.5)
    held = set(names_of(data, "validation"))
    assert len(held) == 2 and held == set(whole.classes) - set(data.classes)
    assert names_of(data, "test") == names_of(whole, "test")
    assert not {*data.validation_set.targets} & {*data.test_set.targets, *data.train_set.targets}
    assert {*data.train_set.targets} == {0, 1}
    again = ready(dataset, root=str(root), cache=cache, validation_share=0.5, seed=7)
    assert set(names_of(again, "validation")) == held  # the run's seed does not touch it
    assert "2 of the 4 training classes held out" in data.origin["note"]


def test_batches_hold_each_class_once(tmp_path: Path, cache: str) -> None:
    data = ready(root=str(write_cub(tmp_path)), cache=cache, batch_size=6, per_class=3)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, ClassSampler) and len(loader) == 2
    for inputs, targets in loader:
        assert inputs.shape == (6, 3, 16, 16)
        classes, counts = targets.unique_consecutive(return_counts=True)
        assert counts.tolist() == [3, 3] and len(classes.unique()) == 2
    assert not isinstance(data.test_dataloader().sampler, ClassSampler)
    assert sum(len(targets) for _, targets in data.test_dataloader()) == 12
    fails("take 4 classes, and the training set has 3; at most 6", root=str(tmp_path), cache=cache, batch_size=8)
    fails("data.per_class: 3 samples of a class do not divide a batch of 8", batch_size=8, per_class=3)


# ------------------------------------------------------------------------------------------------- what is told


def test_wrong_lists_give_one_line(tmp_path: Path, cache: str) -> None:
    def broken(dataset: str, file: Path, old: str, new: str, words: str) -> None:
        good = file.read_text()
        assert old in good
        file.write_text(good.replace(old, new))
        fails(words, dataset, root=str(tmp_path / dataset), cache=cache)
        file.write_text(good)

    for dataset, writer in WRITERS.items():
        writer(tmp_path / dataset)
    cub, sop, shop = tmp_path / "cub", tmp_path / "sop", tmp_path / "inshop" / "list_eval_partition.txt"
    broken("cub", cub / "images.txt", "2 001.Bird_1/Bird_0001.jpg", "2", "images.txt, line 2: image id, path wanted")
    broken("cub", cub / "images.txt", "2 001.Bird_1/Bird_0001", "2 009.Bird_9/Bird_0001",
           "images.txt, line 2: target 1 is '009.Bird_9' here and '001.Bird_1' above")
    broken("cub", cub / "images.txt", "2 001", "99 001", "image 99 has no class in image_class_labels.txt")
    broken("cub", cub / "image_class_labels.txt", "3 1\n", "3 one\n", "line 3: 'one' is no number of a class")
    broken("sop", sop / "Ebay_train.txt", " 1 1 bicycle", " x 1 bicycle", "line 2: 'x' is no number")
    broken("sop", sop / "Ebay_test.txt", " 11 1 ", " 10 1 ", "data.root: 10 in .* is both in training and in test")
    broken("inshop", shop, "query", "ask", "'ask' is no set; train, query or gallery wanted")
    broken("inshop", shop, "gallery", "query", "no picture is in the set gallery")
    (sop / "Ebay_test.txt").write_text("image_id class_id super_class_id path\n")
    fails("Ebay_test.txt: empty", "sop", root=str(sop), cache=cache)
    (cub / "images" / "001.Bird_1" / "Bird_0002.jpg").unlink()
    fails("Bird_0002.jpg: images.txt lists it, but there is no such file", root=str(cub), cache=cache)
    (tmp_path / "cars" / "cars_annos.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    fails("cars_annos.mat: no table with annotations", "cars", root=str(tmp_path / "cars"), cache=cache)
    for dataset, words in (("cub", "no images.txt in"), ("inshop", "no list_eval_partition.txt in"),
                           ("sop", "no Ebay_train.txt in"), ("cars", "no subfolders; .*or cars_annos.mat")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        fails(words, dataset, root=str(tmp_path / "empty"), cache=cache)


def test_impossible_wishes_give_one_line(tmp_path: Path, cache: str) -> None:
    root = str(write_folders(tmp_path / "mine", "abc"))
    common: dict[str, Any] = {"root": root, "cache": cache}
    fails(r"is none of cub, cars, sop", "cubs")
    fails("gives 1 training class \\(a\\), and two at least", "folder", **common)
    fails("gives 1 test class \\(c\\)", "folder", test_classes=["c"], **common)
    fails("no class 'd'", "folder", test_classes=["c", "d"], **common)
    fails("the test classes of cub are given", test_classes=["c"])
    fails("data.test_share: 1.0 must lie", "folder", test_share=1.0)
    fails("data.validation_share: -1", validation_share=-1)
    fails("give one of the two", "folder", test_classes=["a"], test_share=0.5)
    (tmp_path / "mine" / "d").mkdir()
    fails("no picture in the folder .*d", "folder", **common)


# ------------------------------------------------------------------------------------------------- mini, real pictures


def test_mini(tmp_path: Path) -> None:
    data = ready(source="mini", size=None, batch_size=32)
    assert data.classes == mini.RETRIEVAL_CLASSES["train"] == data.peek() and data.validation_set is None
    assert "mini retrieval" in data.origin["name"] and data.size == mini.SIZE
    assert {*data.train_set.targets} == {*range(20)} and {*data.test_set.targets} == {*range(20, 40)}
    held = ready(source="mini", size=None, batch_size=32, validation_share=0.2)
    assert len(held.classes) == 16 and {*held.train_set.targets} == {*range(16)}
    assert {*held.validation_set.targets} == {*range(16, 20)} and held.test_set.targets == data.test_set.targets
    names = mini.RETRIEVAL_CLASSES["train"]
    pictures, targets = mini.retrieval("train")
    for row in (0, 100):
        name = held.classes[held.train_set.targets[row]]
        picture = held.train_set.pictures[row]
        assert any(torch.equal(picture, other) for other in pictures[targets == names.index(name)])
    with pytest.warns(UserWarning, match="Cars-196 is not in the cache.*built-in mini"):
        MetricLearning("cars", cache=str(tmp_path)).where()
    with pytest.warns(UserWarning, match="there is no folder of pictures"):
        MetricLearning("folder", cache=str(tmp_path)).where()


@pytest.mark.data
def test_photographs_of_five_unseen_classes(cifar10: Path, cache: str) -> None:
    """CIFAR-10's test pictures: by their pixels alone, neighbours are of one class more often than by chance."""
    from core.tasks.embedding import Retrieval

    root = str(cifar10 / "test")
    data = ready("folder", root=root, cache=cache, size=16, batch_size=10, augment="none")
    assert data.classes == ["airplane", "automobile", "bird", "cat", "deer"]
    assert set(names_of(data, "test")) == {"dog", "frog", "horse", "ship", "truck"}
    assert len(data.train_set) == len(data.test_set) == 500
    found = Retrieval(ks=(1,))
    for inputs, targets in data.test_dataloader():
        found.update(inputs.flatten(1), targets)
    assert 0.3 < float(found.compute()["recall_1"]) < 0.8  # chance is 0.2
    merged = ready("folder", root=str(cifar10), cache=cache, size=16, batch_size=10)  # train/ and test/ hold the same
    assert len(merged.train_set) == 5 * 700 and merged.classes == data.classes
    assert len(ready("folder", root=root, cache=cache, test_classes=["cat", "dog", "ship", "truck", "frog"],
                     batch_size=10).classes) == 5


def test_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    config = yaml.safe_load((HOME / "metric.yaml").read_text())
    data = config["data"]["init_args"]
    assert data["augment"] == "crop_flip" and data["normalise"] == "inception" and data["resize"] == "crop"
    quick = [word for which in ("train", "val", "test") for word in (f"--trainer.limit_{which}_batches", "2")]
    assert main(["run", str(HOME / "metric.yaml"), "--data.source", "mini", "--model.backbone.name", "nano", *quick,
                 "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--data.validation_share", "0.2",
                 "--run_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "NOT A BENCHMARK RESULT: the data are a generated mini" in shown and "recall_1" in shown
