"""The worked examples of CONTRIBUTING.md, taken out of the page and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core import load_adapter, peft
from core.anatomy import FAMILIES
from core.cli import main
from core.errors import ScionError
from tests.models import batch, make

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def blocks() -> dict[str, str]:
    """File name -> content of each fenced block that names a file."""
    page = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^```\w+ file=(\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files in a folder on the import path, with the metadata that an installation would leave."""
    for name, content in blocks().items():
        if not name.startswith(("my_package", "domains/colours")):
            continue
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    points = tomllib.loads(blocks()["pyproject.toml"])["project"]["entry-points"]
    metadata = tmp_path / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = [line for group, entries in points.items()
             for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    modules, families = set(sys.modules), dict(FAMILIES)
    peft.registry.cache_clear()
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith(("my_package", "domains.colours")):
            del sys.modules[name]
    FAMILIES.clear()
    FAMILIES.update(families)
    peft.registry.cache_clear()


def test_the_page_has_its_examples() -> None:
    assert {Path(name).parts[0] for name in blocks()} == {"my_package", "pyproject.toml", "domains", "core"}


@pytest.mark.parametrize("family", ["timm_vit", "bert", "llama"])
def test_the_method_by_its_entry_point(examples: Path, family: str) -> None:
    model, inputs = make(family), batch(family)
    before = model(inputs)
    method: Any = peft.method_class("Scale")(targets=("v", "mlp.up")).attach(model)  # type: ignore[call-arg]
    assert torch.equal(model(inputs), before)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor.normal_(std=0.3)
    trained = model(inputs)
    assert not torch.allclose(trained, before)
    method.save(examples / "adapter")
    method.merge()
    torch.testing.assert_close(model(inputs), trained, rtol=1e-4, atol=1e-5)
    again = make(family)
    load_adapter(examples / "adapter", again)
    assert torch.equal(again(inputs), trained)
    with pytest.raises(ScionError, match="no linear weight"):
        peft.method_class("Scale")(targets=("block",)).attach(make(family))  # type: ignore[call-arg]


@pytest.mark.parametrize("override", [(), ("--peft", "Scale"), ("--peft", "FullFineTuning")])
def test_the_domain_by_the_command(examples: Path, override: tuple[str, ...]) -> None:
    folder = examples / "run"
    config = str(examples / "domains" / "colours" / "pictures.yaml")
    assert main(["run", config, *override, "--run_dir", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    assert metrics["data"]["source"] == "mini"
    assert metrics["metrics"]["test"]["accuracy"] > 0.5  # 1/3 by chance


def test_the_domains_command(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = examples / "red.npy"
    np.save(file, np.stack([np.full((8, 8), value) for value in (1, 0.25, 0)]))
    assert main(["palette", str(file)]) == 0
    assert capsys.readouterr().out == f"{file} 1.00 0.25 0.00\n"
    assert main(["colours", "palette", str(file), "--digits=0"]) == 0
    assert capsys.readouterr().out == f"{file} 1 0 0\n"
    refused = ((["--digits", "-1"], "--digits: -1 is negative"), (["--digit", "1"], "did you mean '--digits'"))
    for words, told in refused:
        assert main(["palette", str(file), *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert told in line
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  colours:\n    palette  print the mean colour of pictures" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- in a copy of Scion


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Scion's own folders, copied, for recipes that add a file to them."""
    folder = tmp_path / "scion"
    for name in ("core", "domains"):
        shutil.copytree(PAGE.parent / name, folder / name)
    return folder


def state(folder: Path) -> dict[str, bytes]:
    """Every source file and YAML in a folder, by its path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.suffix in (".py", ".yaml")}


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def add(copy: Path, name: str, source: str | None = None) -> None:
    (copy / name).write_text(blocks()[source or name], encoding="utf-8")


def write_yard(root: Path) -> None:
    """The data that the page's benchmark reads: low tones and high ones."""
    soundfile = pytest.importorskip("soundfile")
    (root / "sounds").mkdir(parents=True)
    lines = ["file,animal,set"]
    for number in range(24):
        animal, pitch = ("cow", 0.05) if number % 8 < 4 else ("hen", 0.5)
        part = ("train", "train", "validation", "test")[number % 4]
        soundfile.write(root / "sounds" / f"{number}.wav", np.sin(np.arange(8000) * pitch).astype(np.float32), 16_000)
        lines.append(f"{number}.wav,{animal},{part}")
    (root / "list.csv").write_text("\n".join(lines) + "\n")


def test_a_method_a_task_and_a_data_set(copy: Path, tmp_path: Path) -> None:
    """Each recipe touches the files that it names and no other, and one run takes all that they add."""
    before = state(copy)
    add(copy, "core/peft/activations/scale.py", "my_package/scale.py")
    assert changed(before, state(copy)) == {"core/peft/activations/scale.py"}
    before = state(copy)
    add(copy, "core/tasks/margin.py")
    assert changed(before, state(copy)) == {"core/tasks/margin.py"}
    before = state(copy)
    add(copy, "core/callbacks/slow_steps.py")
    assert changed(before, state(copy)) == {"core/callbacks/slow_steps.py"}
    before = state(copy)
    add(copy, "domains/audio/yard.py")
    add(copy, "domains/audio/yard.yaml")
    published = copy / "domains" / "audio" / "__init__.py"
    text = published.read_text().replace('"UrbanSound8K"]', '"UrbanSound8K", "Yard"]')
    published.write_text(text.replace('"urbansound8k"}', '"urbansound8k", "Yard": "yard"}'))
    assert changed(before, state(copy)) == {f"domains/audio/{name}" for name in ("yard.py", "yard.yaml", "__init__.py")}

    write_yard(tmp_path / "yard")
    words = ["run", "domains/audio/yard.yaml", "--data.root", str(tmp_path / "yard"), "--model.backbone.name", "nano",
             "--model.task", "Margin", "--peft", "Scale", "--trainer.max_epochs", "1", "--callbacks", "SlowSteps",
             "--callbacks.factor", "2"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "SCION_CACHE": str(tmp_path / "cache")}
    words += ["--run_dir", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "core", *words], cwd=copy, env=environment, capture_output=True,
                          text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert record["data"]["source"] == "real" and "Yard" in record["data"]["name"]
    assert {"accuracy", "kappa", "loss"} <= set(record["metrics"]["test"])
    [row] = json.loads((tmp_path / "run" / "history.json").read_text())
    assert 0 <= row["train/slow_steps"] < 10
    assert [method["class"] for method in record["peft"]] == ["Scale"] and record["parameters"]["method"] > 0
