"""The two worked examples of CONTRIBUTING.md, taken out of the page and run."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def test_the_page_has_both_examples() -> None:
    assert {Path(name).parts[0] for name in blocks()} == {"my_package", "pyproject.toml", "domains"}


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
