"""The examples of docs/generation.md, run in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from core import FineTuner, peft
from core.compose import Route
from core.tasks import LanguageModelling
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from tests.core.text.test_language_tasks import INFO
from tests.core.text.writers import language_model
from tests.toolkit import randomize

PAGE = (Path(__file__).parents[3] / "docs" / "generation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tuner = FineTuner(language_model("llama"), LanguageModelling(), INFO)
    methods = [peft.make("LoRA", {"rank": 2, "name": name}) for name in ("one", "two")]
    route = Route(methods).attach(tuner.backbone)
    randomize(route, size=0.5)
    names: dict[str, Any] = {"tuner": tuner, "route": route}
    assert len(BLOCKS) == 5
    for block in BLOCKS:
        exec(block, names)  # the page's own code
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert len((tmp_path / "RUN" / "generated" / "test.jsonl").read_text().splitlines()) == 2
    with route.route("two"):
        assert generate(tuner, ["the cat sleeps", "dog"], GenerateSettings(12))[1] == names["found"][1]
