"""Methods on disk: adapter folders, checkpoints that hold only what was trained, and the base's fingerprint.

An adapter is a folder with ``adapter.safetensors`` (the tensors) and ``adapter.json`` (how to make the methods again,
and which base they belong to). Nothing in it is executed: a method is looked up by name in the registry.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.base import check_base
from core.errors import ScionError, listed
from core.files import write_atomically
from core.fingerprint import fingerprint
from core.method import Home, PEFTMethod, decode_extra_state, methods_on, uncompiled

FORMAT = 1
TENSORS, RECORD = "adapter.safetensors", "adapter.json"

# ------------------------------------------------------------------------------------------------- adapter folders


def save_adapter(methods: list[PEFTMethod], folder: str | Path, extra: dict[str, Tensor] | None = None,
                 model: dict[str, Any] | None = None) -> Path:
    """Write the methods of one model (and ``extra`` tensors, a head say, with what rebuilds the ``model``) into
    ``folder``.

    Both files are written beside their place and renamed, the record last.
    """
    from safetensors.torch import save_file

    if not methods:
        raise ScionError("there is no method to save: attach one first")
    root = methods[0]._need_root()
    home = getattr(root, "peft", None)
    if not isinstance(home, Home) or not all(method.attached for method in methods):
        raise ScionError(f"{methods[0].name} is merged: unmerge it before saving, or save the model itself")
    tensors: dict[str, Tensor] = {}
    for method in methods:
        tensors.update(method.tensors())
    parameters = dict(root.named_parameters())
    tensors.update({name: parameters[name].detach() for name in home.heads if parameters[name].requires_grad})
    tensors.update(extra or {})
    record = {
        "format": FORMAT,
        "methods": [method.spec() for method in methods],
        "base": {"class": dissect(root).family, "fingerprint": home.fingerprint},
        "versions": versions(),
        **({"model": model} if model else {}),
    }
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    packed = {name: tensor.contiguous().cpu().clone() for name, tensor in tensors.items()}
    write_atomically(target / TENSORS, lambda path: save_file(packed, path, metadata={"format": "pt"}))
    write_atomically(target / RECORD, lambda path: path.write_text(json.dumps(record, indent=1) + "\n"))
    return target


def load_adapter(source: str | Path, model: nn.Module, base: Literal["same", "any"] | nn.Module = "same") -> Any:
    """Attach the methods saved in ``source`` to ``model`` and load their tensors.

    Args:
        source: an adapter folder, a run folder, a Lightning checkpoint, or an adapter folder of Hugging Face peft.
        model: the same backbone that the methods were saved from, plain.
        base: ``any`` carries them to other weights of the same shapes, with a warning. Where a method moved the base's
            own tensors, the file holds their values; to carry the change of them, give the base that it was trained on
            (an ``nn.Module``) instead.

    Returns:
        The method, or the list of methods where several were saved.

    Raises:
        ScionError: a damaged file, another base, missing, extra or misshapen tensors; the model is untouched then.
    """
    from core import interop

    if interop.is_peft(source):
        return interop.from_peft(source, model)
    record, tensors = read_adapter(source)
    methods = restore(record, tensors, model, base, str(source))
    return methods[0] if len(methods) == 1 else methods


def read_adapter(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in an adapter folder, a run folder or a Lightning checkpoint."""
    path = Path(source)
    if path.is_file():
        return _read_checkpoint(path)
    if (path / "adapter" / RECORD).is_file():
        path = path / "adapter"
    if not (path / RECORD).is_file():
        raise ScionError(f"{source}: no {RECORD} here; give an adapter folder, a run folder or a .ckpt file")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / RECORD).read_text())
        assert isinstance(record["methods"], list) and record["base"]["fingerprint"]
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ScionError(f"{path / RECORD}: damaged, or not an adapter's record") from None
    if record.get("format") != FORMAT:
        raise ScionError(f"{path / RECORD}: format {record.get('format')} is unknown; this version reads {FORMAT}")
    try:
        return record, load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "damaged or cut short"
        raise ScionError(f"{path / TENSORS}: {reason}; copy the adapter again") from None


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise ScionError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None
    return split_checkpoint(state, str(path))


def split_checkpoint(state: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors in the state dict of a checkpoint, whatever module the backbone sits in."""
    # <path of the root>peft.<method>._extra_state holds each method's record
    records = [(name, decode_extra_state(tensor)) for name, tensor in state.items()
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
    return ({"format": FORMAT, "methods": [record for _, record in records],
             "base": {"class": "", "fingerprint": records[0][1]["base"]}}, {**tensors, **outside})


OUTSIDE = "outside."
"""Prefix of tensors that belong to the LightningModule around the backbone (a task's head)."""


def restore(record: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module,
            base: Literal["same", "any"] | nn.Module = "same", where: str = "") -> list[PEFTMethod]:
    """Make the methods of ``record``, attach them to ``model`` and load ``tensors`` strictly."""
    from core import peft

    model = uncompiled(model)
    check_base(model, where)
    anatomy = dissect(model)
    print_now = fingerprint(model, without=anatomy.head_names())
    expected = record["base"]["fingerprint"]
    other = print_now != expected
    if other and base != "same":
        tensors = _carried(tensors, model, anatomy.head_names(), base, expected, where)
        warnings.warn(f"{where}: carried from base {expected} to {print_now}", stacklevel=3)
    methods = [peft.make(spec["class"], {**spec["config"], "name": spec["name"]}) for spec in record["methods"]]
    done: list[PEFTMethod] = []
    try:
        for method, spec in zip(methods, record["methods"], strict=True):
            method.attach(model)
            done.append(method)
            method.restructure(spec.get("structure", {}))
        load_tensors(methods, tensors, where, write=not other or base != "same")
        if other and base == "same":
            raise ScionError("all names and shapes fit")
    except Exception as error:
        for method in reversed(done):
            method.remove()
        if not isinstance(error, ScionError):
            raise
        what = str(error).removeprefix(f"{where}: ")
        if other and base == "same":
            what = (f"the adapter belongs to another base (fingerprint {expected}, here {print_now}; {what}); load it "
                    "onto the backbone it was trained on, or pass base='any' to carry it over")
        raise ScionError(f"{where}: {what}") from None
    return methods


def _carried(tensors: dict[str, Tensor], model: nn.Module, heads: set[str], base: Literal["any"] | nn.Module | str,
             expected: str, where: str) -> dict[str, Tensor]:
    """``tensors`` for another base: of the base's own tensors the change is carried, not the value."""
    moved = [name for name in tensors if not name.startswith(("peft.", OUTSIDE)) and name not in heads]
    if not moved:
        return tensors
    here = dict(model.named_parameters())
    for name in moved:
        if name not in here or here[name].shape != tensors[name].shape:
            shape = list(here[name].shape) if name in here else "absent"
            raise ScionError(f"{where}: {name} is {list(tensors[name].shape)} in the file, {shape} here")
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


def load_tensors(methods: list[PEFTMethod], tensors: dict[str, Tensor], where: str = "", write: bool = True) -> None:
    """Copy saved tensors into attached methods; missing, extra and misshapen ones are refused before any is written."""
    root = methods[0]._need_root()
    home: Home = root.peft  # type: ignore[assignment]
    parameters = dict(root.named_parameters())
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    live = {name: tensor for method in methods for name, tensor in method.live_tensors().items()}
    packed = {name: (packing, packing.pack(live[name])) for name, packing in methods[0].all_packings().items()
              if name in live and name not in given}  # a checkpoint holds the form in use
    into = {name: tensor for name, tensor in live.items() if name not in packed}
    into.update({f"{name}.{part}": tensor for name, (_, parts) in packed.items() for part, tensor in parts.items()})
    into.update({name: parameters[name].detach() for name in home.heads if name in tensors})
    missing, extra = sorted(set(into) - set(given)), sorted(set(given) - set(into))
    if missing:
        raise ScionError(f"{where}: tensors are missing: {listed(missing, 4)}")
    if extra:
        raise ScionError(f"{where}: tensors that no method here has: {listed(extra, 4)}")
    for name, tensor in into.items():
        if tensor.shape != given[name].shape:
            raise ScionError(f"{where}: {name} is {list(given[name].shape)} in the file, {list(tensor.shape)} here")
    if write:
        with torch.no_grad():
            for name, tensor in into.items():
                tensor.copy_(given[name])
            for name, (packing, parts) in packed.items():
                packing.unpack({part: given[f"{name}.{part}"] for part in parts}, live[name])
        for method in methods:
            method.prepared = True


# ------------------------------------------------------------------------------------------------- checkpoints


def keep_only_owned(module: nn.Module) -> None:
    """Let the state dict of a LightningModule leave out its frozen backbone, and its strict loading forgive exactly
    that. Both hooks are plain functions, so they copy and pickle with the module; a second call changes nothing."""
    if _leave_out_base not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_leave_out_base)
        module.register_load_state_dict_post_hook(_forgive_base)


def base_names(module: nn.Module) -> set[str]:
    """Names, in ``module``'s state dict, of the frozen base tensors that no method owns."""
    names: set[str] = set()
    for path, root in module.named_modules():
        home = root._modules.get("peft")
        if isinstance(home, Home):
            owned, prefix = home.owned(), f"{path}." if path else ""
            names |= {prefix + name for name in nn.Module.state_dict(root)
                      if name not in owned and not name.startswith("peft.")}
    return names


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in base_names(module):
        state.pop(prefix + name, None)


def _forgive_base(module: nn.Module, incompatible: Any) -> None:
    forgiven = base_names(module)
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
