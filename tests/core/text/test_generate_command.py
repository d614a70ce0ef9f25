"""``lightning predict`` and ``describe`` of a run whose backbone writes texts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core import peft
from core.cli import main
from core.report.token_cost import token_cost
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from core.training.load_run import load_run
from tests.core.text.test_language_tasks import METHODS
from tests.core.text.writers import PROMPTS, folder, language_model
from tests.core.tiny_run import forget_domain, put_domain

DOMAIN = '''
"""Questions and answers of a few words."""

import torch
from torch.utils.data import Dataset
from core.text.backbones import LanguageModel
from core.text.datamodule import TextDataModule
from core.text.sequence import PairEncoder, Sample, causal_batch

__all__ = ["Pairs", "Writer"]
PAIRS = [("what is one", "two"), ("the cat", "runs a dog"), ("is the dog the cat", "one two three"), ("a", "five")]


class Writer(LanguageModel):
    pass


class Samples(Dataset):
    def __init__(self, tokenizer):
        self.samples = PairEncoder(tokenizer).encode(PAIRS)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        return {"input_ids": torch.tensor(sample.ids)}, {"labels": torch.tensor(sample.labels)}


class Pairs(TextDataModule):
    def load(self):
        self.train_set = self.validation_set = self.test_set = Samples(self.tokenizer)
        self.origin = {"source": "mini", "name": "pairs"}

    def batch(self, items):
        samples = [Sample(one["input_ids"].tolist(), other["labels"].tolist()) for one, other in items]
        return causal_batch(self.tokenizer, samples)

    def peek(self):
        return []

    def example(self, batch_size=1):
        return {"input_ids": torch.zeros(batch_size, 9, dtype=torch.long),
                "attention_mask": torch.ones(batch_size, 9, dtype=torch.long)}
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished run."""
    path = tmp_path_factory.mktemp("command")
    backbone = {"class_path": "Writer", "init_args": {"name": folder("llama")}}
    config = {"domain": "writing", "model": {"backbone": backbone, "task": "LanguageModelling"},
              "data": {"class": "Pairs", "batch_size": 2}, "peft": {"class": "LoRA", "rank": 2},
              "optimizer": {"lr": 0.05},
              "trainer": {"max_epochs": 3, "enable_progress_bar": False, "accelerator": "cpu"}}
    (path / "writing.yaml").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        put_domain(patch, path / "path", "writing", DOMAIN)
        assert main(["run", str(path / "writing.yaml"), "--run_dir", str(path / "run")]) == 0
        yield path / "run"
    forget_domain("writing")


def test_predict_writes_texts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    words = ["predict", str(run), str(file), "--generate.max_new_tokens", "6"]
    assert main(words) == 0
    told = capsys.readouterr()
    expected = generate(load_run(str(run)), PROMPTS, GenerateSettings(6))
    assert told.out.splitlines() == [one.text for one in expected]
    assert f"{run}/generated/prompts.jsonl: 8 texts" in told.err
    lines = [json.loads(line) for line in (run / "generated" / "prompts.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(number) for number in range(1, 9)]  # of its lines
    assert [line["text"] for line in lines] == [one.text for one in expected]
    assert main(words) == 0 and capsys.readouterr().out == told.out
    other = ["predict", str(run), str(file), "--generate.max_new_tokens=4"]
    assert main(other) == 2
    assert "other settings (max_new_tokens 6, here 4)" in capsys.readouterr().err
    assert main([*other, "--generate.set", "short"]) == 0 and (run / "generated" / "short.jsonl").exists()
    assert main([*other, "--generate.restart", "true"]) == 0
    assert (run / "generated" / "short.jsonl").read_bytes() == (run / "generated" / "prompts.jsonl").read_bytes()


def test_json_lines_and_standard_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "drawn.jsonl"
    file.write_text('{"prompt": "the cat", "id": "first"}\n\n{"prompt": "dog"}\n')
    drawn = ["--generate.temperature", "1", "--generate.samples", "2", "--generate.stop", '["five", "\\n"]',
             "--generate.max_new_tokens", "5"]
    assert main(["predict", str(run), str(file), "--json", *drawn]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["id"], one["sample"]) for one in found] == [("first", 0), ("first", 1), ("3", 0), ("3", 1)]
    assert all(one["file"] == str(file) and "five" not in one["text"] for one in found)
    about = json.loads((run / "generated" / "drawn.json").read_text())
    assert about["settings"]["stop"] == ["five", "\n"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"the cat\ndog")))
    assert main(["predict", str(run), "-", *drawn]) == 0
    assert [line.split("\t")[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["1", "0"], ["1", "1"], ["2", "0"], ["2", "1"]]
    assert (run / "generated" / "stdin.jsonl").exists()


def test_what_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"promt": "a"}\n')
    empty = tmp_path / "empty.txt"
    empty.write_text("a\n\nb\n")
    tokens = ["--generate.max_new_tokens", "3"]
    cases: list[tuple[list[str], str]] = [
        ([str(file), *tokens], "prompts.jsonl, line 1: no field 'prompt' (did you mean 'promt'?)"),
        ([str(empty), *tokens], "empty.txt, line 2: text is empty"),
        ([str(file), "--generate.max_tokens", "3"], "--generate.max_tokens: unknown (did you mean 'max_new_tokens'"),
        ([str(file), "--generate.max_new_tokens", "few"], "generate.max_new_tokens: 'few' is no whole number"),
        ([str(file), "--generate.max_new_tokens"], "--generate.max_new_tokens: a value is missing"),
        ([str(file), "--features", *tokens], "--features: is for predictions"),
        ([str(file), "--out", "a.csv", *tokens], "--out: is for predictions"),
        ([str(file), "--generate.set", "../up"], "--generate.set: '../up' is no name"),
        ([str(file), str(empty), "--generate.set", "one"], "names the texts of one file, and there are 2"),
        ([str(file), str(tmp_path / "prompts.txt"), *tokens], "two files are called prompts"),
        ([str(file), "--generate.restart", "3"], "--generate.restart: 3 is neither true nor false")]
    for words, told in cases:
        assert main(["predict", str(run), *words]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(file), "--nonsense", *tokens])


# ------------------------------------------------------------------------------------------------- what a token costs


def test_describe_says_what_a_token_costs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(run.parent / "writing.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["generated_token"]
    assert found["context"] == 9 and found["cached"] and found["growth_bytes"] == 2 * 2 * 2 * 4 * 4
    assert main(["describe", str(run.parent / "writing.yaml")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "one token written behind 9, with a cache" in told
    assert told[-1].split() == ["more", "a", "token", str(found["growth_bytes"])]


def test_the_cost_of_a_token_is_that_of_its_formula() -> None:
    """GPT-2 of width 16 with two blocks, four heads and 24 ids, in double precision."""
    model = language_model("gpt2")
    before = [parameter.clone() for parameter in model.parameters()]

    def flops(keys: int) -> int:
        maps = 16 * 48 + 16 * 16 + 2 * 16 * 64
        return 2 * (2 * (maps + 2 * 16 * keys) + 16 * 24)

    for context in (1, 10):
        cost = token_cost(model, context)
        assert cost is not None and cost.flops == flops(context + 1)
        assert cost.cache_bytes == context * cost.growth_bytes and cost.growth_bytes == 2 * 2 * 16 * 8
        assert cost.weight_bytes == 8 * sum(parameter.numel() for parameter in model.parameters())
    assert all(bool((one == other).all()) for one, other in zip(before, model.parameters(), strict=True))
    plain: Any = token_cost(model, 10)
    for name, keys, layers in (("PromptTuning", 13, 2), ("PrefixTuning", 10, 2), ("LadderSideTuning", 10, 3)):
        method = peft.make(name, METHODS[name]).attach(model)
        cost = token_cost(model, 10)
        assert cost is not None and cost.cache_bytes == keys * cost.growth_bytes
        assert cost.growth_bytes == plain.growth_bytes * layers // 2  # two thin blocks of half the width
        if name != "LadderSideTuning":
            assert cost.flops == flops(14)
        method.remove()
    method = peft.make("ConformerAdapter", {"bottleneck": 3, "kernel": 3}).attach(model)
    whole = token_cost(model, 10)
    assert whole is not None and not whole.cached and whole.cache_bytes == 0 and whole.flops > 10 * flops(1)


@pytest.mark.parametrize("kind", ["t5", "gemma3_text", "bart"])
def test_the_cost_of_a_token_in_other_families(kind: str) -> None:
    """Of encoder and decoder the encoder's states are there; a window bounds what is kept."""
    model = language_model(kind)
    cost, further = token_cost(model, 10), token_cost(model, 20)
    assert cost is not None and further is not None
    if kind == "gemma3_text":
        assert (cost.growth_bytes, cost.flops, cost.cache_bytes) == (0, further.flops, further.cache_bytes)
    else:
        assert further.flops - cost.flops == 2 * 2 * 2 * 2 * 16 * 10  # two attentions, each with ten keys more
        assert further.cache_bytes == 2 * cost.cache_bytes == 2 * 2 * 2 * 2 * 10 * 16 * 8
