"""A patch's two files: ``patch.safetensors`` and ``patch.json``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from torch import Tensor

from core.errors import ScionError, listed, one_line
from core.files import read_json
from core.json_types import Digest, Rule, Shapes, check, shown
from core.method.beside import ModelRecord
from core.patch.change import Change, PatchData
from core.tensors import check_values, checksum, kind_of, read_tensors, write_with_record

FORMAT = 1

TENSORS = "patch.safetensors"
RECORD = "patch.json"

LATER = ("architecture", "tensors", "sha256")
"""Keys that records have had since patches know their architecture: a record has all of them, or none."""


def _is_signature(text: str) -> bool:
    """Whether a message can show this text."""
    return text.isprintable() and len(text) <= 300


Signature = Annotated[str, Rule(_is_signature, "the name of an architecture")]


class PatchRecord(TypedDict):
    """What patch.json holds."""

    format: int
    base: Digest
    shapes: Shapes
    architecture: NotRequired[Signature]
    tensors: NotRequired[Shapes]
    """Names of all tensors in the file, with their shapes."""
    model: NotRequired[ModelRecord]
    path: NotRequired[Signature]
    """Where the described model is; base and architecture are those of that alone."""
    sha256: NotRequired[Digest]


def write_files(patch: PatchData, folder: str | Path) -> Path:
    """Write both files of a patch (see `Patch.save`)."""
    tensors = {f"head:{name}": tensor for name, tensor in patch.head.items()}
    tensors |= {f"beside:{name}": tensor for name, tensor in patch.beside.items()}
    shapes: dict[str, list[int]] = {}
    for name, change in patch.changes.items():
        shapes[name] = list(change.shape)
        if change.down is None:
            tensors[f"dense:{name}"] = change.up
        else:
            tensors[f"up:{name}"] = change.up
            tensors[f"down:{name}"] = change.down
    record: dict[str, Any] = {"format": FORMAT, "base": str(patch.base), "architecture": patch.architecture}
    record["shapes"] = shapes
    record["tensors"] = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    if patch.model:
        record["model"] = patch.model
    if patch.path is not None:
        record["path"] = patch.path
    target = Path(folder)
    write_with_record(target / TENSORS, tensors, target / RECORD, record)
    return target


def read_files(folder: str | Path) -> PatchData:
    """What a folder holds (see `Patch.load`)."""
    path = Path(folder)
    if not os.path.isfile(path / RECORD):
        raise ScionError(f"{folder}: no {RECORD} here; give a folder that Patch.save wrote")
    record = read_json(path / RECORD)
    if isinstance(record, dict) and record.get("format") != FORMAT:
        raise ScionError(f"{path / RECORD}: format {shown(record.get('format'))} is unknown; this version reads "
                         f"{FORMAT}")
    check(record, PatchRecord, f"{path / RECORD}")
    lost = [name for name in LATER if name not in record]
    # A record of an earlier version may have a checksum, and none of the others.
    if lost and any(name in record for name in ("architecture", "tensors", "model")):
        raise ScionError(f"{path / RECORD}: damaged, its {listed(lost)} is gone; copy the patch again")
    tensors = read_tensors(path / TENSORS)
    if not lost:
        held = {name: list(tensor.shape) for name, tensor in tensors.items()}
        _check_held(held, record["tensors"], str(path))
    # Each step takes its tensors out: what is left in the end belongs to nothing.
    changes = {name: _change(name, shape, tensors, str(path)) for name, shape in record["shapes"].items()}
    head = _taken("head:", tensors)
    beside = _taken("beside:", tensors)
    if tensors:
        raise ScionError(f"{path}: holds {listed(map(one_line, tensors), 3)}, which the record does not name")
    # The values, then the checksum: both say less about what is wrong than the checks of names above.
    for name, tensor in head.items():
        _check_numbers(tensor, name, str(path))
    for name, tensor in beside.items():
        check_values(tensor, tensor, one_line(name), str(path))
    if "sha256" in record and checksum(path / TENSORS) != record["sha256"]:
        raise ScionError(f"{path / TENSORS}: not the tensors that {RECORD} was written with, for their checksums "
                         "differ; copy both files again")
    return PatchData(changes, record["base"], head, record.get("architecture", ""), beside, record.get("model", {}),
                     record.get("path"))


def _taken(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors of one kind from ``tensors``, by their names without it."""
    names = [name for name in tensors if name.startswith(kind)]
    return {name.removeprefix(kind): tensors.pop(name) for name in names}


def _check_held(held: dict[str, list[int]], named: dict[str, list[int]], where: str) -> None:
    """Refuse a file and a record that do not name the same tensors."""
    missing = sorted(named.keys() - held.keys())
    extra = sorted(held.keys() - named.keys())
    if missing:
        raise ScionError(f"{where}: {listed(map(one_line, missing), 3)} is missing, which the record names; copy the "
                         "patch again")
    if extra:
        raise ScionError(f"{where}: holds {listed(map(one_line, extra), 3)}, which the record does not name")
    for name, shape in named.items():
        if held[name] != shape:
            raise ScionError(f"{where}: {one_line(name)} is {held[name]}, and {shape} in the record")


def _change(name: str, shape: list[int], tensors: dict[str, Tensor], where: str) -> Change:
    """Take one parameter's change from ``tensors``."""
    dense, up, down = (tensors.pop(f"{kind}:{name}", None) for kind in ("dense", "up", "down"))
    found: Change | None = None
    if dense is not None and up is None and down is None:
        if list(dense.shape) == shape:
            found = Change(dense, None, tuple(shape))
    elif dense is None and up is not None and down is not None:
        if _multiply_to(up, down, shape):
            found = Change(up, down, tuple(shape))
    if found is None:
        raise ScionError(f"{where}: the tensors of {one_line(name)} are not those of a change of shape {shape}")
    _check_numbers(found.up, name, where)
    if found.down is not None:
        _check_numbers(found.down, name, where)
    return found


def _multiply_to(up: Tensor, down: Tensor, shape: list[int]) -> bool:
    """Whether ``up @ down`` is a matrix [out, in] of as many numbers as a parameter of this shape."""
    if not (up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0] and shape):
        return False
    return up.shape[0] == shape[0] and down.shape[1] == math.prod(shape[1:])


def _check_numbers(tensor: Tensor, name: str, where: str) -> None:
    """Refuse a tensor of whole numbers, or with values that are not finite."""
    if kind_of(tensor) != "float":
        raise ScionError(f"{where}: {one_line(name)} holds {tensor.dtype}, where a change is of floats")
    check_values(tensor, tensor, one_line(name), where)
