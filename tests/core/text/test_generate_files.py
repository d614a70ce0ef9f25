"""Texts in a file: in the prompts' order, gone on with after a kill, never mixed with those of other settings."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from core.errors import ScionError
from core.text.backbones import LanguageModel
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from core.text.generated import Generated, GeneratedFile
from core.text.prompts import Prompt
from tests.core.text.writers import PROMPTS, language_model

SETTINGS = GenerateSettings(4, temperature=1.0, top_p=0.9, samples=2, batch_size=3)
MANY = [Prompt(f"{text} {more}", f"{number}{more}") for more in ("cat", "dog the one") for number, text in
        enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return language_model("llama")


def write(model: LanguageModel, file: Path, **changes: Any) -> list[Generated]:
    return generate(model, MANY, SETTINGS, file, {"adapter": "one"}, **changes)


def test_a_line_a_text(model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "generated" / "test.jsonl"
    found = write(model, file)
    assert found == generate(model, MANY, SETTINGS)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(one.id, one.sample) for one in found]
    assert lines[5] == {"id": found[5].id, "sample": 1, "prompt": found[5].prompt, "text": found[5].text,
                        "tokens": list(found[5].tokens), "why": found[5].why}
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["settings"]["top_p"] == 0.9 and about["adapter"] == "one" and "batch_size" not in about["settings"]
    assert sorted(path.name for path in file.parent.iterdir()) == ["test.json", "test.jsonl"]
    before = file.read_bytes()
    assert write(model, file) == found and file.read_bytes() == before


@pytest.mark.parametrize("lines", [0, 1, 7, 31])
def test_killed_and_gone_on_with(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: int
                                 ) -> None:
    """A child is killed while it writes a line, half of which is in the file: the end is the same, byte for byte."""
    unbroken, file = tmp_path / "unbroken.jsonl", tmp_path / "killed.jsonl"
    expected = write(model, unbroken)
    child = os.fork()
    if not child:
        def add(self: Any, generated: Generated) -> None:
            whole = generated.line()
            dies = len(self.done) == lines
            self._handle.write(whole[:len(whole) // 2] if dies else whole)
            self._handle.flush()
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            self.done.append(generated)

        GeneratedFile.add = add  # type: ignore[method-assign]
        write(model, file)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(file.read_bytes().splitlines()) == lines + 1
    batches: list[int] = []
    inner: Any = model.model
    whole = inner.generate
    monkeypatch.setattr(inner, "generate", lambda **given: batches.append(1) or whole(**given))
    assert write(model, file) == expected
    assert file.read_bytes() == unbroken.read_bytes()
    assert 0 < len(batches) <= 11 if lines < 31 else len(batches) == 1  # no more than what is missing


def test_what_is_done_is_not_done_again(model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test.jsonl"
    found = write(model, file)
    monkeypatch.setattr(model.model, "generate", lambda **given: pytest.fail("nothing is missing"))
    assert write(model, file) == found


def test_other_settings_and_prompts_are_refused(model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    write(model, file)
    before = file.read_bytes()
    other = GenerateSettings(4, temperature=0.5, top_p=0.9, samples=2)
    with pytest.raises(ScionError, match=r"holds texts of other settings \(temperature 1.0, here 0.5\); give anoth"):
        generate(model, MANY, other, file, {"adapter": "one"})
    with pytest.raises(ScionError, match="holds texts of another set of prompts"):
        generate(model, MANY[1:], SETTINGS, file, {"adapter": "one"})
    with pytest.raises(ScionError, match=r"another adapter \(one, here two\)"):
        generate(model, MANY, SETTINGS, file, {"adapter": "two"})
    assert file.read_bytes() == before
    found = generate(model, MANY, other, file, {"adapter": "one"}, restart=True)
    assert len(file.read_text().splitlines()) == len(found) == 32
    larger = GenerateSettings(4, temperature=0.5, top_p=0.9, samples=2, batch_size=16, cache=False)
    assert generate(model, MANY, larger, file, {"adapter": "one"}) == found  # no text depends on these


def test_damaged_files(model: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    write(model, file)
    whole = file.read_text().splitlines(keepends=True)
    cases = [("[3]\n", "test.jsonl, line 2: not a text of ours"), ("{no\n", "line 2: damaged, no JSON"),
             (whole[0], "line 2: the text of another prompt"), (whole[1].replace('"tokens": [', '"tokens": ["a", '),
                                                                "line 2: tokens are not all whole numbers"),
             (whole[1].replace('"sample": 1', '"sample": "1"'), "line 2: sample is no int")]
    for line, words in cases:
        file.write_text("".join([whole[0], line, *whole[2:]]))
        with pytest.raises(ScionError, match=words):
            write(model, file)
    file.with_suffix(".json").unlink()
    with pytest.raises(ScionError, match=r"unknown settings \(test.json is missing\); give another name, or restart"):
        write(model, file)
    write(model, file, restart=True)
    assert file.read_text() == "".join(whole)
    with pytest.raises(ScionError, match="give a name that ends in .jsonl"):
        write(model, tmp_path / "test.txt")
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ScionError, match="a link"):
        write(model, file)


def test_one_process_at_a_time(model: LanguageModel, tmp_path: Path) -> None:
    file = GeneratedFile(tmp_path / "test.jsonl", [], {})
    with file.opened(), pytest.raises(ScionError, match=r"test.jsonl: another process is writing it"):
        write(model, tmp_path / "test.jsonl")
