"""A patch's two files: ``patch.safetensors`` and ``patch.json``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

from torch import Tensor

from core.errors import ScionError, listed, one_line
from core.files import read_json
from core.json_types import Digest, Rule, Shapes, check, shown
from core.method.beside import ModelRecord
from core.patch.change import Change, PatchData
from core.tensors import check_values, checksum, kind_of, read_tensors, write_with_record

FORMAT = 1

TENSORS, RECORD = "patch.safetensors", "patch.json"

LATER = ("architecture", "tensors", "sha256")
"""Keys that records have had since a patch knows its architecture: all of them, or none."""

Signature = Annotated[str, Rule(lambda text: text.isprintable() and len(text) <= 300, "the name of an architecture")]


class PatchRecord(TypedDict):
    """What patch.json holds."""

    format: int
    base: Digest
    shapes: Shapes
    architecture: NotRequired[Signature]
    tensors: NotRequired[Shapes]
    """Names of all tensors in the file, with their shapes."""
    model: NotRequired[ModelRecord]
    sha256: NotRequired[Digest]


def write_files(patch: PatchData, folder: str | Path) -> Path:
    """Write both files of a patch (see `Patch.save`)."""
    tensors = {f"head:{name}": tensor for name, tensor in patch.head.items()}
    tensors |= {f"beside:{name}": tensor for name, tensor in patch.beside.items()}
    shapes = {}
    for name, change in patch.changes.items():
        shapes[name] = list(change.shape)
        tensors[f"up:{name}" if change.down is not None else f"dense:{name}"] = change.up
        if change.down is not None:
            tensors[f"down:{name}"] = change.down
    held = {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
    record = {"format": FORMAT, "base": str(patch.base), "architecture": patch.architecture, "shapes": shapes,
              "tensors": held}
    if patch.model:
        record["model"] = patch.model
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
    if lost and any(name in record for name in ("architecture", "tensors", "model")):
        raise ScionError(f"{path / RECORD}: damaged, its {listed(lost)} is gone; copy the patch again")
    tensors = read_tensors(path / TENSORS)
    if not lost:
        _check_held({name: list(tensor.shape) for name, tensor in tensors.items()}, record["tensors"], str(path))
    changes = {name: _change(name, shape, tensors, str(path)) for name, shape in record["shapes"].items()}
    head, beside = ({name.removeprefix(kind): tensors.pop(name) for name in list(tensors) if name.startswith(kind)}
                    for kind in ("head:", "beside:"))
    if tensors:
        raise ScionError(f"{path}: holds {listed(map(one_line, tensors), 3)}, which the record does not name")
    for name, tensor in head.items():
        _check_numbers(tensor, name, str(path))
    for name, tensor in beside.items():
        check_values(tensor, tensor, one_line(name), str(path))
    if "sha256" in record and checksum(path / TENSORS) != record["sha256"]:
        raise ScionError(f"{path / TENSORS}: not the tensors that {RECORD} was written with, for their checksums "
                         "differ; copy both files again")
    return PatchData(changes, record["base"], head, record.get("architecture", ""), beside, record.get("model", {}))


def _check_held(held: dict[str, list[int]], named: dict[str, list[int]], where: str) -> None:
    """Refuse a file and a record that do not name the same tensors."""
    missing, extra = (sorted(one.keys() - other.keys()) for one, other in ((named, held), (held, named)))
    if missing:
        raise ScionError(f"{where}: {listed(map(one_line, missing), 3)} is missing, which the record names; copy the "
                         "patch again")
    if extra:
        raise ScionError(f"{where}: holds {listed(map(one_line, extra), 3)}, which the record does not name")
    for name, shape in named.items():
        if held[name] != shape:
            raise ScionError(f"{where}: {one_line(name)} is {held[name]}, and {shape} in the record")


def _change(name: str, shape: list[int], tensors: dict[str, Tensor], where: str) -> Change:
    """Takes one parameter's change from ``tensors``."""
    dense, up, down = (tensors.pop(f"{kind}:{name}", None) for kind in ("dense", "up", "down"))
    if dense is not None and up is None and down is None:
        fits = list(dense.shape) == shape
    else:
        fits = dense is None and up is not None and down is not None and up.dim() == down.dim() == 2 and (
            up.shape[1] == down.shape[0]) and bool(shape) and [up.shape[0], down.shape[1]] == [
            shape[0], math.prod(shape[1:])]
    if not fits:
        raise ScionError(f"{where}: the tensors of {one_line(name)} are not those of a change of shape {shape}")
    for tensor in (dense, up, down):
        if tensor is not None:
            _check_numbers(tensor, name, where)
    return Change(dense if up is None else up, down, tuple(shape))  # type: ignore[arg-type]


def _check_numbers(tensor: Tensor, name: str, where: str) -> None:
    if kind_of(tensor) != "float":
        raise ScionError(f"{where}: {one_line(name)} holds {tensor.dtype}, where a change is of floats")
    check_values(tensor, tensor, one_line(name), where)
