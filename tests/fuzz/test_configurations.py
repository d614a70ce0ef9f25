"""Configurations and command lines that are no good: a line each, and nothing touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from core.training.run_folder import RunFolder
from tests.fuzz.mutations import WORDS, changed_bytes, nested
from tests.fuzz.watch import command, snapshot, tries

pytestmark = pytest.mark.usefixtures("untrained")


def held(user: Path, config: Path, words: list[str]) -> None:
    """Run ``config`` in a folder beside the user's files: these stay as they are, and a refusal leaves no folder."""
    before = snapshot(user)
    target = user.parent / "target"
    shutil.rmtree(target, ignore_errors=True)
    text = command(["run", str(config), *words, "--run_dir", str(target)])
    shutil.rmtree(user / "runs", ignore_errors=True)
    shutil.rmtree(user / "cache", ignore_errors=True)
    assert snapshot(user) == before
    assert not (text.startswith("lightning run") and target.exists()), "a refused run has left a folder"
    if target.exists():
        RunFolder(target, "").clear()


@pytest.fixture(scope="module")
def good(tiny_config: Path) -> Any:
    return yaml.safe_load(tiny_config.read_text())


@tries(40, 800)
@given(data=st.data())
def test_changed_configurations(good: Any, user: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "changed.yaml"
    changed = data.draw(nested({**good, "select": "last", "seed_everything": 0, "over": {"peft.rank": [1, 2]},
                                "lr_scheduler": {"name": "cosine", "warmup": 0.1}}))
    file.write_text(yaml.dump(changed, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    held(user, file, [])


@tries(20, 300)
@given(data=st.data())
def test_changed_texts(tiny_config: Path, user: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "text.yaml"
    file.write_bytes(data.draw(changed_bytes(tiny_config.read_bytes())))
    held(user, file, [])


KEYS = ["peft", "peft.rank", "peft.targets", "peft.LoRA.rank", "peft.on", "peft.seed", "data", "data.batch_size",
        "data.root", "data.num_workers", "data.seed", "model", "model.backbone", "model.backbone.name", "model.task",
        "model.task.dropout", "optimizer", "optimizer.lr", "optimizer.name", "optimizer.options",
        "optimizer.options.betas", "lr_scheduler", "lr_scheduler.warmup", "trainer", "trainer.max_epochs",
        "trainer.max_steps", "trainer.precision", "trainer.accelerator", "trainer.devices", "trainer.strategy",
        "trainer.max_time", "trainer.limit_train_batches", "trainer.nothing", "seed_everything", "select", "stages",
        "stages.one.peft", "domain", "per", "over", "", ".", "peft.", "..rank"]
TEXTS = [*WORDS, "16", "0.5", "[q, v]", "{class: LoRA, rank: 2}", "LoRA,BitFit", "peft=LoRA,SSF",
         "seed_everything=0,0", "peft=", "=1", "data.fold=all", "[", "{a: 1, a: 2}", "&a [*a]", "0x10", "1_000",
         "2020-01-01", "!!set {a}", "-3", "SGD", "AdamW"]


@tries(40, 800)
@given(words=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["=", "+=", " "]), st.sampled_from(TEXTS)),
                      min_size=1, max_size=3))
def test_command_lines(tiny_config: Path, user: Path, words: list[tuple[str, str, str]]) -> None:
    found: list[str] = []
    for key, operator, text in words:
        found += [f"--{key}", text] if operator == " " else [f"--{key}{operator}{text}"]
    held(user, tiny_config, found)


COMMANDS = ["run", "describe", "methods", "roles", "merge", "export", "import", "predict", "--json", "--model",
            "--over", "--overwrite", "--run_dir", "LoRA", ".", "thesis", "metrics.json", "thesis/chapter.tex"]


@tries(20, 300)
@given(words=st.lists(st.sampled_from(COMMANDS + WORDS), min_size=1, max_size=5))
def test_words(user: Path, words: list[str]) -> None:
    """Any words at all; those that could not be arguments of a process are left out."""
    words = [word for word in words if "\0" not in word and word.isprintable()]
    before = snapshot(user)
    command(words)
    shutil.rmtree(user / "cache", ignore_errors=True)
    assert snapshot(user) == before
