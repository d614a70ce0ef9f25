"""Stages of a run: methods with stages of their own in them, other tasks and data, objectives, repetitions."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_run
from core.cli.entry import main
from core.config import points, rehearse
from core.config.page import fields_text
from core.errors import ScionError
from core.training.assemble import make_methods
from core.training.run import execute
from core.training.stage_checks import check_stages
from core.training.stages import stages_of
from tests.core.tiny_run import PointOf, child, finish, results, tiny_domain, weights

MORE = '''

class Halves(Squares):
    """Two classes of the same pictures."""

    def load(self):
        super().load()
        for data in (self.train_set, self.validation_set, self.test_set):
            data.tensors = (data.tensors[0], data.tensors[1] % 2)
        self.classes = ["left", "right"]


class SameViT(SmallViT):
    """Another class around the same encoder."""


class OtherViT(SmallViT):
    def __init__(self, name="small", pretrained=False):
        super().__init__(name, pretrained)
        with torch.no_grad():
            self.model.blocks[0].attn.qkv.weight.mul_(1.5)


__all__ = ["Halves", "OtherViT", "SameViT", "SmallViT", "Squares"]
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        file = tiny_domain(patch, tmp_path_factory.mktemp("path"), "stages_of_squares", MORE)
        file.write_text(file.read_text().replace("max_epochs: 3", "max_epochs: 1"))
        yield file


@pytest.fixture
def point_of(config: Path) -> PointOf:
    return lambda *overrides: points(str(config), list(overrides))[0]


def stages(**settings: str) -> list[str]:
    words: list[str] = []
    for name, text in settings.items():
        words += [f"--stages.{name}", text]
    return words


def tensors(folder: Path, stage: str = "") -> dict[str, Tensor]:
    home = folder / "stages" / stage if stage else folder
    return load_file(home / "adapter" / "adapter.safetensors")


def of_method(name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in found.items() if key.startswith(f"peft.{name}.")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


CHOSEN = "{class: SensitivityTuning, density: 0.3}"
LTSFT = "{peft: {class: LTSFT, count: 60}}"


def test_a_stage_whose_method_has_stages(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of(*stages(language="{peft: LanguageAdapter}", ranking=LTSFT, last="{peft: LoRA, start: ranking}"))
    metrics = execute(point, tmp_path)
    assert list(metrics["stages"]) == ["language", "ranking.dense", "ranking.sparse", "last"]
    assert {path.name for path in (tmp_path / "stages").iterdir()} == set(metrics["stages"])
    rows = json.loads((tmp_path / "history.json").read_text())
    assert [row["stage"] for row in rows] == list(metrics["stages"])
    for stage in metrics["stages"]:
        assert (tmp_path / "stages" / stage / "checkpoints" / "last.ckpt").is_file()
    trained = {name: stage["parameters"]["method"] for name, stage in metrics["stages"].items()}
    assert trained["ranking.dense"] > 9000 and trained["ranking.sparse"] == 60
    language, sparse, last = (tensors(tmp_path, name) for name in ("language", "ranking.sparse", "last"))
    assert same(of_method("LanguageAdapter", language), of_method("LanguageAdapter", last))
    assert same(of_method("LTSFT", sparse), of_method("LTSFT", last)) and of_method("LTSFT", last)
    tuner = load_run(str(tmp_path))
    assert [method.name for method in tuner.methods] == ["LanguageAdapter", "LTSFT", "LoRA"]


def test_alone_it_is_what_it_is_as_a_stage(point_of: PointOf, tmp_path: Path) -> None:
    execute(point_of("--peft", "LTSFT"), tmp_path / "run")
    execute(point_of(*stages(mask="{peft: LTSFT}")), tmp_path / "stage")
    assert weights(tmp_path / "run") == weights(tmp_path / "stage")


def test_a_method_that_is_carried_on_has_its_stages_behind_it(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of("--peft", "LTSFT", *stages(one="{}", two="{}", anew="{start: base}"))
    assert [stage.name for stage in stages_of(point)] == [
        "one.dense", "one.sparse", "two", "anew.dense", "anew.sparse"]
    execute(point_of("--peft", "{class: LTSFT, count: 60}", *stages(one="{}", two="{}")), tmp_path)
    before, after = tensors(tmp_path, "one.sparse"), tensors(tmp_path)
    places = [name for name in of_method("LTSFT", before) if not before[name].is_floating_point()]
    assert places and all(torch.equal(before[name], after[name]) for name in places)
    assert not same(of_method("LTSFT", before), of_method("LTSFT", after))


KINDS = {
    "own stages": stages(language="{peft: LanguageAdapter}", ranking="{peft: LTSFT}"),
    "repeated": stages(first="{}", again="{peft: {class: LoRA, name: more}, repeat: 2}"),
    "prepares": ["--peft", CHOSEN, *stages(ready="{objective: none}", fit="{}")],
    "on what methods add": ["--peft", "{class: LTSFT, count: 60, l1_sparse: 100}",
                            *stages(mask="{}", small="{objective: method}")],
}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=() if kind in ("own stages", "prepares") else pytest.mark.slow) for kind in KINDS])
def test_killed_and_gone_on(point_of: PointOf, tmp_path: Path, kind: str) -> None:
    """In mid-epoch of a later stage: each has four checkpoints."""
    point = point_of(*KINDS[kind])
    execute(point, tmp_path / "unbroken")
    expected = results(tmp_path / "unbroken")
    stop = 2 if kind == "prepares" else 6
    os.waitpid(child(point, tmp_path / "killed", stop), 0)
    finish(point, tmp_path / "killed")
    assert results(tmp_path / "killed") == expected


def test_repeated_is_written_down_again(point_of: PointOf, tmp_path: Path) -> None:
    execute(point_of(*stages(one="{}"), "--stages.one.repeat", "2"), tmp_path / "repeated")
    execute(point_of(*stages(a="{}", b="{}")), tmp_path / "written")
    assert weights(tmp_path / "repeated") == weights(tmp_path / "written")
    record = json.loads((tmp_path / "repeated" / "metrics.json").read_text())
    assert list(record["stages"]) == ["one.1", "one.2"]


def test_on_what_methods_add_alone(point_of: PointOf, tmp_path: Path) -> None:
    execute(point_of(*KINDS["on what methods add"]), tmp_path)
    before, after = tensors(tmp_path, "mask.sparse"), tensors(tmp_path, "small")
    values = [name for name in of_method("LTSFT", before) if before[name].is_floating_point()]
    assert sum(float(after[name].abs().sum()) for name in values) < sum(float(before[name].abs().sum())
                                                                        for name in values)
    heads = [name for name in before if name.startswith("outside.")]
    assert heads and all(torch.equal(before[name], after[name]) for name in heads)  # no loss of the task reaches it
    [row] = [row for row in json.loads((tmp_path / "history.json").read_text()) if row["stage"] == "small"]
    assert row["train/loss"] == row["train/loss/LTSFT"] and row["train/loss"] < 1 < row["validation/loss"]


def test_prepared_without_training(point_of: PointOf, tmp_path: Path) -> None:
    point = point_of(*KINDS["prepares"])
    metrics = execute(point, tmp_path / "run")
    ready = json.loads((tmp_path / "run" / "stages" / "ready" / "adapter" / "adapter.json").read_text())
    after = json.loads((tmp_path / "run" / "adapter" / "adapter.json").read_text())
    assert ready["methods"][0]["structure"]["plan"] == after["methods"][0]["structure"]["plan"] != {}
    assert not (tmp_path / "run" / "stages" / "ready" / "checkpoints" / "last.ckpt").exists()
    assert metrics["stages"]["ready"]["metrics"] == {"validation": {}, "test": {}}
    before = tensors(tmp_path / "run", "ready")
    values = [name for name in before if name.endswith("values")]
    assert values and all(not before[name].any() for name in values)  # not one step was made
    alone = point_of("--peft", CHOSEN, *stages(ready="{objective: none}"))
    assert execute(alone, tmp_path / "alone")["metrics"]["test"]  # the last stage is measured all the same


def test_other_data_another_head_the_same_encoder(config: Path, point_of: PointOf, tmp_path: Path) -> None:
    halves = "data: {class: Halves, batch_size: 8}"
    model = "model: {backbone: SameViT, task: Classification}"
    point = point_of(*stages(first="{}", second=f"{{{halves}, {model}, peft: {{class: LoRA, name: second}}}}"))
    metrics = execute(point, tmp_path / "run")
    assert metrics["parameters"]["head"] == 2 * 17 and metrics["stages"]["first"]["parameters"]["head"] == 4 * 17
    first, last = tensors(tmp_path / "run", "first"), tensors(tmp_path / "run")
    assert same(of_method("LoRA", first), of_method("LoRA", last))
    assert "has other shapes" in (tmp_path / "run" / "log.txt").read_text()
    tuner = load_run(str(tmp_path / "run"))
    assert list(tuner.info.classes) == ["left", "right"]
    assert main(["test", str(tmp_path / "run"), "--data.batch_size", "4"]) == 0
    measured = json.loads((tmp_path / "run" / "tests" / "0" / "metrics.json").read_text())
    assert measured["metrics"]["test"] == pytest.approx(metrics["metrics"]["test"], abs=1e-6)

    asked = point_of(*stages(first="{}", second=f"{{{halves}, carry: [weights, head]}}"))
    with pytest.raises(ScionError, match="stages.second.carry: the head of first has .*; write carry: .weights."):
        execute(asked, tmp_path / "asked")
    other = point_of(*stages(first="{}", second="{model: {backbone: OtherViT}}"))
    with pytest.raises(ScionError, match="stages.second: its encoder is another one than that of first"):
        execute(other, tmp_path / "other")
    assert not (tmp_path / "asked").exists() and not (tmp_path / "other").exists()
    anew = point_of(*stages(first="{}", second="{model: {backbone: OtherViT}, start: base}"))
    check_stages(anew, stages_of(anew), lambda config: make_methods(config, anew.domain))


@pytest.mark.parametrize(("words", "text"), [
    (stages(a="{objective: method}"), "stages.a.objective: 'method' .* and LoRA adds nothing"),
    (stages(a="{objective: none}"), "stages.a.objective: 'none' is for methods that compute .* and LoRA does not"),
    (stages(a="{objective: nothing}"), "stages.a.objective: must be one of 'task', 'method', 'none', not 'nothing'"),
    (stages(a="{repeat: 0}"), "stages.a.repeat: must be a whole number of at least 1"),
    (stages(a="{objctive: none}"), "stages.a.objctive: unknown key .did you mean 'objective'"),
    ([*stages(a="{peft: SensitivityTuning, objective: none}"), "--select", "best"], "stages.a.select: 'best' chooses"),
    (stages(a="{peft: [LTSFT, {class: LoFiT}]}"), "LTSFT has the stages dense, sparse and LoFiT"),
])
def test_what_is_refused_before_anything_is_built(config: Path, words: list[str], text: str) -> None:
    with pytest.raises(ScionError, match=text):
        rehearse(points(str(config), words))


@pytest.mark.parametrize(("words", "text"), [
    ("{peft: LTSFT, repeat: 2}", "stages.a.repeat: LTSFT has stages of its own .dense, sparse."),
    ("{peft: [LTSFT, SensitivityTuning], objective: none}", "stages.a.objective: LTSFT has stages of its own"),
])
def test_what_methods_with_stages_cannot_do(point_of: PointOf, tmp_path: Path, words: str, text: str) -> None:
    with pytest.raises(ScionError, match=text):
        execute(point_of(*stages(a=words)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_page_of_fields(point_of: PointOf) -> None:
    text = fields_text(point_of(*stages(ranking="{repeat: 2}")))
    assert "--stages.ranking.repeat  int = 2" in text
    assert "--stages.ranking.objective  task | method | none = task" in text
    assert "--stages.NAME.start  previous | base | STAGE = previous" in fields_text(point_of())


PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_page_on_composition(config: Path, tmp_path: Path, block: str) -> None:
    """What it writes down is a configuration, and its stages are what it says."""
    file = tmp_path / "page.yaml"
    file.write_text(config.read_text().replace("peft: LoRA\n", "") + block)
    [point] = points(str(file))
    if "stages" in point.config:
        rehearse([point])
        names = [stage.name for stage in stages_of(point)]
        assert names == ["language", "ranking.dense", "ranking.sparse", "joint"]
    else:
        assert len(BLOCKS) == 4
