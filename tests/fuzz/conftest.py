"""A tiny run, its adapter, and the user's own files beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core.conftest import tiny_config

__all__ = ["tiny_config"]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the user stands, with files of theirs; what a command does, it does from here."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    (folder / "metrics.json").write_text('{"mine": 1}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("SCION_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def untrained(tiny_config: Path) -> Iterator[None]:
    """Runs end where training would begin: everything up to there is what is tried, and it is quick."""
    from core.training import many_runs, run

    def nothing(point: Any, folder: Any, *_: Any) -> dict[str, Any]:
        return {"status": "finished", "peft": point.config["peft"]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_run_stages", nothing)
        patch.setattr(many_runs.report, "table", lambda *_, **__: "a table")
        yield
