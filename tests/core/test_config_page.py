"""What ``lightning run`` shows of a configuration without running it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from core.cli import main
from core.config import KEYS, points
from core.config.keys import KEYS as SHOWN
from core.peft import options

ESC50 = "domains/audio/esc50.yaml"


def test_every_key_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert {key.partition(".")[0] for key in SHOWN} == set(KEYS)
    with pytest.raises(SystemExit) as stop:
        main(["run", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {key} " in shown and text in shown for key, text in SHOWN.items())


@pytest.mark.parametrize("words", [[ESC50, "--peft.rank", "16", "--help"], ["--help", ESC50, "--peft.rank=16"]])
def test_the_fields_of_a_configuration(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = {line.split()[0] for line in lines if line.startswith("  --")}
    assert {f"--peft.{name}" for name in options("LoRA")} <= keys
    assert {"--model.backbone.frames", "--data.fold", "--optimizer.lr", "--lr_scheduler.warmup",
            "--trainer.max_epochs", "--trainer.precision", "--seed_everything", "--select"} <= keys
    assert "--trainer.logger" not in keys  # a run sets it
    [rank] = [line for line in lines if line.startswith("  --peft.rank ")]
    assert rank.endswith("int = 16") and any("rank of the change" in line for line in lines)
    [epochs] = [line for line in lines if line.startswith("  --trainer.max_epochs ")]
    assert epochs.endswith(" = 10")


def test_a_mistake_beside_help_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nowhere.yaml", "--help"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "nowhere.yaml" in line


def test_a_printed_configuration_is_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--peft", "DoRA", "--peft.rank", "4", "--trainer.max_epochs", "2"]
    printed = tmp_path / "printed.yaml"
    assert main(["run", ESC50, *words, "--print_config"]) == 0
    printed.write_text(capsys.readouterr().out)
    monkeypatch.chdir(tmp_path)  # nothing is run
    assert sorted(file.name for file in tmp_path.iterdir()) == ["printed.yaml"]
    [given], [again] = points(str(Path(__file__).parents[2] / ESC50), words), points(str(printed))
    assert {**given.config, "domain": given.domain} == again.config and again.domain == "audio"


def test_of_several_points_each_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", ESC50, "--over", "peft=LoRA,BitFit", "--print_config"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [document["peft"]["class_path"] for document in documents] == ["LoRA", "BitFit"]
