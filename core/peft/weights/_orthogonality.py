"""The regulariser of methods that keep their factors orthonormal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(matrices: Sequence[Tensor]) -> Tensor:
    """|M M^T - I| of each matrix M: how far its rows are from orthonormal ones."""
    found = []
    for matrix in matrices:
        gram = matrix @ matrix.t()
        identity = torch.eye(len(gram)).to(gram)
        found.append((gram - identity).norm())
    return torch.stack(found)
