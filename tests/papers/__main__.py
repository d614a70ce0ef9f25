"""Writes docs/checks.md: which test holds which check of a method's paper. ``python -m tests.papers``"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from core.peft import COMPOSITIONS, method_class, registry
from core.report import sections

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "checks.md"
CORE = HERE.parent / "core"
HEAD = """# Checks of the methods against their papers

Made by `python -m tests.papers` from the tests in `tests/papers`, one file a method or a few of one kind. A check
with a number is one of those that were drawn up from the paper; tests without one go beyond them. What every method
must hold on every backbone is the matrix that `make test` prints; parameter counts from papers are in
`tests/core/test_published_counts.py`.

| paper | method | check | what | test |
|---|---|---|---|---|
"""


EVERY: list[tuple[str, tuple[str, ...]]] = [
    ("trains what the formula counts; what is frozen has no optimizer state", ("count", "parameter_groups")),
    ("is the identity at the start, but for those that declare otherwise", ("identity",)),
    ("a step moves only what is declared, and all of that has a gradient", ("only_declared_move", "gradients")),
    ("merged equals unmerged; the base comes back bit for bit", ("merge",)),
    ("removal leaves keys, values and hooks as they were", ("removal",)),
    ("files and checkpoints hold the method (and a head) alone, and give the same outputs on a fresh base",
     ("adapter_file", "checkpoint", "save_and_load")),
    ("samples of a batch do not meet", ("7_samples_do_not_meet",)),
    ("frozen parts stay in eval mode", ("frozen_parts_stay_in_eval",)),
    ("two methods stack and are switched apart", ("stack", "two_of_a_kind")),
    ("runs under autocast, activation checkpointing, compilation and in two processes",
     ("autocast", "checkpointing", "compile", "two_processes")),
]
"""Ten checks that every method must pass, with the tests of the matrix that hold them."""
BETWEEN = """
## Checks of every method

Ten checks are demanded of every method. They are rows of the matrix.

| check | what | test |
|---|---|---|
"""


def meant(names: list[str], test: str) -> str:
    """The methods that a test's name speaks of; all of the file's where it speaks of none."""
    words, found = test.replace("_", ""), []
    for name in sorted(names, key=len, reverse=True):  # so that rsLoRA is not taken for LoRA
        key = name.lower().removesuffix("tuning").removesuffix("fine")
        if key in words:
            words = words.replace(key, " ")
            found.append(name)
    return ", ".join(name for name in names if name in found or not found)


def every() -> list[str]:
    """One line of the second table for each check."""
    places = {match.group(1): file.name for file in sorted(CORE.glob("test_*.py"))
              for match in re.finditer(r"^def test_(\w+)\(", file.read_text(), re.MULTILINE)}
    return [f"| {i} | {text} | {', '.join(f'`{places[test]}::test_{test}`' for test in tests)} |"
            for i, (text, tests) in enumerate(EVERY, 1)]


def paper_of(name: str) -> str:
    """The arXiv id in a method's card; the first words of its source where that has none."""
    source = sections(method_class(name).__doc__ or "").get("source", "")
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", source)
    return found.group(1) if found else source.partition(",")[0]


def files() -> list[tuple[Path, list[str], ast.Module]]:
    """Each file of tests: its path, the methods, what it holds."""
    found = []
    for file in sorted(HERE.glob("test_*.py")):
        tree = ast.parse(file.read_text())
        title = re.search(r"Checks of (\w+(?:,\s(?!with)\w+)*)", ast.get_docstring(tree) or "")
        assert title, f"{file.name}: its docstring begins with 'Checks of <method>', or of several methods"
        found.append((file, re.split(r",\s", title.group(1)), tree))
    return found


def papers(names: str) -> str:
    """Those of methods that a row names."""
    known = [name for name in names.split(", ") if name in registry() or name in COMPOSITIONS]
    return ", ".join(dict.fromkeys(paper_of(name) for name in known)) or "-"


def rows() -> list[str]:
    """One line of the table for each test."""
    found: list[str] = []
    for file, names, tree in files():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                words = node.name.removeprefix("test_").split("_")
                check = re.match(r"(\d+_(?:to|and)_\d+|\d+)_", node.name.removeprefix("test_") + "_")
                label = check.group(1).replace("_", " ") if check else ""
                what = " ".join(words[len(label.split()):])
                text = " ".join((ast.get_docstring(node) or "").split()).replace("|", "\\|")
                methods = meant(names, node.name)
                found.append(f"| {papers(methods)} | {methods} | {label or '-'} | "
                             f"{what}{': ' + text if text else ''} | `{file.name}::{node.name}` |")
    return found


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(rows()) + "\n" + BETWEEN + "\n".join(every()) + "\n"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
