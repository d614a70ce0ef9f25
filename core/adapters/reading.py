"""Methods from an adapter folder or a checkpoint: read, checked against the schema, rebuilt, attached and filled.

Nothing in a file is executed: a method is looked up by name in the registry.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from core import peft
from core.adapters.rehearsal import hollow, is_small, largest, reach, rehearsing, twin
from core.anatomy import dissect
from core.errors import ScionError, listed, one_line
from core.files import read_json
from core.graft import Graft
from core.json_types import Digest, check
from core.method import Home, PEFTMethod, Spec, check_structure, decode_extra_state, uncompiled
from core.method.bases import check_base
from core.method.beside import OUTSIDE, ModelRecord
from core.method.contents import live_tensors, packings_on
from core.method.fingerprint import fingerprint
from core.method.saving import FORMAT, RECORD, TENSORS
from core.record import check_arguments
from core.tensors import check_fit, check_values, checksum, read_checkpoint, read_tensors

LARGEST_RECORD = 16 * 2**20
"""Bytes of an adapter's record."""
DEEPEST = 4
"""Compositions within compositions."""


# ------------------------------------------------------------------------------------------------- reading


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in an adapter folder, a run folder or a Lightning checkpoint."""
    saved = open_adapter(source)
    saved.check_whole()
    return saved.record, saved.tensors


# Written as a call, for class is a keyword of Python.
BaseRecord = TypedDict("BaseRecord", {"class": str, "fingerprint": Digest})
"""Which model the methods belong to."""


class Record(TypedDict):
    """What adapter.json holds."""

    format: int
    methods: list[Spec]
    base: BaseRecord
    versions: NotRequired[dict[str, str]]
    model: NotRequired[ModelRecord]
    unfrozen: NotRequired[list[str]]
    beside: NotRequired[str]
    sha256: NotRequired[Digest]


@dataclass(frozen=True)
class Saved:
    """An adapter as it was read: its record agrees with the schema, nothing is built yet."""

    record: dict[str, Any]
    tensors: dict[str, Tensor]
    file: Path | None = None
    """Where the tensors are, if not in the same file as the record."""

    def check_whole(self) -> None:
        """Refuse tensors other than those that the record was written with. Older records do not say which."""
        claimed = self.record.get("sha256")
        if self.file is None or claimed is None:
            return
        try:
            found = checksum(self.file)
        except OSError as error:
            raise ScionError(f"{self.file}: cannot be read ({error.strerror})") from None
        if found != claimed:
            raise ScionError(f"{self.file}: not the tensors that {RECORD} was written with, for their checksums "
                             "differ; copy both files again")


def open_adapter(source: str | Path) -> Saved:
    """The adapter in an adapter folder, a run folder or a Lightning checkpoint, checked against the schema.

    Raises:
        ScionError: there is none, or it is damaged.
    """
    path = Path(source)
    if os.path.isfile(path):
        return Saved(*_read_checkpoint(path))
    if os.path.isfile(path / "adapter" / RECORD):
        path = path / "adapter"
    if not os.path.isfile(path / RECORD):
        raise ScionError(f"{source}: no {RECORD} here; give an adapter folder, a run folder or a .ckpt file")
    record = read_json(path / RECORD, LARGEST_RECORD)
    if not isinstance(record, dict) or not {"format", "methods", "base"} <= record.keys():
        raise ScionError(f"{path / RECORD}: damaged, or not an adapter's record")
    if record["format"] != FORMAT:
        raise ScionError(f"{path / RECORD}: format {one_line(record['format'])[:40]} is unknown; this version reads "
                         f"{FORMAT}")
    check_record(record, str(path / RECORD))
    return Saved(record, read_tensors(path / TENSORS), path / TENSORS)


def check_record(record: dict[str, Any], where: str) -> None:
    """Refuse a record that does not agree with the schema: types, names of classes, their options and structures.

    Raises:
        ScionError: says what is wrong where.
    """
    check(record, Record, where)
    if not record["methods"]:
        raise ScionError(f"{where}: holds no method")
    for spec in record["methods"]:
        _check_spec(spec, where)


def _check_spec(spec: Spec, where: str, depth: int = 0) -> None:
    """Refuse a method's record that does not agree with its class; ``depth`` compositions are around it."""
    try:
        cls = peft.method_class(spec["class"])
    except ScionError as error:
        raise ScionError(f"{where}: {error}") from None
    options = peft.present_options(cls, spec["config"])
    # What a method starts from (a folder, a download) is not opened again: its tensors are in the file.
    config = {key: value for key, value in options.items() if key not in cls.start_only}
    check_arguments(cls, {**config, "name": spec["name"]}, where)
    if cls.__name__ in peft.COMPOSITIONS:
        if depth == DEEPEST:
            raise ScionError(f"{where}: compositions are nested too deeply")
        for entry in config["methods"]:
            inner = _entry(entry)
            check(inner, Spec, where, f"{cls.__name__}.methods")
            _check_spec(inner, where, depth + 1)
    check_structure(cls, spec.get("structure", {}), where)


def _entry(entry: Any) -> Any:
    """A method in a composition, in the form of one outside of any: class, name and config apart."""
    if not isinstance(entry, dict):
        return entry
    spec = {key: entry[key] for key in ("class", "name") if key in entry}
    config = {key: value for key, value in entry.items() if key not in spec}
    return {**spec, "config": config}


def method_of(spec: Spec, **changes: Any) -> PEFTMethod:
    """A method from its record, which has been checked. Nothing that the record points to is opened."""
    arguments = {**_arguments(spec), "name": spec["name"], **changes}
    return peft.make(spec["class"], arguments)


def _arguments(spec: Spec) -> dict[str, Any]:
    """The arguments that make the method, without those of its start."""
    left_out = peft.method_class(spec["class"]).start_only
    config = {key: value for key, value in spec["config"].items() if key not in left_out}
    if spec["class"] in peft.COMPOSITIONS:
        members: list[dict[str, Any]] = []
        for entry in config["methods"]:
            inner = _entry(entry)
            members.append({"class": inner["class"], **_arguments(inner), "name": inner["name"]})
        config["methods"] = members
    return config


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in a Lightning checkpoint."""
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ScionError(f"{path}: not a readable checkpoint; it holds no state_dict")
    return split_checkpoint(state, str(path))


def split_checkpoint(state: dict[str, Any], where: str, made: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in the state dict of a checkpoint, whatever module the backbone is in.

    With ``made`` the methods exist already, and may be of classes that the registry does not know.
    """
    for name in state:
        check(name, str, where, "a name in the state_dict")
    # <path of the root>peft.<method>._extra_state holds each method's record
    records: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        if name.endswith("._extra_state") and "peft." in name:
            records[name] = decode_extra_state(tensor, f"{where}: {one_line(name)}")
    if not records:
        raise ScionError(f"{where}: this checkpoint holds no PEFT method")
    roots = list(dict.fromkeys(name.rpartition("peft.")[0] for name in records))
    if len(roots) > 1:
        raise ScionError(f"{where}: holds methods on several backbones ({listed(roots)}): make the module, attach the "
                         "methods, and load the checkpoint into that")
    prefix = roots[0]
    tensors: dict[str, Tensor] = {}
    outside: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            outside[f"{OUTSIDE}{name}"] = tensor
        elif not name.endswith("_extra_state"):
            tensors[name.removeprefix(prefix)] = tensor
    specs = [_without_base(record) for record in records.values()]
    first = next(iter(records.values()))  # all methods of a root have one base
    record: dict[str, Any] = {"format": FORMAT, "methods": specs, "base": {"class": "", "fingerprint": first["base"]}}
    record["beside"] = prefix.removesuffix(".")
    record["unfrozen"] = [name for name in tensors if not name.startswith("peft.")]
    if not made:
        check_record(record, where)
    return record, {**tensors, **outside}


def _without_base(record: dict[str, Any]) -> dict[str, Any]:
    """A method's record in a checkpoint, where each names the base, as an adapter folder has it."""
    return {key: value for key, value in record.items() if key != "base"}


# ------------------------------------------------------------------------------------------------- making again


def restore(record: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module,
            base: Literal["same", "any"] | nn.Module = "same", where: str = "",
            check_whole: Callable[[], None] | None = None) -> list[PEFTMethod]:
    """Make the methods of ``record``, attach them to ``model`` and load ``tensors`` strictly.

    Args:
        record: as `read_adapter` gives it.
        tensors: likewise.
        model: the backbone; untouched where anything is refused.
        base: see `load_adapter`.
        where: the source, for messages.
        check_whole: called once everything fits and before anything is written; refuses damaged files.
    """
    model = uncompiled(model)
    check_base(model, where)
    anatomy = dissect(model)
    heads = anatomy.head_names()
    print_now = fingerprint(model, without=heads)
    expected = record["base"]["fingerprint"]
    other = print_now != expected
    if other and base != "same":
        tensors = _carried(tensors, model, heads, base, expected, where)
        warnings.warn(f"{where}: carried from base {expected} to {print_now}", stacklevel=3)
    done: list[PEFTMethod] = []
    try:
        unfrozen = record.get("unfrozen", ())
        rehearse(record["methods"], tensors, model, where, unfrozen)
        attach(record["methods"], model, done)
        load_tensors(done, tensors, where, write=False, unfrozen=unfrozen)
        # Refused only now: what does not fit on another base says more than that it is another.
        if other and base == "same":
            raise ScionError("all names and shapes fit")
        if check_whole is not None:
            check_whole()
        load_tensors(done, tensors, where, unfrozen=unfrozen)
    except Exception as error:
        for method in reversed(done):
            method.remove()
        what = str(refusal(error)).removeprefix(f"{where}: ")
        if other and base == "same":
            what = (f"the adapter belongs to another base (fingerprint {expected}, here {print_now}; {what}); load it "
                    "onto the backbone it was trained on, or pass base='any' to carry it over")
        raise ScionError(f"{where}: {what}") from (None if isinstance(error, ScionError) else error)
    return done


def attach(specs: list[Spec], model: nn.Module, done: list[PEFTMethod]) -> None:
    """Attach the methods of these records in their saved structures; ``done`` lists those to remove after an error."""
    methods = [method_of(spec) for spec in specs]
    for method, spec in zip(methods, specs, strict=True):
        method.attach(model)
        done.append(method)
        method.restructure(spec.get("structure", {}))


def refusal(error: Exception) -> ScionError:
    """The reason why a record cannot be built, in one line."""
    if isinstance(error, ScionError):
        return error
    # The record's types have been checked; values that do not go together may fail in any line of a method or of torch.
    lines = str(error).strip().splitlines() or [""]
    reason = one_line(lines[0])[:200]
    return ScionError(f"cannot be built as it is recorded ({type(error).__name__}: {reason})")


def rehearse(specs: list[Spec], tensors: dict[str, Tensor], model: nn.Module, where: str,
             unfrozen: Iterable[str] = ()) -> None:
    """Refuse what would be larger than the tensors of the file, without building it: see `core.adapters.rehearsal`.

    Raises:
        ScionError: a tensor that the methods would have is not in the file, or has another shape there.
    """
    structures = [spec.get("structure", {}) for spec in specs]
    factor = max(reach(spec["config"]) for spec in specs) * largest(structures)
    if is_small(factor, model):
        return
    hollow_model = twin(model)
    if hollow_model is None:
        return
    count = len(tensors) + len(list(model.parameters()))
    done: list[PEFTMethod] = []
    with rehearsing(count):
        attach(specs, hollow_model, done)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
        load_tensors(done, hollow(own), where, write=False, unfrozen=unfrozen)


def _carried(tensors: dict[str, Tensor], model: nn.Module, heads: set[str], base: Literal["any"] | nn.Module | str,
             expected: str, where: str) -> dict[str, Tensor]:
    """``tensors`` for another base: of the base's own tensors the change is carried, not the value."""
    buffers = {name for name, _ in model.named_buffers()}  # statistics go as they are
    as_they_are = heads | buffers
    moved = [name for name in tensors if not name.startswith(("peft.", OUTSIDE)) and name not in as_they_are]
    if not moved:
        return tensors
    here = dict(model.named_parameters())
    for name in moved:
        if name not in here:
            raise ScionError(f"{where}: {name} is {list(tensors[name].shape)} in the file, absent here")
        check_fit(tensors[name], here[name], name, where)
    if not isinstance(base, nn.Module):
        raise ScionError(f"{where}: holds values of its base's own tensors ({listed(moved, 2)}), not the change of "
                         "them, so that alone it cannot be carried to another base; pass base=<the backbone it was "
                         "trained on>")
    trained_on = uncompiled(base)
    if fingerprint(trained_on, without=dissect(trained_on).head_names()) != expected:
        raise ScionError(f"{where}: the module given as base is not the one that the adapter was trained on "
                         f"(fingerprint {expected})")
    start = dict(trained_on.named_parameters())
    changed: dict[str, Tensor] = {}
    for name in moved:
        # In float64, so that the difference of two float32 numbers is exact enough to be added again.
        change = tensors[name].double().cpu() - _wide(start[name])
        value = _wide(here[name]) + change
        changed[name] = value.to(tensors[name].dtype)
    return {**tensors, **changed}


def _wide(parameter: Tensor) -> Tensor:
    """A parameter's values in float64."""
    return parameter.detach().double().cpu()


# ------------------------------------------------------------------------------------------------- filling


@dataclass(frozen=True)
class _Packed:
    """A tensor that a method stores in another form than it uses it, with that form's parts."""

    packing: Graft
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class _Places:
    """Where the tensors of a file belong."""

    live: dict[str, Tensor]
    """The methods' tensors in use, by their names in the root."""
    packed: dict[str, _Packed]
    """Those of them that the file has in their stored form."""
    into: dict[str, Tensor]
    """By the names that the file must have: tensors that take the file's values, or the parts of packed ones."""
    beside: list[str]
    """Parameters of the base among them that no method owns."""


def load_tensors(methods: list[PEFTMethod], tensors: dict[str, Tensor], where: str = "", write: bool = True,
                 unfrozen: Iterable[str] = ()) -> None:
    """Copy saved tensors into attached methods; all are checked before any is written.

    Missing and extra tensors are refused, those of another shape or kind of numbers, and values that are not finite or
    out of range. ``unfrozen`` names parameters of the base that were trained beside the methods: where the file has
    them, they are written into the base.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    places = _places(methods, given, unfrozen)
    _check_places(places.into, given, where)
    if not write:
        return
    limits = _limits(methods)
    for name, tensor in places.into.items():
        check_values(given[name], tensor, name, where, limits.get(name))
    _fill(places, given, where)
    for method in methods:
        method.prepared = True
    if places.beside:
        warnings.warn(f"{where}: {listed(places.beside, 3)} of the base was trained beside the methods and is written "
                      "into it; remove() does not take that back", stacklevel=3)


def _places(methods: list[PEFTMethod], given: dict[str, Tensor], unfrozen: Iterable[str]) -> _Places:
    """Where the tensors of a file belong that holds these methods, and ``unfrozen`` parameters of the base."""
    root = methods[0].need_root()
    home: Home = root.peft  # type: ignore[assignment]
    parameters = dict(root.named_parameters())
    live: dict[str, Tensor] = {}
    later: set[str] = set()
    for method in methods:
        live |= live_tensors(method)
        later |= method.buffers_at_start.keys() - given.keys()
    packed: dict[str, _Packed] = {}
    for name, packing in packings_on(methods[0]).items():
        if name in live and name not in given:  # a checkpoint holds the form in use
            packed[name] = _Packed(packing, packing.pack(live[name]))
    into = {name: tensor for name, tensor in live.items() if name not in packed}
    for name, stored in packed.items():
        into |= {f"{name}.{part}": tensor for part, tensor in stored.parts.items()}
    # Files of earlier versions lack the base's buffers.
    into = {name: tensor for name, tensor in into.items() if name not in later}
    into |= {name: parameters[name].detach() for name in home.heads if name in given}
    beside = [name for name in unfrozen if name in given and name in parameters and name not in into]
    into |= {name: parameters[name].detach() for name in beside}
    return _Places(live, packed, into, beside)


def _check_places(into: dict[str, Tensor], given: dict[str, Tensor], where: str) -> None:
    """Refuse a file that lacks a tensor, has one too many, or one that does not fit its place."""
    missing = sorted(into.keys() - given.keys())
    extra = sorted(given.keys() - into.keys())
    if missing:
        raise ScionError(f"{where}: tensors are missing: {listed(missing, 4)}")
    if extra:
        raise ScionError(f"{where}: tensors that no method here has: {listed(map(one_line, extra), 4)}")
    for name, tensor in into.items():
        check_fit(given[name], tensor, name, where)


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
        unpacked[name] = torch.empty_like(places.live[name])
        parts = {part: given[f"{name}.{part}"] for part in stored.parts}
        stored.packing.unpack(parts, unpacked[name])
        check_values(unpacked[name], places.live[name], name, where)
    for name, tensor in places.into.items():
        tensor.copy_(given[name])
    for name, tensor in unpacked.items():
        places.live[name].copy_(tensor)
