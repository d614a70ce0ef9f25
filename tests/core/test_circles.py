"""No module of the core imports one that imports it, at the top of a file or inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(root: Path) -> dict[str, ast.Module]:
    """Every module of the core by its name, parsed."""
    found = {}
    for file in sorted((root / "core").rglob("*.py")):
        name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST, known: set[str]) -> Iterator[str]:
    """The modules of the core that a file imports; what only type checkers read is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module
        else:
            yield from imports(node, known)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a round, the first one found; empty where there is none."""
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name):]
        if name in done:
            return []
        for other in sorted(graph[name]):
            found = follow(other, [*way, name])
            if found:
                return found
        done.add(name)
        return []

    for name in graph:
        found = follow(name, [])
        if found:
            return found
    return []


def graph_of(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    return {name: set(imports(tree, set(trees))) - {name} for name, tree in trees.items()}


def test_no_circle() -> None:
    graph = graph_of(modules(ROOT))
    assert len(graph) > 100 and "core.graft" in graph["core.method.on_model"]
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    """Also one of which a part is an import inside a function."""
    trees = modules(ROOT)
    trees["core.errors"].body += ast.parse("def late():\n    from core.method import PEFTMethod").body
    found = circle(graph_of(trees))
    assert {"core.errors", "core.method"} <= set(found)


def late_imports(source: str) -> Iterator[str]:
    """The lines inside functions that import from the core."""
    lines = source.splitlines()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "core":
                    yield lines[node.lineno - 1]


def test_an_import_inside_a_function_says_why() -> None:
    found = [(str(file), line) for file in sorted((ROOT / "core").rglob("*.py"))
             for line in late_imports(file.read_text(encoding="utf-8"))]
    assert len(found) > 20
    assert [place for place in found if "  # " not in place[1]] == []
