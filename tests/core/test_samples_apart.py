"""Samples of a batch do not meet: of the checks demanded of every method, the one that is no row of the matrix."""

from __future__ import annotations

import pytest
import torch

from tests.methods import METHODS, Cell
from tests.models import FAMILIES, batch, make
from tests.toolkit import distance, outputs, randomize


@pytest.mark.parametrize("method", METHODS)
def test_7_samples_do_not_meet(method: str) -> None:
    """The output of a sample does not depend on the others of its batch, padded ones among them."""
    row = METHODS[method]
    family = next(f for f in ("bert", *FAMILIES) if not Cell(method, next(iter(row.variants)), f).refused)
    model, inputs = make(family, dtype=torch.float64), batch(family, 4)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    attached = Cell(method, next(iter(row.variants)), family).attach(model)
    randomize(attached, size=row.size)
    together = outputs(model, inputs)
    turned = outputs(model, inputs[[2, 3, 0, 1]])[[2, 3, 0, 1]]
    alone = torch.cat([outputs(model, inputs[i:i + 1]) for i in range(4)])
    assert distance(alone, together) < 1e-10 and distance(turned, together) < 1e-10
