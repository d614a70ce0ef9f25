"""From (source, target) to ids and labels; packed rows are the samples by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.errors import ScionError
from core.text.backbones import LanguageModel
from core.text.packing import apart, fill_rows, packed_batch
from core.text.sequence import (
    PairEncoder,
    Sample,
    causal_batch,
    decoder_batch,
    keep_end,
    keep_start,
    next_labels,
)
from core.text.tokens import IGNORED, Tokenizer
from tests.core.text import tiny

BOS, EOS = 5, 6
PAIRS = [("what is the cat", "one two"), ("dog runs", "three"), ("the dog", "four five one two three"), ("a", "a")]


def ids(text: str) -> list[int]:
    return [tiny.id_of(word) for word in text.split()]


@pytest.fixture
def tokens() -> Tokenizer:
    return Tokenizer(tiny.tokenizer("bos"), "tiny")


def test_one_order(tokens: Tokenizer) -> None:
    sample = PairEncoder(tokens).encode(PAIRS)[0]
    source, target = ids("what is the cat"), ids("one two")
    assert sample.ids == [BOS, *source, *target, EOS]
    assert sample.labels == [IGNORED] * 5 + [*target, EOS]
    assert PairEncoder(tokens).prompts(["what is the cat"]) == [[BOS, *source]]


def test_scopes_differ_by_the_prompts_length(tokens: Tokenizer) -> None:
    counts = {}
    for scope in ("all", "answer"):
        samples = PairEncoder(tokens, scope=scope).encode(PAIRS)  # type: ignore[arg-type]
        labels = causal_batch(tokens, samples)[1]["labels"]
        counts[scope] = int((labels != IGNORED).sum())
    assert counts["all"] - counts["answer"] == sum(len(source.split()) for source, _ in PAIRS)
    assert counts["answer"] == sum(len(target.split()) + 1 for _, target in PAIRS)


def test_the_first_token_is_never_learnt() -> None:
    plain = Tokenizer(tiny.tokenizer("plain"), "tiny")
    for scope in ("all", "answer"):
        encoder = PairEncoder(plain, scope=scope)  # type: ignore[arg-type]
        assert encoder.encode([("", "cat")])[0].labels == [IGNORED, EOS]
    assert encoder.encode([("dog", "cat")])[0].labels == [IGNORED, *ids("cat"), EOS]


def test_too_long(tokens: Tokenizer) -> None:
    dropping = PairEncoder(tokens, max_length=7)
    assert len(dropping.encode(PAIRS)) == 2
    assert str(dropping.dropped) == "2 of 4 samples are longer than max_length and left out"
    with pytest.raises(ScionError, match="a sample has 8 tokens, more than max_length 7; set data.too_long to drop or"):
        PairEncoder(tokens, 7, too_long="error").encode(PAIRS)
    for shorten, left in ((keep_end, "is the cat"), (keep_start, "what is the")):
        sample = PairEncoder(tokens, 7, too_long="cut", shorten=shorten).encode(PAIRS)[0]
        assert sample.ids == [BOS, *ids(left), *ids("one two"), EOS]
    alone = PairEncoder(tokens, 7, too_long="cut").encode([PAIRS[2]])[0]
    assert alone.ids == [BOS, *ids(PAIRS[2][1]), EOS]  # nothing of the source, all of the target
    with pytest.raises(ScionError, match="a target of 7 tokens does not fit max_length 6, and targets are never cut"):
        PairEncoder(tokens, 6, too_long="cut").encode([PAIRS[2]])
    with pytest.raises(ScionError, match="the rule <lambda> left 4 tokens of a source, where 3 fit"):
        PairEncoder(tokens, 7, too_long="cut", shorten=lambda ids, room: ids).encode(PAIRS)
    with pytest.raises(ScionError, match="prompt 0: 5 tokens, and the model's context has 4"):
        PairEncoder(tokens, 4).prompts(["what is the cat"])


def test_refusals(tokens: Tokenizer) -> None:
    with pytest.raises(ScionError, match="an empty target, of the source 'a'"):
        PairEncoder(tokens).encode([("a", " ")])
    with pytest.raises(ScionError, match="has no end token"):
        PairEncoder(Tokenizer(tiny.tokenizer(), "tiny"))
    with pytest.raises(ScionError, match="writes the target only; take answer"):
        PairEncoder(tokens, scope="all", decoder=True)


def test_labels_stand_where_they_are_said(tokens: Tokenizer) -> None:
    samples = PairEncoder(tokens).encode(PAIRS)
    for side in ("right", "left"):
        inputs, targets = causal_batch(tokens, samples, side)  # type: ignore[arg-type]
        labels = targets["labels"]
        said = labels[:, :-1][labels[:, :-1] != IGNORED]
        assert torch.equal(said, inputs["input_ids"][:, 1:][labels[:, :-1] != IGNORED])
        assert (inputs["attention_mask"][labels != IGNORED] == 1).all()
        assert [row[row != IGNORED].tolist() for row in labels] == [[*ids(target), EOS] for _, target in PAIRS]
    assert next_labels(torch.tensor([[1, 2, IGNORED]])).tolist() == [[2, IGNORED, IGNORED]]


def test_encoder_and_decoder() -> None:
    its = Tokenizer(tiny.tokenizer(eos_token="[EOS]"), "tiny")
    encoder = PairEncoder(its, 6, too_long="cut", shorten=keep_start, decoder=True)
    sample = encoder.encode([("what is the cat dog", "one two")])[0]
    assert sample == Sample([2, *ids("what is the cat"), 3], [*ids("one two"), EOS])
    assert encoder.prompts(["a"]) == [[2, *ids("a"), 3]]
    inputs, targets = decoder_batch(its, encoder.encode([("a", "one two"), ("a dog", "cat")]))
    assert inputs["input_ids"].shape == (2, 4) and inputs["attention_mask"].sum() == 7
    assert targets["labels"].tolist() == [[*ids("one two"), EOS], [*ids("cat"), EOS, IGNORED]]
    assert torch.equal(inputs["labels"], targets["labels"])
    with pytest.raises(ScionError, match="a target of 7 tokens does not fit"):
        encoder.encode([("a", "a a a a a a")])


# ------------------------------------------------------------------------------------------------- packing


def test_rows_are_filled() -> None:
    rows = fill_rows([4, 6, 3, 5, 2], 8)
    assert sorted(number for row in rows for number in row) == [0, 1, 2, 3, 4]
    assert rows == [[0], [1, 4], [2, 3]]
    assert fill_rows([], 8) == []
    with pytest.raises(ScionError, match="sample 1 has 9 tokens, and a row 8"):
        fill_rows([3, 9], 8)


def test_the_mask_keeps_samples_apart() -> None:
    mask = apart(torch.tensor([[1, 1, 2, 2, 0]]))[0, 0].int()
    assert mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def losses(model: LanguageModel, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The loss of each label, in the order of the positions."""
    where = labels != IGNORED
    return F.cross_entropy(model.logits(inputs, where), labels[where], reduction="none")


CAUSAL = [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("codegen", "CodeGenForCausalLM"),
          ("gpt_neox", "GPTNeoXForCausalLM")]


@pytest.mark.parametrize("scope", ["answer", "all"])
@pytest.mark.parametrize(("kind", "model_class"), CAUSAL)
def test_packed_losses_are_those_of_the_samples(kind: str, model_class: str, scope: Any, tmp_path: Path) -> None:
    model = LanguageModel(tiny.folder(tmp_path, kind, model_class)).double().eval()
    samples = PairEncoder(model.tokenizer, scope=scope).encode(PAIRS)
    rows = [[samples[0], samples[1]], [samples[2]], [samples[3], samples[3]]]
    packed, targets = packed_batch(model.tokenizer, rows)
    found = losses(model, packed, targets["labels"])
    order = [sample for row in rows for sample in row]
    alone = [losses(model, *_alone(model, sample)) for sample in order]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)
    assert len(found) == sum(int((_alone(model, sample)[1] != IGNORED).sum()) for sample in order)
    # what a mask of ones would have given: positions that begin again do not keep samples apart
    leaking = {**packed, "attention_mask": torch.ones_like(packed["input_ids"])}
    assert (losses(model, leaking, targets["labels"]) - found).abs().max() > 1e-3
    found.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


def _alone(model: LanguageModel, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    inputs, targets = causal_batch(model.tokenizer, [sample])
    return inputs, targets["labels"]


def test_rows_that_a_model_cannot_keep_apart_are_refused(tmp_path: Path) -> None:
    model = LanguageModel(tiny.folder(tmp_path, "gemma3_text", "Gemma3ForCausalLM"))
    samples = PairEncoder(model.tokenizer).encode(PAIRS)
    inputs, _ = packed_batch(model.tokenizer, [[samples[0], samples[2]]])
    with pytest.raises(ScionError, match="looks back 8 tokens in some layers.*packed rows have at most 8 tokens"):
        model.tokens(inputs)
    with pytest.raises(ScionError, match="has no one feature"):
        model({**inputs, "attention_mask": inputs["attention_mask"][:, :, :8, :8],
               "input_ids": inputs["input_ids"][:, :8], "position_ids": inputs["position_ids"][:, :8]})
