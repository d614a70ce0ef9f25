"""Writes docs/checks.md: which test holds which check of a method's specification. ``python -m tests.sheets``"""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "checks.md"
HEAD = """# Checks of the methods against their papers

Made by `python -m tests.sheets` from the tests in `tests/sheets`, one file a method. The numbers are those of the
checks in the method's specification; tests without one go beyond it. What every method must hold on every backbone is
the matrix that `make test` prints; parameter counts from papers are in `tests/core/test_published_counts.py`.

| specification | method | check | what | test |
|---|---|---|---|---|
"""


def rows() -> list[str]:
    """One line of the table for each test."""
    found: list[str] = []
    for file in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(file.read_text())
        number = file.stem.split("_")[1]
        name = re.search(r"Sheet \d+, (\w+)", ast.get_docstring(tree) or "")
        assert name, f"{file.name}: its docstring begins with 'Sheet <number>, <method>'"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                words = node.name.removeprefix("test_").split("_")
                check = re.match(r"(\d+_to_\d+|\d+)_", node.name.removeprefix("test_") + "_")
                label = check.group(1).replace("_", " ") if check else ""
                title = " ".join(words[len(label.split()):])
                text = " ".join((ast.get_docstring(node) or "").split())
                found.append(f"| {number} | {name.group(1)} | {label or '-'} | {title}{': ' + text if text else ''} | "
                             f"`{file.name}::{node.name}` |")
    return found


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
