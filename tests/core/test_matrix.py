"""The matrix about itself: it is complete, and no row of it is empty."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

from core import peft
from core.errors import ScionError
from tests.conftest import cells_of
from tests.core.test_published_counts import bert, counts_on, vit
from tests.methods import METHODS, REFUSED, Cell, cells
from tests.models import EVERY_FAMILY, FAMILIES, make
from tests.toolkit import EVERYTHING, differences, same, snapshot, trace

HERE = Path(__file__).parent


def check_refusal(cell: Cell) -> None:
    """A cell that cannot exist: one clear line, and a model as it was."""
    model = make(cell.family)
    left, values = trace(model), snapshot(model)
    with pytest.raises(ScionError) as refusal:
        cell.new(name="mine").attach(model)
    assert "mine" in str(refusal.value) and "\n" not in str(refusal.value)
    assert differences(left, trace(model)) == [] and same(values, snapshot(model))


def rows() -> dict[tuple[int, str], pytest.Mark]:
    """Every test of the matrix: (invariant, test's name) -> its mark."""
    found: dict[tuple[int, str], pytest.Mark] = {}
    for file in sorted(HERE.glob("test_*.py")):
        module = importlib.import_module(f"tests.core.{file.stem}")
        for name, test in vars(module).items():
            for mark in getattr(test, "pytestmark", []) if name.startswith("test_") else []:
                if mark.name == "invariant":
                    found[mark.args[0], name] = mark
    return found


def test_every_method_is_in_the_table() -> None:
    assert sorted(METHODS) == sorted(name for name, home in peft.registry().items() if home.startswith("core."))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_card(method: str) -> None:
    cls = peft.method_class(method)
    card = inspect.getdoc(cls) or ""
    for line in ("Equation:", "Trains:", "Merges:", "Source:"):
        assert f"\n{line} " in card, f"{method}'s docstring has no line {line!r}"
    own = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "common")]
    assert all(f"    {name}: " in card for name in own), f"{method}'s docstring does not explain all of {own}"
    assert cls.recommended["lr"] > 0 and cls.recommended["weight_decay"] >= 0 and cls.inference_cost


def test_every_method_is_in_every_row_that_can_hold_it() -> None:
    listed = {cell.method for cell in cells(everything=False)}
    assert listed == set(METHODS)
    for (number, name), mark in rows().items():
        found, absent = cells_of(mark, name)
        assert {cell.method for cell in found} | set(absent) == set(METHODS), f"{number} {name}"


def test_no_row_is_empty() -> None:
    for (number, name), mark in rows().items():
        assert any(not cell.refused for cell in cells_of(mark, name)[0]), f"invariant {number} ({name}) runs on no cell"


def test_rotation_reaches_every_family() -> None:
    for (number, name), mark in rows().items():
        if mark.kwargs["where"] is None:
            every = EVERY_FAMILY if EVERYTHING else FAMILIES
            assert {cell.family for cell in cells_of(mark, name)[0]} == set(every), f"{number} {name}"


def test_refused_cells_are_few_and_reasoned() -> None:
    assert 10 * len(REFUSED) <= len(METHODS) * len(EVERY_FAMILY)
    assert all(method in METHODS and family in EVERY_FAMILY and len(reason) > 20 and "\n" not in reason
               for (method, family), reason in REFUSED.items())


def test_no_test_of_the_matrix_skips() -> None:
    """An ability that is missing is declared and its clean error asserted; it is no reason to skip."""
    for file in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.skip", "pytest.xfail"):
                assert "compiler" in ast.unparse(node), f"{file.name} line {node.lineno} skips"


def test_every_test_asserts() -> None:
    for file in HERE.glob("test_*.py"):
        tree = ast.parse(file.read_text())
        helpers = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _asserts(node)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
                assert _asserts(node) or calls & helpers, f"{file.name}: {node.name} asserts nothing"


def _asserts(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Assert) or (isinstance(part, ast.Attribute) and ast.unparse(part) in (
        "pytest.raises", "pytest.warns")) or (isinstance(part, ast.Call) and ast.unparse(part.func).startswith(
            ("torch.testing.assert", "cell.row.schedule"))) for part in ast.walk(node))


CARD_MODELS = {"vit_b16": vit, "bert_base": bert}


@pytest.mark.parametrize(("method", "model", "config", "count"), [
    (method, *card) for method, row in METHODS.items() for card in row.cards])
def test_card_count(method: str, model: str, config: dict[str, Any], count: int) -> None:
    """The published count, on the real architecture without its weights."""
    counts = counts_on(CARD_MODELS[model], method, config)
    assert counts["method"] + counts["norms"] == count
    assert f"{count:,}" in (inspect.getdoc(peft.method_class(method)) or "") or method == "LinearProbe"
