"""Where the anatomy sees heads beside a backbone, at any depth of wrappers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.peft import LTSFT, BitFit, LoRA  # type: ignore[attr-defined]
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


def language_model(kind: str) -> Any:
    """A tiny language model of transformers, wider than its embedding where the family can be."""
    import transformers

    name = kind.partition("For")[0].removesuffix("LMHeadModel")
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **SIZES.get(name, SIZE))
    with torch.random.fork_rng(devices=[]):
        return getattr(transformers, kind)(config).eval()


SIZE = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": WIDTH,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SIZES: dict[str, dict[str, Any]] = {
    "Albert": {**SIZE, "embedding_size": WIDTH // 2},
    "GPT2": {"n_embd": WIDTH, "n_layer": 1, "n_head": 4},
    "CodeGen": {"n_embd": WIDTH, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
    "DistilBert": {"dim": WIDTH, "n_layers": 1, "n_heads": 4, "hidden_dim": WIDTH},
    "Electra": {**SIZE, "embedding_size": WIDTH // 2},
    "ModernBert": {**SIZE, "cls_token_id": 0, "sep_token_id": 0},
    "Whisper": {"d_model": WIDTH, "num_mel_bins": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0,
                "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": WIDTH,
                "decoder_ffn_dim": WIDTH, "max_source_positions": 9, "max_target_positions": 32, "bos_token_id": 0,
                "eos_token_id": 0, "decoder_start_token_id": 1},
}
LANGUAGE_MODELS = {
    "BertForMaskedLM": "bert", "BertLMHeadModel": "bert", "RobertaForMaskedLM": "roberta",
    "RobertaForCausalLM": "roberta", "XLMRobertaForMaskedLM": "roberta", "CamembertForMaskedLM": "roberta",
    "AlbertForMaskedLM": "albert", "GPT2LMHeadModel": "transformer", "GPTNeoXForCausalLM": "gpt_neox",
    "CodeGenForCausalLM": "transformer", "LlamaForCausalLM": "model", "MistralForCausalLM": "model",
    "Qwen2ForCausalLM": "model", "GemmaForCausalLM": "model", "Starcoder2ForCausalLM": "model",
    "DistilBertForMaskedLM": "distilbert", "MPNetForMaskedLM": "mpnet", "ElectraForMaskedLM": "electra",
    "ElectraForCausalLM": "electra", "DebertaV2ForMaskedLM": "deberta", "ModernBertForMaskedLM": "model",
    "WhisperForConditionalGeneration": "model", "WhisperForCausalLM": "model",
}
"""Language models, and what each calls its backbone."""


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_whole_head_of_a_language_model(kind: str) -> None:
    """Transform, norm, bias and the map to the vocabulary are one role, which is left out as a whole, never trained
    unasked, and no task head."""
    model = language_model(kind)
    backbone = f"{LANGUAGE_MODELS[kind]}."
    names = {name for name, _ in model.named_parameters()}
    beside = {name for name in names if not name.startswith(backbone)}
    anatomy = dissect(model)
    (site,) = anatomy.sites("lm_head")
    assert site.module is model.get_output_embeddings() and site.out_features == VOCABULARY
    assert beside or model.config.tie_word_embeddings  # the head may be one tied map, and no more
    assert beside == set(site.parameter_names) & names and anatomy.head_names() == set()
    for chosen in ({"exclude": ("lm_head",)}, {"layers": (0,)}):
        method = LTSFT(density=0.1, **chosen).attach(model)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained and not trained & beside
        method.remove()
    method = LoRA(rank=2, targets=("mlp.up",)).attach(model)
    assert method.counts()["head"] == 0
    assert not any(p.requires_grad for name, p in model.named_parameters() if name in beside)


def test_biases_of_a_language_model_s_head_are_left_out() -> None:
    model = language_model("BertForMaskedLM")
    inside = sum(p.numel() for name, p in model.bert.named_parameters() if name.endswith("bias"))
    assert BitFit(exclude=("lm_head",)).attach(model).counts()["method"] == inside


def test_a_classifier_beside_a_language_model_is_a_task_head() -> None:
    """A child that the language model does not name as its map to the vocabulary, and that no family describes."""
    import transformers

    model = language_model("AlbertForMaskedLM")
    model.classifier = nn.Linear(WIDTH, 3)
    assert dissect(model).head_names() == {"classifier.weight", "classifier.bias"}
    twofold = transformers.AlbertForPreTraining(model.config)
    heads = dissect(twofold).head_names()
    assert heads == {"sop_classifier.classifier.weight", "sop_classifier.classifier.bias"}


def test_masked_numbers_of_mbert() -> None:
    """Language masks (Litschko et al. 2022) on mBERT leave norms and the language-model head out."""
    import transformers

    config = transformers.BertConfig(vocab_size=105_879)
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    norms = ("norm1", "norm2", "norm")
    counts = []
    for exclude in (norms, (*norms, "lm_head")):
        method = LTSFT(density=0.1, exclude=exclude).attach(model)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        method.remove()
    assert counts == [167_425_431, 166_727_424]


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
