"""A domain of texts has only to say where its texts and targets are: runs, prediction of lines, and examples follow."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from core.cli import main
from core.config import points
from core.data import EpochLoader
from core.errors import ScionError
from core.files import read_json
from core.text.backbones import LanguageModel, TextEncoder
from core.text.datamodule import TextDataModule
from core.text.sentence_folder import SentenceFolder, write_sentence_folder
from core.training import examples, load_run, run
from tests.core.text import tiny
from tests.core.tiny_run import forget_domain, put_domain

DOMAIN = '''
from core.text.backbones import TextEncoder
from core.text.datamodule import TextDataModule

__all__ = ["Encoder", "Pets", "Questions"]
WORDS = "one two three four five runs sleeps the what is".split()


class Encoder(TextEncoder):
    """Any encoder in a folder."""


class Pets(TextDataModule):
    """Is it about the cat or the dog?"""

    def load(self):
        self.classes, self.origin = ["cat", "dog"], {"source": "mini", "name": "pets"}
        texts = []
        for number in range(60):
            words = [WORDS[(number + step) % 10] for step in range(1 + number % 7)]
            texts.append(" ".join([self.classes[number % 2], *words]))
        targets = [number % 2 for number in range(60)]
        self.train_set = self.text_set(texts[:40], targets[:40], "training texts")
        self.validation_set = self.text_set(texts[40:48], targets[40:48])
        self.test_set = self.text_set(texts[48:], targets[48:])

    def peek(self):
        return ["cat", "dog"]


class Questions(Pets):
    fields, optional_fields = ("question", "context"), ()
'''
CONFIG = """
domain: pets
model: {{backbone: {{class: Encoder, name: {folder}}}}}
data: {{class: Pets, batch_size: 8, length_groups: 2, max_length: 12, cache: {cache}}}
peft: FullFineTuning
optimizer: {{lr: 4.0e-3}}
trainer: {{max_epochs: 2, enable_progress_bar: false, accelerator: cpu}}
loggers: []
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration for the domain, which is on the import path, and a tiny encoder in a folder."""
    put_domain(monkeypatch, tmp_path / "path", "pets", DOMAIN)
    folder = tiny.folder(tmp_path / "model", "bert", "BertModel")
    file = tmp_path / "pets.yaml"
    file.write_text(CONFIG.format(folder=folder, cache=tmp_path / "cache"))
    yield file
    forget_domain("pets")


def _says(tuner: Any, texts: list[str], pairs: list[str] | None = None) -> list[dict[str, Any]]:
    """What the model says of texts without any of the commands."""
    tokenizer = tuner.backbone.tokenizer
    with torch.inference_mode():
        return tuner.task.predict(tuner(tokenizer.pad_encoded(tokenizer.encode(texts, pairs))))


def _lines(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_a_run_and_what_it_says_of_lines(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    assert main(["run", str(config), "--run_dir", str(folder)]) == 0
    record = read_json(folder / "metrics.json")
    tuner = load_run.load_run(str(folder))
    encoder: Any = tuner.backbone
    assert record["backbone"]["tokenizer"] == encoder.tokenizer_fingerprint and encoder.max_length == 12

    plain = tmp_path / "texts.txt"
    plain.write_text("dog runs\n\ncat sleeps the\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", str(folder), str(plain)]) == 0
    said = _lines(capsys.readouterr().out)
    assert [line[0] for line in said] == [f"{plain}, line {number}" for number in (1, 2, 3)]
    for line, text in zip(said, ["dog runs", "", "cat sleeps the"], strict=True):
        [expected] = _says(tuner, [text])
        assert line[1] == expected["label"] and float(line[2]) == pytest.approx(expected["score"], abs=1e-4)

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(plain.read_bytes())))
    assert main(["predict", str(folder), "-", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["label"] for entry in entries] == [line[1] for line in said]

    table = tmp_path / "texts.tsv"
    table.write_text("id\ttext\ttext_pair\n1\tdog runs\tone two\n2\tcat\tone\n", encoding="utf-8")
    rows = tmp_path / "texts.jsonl"
    rows.write_text('{"text": "dog runs", "text_pair": "one two"}\n{"text": "cat", "text_pair": "one"}\n')
    for file in (table, rows):
        assert main(["predict", str(folder), str(file), "--out", str(tmp_path / f"{file.name}.csv")]) == 0
        found = [float(line[2]) for line in _lines(capsys.readouterr().out)]
        expected = [entry["score"] for entry in _says(tuner, ["dog runs", "cat"], ["one two", "one"])]
        assert found == pytest.approx(expected, abs=1e-4)
    of_table, of_rows = ((tmp_path / f"{name}.csv").read_text() for name in ("texts.tsv", "texts.jsonl"))
    numbers = [[line.rpartition('"')[2] for line in text.splitlines()[1:]] for text in (of_table, of_rows)]
    assert numbers[0] == numbers[1]
    assert main(["predict", str(folder), str(rows), "--features", "--out", str(tmp_path / "vectors.npy")]) == 0


def test_what_is_wrong_with_a_line(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["run", str(config), "--run_dir", str(folder), "--trainer.max_epochs", "1"]) == 0
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"text": "dog"}\n{"txt": "dog"}\n{"text": 3}\n{"text": "cat"}\n{"text": \n')
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"dog\ncat \xff\nthe\n")
    capsys.readouterr()
    assert main(["predict", str(folder), str(lacking), str(bad)]) == 2
    output = capsys.readouterr()
    assert [line[0] for line in _lines(output.out)] == [f"{lacking}, line 1", f"{lacking}, line 4", f"{bad}, line 1"]
    told = output.err.splitlines()
    assert told[0].startswith(f"{lacking}, line 2: no field 'text'") and "txt" in told[0]
    assert told[1] == f"{lacking}, line 3: text is a number, where a text is wanted"
    assert told[2].startswith(f"{lacking}, line 5: no JSON")
    assert told[3].startswith(f"{bad}, line 2: not UTF-8 (byte 9 of the file, 5 of the line, is 0xff)")
    assert len(told) == 4


def test_two_fields(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    arguments = ["--data", "Questions", "--trainer.max_epochs", "1"]
    assert main(["run", str(config), "--run_dir", str(folder), *arguments]) == 0
    rows = tmp_path / "questions.jsonl"
    rows.write_text('{"question": "what is the cat", "context": "one"}\n{"question": "what"}\n')
    plain = tmp_path / "texts.txt"
    plain.write_text("what\n")
    capsys.readouterr()
    assert main(["predict", str(folder), str(rows), str(plain)]) == 2
    output = capsys.readouterr()
    assert len(_lines(output.out)) == 1
    missing, no_columns = output.err.splitlines()
    assert missing == f"{rows}, line 2: no field 'context'; it has question"
    assert no_columns.startswith(f"{plain}: a line of it is one text, and question, context are wanted")


def test_examples(config: Path, tmp_path: Path) -> None:
    [point] = points(str(config), ["--trainer.max_epochs", "1", "--optimizer.lr", "1.0e-6"])
    run.execute(point, tmp_path / "run")
    page = (tmp_path / "run" / "examples.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert table[0] == "| | sample | text | prediction | score | truth |" and len(table) == 2 + 12
    marks = [line.split("|")[1].strip() for line in table[2:]]
    assert marks == sorted(marks, reverse=True) and set(marks) <= {"", "wrong"}
    accuracy = read_json(tmp_path / "run" / "metrics.json")["metrics"]["test"]["accuracy"]
    assert marks.count("wrong") == round(12 * (1 - accuracy)) > 0
    for line in table[2:]:
        mark, _, text, prediction, score, truth = (cell.strip() for cell in line.strip("|").split("|"))
        assert text.split()[0] == truth and (mark == "wrong") == (prediction != truth) and 0 <= float(score) <= 1


def test_cells_of_examples_end_where_they_should() -> None:
    long = examples.Example("a|b", "x" * 500, "line\nbreak", "0.5", "`_*", None)
    right = [examples.Example(str(number), "text", "a", "", "a", True) for number in range(30)]
    wrong = [examples.Example(str(number), "text", "a", "", "b", False) for number in range(30)]
    lines = examples._page([long, *right, *wrong], "T").splitlines()
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == examples.MOST and [line.startswith("| wrong") for line in rows] == [True] * 12 + [False] * 12
    assert "61 samples were looked at, 30 of them wrong" in lines[2]
    row = next(line for line in rows if line.startswith("| ?"))
    assert "a\\|b" in row and "line break" in row and "\\`\\_\\*" in row and len(row) < 300 and "…" in row
    only_wrong = [line for line in examples._page(wrong, "T").splitlines() if line.startswith("| wrong")]
    assert len(only_wrong) == examples.MOST


class Words(TextDataModule):
    """Texts by hand."""

    texts: Any = ["the cat sleeps", "dog", "what is the dog"]

    def load(self) -> None:
        self.classes, self.origin = ["a", "b"], {"source": "mini", "name": "words"}
        self.train_set = self.text_set(self.texts, [0, 1, 0])


def test_batches_and_the_store(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path / "model", "bert", "BertModel"))
    data = Words(cache=str(tmp_path / "cache"), batch_size=3, max_length=5)
    with pytest.raises(ScionError, match=r"has no tokenizer yet; call bind\(backbone\) before setup"):
        data.setup()
    data.bind(encoder)
    data.setup()
    loader = data.loader(data.train_set, train=False)
    assert isinstance(loader, EpochLoader)
    [(inputs, targets)] = list(loader)
    expected = encoder.tokenizer.pad_encoded(encoder.tokenizer.encode(Words.texts, max_length=5))
    assert inputs.keys() == expected.keys() == {"input_ids", "attention_mask", "token_type_ids"}
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs) and targets.tolist() == [0, 1, 0]
    assert data.train_set.lengths == [5, 3, 5] and inputs["input_ids"].shape == (3, 5)  # type: ignore[attr-defined]
    assert data.text_of(data.train_set, 2) == "what is the"  # cut
    assert data.info.vocabulary == tiny.SIZE and data.info.special_ids == {"pad": 1, "mask": 4}
    assert data.example(2)["input_ids"].shape == (2, 5)
    corpora = list((tmp_path / "cache" / "text").glob("ids-*"))
    assert len(corpora) == 1
    longer = Words(cache=str(tmp_path / "cache"))
    longer.bind(encoder)
    longer.setup()
    assert len(list((tmp_path / "cache" / "text").glob("ids-*"))) == 2 and longer.longest == 40
    words = {"labels": torch.tensor([1, 2, 3])}, {"labels": torch.tensor([4])}
    _, padded = data.batch([({"input_ids": torch.tensor([2, 9, 3])}, words[0]),
                            ({"input_ids": torch.tensor([2])}, words[1])])
    assert padded["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]  # type: ignore[index]


def test_prompts_and_what_does_not_fit(tmp_path: Path) -> None:
    where = Path(tiny.folder(tmp_path / "model", "bert", "BertModel"))
    (where / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer"}]))
    (where / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "query : "}}))
    encoder = TextEncoder(str(where))
    data = Words(cache=str(tmp_path / "cache"), prompt="query")
    data.bind(encoder)
    assert data.encode(["cat"])[0].ids == encoder.tokenizer.ids(["query : cat"])[0]
    assert data.encode([("cat", "dog")])[0].ids == encoder.tokenizer.encode(["query : cat"], ["dog"])[0].ids
    with pytest.raises(ScionError, match="has no prompt 'passage'"):
        Words(prompt="passage").bind(encoder)
    with pytest.raises(ScionError, match="1 of 2 samples are pairs"):
        data.encode(["cat", ("cat", "dog")])
    with pytest.raises(ScionError, match="data.max_length: 41 tokens, and the backbone takes 40"):
        Words(max_length=41).bind(encoder)
    with pytest.raises(ScionError, match="holds texts, and the backbone Linear has no tokenizer"):
        Words().bind(torch.nn.Linear(2, 2))
    writer = LanguageModel(tiny.folder(tmp_path / "writer", "gpt2", "GPT2LMHeadModel"))
    with pytest.raises(ScionError, match="data.prompt: 'query', and the backbone has no prompts"):
        Words(prompt="query").bind(writer)
    data.texts = ["cat"]
    with pytest.raises(ScionError, match="3 targets of 1 texts"):
        data.setup()


def test_counted_without_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(config)]) == 0
    assert "one step on a batch input_ids [8, 12], attention_mask [8, 12]" in capsys.readouterr().out
    assert os.path.isdir(config.parent / "cache") is False  # nothing was read


@pytest.mark.parametrize("folder_says", ["nothing", "cls, normalised, lower case"])
def test_a_merged_encoder_opens_as_a_sentence_transformer(config: Path, tmp_path: Path, folder_says: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    from sentence_transformers import SentenceTransformer

    if folder_says != "nothing":
        said = SentenceFolder("cls", True, (), {"query": "query : "}, "query", 9, True)
        write_sentence_folder(tmp_path / "model", said, 16)
    folder = tmp_path / "run"
    arguments = ["--trainer.max_epochs", "1", "--data.max_length", "null", "--peft", "LoRA"]
    assert main(["run", str(config), "--run_dir", str(folder), *arguments]) == 0
    assert main(["merge", str(folder), str(tmp_path / "plain")]) == 0
    assert "SentenceTransformer(folder) opens it too" in capsys.readouterr().out
    encoder: Any = load_run.load_run(str(folder)).backbone
    texts = ["the cat sleeps", "dog", "what is the dog : one two three four five a"]
    batch = encoder.tokenizer.pad_encoded(encoder.tokenizer.encode(encoder.prompted(texts), None, encoder.max_length))
    with torch.inference_mode():
        expected = encoder(batch)
    opened = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    torch.testing.assert_close(torch.as_tensor(opened.encode(texts)), expected, rtol=1e-5, atol=1e-5)
    again = TextEncoder(str(tmp_path / "plain")).eval()
    assert again.tokenizer_fingerprint == encoder.tokenizer_fingerprint and again.prompts == encoder.prompts
    assert (again.pooling, again.normalise) == (encoder.pooling, encoder.normalise)
    with torch.inference_mode():
        torch.testing.assert_close(again(batch), expected, rtol=1e-5, atol=1e-5)
