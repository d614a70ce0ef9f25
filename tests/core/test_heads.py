"""Where the anatomy sees heads beside a backbone, at any depth of wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.peft import BitFit, LoRA  # type: ignore[attr-defined]
from tests.models import VOCABULARY, WIDTH, batch


class Wrapper(nn.Module):
    """A domain's thin wrapper around a whole model of the library."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits


def bert(kind: str) -> Any:
    import transformers

    config = transformers.BertConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1,
                                     num_attention_heads=4, intermediate_size=WIDTH)
    config.num_labels = 3
    with torch.random.fork_rng(devices=[]):
        return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("wrapped", [False, True])
def test_head_of_a_masked_language_model_is_its_projection(wrapped: bool) -> None:
    plain = bert("BertForMaskedLM")
    model = Wrapper(plain) if wrapped else plain
    anatomy = dissect(model)
    (site,) = anatomy.sites("lm_head")
    assert site.module is plain.cls.predictions.decoder and model.get_submodule(site.path) is site.module
    assert site.kind == "linear" and anatomy.head_names() == set()
    with pytest.warns(UserWarning, match="tied"):
        method = LoRA(rank=2, targets=("lm_head",)).attach(model)
    assert method.counts()["method"] == 2 * (WIDTH + VOCABULARY) and method.counts()["head"] == 0
    method.remove()
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert BitFit().attach(model).counts()["method"] == biases


@pytest.mark.parametrize("wrapped", [False, True])
def test_head_of_a_classifier_is_trained_at_any_depth(wrapped: bool) -> None:
    plain = bert("BertForSequenceClassification")
    model = Wrapper(plain) if wrapped else plain
    prefix = "model." if wrapped else ""
    assert dissect(model).head_names() == {f"{prefix}classifier.weight", f"{prefix}classifier.bias"}
    method = LoRA(rank=2).attach(model)
    assert method.counts()["head"] == 3 * (WIDTH + 1)
    assert plain.classifier.weight.requires_grad and not plain.bert.pooler.dense.weight.requires_grad
    out = model(batch("bert"))
    assert (out if wrapped else out.logits).requires_grad
