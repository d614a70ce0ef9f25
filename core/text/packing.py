"""Several samples in one row of a batch, of which none sees another.

Positions that begin again are not enough: with transformers' sdpa attention a mask of ones, or a cache, lets a sample
see those before it, and says nothing. A mask for each query is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ScionError
from core.text.sequence import Batch, Sample, next_labels
from core.text.tokens import IGNORED, Tokenizer


def fill_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which samples share a row: each goes into the first row with room for it, the longest first.

    Args:
        lengths: tokens of each sample.
        room: tokens of a row.

    Returns:
        Numbers of samples, a list for each row; a row's samples, and the rows by their first ones, in ascending order.

    Raises:
        ScionError: a sample is longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        size = lengths[number]
        if size > room:
            raise ScionError(f"packing: sample {number} has {size} tokens, and a row {room}")
        place = next((row for row, left in enumerate(free) if left >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(room)
        rows[place].append(number)
        free[place] -= size
    return sorted(sorted(row) for row in rows)


def packed_batch(tokenizer: Tokenizer, rows: Sequence[Sequence[Sample]]) -> Batch:
    """Rows of several samples as a batch of a causal model, each sample as if it were alone.

    Returns:
        Inputs ``input_ids`` and ``position_ids`` [rows, tokens] and ``attention_mask``, boolean [rows, 1, tokens,
        tokens] (queries, keys); targets ``labels`` [rows, tokens] as `causal_batch` gives them.
    """
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    owners: list[list[int]] = []
    positions: list[list[int]] = []
    for row in rows:
        ids.append([number for sample in row for number in sample.ids])
        owners.append([owner for owner, sample in enumerate(row, start=1) for _ in sample.ids])
        positions.append([position for sample in row for position in range(len(sample.ids))])
        labels.append([label for sample in row for label in _without_first(sample.labels)])
    batch = tokenizer.pad(ids, labels=labels, owners=owners, position_ids=positions)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": apart(batch["owners"]),
              "position_ids": batch["position_ids"]}
    return inputs, {"labels": next_labels(batch["labels"])}


def apart(owners: Tensor) -> Tensor:
    """The mask by which each token sees itself and what is before it of its own sample.

    Args:
        owners: the sample of each token, from 1; 0 is padding [rows, tokens].

    Returns:
        Boolean [rows, 1, tokens, tokens] (queries, keys). Padding sees itself alone: a query without any key would be
        no number, and so would be its gradient.
    """
    same = owners[:, :, None] == owners[:, None, :]
    is_text = (owners > 0)[:, :, None]
    itself = torch.eye(owners.shape[1], dtype=torch.bool, device=owners.device)
    return ((same & is_text).tril() | itself)[:, None]


def _without_first(labels: list[int]) -> list[int]:
    """Labels of a sample of which the first is ignored: in a row the token before it is another sample's."""
    return [IGNORED, *labels[1:]] if labels else []
