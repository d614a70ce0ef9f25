"""Texts of tiny models of several families, with methods: the same whatever the batch, with and without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from core import FineTuner, peft
from core.compose import Route, Split
from core.errors import ScionError
from core.report.token_cost import token_cost
from core.tasks import LanguageModelling
from core.text.backbones import LanguageModel, TextEncoder
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from core.text.prompts import Prompt
from tests.core.text import tiny
from tests.core.text.test_language_tasks import INFO, METHODS, MODELS, REFUSED
from tests.core.text.writers import FAMILIES, NEW, PROMPTS, language_model, texts_of
from tests.toolkit import randomize


def plainly(model: LanguageModel, prompt: str) -> list[int]:
    """The greedy tokens for one prompt, by calling the model on the whole text at each step."""
    inner: Any = model.model
    begin, behind = model.tokenizer.around()
    ids = begin + model.tokenizer.ids([prompt], special=False)[0] + (behind if model.is_encoder_decoder else [])
    written: list[int] = []
    while len(written) < NEW:
        if model.is_encoder_decoder:
            start = torch.tensor([[5, *written]])
            logits = inner(input_ids=torch.tensor([ids]), decoder_input_ids=start, use_cache=False).logits
        else:
            logits = inner(input_ids=torch.tensor([ids + written]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tiny.id_of("[EOS]"):
            break
        written.append(token)
    return written


# ------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_greedy_texts_do_not_depend_on_batch_and_cache(kind: str) -> None:
    model = language_model(kind)
    together = texts_of(model)
    assert [list(tokens) for _, _, tokens, _, _ in together] == [plainly(model, prompt) for prompt in PROMPTS]
    assert len({tokens for _, _, tokens, _, _ in together}) > 3
    assert texts_of(model, cache=False, batch_size=3) == together


@pytest.mark.parametrize("kind", MODELS)
def test_methods_write_alike_in_every_batch(kind: str) -> None:
    model = language_model(kind)
    plain = texts_of(model)
    for method, arguments in METHODS.items():
        if (method, kind) in REFUSED:
            continue
        attached = peft.make(method, arguments).attach(model)
        randomize(attached, size=0.5)
        together = texts_of(model)
        assert texts_of(model, cache=False, batch_size=1) == together, method
        assert together != plain, method
        with attached.disabled():
            assert texts_of(model, PROMPTS[:3]) == plain[:3]
        attached.remove()
    assert texts_of(model) == plain


def test_a_side_network_beside_a_model_with_windows() -> None:
    """Whose own cache forgets what its windows do not see, and has no room for further layers."""
    model = language_model("gemma3_text")
    randomize(peft.make("LadderSideTuning", {"reduction": 2}).attach(model), size=0.5)
    prompts = [*PROMPTS, " ".join(PROMPTS)]
    together = texts_of(model, prompts)
    assert texts_of(model, prompts, cache=False, batch_size=1) == together
    assert texts_of(model, prompts, beams=2) == texts_of(model, prompts, beams=2, cache=False, batch_size=1)
    cost = token_cost(model, 10)
    assert cost is not None and cost.growth_bytes == 2 * 2 * 2 * 4 * 8 * 3 // 2


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_merged_and_unmerged(kind: str) -> None:
    model = language_model(kind)
    method = peft.make("LoRA", {"rank": 2}).attach(model)
    randomize(method, size=0.5)
    unmerged = texts_of(model)
    method.merge()
    assert texts_of(model) == unmerged
    method.unmerge()
    assert texts_of(model, batch_size=1) == unmerged


def test_a_tuner_and_its_mode() -> None:
    model = language_model("llama")
    tuner = FineTuner(model, LanguageModelling(), INFO).train()
    own: Any = model.model
    own.generation_config.repetition_penalty = 9.0
    own.generation_config.max_length = 3
    before = own.generation_config
    modes = [module.training for module in tuner.modules()]
    assert texts_of(tuner) == texts_of(language_model("llama"))
    assert [module.training for module in tuner.modules()] == modes and any(modes)
    assert own.generation_config is before


# ------------------------------------------------------------------------------------------------- routes and splits


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("how", [{}, {"beams": 2}, {"temperature": 1.0, "samples": 2}])
def test_routed_rows(kind: str, how: dict[str, Any]) -> None:
    model = language_model(kind)
    variants = [peft.make("LoRA", {"rank": 2, "name": "one"}), peft.make("PromptTuning", {"tokens": 2, "name": "two"}),
                peft.make("PromptTuning", {"tokens": 2, "name": "three"})]
    lora = Route([variants[0], peft.make("LoRA", {"rank": 2, "name": "other"})], name="lora").attach(model)
    prompts = Route(variants[1:], name="prompts").attach(model)
    for method in (lora, prompts):
        randomize(method, size=0.5)
    rows = [0, 1, 1, 0, 0, 1, 0, 1]
    by_row = []
    for first, second in (("one", "two"), ("other", "three")):
        with lora.route(first), prompts.route(second):
            by_row.append(texts_of(model, **how))
    apart = [pair[rows[int(pair[0][0])]] for pair in zip(*by_row, strict=True)]
    assert by_row[0] != by_row[1]
    with lora.route(rows), prompts.route(rows):
        assert texts_of(model, **how) == apart
        assert texts_of(model, **how, batch_size=3, cache=False) == apart
        assert [graft.route.tolist() for graft in lora.grafts if graft.route is not None][0] == rows
        with pytest.raises(ScionError, match="8 samples are routed or split, and there are 2 prompts"):
            texts_of(model, PROMPTS[:2])
    assert all(graft.route is None for graft in lora.grafts)


def test_what_looks_at_whole_sequences_is_written_without_cache_and_padding() -> None:
    model = language_model("gpt2")
    method = peft.make("ConformerAdapter", {"bottleneck": 3, "kernel": 3}).attach(model)
    randomize(method, size=0.5)
    with pytest.warns(UserWarning, match="ConformerGraft look at whole sequences.*without one"):
        together = texts_of(model)
    assert [list(one[2]) for one in together] == [plainly(model, prompt) for prompt in PROMPTS]
    method.remove()
    methods = [peft.make("LoRA", {"rank": 2, "targets": ["mlp.up"], "name": name}) for name in ("query", "document")]
    split = Split(methods, by="separator", separator=tiny.id_of(":")).attach(model)
    randomize(split, size=0.5)
    with pytest.warns(UserWarning, match="SplitGraft"):
        together = texts_of(model)
    assert [list(one[2]) for one in together] == [plainly(model, prompt) for prompt in PROMPTS]
    with split.at(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7])), pytest.warns(UserWarning, match="SplitGraft"):
        together = texts_of(model)
    for number, prompt in enumerate(PROMPTS):
        with split.at(number):
            assert list(together[number][2]) == plainly(model, prompt)


# ------------------------------------------------------------------------------------------------- samples and beams


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_samples_do_not_depend_on_the_batch(kind: str) -> None:
    model = language_model(kind)
    drawn = {"temperature": 1.0, "top_p": 0.9, "top_k": 12, "samples": 3, "seed": 5}
    together = texts_of(model, **drawn)
    assert [(one[0], one[1]) for one in together] == [(str(n), s) for n in range(len(PROMPTS)) for s in range(3)]
    assert texts_of(model, **drawn, batch_size=1) == together
    assert texts_of(model, PROMPTS[:4], **drawn) == together[:12]  # nor on what comes behind
    assert texts_of(model, **{**drawn, "samples": 1}) == [one for one in together if one[1] == 0]
    assert texts_of(model, **{**drawn, "seed": 6}) != together
    assert len({one[2] for one in together}) > 12
    likeliest = texts_of(model, PROMPTS[:3], **{**drawn, "top_k": 1})
    assert likeliest == [(one[0], sample, *one[2:]) for one in texts_of(model, PROMPTS[:3]) for sample in range(3)]


def test_tokens_are_drawn_by_their_probability() -> None:
    """Of 4,000 first tokens the shares of the four likeliest are those of the model at this temperature, within four
    standard deviations; none is drawn beyond the likeliest four."""
    model = language_model("llama")
    ids = torch.tensor([model.tokenizer.around()[0] + model.tokenizer.ids(["the cat"], special=False)[0]])
    with torch.no_grad():
        scores = model.model(input_ids=ids).logits[0, -1] / 1.5  # type: ignore[operator]
    likeliest = scores.topk(4)
    shares = likeliest.values.softmax(-1)
    found = generate(model, ["the cat"], GenerateSettings(1, temperature=1.5, top_k=4, samples=4000, batch_size=500))
    first = [one.tokens[0] if one.tokens else tiny.id_of("[EOS]") for one in found]
    for token, share in zip(likeliest.indices.tolist(), shares.tolist(), strict=True):
        deviation = (share * (1 - share) / len(first)) ** 0.5
        assert abs(first.count(token) / len(first) - share) < 4 * deviation
    assert set(first) <= set(likeliest.indices.tolist())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beams_do_not_depend_on_the_batch(kind: str) -> None:
    model = language_model(kind)
    together = texts_of(model, beams=3)
    assert texts_of(model, beams=3, batch_size=1, cache=False) == together
    assert together != texts_of(model)
    inner: Any = model.model
    for number in (0, 2):
        begin, behind = model.tokenizer.around()
        ids = begin + model.tokenizer.ids([PROMPTS[number]], special=False)[0]
        whole = torch.tensor([ids + (behind if model.is_encoder_decoder else [])])
        theirs = inner.generate(input_ids=whole, attention_mask=torch.ones_like(whole), num_beams=3, do_sample=False,
                                max_new_tokens=NEW)[0]
        start = 1 if model.is_encoder_decoder else whole.shape[1]
        written = [token for token in theirs[start:].tolist() if token not in (1, 6)]
        assert [token for token in together[number][2] if token != 1] == written
    stopped = texts_of(model, beams=3, stop="cat", max_new_tokens=12)
    assert texts_of(model, beams=3, stop="cat", max_new_tokens=12, batch_size=1) == stopped
    assert all("cat" not in text for *_, text, _ in stopped)


# ------------------------------------------------------------------------------------------------- what is refused


def test_prompts_that_do_not_fit() -> None:
    model = language_model("gpt2")
    model.max_length = 12
    long = " ".join(["cat"] * 11)
    with pytest.raises(ScionError, match="prompt b: 12 tokens, and the model's context has 12, which leaves no room"):
        texts_of(model, ["a", Prompt(long, "b")])
    with pytest.raises(ScionError, match="two prompts have the id 'b'"):
        texts_of(model, [Prompt("a", "b"), Prompt("cat", "b")])
    for prompts, words in (([], "no prompts"), (["a", ""], "prompt 1: empty"), (["  "], "no token of the tokenizer")):
        with pytest.raises(ScionError, match=words):
            texts_of(model, prompts)
    # One that is nearly as long as the context gets what room there is, and the others all that was asked for.
    found = texts_of(model, ["a", " ".join(["cat"] * 8), "dog", " ".join(["dog"] * 8)])
    lengths = [len(one[2]) for one in found]
    assert lengths[1] <= 3 and lengths[3] <= 3 and max(lengths) > 3
    assert found == texts_of(model, ["a", " ".join(["cat"] * 8), "dog", " ".join(["dog"] * 8)], batch_size=1)
    peft.make("PromptTuning", {"tokens": 4}).attach(model)
    with pytest.raises(ScionError, match="prompt 1: 9 tokens and 4 of the methods, and the model's context has 12"):
        texts_of(model, ["a", " ".join(["cat"] * 8)])
    t5 = language_model("t5")
    t5.max_length = 4
    with pytest.raises(ScionError, match="prompt 1: 9 tokens, and the model's context has 4; shorten it"):
        texts_of(t5, ["a", " ".join(["cat"] * 8)])


def test_backbones_and_scores_that_will_not_do(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path, "bert", "BertModel"))
    with pytest.raises(ScionError, match="TextEncoder writes no texts; generation needs a LanguageModel"):
        generate(encoder, ["a"])
    model = language_model("llama")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[tiny.id_of("dog")] = float("nan")  # type: ignore[operator, index]
    for how in ({}, {"beams": 2}, {"temperature": 1.0}):
        with pytest.raises(ScionError, match="^prompt [12457]: the model's scores of the next token are not finite"):
            texts_of(model, **how)


@pytest.mark.parametrize(("settings", "words"), [
    ({"max_new_tokens": 0}, "max_new_tokens: 0 is no whole number from 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5 is no whole number"),
    ({"temperature": -1.0}, "temperature: -1.0 is no number from 0"),
    ({"temperature": float("nan")}, "temperature: nan is no number"),
    ({"temperature": 1.0, "top_p": 0.0}, "top_p: 0.0 is no share above 0"),
    ({"temperature": 1.0, "top_k": -1}, "top_k: -1 is no whole number from 0"),
    ({"samples": 2}, "samples: 2 needs a temperature above 0"), ({"top_p": 0.5}, "top_p: 0.5 needs a temperature"),
    ({"beams": 2, "temperature": 1.0}, "beams: 2 beams are searched and not drawn"),
    ({"stop": [3]}, "stop: 3 is neither a string nor a StopRule"), ({"stop": ""}, "an empty string stands everywhere"),
    ({"stop": 3}, "stop: 3 is neither"), ({"batch_size": True}, "batch_size: True"),
    ({"cache": 1}, "cache: 1 is neither"), ({"batch_tokens": 0}, "batch_tokens: 0 is no whole number from 1"),
    ({"seed": -1}, "seed: -1 is no whole number")])
def test_settings_that_mean_nothing(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ScionError, match=words):
        GenerateSettings(**settings)


def test_batches_by_tokens() -> None:
    from core.text.prompts import batches, encode_prompts

    model = language_model("llama")
    settings = GenerateSettings(max_new_tokens=4, batch_tokens=24)
    encoded = encode_prompts(model, PROMPTS, settings)
    [window] = batches(encoded, settings)
    assert sorted(row.number for batch in window for row in batch) == list(range(8))
    for batch in window:
        longest = max(len(encoded[row.number].ids) for row in batch)
        assert len(batch) == 1 or len(batch) * (longest + 4) <= 24
    assert len(window) == 4
    assert texts_of(model, batch_tokens=24) == texts_of(model)
