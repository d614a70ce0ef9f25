"""What a masked language model has to guess."""

from __future__ import annotations

import pytest
import torch

from core.errors import ScionError
from core.text.masking import mask_tokens
from core.text.tokens import IGNORED

MASK, VOCABULARY, LENGTH = 4, 1000, 200_000


def test_shares() -> None:
    ids = torch.randint(10, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1))
    special = torch.zeros(LENGTH, dtype=torch.long)
    special[::10] = 1
    inputs, labels = mask_tokens(ids, special, VOCABULARY, MASK, seed=0, epoch=0, sample=0)
    chosen = labels != IGNORED
    assert not chosen[::10].any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    pieces = int((special == 0).sum())
    assert abs(int(chosen.sum()) / pieces - 0.15) < 0.005
    hidden, kept = inputs == MASK, inputs == ids
    shares = [(part & chosen).sum().item() / chosen.sum().item() for part in (hidden, kept, ~hidden & ~kept)]
    # a random piece is now and then the mask or the piece itself: 1 in 1000 of a tenth
    assert all(abs(share - expected) < 0.01 for share, expected in zip(shares, (0.8, 0.1, 0.1), strict=True))
    assert len(inputs[chosen & ~hidden & ~kept].unique()) > 800


def test_a_function_of_seed_epoch_and_sample() -> None:
    ids, special = list(range(10, 90)), [0] * 80

    def labels(seed: int, epoch: int, sample: int) -> list[int]:
        torch.manual_seed(seed + epoch)  # whatever the global state is
        return mask_tokens(ids, special, VOCABULARY, MASK, seed, epoch, sample)[1].tolist()

    state = torch.get_rng_state()
    first = mask_tokens(ids, special, VOCABULARY, MASK, 0, 0, 0)[1].tolist()
    assert torch.equal(torch.get_rng_state(), state)  # and leaves it alone
    assert labels(0, 0, 0) == first
    others = [labels(1, 0, 0), labels(0, 1, 0), labels(0, 0, 1)]
    assert first not in others and len({tuple(one) for one in others}) == 3


def test_short_texts() -> None:
    for sample in range(50):
        inputs, labels = mask_tokens([2, 10, 3], [1, 0, 1], VOCABULARY, MASK, 0, 0, sample)
        assert labels.tolist() == [IGNORED, 10, IGNORED] and inputs.tolist()[::2] == [2, 3]
    inputs, labels = mask_tokens([2, 3], [1, 1], VOCABULARY, MASK, 0, 0, 0)
    assert inputs.tolist() == [2, 3] and labels.tolist() == [IGNORED, IGNORED]
    assert mask_tokens([], [], VOCABULARY, MASK, 0, 0, 0)[0].tolist() == []


def test_refusals() -> None:
    with pytest.raises(ScionError, match="3 ids and 2 marks"):
        mask_tokens([1, 2, 3], [0, 0], VOCABULARY, MASK, 0, 0, 0)
    with pytest.raises(ScionError, match="the mask token 1000 is none of the 1,000 ids"):
        mask_tokens([1, 2], [0, 0], VOCABULARY, VOCABULARY, 0, 0, 0)
