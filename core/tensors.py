"""Tensors in files: safetensors written whole and read with care, checkpoints opened without running anything, and what
a tensor of a file must be to take another's place."""

from __future__ import annotations

import hashlib
import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.errors import ScionError, one_line
from core.files import check_regular, write_atomically, write_json

LARGEST_HEADER = 32 * 2**20
"""Bytes of a safetensors header beyond which a file is not opened: some hundred thousand tensors."""
LARGEST_PICKLE = 2 * 2**20
"""Bytes that a checkpoint's pickle may have beside a quarter of the file: it only says how the tensors are nested."""


# ------------------------------------------------------------------------------------------------- safetensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, whole or not at all; returns the file's `checksum`.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Copies, since safetensors refuses tensors that share memory, as tied weights and views do.
    packed = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    sums: list[str] = []

    def write(temporary: Path) -> None:
        try:
            save_file(packed, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # its word for what the system says
            raise OSError(None, one_line(error)) from None
        # Of the temporary file: another process may already have replaced the one of the final name.
        sums.append(checksum(temporary))

    write_atomically(path, write)
    return sums[0]


def write_with_record(file: Path, tensors: Mapping[str, Tensor], record_file: Path, record: dict[str, Any]) -> None:
    """Write tensors, and then the record that holds their checksum as ``sha256``: a pair of which only one was written
    is never taken for whole.

    Raises:
        ScionError: the folder cannot be written.
        ValueError: the record holds a number that JSON does not have.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        record["sha256"] = write_tensors(file, tensors)
        write_json(record_file, record)
    except OSError as error:
        raise ScionError(f"{file.parent} cannot be written ({error.strerror or error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, not yet read from disk.

    Raises:
        ScionError: the file is missing, no regular file, damaged or cut short.
    """
    from safetensors.torch import load_file

    if not os.path.lexists(path):
        raise ScionError(f"{path}: missing; copy the adapter again")
    try:
        with check_regular(path).open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")  # the format's first eight bytes
            if header_length > LARGEST_HEADER:
                raise ValueError("its header is too long")
        return load_file(path)
    except ScionError:
        raise
    except Exception:  # from the system, from safetensors, or from torch about a type that it does not have
        raise ScionError(f"{path}: damaged or cut short; copy the adapter again") from None


def checksum(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------- checkpoints


PLAIN = {"collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size", "torch.device",
         "torch.serialization._get_layout", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"}
"""What a checkpoint's pickle may name, beside types of numbers and of storage. torch allows a few more, by which a
small file can ask for any amount of memory."""


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint of torch or Lightning holds; nothing in it is executed.

    Raises:
        ScionError: the file is missing, damaged, of the form before torch 1.6, packed, or holds other objects than
            tensors and plain values.
    """
    try:
        _check_archive(check_regular(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except ScionError:
        raise
    except Exception as error:  # from the system, zipfile, pickletools or torch: whatever it was, it is not readable
        raise ScionError(f"{path}: not a readable checkpoint ({type(error).__name__})") from None


def _check_archive(path: Path) -> None:
    """Refuse a file that is no zip archive of torch, or that would take much more memory than it has bytes."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # how every zip archive begins
            raise ScionError(f"{path}: not a readable checkpoint; those that torch has written since release 1.6 are")
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        packed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        # Members may also overlap in the file, each of them stored and all of them together larger than it.
        if packed or sum(member.file_size for member in members) > size:
            raise ScionError(f"{path}: not a readable checkpoint; it would grow when it is unpacked")
        for member in members:
            if not member.filename.endswith(".pkl"):
                continue
            if member.file_size > LARGEST_PICKLE + size // 4:
                raise ScionError(f"{path}: not a readable checkpoint; it holds more than tensors")
            _check_pickle(archive.read(member), path)


def _check_pickle(pickled: bytes, path: Path) -> None:
    """Refuse a pickle that names anything but plain values; its opcodes are listed and not run."""
    added = _declared_safe()
    for code, argument, _ in pickletools.genops(pickled):
        if code.name not in ("GLOBAL", "STACK_GLOBAL", "INST"):  # the opcodes that import something
            continue
        name = ".".join(str(argument).split(" "))  # pickletools has a space between module and name
        if not (name in PLAIN or name in added or _is_dtype(name) or _is_storage(name)):
            raise ScionError(f"{path}: not a readable checkpoint; it holds {one_line(name)}, which is no plain value")


def _declared_safe() -> set[str]:
    """Names of what the user's own program has declared harmless."""
    names: set[str] = set()
    for one in torch.serialization.get_safe_globals():
        names.add(one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}")
    return names


def _is_dtype(name: str) -> bool:
    if not name.startswith("torch."):
        return False
    found = getattr(torch, name.removeprefix("torch."), None)
    return isinstance(found, torch.dtype)


def _is_storage(name: str) -> bool:
    return name.startswith("torch.") and name.endswith("Storage") and name.count(".") == 1


# ------------------------------------------------------------------------------------------------- taking a place


def check_fit(given: Any, like: Tensor, name: str, where: str) -> None:
    """Refuse what cannot take the place of ``like``: no tensor, one of another shape, or of another kind of numbers.

    Raises:
        ScionError: says what is in the file and what is here.
    """
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_quantized:
        raise ScionError(f"{where}: {name} is no plain tensor")
    if given.is_meta and not like.is_meta:
        raise ScionError(f"{where}: {name} has no values in the file")
    if given.shape != like.shape:
        raise ScionError(f"{where}: {name} is {list(given.shape)} in the file, {list(like.shape)} here")
    if kind_of(given) != kind_of(like):
        raise ScionError(f"{where}: {name} holds {_type(given)} in the file, {_type(like)} here")


def check_values(given: Tensor, like: Tensor, name: str, where: str, limit: int | None = None) -> None:
    """Refuse values that ``like`` cannot hold: numbers that are not finite in its type, whole ones out of range.

    Args:
        given: fits ``like``.
        like: the tensor whose place they take.
        name: of the tensor, for the message.
        where: the file, for the message.
        limit: positions below which all values must lie; None is what the type holds.
    """
    if like.is_floating_point():
        if not bool(torch.isfinite(given.to(like.dtype)).all()):
            raise ScionError(f"{where}: {name} holds values that are not finite")
    elif like.dtype != torch.bool and given.numel():  # an empty tensor has no least number
        least, most = (int(bound) for bound in given.to(torch.int64).aminmax())
        kind = torch.iinfo(like.dtype)
        low, high = kind.min, kind.max
        if limit is not None:
            low, high = 0, limit - 1
        if not low <= least <= most <= high:
            raise ScionError(f"{where}: {name} holds numbers from {least} to {most}; {low} to {high} are possible here")


def kind_of(tensor: Tensor) -> str:
    """``float``, ``complex``, ``bool`` or ``int``."""
    if tensor.is_floating_point():
        return "float"
    if tensor.is_complex():
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "int"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
