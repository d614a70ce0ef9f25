"""Saving methods in an adapter folder.

It holds ``adapter.safetensors`` (the tensors) and ``adapter.json`` (how to make the methods again, and which base they
belong to).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from core.anatomy import dissect
from core.errors import ScionError, listed
from core.method.attached import Home
from core.method.training_checks import check_model
from core.tensors import write_with_record

if TYPE_CHECKING:
    from core.method import PEFTMethod

FORMAT = 1
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
    tensors.update({name: parameters[name].detach() for name in home.heads if parameters[name].requires_grad})
    unfrozen = home.unfrozen()
    tensors.update(unfrozen)
    tensors.update(extra or {})
    record: dict[str, Any] = {
        "format": FORMAT,
        "methods": [method.spec() for method in methods],
        "base": {"class": dissect(root).family, "fingerprint": home.fingerprint},
        "versions": versions(),
    }
    if model:
        record["model"] = model
    if beside:
        record["beside"] = beside
    if unfrozen:
        record["unfrozen"] = sorted(unfrozen)
    target = Path(folder)
    try:
        write_with_record(target / TENSORS, tensors, target / RECORD, record)
    except ScionError:  # a ValueError as well, and not the one that is meant below
        raise
    except ValueError:
        raise ScionError(f"{folder}: an argument of {listed(method.name for method in methods)} is no finite number, "
                         "which an adapter cannot record") from None
    return target


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
