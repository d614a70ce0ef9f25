"""Patches of whole models: records that are complete, architectures, heads beside the backbone, and the command."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core import dissect
from core.backbone import Backbone
from core.cli import main
from core.errors import ScionError
from core.patch import Patch
from core.peft import make as make_method
from core.tasks import Classification
from core.training.finetuner import FineTuner
from core.training.run_record import save_run_adapter
from tests.models import make
from tests.toolkit import randomize, same, snapshot


class Around(nn.Module):
    """The commonest layout of a user's own module."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model, self.head = make("bert", seed=seed), nn.Linear(32, 3)


class Vision(Backbone):
    """A tiny ViT as a domain's backbone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model, self.dim, self.origin = make("timm_vit", seed=seed), 32, {}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model(inputs)


def tuner_of(seed: int = 0, classes: tuple[str, ...] = ("a", "b", "c"), bits: int | None = None) -> FineTuner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FineTuner(Vision(seed), Classification(bits=bits), list(classes))


def trained(model: nn.Module, name: str = "LoRA", **options: Any) -> None:
    randomize(make_method(name, options).attach(model))


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = json.loads((folder / "patch.json").read_text())
    change(record)
    (folder / "patch.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------------------------- records


def test_a_record_says_all_that_the_patch_holds(tmp_path: Path) -> None:
    """A tensor that is gone from the file, or a key from the record, is told; so is a head."""
    tuner = tuner_of()
    trained(tuner.backbone)
    folder = Patch.take(tuner).save(tmp_path)
    file, record = tmp_path / "patch.safetensors", json.loads((tmp_path / "patch.json").read_text())
    tensors = load_file(file)
    assert record["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    heads = [name for name in tensors if name.startswith("beside:")]
    assert len(heads) == 2
    for name in (heads[0], sorted(tensors)[-1]):
        save_file({key: value for key, value in tensors.items() if key != name}, file)
        with pytest.raises(ScionError, match="missing, which the record names"):
            Patch.load(folder)
    save_file({**tensors, "head:more": torch.zeros(2)}, file)
    with pytest.raises(ScionError, match="holds head:more, which the record does not name"):
        Patch.load(folder)
    save_file(tensors, file)
    for key in ("architecture", "tensors", "sha256"):
        edited(folder, lambda found, key=key: found.pop(key))
        with pytest.raises(ScionError, match=f"its {key} is gone"):
            Patch.load(folder)
        (folder / "patch.json").write_text(json.dumps(record))
    edited(folder, lambda found: found["shapes"].popitem())
    with pytest.raises(ScionError, match="does not name"):
        Patch.load(folder)


def test_patches_of_earlier_versions_load(tmp_path: Path) -> None:
    model = make("bert")
    trained(model)
    patch = Patch.take(model)
    patch.save(tmp_path)
    for key in ("architecture", "tensors", "sha256"):  # the last two versions
        edited(tmp_path, lambda found, key=key: found.pop(key))
        if key != "architecture":
            assert Patch.load(tmp_path).changes.keys() == patch.changes.keys()


# ------------------------------------------------------------------------------------------------- architectures


def test_another_architecture_is_refused_though_all_names_fit() -> None:
    """Another base of the same architecture is a warning, one with another block or parameter an error."""
    model = make("bert")
    trained(model, layers=(0,))
    patch = Patch.take(model)
    with pytest.warns(UserWarning, match="carried from base"):
        patch.apply(make("bert", seed=1))
    shorter, other = make("bert"), make("bert")
    del shorter.get_submodule("model.encoder.layer" if hasattr(shorter, "model") else "encoder.layer")[1]  # type: ignore[operator]
    other.get_submodule(dissect(other).inputs.path).register_parameter("extra", nn.Parameter(torch.zeros(2)))
    for wrong in (shorter, other):
        values = snapshot(wrong)
        with pytest.raises(ScionError, match=r"another architecture: \S*Bert\S* \w{16}, and this is \S*Bert\S* \w{16}"):
            patch.apply(wrong)
        assert same(values, snapshot(wrong))
    trained(shorter)
    with pytest.raises(ScionError, match="two architectures"):
        patch.__add__(Patch.take(shorter))


def test_what_merging_makes_anew_is_no_change() -> None:
    """A merged shift of maps without a bias makes one, which no other base has."""
    model = make("llama")
    trained(model, "SSF", targets=("q",))
    values = snapshot(model)
    with pytest.raises(ScionError, match=r"merging makes .*bias.*, which the base does not have"):
        Patch.take(model)
    assert same(values, snapshot(model))


# ------------------------------------------------------------------------------------------------- heads beside


@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.filterwarnings("ignore:the patch is carried")
def test_the_head_of_a_finetuner_travels(bits: int | None, tmp_path: Path) -> None:
    tuned, inputs = tuner_of(bits=bits).eval(), torch.randn(2, 3, 32, 32)
    trained(tuned.backbone)
    patch = Patch.load(Patch.take(tuned).save(tmp_path))
    expected = tuned(inputs)
    fresh, other = tuner_of(3, bits=bits).eval(), tuner_of(4, bits=bits).eval()
    fresh.backbone.load_state_dict(Vision().state_dict())
    for one in (fresh, other):
        values = snapshot(one)
        applied = patch.apply(one)
        assert torch.allclose(one.task(torch.ones(1, 32)), tuned.task(torch.ones(1, 32)), atol=1e-6)
        if one is fresh:
            assert torch.allclose(one(inputs), expected, atol=1e-5)
        applied.remove()
        assert same(values, snapshot(one))
    with pytest.raises(ScionError, match=r"it is for the classes a, b, c, the model's for x, y, z; give the backbone"):
        patch.apply(tuner_of(classes=("x", "y", "z"), bits=bits))
    with pytest.warns(UserWarning, match="head .* is not applied: it belongs beside the backbone"):
        patch.apply(Vision())


def test_the_head_of_ones_own_module_travels() -> None:
    module, fresh = Around(), Around()
    trained(module.model)
    patch = Patch.take(module)
    assert patch.beside.keys() == {"head.weight", "head.bias"}
    values = snapshot(fresh)
    applied = patch.apply(fresh)
    assert torch.equal(fresh.head.weight, module.head.weight)
    applied.remove()
    assert same(values, snapshot(fresh))
    fresh.head = nn.Linear(32, 4)
    values = snapshot(fresh)
    with pytest.raises(ScionError, match=r"head.weight is \[3, 32\] in the file, \[4, 32\] here"):
        patch.apply(fresh)
    assert same(values, snapshot(fresh))


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with trained LoRA on the nano."""
    from domains.audio import AST

    folder = tmp_path_factory.mktemp("runs") / "one"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        tuner = FineTuner(AST("nano", frames=48), Classification(), ["hiss", "hum"])
    trained(tuner.backbone, layers=(0,), rank=2)
    save_run_adapter(tuner, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def patch(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches") / "one"
    assert main(["patch", "take", str(run), str(folder)]) == 0
    return folder


@pytest.mark.filterwarnings("ignore:the patch is carried")
def test_take_and_apply_give_what_merge_gives(run: Path, patch: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "apply", str(patch), "nano", str(tmp_path / "patched")]) == 0
    assert "a plain ASTModel, head.safetensors and labels.json" in capsys.readouterr().out
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    names = sorted(file.name for file in (tmp_path / "merged").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "patched").iterdir())
    for name in ("model.safetensors", "head.safetensors"):
        one, other = load_file(tmp_path / "merged" / name), load_file(tmp_path / "patched" / name)
        assert one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)
    assert json.loads((tmp_path / "patched" / "labels.json").read_text())["classes"] == ["hiss", "hum"]
    assert main(["patch", "apply", str(patch), str(run), str(tmp_path / "twice"), "--scale", "-1"]) == 0
    plain = load_file(Path("domains/audio/nano/model.safetensors"))
    back = load_file(tmp_path / "twice" / "model.safetensors")
    name = next(name for name in plain if "layer.0" in name and "query.weight" in name)
    assert torch.allclose(plain[name], back[name], atol=1e-5)
    assert main(["patch", "apply", str(patch), str(tmp_path / "merged"), str(tmp_path / "folder")]) == 0


def test_add(patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "add", str(patch), str(patch), str(tmp_path / "sum")]) == 2
    assert "--head" in capsys.readouterr().err and not (tmp_path / "sum").exists()
    assert main(["patch", "add", str(patch), str(patch), str(tmp_path / "sum"), "--scale", "2", "-1",
                 "--head", "first"]) == 0
    one, total = Patch.load(patch), Patch.load(tmp_path / "sum")
    assert total.beside.keys() == one.beside.keys() and total.model == one.model
    for name, change in one.changes.items():
        assert torch.allclose(change.dense(), total.changes[name].dense(), atol=1e-6)


@pytest.mark.parametrize(("words", "told"), [
    (["take", "nowhere", "OUT"], "adapter.json"), (["take", "RUN", "OUT", "--rank", "0"], "at least 1"),
    (["apply", "nowhere", "nano", "OUT"], "patch.json"), (["apply", "PATCH", "nanoo", "OUT"], "nanoo"),
    (["add", "PATCH", "RUN", "OUT"], "patch.json"), (["take", "RUN", "PATCH"], "not empty"),
    (["apply", "PATCH", "FOLDER", "OUT"], "config.json")])
def test_mistakes_are_one_line_and_leave_nothing(words: list[str], told: str, run: Path, patch: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    places = {"OUT": tmp_path / "out", "RUN": run, "PATCH": patch, "FOLDER": tmp_path / "empty"}
    (tmp_path / "empty").mkdir()
    assert main(["patch", *(str(places.get(word, word)) for word in words)]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert told in line and not (tmp_path / "out").exists()


def test_a_record_that_asks_for_any_size(patch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(patch, tmp_path / "patch")
    edited(tmp_path / "patch", lambda record: record["model"]["backbone"].update(frames=10**9))
    assert main(["patch", "apply", str(tmp_path / "patch"), "nano", str(tmp_path / "out")]) == 2
    assert "numbers" in capsys.readouterr().err and not (tmp_path / "out").exists()
