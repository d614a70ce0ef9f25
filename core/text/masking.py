"""Which pieces a masked language model has to guess: a function of the seed, the epoch and the sample alone.

Source: BERT, section 3.1 (https://arxiv.org/abs/1810.04805), drawn anew for each epoch as in RoBERTa, section 4.1
(https://arxiv.org/abs/1907.11692).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ScionError
from core.random_state import seed_of
from core.text.tokens import IGNORED

RATE, HIDDEN, REPLACED = 0.15, 0.8, 0.1
"""The share of the pieces that count, and of those the shares that are hidden and that become any other piece. The
rest stay as they are, so that the model cannot know which it must guess."""


def mask_tokens(ids: Sequence[int] | Tensor, special_mask: Sequence[int] | Tensor, vocabulary: int, mask_id: int,
                seed: int, epoch: int, sample: int) -> tuple[Tensor, Tensor]:
    """One sample with some pieces hidden, and what they were.

    Args:
        ids: of the sample [tokens].
        special_mask: 1 at the tokens that stand for no text, which are never chosen [tokens].
        vocabulary: random pieces are drawn from 0 to this, exclusive.
        mask_id: the id that hides a piece.
        seed, epoch, sample: all that the choice depends on, whichever batch or process the sample is in.

    Returns:
        Inputs and labels, int64 [tokens]; labels are -100 where nothing is to be guessed. A sample with any piece that
        may be chosen has at least one label.

    Raises:
        ScionError: the two lists differ in length, or ``mask_id`` is no id of the vocabulary.
    """
    original = torch.as_tensor(ids, dtype=torch.long)
    special = torch.as_tensor(special_mask, dtype=torch.bool)
    if original.shape != special.shape:
        raise ScionError(f"masking: {len(original)} ids and {len(special)} marks of special ones")
    if not 0 <= mask_id < vocabulary:
        raise ScionError(f"masking: the mask token {mask_id} is none of the {vocabulary:,} ids")
    generator = torch.Generator().manual_seed(seed_of(seed, "mask", epoch, sample))
    chance = torch.rand(len(original), generator=generator)
    fate = torch.rand(len(original), generator=generator)
    others = torch.randint(vocabulary, (len(original),), generator=generator)
    chosen = _chosen(chance, special)
    inputs = original.clone()
    hidden = chosen & (fate < HIDDEN)
    replaced = chosen & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED)
    inputs[hidden] = mask_id
    inputs[replaced] = others[replaced]
    labels = original.masked_fill(~chosen, IGNORED)
    return inputs, labels


def _chosen(chance: Tensor, special: Tensor) -> Tensor:
    """The pieces to guess: each with the same chance; in a short text the likeliest one where that gives none."""
    chosen = (chance < RATE) & ~special
    if not chosen.any() and not special.all():
        chosen[chance.masked_fill(special, 2.0).argmin()] = True
    return chosen
