"""Methods from an adapter folder or a checkpoint: read, checked against the schema, rebuilt, attached and filled.

Nothing in a file is executed: a method is looked up by name in the registry.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from torch import Tensor, nn

from core import peft
from core.adapters.filling import Content, load_tensors, names_in
from core.adapters.rehearsal import hollow, is_small, largest, reach, rehearsing, twin
from core.anatomy import Anatomy, dissect
from core.errors import ScionError, listed, one_line
from core.files import read_json
from core.json_types import Digest, check
from core.method import Home, PEFTMethod, Spec, check_structure, decode_extra_state, uncompiled
from core.method.bases import check_base
from core.method.beside import OUTSIDE, ModelRecord
from core.method.described import Base, BaseRecord
from core.method.saving import FORMAT, FROM_ROOT, RECORD, TENSORS, check_tokenizer
from core.record import check_arguments
from core.tensors import check_fit, checksum, read_checkpoint, read_tensors

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


class Record(TypedDict):
    """What adapter.json holds."""

    format: int
    methods: list[Spec]
    base: BaseRecord
    tokenizer: NotRequired[str]
    apart: NotRequired[list[str]]
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
    if record["format"] not in (FROM_ROOT, FORMAT):
        raise ScionError(f"{path / RECORD}: format {one_line(record['format'])[:40]} is unknown; this version reads "
                         f"{FROM_ROOT} and {FORMAT}")
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
    # A checkpoint goes back into the module that wrote it: its names begin at the root.
    base = {"class": "", "fingerprint": first["base"]}
    record: dict[str, Any] = {"format": FROM_ROOT, "methods": specs, "base": base}
    record["beside"] = prefix.removesuffix(".")
    record["unfrozen"] = [name for name in tensors if not name.startswith("peft.")]
    if not made:
        check_record(record, where)
    return record, {**tensors, **outside}


def _without_base(record: dict[str, Any]) -> dict[str, Any]:
    """A method's record in a checkpoint, where each names the base, as an adapter folder has it."""
    return {key: value for key, value in record.items() if key not in ("base", "described")}


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
    check_tokenizer(record, model, where, carry=base != "same")
    anatomy = dissect(model)
    from_root = record["format"] == FROM_ROOT
    content = Content.of(record, tensors, anatomy)
    here = base_of(anatomy)
    print_now, expected = here.fingerprint(from_root), record["base"]["fingerprint"]
    other = not here.agrees(record["base"], from_root)
    if other and base != "same":
        content = _carried(content, anatomy, base, record, where)
        warnings.warn(f"{where}: carried from base {expected} to {print_now}", stacklevel=3)
    done: list[PEFTMethod] = []
    try:
        rehearse(content, model, where)
        attach(content.specs, model, done)
        load_tensors(done, content, where, write=False)
        # Refused only now: what does not fit on another base says more than that it is another.
        if other and base == "same":
            raise ScionError("all names and shapes fit")
        if check_whole is not None:
            check_whole()
        load_tensors(done, content, where)
    except Exception as error:
        for method in reversed(done):
            method.remove()
        what = str(refusal(error)).removeprefix(f"{where}: ")
        if other and base == "same":
            what = (f"the adapter belongs to another base (fingerprint {expected}, here {print_now}; {what}); load it "
                    "onto the backbone it was trained on, or pass base='any' to carry it over")
        raise ScionError(f"{where}: {what}") from (None if isinstance(error, ScionError) else error)
    if here.has_other_pooler(record["base"]) and not _brings_pooler(content, anatomy):
        warnings.warn(f"{where}: the pooler here has other values than the one that the adapter was trained beside (it "
                      "is random where a checkpoint has none): what reads it gives other outputs", stacklevel=3)
    return done


def base_of(anatomy: Anatomy) -> Base:
    """The base that a model is, as it was before the first method."""
    home = getattr(anatomy.root, "peft", None)
    known = home.base if isinstance(home, Home) else None
    return known or Base.of(anatomy)


def _brings_pooler(content: Content, anatomy: Anatomy) -> bool:
    """Whether the file holds the pooler's own tensors."""
    poolers = anatomy.stem.get("pool", ())
    names = [content.names.in_file(name) for site in poolers for name in site.parameter_names]
    return set(names) <= content.tensors.keys()


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


def rehearse(content: Content, model: nn.Module, where: str) -> None:
    """Refuse what would be larger than the tensors of the file, without building it: see `core.adapters.rehearsal`.

    Raises:
        ScionError: a tensor that the methods would have is not in the file, or has another shape there.
    """
    structures = [spec.get("structure", {}) for spec in content.specs]
    factor = max(reach(spec["config"]) for spec in content.specs) * largest(structures)
    if is_small(factor, model):
        return
    hollow_model = twin(model)
    if hollow_model is None:
        return
    count = len(content.tensors) + len(list(model.parameters()))
    done: list[PEFTMethod] = []
    with rehearsing(count):
        attach(content.specs, hollow_model, done)
        load_tensors(done, replace(content, tensors=hollow(content.tensors)), where, write=False)


def _carried(content: Content, anatomy: Anatomy, base: Literal["any"] | nn.Module | str, record: dict[str, Any],
             where: str) -> Content:
    """The content for another base: of the base's own tensors the change is carried, not the value."""
    names, model = content.names, anatomy.root
    buffers = {name for name, _ in model.named_buffers()}  # statistics go as they are
    as_they_are = {names.in_file(name) for name in anatomy.head_names() | buffers}
    here = {names.in_file(name): parameter for name, parameter in model.named_parameters()}
    moved: list[str] = []
    for name, tensor in content.tensors.items():
        if name.startswith("peft.") or name in as_they_are:
            continue
        if name in here:
            check_fit(tensor, here[name], name, where)
            moved.append(name)
        elif name not in content.apart:
            raise ScionError(f"{where}: {name} is {list(tensor.shape)} in the file, absent here")
    if not moved:
        return content
    if not isinstance(base, nn.Module):
        raise ScionError(f"{where}: holds values of its base's own tensors ({listed(moved, 2)}), not the change of "
                         "them, so that alone it cannot be carried to another base; pass base=<the backbone it was "
                         "trained on>")
    start = _start(base, moved, record, where)
    changed: dict[str, Tensor] = {}
    for name in moved:
        tensor = content.tensors[name]
        # In float64, so that the difference of two float32 numbers is exact enough to be added again.
        change = tensor.double().cpu() - _wide(start[name])
        value = _wide(here[name]) + change
        changed[name] = value.to(tensor.dtype)
    return replace(content, tensors={**content.tensors, **changed})


def _start(base: nn.Module, moved: list[str], record: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The values that these tensors had before training, from the base that an adapter was trained on."""
    trained_on = dissect(uncompiled(base))
    if not base_of(trained_on).agrees(record["base"], record["format"] == FROM_ROOT):
        raise ScionError(f"{where}: the module given as base is not the one that the adapter was trained on "
                         f"(fingerprint {record['base']['fingerprint']})")
    names = names_in(record, trained_on)
    start = {names.in_file(name): parameter.detach() for name, parameter in trained_on.root.named_parameters()}
    absent = [name for name in moved if name not in start]
    if absent:
        raise ScionError(f"{where}: the module given as base has no {listed(absent, 2)}, whose change is to be carried")
    return start


def _wide(parameter: Tensor) -> Tensor:
    """A parameter's values in float64."""
    return parameter.detach().double().cpu()
