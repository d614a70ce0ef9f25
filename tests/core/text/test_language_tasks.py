"""Language modelling and masked language modelling as tasks, with methods on tiny models of several families."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from core import FineTuner, peft
from core.data import DataInfo, EpochLoader, EpochSampler
from core.errors import ScionError
from core.tasks import Classification, LanguageModelling, MaskedLM
from core.text.backbones import LanguageModel, TextEncoder
from core.text.masked import MaskedTexts, masked_batch
from core.text.sequence import PairEncoder, causal_batch, decoder_batch
from tests.core.text import tiny

PAIRS = [("what is one", "two"), ("the cat", "runs a dog"), ("is the dog the cat", "one two three"), ("a", "five")]
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2}, "IA3": {}, "Pfeiffer": {"bottleneck": 4}, "PromptTuning": {"tokens": 3},
    "PrefixTuning": {"tokens": 3}, "LadderSideTuning": {"reduction": 2}, "LTSFT": {"count": 100}, "BitFit": {}}
MODELS = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "codegen": "CodeGenForCausalLM",
          "t5": "T5ForConditionalGeneration"}
REFUSED = (("BitFit", "llama"), ("BitFit", "t5"))
INFO = DataInfo(vocabulary=tiny.SIZE)


def language_model(path: Path, kind: str) -> LanguageModel:
    return LanguageModel(tiny.folder(path, kind, MODELS[kind]))


def batch_of(backbone: LanguageModel, pairs: list[tuple[str, str]], scope: Any = "answer") -> Any:
    settings: Any = backbone.model.config
    decoder = bool(settings.is_encoder_decoder)
    encoder = PairEncoder(backbone.tokenizer, scope=scope, decoder=decoder)
    samples = encoder.encode(pairs)
    make: Any = decoder_batch if decoder else causal_batch
    return make(backbone.tokenizer, samples)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_learn_to_say_the_next_token(tmp_path: Path, kind: str, method: str) -> None:
    if (method, kind) in REFUSED:
        pytest.skip("it has no bias")
    backbone = language_model(tmp_path, kind)
    tuner = FineTuner(backbone, LanguageModelling(), INFO)
    attached = peft.make(method, METHODS[method]).attach(backbone)
    batch = batch_of(backbone, PAIRS)
    optimizer = torch.optim.Adam(attached.trainable().values(), lr=0.1)
    first = tuner.loss(batch)
    for _ in range(20):
        optimizer.zero_grad()
        loss = tuner.loss(batch)
        loss.backward()
        optimizer.step()
    assert float(tuner.loss(batch)) < 0.995 * float(first)


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_that_of_the_whole_matrix(tmp_path: Path, kind: str) -> None:
    backbone = language_model(tmp_path, kind).double().eval()
    tuner = FineTuner(backbone, LanguageModelling(), INFO).eval()
    inputs, targets = batch_of(backbone, PAIRS)
    further = {} if kind != "t5" else {"labels": inputs["labels"]}
    plain = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    logits = backbone.model(**plain, **further).logits  # type: ignore[operator]
    expected = F.cross_entropy(logits.flatten(0, 1), targets["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(tuner.loss((inputs, targets)), expected, rtol=1e-6, atol=1e-6)
    outputs = tuner(inputs, targets)
    assert len(outputs) == int((targets["labels"] != -100).sum()) == tuner.task.counts(outputs, targets)


def test_all_is_scored_but_the_first_token(tmp_path: Path) -> None:
    backbone = language_model(tmp_path, "llama")
    answer, everything = (int((batch_of(backbone, PAIRS, scope)[1]["labels"] != -100).sum())
                          for scope in ("answer", "all"))
    assert everything - answer == sum(len(source.split()) for source, _ in PAIRS)


class Texts(Dataset):
    """Items of which a batch is made by `causal_batch`."""

    def __init__(self, backbone: LanguageModel) -> None:
        self.samples = PairEncoder(backbone.tokenizer).encode(PAIRS * 3)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def test_metrics_of_an_epoch(tmp_path: Path) -> None:
    backbone = language_model(tmp_path, "gpt2")
    tuner = FineTuner(backbone, LanguageModelling(), INFO)
    texts = Texts(backbone)
    loader = EpochLoader(texts, batch_size=5, sampler=EpochSampler(len(texts), False, 0),
                         collate_fn=lambda samples: causal_batch(backbone.tokenizer, samples))
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
                        enable_model_summary=False)
    [found] = trainer.test(tuner, loader, verbose=False)
    inputs, targets = batch_of(backbone, PAIRS * 3)
    with torch.no_grad():
        outputs = tuner(inputs, targets)
        labels = targets["labels"][targets["labels"] != -100]
        nll = F.cross_entropy(outputs, labels)
    assert found["test/perplexity"] == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert found["test/loss"] == pytest.approx(float(nll), rel=1e-4)
    assert found["test/accuracy"] == pytest.approx(float((outputs.argmax(-1) == labels).float().mean()), abs=1e-6)


def test_masked_texts(tmp_path: Path) -> None:
    backbone = TextEncoder(tiny.folder(tmp_path, "bert", "BertForMaskedLM"), head=True)
    lines = ["the cat", "the cat one dog sleeps", "the cat one dog sleeps what is a query"]
    ids = backbone.tokenizer.ids(lines * 4)
    texts = MaskedTexts(ids, backbone.tokenizer, seed=3)
    first = [texts[number] for number in range(len(texts))]
    texts.set_epoch(1)
    second = [texts[number] for number in range(len(texts))]
    texts.set_epoch(0)
    assert all(torch.equal(one[1]["labels"], texts[i][1]["labels"]) for i, one in enumerate(first))
    assert any(not torch.equal(one[1]["labels"], other[1]["labels"]) for one, other in zip(first, second, strict=True))
    assert texts.lengths == [len(text) for text in ids]
    tuner = FineTuner(backbone, MaskedLM(), INFO)
    batch = masked_batch(backbone.tokenizer, first)
    peft.make("LoRA", {"rank": 4}).attach(backbone)
    optimizer = torch.optim.Adam([p for p in tuner.parameters() if p.requires_grad], lr=0.05)
    start = float(tuner.loss(batch))
    for _ in range(40):
        optimizer.zero_grad()
        tuner.loss(batch).backward()
        optimizer.step()
    assert float(tuner.loss(batch)) < 0.97 * start
    with pytest.raises(ScionError, match="no mask token"):
        MaskedTexts(ids, language_model(tmp_path / "gpt2", "gpt2").tokenizer)


def test_a_batch_without_labels_and_a_method_for_vectors(tmp_path: Path) -> None:
    backbone = language_model(tmp_path, "llama")
    tuner = FineTuner(backbone, LanguageModelling(), INFO)
    peft.make("LoRA", {"rank": 2}).attach(backbone)
    inputs, targets = batch_of(backbone, PAIRS)
    nothing = {"labels": torch.full_like(targets["labels"], -100)}
    loss = tuner.loss((inputs, nothing))
    assert float(loss) == 0.0 and loss.requires_grad
    with pytest.raises(ScionError, match="VQT: works with tasks that read feature, and LanguageModelling reads"):
        peft.make("VQT", {}).check_reading("logits", "LanguageModelling")
    with pytest.raises(ScionError, match="reads 'logits', which the backbone"):
        FineTuner(TextEncoder(tiny.folder(tmp_path / "bert", "bert", "BertModel")), MaskedLM(), INFO)
    assert Classification.reads == "feature"
