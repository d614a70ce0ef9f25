"""Saving methods in an adapter folder.

It holds ``adapter.safetensors`` (the tensors) and ``adapter.json`` (how to make the methods again, and which base they
belong to). Both count from the described model, so that an adapter goes wherever that stands.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from core.errors import ScionError, listed
from core.method.attached import Home
from core.method.described import FileNames, Names, parameter_names, structure_in_file
from core.method.training_checks import check_model
from core.tensors import write_with_record

if TYPE_CHECKING:
    from core.method import PEFTMethod

FORMAT = 2
"""Names of tensors, the structures and the fingerprint are those of the described model (`core.method.described`)."""
FROM_ROOT = 1
"""The format of earlier versions, which counted from the module that was given to `attach`."""
TENSORS = "adapter.safetensors"
RECORD = "adapter.json"


def save_adapter(methods: list[PEFTMethod], folder: str | Path, extra: dict[str, Tensor] | None = None,
                 model: dict[str, Any] | None = None, beside: str = "") -> Path:
    """Write the methods of one model into ``folder``.

    Both files are written under other names and renamed, the record last. It holds the checksum of the tensors, so
    that a pair of which only one was written is never taken for an adapter.

    Args:
        methods: attached to one backbone.
        folder: gets both files.
        extra: further tensors to save, those of a head beside the backbone for instance.
        model: the record of how to build the backbone and its head again.
        beside: path of the backbone in the module that has the ``extra`` tensors.

    Raises:
        ScionError: a method is not attached, or the folder cannot be written.
    """
    if not methods:
        raise ScionError("there is no method to save: attach one first")
    root = methods[0].need_root()
    home = getattr(root, "peft", None)
    if not isinstance(home, Home) or not all(method.attached for method in methods):
        raise ScionError(f"{methods[0].name} is merged: unmerge it before saving, or save the model itself")
    tensors: dict[str, Tensor] = {}
    for method in methods:
        check_model(method)
        tensors.update(method.tensors())
    parameters = dict(root.named_parameters())
    # A head inside the backbone belongs to no method; it is saved with them where it was trained.
    heads = [name for name in home.heads if name in parameters]  # a tied weight has one name among them
    tensors.update({name: parameters[name].detach() for name in heads if parameters[name].requires_grad})
    unfrozen = home.unfrozen()
    tensors.update(unfrozen)
    base = home.base_now()
    names = FileNames(base.names, home.methods.values())
    apart = {names.of(name) for name in tensors if names.is_apart(name)}
    specs = _specs(methods, base.names, apart)
    in_file = {names.of(name): tensor for name, tensor in tensors.items()}
    in_file.update(extra or {})
    record: dict[str, Any] = {
        "format": FORMAT,
        "methods": specs,
        "base": base.record(),
        "versions": versions(),
    }
    tokenizer = tokenizer_of(root)
    if tokenizer is not None:
        record["tokenizer"] = tokenizer
    if apart:
        record["apart"] = sorted(apart)
    if model:
        record["model"] = model
    if beside:
        record["beside"] = beside
    if unfrozen:
        record["unfrozen"] = sorted(names.of(name) for name in unfrozen)
    target = Path(folder)
    try:
        write_with_record(target / TENSORS, in_file, target / RECORD, record)
    except ScionError:  # a ValueError as well, and not the one that is meant below
        raise
    except ValueError:
        raise ScionError(f"{folder}: an argument of {listed(method.name for method in methods)} is no finite number, "
                         "which an adapter cannot record") from None
    return target


def tokenizer_of(model: nn.Module) -> str | None:
    """The fingerprint of the tokenizer behind a model's ids; None where the model says nothing of one.

    A backbone says it as its attribute ``tokenizer_fingerprint``, as those of `core.text` do.
    """
    found = getattr(model, "tokenizer_fingerprint", None)
    return found if isinstance(found, str) else None


def check_tokenizer(record: Mapping[str, Any], model: nn.Module, where: str, carry: bool = False) -> None:
    """Refuse an adapter that was trained with another tokenizer than the model's.

    Where either is unknown (a plain model of transformers, a file of an earlier version) there is nothing to compare.

    Args:
        record: the content of adapter.json.
        model: the backbone that the adapter is loaded onto.
        where: the file, for messages.
        carry: warn only: the user wants the adapter on another base.

    Raises:
        ScionError: the tokenizers differ.
    """
    recorded, here = record.get("tokenizer"), tokenizer_of(model)
    if recorded is None or here is None or recorded == here:
        return
    if carry:
        warnings.warn(f"{where}: carried from the tokenizer {recorded} to {here}, whose ids may mean other texts",
                      stacklevel=4)
        return
    raise ScionError(f"{where}: the adapter was trained with another tokenizer (fingerprint {recorded}, here {here}), "
                     "whose ids mean other texts; load it onto a backbone with that tokenizer, or pass base='any' to "
                     "carry it over")


def _specs(methods: list[PEFTMethod], names: Names, apart: set[str]) -> list[dict[str, Any]]:
    """The methods' records with structures in a file's names; those apart from the backbone are added to ``apart``."""
    known = parameter_names(methods[0].need_root())
    found: list[dict[str, Any]] = []
    for method in methods:
        spec = method.spec()
        spec["structure"] = structure_in_file(spec["structure"], names, known, apart)
        found.append(spec)
    return found


@functools.cache  # a dozen milliseconds, and every adapter asks
def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {}
    for package in ("scion-peft", "torch", "lightning", "transformers", "timm", "torchaudio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def adapter_bytes(folder: str | Path) -> int:
    """Size of an adapter's two files together."""
    return sum((Path(folder) / name).stat().st_size for name in (TENSORS, RECORD))
