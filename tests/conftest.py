"""Makes the cells of the matrix, and prints it at the end of the run."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Generator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# The first backward decides for the process whether autograd has threads of its own, which no forked child can use
# (tests/core/test_killed.py): here it has none. A compiler's imitation of a GPU that came before it would start some.
torch.ones((), requires_grad=True).backward()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "invariant(number, text, where): a row of the matrix, see tests.toolkit")
    config.stash[ABSENT] = {}


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: the garbage collector need not look through a million objects again and again, a
    tenth of the suite's time."""
    gc.collect()
    gc.freeze()


ABSENT: pytest.StashKey[dict[str, int]] = pytest.StashKey()
"""Cells to which an invariant does not apply, by "number|method"."""


def cells_of(marker: pytest.Mark, test: str) -> tuple[list[Any], Counter[str]]:
    """The cells on which a marked test runs, and how many of each method do not apply."""
    from tests.methods import cells
    from tests.toolkit import EVERYTHING

    where = marker.kwargs["where"] or (lambda cell: True)
    number = marker.args[0]
    everything = cells(EVERYTHING, number, marker.kwargs["families"])
    found = [cell for cell in everything if where(cell) and test not in cell.row.absent]
    return found, Counter(cell.method for cell in everything if cell not in found)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("invariant")
    if marker is None or "cell" not in metafunc.fixturenames:
        return
    found, absent = cells_of(marker, metafunc.function.__name__)
    metafunc.parametrize("cell", found, ids=str)
    for method, count in absent.items():
        metafunc.config.stash[ABSENT][f"{marker.args[0]}|{method}"] = count


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, Any, Any]:
    """A refused cell runs no invariant: there the clean refusal is what is asserted."""
    cell: Any = pyfuncitem.funcargs.get("cell")
    if pyfuncitem.get_closest_marker("invariant") and cell is not None and cell.refused:
        from tests.core.test_matrix import check_refusal

        pyfuncitem.obj = lambda **_: check_refusal(cell)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    report = yield
    marker = item.get_closest_marker("invariant")
    if marker is not None and call.when == "call":
        cell = item.callspec.params["cell"]  # type: ignore[attr-defined]
        outcome = "refused" if cell.refused and report.passed else report.outcome
        report.user_properties.append(("matrix", [marker.args[0], marker.args[1], cell.method, outcome]))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist tells its controller
        session.config.workeroutput["absent"] = session.config.stash[ABSENT]  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    node.config.stash[ABSENT].update(getattr(node, "workeroutput", {}).get("absent", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Invariants x methods: passed cells, r refused ones, F failed ones; - where an invariant does not apply."""
    texts: dict[int, str] = {}
    counts: dict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            for kind, value in getattr(report, "user_properties", []):
                if kind == "matrix":
                    number, text, method, result = value
                    texts.setdefault(number, text)
                    counts[number, method][result] += 1
    if not counts:
        return
    methods = sorted({method for _, method in counts})
    write = terminalreporter.write_line
    write("")
    write("The matrix: cells passed (+ r refused, s skipped, F failed); - does not apply")
    width = max(len(method) for method in methods)
    write(" " * 52 + " ".join(method.rjust(width) for method in methods))
    for number in sorted(texts):
        row = []
        for method in methods:
            found = counts[number, method]
            parts = [str(found["passed"])] if found["passed"] else []
            parts += [f"{found[kind]}{sign}" for kind, sign in (("refused", "r"), ("skipped", "s"), ("failed", "F"))
                      if found[kind]]
            absent = config.stash[ABSENT].get(f"{number}|{method}")
            row.append("+".join(parts) or ("-" if absent else "."))
        write(f"{number:>3} {texts[number][:47]:<47} " + " ".join(cell.rjust(width) for cell in row))
    total = Counter(result for found in counts.values() for result in found.elements())
    absent = sum(config.stash[ABSENT].values())
    write(f"    {total['passed']} passed, {total['refused']} refused, {total['failed']} failed, "
          f"{total['skipped']} skipped, {absent} do not apply")
