"""Adapters of text backbones: they know the tokenizer that they were trained with."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from core import load_adapter
from core.adapters.load import read_adapter, restore
from core.adapters.swap import swap
from core.errors import ScionError
from core.peft import LoRA
from core.text.backbones import LanguageModel, TextEncoder
from tests.core.text import tiny


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """One model with two tokenizers: the second knows one word more."""
    first = tiny.folder(tmp_path / "first", "bert", "BertForMaskedLM")
    shutil.copytree(first, tmp_path / "second")
    tiny.tokenizer(extra=("more",)).save_pretrained(tmp_path / "second")
    return first, str(tmp_path / "second")


def test_an_adapter_belongs_to_a_tokenizer(folders: tuple[str, str], tmp_path: Path) -> None:
    here, there = (TextEncoder(folder) for folder in folders)
    method = LoRA(rank=2).attach(here)
    adapter = method.save(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert record["tokenizer"] == here.tokenizer_fingerprint != there.tokenizer_fingerprint
    with pytest.raises(ScionError) as caught:
        load_adapter(adapter, there)
    expected = (f"{adapter}: the adapter was trained with another tokenizer (fingerprint {here.tokenizer_fingerprint}, "
                f"here {there.tokenizer_fingerprint}), whose ids mean other texts")
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert not hasattr(there, "peft")
    with pytest.warns(UserWarning, match="carried from the tokenizer"):
        load_adapter(adapter, there, base="any")


def test_under_a_head_with_the_same_tokenizer_it_goes_on(folders: tuple[str, str], tmp_path: Path) -> None:
    bare, headed = TextEncoder(folders[0]), TextEncoder(folders[0], head=True)
    adapter = LoRA(rank=2).attach(headed).save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_adapter(adapter, bare).name == "LoRA"
    with pytest.raises(ScionError, match="trained with another tokenizer"):
        load_adapter(adapter, TextEncoder(folders[1], head=True))


def test_where_no_tokenizer_is_known_nothing_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    from transformers import BertModel

    plain = BertModel.from_pretrained(folders[1], add_pooling_layer=False)
    of_text = LoRA(rank=2).attach(TextEncoder(folders[0])).save(tmp_path / "text")
    method = load_adapter(of_text, plain)  # a plain model does not say which tokenizer it has
    of_plain = method.save(tmp_path / "plain")
    assert "tokenizer" not in json.loads((of_plain / "adapter.json").read_text())
    load_adapter(of_plain, TextEncoder(folders[1]))
    record, tensors = read_adapter(of_text)
    del record["tokenizer"]  # as in files of earlier versions
    restore(record, tensors, TextEncoder(folders[1]))


def test_a_swap_asks_for_the_tokenizer(folders: tuple[str, str], tmp_path: Path) -> None:
    here, there = (TextEncoder(folder) for folder in folders)
    adapter = LoRA(rank=2).attach(here).save(tmp_path / "adapter")
    method = LoRA(rank=2).attach(there)
    before = {name: tensor.clone() for name, tensor in method.tensors().items()}
    with pytest.raises(ScionError, match="trained with another tokenizer"):
        swap(method, adapter)
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.tensors().items())


def test_language_models_too(tmp_path: Path) -> None:
    first = tiny.folder(tmp_path / "first", "gpt2", "GPT2LMHeadModel")
    shutil.copytree(first, tmp_path / "second")
    tiny.tokenizer("plain").save_pretrained(tmp_path / "second")
    adapter = LoRA(rank=2).attach(LanguageModel(first)).save(tmp_path / "adapter")
    with pytest.raises(ScionError, match="trained with another tokenizer"):
        load_adapter(adapter, LanguageModel(str(tmp_path / "second")))
    load_adapter(adapter, LanguageModel(first))
