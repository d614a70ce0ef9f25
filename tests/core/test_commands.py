"""The subcommands beside ``run``, on a tiny spectrogram transformer in a local folder and a few seconds of noise."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from core import load_adapter
from core.cli import commands, main
from core.errors import ScionError
from core.peft import make
from core.tasks import Classification
from core.training.finetuner import FineTuner
from core.training.load_run import load_run
from core.training.run_record import save_run_adapter

FRAMES = 48


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spectrogram transformer of two blocks, as transformers saves it."""
    from transformers import ASTConfig, ASTModel

    folder = tmp_path_factory.mktemp("base") / "ast"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ASTModel(ASTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, patch_size=16,
            frequency_stride=16, time_stride=16, max_length=FRAMES, num_mel_bins=128))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in ESC-50's layout: two classes, three folds, two clips each."""
    import soundfile

    root = tmp_path_factory.mktemp("sounds") / "data"
    (root / "audio").mkdir(parents=True)
    (root / "meta").mkdir()
    rng = np.random.default_rng(0)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for fold in (1, 2, 3):
        for target, category in ((0, "hiss"), (1, "hum")):
            for take in "AB":
                name = f"{fold}-1-{take}-{target}.wav"
                wave = rng.standard_normal(6000) * 0.1 if target == 0 else np.sin(np.arange(6000) * 0.05)
                soundfile.write(root / "audio" / name, wave.astype(np.float32), 16_000)
                lines.append(f"{name},{fold},{target},{category},False,1,{take}")
    (root / "meta" / "esc50.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def config(base: Path, sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump({
        "domain": "audio",
        "model": {"backbone": {"class": "AST", "name": str(base)}, "task": "Classification"},
        "data": {"class": "ESC50", "root": str(sounds), "frames": FRAMES, "batch_size": 4,
                 "cache": str(file.parent / "cache")},
        "peft": {"class": "LoRA", "rank": 2}, "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }))
    return file


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ``lightning run`` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(["run", str(config), "--run_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run_of(base: Path, config: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run folder with given methods, their tensors moved away from the start."""

    def build(*names: str, **options: Any) -> Path:
        from domains.audio import AST

        tuner = FineTuner(AST(str(base)), Classification(), ["hiss", "hum"])
        torch.manual_seed(0)
        for index, name in enumerate(names):
            method = make(name, {"name": f"{name}{index}", **options}).attach(tuner.backbone)
            with torch.no_grad():
                for tensor in method.trainable().values():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
        folder = tmp_path / "-".join(names)
        save_run_adapter(tuner, folder / "adapter")
        shutil.copy(config, folder / "config.yaml")
        return folder

    return build


# ------------------------------------------------------------------------------------------------- methods


def test_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.methods(None, False) == 0
    assert "LoRA" in capsys.readouterr().out
    commands.methods("LoRA", True)
    assert json.loads(capsys.readouterr().out)["name"] == "LoRA"
    commands.methods(None, True)
    assert {card["name"] for card in json.loads(capsys.readouterr().out)} >= {"LoRA", "BitFit"}
    with pytest.raises(ScionError, match="no method is called"):
        commands.methods("Nothing", False)


# ------------------------------------------------------------------------------------------------- roles


@pytest.mark.parametrize(("model", "wanted"), [
    ("audio:AST:nano", ["ASTModel, 4 blocks", "[128, 128]", "model.layers.3.attention.q_proj", "query projection"]),
    ("vision:TimmBackbone:nano", ["VisionTransformer, 4 blocks", "[384, 128]", "model.blocks.3.attn.qkv"]),
    ("MIT/ast-finetuned-audioset-10-10-0.4593", ["ASTModel, 12 blocks", "[768, 768]", "12 heads x 64"]),
    ("timm/vit_base_patch16_224", ["VisionTransformer, 12 blocks", "blocks.11.attn.qkv", "[2304, 768]"]),
    ("swin_tiny_patch4_window7_224", ["SwinTransformer, 12 blocks", "[96, 96] .. [768, 768]", "downsample"]),
])
def test_roles(model: str, wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.roles(model) == 0
    printed = capsys.readouterr().out
    for text in wanted:
        assert text in printed


def test_roles_of_folders(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.roles(str(base))
    assert "ASTModel, 2 blocks" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "num_classes": 0}))
    commands.roles(str(tmp_path))
    assert "VisionTransformer, 12 blocks" in capsys.readouterr().out


def test_roles_reads_no_weights() -> None:
    assert all(parameter.is_meta for parameter in commands.shapes_of("audio:AST:nano").parameters())


@pytest.mark.parametrize(("model", "wanted"), [
    ("vit_base_patch16_22", "did you mean 'vit_base_patch16_224'"), ("someone/something", "nothing is downloaded"),
    ("timm/nothing_at_all", "timm has no model"), ("audio:ATS:nano", "did you mean 'audio:AST'"),
    ("nano", "write one of audio:AST:nano, vision:TimmBackbone:nano")])
def test_roles_refuses(model: str, wanted: str) -> None:
    with pytest.raises(ScionError) as caught:
        commands.roles(model)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_roles_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match=r"no config\.json"):
        commands.roles(str(tmp_path))


# ------------------------------------------------------------------------------------------------- describe


def test_describe(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.describe(str(config), [], True) == 0
    counted = json.loads(capsys.readouterr().out)
    # q and v of two blocks, rank 2, width 32; and a head of two classes
    assert counted["parameters"]["method"] == 2 * 2 * 2 * (32 + 32)
    assert counted["parameters"]["head"] == 2 * 33
    assert counted["batch"] == [4, FRAMES, 128]
    assert counted["kept_bytes"] > 0 and counted["forward_flops"] > 0


def test_describe_follows_overrides_and_axes(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands.describe(str(config), ["--over", "peft=LinearProbe,BitFit"], True)
    first, second = json.loads(capsys.readouterr().out)
    assert first["axes"] == {"peft": "LinearProbe"} and first["parameters"]["method"] == 0
    assert second["parameters"]["method"] > 0
    commands.describe(str(config), ["--peft", "BitFit"], False)
    assert "BitFit" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- merge


def features(model: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(inputs).last_hidden_state


def test_merge_gives_a_plain_checkpoint(finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import ASTModel, AutoModel

    out = tmp_path / "new" / "merged"
    assert commands.merge(str(finished), str(out)) == 0
    inputs = torch.randn(2, FRAMES, 128, generator=torch.Generator().manual_seed(1))
    tuner = load_run(str(finished))
    before = features(tuner.backbone.model, inputs)
    commands.merge_methods(tuner)
    merged = features(tuner.backbone.model, inputs)
    torch.testing.assert_close(merged, before, rtol=1e-5, atol=1e-5)
    kinds: tuple[Any, ...] = (ASTModel, AutoModel)
    for cls in kinds:
        model, report = cls.from_pretrained(out, attn_implementation="sdpa", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.equal(features(model.eval(), inputs), merged)
    head = torch.nn.Linear(32, 2)
    saved = load_file(out / "head.safetensors")
    head.load_state_dict({name.rpartition(".")[2]: tensor for name, tensor in saved.items()})
    with torch.no_grad():
        torch.testing.assert_close(head(merged.mean(1)), tuner(inputs))
    assert json.loads((out / "labels.json").read_text())["classes"] == ["hiss", "hum"]
    assert [file.name for file in out.parent.iterdir()] == ["merged"]  # no temporary folder is left


@pytest.mark.parametrize("names", [("LoRA", "LoRA"), ("LoRA", "BitFit"), ("FullFineTuning",)])
def test_stacks_merge_in_order(run_of: Callable[..., Path], names: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import ASTModel

    run = run_of(*names)
    inputs = torch.randn(2, FRAMES, 128, generator=torch.Generator().manual_seed(1))
    stacked = features(load_run(str(run)).backbone.model, inputs)
    commands.merge(str(run), str(tmp_path / "out"))
    plain = ASTModel.from_pretrained(tmp_path / "out", attn_implementation="sdpa").eval()
    torch.testing.assert_close(features(plain, inputs), stacked, rtol=1e-4, atol=1e-5)


def test_methods_that_cannot_be_merged_are_named(run_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="Houlsby1 cannot be written into the weights"):
        commands.merge(str(run_of("LoRA", "Houlsby")), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_product_is_never_written(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.peft.weights.lora import LoRAGraft

    monkeypatch.setattr(LoRAGraft, "merged", lambda self, weight: weight + 1)
    with pytest.raises(ScionError, match="the merged weight gives other values"):
        commands.merge(str(finished), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_merge_never_writes_into_what_is_there(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(ScionError, match="not empty"):
        commands.merge(str(finished), str(tmp_path / "full"))
    (tmp_path / "empty").mkdir()
    commands.merge(str(finished), str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_interrupted_merge_leaves_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core.cli.merge.save_plain", fail)
    with pytest.raises(KeyboardInterrupt):
        commands.merge(str(finished), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


class Wrapped(torch.nn.Module):
    """What ``save_plain`` sees of a tuner."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.dim = model, 8


@pytest.mark.parametrize("library", ["timm", "none"])
def test_other_libraries_models_are_saved_as_theirs(library: str, tmp_path: Path) -> None:
    from types import SimpleNamespace

    import timm
    from safetensors.torch import load_model

    options: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **options) if library == "timm" else torch.nn.Linear(3, 3)
    task = Classification()
    task.build(8, ["a", "b"])
    tuner: Any = SimpleNamespace(backbone=Wrapped(model), task=task, hparams={})
    commands.save_plain(tuner, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options) if library == "timm" \
        else torch.nn.Linear(3, 3)
    if library == "none":
        load_model(again, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------- export, import


def test_export_opens_in_peft_and_comes_back(finished: Path, base: Path, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    import peft
    from transformers import ASTModel

    assert main(["export", str(finished), str(tmp_path / "there"), "--format", "peft"]) == 0
    assert "a peft adapter (LORA) for ASTModel; a task's head is no part of it" in capsys.readouterr().out
    inputs = torch.randn(2, FRAMES, 128, generator=torch.Generator().manual_seed(1))
    ours = load_run(str(finished)).backbone.model
    theirs: Any = peft.PeftModel.from_pretrained(
        ASTModel.from_pretrained(base, attn_implementation="sdpa"), str(tmp_path / "there")).eval()
    torch.testing.assert_close(features(theirs, inputs), features(ours, inputs), rtol=0, atol=1e-5)
    assert (features(ASTModel.from_pretrained(base).eval(), inputs) - features(ours, inputs)).abs().max() > 1e-5

    assert main(["import", str(tmp_path / "there"), str(tmp_path / "back"), "--model", f"audio:AST:{base}"]) == 0
    assert "LoRA(rank=2" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "back"), str(tmp_path / "again"), "--model", f"audio:AST:{base}"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert main(["export", str(tmp_path / "back"), str(tmp_path / "plain")]) == 2
    assert "does not say which backbone it is for; name it with --model" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "back"), "--model", "nano"]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_import_onto_a_folder_of_transformers(base: Path, finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    commands.export(str(finished), str(tmp_path / "there"), None)
    commands.import_(str(tmp_path / "there"), str(tmp_path / "back"), str(base))
    model = AutoModel.from_pretrained(base).eval()
    load_adapter(tmp_path / "back", model)
    inputs = torch.randn(2, FRAMES, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(features(model, inputs), features(load_run(str(finished)).backbone.model, inputs),
                               rtol=0, atol=1e-5)
    with pytest.raises(ScionError, match="no config.json"):
        commands.import_(str(tmp_path / "there"), str(tmp_path / "other"), str(tmp_path))


# ------------------------------------------------------------------------------------------------- predict


def test_predict(finished: Path, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in sorted((sounds / "audio").iterdir())][:3]
    assert commands.predict(str(finished), files, False) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == files
    assert all(label in ("hiss", "hum") and 0.5 <= float(score) <= 1 for _, label, score in lines)
    commands.predict(str(finished), files, True)
    records = json.loads(capsys.readouterr().out)
    assert [record["label"] for record in records] == [line[1] for line in lines]
    assert set(records[0]["scores"]) == {"hiss", "hum"}


def test_predictions_in_a_file(finished: Path, sounds: Path, tmp_path: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in sorted((sounds / "audio").iterdir())][:3]
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    for name in ("p.csv", "p.jsonl", "p.npy"):
        assert commands.predict(str(finished), [files[0], str(bad), *files[1:]], False, out=str(tmp_path / name)) == 2
    table = list(csv.DictReader((tmp_path / "p.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    array = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert [row["file"] for row in table] == [files[0], str(bad), *files[1:]] and "bad.wav" in table[1]["error"]
    for row, line, numbers in zip(table, lines, array, strict=True):
        if row["error"]:
            assert np.isnan(numbers).all() and "probabilities" not in line
            continue
        assert [float(row["hiss"]), float(row["hum"])] == pytest.approx(numbers.tolist(), abs=1e-6)
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert line["label"] == ("hiss", "hum")[int(numbers.argmax())]

    assert commands.predict(str(finished), files, False, features=True, out=str(tmp_path / "f.npy")) == 0
    tuner = load_run(str(finished))
    data = commands.data_of(str(finished))
    with torch.inference_mode():
        expected = tuner.backbone(torch.stack([data.read(file) for file in files]))  # type: ignore[arg-type]
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected.numpy(), rtol=0, atol=1e-5)
    capsys.readouterr()
    for options, message in ((["--features"], "add --json, or --out"), (["--out", "x.txt"], "ends in .csv"),
                             (["--out", str(tmp_path / "no" / "x.csv")], "there is no folder")):
        assert main(["predict", str(finished), files[0], *options]) == 2
        assert message in capsys.readouterr().err


def test_predictions_do_not_depend_on_the_company(finished: Path, sounds: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(file) for file in sorted((sounds / "audio").iterdir())]  # more than a batch: with a progress bar
    commands.predict(str(finished), files, True)
    together = json.loads(capsys.readouterr().out)
    alone = []
    for file in files[:5]:
        commands.predict(str(finished), [file], True)
        alone += json.loads(capsys.readouterr().out)
    assert [(r["file"], r["label"]) for r in together[:5]] == [(r["file"], r["label"]) for r in alone]
    assert [r["score"] for r in together[:5]] == pytest.approx([r["score"] for r in alone], abs=2e-4)


def test_bad_files_are_named_and_the_others_labelled(finished: Path, sounds: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    bad, empty, folder = tmp_path / "bad.wav", tmp_path / "empty.wav", tmp_path / "folder"
    folder.mkdir()
    bad.write_text("no sound at all")
    empty.write_bytes(b"")
    good = next((sounds / "audio").iterdir())
    files = [str(file) for file in (bad, good, empty, tmp_path / "absent.wav", folder)]
    assert commands.predict(str(finished), files, False) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{good}\t") and len(out.splitlines()) == 1
    assert len(err.splitlines()) == 4
    for line, file in zip(err.splitlines(), [bad, empty, tmp_path / "absent.wav", folder], strict=True):
        assert str(file) in line
    assert commands.predict(str(finished), files, True) == 2
    records = json.loads(capsys.readouterr().out)
    assert [("error" in record) for record in records] == [True, False, True, True, True]


def test_predict_needs_no_dataset(finished: Path, sounds: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    run, file = tmp_path / "run", tmp_path / "one.wav"
    shutil.copytree(finished, run)
    shutil.copy(next((sounds / "audio").iterdir()), file)
    record = yaml.safe_load((run / "config.yaml").read_text())
    record["data"]["init_args"]["root"] = str(tmp_path / "gone")
    (run / "config.yaml").write_text(yaml.safe_dump(record))
    assert commands.predict(str(run), [str(file)], False) == 0
    assert capsys.readouterr().out.startswith(str(file))


def test_saved_state_of_the_data_is_given_back(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from domains.audio import ESC50

    seen: list[Any] = []
    monkeypatch.setattr(ESC50, "load_state", lambda self, state: seen.append(state), raising=False)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "data_state.json").write_text('{"mean": -4.0}')
    commands.data_of(str(run))
    assert seen == [{"mean": -4.0}]
    (run / "data_state.json").write_text("{")
    with pytest.raises(ScionError, match=r"data_state\.json: damaged"):
        commands.data_of(str(run))


def test_predict_refuses_what_is_no_run(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ScionError, match=r"no adapter\.json"):
        commands.predict(str(tmp_path), ["x.wav"], False)
    shutil.copytree(finished / "adapter", tmp_path / "run" / "adapter")
    with pytest.raises(ScionError, match=r"config\.yaml: missing"):
        commands.predict(str(tmp_path / "run"), ["x.wav"], False)
    with pytest.raises(ScionError, match="no files"):
        commands.predict(str(finished), [], False)


def test_errors_become_one_line_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path), "x.wav"]) == 2
    assert main(["merge", str(tmp_path), str(tmp_path / "out")]) == 2
    assert main(["roles", "no/such"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and all(line.startswith("lightning ") for line in err)


def test_values_of_the_command_line_are_what_yaml_says_but_for_lone_signs() -> None:
    from core.config import parse

    for text, value in (("3", 3), ("1e-3", 0.001), ("true", True), ("null", None), ("~", None), ('""', ""), ("", None),
                        ("[1, a]", [1, "a"]), ("|", "|"), (">", ">"), ("#", "#"), (";", ";"), (",", ","), ("0", 0)):
        assert parse(text) == value and type(parse(text)) is type(value), text


# ------------------------------------------------------------------------------------------------- a stranger's folders


@pytest.fixture
def strange(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoiled."""
    return Path(shutil.copytree(finished, tmp_path / "strange"))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on Python's path that leaves a trace when it is imported."""
    trace = tmp_path / "imported"
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sprung.py").write_text(f"open({str(trace)!r}, 'w').close()\nfrom domains.audio import ESC50\n"
                                                 "class Data(ESC50): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    return trace


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON or YAML file."""
    is_json = file.suffix == ".json"
    record = json.loads(file.read_text()) if is_json else yaml.safe_load(file.read_text())
    change(record)
    file.write_text(json.dumps(record) if is_json else yaml.safe_dump(record))


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command has left."""
    out, err = capsys.readouterr()
    lines = [text for text in err.splitlines() if text.startswith("lightning ")]
    assert out == "" and len(lines) == 1 and lines[0].isprintable() and "unexpected" not in lines[0], (out, err)
    return lines[0]


def test_a_run_imports_nothing_of_its_own(strange: Path, sounds: Path, trap: Path, capsys: pytest.CaptureFixture[str]
                                          ) -> None:
    sound = str(next((sounds / "audio").iterdir()))
    edit(strange / "config.yaml", lambda config: config["data"].update(class_path="sprung.Data"))
    assert main(["predict", str(strange), sound]) == 2
    assert "pass --trust" in line(capsys)
    assert main(["describe", str(strange / "config.yaml")]) == 2
    assert "pass --trust" in line(capsys)
    assert not trap.exists()
    assert main(["predict", str(strange), sound, "--trust"]) == 0
    assert trap.exists() and capsys.readouterr().out.startswith(sound)
    edit(strange / "config.yaml", lambda config: config.update(domain="audio.mini"))
    assert main(["predict", str(strange), sound]) == 2
    line(capsys)


@pytest.mark.parametrize("part, value, words", [
    ("backbone", {"class": "sprung:Data"}, "no domain is called 'sprung'"),
    ("backbone", {"class": "audio.backbones:AST"}, "no domain is called 'audio.backbones'"),
    ("backbone", {"class": "audio:ESC50"}, "is no Backbone"), ("backbone", {"class": "core.tasks:Task"}, "no Backbone"),
    ("backbone", {"class": "audio:import_module"}, "publishes no class"), ("backbone", {"class": ["audio:AST"]}, "no "),
    ("backbone", {"class": "os:system"}, "no domain"), ("backbone", {}, ""), ("backbone", "audio:AST", "mapping"),
    ("backbone", {"class": "audio:AST", "name": 5}, "5 is not a text"),
    ("backbone", {"class": "audio:AST", "name": "nano", "frames": 10**9}, "numbers with its recorded arguments"),
    ("backbone", {"class": "audio:AST", "trust_remote_code": True}, "no option 'trust_remote_code'"),
    ("task", {"class": "audio:AST"}, "is no Task"), ("task", {"class": "core:ScionError"}, "no domain"),
    ("task", {"class": "core.tasks:Embedding", "dim": 10**9}, ""), ("classes", ["hiss", 3], "3 is not a text"),
    ("classes", ["a"] * 10**5, "in the file"), ("seed", "x", "'x' is not"), ("multilabel", None, "None is not")])
def test_what_an_adapter_says_of_its_model(strange: Path, part: str, value: Any, words: str, trap: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    edit(strange / "adapter" / "adapter.json", lambda record: record["model"].update({part: value}))
    assert main(["merge", str(strange), str(strange.parent / "out")]) == 2
    assert words in line(capsys)
    assert not trap.exists() and not (strange.parent / "out").exists()


@pytest.mark.parametrize("file", ["config.yaml", "data_state.json", "metrics.json", "adapter/adapter.json",
                                  "adapter/adapter.safetensors"])
def test_a_pipe_in_a_run(strange: Path, file: str, sounds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (strange / file).unlink()
    os.mkfifo(strange / file)
    code = main(["predict", str(strange), str(next((sounds / "audio").iterdir()))])
    if file == "metrics.json":  # nothing that predict needs
        assert code == 0
    else:
        assert code == 2 and file.rpartition("/")[2] in line(capsys)


@pytest.mark.parametrize("state", [{"frames": 10**9, "mean": 0.0, "std": 1.0}, {"frames": FRAMES + 1, "mean": 0.0,
                                   "std": 1.0}, {"frames": FRAMES, "mean": "x", "std": 1.0}, [], {}, {"frames": FRAMES,
                                   "mean": 0.0, "std": 0.0}], ids=range(6))
def test_damaged_states_of_the_data(strange: Path, state: Any, sounds: Path, capsys: pytest.CaptureFixture[str]
                                    ) -> None:
    (strange / "data_state.json").write_text(json.dumps(state))
    assert main(["predict", str(strange), str(next((sounds / "audio").iterdir()))]) == 2
    line(capsys)


def test_a_model_that_is_not_finite_is_refused(strange: Path, sounds: Path, tmp_path: Path,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    """In the head as in the methods."""
    from safetensors.torch import load_file, save_file

    edit(strange / "adapter" / "adapter.json", lambda record: record.pop("sha256", None))
    tensors = load_file(strange / "adapter" / "adapter.safetensors")
    for name in sorted(tensors)[:1] + [name for name in tensors if name.startswith("outside.")][:1]:
        save_file({**tensors, name: tensors[name] * torch.nan}, strange / "adapter" / "adapter.safetensors")
        for command in (["predict", str(strange), str(next((sounds / "audio").iterdir()))],
                        ["merge", str(strange), str(tmp_path / "out")],
                        ["export", str(strange), str(tmp_path / "out")]):
            assert main(command) == 2
            told = line(capsys)
            assert name in told and "not finite" in told
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_not_finite(finished: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    """The file has no prediction, the others have."""
    forward = FineTuner.forward

    def spoiled(self: FineTuner, inputs: torch.Tensor) -> torch.Tensor:
        outputs = forward(self, inputs)
        return outputs if len(outputs) == 1 else torch.cat([outputs[:1] * torch.nan, outputs[1:]])

    monkeypatch.setattr(FineTuner, "forward", spoiled)
    files = [str(file) for file in sorted((sounds / "audio").iterdir())][:3]
    assert main(["predict", str(finished), *files, "--json"]) == 2
    out, err = capsys.readouterr()
    records = json.loads(out, parse_constant=lambda word: pytest.fail(word))
    assert [("error" in record) for record in records] == [True, False, False] and "label" not in records[0]
    assert files[0] in err and "nan" not in out.lower()


def test_names_do_not_break_the_lines(strange: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                      ) -> None:
    """Of classes and of files: tabs, line breaks, escapes, what is not UTF-8."""
    edit(strange / "adapter" / "adapter.json",
         lambda record: record["model"].update(classes=["a\x1b[31m\tb\nc", "\ud800\u202e"]))
    files = [tmp_path / "sounds" / name for name in ("tab\there.wav", "line\nbreak.wav", "esc\x1b[31m.wav",
                                                     os.fsdecode(b"\xff\xfe.wav"), "a  b $x_{.wav")]
    (tmp_path / "sounds").mkdir()
    for file in files:
        shutil.copy(next((sounds / "audio").iterdir()), file)
    os.mkfifo(tmp_path / "sounds" / "pipe.wav")
    assert main(["predict", str(strange), *map(str, files), str(tmp_path / "sounds" / "pipe.wav")]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(files) and all(len(text.split("\t")) == 3 for text in out.splitlines())
    assert out.replace("\n", "").replace("\t", "").isprintable() and "a  b $x_{.wav\t" in out
    assert "pipe.wav: a pipe or a device" in err and err.strip().isprintable()
    assert main(["predict", str(strange), *map(str, files), "--json"]) == 0
    assert [record["file"] for record in json.loads(capsys.readouterr().out)] == list(map(str, files))


def test_a_model_folder_runs_no_code_and_asks_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("a question on standard input")

    monkeypatch.setattr("builtins.input", asked)
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\n")
    maps = {"AutoConfig": "theirs.C", "AutoModel": "theirs.C"}
    changes: list[dict[str, Any]] = [{"model_type": "theirs"}, {"model_type": ["x"]}, {"num_hidden_layers": 10**7},
                                     {"hidden_size": "x"}, {"hidden_size": 10**12}]
    for change in changes:
        edit(model / "config.json", lambda config, change=change: config.update(auto_map=maps, **change))
        assert main(["roles", str(model)]) == 2
        line(capsys)
        if "model_type" in change:
            assert main(["import", str(tmp_path), str(tmp_path / "out"), "--model", str(model)]) == 2
            assert "auto_map" in line(capsys)
        shutil.copy(base / "config.json", model / "config.json")
    edit(model / "config.json", lambda config: config.update(auto_map=maps, attn_implementation="owner/kernels"))
    assert main(["roles", str(model)]) == 0  # the library's own, whatever else the file says
    assert not (tmp_path / "ran").exists()
    (model / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": {
        "checkpoint_path": str(tmp_path / "pickle.pth")}}))
    capsys.readouterr()
    assert main(["roles", str(model)]) == 2
    assert "checkpoint_path" in line(capsys)


def test_odd_out_folders(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, words in (("file", "is a file"), ("nowhere", "leads nowhere"), ("loop", "leads nowhere"),
                       ("file/inside", "cannot be written")):
        for command in ("merge", "export"):
            assert main([command, str(finished), str(tmp_path / out)]) == 2
            assert words in line(capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "loop", "nowhere"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(finished), "."]) == 0
    assert sorted(file.name for file in Path().iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert Path().resolve() == tmp_path / "here"


@pytest.mark.parametrize("out", ["there", "new/deep"])
def test_a_full_disk_leaves_nothing(finished: Path, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Neither files nor folders that were made on the way."""
    import errno

    import safetensors.torch

    (tmp_path / "there").mkdir()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for command in ("merge", "export"):
        assert main([command, str(finished), str(tmp_path / out)]) == 2
        told = line(capsys)
        assert "No space left on device" in told and out in told
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["there"]
