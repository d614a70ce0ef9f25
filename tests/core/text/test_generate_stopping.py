"""When texts stop: special tokens, stop strings and rules, and characters that take several tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.errors import ScionError
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from core.text.stopping import StopRule, StopStrings, Writing
from core.text.tokens import Tokenizer
from tests.core.text import tiny
from tests.core.text.writers import PROMPTS, language_model, texts_of


class Words(StopRule):
    """Stops after so many words, and keeps all but the last."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0

    def stops(self, text: str, piece: str) -> bool:
        assert text.endswith(piece)
        self.seen += 1
        return self.seen == self.most

    def kept(self, text: str) -> int:
        return text.rindex(" ")


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as byte-level tokenizers have them, and two special ones behind them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"), "bytes")


def written(text: str, rules: list[StopRule], cut: int = 0) -> Writing:
    tokenizer = byte_tokenizer()
    writing = Writing(tokenizer, frozenset([tokenizer.end_id or 0]), rules)
    ids = tokenizer.ids([text])[0]
    for token in ids[:len(ids) - cut]:
        writing.add(token)
    return writing


def test_characters_of_several_tokens() -> None:
    """Text comes when a character is whole; half of one at the end is left out; the tokens are all there."""
    pieces: list[str] = []

    class Listening(StopRule):
        def stops(self, text: str, piece: str) -> bool:
            pieces.append(piece)
            return False

    text = "a ü\n  🙂🙂 end"
    assert written(text, []).text == text
    half = written("ab🙂", [], cut=1)
    assert (half.text, len(half.tokens), half.why, half.is_done) == ("ab", 5, "length", False)
    listening = Writing(byte_tokenizer(), frozenset(), [rule := Listening()])
    for token in byte_tokenizer().ids(["xü🙂"])[0]:
        listening.add(token)
    assert pieces == ["x", "ü", "🙂"] and listening.rules[0] is not rule


@pytest.mark.parametrize(("stops", "text", "expected"), [
    (["END"], "one END two", "one "), (["END", "o"], "one END", ""), (["🙂"], "hi 🙂 there", "hi "),
    (["xyz"], "xyxyz.", "xy"), (["\n\n"], "a\nb\n\nc", "a\nb"), (["bb", "b"], "abb", "a")])
def test_stop_strings(stops: list[str], text: str, expected: str) -> None:
    found = written(text, [StopStrings(stops)])
    assert (found.text, found.why, found.is_done) == (expected, "stop", True)
    before = len(found.tokens)
    found.add(3)
    assert len(found.tokens) == before  # nothing comes behind the end


def test_special_tokens_end_a_text_and_are_not_in_it() -> None:
    tokenizer = byte_tokenizer()
    end, pad = tokenizer.fast.eos_token_id, tokenizer.fast.pad_token_id
    writing = Writing(tokenizer, frozenset([end]), [])
    for token in [*tokenizer.ids(["ab"])[0], pad, *tokenizer.ids(["c"])[0], end, *tokenizer.ids(["d"])[0]]:
        writing.add(token)
    assert (writing.text, writing.why) == ("abc", "end") and len(writing.tokens) == 4


def test_a_copy_goes_its_own_way() -> None:
    tokenizer = byte_tokenizer()
    one = Writing(tokenizer, frozenset(), [Words(3)])
    for token in tokenizer.ids(["a b"])[0][:2]:
        one.add(token)
    other = one.copy()
    for writing, letters in ((one, "x"), (other, "y")):
        writing.add(tokenizer.ids([letters])[0][0])
    assert (one.text, other.text) == ("a", "a") and one.tokens != other.tokens
    assert one.is_done and other.is_done and other.rules[0] is not one.rules[0]


def test_a_rule_that_keeps_too_much() -> None:
    class Wrong(StopRule):
        def stops(self, text: str, piece: str) -> bool:
            return True

        def kept(self, text: str) -> int:
            return 7

    with pytest.raises(ScionError, match="Wrong.kept: 7 of 1 characters"):
        written("abc", [Wrong()])


# ------------------------------------------------------------------------------------------------- in generation


def halving(texts: list[str]) -> list[str]:
    """Two stop strings that some of the texts have, and others not."""
    words = sorted({word for text in texts for word in text.split()})
    shares = {word: sum(word in text for text in texts) / len(texts) for word in words}
    found = sorted(words, key=lambda word: abs(shares[word] - 0.4))
    assert 0 < shares[found[0]] < 1
    return [found[0], f"{found[0]} {found[0]}"]


@pytest.mark.parametrize("how", [{}, {"beams": 2}, {"temperature": 1.0, "samples": 2}])
def test_generation_stops(how: dict[str, Any]) -> None:
    """Every text is the unstopped one up to the stop, for strings and rules, in every batch."""
    model = language_model("t5" if how else "llama")
    long = texts_of(model, **how, max_new_tokens=12)
    stops = halving([text for *_, text, _ in long])
    stopped = texts_of(model, **how, max_new_tokens=12, stop=stops)
    assert texts_of(model, **how, max_new_tokens=12, stop=stops, batch_size=1) == stopped
    for (*_, text, why), (*_, shorter, because) in zip(long, stopped, strict=True):
        assert not any(stop in shorter for stop in stops)
        if "beams" in how:  # which find another text where they stop elsewhere
            continue
        places = [text.find(stop) for stop in stops if stop in text]
        assert shorter == text[:min(places, default=len(text))]
        assert because == ("stop" if places else why)
    if "beams" in how:
        return
    ruled = texts_of(model, **how, max_new_tokens=12, stop=Words(4))
    assert texts_of(model, **how, max_new_tokens=12, stop=Words(4), batch_size=3) == ruled
    for (*_, text, why), (*_, shorter, because) in zip(long, ruled, strict=True):
        words = text.split(" ")
        assert shorter == (" ".join(words[:3]) if len(words) >= 4 else text)
        assert because == ("stop" if len(words) >= 4 else why)


def test_end_tokens_of_the_model_and_of_the_tokenizer() -> None:
    model = language_model("llama")
    inner: Any = model.model
    varied: dict[str, Any] = {"max_new_tokens": 12, "temperature": 4.0}
    inner.generation_config.eos_token_id = 6
    plain = texts_of(model, **varied)
    words = [token for _, _, tokens, _, _ in plain for token in tokens if token >= len(tiny.SPECIAL)]
    often, common = sorted(set(words), key=words.count)[-2:]

    def check(found: list[tuple[Any, ...]], ends: set[int]) -> None:
        assert any(ends & set(tokens) for _, _, tokens, _, _ in plain)
        for (_, _, tokens, _, why), (_, _, shorter, _, because) in zip(plain, found, strict=True):
            place = min([tokens.index(end) for end in ends if end in tokens], default=len(tokens))
            assert (shorter, because) == (tokens[:place], "end" if ends & set(tokens) else why)

    inner.generation_config.eos_token_id = [6, common]
    check(texts_of(model, **varied), {common})
    inner.generation_config.eos_token_id = often
    check(texts_of(model, **varied), {often})
    inner.generation_config.eos_token_id = None
    assert texts_of(model, **varied) == plain
    inner.generation_config.eos_token_id = 6
    model.tokenizer.fast.eos_token = tiny.WORDS[common - len(tiny.SPECIAL)]
    check(texts_of(model, **varied), {common})
    # A special token among the stop strings is never in a text, and ends it all the same.
    assert any(0 in tokens for _, _, tokens, _, _ in plain) and not any("[UNK]" in text for *_, text, _ in plain)
    check(texts_of(model, **varied, stop="[UNK]"), {common, 0})


def test_what_is_given_back() -> None:
    found = generate(language_model("gpt2"), PROMPTS[:2], GenerateSettings(4))
    assert [one.id for one in found] == ["0", "1"] and len({one.prompt for one in found}) == 2
    tokenizer = language_model("gpt2").tokenizer
    assert [one.text for one in found] == [tokenizer.decode(one.tokens) for one in found]
