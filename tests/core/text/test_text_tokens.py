"""Tokenizers as data see them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from core import hub
from core.errors import ScionError
from core.hub import Wanted
from core.text.tokens import Tokenizer, load_tokenizer
from tests.core.text import tiny


def source(folder: Path) -> hub.Source:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return hub.find(str(folder), Wanted("a text model"), weights=False)


def test_ids_and_texts() -> None:
    tokens = Tokenizer(tiny.tokenizer(), "tiny")
    cat, dog = tiny.id_of("cat"), tiny.id_of("dog")
    assert tokens.ids(["cat", "dog cat"]) == [[2, cat, 3], [2, dog, cat, 3]]
    assert tokens.ids(["dog cat"], special=False) == [[dog, cat]]
    assert tokens.ids(["dog cat dog"], max_length=4) == [[2, dog, cat, 3]]
    assert tokens.ids(["dog cat dog"]) == [[2, dog, cat, dog, 3]]  # the limit is gone with the call
    pair = tokens.encode(["cat"], ["dog"])[0]
    assert (pair.ids, pair.types, pair.special) == ([2, cat, 3, dog, 3], [0, 0, 0, 1, 1], [1, 0, 1, 0, 1])
    assert tokens.decode([2, cat, dog, 3]) == "cat dog"
    assert tokens.around() == ([2], [3]) and Tokenizer(tiny.tokenizer("plain"), "tiny").around() == ([], [])
    assert (tokens.mask_id, tokens.pad_id, tokens.end_id, tokens.size) == (4, 1, None, tiny.SIZE)
    assert tokens.special_ids == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    tokens = Tokenizer(tiny.tokenizer(), "tiny")
    batch = tokens.pad([[7, 8, 9], [7]], side, labels=[[7, 8, 9], [7]], owners=[[1, 1, 1], [1]])  # type: ignore[arg-type]
    own = slice(2, 3) if side == "left" else slice(0, 1)
    assert batch["attention_mask"].tolist()[0] == [1, 1, 1] and batch["attention_mask"].sum() == 4
    assert batch["attention_mask"][1, own] == 1 and batch["input_ids"][1, own] == 7
    assert sorted(batch["input_ids"][1].tolist()) == [1, 1, 7]
    assert sorted(batch["labels"][1].tolist()) == [-100, -100, 7]
    assert batch["owners"][1].sum() == 1 and all(column.dtype == torch.long for column in batch.values())
    assert tokens.pad([])["input_ids"].shape == (0, 0)


def test_types_only_where_they_are_read() -> None:
    encoder, decoder = Tokenizer(tiny.tokenizer(), "tiny"), Tokenizer(tiny.tokenizer("bos"), "tiny")
    assert encoder.pad_encoded(encoder.encode(["cat"], ["dog"]))["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    assert "token_type_ids" not in decoder.pad_encoded(decoder.encode(["cat"]))


def test_without_a_pad_token_the_end_token_pads_and_it_is_said_once() -> None:
    fast = tiny.tokenizer("bos", extra=("only here",), pad_token=None)
    with pytest.warns(UserWarning, match=r"has no pad token, so batches are padded with its end token '\[EOS\]'"):
        tokens = Tokenizer(fast, "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer(fast, "tiny")
    # the end token that belongs to a text is attended to and learnt, the one in padding is not
    batch = tokens.pad([[7, 8, 6], [6]], labels=[[7, 8, 6], [6]])
    assert batch["input_ids"][1].tolist() == [6, 6, 6] and batch["attention_mask"][1].tolist() == [1, 0, 0]
    assert batch["labels"][1].tolist() == [6, -100, -100]
    with pytest.raises(ScionError, match="neither a pad token nor an end token"):
        Tokenizer(tiny.tokenizer("bos", pad_token=None, eos_token=None), "tiny")


def test_fingerprint_knows_a_tokenizer_wherever_it_is(tmp_path: Path) -> None:
    fast = tiny.tokenizer()
    fast.save_pretrained(tmp_path)
    first = Tokenizer(fast, "tiny").fingerprint
    fast(["cat dog"], truncation=True, max_length=3, padding=True)  # leaves its settings in the library
    assert Tokenizer(fast, "other").fingerprint == first == load_tokenizer(source(tmp_path)).fingerprint
    other = Tokenizer(tiny.tokenizer(extra=("more",)), "tiny").fingerprint
    assert other != first and Tokenizer(tiny.tokenizer("plain"), "tiny").fingerprint not in (first, other)


def test_rows_of_the_embedding() -> None:
    tokens = Tokenizer(tiny.tokenizer(), "tiny")
    assert tokens.check_rows(tiny.SIZE) is None
    assert tokens.check_rows(tiny.SIZE + 35) == f"the tokenizer has {tiny.SIZE} ids, the model's embedding 57 rows"
    with pytest.raises(ScionError, match=f"has {tiny.SIZE} ids and the model's embedding 20 rows"):
        tokens.check_rows(20)


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match=r"no tokenizer files in .* \(tokenizer.json, vocab.json, vocab.txt") as caught:
        load_tokenizer(source(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ScionError, match="its tokenizer cannot be read") as caught:
        load_tokenizer(source(tmp_path))
    assert "\n" not in str(caught.value)
