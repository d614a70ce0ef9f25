"""VTAB-1k's layout: tasks, protocols, lists; its configurations; and what is told of folders that are not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.config import points
from core.errors import ScionError
from core.training import many_runs, run
from core.training.checkpoints import AtomicCheckpointIO
from domains.vision import mini
from domains.vision.vtab import TASKS, VTAB1k
from tests.domains.vision.conftest import write_picture, write_task

Tree = Callable[..., Path]
FILES = ("vtab1k", "vtab1k_bi_adaptformer", "vtab1k_hydra", "vtab1k_ssf")
QUICK = ["--data.size", "48", "--model.backbone.name", "nano", "--model.backbone.pretrained", "false",
         "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(autouse=True)
def own_cache(private_cache: Path) -> None:
    """Every test has a cache of its own."""


def _ready(**options: Any) -> Any:
    data = VTAB1k(**{"size": 16, **options})
    data.setup()
    return data


def _names(part: Any) -> list[str]:
    return [f"{file.parent.name}/{file.stem}" for file in part.pictures]


# ------------------------------------------------------------------------------------------------- protocol


def test_nineteen_tasks_of_940_classes() -> None:
    assert len(TASKS) == 19 and sum(task.classes for task in TASKS.values()) == 940
    groups = [task.group for task in TASKS.values()]
    assert [groups.count(group) for group in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert TASKS["kitti"].tested == min(task.tested for task in TASKS.values()) == 711


def test_final_trains_on_both_lists_and_tests(vtab: Tree) -> None:
    data = _ready(root=str(vtab("svhn", 10)), task="svhn")
    assert data.classes == [str(number) for number in range(10)] == data.peek()
    assert _names(data.train_set) == [*(f"train800/{index}" for index in range(8)),
                                      *(f"val200/{index}" for index in range(4))]
    assert data.validation_set is None and _names(data.test_set) == [f"test/{index}" for index in range(6)]
    assert data.train_set.targets == [*range(8), *range(4)] and data.test_set.targets == list(range(6))
    assert data.val_dataloader() == []
    inputs, _ = next(iter(data.test_dataloader()))
    assert inputs.shape == (6, 3, 16, 16) and 0 <= inputs.min() and inputs.max() <= 1  # no normalisation
    assert data.origin["task"] == "svhn" and data.origin["group"] == "natural" and data.origin["normalise"] == "none"
    assert data.origin["name"] == "18 pictures in VTAB-1k's layout"
    for words in ("train800val200.txt lists 12 pictures, VTAB-1k's 1000", "test.txt lists 6 pictures, VTAB-1k's 26032",
                  "train800val200.txt has pictures of 8 of 10 classes"):
        assert words in data.origin["note"]


def test_tune_never_reads_the_test_list(vtab: Tree) -> None:
    root = vtab("cifar", 4)
    for file in (root / "cifar" / "test.txt", root / "cifar" / "train800val200.txt",
                 *(root / "cifar" / "images" / "test").iterdir()):
        file.unlink()
    data = _ready(root=str(root), protocol="tune")
    assert _names(data.train_set) == [f"train800/{index}" for index in range(8)]
    assert _names(data.validation_set) == [f"val200/{index}" for index in range(4)]
    assert data.test_set is None and data.test_dataloader() == []
    assert data.origin["name"].endswith("settings searched on val200") and len(data.classes) == 100
    with pytest.raises(ScionError, match=r"train800val200\.txt: no such list"):
        _ready(root=str(root))


def test_folders_by_other_names_and_inside(tmp_path: Path) -> None:
    write_task(tmp_path / "a", "pets", 4)
    assert len(_ready(root=str(tmp_path / "a"), task="oxford_iiit_pet").train_set) == 12
    write_task(tmp_path / "b" / "vtab-1k", "dtd", 4)
    assert len(_ready(root=str(tmp_path / "b"), task="dtd").train_set) == 12
    write_task(tmp_path / "cache" / "vision" / "vtab-1k", "cifar", 4)  # in the cache
    assert _ready().origin["source"] == "real"
    assert len(VTAB1k.choices("task", {})) == 19


def test_whole_lists_bear_the_name(tmp_path: Path) -> None:
    write_picture(tmp_path / "kitti" / "one.png")
    for name, size in (("train800", 800), ("val200", 200), ("train800val200", 1000), ("test", 711)):
        (tmp_path / "kitti" / f"{name}.txt").write_text("".join(f"one.png {index % 4}\n" for index in range(size)))
    assert _ready(root=str(tmp_path), task="kitti").origin["name"] == "VTAB-1k"
    data = _ready(root=str(tmp_path), task="kitti", protocol="tune")
    assert data.origin["name"] == "VTAB-1k, settings searched on val200" and "note" not in data.origin


def test_lines_with_blanks_and_class_names(vtab: Tree) -> None:
    root = vtab("kitti", 4)
    folder = root / "kitti"
    write_picture(folder / "my pictures" / "a b.png")
    (folder / "test.txt").write_text("my pictures/a b.png   3\r\n\n  my pictures/a b.png\t0\n", encoding="utf-8-sig")
    (folder / "classes.txt").write_text("near\nmiddle\nfar\nnone\n")
    data = _ready(root=str(root), task="kitti")
    assert data.classes == ["near", "middle", "far", "none"] and data.test_set.targets == [3, 0]
    (folder / "classes.txt").write_text("near\nfar\nfar\nnone\n")
    with pytest.raises(ScionError, match=r"classes\.txt: 3 different names on 4 lines, the task has 4 classes"):
        _ready(root=str(root), task="kitti")


def test_bad_lists_name_file_and_line(vtab: Tree) -> None:
    root = vtab("kitti", 4)
    file = root / "kitti" / "train800val200.txt"
    good = file.read_text().splitlines()

    def fails(words: str, *lines: str, **options: Any) -> None:
        file.write_text("\n".join(lines))
        with pytest.raises(ScionError, match=words) as caught:
            _ready(**{"root": str(root), "task": "kitti", **options})
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)

    fails(r"line 3: 4 is no label; the task has 4 classes, 0 to 3", *good[:2], "images/train800/0.png 4")
    fails(r"line 1: -1 is no label", "images/train800/0.png -1")
    fails(r"line 2: 'images/train800/0\.png' has no label", good[0], "images/train800/0.png")
    fails(r"line 1: 'images/train800/0\.png cat' has no label", "images/train800/0.png cat")
    fails(r"line 1: '3' has no label", "3")
    fails("empty", "", " ")
    fails(r"nowhere\.png: .*train800val200\.txt, line 2 lists it, but there is no such file", good[0],
          "images/nowhere.png 1")
    file.write_text("\n".join([*good, "images/nowhere.png 1"]))
    data = _ready(root=str(root), task="kitti", skip_bad=True)
    assert len(data.train_set) == 12 and "line 13 lists it" in data.skipped[0]
    file.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ScionError, match="cannot be read"):
        _ready(root=str(root), task="kitti")
    file.unlink()
    with pytest.raises(ScionError, match=r"train800val200\.txt: no such list of pictures"):
        _ready(root=str(root), task="kitti")


def test_bad_pictures_stop_before_training(vtab: Tree) -> None:
    root = vtab("kitti", 4, suffix="jpg")
    file = root / "kitti" / "images" / "test" / "5.jpg"
    write_picture(file, 300, 200)
    file.write_bytes(file.read_bytes()[:-1500])
    with pytest.raises(ScionError, match=r"5\.jpg: the picture is cut short .*skip_bad"):
        _ready(root=str(root), task="kitti")
    data = _ready(root=str(root), task="kitti", skip_bad=True)
    assert len(data.test_set) == 5 and "1 of 18 files could not be read" in data.origin["note"]


def test_tasks_by_name(vtab: Tree, tmp_path: Path) -> None:
    root = str(vtab("cifar", 4))
    for options, words in (({"task": "cifer"}, r"no task 'cifer' \(did you mean 'cifar'"),
                           ({"task": "pets"}, r"no task 'pets' \(it is called 'oxford_iiit_pet' here\)"),
                           ({"task": "svhn", "root": root}, r"no folder svhn in .*it has cifar"),
                           ({"task": "digits", "root": root}, "'digits' is a task of the mini"),
                           ({"task": "svhn", "source": "mini"}, "the mini has no task 'svhn', it has digits"),
                           ({"protocol": "tuned"}, r"data.protocol: 'tuned' \(did you mean 'tune'"),
                           ({"root": str(tmp_path / "nowhere")}, "data.root: no folder")):
        with pytest.raises(ScionError, match=words) as caught:
            VTAB1k(**options).peek()
        assert "\n" not in str(caught.value)
    with pytest.raises(ScionError, match="data.source real: VTAB-1k is not in the cache; give the folder"):
        VTAB1k(source="real").setup()


# ------------------------------------------------------------------------------------------------- the mini


@pytest.mark.parametrize("protocol", ["final", "tune"])
def test_the_mini_follows_the_protocol(protocol: Any) -> None:
    data = _ready(source="mini", size=None, protocol=protocol)
    assert data.origin["task"] == "digits" and data.origin["group"] == "natural" and data.origin["source"] == "mini"
    train, validation = mini.split("digits", "train"), mini.split("digits", "validation")
    if protocol == "tune":
        assert len(data.train_set) == 800 and len(data.validation_set) == 200 and data.test_set is None
        assert data.validation_set.targets == validation[1].tolist()
    else:
        assert len(data.train_set) == 1000 and data.validation_set is None and len(data.test_set) == 500
        assert torch.equal(data.train_set[999][0], (validation[0][199] / 255 - 0.5) / 0.5)
    assert data.origin["normalise"] == "inception"  # as the nano was pretrained
    assert torch.equal(data.train_set[3][0], (train[0][3] / 255 - 0.5) / 0.5) and data.train_set[3][1] == train[1][3]
    plain = _ready(source="mini", size=None, protocol=protocol, normalise="none")
    assert torch.equal(plain.train_set[3][0], train[0][3] / 255)


def test_all_tasks_are_those_at_hand(vtab: Tree) -> None:
    small = list(mini.TASKS)
    assert VTAB1k.choices("task", {}) == VTAB1k.choices("task", {"source": "mini", "root": "x"}) == small
    assert VTAB1k.choices("task", {"root": "x"}) == VTAB1k.choices("task", {"source": "real"}) == list(TASKS)
    with pytest.raises(ScionError, match="data.normalise=all"):
        VTAB1k.choices("normalise", {})
    with pytest.warns(UserWarning, match="so this is the built-in mini: five tasks"):
        assert VTAB1k(task="count").size == 48
    with pytest.warns(UserWarning), pytest.raises(ScionError, match="the mini has no task 'cifar'.*give the folder"):
        VTAB1k(task="cifar").peek()


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("name", FILES)
def test_what_stands_above_per_is_cifars(name: str) -> None:
    plain, cifar = (points(f"domains/vision/{name}.yaml", ["--data.source", "real", *more])[0].config
                    for more in ([], ["--data.task", "cifar"]))
    plain["data"]["init_args"]["task"] = "cifar"
    assert plain == cifar
    per = yaml.safe_load(Path(f"domains/vision/{name}.yaml").read_text()).get("per")
    assert per is None or list(per["data.task"]) == list(TASKS)


def test_the_papers_settings_reach_their_tasks() -> None:
    def settings(name: str, task: str, *more: str) -> dict[str, Any]:
        return points(f"domains/vision/{name}.yaml", ["--data.source", "real", "--data.task", task, *more])[0].config

    hydra = settings("vtab1k_hydra", "smallnorb_azi")
    assert hydra["optimizer"]["lr"] == 5e-3 and hydra["optimizer"]["weight_decay"] == 1e-5
    assert hydra["peft"]["init_args"]["scale"] == 3 and hydra["data"]["init_args"]["batch_size"] == 64
    ssf = settings("vtab1k_ssf", "clevr_dist")
    assert ssf["optimizer"]["lr"] == ssf["optimizer"]["weight_decay"] == 5e-2
    assert ssf["model"]["backbone"]["init_args"]["drop_path"] == 0.1
    assert settings("vtab1k_ssf", "clevr_dist", "--optimizer.lr", "0.1")["optimizer"]["lr"] == 0.1
    for task, scale in (("caltech101", 10), ("dtd", 0.01), ("smallnorb_ele", 1)):
        assert settings("vtab1k_bi_adaptformer", task)["peft"][0]["init_args"]["scale"] == scale
    assert settings("vtab1k_hydra", "svhn", "--peft", "LoRA")["peft"]["init_args"] == {}
    search = points("domains/vision/vtab1k_bi_adaptformer.yaml", [
        "--data.source", "real", "--data.protocol", "tune", "--over", "data.task=all", "--over",
        "peft.AdaptFormer.scale=0.01,0.1,1,10,100"])
    assert len(search) == 95
    assert [point.config["peft"][0]["init_args"]["scale"] for point in search[:5]] == [0.01, 0.1, 1, 10, 100]


@pytest.mark.parametrize("name", FILES)
def test_configurations_run(name: str, vtab: Tree, tmp_path: Path) -> None:
    root = vtab("cifar", 4)
    vtab("svhn", 4)
    found = points(f"domains/vision/{name}.yaml", ["--data.root", str(root), "--over", "data.task=cifar,svhn", *QUICK])
    assert many_runs.run(found, str(tmp_path / "run")) == 0
    for point in found:
        metrics = json.loads((tmp_path / "run" / point.name / "metrics.json").read_text())
        assert 0 <= metrics["metrics"]["test"]["accuracy"] <= 1 and metrics["metrics"]["validation"] == {}
        assert metrics["data"]["task"] == point.config["data"]["init_args"]["task"]
        assert metrics["data"]["normalise"] == (point.config["data"]["init_args"]["normalise"] or "none")
    text = " ".join(file.read_text() for file in (tmp_path / "run").glob("table.*") if file.suffix != ".png")
    assert "cifar" in text and "natural mean" in text


def test_tuning_tests_nothing(vtab: Tree, tmp_path: Path) -> None:
    root = vtab("cifar", 4)
    (root / "cifar" / "test.txt").unlink()
    point = points("domains/vision/vtab1k.yaml", ["--data.root", str(root), "--data.protocol", "tune", *QUICK])[0]
    metrics = run.execute(point, tmp_path / "run")
    assert metrics["metrics"]["test"] == {} and "accuracy" in metrics["metrics"]["validation"]
    assert metrics["status"] == "finished" and "val200" in metrics["data"]["name"]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures of curves, which take longer than training here."""
    monkeypatch.setattr("core.report.plots.save_figure", lambda *figure_and_path, **options: None)


class Killed(BaseException):
    """Stands for a kill: nothing below may catch it."""


@pytest.mark.usefixtures("undrawn")
def test_killed_in_its_second_task_a_run_goes_on(vtab: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = vtab("cifar", 4)
    vtab("dtd", 4)
    found = points("domains/vision/vtab1k.yaml", [
        "--data.root", str(root), "--data.augment", "crop_flip", "--data.batch_size", "4", "--over",
        "data.task=cifar,dtd", *QUICK, "--trainer.checkpoint_every_n_steps", "2"])
    assert many_runs.run(found, str(tmp_path / "whole")) == 0
    save = AtomicCheckpointIO.save_checkpoint
    written = 0

    def dying(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        nonlocal written
        save(self, checkpoint, path, storage_options)
        written += 1
        if "task=dtd" in str(path) and checkpoint["global_step"] == 4:  # in the middle of the second epoch
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", dying)
        with pytest.raises(Killed):
            many_runs.run(found, str(tmp_path / "broken"))
    assert written > 2
    first = tmp_path / "broken" / found[0].name / "metrics.json"
    before = first.stat().st_mtime_ns
    assert json.loads((tmp_path / "broken" / found[1].name / "metrics.json").read_text())["status"] == "running"
    assert many_runs.run(found, str(tmp_path / "broken")) == 0
    assert first.stat().st_mtime_ns == before  # the finished task is not run again
    for point in found:
        ours, theirs = (tmp_path / name / point.name for name in ("broken", "whole"))
        assert (ours / "adapter" / "adapter.safetensors").read_bytes() == (
            theirs / "adapter" / "adapter.safetensors").read_bytes()
        assert json.loads((ours / "metrics.json").read_text())["metrics"] == json.loads(
            (theirs / "metrics.json").read_text())["metrics"]
