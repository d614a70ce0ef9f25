"""Methods from an adapter folder or a checkpoint: read, checked against the schema, made again, attached, filled.

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


# ------------------------------------------------------------------------------------------------- adapter folders


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in an adapter folder, a run folder or a Lightning checkpoint."""
    saved = open_adapter(source)
    saved.check_whole()
    return saved.record, saved.tensors


# ------------------------------------------------------------------------------------------------- reading


BaseRecord = TypedDict("BaseRecord", {"class": str, "fingerprint": Digest})
"""Which model the methods stand on."""


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
    """Where the tensors are, if they have a file of their own."""

    def check_whole(self) -> None:
        """Refuse tensors that are not those that the record was written with. Older records do not tell."""
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
    try:
        cls = peft.method_class(spec["class"])
    except ScionError as error:
        raise ScionError(f"{where}: {error}") from None
    options = peft.present_options(cls, spec["config"])
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
    """A method in a composition, in the form of one that stands alone."""
    if not isinstance(entry, dict):
        return entry
    given = {key: entry[key] for key in ("class", "name") if key in entry}
    return {**given, "config": {key: value for key, value in entry.items() if key not in given}}


def method_of(spec: Spec, **changes: Any) -> PEFTMethod:
    """A method from its record, which has been checked. Nothing that the record points to is opened."""
    return peft.make(spec["class"], {**_arguments(spec), "name": spec["name"], **changes})


def _arguments(spec: Spec) -> dict[str, Any]:
    left_out = peft.method_class(spec["class"]).start_only
    config = {key: value for key, value in spec["config"].items() if key not in left_out}
    if spec["class"] in peft.COMPOSITIONS:
        inner = [_entry(entry) for entry in config["methods"]]
        config["methods"] = [{"class": one["class"], **_arguments(one), "name": one["name"]} for one in inner]
    return config


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = read_checkpoint(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ScionError(f"{path}: not a readable checkpoint; it holds no state_dict")
    return split_checkpoint(state, str(path))


def split_checkpoint(state: dict[str, Any], where: str, made: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in the state dict of a checkpoint, whatever module the backbone sits in.

    With ``made`` the methods are there already, and may be of classes that the registry does not know.
    """
    for name in state:
        check(name, str, where, "a name in the state_dict")
    # <path of the root>peft.<method>._extra_state holds each method's record
    records = [(name, decode_extra_state(tensor, f"{where}: {one_line(name)}")) for name, tensor in state.items()
               if name.endswith("._extra_state") and "peft." in name]
    if not records:
        raise ScionError(f"{where}: this checkpoint holds no PEFT method")
    roots = list(dict.fromkeys(name.rpartition("peft.")[0] for name, _ in records))
    if len(roots) > 1:
        raise ScionError(f"{where}: holds methods on several backbones ({listed(roots)}): make the module, attach the "
                         "methods, and load the checkpoint into that")
    prefix = roots[0]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items()
               if name.startswith(prefix) and not name.endswith("_extra_state")}
    outside = {f"{OUTSIDE}{name}": tensor for name, tensor in state.items() if not name.startswith(prefix)}
    specs = [{key: value for key, value in record.items() if key != "base"} for _, record in records]
    record = {"format": FORMAT, "methods": specs, "base": {"class": "", "fingerprint": records[0][1]["base"]},
              "beside": prefix.removesuffix("."),
              "unfrozen": [name for name in tensors if not name.startswith("peft.")]}
    if not made:
        check_record(record, where)
    return record, {**tensors, **outside}


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
    print_now = fingerprint(model, without=anatomy.head_names())
    expected = record["base"]["fingerprint"]
    other = print_now != expected
    if other and base != "same":
        tensors = _carried(tensors, model, anatomy.head_names(), base, expected, where)
        warnings.warn(f"{where}: carried from base {expected} to {print_now}", stacklevel=3)
    done: list[PEFTMethod] = []
    try:
        unfrozen = record.get("unfrozen", ())
        rehearse(record["methods"], tensors, model, where, unfrozen)
        attach(record["methods"], model, done)
        load_tensors(done, tensors, where, write=False, unfrozen=unfrozen)
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
    """Attach the methods of these records in their saved structures; ``done`` is what has to be taken off again."""
    methods = [method_of(spec) for spec in specs]
    for method, spec in zip(methods, specs, strict=True):
        method.attach(model)
        done.append(method)
        method.restructure(spec.get("structure", {}))


def refusal(error: Exception) -> ScionError:
    """What building from a record was refused for. The types in it are right; what else does not go together comes up
    in any line of a method or of torch."""
    if isinstance(error, ScionError):
        return error
    lines = str(error).strip().splitlines() or [""]
    return ScionError(f"cannot be built as it is recorded ({type(error).__name__}: {one_line(lines[0])[:200]})")


def rehearse(specs: list[Spec], tensors: dict[str, Tensor], model: nn.Module, where: str,
             unfrozen: Iterable[str] = ()) -> None:
    """Refuse what would be larger than the tensors of the file, without building it: see `core.adapters.rehearsal`.

    Raises:
        ScionError: a tensor that the methods would have is not in the file, or has another shape there.
    """
    structures = [spec.get("structure", {}) for spec in specs]
    factor = max(reach(spec["config"]) for spec in specs) * largest(structures)
    hollow_model = None if is_small(factor, model) else twin(model)
    if hollow_model is None:
        return
    count = len(tensors) + sum(1 for _ in model.parameters())
    done: list[PEFTMethod] = []
    with rehearsing(count):
        attach(specs, hollow_model, done)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
        load_tensors(done, hollow(own), where, write=False, unfrozen=unfrozen)


def _carried(tensors: dict[str, Tensor], model: nn.Module, heads: set[str], base: Literal["any"] | nn.Module | str,
             expected: str, where: str) -> dict[str, Tensor]:
    """``tensors`` for another base: of the base's own tensors the change is carried, not the value."""
    buffers = {name for name, _ in model.named_buffers()}  # statistics go as they are
    moved = [name for name in tensors
             if not name.startswith(("peft.", OUTSIDE)) and name not in heads and name not in buffers]
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
        change = tensors[name].double().cpu() - start[name].detach().double().cpu()
        changed[name] = (here[name].detach().double().cpu() + change).to(tensors[name].dtype)
    return {**tensors, **changed}


def load_tensors(methods: list[PEFTMethod], tensors: dict[str, Tensor], where: str = "", write: bool = True,
                 unfrozen: Iterable[str] = ()) -> None:
    """Copy saved tensors into attached methods. Missing and extra ones, those of another shape or kind of numbers, and
    values that are not finite or out of range are refused before any is written. ``unfrozen`` names parameters of the
    base that were trained beside the methods: where the file has them, they are written into the base."""
    root = methods[0].need_root()
    home: Home = root.peft  # type: ignore[assignment]
    parameters = dict(root.named_parameters())
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    live = {name: tensor for method in methods for name, tensor in live_tensors(method).items()}
    packed = {name: (packing, packing.pack(live[name])) for name, packing in packings_on(methods[0]).items()
              if name in live and name not in given}  # a checkpoint holds the form in use
    into = {name: tensor for name, tensor in live.items() if name not in packed}
    into.update({f"{name}.{part}": tensor for name, (_, parts) in packed.items() for part, tensor in parts.items()})
    buffers = {name for method in methods for name in method.buffers_at_start} - set(given)
    into = {name: tensor for name, tensor in into.items() if name not in buffers}  # files of earlier versions lack them
    into.update({name: parameters[name].detach() for name in home.heads if name in tensors})
    beside = [name for name in unfrozen if name in given and name in parameters and name not in into]
    into.update({name: parameters[name].detach() for name in beside})
    missing, extra = sorted(set(into) - set(given)), sorted(set(given) - set(into))
    if missing:
        raise ScionError(f"{where}: tensors are missing: {listed(missing, 4)}")
    if extra:
        raise ScionError(f"{where}: tensors that no method here has: {listed(map(one_line, extra), 4)}")
    for name, tensor in into.items():
        check_fit(given[name], tensor, name, where)
    if not write:
        return
    limits = {f"{method.prefix}{path}.{name}": limit for method in methods
              for path, graft in method.module.named_modules() if isinstance(graft, Graft)
              for name, limit in graft.limits().items()}
    for name, tensor in into.items():
        check_values(given[name], tensor, name, where, limits.get(name))
    unpacked: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, (packing, parts) in packed.items():
            unpacked[name] = torch.empty_like(live[name])
            packing.unpack({part: given[f"{name}.{part}"] for part in parts}, unpacked[name])
            check_values(unpacked[name], live[name], name, where)
        for name, tensor in into.items():
            tensor.copy_(given[name])
        for name, tensor in unpacked.items():
            live[name].copy_(tensor)
    for method in methods:
        method.prepared = True
    if beside:
        warnings.warn(f"{where}: {listed(beside, 3)} of the base was trained beside the methods and is written into "
                      "it; remove() does not take that back", stacklevel=3)
