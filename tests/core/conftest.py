"""Fixtures for tests of whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.tiny_run import CONFIG, PARTS, PointOf


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A configuration that runs in a second, its classes importable; pictures of results are not drawn, which would
    take longer than training."""
    home = tmp_path_factory.mktemp("parts")
    (home / "killed_parts.py").write_text(PARTS)
    (home / "killed.yaml").write_text(CONFIG)
    from core.config import points
    from core.training import run

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        patch.setattr("core.report.plots.save_figure", lambda *figure_and_path, **options: None)
        point = points(str(home / "killed.yaml"))[0]
        run.execute(point, tmp_path_factory.mktemp("warm"))  # imports what a child would import, and time with it
        yield home / "killed.yaml"


@pytest.fixture
def point_of(tiny_config: Path) -> PointOf:
    """The run of that configuration with these overrides."""
    from core.config import points

    return lambda *overrides: points(str(tiny_config), list(overrides))[0]
