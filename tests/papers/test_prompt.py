"""Checks of PromptTuning: the library itself, called with the longer sequence of embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make, spread
from tests.papers.decoding import LANGUAGE_MODELS, a_cache_changes_nothing, later_tokens_are_not_seen
from tests.papers.explicit import insert
from tests.rows import NO_ATTENTION, NO_PLACE_FOR_TOKENS, Row, Variant, prompts_count
from tests.toolkit import distance, outputs, randomize

ROWS = {
    "PromptTuning": Row(
        {"vocabulary": Variant({"tokens": 4}, learns={"tokens": 20}),
         "normal": Variant({"tokens": 2, "init": "normal"}, learns={"tokens": 20})},
        trained=prompts_count,
        cards=(("vit_b16", {}, 15_360), ("bert_base", {}, 15_360)),
        bad=(({"tokens": 0}, "tokens 0"), ({"init": "zero"}, "'zero'"), ({"layers": (0,)}, "layers")),
        random=True, commutes=None, operators=12, saved=1.2,
        absent=("test_irregular_mix", "test_no_graph_below_the_first_graft"),  # its grafts act together; no layers
        artifact={"tokens": 1},
        refused={**NO_ATTENTION, **NO_PLACE_FOR_TOKENS},
    ),
}

PromptTuning: Any = method_class("PromptTuning")
TEXT = ("bert", "roberta", "albert", "gpt2", "gpt_neox", "codegen", "llama", "gemma", "t5")


def _ones(mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([torch.ones(len(mask), tokens, dtype=mask.dtype), mask], 1)


def library(model: Any, prompt: Tensor, ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """The frozen model on [P; E(ids)], its final state without the first of them (of T5 the decoder's, whole)."""
    embedded = torch.cat([prompt.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
    if attention_mask is not None:
        options["attention_mask"] = _ones(attention_mask, len(prompt))
    with torch.no_grad():
        state = model(inputs_embeds=embedded, **options).last_hidden_state
    return state if "decoder_input_ids" in options else state[:, len(prompt):]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", TEXT)
def test_1_the_model_reads_the_longer_sequence(family: str, masked: bool) -> None:
    """[P; E(x)], mask and positions longer by P, labels where they were."""
    model: Any = make(family).model
    ids = batch("bert")
    options: dict[str, Any] = {"decoder_input_ids": ids.flip(1)} if family == "t5" else {}
    if masked:
        options["attention_mask"] = (ids != 0).long()
    frozen = model(ids, **options).last_hidden_state.detach()
    method = PromptTuning(tokens=3).attach(model)
    randomize(method, size=0.5)
    prompt, = (t.detach() for t in method.trainable().values())
    with torch.no_grad():
        found = model(ids, **options).last_hidden_state
    expected = library(make(family).model, prompt, ids, **options)
    assert found.shape == frozen.shape == expected.shape
    assert distance(expected, frozen) > 1e-2 and distance(found, expected) < 1e-6


def test_1_positions_that_are_given_move_on() -> None:
    """Padding on the left, with the positions that a caller counts from the mask."""
    for family in ("gpt2", "llama"):
        model: Any = make(family).model
        method = PromptTuning(tokens=3).attach(model)
        prompt, = (t.detach() for t in method.trainable().values())
        ids = batch(family)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
            alone = model(ids[1:2, 4:]).last_hidden_state
        longer = torch.cat([torch.arange(3).expand(3, -1), positions + 3], 1)
        expected = library(make(family).model, prompt, ids, mask, position_ids=longer)
        assert distance(found, expected) < 1e-6 and distance(found[1:2, 4:], alone) < 1e-5


def test_1_types_and_embeddings_that_are_given() -> None:
    model: Any = make("bert").model
    method = PromptTuning(tokens=3).attach(model)
    prompt, = (t.detach() for t in method.trainable().values())
    ids = batch("bert")
    types = (torch.arange(12) > 6).long().expand(3, -1)
    with torch.no_grad():
        found = model(ids, token_type_ids=types).last_hidden_state
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids), token_type_ids=types).last_hidden_state
    expected = library(make("bert").model, prompt, ids, token_type_ids=torch.cat([torch.zeros(3, 3).long(), types], 1))
    assert distance(found, expected) < 1e-6 and torch.equal(found, embedded)
    assert distance(found, library(make("bert").model, prompt, ids)) > 1e-3


def test_2_the_pooled_token_is_cls() -> None:
    """The pooler of BERT sees [CLS], not the first prompt."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with torch.random.fork_rng(devices=[]):
        model, plain = (spread(BertModel(config)).eval() for _ in range(2))
    method = PromptTuning(tokens=3).attach(model)
    prompt, = (t.detach() for t in method.trainable().values())
    ids = batch("bert")
    with torch.no_grad():
        out: Any = model(ids)
        state = library(plain, prompt, ids)
        expected = plain.pooler(state)  # type: ignore[operator]
    assert distance(out.last_hidden_state, state) < 1e-6 and distance(out.pooler_output, expected) < 1e-6


def test_2_labels_stay_where_they_are() -> None:
    """The loss of a language model is over the logits of the input's own tokens."""
    from tests.models import tied_llama

    model, plain = tied_llama(), tied_llama()
    method = PromptTuning(tokens=3).attach(model)
    prompt, = (t.detach() for t in method.trainable().values())
    ids = batch("llama")
    with torch.no_grad():
        found = model(ids, labels=ids)
        logits = plain.lm_head(library(plain.model, prompt, ids))
    assert distance(found.logits, logits) < 1e-6
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(found.loss) - float(loss)) < 1e-5


def test_2_an_encoder_alone() -> None:
    """T5's encoder without a decoder gives a state of the input's length."""
    from transformers import T5EncoderModel

    from tests.models import t5_config

    with torch.random.fork_rng(devices=[]):
        model, plain = (spread(T5EncoderModel(t5_config(is_encoder_decoder=False))).eval() for _ in range(2))
    method = PromptTuning(tokens=3).attach(model)
    prompt, = (t.detach() for t in method.trainable().values())
    ids = batch("t5")
    with torch.no_grad():
        found: Any = model(ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert distance(found, library(plain, prompt, ids, (ids != 0).long())) < 1e-6


@pytest.mark.parametrize("family", ["timm_vit", "ast"])
def test_3_images(family: str) -> None:
    """Behind the special tokens, as VPT's at the input."""
    model, plain, inputs = make(family), make(family), batch(family)
    method = PromptTuning(tokens=3).attach(model)
    randomize(method, size=0.5)
    insert(plain, [t.detach() for t in method.trainable().values()], 1 if family == "timm_vit" else 2)
    assert distance(outputs(model, inputs), outputs(plain, inputs)) < 1e-5


def test_4_start() -> None:
    """Rows of the vocabulary, or a normal of 0.02."""
    model = make("bert")
    table: Tensor = model.model.get_input_embeddings().weight  # type: ignore[operator]
    prompt, = PromptTuning(tokens=8).attach(model).trainable().values()
    assert all((row == table).all(1).any() for row in prompt)
    normal, = PromptTuning(tokens=400, init="normal").attach(make("bert")).trainable().values()
    assert abs(float(normal.detach().std()) - 0.02) < 1e-3


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3", "xglm"])
def test_4_start_where_embeddings_are_scaled(family: str) -> None:
    """At what the embedding gives for ids, not at the rows of its table."""
    model = make(family)
    method = PromptTuning(tokens=5).attach(model)
    inner: Any = model.model
    embedding = inner.get_input_embeddings()
    given = embedding(torch.arange(len(embedding.weight)))
    [prompt] = method.trainable().values()
    assert all(any(torch.equal(row, value) for value in given) for row in prompt)
    assert not any(torch.equal(row, value) for row in prompt for value in embedding.weight)



@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_5_generation(name: str) -> None:
    a_cache_changes_nothing(name, PromptTuning(tokens=3))


@pytest.mark.parametrize("family", ["llama", "clip_text"])
def test_6_causal(family: str) -> None:
    later_tokens_are_not_seen(family, PromptTuning(tokens=3))


def test_refusals() -> None:
    model: Any = make("llama").model
    PromptTuning(tokens=3).attach(model)
    ids = batch("llama")
    with pytest.raises(ScionError, match="padding mask"):
        model(ids, attention_mask=torch.ones(3, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(ScionError, match="map"):
        PromptTuning().attach(make("timm_swin"))
