"""A language model's training that is killed in mid-epoch, its batches in groups of one length, hidden tokens drawn by
epoch and steps of several batches, goes on to the bytes of an unbroken one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.config import Point, points
from tests.core.text import tiny
from tests.core.tiny_run import child, finish, results

ALL = bool(os.environ.get("SCION_ALL"))
PARTS = '''
from core.text.backbones import LanguageModel, TextEncoder
from core.text.datamodule import TextDataModule
from core.text.masked import MaskedTexts, masked_batch
from core.text.sequence import PairEncoder, causal_batch

WORDS = "one two three four five runs sleeps the what is".split()


class Encoder(TextEncoder):
    """Any encoder in a folder, with its head."""

    def __init__(self, name="auto"):
        super().__init__(name, head=True)


class Writer(LanguageModel):
    """Any language model in a folder."""


class Words(TextDataModule):
    """Words in a row, some of them hidden."""

    def load(self):
        self.origin = {"source": "mini", "name": "words"}
        texts = [" ".join(WORDS[(n + step) % 10] for step in range(1 + n * 7 % 23)) for n in range(48)]
        self.set_up(texts)

    def set_up(self, texts):
        ids = [encoded.ids for encoded in self.encode(texts)]
        self.train_set = MaskedTexts(ids[:32], self.tokenizer, self.seed or 0)
        self.validation_set = MaskedTexts(ids[32:40], self.tokenizer, redrawn=False)
        self.test_set = MaskedTexts(ids[40:], self.tokenizer, redrawn=False)

    def collate(self, train):
        return lambda samples: masked_batch(self.tokenizer, samples)


class Pairs(list):
    @property
    def lengths(self):
        return [len(pair.ids) for pair in self]


class Answers(Words):
    """The words that come next."""

    def set_up(self, texts):
        pairs = PairEncoder(self.tokenizer).encode([("what is", text) for text in texts])
        self.train_set, self.validation_set, self.test_set = Pairs(pairs[:32]), Pairs(pairs[32:40]), Pairs(pairs[40:])

    def collate(self, train):
        return lambda samples: causal_batch(self.tokenizer, samples)
'''
CONFIG = """
model: {{backbone: {{class: killed_words.{backbone}, name: {folder}}}, task: {task}}}
data: {{class: killed_words.{data}, batch_size: 4, length_groups: 3, max_length: 30, cache: {cache}}}
peft: {{class: LoRA, dropout: 0.1}}
optimizer: {{lr: 1.0e-2}}
trainer: {{max_epochs: 3, accumulate_grad_batches: 2, checkpoint_every_n_steps: 1, enable_progress_bar: false,
  accelerator: cpu}}
"""
KINDS = {"masked": ("Encoder", "bert", "BertForMaskedLM", "MaskedLM", "Words"),
         "causal": ("Writer", "llama", "LlamaForCausalLM", "LanguageModelling", "Answers")}


@pytest.fixture(params=KINDS)
def point(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Point]:
    """A run of a second or two."""
    backbone, kind, model_class, task, data = KINDS[request.param]
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "killed_words.py").write_text(PARTS)
    its_tokenizer = None if kind == "bert" else tiny.tokenizer("bos")
    folder = tiny.folder(tmp_path / "model", kind, model_class, its_tokenizer)
    file = tmp_path / "words.yaml"
    file.write_text(CONFIG.format(backbone=backbone, folder=folder, task=task, data=data, cache=tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "path")
    yield points(str(file), [])[0]
    sys.modules.pop("killed_words", None)


def test_killed_within_an_epoch(point: Point, tmp_path: Path) -> None:
    """Four steps an epoch, each with a checkpoint: killed behind one, and, in the long tier, 20 times at random."""
    from core.training import run

    began = time.monotonic()
    run.execute(point, tmp_path / "unbroken")
    took = time.monotonic() - began
    reference = results(tmp_path / "unbroken")
    assert reference["record"]["metrics"]["test"]["perplexity"] > 1
    for stop in range(1, 13) if ALL else (7,):
        folder = tmp_path / f"stop{stop}"
        _, status = os.waitpid(child(point, folder, stop), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        finish(point, folder)
        assert results(folder) == reference, f"killed behind checkpoint {stop}"
    chance = random.Random(0)
    for number in range(20 if ALL else 0):
        folder = tmp_path / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        pid = child(point, folder)
        time.sleep(chance.uniform(0.05, took))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        finish(point, folder)
        assert results(folder) == reference, f"try {number}"
