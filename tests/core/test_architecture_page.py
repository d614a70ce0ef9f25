"""What docs/architecture.md names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.core.test_circles import graph_of, modules

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STATIONS = re.findall(r"`(core/[\w/]+\.py): ([\w.]+)`", PAGE)
FILES = re.findall(r"`(core/[\w/]+(?:\.py|/))`", PAGE)


def names_in(source: str) -> set[str]:
    """Functions and classes of a file, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), STATIONS)
def test_a_station_is_there(file: str, name: str) -> None:
    assert name in names_in((ROOT / file).read_text(encoding="utf-8"))


def test_files_are_there_and_walks_are_short() -> None:
    assert len(FILES) > 20 and [file for file in FILES if not (ROOT / file).exists()] == []
    steps = [len(re.findall(r"^\d+\. ", section, re.MULTILINE)) for section in PAGE.split("## ")[1:3]]
    assert steps == [8, 8]


def rooms() -> list[list[str]]:
    """The modules and packages of each row of the page's table, from the top."""
    found = []
    for row in PAGE.splitlines():
        if row.startswith("| `core/"):
            paths = re.findall(r"`(core/[\w/]+(?:\.py|/))`", row)
            found.append([path.rstrip("/").removesuffix(".py").replace("/", ".") for path in paths])
    return found


ROOMS = rooms()
UPWARD: dict[str, set[str]] = {}
"""What imports from a higher row as yet. Nothing comes to it."""


def room_of(module: str) -> int | None:
    """The row of the page that a module stands in."""
    while module != "core":
        for number, names in enumerate(ROOMS):
            if module in names:
                return number
        module = module.rpartition(".")[0]
    return None


def upward(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports from a row above the module's own."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        row = room_of(module)
        above = {other for other in others if row is not None and (room := room_of(other)) is not None and room < row}
        if above:
            found[module] = above
    return found


def test_rooms_import_downwards() -> None:
    graph = graph_of(modules(ROOT))
    assert [name for name in graph if room_of(name) is None and name not in ("core", "core.__main__")] == []
    assert upward(graph) == UPWARD


def test_an_import_upwards_is_found() -> None:
    trees = modules(ROOT)
    trees["core.graft.graft"].body += ast.parse("def late():\n    from core.training.finetuner import FineTuner").body
    assert upward(graph_of(trees))["core.graft.graft"] == {"core.training.finetuner"}
