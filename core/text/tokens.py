"""A tokenizer as data see it: texts to ids and back, padded batches, and a fingerprint to know it by.

It is a fast tokenizer of transformers. What the core needs of it is small, and the same for every model:

    >>> tokenizer = load_tokenizer(source)
    >>> ids = tokenizer.ids(["one text", "and another"])
    >>> batch = tokenizer.pad(ids)          # {"input_ids": [2, tokens], "attention_mask": [2, tokens]}
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from core.errors import ScionError, listed, one_line
from core.hub import Source, file_of, first_line, quiet

Side = Literal["left", "right"]

IGNORED = -100
"""The label of a position that counts for no loss, torch's own default."""

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
         "spm.model")
"""Files that a tokenizer can be made of. Without any transformers makes an empty one of the model's type and says
nothing."""

_FILL = {"labels": IGNORED}
"""What padding puts into the columns of a batch; 0 into all others."""

_PROBE = "a"
_told: set[str] = set()
"""Of which tokenizers it has been said that they pad with their end token."""


@dataclass(frozen=True)
class Encoded:
    """One text, or a pair of texts, as numbers; the three lists have one length."""

    ids: list[int]
    types: list[int]
    """0 in the first text, 1 in the second."""
    special: list[int]
    """1 where the tokenizer put a token that stands for no text."""


class Tokenizer:
    """A fast tokenizer of transformers.

    Args:
        fast: as ``AutoTokenizer.from_pretrained`` gives it.
        name: what messages call it.

    Raises:
        ScionError: it is a slow one, or has neither a pad token nor an end token.
    """

    def __init__(self, fast: Any, name: str) -> None:
        if not getattr(fast, "is_fast", False):
            raise ScionError(f"backbone.name: the tokenizer of {name!r} is a slow one; save it as tokenizer.json, "
                             "which transformers' save_pretrained does for fast ones")
        self.fast = fast
        self.name = name
        # What an earlier call cut or padded to stays set in the library.
        self.backend.no_truncation()
        self.backend.no_padding()
        self.fingerprint = fingerprint(self.backend)
        self.pads_with_end = fast.pad_token_id is None
        """Whether there is no pad token, so that the end token stands in padding."""
        if self.pads_with_end:
            self._take_end_as_pad()

    def _take_end_as_pad(self) -> None:
        if self.end_id is None:
            raise ScionError(f"backbone.name: the tokenizer of {self.name!r} has neither a pad token nor an end token; "
                             "give it one and save it again")
        if self.fingerprint not in _told:
            _told.add(self.fingerprint)
            warnings.warn(f"the tokenizer of {self.name} has no pad token, so batches are padded with its end token "
                          f"{self.fast.eos_token!r}, to which nothing attends", stacklevel=4)

    @property
    def backend(self) -> Any:
        """The ``tokenizers.Tokenizer``."""
        return self.fast.backend_tokenizer

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def end_id(self) -> int | None:
        """The id that ends a text, if the tokenizer has one."""
        return self.fast.eos_token_id

    @property
    def pad_id(self) -> int:
        """The id that padding is made of."""
        pad, end = self.fast.pad_token_id, self.end_id
        return pad if pad is not None else end  # type: ignore[return-value]

    @property
    def mask_id(self) -> int | None:
        """The id that hides a piece from a masked language model, if there is one."""
        return self.fast.mask_token_id

    @property
    def special_by_name(self) -> dict[str, int]:
        """The ids of the tokens that pad, hide a piece and end a text, by name, as far as there are some."""
        named = {"pad": self.pad_id, "mask": self.mask_id, "end": self.end_id}
        return {name: number for name, number in named.items() if number is not None}

    @property
    def special_ids(self) -> set[int]:
        """The ids that stand for no text."""
        return set(self.fast.all_special_ids)

    @property
    def has_types(self) -> bool:
        """Whether its models are told which of two texts a token belongs to."""
        return "token_type_ids" in self.fast.model_input_names

    # ------------------------------------------------------------------------------------------ texts and ids

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, max_length: int | None = None,
               special: bool = True) -> list[Encoded]:
        """Texts, or pairs of them, as ids.

        Args:
            texts: the texts.
            pairs: the second text of each, where the model reads two.
            max_length: tokens to cut to, special ones included, the longer text of a pair first; None cuts nothing.
            special: whether to put the tokenizer's own tokens around them.
        """
        backend = self.backend
        items: Any = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        if max_length is not None:
            backend.enable_truncation(max_length, strategy="longest_first")
        try:
            found = backend.encode_batch(items, add_special_tokens=special)
        finally:
            backend.no_truncation()
        return [Encoded(one.ids, one.type_ids, one.special_tokens_mask) for one in found]

    def ids(self, texts: Sequence[str], max_length: int | None = None, special: bool = True) -> list[list[int]]:
        """The ids alone, see `encode`."""
        return [one.ids for one in self.encode(texts, None, max_length, special)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out."""
        return self.fast.decode(list(ids), skip_special_tokens=True)

    def around(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts before and behind a text."""
        encoded = self.encode([_PROBE])[0]
        inner = [number for number, is_special in enumerate(encoded.special) if not is_special]
        if not inner:  # it knows no letter of the probe
            return encoded.ids, []
        return encoded.ids[:inner[0]], encoded.ids[inner[-1] + 1:]

    # ------------------------------------------------------------------------------------------ batches

    def pad(self, sequences: Sequence[Sequence[int]], side: Side = "right", **columns: Sequence[Sequence[int]]
            ) -> dict[str, Tensor]:
        """Sequences of several lengths as one batch.

        Args:
            sequences: ids of each sample.
            side: where the shorter ones are filled up: right for training, left for generation.
            columns: further numbers for each of the ids (``token_type_ids``, ``labels``), padded alike; labels with
                -100, so that no loss is taken there, others with 0.

        Returns:
            ``input_ids``, ``attention_mask`` (1 at the samples' own tokens) and the further columns, all int64
            [samples, tokens].
        """
        width = max(map(len, sequences), default=0)
        masks = [[1] * len(sequence) for sequence in sequences]
        batch = {"input_ids": _padded(sequences, width, self.pad_id, side),
                 "attention_mask": _padded(masks, width, 0, side)}
        for name, rows in columns.items():
            batch[name] = _padded(rows, width, _FILL.get(name, 0), side)
        return batch

    def pad_encoded(self, samples: Sequence[Encoded], side: Side = "right") -> dict[str, Tensor]:
        """Encoded texts as one batch, with ``token_type_ids`` where the tokenizer's models read them."""
        columns: dict[str, Sequence[Sequence[int]]] = {}
        if self.has_types:
            columns["token_type_ids"] = [sample.types for sample in samples]
        return self.pad([sample.ids for sample in samples], side, **columns)

    # ------------------------------------------------------------------------------------------ checks

    def check_rows(self, rows: int) -> str | None:
        """Compare the ids with the rows of a model's embedding.

        Returns:
            A note where the embedding has more rows than there are ids, which does no harm; else None.

        Raises:
            ScionError: an id has no row.
        """
        size = self.size
        if size > rows:
            raise ScionError(f"backbone.name: the tokenizer of {self.name!r} has {size:,} ids and the model's "
                             f"embedding {rows:,} rows; it is another model's, or tokens were added to it alone")
        if size < rows:
            return f"the tokenizer has {size:,} ids, the model's embedding {rows:,} rows"
        return None


def _padded(rows: Sequence[Sequence[int]], width: int, value: int, side: Side) -> Tensor:
    """Rows of numbers as one tensor [rows, width], filled up with ``value``."""
    batch = torch.full((len(rows), width), value, dtype=torch.long)
    for row, numbers in enumerate(rows):
        if not len(numbers):
            continue
        values = torch.from_numpy(np.array(numbers, np.int64))  # a copy: files that are mapped cannot be written to
        start = width - len(values) if side == "left" else 0
        batch[row, start:start + len(values)] = values
    return batch


def fingerprint(backend: Any) -> str:
    """A short hash of a tokenizer's JSON: the same wherever it is loaded, another where any text could become other
    ids. How it was last told to cut and to pad is no part of it."""
    record: dict[str, Any] = json.loads(backend.to_str())
    for setting in ("truncation", "padding"):
        record.pop(setting, None)
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def load_tokenizer(source: Source) -> Tokenizer:
    """The tokenizer that lies beside a model.

    Raises:
        ScionError: there are no files of one, or they are damaged.
    """
    from transformers import AutoTokenizer

    if all(file_of(source, name) is None for name in FILES):
        raise ScionError(f"backbone.name: no tokenizer files in {source.where} ({listed(FILES, 3)}); save the "
                         "tokenizer into the folder with save_pretrained")
    try:
        with quiet():
            fast = AutoTokenizer.from_pretrained(source.where, trust_remote_code=False, **source.options)
    except Exception as error:  # from json, tokenizers or the hub: whatever it was, the files cannot be used
        reason = one_line(first_line(error))
        raise ScionError(f"backbone.name: {source.name!r}: its tokenizer cannot be read ({reason})") from None
    return Tokenizer(fast, source.name)
