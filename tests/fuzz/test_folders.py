"""Folders of others, and damaged ones of one's own: adapters, checkpoints, runs, and those of Hugging Face peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import load_adapter, peft
from tests.fuzz.mutations import change_folder, check_outside, copy_to, files_of
from tests.fuzz.watch import command, refused_or, snapshot, tries
from tests.models import make
from tests.toolkit import randomize

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2}, "LIFT": {"rank": 2}, "TriAdaptLoRA": {"rank": 2, "growth": 1}, "RAMT": {},
    "VPT": {"tokens": 2}, "MoS": {"rank": 2}, "BitFit": {}, "Houlsby": {}}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter of each of several kinds of methods."""
    home = tmp_path_factory.mktemp("adapters")
    for name, options in METHODS.items():
        method = peft.make(name, options).attach(make("timm_vit"))
        randomize(method)
        method.save(home / name)
    return {name: home / name for name in METHODS}


@tries(40, 800)
@given(name=st.sampled_from(list(METHODS)), data=st.data())
def test_adapters(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    """The model is as it was where an adapter is refused."""
    folder = copy_to(adapters[name], tmp_path_factory.getbasetemp() / "adapter")
    change_folder(data, folder)
    model = make("timm_vit")
    names = list(model.state_dict())
    if refused_or(lambda: load_adapter(folder, model)) is not None:
        assert list(model.state_dict()) == names
    check_outside(folder)


@pytest.fixture(scope="module")
def exported(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from core.adapters.huggingface.convert import to_peft

    model = make("timm_vit")
    method = load_adapter(adapters["LoRA"], model)
    folder = tmp_path_factory.mktemp("exported") / "peft"
    to_peft([method], model, folder)
    return folder


@tries(25, 500)
@given(data=st.data())
def test_peft_folders(exported: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = copy_to(exported, tmp_path_factory.getbasetemp() / "peft")
    change_folder(data, folder)
    refused_or(lambda: load_adapter(folder, make("timm_vit")))
    check_outside(folder)


@pytest.fixture(scope="module")
def runs(tiny_config: Path, user: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run, and one that was stopped."""
    import json

    from core.config import points
    from core.training.run import execute

    point = points(str(tiny_config), ["--trainer.max_epochs", "1"])[0]
    home = tmp_path_factory.mktemp("runs")
    execute(point, home / "finished")
    shutil.copytree(home / "finished", home / "stopped")
    record = {"format": 1, "status": "running", "config_hash": point.hash}
    (home / "stopped" / "metrics.json").write_text(json.dumps(record))
    return {name: home / name for name in ("finished", "stopped")}


@tries(20, 400)
@given(name=st.sampled_from(["finished", "stopped"]), data=st.data())
def test_run_folders(tiny_config: Path, user: Path, runs: dict[str, Path], name: str, data: Any) -> None:
    """Whatever has become of a run's files: going on, starting anew, labelling files and merging end in a line."""
    folder = copy_to(runs[name], user.parent / "changed")
    (folder / "mine.txt").write_text("mine")
    change_folder(data, folder)
    mine = (folder / "mine.txt").read_bytes() if "mine.txt" in files_of(folder) else None
    before = snapshot(user)
    words = data.draw(st.sampled_from([
        ["run", str(tiny_config), "--trainer.max_epochs", "1", "--run_dir", str(folder)],
        ["run", str(tiny_config), "--trainer.max_epochs", "1", "--overwrite", "--run_dir", str(folder)],
        ["predict", str(folder), "thesis/chapter.tex"],
        ["merge", str(folder), str(user.parent / "merged")],
        ["export", str(folder), str(user.parent / "exported")]]))
    command(words)
    for made in ("merged", "exported"):
        shutil.rmtree(user.parent / made, ignore_errors=True)
    assert snapshot(user) == before
    check_outside(folder)
    assert mine is None or (folder / "mine.txt").read_bytes() == mine
