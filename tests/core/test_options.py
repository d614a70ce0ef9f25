"""Every option that the table of methods shows takes another value than its default."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from core import Patch, peft, report
from core.errors import ScionError
from core.record import types_of

TOGETHER: dict[tuple[str, str], dict[str, Any]] = {
    ("SideTuning", "pretrained"): {"network": "alexnet"},
    ("SpIEL", "momentum"): {"kind": "MA"},
}
"""Options that mean something only beside others."""
ROLES = ["q", "k"]


def candidates(kind: Any, default: Any) -> Iterator[Any]:
    """Values of a type that are not the default."""
    if get_origin(kind) is Literal:
        yield from (value for value in get_args(kind) if value != default)
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from candidates(part, default)
    elif kind is bool:
        yield not default
    elif kind is int:
        yield from (value for value in (2, 1, 4, 8, 3, 0, 16) if value != default)
    elif kind is float:
        yield from (value for value in (0.5, 0.25, 2.0, 1.0, 0.0, 1e-3) if value != default)
    elif kind is str:
        yield from ("other", "nowhere/folder")
    elif get_origin(kind) is tuple or "Sequence" in str(kind) or get_origin(kind) is list:
        yield from (ROLES, [0], ["norm1"], [2, 2], ["out"], [["x", 3]])
    elif "dict" in str(kind) or "Mapping" in str(kind):
        yield {"a": 2, "b": 3}


def refusals(name: str, option: str, default: Any, folder: Path) -> list[str]:
    """What is said to each other value, up to the first that is taken; empty where one is."""
    cls = peft.method_class(name)
    said = []
    if option == "patch":
        Patch({}).save(folder / "patch")
        TOGETHER[name, option] = {"patch": str(folder / "patch")}
    for value in candidates(types_of(cls)[option], default):
        try:
            cls(**{option: value, **TOGETHER.get((name, option), {})})
        except ScionError as error:
            said.append(str(error))
        else:
            return []
    return said or [f"{option}: no other value is known to this test"]


@pytest.mark.parametrize("name", peft.registry())
def test_an_option_can_be_set(name: str, tmp_path: Path) -> None:
    refused = {}
    for argument in report.card_json(name)["arguments"]:
        if not argument["common"]:
            said = refusals(name, argument["name"], argument.get("default"), tmp_path)
            if said:
                refused[argument["name"]] = said
    assert refused == {}


def test_an_option_that_refuses_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fixed(self: Any, rank: int = 8, **common: Any) -> None:
        if rank != 8:
            raise ScionError("Fixed: rank must be 8")

    cls = type("Fixed", (), {"__init__": fixed})
    monkeypatch.setattr(peft, "method_class", lambda name: cls)
    assert refusals("Fixed", "rank", 8, tmp_path) == ["Fixed: rank must be 8"] * 6
