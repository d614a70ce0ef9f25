"""Tiny models that write texts, one a family, and what they write."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from core.text.backbones import LanguageModel
from core.text.generate import generate
from core.text.generate_settings import GenerateSettings
from tests.core.text import tiny

PROMPTS = ["the cat sleeps", "dog", "what is the dog : one two three", "a", "is the dog the cat", "one two", "five",
           "query : what is one"]
FAMILIES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "codegen": "CodeGenForCausalLM",
            "t5": "T5ForConditionalGeneration", "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM",
            "gpt_neo": "GPTNeoForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "xglm": "XGLMForCausalLM",
            "bart": "BartForConditionalGeneration", "bloom": "BloomForCausalLM"}
NEW = 6


@functools.cache
def folder(kind: str) -> str:
    return tiny.folder(Path(tempfile.mkdtemp()), kind, FAMILIES[kind])


def language_model(kind: str) -> LanguageModel:
    """A tiny model whose next token depends on all that it has read: one with a head that is tied to its embedding, or
    with large shifts, says the same again and again."""
    model = LanguageModel(folder(kind))
    inner: Any = model.model
    head = inner.get_output_embeddings()
    head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
    for name, parameter in inner.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return (model if kind == "xglm" else model.double()).eval()  # XGLM itself has no double precision


def texts_of(model: Any, prompts: Any = PROMPTS, **settings: Any) -> list[tuple[Any, ...]]:
    """What is written for each prompt: tokens, text and why it stopped."""
    found = generate(model, prompts, GenerateSettings(**{"max_new_tokens": NEW, **settings}))
    return [(one.id, one.sample, one.tokens, one.text, one.why) for one in found]
