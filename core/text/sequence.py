"""From pairs of texts to ids, labels and batches, for models that write one token after the other.

One order for causal models: what the tokenizer begins a text with, the source, the target, the end token. A label is
the token itself where it is to be learnt, else -100. For encoder and decoder the source is read and the target written.

    >>> pairs = PairEncoder(tokenizer, max_length=512)
    >>> samples = pairs.encode([("What is 2 + 2?", " 4")])
    >>> inputs, targets = causal_batch(tokenizer, samples)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from core.errors import ScionError
from core.text.tokens import IGNORED, Side, Tokenizer

Scope = Literal["answer", "all"]
TooLong = Literal["drop", "cut", "error"]
Shorten = Callable[[list[int], int], list[int]]
"""Cuts the ids of a source to a number of tokens."""
Batch = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Inputs and targets."""


def keep_end(ids: list[int], room: int) -> list[int]:
    """The last ``room`` tokens of a source: what a target follows is mostly near it."""
    return ids[len(ids) - room:] if room else []


def keep_start(ids: list[int], room: int) -> list[int]:
    """The first ``room`` tokens of a source."""
    return ids[:room]


@dataclass(frozen=True)
class Sample:
    """One pair as numbers."""

    ids: list[int]
    """What a causal model reads, or the encoder."""
    labels: list[int]
    """Of a causal model one for each of ``ids``, of a decoder the target and its end; -100 counts for no loss."""

    @property
    def columns(self) -> dict[str, list[int]]:
        """As `core.text.store` keeps it."""
        return {"input_ids": self.ids, "labels": self.labels}


@dataclass
class Dropped:
    """How many pairs were left out for their length."""

    count: int = 0
    of: int = 0

    def __str__(self) -> str:
        return f"{self.count:,} of {self.of:,} samples are longer than max_length and left out"


class PairEncoder:
    """Makes samples of (source, target) pairs.

    Source and target are tokenised each for itself, as they are when the model writes: the ids of the source do not
    depend on what follows it.

    Args:
        tokenizer: of the model.
        max_length: tokens of a sample; of encoder and decoder, of the source and of the target each. None has no limit.
        scope: ``answer`` learns target and end, ``all`` the source too (causal models only). A sample's very first
            token follows nothing, so that no loss is ever taken from it.
        too_long: ``drop`` leaves longer samples out and counts them, ``cut`` shortens the source, ``error`` refuses.
        shorten: the rule by which ``cut`` shortens.
        decoder: whether the model has an encoder for the source and a decoder for the target.

    Raises:
        ScionError: there is no end token, or ``scope: all`` for a decoder.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int | None = None, scope: Scope = "answer",
                 too_long: TooLong = "drop", shorten: Shorten = keep_end, decoder: bool = False) -> None:
        end = tokenizer.end_id
        if end is None:
            raise ScionError(f"the tokenizer of {tokenizer.name!r} has no end token, so that no answer could end; give "
                             "it one (eos_token) and save it again")
        if decoder and scope == "all":
            raise ScionError("data.scope: a model of encoder and decoder writes the target only; take answer")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.scope, self.too_long, self.shorten, self.decoder = scope, too_long, shorten, decoder
        self.end = end
        self.before, self.behind = tokenizer.around()
        self.dropped = Dropped()
        """What `encode` has left out so far."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Sample]:
        """The samples of some pairs, without those that are dropped.

        Raises:
            ScionError: a target is empty, or a sample too long with ``too_long: error``, or its target alone is.
        """
        found = [self.sample(*pair) for pair in self._tokenised(pairs)]
        self.dropped.of += len(found)
        self.dropped.count += found.count(None)
        return [sample for sample in found if sample is not None]

    def prompts(self, sources: Sequence[str]) -> list[list[int]]:
        """The ids that stand before what the model is to write: for generation.

        Raises:
            ScionError: one is longer than ``max_length``.
        """
        found = []
        for number, ids in enumerate(self.tokenizer.ids(sources, special=False)):
            prompt = self.before + ids + (self.behind if self.decoder else [])
            if self.max_length is not None and len(prompt) > self.max_length:
                raise ScionError(f"prompt {number}: {len(prompt)} tokens, and the model's context has "
                                 f"{self.max_length}")
            found.append(prompt)
        return found

    def _tokenised(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The ids of source and target without any special tokens."""
        for source, target in pairs:
            if not target.strip():
                raise ScionError(f"an empty target, of the source {source[:60]!r}; fill it in or leave the sample out")
        sources = self.tokenizer.ids([source for source, _ in pairs], special=False)
        targets = self.tokenizer.ids([target for _, target in pairs], special=False)
        return list(zip(sources, targets, strict=True))

    def sample(self, source: list[int], target: list[int]) -> Sample | None:
        """One pair of ids as a sample; None where it is dropped."""
        target = [*target, self.end]
        if self.decoder:
            return self._of_decoder(source, target)
        cut = self._fitting(source, len(self.before) + len(target))
        if cut is None:
            return None
        context = self.before + cut
        learnt = context[1:] if self.scope == "all" else []
        ignored = len(context) - len(learnt)
        # Its first token follows nothing; where there is no context at all that is one of the target's.
        labels = [IGNORED] * ignored + learnt + target
        if not context:
            labels[0] = IGNORED
        return Sample(context + target, labels)

    def _of_decoder(self, source: list[int], target: list[int]) -> Sample | None:
        cut = self._fitting(source, len(self.before) + len(self.behind))
        too_long = self.max_length is not None and len(target) > self.max_length
        if too_long and self.too_long != "drop":
            raise self._target_too_long(len(target))
        if cut is None or too_long:
            return None
        return Sample(self.before + cut + self.behind, target)

    def _fitting(self, source: list[int], others: int) -> list[int] | None:
        """The source, cut if need be and if that is the rule, beside so many other tokens; None where it is dropped."""
        if self.max_length is None or len(source) + others <= self.max_length:
            return source
        if self.too_long == "drop":
            return None
        if self.too_long == "error":
            raise ScionError(f"a sample has {len(source) + others} tokens, more than max_length {self.max_length}; set "
                             "data.too_long to drop or cut")
        room = self.max_length - others
        if room < 0:
            raise self._target_too_long(others)
        cut = self.shorten(source, room)
        if len(cut) > room:
            raise ScionError(f"the rule {getattr(self.shorten, '__name__', self.shorten)} left {len(cut)} tokens of a "
                             f"source, where {room} fit")
        return cut

    def _target_too_long(self, tokens: int) -> ScionError:
        return ScionError(f"a target of {tokens} tokens does not fit max_length {self.max_length}, and targets are "
                          "never cut; set data.too_long to drop, or max_length higher")


# ------------------------------------------------------------------------------------------------- batches


def next_labels(labels: Tensor) -> Tensor:
    """What each position has to say: the label of the token behind it; [batch, tokens] -> [batch, tokens].

    The last position has nothing to say. Where these are not -100 a causal model's logits are wanted.
    """
    moved = torch.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


def causal_batch(tokenizer: Tokenizer, samples: Sequence[Sample], side: Side = "right") -> Batch:
    """Samples as a batch of a causal model.

    Returns:
        Inputs ``input_ids`` and ``attention_mask``, targets ``labels``, all [samples, tokens]. A target stands where it
        is to be said, one position before its token, so that logits are wanted exactly where ``labels != -100``.
    """
    inputs = tokenizer.pad([sample.ids for sample in samples], side, labels=[sample.labels for sample in samples])
    labels = inputs.pop("labels")
    return inputs, {"labels": next_labels(labels)}


def decoder_batch(tokenizer: Tokenizer, samples: Sequence[Sample]) -> Batch:
    """Samples as a batch of a model of encoder and decoder.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` [samples, source tokens] and ``labels`` [samples, target tokens],
        which the model's own rule moves to what its decoder reads; targets ``labels``, the same.
    """
    inputs = tokenizer.pad([sample.ids for sample in samples])
    numbers = [sample.labels for sample in samples]
    labels = tokenizer.pad(numbers, labels=numbers)["labels"]
    return {**inputs, "labels": labels}, {"labels": labels}
