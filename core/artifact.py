"""Methods on disk: adapter folders, checkpoints that hold only what was trained, and the base's fingerprint.

An adapter is a folder with ``adapter.safetensors`` (the tensors) and ``adapter.json`` (how to make the methods again,
and which base they belong to). Nothing in it is executed: a method is looked up by name in the registry.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from core.anatomy import dissect
from core.base import check_base
from core.beside import OUTSIDE, load_beside
from core.errors import ScionError, listed, one_line
from core.files import read_json, write_atomically, write_json
from core.fingerprint import fingerprint
from core.graft import Graft
from core.method import Home, PEFTMethod, Spec, check_structure, decode_extra_state, methods_on, uncompiled
from core.rehearsal import hollow, is_small, largest, reach, rehearsing, twin
from core.schema import Digest, check
from core.spec import check_arguments
from core.tensors import check_fit, check_values, checksum, read_checkpoint, read_tensors, write_tensors
from core.training_checks import check_model

FORMAT = 1
TENSORS, RECORD = "adapter.safetensors", "adapter.json"
LARGEST_RECORD = 16 * 2**20
"""Bytes of an adapter's record."""
DEEPEST = 4
"""Compositions within compositions."""


# ------------------------------------------------------------------------------------------------- adapter folders


def save_adapter(methods: list[PEFTMethod], folder: str | Path, extra: dict[str, Tensor] | None = None,
                 model: dict[str, Any] | None = None, beside: str = "") -> Path:
    """Write the methods of one model into ``folder``; ``extra`` tensors (a head, say) too, with what rebuilds the
    ``model`` and the path of the backbone in what they stand ``beside``.

    Both files are written beside their place and renamed, the record last. It holds the checksum of the tensors, so
    that a pair of which only one was written is never taken for an adapter.

    Raises:
        ScionError: a method is not attached, or the folder cannot be written.
    """
    if not methods:
        raise ScionError("there is no method to save: attach one first")
    root = methods[0]._need_root()
    home = getattr(root, "peft", None)
    if not isinstance(home, Home) or not all(method.attached for method in methods):
        raise ScionError(f"{methods[0].name} is merged: unmerge it before saving, or save the model itself")
    tensors: dict[str, Tensor] = {}
    for method in methods:
        check_model(method)
        tensors.update(method.tensors())
    parameters = dict(root.named_parameters())
    tensors.update({name: parameters[name].detach() for name in home.heads if parameters[name].requires_grad})
    unfrozen = home.unfrozen()
    tensors.update({**unfrozen, **(extra or {})})
    record = {
        "format": FORMAT,
        "methods": [method.spec() for method in methods],
        "base": {"class": dissect(root).family, "fingerprint": home.fingerprint},
        "versions": versions(),
        **({"model": model} if model else {}),
        **({"beside": beside} if beside else {}),
        **({"unfrozen": sorted(unfrozen)} if unfrozen else {}),
    }
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        record["sha256"] = write_tensors(target / TENSORS, tensors)
        write_json(target / RECORD, record)
    except OSError as error:
        raise ScionError(f"{folder} cannot be written ({error.strerror or error})") from None
    except ValueError:
        raise ScionError(f"{folder}: an argument of {listed(method.name for method in methods)} is no finite number, "
                         "which an adapter cannot record") from None
    return target


def load_adapter(source: str | Path, model: nn.Module, base: Literal["same", "any"] | nn.Module = "same") -> Any:
    """Attach the methods saved in ``source`` to ``model`` and load their tensors.

    Args:
        source: an adapter folder, a run folder, a Lightning checkpoint, or an adapter folder of Hugging Face peft.
        model: the same backbone that the methods were saved from, plain; or the LightningModule around it, into which
            what stood beside the backbone (a head) is loaded too.
        base: ``any`` carries them to other weights of the same shapes, with a warning. Where a method moved the base's
            own tensors, the file holds their values; to carry the change of them, give the base that it was trained on
            (an ``nn.Module``) instead.

    Returns:
        The method, or the list of methods where several were saved.

    Raises:
        ScionError: a damaged file, another base, missing, extra or misshapen tensors, values that are not finite; the
            model is untouched then.

    Warns:
        UserWarning: the file has tensors of what stood beside the backbone, and ``model`` is the backbone alone.
    """
    from core import interop

    if interop.is_peft(source):
        return interop.from_peft(source, model)
    saved = open_adapter(source)
    root = _root_in(model, saved)

    def check_rest() -> None:
        saved.check_whole()
        if root is not model:
            load_beside(model, root, saved.tensors, str(source), write=False)

    try:
        methods = restore(saved.record, saved.tensors, root, base, str(source), check_rest)
    except ScionError as error:
        if not (saved.record.get("model") or {}).get("backbone") or "another base" not in str(error):
            raise
        raise ScionError(f"{error}; core.load_run({str(source)!r}) builds the run's own backbone (its sizes may be "
                         "those of its data) and its head") from None
    if root is model:
        _tell_of_rest(saved, str(source))
    else:
        load_beside(model, root, saved.tensors, str(source))
    return methods[0] if len(methods) == 1 else methods


def _root_in(model: nn.Module, saved: Saved) -> nn.Module:
    """The backbone in ``model``, which may be the module around it."""
    model = uncompiled(model)
    path = saved.record.get("beside", "")
    rest = {name.removeprefix(OUTSIDE) for name in saved.tensors if name.startswith(OUTSIDE)}
    wraps = isinstance(model, LightningModule) or (bool(rest) and rest <= set(model.state_dict()))
    if not wraps:
        return model
    places = [path] if path else ["backbone", "model"]
    modules = dict(model.named_modules())
    return next((modules[place] for place in places if place in modules), model)


def _tell_of_rest(saved: Saved, where: str) -> None:
    rest = [name.removeprefix(OUTSIDE) for name in saved.tensors if name.startswith(OUTSIDE)]
    if rest:
        whole = "core.load_run gives the whole model" if saved.record.get("model") else (
            "give load_adapter the LightningModule in its place")
        warnings.warn(f"{where}: {listed(map(one_line, rest), 4)} stood beside the backbone and is not loaded into it; "
                      f"{whole}", stacklevel=3)


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in an adapter folder, a run folder or a Lightning checkpoint."""
    saved = open_adapter(source)
    saved.check_whole()
    return saved.record, saved.tensors


# ------------------------------------------------------------------------------------------------- reading


Part = dict[str, Any]
"""A backbone or a task: ``{"class": "audio:AST", arguments}``; see `core.module.spec`."""


class ModelRecord(TypedDict):
    """How to build what the methods stand on, and the task's head."""

    backbone: Part | None
    task: Part | None
    classes: list[str]
    multilabel: bool
    seed: int


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
    from core import peft

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
    from core import peft

    return peft.make(spec["class"], {**_arguments(spec), "name": spec["name"], **changes})


def _arguments(spec: Spec) -> dict[str, Any]:
    from core import peft

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
    """Refuse what would be larger than the tensors of the file, without building it: see `core.rehearsal`.

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
    with rehearsing(count), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say is said in earnest
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
    root = methods[0]._need_root()
    home: Home = root.peft  # type: ignore[assignment]
    parameters = dict(root.named_parameters())
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    live = {name: tensor for method in methods for name, tensor in method.live_tensors().items()}
    packed = {name: (packing, packing.pack(live[name])) for name, packing in methods[0].all_packings().items()
              if name in live and name not in given}  # a checkpoint holds the form in use
    into = {name: tensor for name, tensor in live.items() if name not in packed}
    into.update({f"{name}.{part}": tensor for name, (_, parts) in packed.items() for part, tensor in parts.items()})
    buffers = {name for method in methods for name in method.start_buffers} - set(given)
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


# ------------------------------------------------------------------------------------------------- checkpoints


def keep_only_owned(module: nn.Module) -> None:
    """Let the state dict of a LightningModule leave out its frozen backbone, and its strict loading forgive exactly
    that, also where the module stands in another one (an average of it). The hooks are plain functions, so they copy
    and pickle with the module; a second call changes nothing."""
    if _leave_out_base not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_leave_out_base)
        module.register_load_state_dict_pre_hook(_note_prefix)
        module.register_load_state_dict_post_hook(_forgive_base)


def base_names(module: nn.Module) -> set[str]:
    """Names, in ``module``'s state dict, of the frozen base tensors that no method owns."""
    names: set[str] = set()
    for prefix, home in _homes(module):
        owned = home.owned()
        names |= {prefix + name for name in nn.Module.state_dict(home.root)
                  if name not in owned and not name.startswith("peft.")}
    return names


def _homes(module: nn.Module) -> Iterator[tuple[str, Home]]:
    """The homes in ``module``, each with what the names of its root's tensors begin with."""
    for path, root in module.named_modules():
        home = root._modules.get("peft")
        if isinstance(home, Home):
            yield f"{path}." if path else "", home


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in base_names(module):
        state.pop(prefix + name, None)


def _note_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep what the module's names begin with in the state dict that is being loaded."""
    module.__dict__["_prefix"] = prefix


def _forgive_base(module: nn.Module, incompatible: Any) -> None:
    """Called when all is loaded, methods' structures included."""
    prefix = module.__dict__.pop("_prefix", "")
    unfrozen = {prefix + root + name for root, home in _homes(module) for name in home.unfrozen()}
    buffers = {prefix + root + name for root, home in _homes(module) for method in home.methods.values()
               for name in method.start_buffers}  # files of earlier versions lack them
    forgiven = {prefix + name for name in base_names(module)} | buffers | unfrozen
    kept = sorted(unfrozen & set(incompatible.missing_keys))
    if kept:
        warnings.warn(f"{listed(kept, 3)} of the base is trained now and was frozen when the checkpoint was written: "
                      "it keeps its present values", stacklevel=2)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in forgiven]


# ------------------------------------------------------------------------------------------------- records


@functools.cache  # a dozen milliseconds, and every adapter asks
def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("scion-peft", "torch", "lightning", "transformers", "timm", "torchaudio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def adapter_bytes(folder: str | Path) -> int:
    """Size of an adapter's two files."""
    return sum((Path(folder) / name).stat().st_size for name in (TENSORS, RECORD))


__all__ = ["fingerprint", "keep_only_owned", "load_adapter", "methods_on", "save_adapter", "write_atomically"]
