"""Methods on models of sentence-transformers, which are rows of modules with a transformer in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core import load_adapter
from core.cli.merge import save_library_model
from core.errors import ScionError
from core.peft import LoRA
from tests.core.test_travel import SIZES
from tests.toolkit import randomize, seeded

TEXTS = ["red fish", "blue fish one"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "one", "fish"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny encoder and a tiny classifier of transformers on disk, with a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast  # type: ignore

    folder = tmp_path_factory.mktemp("models")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    found = {}
    for name, cls, labels in (("encoder", BertModel, 2), ("ranker", BertForSequenceClassification, 1)):
        with seeded(0):
            model = cls(BertConfig(**SIZES, num_labels=labels))  # type: ignore[call-arg]
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def _sentence(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def _ranker(folder: Path) -> Any:
    from sentence_transformers import CrossEncoder

    return CrossEncoder(str(folder), device="cpu")


def _answers(model: Any) -> Tensor:
    if hasattr(model, "predict"):
        return torch.as_tensor(model.predict([(text, "one") for text in TEXTS]))
    return torch.as_tensor(model.encode(TEXTS))


@pytest.mark.parametrize(("name", "make"), [("encoder", _sentence), ("ranker", _ranker)])
def test_there_and_back(name: str, make: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """On its transformer, saved, loaded; saving the whole warns in one line; merged it is written whole."""
    model = make(folders[name])
    before = _answers(model)
    method = LoRA(rank=2).attach(model)
    assert method.root is model[0].auto_model and method.attach(model) is method
    randomize(method, size=0.5)
    expected = _answers(model)
    assert not torch.equal(expected, before)
    method.save(tmp_path / "adapter")
    again = make(folders[name])
    load_adapter(tmp_path / "adapter", again)
    assert torch.equal(_answers(again), expected)
    for save in (model.save_pretrained, model.save):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            save(str(tmp_path / "whole"))
        ours = [str(one.message) for one in told if "methods attached" in str(one.message)]
        assert len(ours) == 1 and "call method.merge() before" in ours[0] and "\n" not in ours[0]
    method.merge()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        save_library_model(model, tmp_path / "plain")
    assert not [one for one in told if "methods attached" in str(one.message)]
    torch.testing.assert_close(_answers(make(tmp_path / "plain")), expected, rtol=1e-4, atol=1e-5)


def test_trained_under_a_ranker(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its encoder's adapter goes into the bare encoder; the ranker's own head does not, and that is told."""
    ranker = _ranker(folders["ranker"])
    method = LoRA(rank=2).attach(ranker)
    method.save(tmp_path)
    sentence = _sentence(folders["encoder"])
    sentence[0].auto_model.load_state_dict(method.root.bert.state_dict(), strict=False)  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="left out, because BertModel has no such tensors"):
        load_adapter(tmp_path, sentence)


def test_no_transformer() -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    with pytest.raises(ScionError, match=r"holds no transformer \(its modules are Normalize\)"):
        LoRA().attach(SentenceTransformer(modules=[Normalize()], device="cpu"))
