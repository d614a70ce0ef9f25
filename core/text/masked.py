"""Texts with some pieces hidden, as a masked language model is trained on them."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.errors import ScionError
from core.text.masking import mask_tokens
from core.text.tokens import Tokenizer


class MaskedTexts(Dataset):
    """Texts as ids, of which each epoch hides other pieces (`core.text.masking.mask_tokens`).

    An item is ``(inputs, targets)``, ``{"input_ids": [tokens]}`` and ``{"labels": [tokens]}``; `masked_batch` makes a
    batch of them.

    Args:
        texts: a sequence or data set of ids, special tokens among them, or of mappings with ``input_ids``
            (`core.text.store.StoredIds`).
        tokenizer: of the model.
        seed: of what is hidden, together with the epoch and the number of the text.
        redrawn: False hides the same pieces in every epoch: for validation and test.

    Raises:
        ScionError: the tokenizer has no mask token.
    """

    def __init__(self, texts: Any, tokenizer: Tokenizer, seed: int = 0, redrawn: bool = True) -> None:
        if tokenizer.mask_id is None:
            raise ScionError(f"the tokenizer of {tokenizer.name!r} has no mask token: its model is no masked language "
                             "model")
        self.texts, self.tokenizer, self.seed, self.redrawn = texts, tokenizer, seed, redrawn
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """What the coming items are drawn for."""
        if self.redrawn:
            self.epoch = epoch

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        lengths = getattr(self.texts, "lengths", None)
        if lengths is None:
            return [len(self._ids(number)) for number in range(len(self))]
        return [int(length) for length in lengths()]

    def __len__(self) -> int:
        texts: Sized = self.texts
        return len(texts)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ids = self._ids(index)
        special = torch.isin(ids, torch.tensor(sorted(self.tokenizer.special_ids)))
        mask_id = self.tokenizer.mask_id
        assert mask_id is not None
        hidden, labels = mask_tokens(ids, special, self.tokenizer.size, mask_id, self.seed, self.epoch, index)
        return {"input_ids": hidden}, {"labels": labels}

    def _ids(self, index: int) -> Tensor:
        text = self.texts[index]
        ids = text["input_ids"] if isinstance(text, dict) else text
        return torch.as_tensor(ids, dtype=torch.long)


def masked_batch(tokenizer: Tokenizer, samples: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]]
                 ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Items of `MaskedTexts` as a batch: inputs ``input_ids`` and ``attention_mask``, targets ``labels``, all [samples,
    tokens]."""
    ids = [inputs["input_ids"].tolist() for inputs, _ in samples]
    labels = [targets["labels"].tolist() for _, targets in samples]
    batch = tokenizer.pad(ids, labels=labels)
    return batch, {"labels": batch.pop("labels")}
