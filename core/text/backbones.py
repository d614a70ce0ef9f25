"""Text models of transformers as backbones: an encoder with one feature a text, and a language model.

    >>> encoder = TextEncoder("path/to/all-MiniLM-L6-v2")
    >>> batch = encoder.tokenizer.pad(encoder.tokenizer.ids(["one text", "and another"]))
    >>> encoder(batch).shape
    torch.Size([2, 384])

Inputs are mappings, ``{"input_ids", "attention_mask"}`` and what else the model reads, each [batch, tokens]. A domain
subclasses them to say what ``auto`` and ``nano`` stand for.
"""

from __future__ import annotations

from core.text.encoder import Pooling as Pooling
from core.text.encoder import TextEncoder
from core.text.language_model import DType as DType
from core.text.language_model import LanguageModel
from core.text.text_backbone import TextBackbone, positions_in

__all__ = ["LanguageModel", "TextBackbone", "TextEncoder", "positions_in"]
