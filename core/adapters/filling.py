"""Saved tensors copied into attached methods; every one is looked at before the first is written."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy
from core.errors import ScionError, listed, one_line
from core.graft import Graft
from core.method import Home, PEFTMethod, Spec
from core.method.beside import OUTSIDE
from core.method.contents import live_tensors, packings_on
from core.method.described import AROUND, FileNames, Names, parameter_names, structure_in_root
from core.method.saving import FROM_ROOT
from core.tensors import check_fit, check_values


@dataclass(frozen=True)
class Content:
    """What a file holds for one model: the methods' records in the model's names, the tensors in the file's.

    Without ``names``, the tensors have the model's own names too.
    """

    specs: list[Spec]
    tensors: dict[str, Tensor]
    names: Names = Names(from_root=True)
    apart: frozenset[str] = frozenset()
    """Names, in the file, of tensors that are left out on a model that has no place for them."""
    unfrozen: tuple[str, ...] = ()
    """Names, in the file, of parameters of the base that were trained beside the methods: they are written into it."""

    @classmethod
    def of(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor], anatomy: Anatomy) -> Content:
        """What a record and its tensors mean for this model; what stood beside the backbone is no part of it."""
        names = names_in(record, anatomy)
        apart = frozenset(record.get("apart", ()))
        known = parameter_names(anatomy.root)
        specs: list[Spec] = []
        for spec in record["methods"]:
            structure = structure_in_root(spec.get("structure", {}), names, known, apart)
            own_spec: Any = {**spec, "structure": structure}
            specs.append(own_spec)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
        return cls(specs, own, names, apart, tuple(record.get("unfrozen", ())))


def names_in(record: Mapping[str, Any], anatomy: Anatomy) -> Names:
    """How a record names the tensors of this model: files of earlier versions count from the root."""
    if record["format"] == FROM_ROOT:
        return Names(from_root=True)
    return Names.of(anatomy)


@dataclass(frozen=True)
class _Packed:
    """A tensor that a method stores in another form than it uses it, with that form's parts by their names in files."""

    packing: Graft
    parts: dict[str, Tensor]
    live: Tensor


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a file belong."""

    into: dict[str, Tensor]
    """By the names that the file must have: tensors that take the file's values, or the parts of packed ones."""
    packed: dict[str, _Packed]
    """Those of the methods' tensors that the file has in their stored form, by what the file would call them plain."""
    optional: set[str]
    """Names that the file may lack: what is apart from the backbone stays as it is then."""
    beside: list[str]
    """Names of parameters of the base among them that no method owns."""


def load_tensors(methods: list[PEFTMethod], content: Content, where: str = "", write: bool = True) -> None:
    """Copy saved tensors into attached methods; all are checked before any is written.

    Missing and extra tensors are refused, those of another shape or kind of numbers, and values that are not finite or
    out of range. Tensors that lie apart from the backbone (a language-model head, a pooler, a classifier) are written
    where the model has them, and left out with a warning where it has not.
    """
    given = content.tensors
    names = FileNames(content.names, _all_on(methods[0]))
    places = _places(methods, content, names)
    _check_places(places, content, where)
    if not write:
        return
    limits = {names.of(name): limit for name, limit in _limits(methods).items()}
    for name, tensor in places.into.items():
        check_values(given[name], tensor, name, where, limits.get(name))
    _fill(places, given, where)
    for method in methods:
        method.prepared = True
    if places.beside:
        warnings.warn(f"{where}: {listed(places.beside, 3)} of the base was trained beside the methods and is written "
                      "into it; remove() does not take that back", stacklevel=3)
    left = sorted(given.keys() - places.into.keys())
    if left:
        root = methods[0].need_root()
        warnings.warn(f"{where}: left out, because {type(root).__name__} has no such tensors and they lie apart from "
                      f"the backbone that the adapter belongs to: {listed(map(one_line, left), 3)}", stacklevel=3)


def _all_on(method: PEFTMethod) -> list[PEFTMethod]:
    """All methods on the method's root: one may store the tensors of another."""
    home: Home = method.need_root().peft  # type: ignore[assignment]
    return list(home.methods.values())


def _places(methods: list[PEFTMethod], content: Content, names: FileNames) -> _Places:
    """Where the tensors of a file belong that holds these methods, and parameters of the base."""
    root, given = methods[0].need_root(), content.tensors
    home: Home = root.peft  # type: ignore[assignment]
    parameters = dict(root.named_parameters())
    live: dict[str, Tensor] = {}
    later: set[str] = set()
    for method in methods:
        live |= live_tensors(method)
        later |= {name for name in method.buffers_at_start if names.of(name) not in given}
    # Files of earlier versions lack the base's buffers.
    into = {names.of(name): tensor for name, tensor in live.items() if name not in later}
    optional = {names.of(name) for name in live if names.is_apart(name)}
    packed: dict[str, _Packed] = {}
    for name, packing in packings_on(methods[0]).items():
        in_file = names.of(name)
        if name in live and in_file not in given:  # a checkpoint holds the form in use
            parts = {f"{in_file}.{part}": tensor for part, tensor in packing.pack(live[name]).items()}
            packed[in_file] = _Packed(packing, parts, into.pop(in_file))
            into |= parts
    heads = {names.of(name): parameters[name].detach() for name in home.heads if name in parameters}
    into |= {name: tensor for name, tensor in heads.items() if name in given}
    beside: list[str] = []
    for name in content.unfrozen:
        own = content.names.in_root(name)
        if name in given and own in parameters and name not in into:
            beside.append(name)
            into[name] = parameters[own].detach()
    absent = optional - given.keys()
    present = {name: tensor for name, tensor in into.items() if name not in absent}
    return _Places(present, packed, optional, beside)


def _check_places(places: _Places, content: Content, where: str) -> None:
    """Refuse a file that lacks a tensor, has one too many, or one that does not fit its place."""
    into, given = places.into, content.tensors
    missing = sorted(into.keys() - given.keys())
    extra = sorted(given.keys() - into.keys() - content.apart)
    if missing:
        raise ScionError(f"{where}: tensors are missing: {listed(missing, 4)}")
    if extra:
        raise ScionError(f"{where}: tensors that no method here has: {listed(map(one_line, extra), 4)}")
    for name, tensor in into.items():
        try:
            check_fit(given[name], tensor, name, where)
        except ScionError as error:
            if not name.startswith(AROUND):
                raise
            inner = content.names.path
            raise ScionError(f"{error}; load the adapter into the model's {inner} alone to leave that out") from None


def _limits(methods: list[PEFTMethod]) -> dict[str, int]:
    """The limits of whole numbers in the methods' tensors, by the tensors' names in the root."""
    limits: dict[str, int] = {}
    for method in methods:
        for path, graft in method.module.named_modules():
            if isinstance(graft, Graft):
                limits |= {f"{method.prefix}{path}.{name}": limit for name, limit in graft.limits().items()}
    return limits


@torch.no_grad()
def _fill(places: _Places, given: dict[str, Tensor], where: str) -> None:
    """Write the file's tensors; packed ones are unpacked and checked first, while nothing is written yet."""
    unpacked: dict[str, Tensor] = {}
    for name, stored in places.packed.items():
        unpacked[name] = torch.empty_like(stored.live)
        parts = {part.removeprefix(f"{name}."): given[part] for part in stored.parts}
        stored.packing.unpack(parts, unpacked[name])
        check_values(unpacked[name], stored.live, name, where)
    for name, tensor in places.into.items():
        tensor.copy_(given[name])
    for name, tensor in unpacked.items():
        places.packed[name].live.copy_(tensor)
