"""How the core is built: sizes of files and classes, what a class may know of another, abilities that are declared."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from core.method import AddsLoss, PEFTMethod, Scheduled

CORE = Path(__file__).parents[2] / "core"
FILES = sorted(CORE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
LONGEST_FILE, LONGEST_CLASS, MOST_MEMBERS = 500, 400, 25


def classes(trees: dict[Path, ast.Module]) -> Iterator[tuple[Path, ast.ClassDef]]:
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield file, node


def members(node: ast.ClassDef) -> list[str]:
    """Public functions, properties and attributes that a class defines."""
    found = []
    for inner in node.body:
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(inner.name)
        elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
            found.append(inner.target.id)
        elif isinstance(inner, ast.Assign):
            found += [target.id for target in inner.targets if isinstance(target, ast.Name)]
    return sorted({name for name in found if not name.startswith("_")})


def test_no_file_is_long() -> None:
    lines = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(lines) > 150 and [file for file, count in lines.items() if count > LONGEST_FILE] == []


def test_no_class_is_large() -> None:
    found = list(classes(TREES))
    assert len(found) > 150
    long = [node.name for _, node in found if (node.end_lineno or 0) - node.lineno >= LONGEST_CLASS]
    full = [f"{node.name}: {len(members(node))}" for _, node in found if len(members(node)) > MOST_MEMBERS]
    assert long == [] and full == []


def private(trees: dict[Path, ast.Module]) -> dict[str, set[Path]]:
    """Names with an underscore that classes and modules of the core define, with the files that do."""
    found: dict[str, set[Path]] = {}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            names = []
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names = [node.attr]
            for name in names:
                if name.startswith("_") and not name.startswith("__"):
                    found.setdefault(name, set()).add(file)
    return found


OF_OTHERS = {"_parameters", "_trainer", "_buffers", "_modules"}
"""Names that torch's and Lightning's classes have too, and that mean theirs."""


def intrusions(trees: dict[Path, ast.Module]) -> list[str]:
    """Where a file reaches for what begins with an underscore in another file of the core."""
    owners, found = private(trees), []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in owners and node.attr not in OF_OTHERS:
                if file not in owners[node.attr]:
                    found.append(f"{file.name}:{node.lineno} {node.attr}")
            elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("core"):
                found += [f"{file.name}:{node.lineno} {alias.name}" for alias in node.names
                          if alias.name.startswith("_") and not alias.name.startswith("__")
                          and not (file.parent / f"{alias.name}.py").exists()]
    return found


def overridden(trees: dict[Path, ast.Module]) -> list[str]:
    """Functions with an underscore that a class defines although a parent in another file has one of that name."""
    by_name = {node.name: (file, node) for file, node in classes(trees)}
    found = []
    for file, node in classes(trees):
        own = {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)
               and inner.name.startswith("_") and not inner.name.startswith("__")}
        parents = [base.id for base in node.bases if isinstance(base, ast.Name)]
        while parents:
            where, parent = by_name.get(parents.pop(), (file, None))
            if parent is None:
                continue
            theirs = {inner.name for inner in parent.body if isinstance(inner, ast.FunctionDef)}
            if where != file:
                found += [f"{node.name}.{name} of {parent.name}" for name in sorted(own & theirs)]
            parents += [base.id for base in parent.bases if isinstance(base, ast.Name)]
    return found


def test_an_underscore_keeps_a_name_in_its_file() -> None:
    assert intrusions(TREES) == [] and overridden(TREES) == []


def test_intrusions_are_found() -> None:
    trees = {Path("one.py"): ast.parse("class A:\n    def _hidden(self): ...\n"),
             Path("two.py"): ast.parse("class B(A):\n    def _hidden(self): ...\n"),
             Path("three.py"): ast.parse("def f(a):\n    a._hidden()\n")}
    assert intrusions(trees) == ["three.py:2 _hidden"]
    assert overridden(trees) == ["B._hidden of A"]


def test_an_ability_that_is_not_declared_is_taken_over() -> None:
    """A class written for an earlier version, in which a hook was enough."""
    with pytest.warns(DeprecationWarning, match="declare it, class Old\\(AddsLoss, PEFTMethod\\)"):
        class Old(PEFTMethod):
            def loss_terms(self, module: object, batch: object, outputs: object) -> Tensor | None:
                return None

            def moved(self, anatomy: object) -> list[str]:
                return ["norm.weight"]

    method = Old()
    assert isinstance(method, AddsLoss) and not isinstance(method, Scheduled) and method.adds_loss
    assert method.base_parameters(None) == ["norm.weight"]  # type: ignore[arg-type]
