"""Writes the stored adapters that later releases must load: ``python -m tests.artifacts.make_artifacts [METHOD]``.

Only for a new method: a stored adapter is never written anew, else it would prove nothing. One that exists is kept.
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from core.method import PEFTMethod
from tests.methods import METHODS, REFUSED, Cell
from tests.models import FAMILIES, batch, make
from tests.toolkit import outputs

HERE = Path(__file__).parent
STORED = "stored.safetensors"
WORDS = "a stored adapter is small: give the row an `artifact` configuration"


@dataclasses.dataclass(frozen=True)
class Small(Cell):
    """A cell whose adapter has a few hundred numbers."""

    def new(self, **changes: object) -> PEFTMethod:
        return super().new(**{**self.row.artifact, **changes})


def artifact_cells() -> list[Cell]:
    """One family a method, by its name (new methods must not shift the others'); methods with stages in each."""
    families = list(FAMILIES)[:5]  # those of the first stored adapters: a new family must not shift the others either
    found: list[Cell] = []
    for method, row in METHODS.items():
        for v, (name, variant) in enumerate(row.variants.items()):
            if (v == 0 and variant.trains) or variant.everywhere or (v == 1 and not any(
                    cell.method == method for cell in found)):
                first = zlib.crc32(method.encode()) + v
                turn = [families[(first + i) % len(families)] for i in range(len(families))]
                found.append(Small(method, name, next(f for f in turn if (method, f) not in REFUSED)))
    return found


def folder_of(cell: Cell) -> Path:
    return HERE / f"{cell.method}-{cell.variant}".replace(", ", "-")


def expected_outputs(cell: Cell) -> tuple[PEFTMethod, Tensor]:
    """The cell's method with values of a fixed seed, and what the model gives."""
    model = make(cell.family)
    method = cell.attach(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # uniform values: they are the same on every processor
        for tensor in method.trainable().values():
            tensor += 0.2 * (torch.rand(tensor.shape, generator=generator) - 0.5)
    return method, outputs(model, batch(cell.family))


def main() -> None:
    for cell in artifact_cells():
        folder = folder_of(cell)
        if folder.exists() or (len(sys.argv) > 1 and cell.method not in sys.argv[1:]):
            continue
        method, expected = expected_outputs(cell)
        method.save(folder)
        save_file({"outputs": expected.contiguous()}, folder / STORED)
        print(folder, sum(file.stat().st_size for file in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
