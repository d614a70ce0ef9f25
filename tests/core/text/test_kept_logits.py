"""Logits at labels alone: what MaskedLM keeps at XLM-R's full size; loss and gradients are the whole matrix's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import FineTuner
from core.backbone import Backbone
from core.data import DataInfo
from core.peft import LoRA
from core.tasks import MaskedLM
from core.text.backbones import LanguageModel, TextEncoder
from tests.core.text import tiny

VOCABULARY, BATCH, TOKENS = 250_002, 16, 256
LABELS = round(0.15 * BATCH * TOKENS)
KEPT = 2_723_070_532
"""Bytes, the model's own tensors left out."""


class Hollow(TextEncoder):
    """XLM-R base without values, and without files and a tokenizer."""

    def __init__(self) -> None:
        from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

        Backbone.__init__(self)
        config = XLMRobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1)
        with torch.device("meta"):
            self.model = XLMRobertaForMaskedLM(config)
        self.dim, self.vocabulary, self.positions = 768, VOCABULARY, 512
        self.readings = ("feature", "tokens", "logits")


def test_no_logits_but_those_at_labels_are_kept_at_full_size() -> None:
    backbone = Hollow()
    tuner = FineTuner(backbone, MaskedLM(), DataInfo(vocabulary=VOCABULARY))
    LoRA(rank=8).attach(backbone)
    tuner.to("meta").train()
    ids = torch.empty(BATCH, TOKENS, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = {"labels": ids, "positions": torch.empty(LABELS, dtype=torch.long, device="meta")}
    own = {tensor.untyped_storage()._cdata for tensor in (*tuner.parameters(), *tuner.buffers())}
    kept: dict[int, int] = {}
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tuner.loss((inputs, targets))
    assert largest == LABELS * VOCABULARY and sum(kept.values()) == KEPT
    assert BATCH * TOKENS * VOCABULARY * 4 > KEPT  # the whole matrix alone would be more
    loss.backward()


def test_loss_and_gradients_are_those_of_the_whole_matrix(tmp_path: Path) -> None:
    encoder = TextEncoder(tiny.folder(tmp_path, "roberta", "RobertaForMaskedLM"), head=True).double()
    tuner = FineTuner(encoder, MaskedLM(), DataInfo(vocabulary=tiny.SIZE))
    method = LoRA(rank=2).attach(encoder)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter.normal_(std=0.3)
    tuner.eval()
    tokenizer = encoder.tokenizer
    inputs = tokenizer.pad(tokenizer.ids(["the cat sleeps", "dog", "what is the dog : one two three"]))
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.rand(inputs["input_ids"].shape, generator=generator) < 0.4) & inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~chosen, -100)
    model: Any = encoder.model
    whole = model(**inputs).logits.flatten(0, 1)
    expected = F.cross_entropy(whole, labels.flatten(), ignore_index=-100)
    gradients = torch.autograd.grad(expected, list(method.trainable().values()))
    positions = chosen.flatten().nonzero().squeeze(1)
    for targets in ({"labels": labels}, {"labels": labels, "positions": positions}):
        loss = tuner.loss((inputs, targets))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(loss, list(method.trainable().values()))
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
        assert tuner.task.counts(tuner(inputs, targets), targets) == int(chosen.sum()) > 3


@pytest.mark.parametrize(("kind", "model_class"), [
    ("bert", "BertForMaskedLM"), ("deberta-v2", "DebertaV2ForMaskedLM"), ("gpt2", "GPT2LMHeadModel"),
    ("llama", "LlamaForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM")])
def test_models_without_values_say_their_shapes(kind: str, model_class: str, tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path, kind, model_class)
    encodes = kind in tiny.ENCODERS
    backbone: Any = TextEncoder(folder, head=True) if encodes else LanguageModel(folder)
    backbone.to("meta")
    ids = torch.empty(2, 8, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    positions = torch.empty(3, dtype=torch.long, device="meta")
    assert backbone.logits(inputs, positions).shape == (3, tiny.SIZE + 2)
    assert backbone.tokens(inputs).shape == (2, 8, 16)
