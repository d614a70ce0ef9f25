"""A backbone's own language-model head, trained beside a method: counted, saved, resumed, merged; embeddings stay."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from core import FineTuner
from core.cli import main
from core.config import points
from core.errors import ScionError
from core.files import read_json
from core.peft import LoRA
from core.tasks import LanguageModelling, MaskedLM
from core.text.backbones import LanguageModel, TextEncoder
from core.training import load_run, run
from tests.core.text import tiny
from tests.core.tiny_run import child, finish, weights

DOMAIN = '''
from functools import partial
from core.text.backbones import LanguageModel, TextEncoder
from core.text.datamodule import TextDataModule
from core.text.masked import MaskedTexts, masked_batch
from core.text.sequence import PairEncoder, causal_batch

__all__ = ["Blanks", "Encoder", "Lines", "Writer"]
WORDS = "one two three four five runs sleeps the what is".split()
TEXTS = [" ".join(WORDS[(number + step) % 10] for step in range(4 + number % 7)) for number in range(24)]


class Encoder(TextEncoder):
    """Any encoder in a folder."""


class Writer(LanguageModel):
    """Any language model in a folder."""


class Blanks(TextDataModule):
    """Words to be guessed."""

    def load(self):
        self.classes, self.origin = [], {"source": "mini", "name": "blanks"}
        self.train_set, self.test_set = self.texts(TEXTS[:18], True), self.texts(TEXTS[18:], False)

    def texts(self, texts, redrawn):
        return MaskedTexts(self.text_set(texts, [0] * len(texts)).ids, self.tokenizer, self.seed, redrawn)

    def peek(self):
        return []

    def collate(self, train):
        return partial(masked_batch, self.tokenizer)


class Lines(Blanks):
    """Words to be said."""

    def texts(self, texts, redrawn):
        return PairEncoder(self.tokenizer, scope="all").encode([(text, "cat") for text in texts])

    def collate(self, train):
        return partial(causal_batch, self.tokenizer)
'''
CONFIG = """
domain: blanks
model: {{backbone: {{class: {backbone}, name: {folder}{further}}}, task: {{class: {task}, head: train, untie: true}}}}
data: {{class: {data}, batch_size: 6, cache: {cache}}}
peft: {{class: LoRA, rank: 2, dropout: 0.1}}
optimizer: {{lr: 1.0e-2}}
trainer: {{max_epochs: 2, checkpoint_every_n_steps: 2, enable_progress_bar: false, accelerator: cpu}}
loggers: []
"""
ENCODER = {"backbone": "Encoder", "further": ", head: true", "task": "MaskedLM", "data": "Blanks"}
WRITER = {"backbone": "Writer", "further": "", "task": "LanguageModelling", "data": "Lines"}
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("BertForMaskedLM", ENCODER), "albert": ("AlbertForMaskedLM", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER), "gpt2": ("GPT2LMHeadModel", WRITER)}
VOCABULARY = tiny.SIZE + 2
HEADS = {"bert": 16 * 16 + 16 + 32 + VOCABULARY * 17, "roberta": 16 * 16 + 16 + 32 + VOCABULARY * 17,
         "albert": 16 * 8 + 8 + 16 + VOCABULARY * 9, "gpt2": VOCABULARY * 16}
"""Transform, norm, map and bias."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder, with the domain on the import path."""
    folder = tmp_path / "path" / "domains" / "blanks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(DOMAIN)
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("domains.blanks")]:
        del sys.modules[name]


def configuration(home: Path, kind: str) -> Path:
    model_class, parts = KINDS[kind]
    folder = tiny.folder(home / kind, kind, model_class)
    file = home / f"{kind}.yaml"
    file.write_text(CONFIG.format(folder=folder, cache=home / "cache", **parts))
    return file


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[2, 7, 9, 12, 3], [5, 8, 8, 10, 11]])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_loaded_and_merged(home: Path, kind: str) -> None:
    import transformers

    file, folder = configuration(home, kind), home / "run"
    assert main(["run", str(file), "--run_dir", str(folder)]) == 0
    record = read_json(folder / "metrics.json")
    assert record["parameters"]["head"] == HEADS[kind]
    assert not (folder / "examples.md").exists()

    original: Any = getattr(transformers, KINDS[kind][0]).from_pretrained(home / kind)
    tuner = load_run.load_run(str(folder))
    model: Any = tuner.backbone.model
    moved = set()
    before = original.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            moved.add(f"model.{name}")
    assert moved == set(tuner.backbone.trained_head) and len(moved) > 0
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert main(["test", str(folder)]) == 0
    again = read_json(folder / "tests" / "0" / "metrics.json")["metrics"]["test"]
    assert again == pytest.approx(record["metrics"]["test"], rel=1e-5)

    assert main(["merge", str(folder), str(home / "plain")]) == 0
    assert not (home / "plain" / "head.safetensors").exists()
    plain = getattr(transformers, KINDS[kind][0]).from_pretrained(home / "plain").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(plain), logits(original.eval()), atol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_killed_in_mid_epoch_it_ends_as_unbroken(home: Path, kind: str) -> None:
    [point] = points(str(configuration(home, kind)), [])
    run.execute(point, home / "unbroken")
    assert os.waitpid(child(point, home / "broken", 4), 0)[1] & 127 == signal.SIGKILL
    assert finish(point, home / "broken") == weights(home / "unbroken")
    broken, unbroken = (read_json(home / name / "metrics.json")["metrics"] for name in ("broken", "unbroken"))
    assert broken == unbroken


def test_the_embedding_would_move(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, "bert", "BertForMaskedLM")
    with pytest.raises(ScionError, match="train would move model.bert.embeddings.word_embeddings.weight too, which "
                                         "BertForMaskedLM shares with its head; set untie: true"):
        FineTuner(TextEncoder(folder, head=True), MaskedLM(head="train"))
    with pytest.raises(ScionError, match="model.task.untie: a head that stays frozen needs no weight of its own"):
        MaskedLM(untie=True)
    with pytest.raises(ScionError, match="neither frozen nor train"):
        MaskedLM(head="trained")  # type: ignore[arg-type]
    attached = TextEncoder(folder, head=True)
    LoRA(rank=2).attach(attached)
    with pytest.raises(ScionError, match="make the FineTuner first"):
        FineTuner(attached, MaskedLM(head="train", untie=True))
    assert attached.trained_head == ()


def test_a_head_that_is_not_tied(tmp_path: Path) -> None:
    backbone = LanguageModel(tiny.folder(tmp_path, "llama", "LlamaForCausalLM"))
    FineTuner(backbone, LanguageModelling(head="train"))
    method = LoRA(rank=2).attach(backbone)
    assert backbone.trained_head == ("model.lm_head.weight",) and method.counts()["head"] == VOCABULARY * 16
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad and not name.startswith("peft.")}
    assert trained == {"model.lm_head.weight"}
    method.remove()
    FineTuner(backbone, LanguageModelling())
    assert LoRA(rank=2).attach(backbone).counts()["head"] == 0 and backbone.trained_head == ()
