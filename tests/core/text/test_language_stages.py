"""A language module under a masked language model, then a task on the same encoder: as stages, and as an entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from core import load_method
from core.adapters.load import load_adapter
from core.config import points
from core.files import read_json
from core.peft import LTSFT, LanguageAdapter  # type: ignore[attr-defined]
from core.text.backbones import TextEncoder
from core.training.run import execute
from tests.core.text import tiny
from tests.core.tiny_run import forget_domain, put_domain

DOMAIN = '''
from core.text.backbones import TextEncoder
from core.text.datamodule import TextDataModule
from core.text.masked import MaskedTexts, masked_batch

__all__ = ["Encoder", "Lines", "Pets"]
WORDS = "one two three four five runs sleeps the what is".split()
TEXTS = [" ".join(WORDS[(number + step) % 10] for step in range(3 + number % 5)) for number in range(32)]


class Encoder(TextEncoder):
    """Any encoder in a folder."""


class Lines(TextDataModule):
    """Texts without labels."""

    def load(self):
        self.origin = {"source": "mini", "name": "lines"}
        ids = [encoded.ids for encoded in self.tokenizer.encode(TEXTS)]
        self.train_set = MaskedTexts(ids[:24], self.tokenizer)
        self.validation_set = self.test_set = MaskedTexts(ids[24:], self.tokenizer, redrawn=False)

    def collate(self, train):
        return lambda samples: masked_batch(self.tokenizer, samples)


class Pets(TextDataModule):
    def load(self):
        self.classes, self.origin = ["cat", "dog"], {"source": "mini", "name": "pets"}
        texts = [self.classes[number % 2] + " " + text for number, text in enumerate(TEXTS)]
        targets = [number % 2 for number in range(32)]
        self.train_set = self.text_set(texts[:24], targets[:24], "training texts")
        self.validation_set = self.test_set = self.text_set(texts[24:], targets[24:])

    def peek(self):
        return ["cat", "dog"]
'''
CONFIG = """
domain: tongues
model: {{backbone: {{class: Encoder, name: {folder}}}}}
data: {{class: Pets, batch_size: 8, max_length: 12, cache: {cache}}}
peft: {{class: Pfeiffer, bottleneck: 2}}
optimizer: {{lr: 4.0e-3}}
trainer: {{max_epochs: 1, enable_progress_bar: false, accelerator: cpu}}
loggers: []
"""
LANGUAGE = ("{model: {backbone: {class: Encoder, name: FOLDER, head: true}, task: MaskedLM}, "
            "data: {class: Lines, batch_size: 8}, peft: {class: LanguageAdapter, bottleneck: 2, name: sw}}")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    put_domain(monkeypatch, tmp_path / "path", "tongues", DOMAIN)
    folder = tiny.folder(tmp_path / "model", "bert", "BertForMaskedLM")
    file = tmp_path / "tongues.yaml"
    file.write_text(CONFIG.format(folder=folder, cache=tmp_path / "cache"))
    monkeypatch.setattr("core.report.plots.save_figure", lambda *figure_and_path, **options: None)
    yield file
    forget_domain("tongues")


def _of_language(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / "adapter" / "adapter.safetensors")
    return {name: tensor for name, tensor in found.items() if name.startswith("peft.sw.")}


def test_a_language_then_a_task(config: Path, tmp_path: Path) -> None:
    """As two stages, and as a run whose adapter is an entry of another one."""
    language = LANGUAGE.replace("FOLDER", str(tmp_path / "model"))
    words = ["--stages.language", language, "--stages.ranking", "{peft: {class: LTSFT, count: 50}}"]
    metrics = execute(points(str(config), words)[0], tmp_path / "stages")
    assert list(metrics["stages"]) == ["language", "ranking.dense", "ranking.sparse"]
    assert "perplexity" in metrics["stages"]["language"]["metrics"]["validation"]
    assert "accuracy" in metrics["metrics"]["test"]
    first, last = _of_language(tmp_path / "stages" / "stages" / "language"), _of_language(tmp_path / "stages")
    assert first and first.keys() == last.keys() and all(torch.equal(one, last[name]) for name, one in first.items())

    entry = f"{{adapter: {tmp_path / 'stages' / 'stages' / 'language'}}}"
    execute(points(str(config), ["--peft", entry, "--peft+={class: Pfeiffer, bottleneck: 2}"])[0], tmp_path / "entry")
    after = _of_language(tmp_path / "entry")
    assert first.keys() == after.keys() and all(torch.equal(one, after[name]) for name, one in first.items())
    record = read_json(tmp_path / "entry" / "adapter" / "adapter.json")
    assert [spec["name"] for spec in record["methods"]] == ["sw", "Pfeiffer"]


@pytest.mark.parametrize("kind", ["language adapter", "mask"])
def test_from_under_the_head(config: Path, tmp_path: Path, kind: str) -> None:
    """What was trained under a language model's head gives what `load_adapter` gives without it."""
    folder = str(tmp_path / "model")
    headed = TextEncoder(folder, head=True)
    method = LanguageAdapter(bottleneck=2) if kind == "language adapter" else LTSFT(count=80)
    method.attach(headed)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        if kind == "mask":
            method.advance()
            for tensor in method.trainable().values():
                tensor.fill_(0.2)
    method.save(tmp_path / "adapter")
    loaded, filled = TextEncoder(folder).eval(), TextEncoder(folder).eval()
    load_adapter(tmp_path / "adapter", loaded)
    load_method(tmp_path / "adapter", name="sw").attach(filled)
    inputs = loaded.tokenizer.pad_encoded(loaded.tokenizer.encode(["the cat runs", "what is one"]))
    with torch.inference_mode():
        expected = loaded(inputs)
        assert torch.equal(filled(inputs), expected)
        assert not torch.equal(TextEncoder(folder).eval()(inputs), expected)
