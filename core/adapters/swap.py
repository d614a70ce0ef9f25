"""One attached method's values replaced by those of another trained one of the same shape."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.adapters.filling import Content, load_tensors
from core.adapters.reading import Saved, base_of, open_adapter
from core.anatomy import dissect
from core.errors import ScionError, listed
from core.json_types import shown
from core.method import key_of
from core.method.contents import live_tensors
from core.method.described import FileNames
from core.method.saving import check_tokenizer

if TYPE_CHECKING:
    from core.method import PEFTMethod

FREE = ("name", "seed", "trainable", "lr", "dropout", "head", "on", "backbone_mode")
"""Arguments in which two methods of the same shape may differ."""


def swap(method: PEFTMethod, source: str | Path) -> None:
    """Give an attached method the values of the same kind of method in a file; nothing else of the model changes.

    Args:
        method: attached to its model.
        source: an adapter folder, or a run folder. Of several methods in it the one with ``method``'s name is taken, or
            the only one of its class.

    Raises:
        ScionError: no such method there, one of another shape, or of another base or tokenizer; nothing has changed
            then.
    """
    saved = open_adapter(source)
    saved.check_whole()
    where = str(source)
    spec = _spec_of(method, saved, where)
    _check_same_shape(method, spec, where)
    anatomy = dissect(method.need_root())
    content = Content.of(saved.record, saved.tensors, anatomy)
    base = base_of(anatomy)
    if not base.agrees(saved.record["base"], content.names.from_root):
        recorded = saved.record["base"]["fingerprint"]
        here = base.fingerprint(content.names.from_root)
        raise ScionError(f"{where}: was trained on another base (fingerprint {recorded}, here it is {here}): "
                         f"{method.name} cannot be replaced by it")
    check_tokenizer(saved.record, anatomy.root, where)
    own = _tensors_of(method, spec, content)
    apart = frozenset(_here(name, method, spec) for name in content.apart)
    load_tensors([method], replace(content, tensors=own, apart=apart, unfrozen=()), where)


def _spec_of(method: PEFTMethod, saved: Saved, where: str) -> dict[str, Any]:
    """What the file says of the method that is to come."""
    specs: list[Any] = saved.record["methods"]
    alike = [spec for spec in specs if spec["class"] == method.spec()["class"]]
    named = [spec for spec in alike if spec["name"] == method.name]
    if named:
        return named[0]
    if len(alike) == 1:
        return alike[0]
    there = listed(f"{spec['name']} ({spec['class']})" for spec in specs)
    raise ScionError(f"{where}: holds no {type(method).__name__} that could replace {method.name}; it has {there}")


def _check_same_shape(method: PEFTMethod, spec: dict[str, Any], where: str) -> None:
    own = method.spec()
    for key, value in own["config"].items():
        other = spec["config"].get(key, value)
        if key not in FREE and other != value:
            raise ScionError(f"{where}: has {key} {shown(other)}, and {method.name} has {shown(value)}; only a method "
                             "of the same shape can replace it")
    if own.get("structure", {}) != spec.get("structure", {}):
        raise ScionError(f"{where}: is in another stage than {method.name}, or has grown otherwise; only a method of "
                         "the same shape can replace it")


def _here(name: str, method: PEFTMethod, spec: dict[str, Any]) -> str:
    """What a tensor of the file's method is called in the attached one."""
    there = f"peft.{key_of(spec['name'])}."
    return f"peft.{key_of(method.name)}.{name.removeprefix(there)}" if name.startswith(there) else name


def _tensors_of(method: PEFTMethod, spec: dict[str, Any], content: Content) -> dict[str, Tensor]:
    """The method's tensors in the file, by the names that a file of this model would give them."""
    found: dict[str, Tensor] = {}
    for name, tensor in content.tensors.items():
        if name.startswith(f"peft.{key_of(spec['name'])}."):
            found[_here(name, method, spec)] = tensor
    names = FileNames(content.names, [method])
    for name in map(names.of, live_tensors(method)):
        if name in content.tensors and not name.startswith("peft."):
            found[name] = content.tensors[name]
    return found
