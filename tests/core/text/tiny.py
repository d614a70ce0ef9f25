"""Tiny tokenizers and models in folders, as transformers and sentence-transformers write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]")
WORDS = ("a", "one", "two", "three", "four", "five", "cat", "dog", "runs", "sleeps", "the", "what", "is", "query", ":")
SIZE = len(SPECIAL) + len(WORDS)
ENCODER = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}
DECODER = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}


def id_of(word: str) -> int:
    return [*SPECIAL, *WORDS].index(word)


def tokenizer(kind: str = "encoder", extra: tuple[str, ...] = (), **changes: Any) -> PreTrainedTokenizerFast:
    """Words as tokens: ``encoder`` puts [CLS] and [SEP] around, ``bos`` begins with [BOS], ``plain`` adds nothing.
    ``changes`` are special tokens; None leaves one out."""
    words = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *extra])}
    built = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if kind == "encoder":
        built.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])])
    if kind == "bos":
        built.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[BOS] $A", pair="[BOS] $A $B", special_tokens=[("[BOS]", words["[BOS]"])])
    tokens = {**(ENCODER if kind == "encoder" else DECODER), **changes}
    given = {name: token for name, token in tokens.items() if token is not None}
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "encoder" else [])
    return PreTrainedTokenizerFast(tokenizer_object=built, model_input_names=names, **given)


ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "albert")
SHAPE: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def config(kind: str) -> Any:
    """The configuration of a tiny model of a type."""
    import transformers as t

    ids: Any = {"vocab_size": SIZE + 2, "pad_token_id": 1, "bos_token_id": 5, "eos_token_id": 6}
    names: Any = {"n_embd": 16, "n_layer": 2, "n_head": 4}
    two: Any = {"decoder_start_token_id": 5, "d_model": 16}
    return {
        "bert": lambda: t.BertConfig(**ids, **SHAPE, max_position_embeddings=40),
        "roberta": lambda: t.RobertaConfig(**ids, **SHAPE, max_position_embeddings=42, type_vocab_size=1),
        "distilbert": lambda: t.DistilBertConfig(**ids, dim=16, hidden_dim=32, n_layers=2, n_heads=4),
        "deberta-v2": lambda: t.DebertaV2Config(**ids, **SHAPE, max_position_embeddings=40),
        "albert": lambda: t.AlbertConfig(**ids, **SHAPE, embedding_size=8),
        "llama": lambda: t.LlamaConfig(**ids, **SHAPE, num_key_value_heads=2, max_position_embeddings=60),
        "gpt2": lambda: t.GPT2Config(**ids, **names, n_positions=60),
        "gpt_neox": lambda: t.GPTNeoXConfig(**ids, **SHAPE, max_position_embeddings=60),
        "codegen": lambda: t.CodeGenConfig(**ids, **names, rotary_dim=4, n_positions=60),
        "opt": lambda: t.OPTConfig(**ids, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4,
                                   max_position_embeddings=60, word_embed_proj_dim=16),
        "gpt_neo": lambda: t.GPTNeoConfig(**ids, hidden_size=16, num_layers=2, num_heads=4, window_size=4,
                                          attention_types=[[["global", "local"], 1]], max_position_embeddings=60),
        "xglm": lambda: t.XGLMConfig(**ids, d_model=16, ffn_dim=32, num_layers=2, attention_heads=4,
                                     max_position_embeddings=60),
        "bloom": lambda: t.BloomConfig(**ids, hidden_size=16, n_layer=2, n_head=4),
        "gemma3_text": lambda: t.Gemma3TextConfig(**ids, **SHAPE, num_key_value_heads=2, head_dim=4, sliding_window=8),
        "t5": lambda: t.T5Config(**ids, **two, d_kv=4, d_ff=32, num_layers=2, num_heads=4),
        "bart": lambda: t.BartConfig(**ids, **two, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                                     decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32,
                                     max_position_embeddings=60),
    }[kind]()


def folder(path: Path, kind: str, model_class: str, its_tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """A folder with a tiny model with random weights and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config(kind))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)  # at the usual 0.02 errors would hide
    model.save_pretrained(path)
    if its_tokenizer is None:
        its_tokenizer = tokenizer("encoder" if kind in ENCODERS else "bos")
    its_tokenizer.save_pretrained(path)
    return str(path)
