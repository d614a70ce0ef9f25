"""The fingerprint of a base: which weights an adapter belongs to, told from a sample of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLES = 64
"""Values of each tensor that lie evenly over it, the first and the last among them."""
TAIL = 8
"""Values more towards its end, each half as far from it as the one before: new rows of an embedding lie there."""


class Fingerprint(str):
    """The digests of a base's values as bfloat16 and as float16, ``"<digest>-<bfloat16>-<float16>"``.

    Two are equal where either agrees: a copy of a model in one of the two types has that one in common with its
    original. The first digest is the only one in files of earlier versions, which are equal by it; it has no values
    from the end of a tensor.
    """

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        mine, its = self.split("-"), other.split("-")
        if len(mine) < 3 or len(its) < 3:
            return mine[0] == its[0]
        return mine[1] == its[1] or mine[2] == its[2]

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __hash__ = str.__hash__  # sets are not asked whether two bases are the same


@dataclass(frozen=True)
class Sample:
    """What is looked at of one tensor."""

    shape: tuple[int, ...]
    early: Tensor
    """The values that the first digest is made of."""
    even: Tensor
    """Those of the other two."""


def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> Fingerprint:
    """Digests of a model's tensors: names, shapes and a sample of the values.

    A copy of the model in bfloat16 or float16 has an equal one. A task head (``without``) and anything under ``peft``
    do not count. On the meta device there are no values to read.
    """
    skip = set(without)
    return fingerprint_of({name: part for name, part in sampled(model).items() if name not in skip})


def sampled(model: nn.Module) -> dict[str, Sample]:
    """A sample of each of the model's tensors, by name, without anything under ``peft``."""
    samples: dict[str, Sample] = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("peft.") or name.endswith("_extra_state"):
            continue
        flat = torch.empty(0, device="cpu") if tensor.is_meta else tensor.detach().reshape(-1)
        step = flat.numel() // SAMPLES
        early = (flat[:step * SAMPLES:step] if step > 1 else flat[:SAMPLES]).to("cpu", torch.float32)
        even = flat[places(flat.numel()).to(flat.device)].to("cpu", torch.float32)
        samples[name] = Sample(tuple(tensor.shape), early, even)
    return samples


def fingerprint_of(samples: Mapping[str, Sample]) -> Fingerprint:
    """The fingerprint of tensors with these names, from their samples."""
    heads = [f"{name}{sample.shape}".encode() for name, sample in samples.items()]
    early = [sample.early for sample in samples.values()]
    even = [sample.even for sample in samples.values()]
    return Fingerprint("-".join((_digest(heads, early, torch.bfloat16)[:16], _digest(heads, even, torch.bfloat16)[:12],
                                 _digest(heads, even, torch.float16)[:12])))


def places(size: int) -> Tensor:
    """Where a tensor of so many values is looked at."""
    if size <= SAMPLES + TAIL:
        return torch.arange(size, device="cpu")
    evenly = torch.arange(SAMPLES, device="cpu") * (size - 1) // (SAMPLES - 1)
    tail = size - 1 - size // SAMPLES // 2 ** torch.arange(1, TAIL + 1, device="cpu")
    return torch.cat([evenly, tail])


def _digest(heads: Sequence[bytes], samples: Sequence[Tensor], kind: torch.dtype) -> str:
    """Of names and shapes, each with its values rounded to ``kind``."""
    digest = hashlib.sha256()
    if not samples:
        return digest.hexdigest()
    values = torch.cat(list(samples)).to(kind).float().numpy()  # together: a hundred small ones take longer
    start = 0
    for head, sample in zip(heads, samples, strict=True):
        digest.update(head)
        digest.update(values[start:start + len(sample)].tobytes())
        start += len(sample)
    return digest.hexdigest()
