"""An encoder of text as a backbone: one feature a text, all its states, and its masked-language-model head."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from core.errors import ScionError, listed
from core.text.reading import Inputs, mask_of, pooled
from core.text.sentence_folder import SentenceFolder, read_sentence_folder, write_sentence_folder
from core.text.text_backbone import TextBackbone, class_in, class_tables

Pooling = Literal["auto", "cls", "mean", "pooler"]


class TextEncoder(TextBackbone):
    """An encoder of text: ids [batch, tokens] in, one feature [batch, dim] a text out.

    Args:
        name: see `TextBackbone`; a folder of sentence-transformers also says how to pool, prompts, and the length.
        pretrained: see `TextBackbone`.
        pooling: ``mean`` over a text's tokens; ``cls``, its first token's state; ``pooler``, the model's trained map of
            that; ``auto`` is what a folder of sentence-transformers says (scaling to length 1 included), else ``mean``.
        max_length: see `TextBackbone`.
        head: keep the model's masked-language-model head, which `logits` reads.

    Raises:
        ScionError: as `TextBackbone`; or the model has no such pooling or head.
    """

    title = "a text encoder"

    def __init__(self, name: str = "auto", pretrained: bool = True, pooling: Pooling = "auto",
                 max_length: int | None = None, head: bool = False) -> None:
        self.has_head, self._asked = head, pooling  # read while the model is built
        super().__init__(name, pretrained, max_length)
        self.folder: SentenceFolder = read_sentence_folder(self.source)
        self.pooling, self.normalise = self._poolings(pooling)
        if self.folder.max_length is not None and max_length is None:
            self.max_length = min(self.folder.max_length, self.max_length or self.folder.max_length)
        if head:
            self.readings = ("feature", "tokens", "logits")

    def _poolings(self, asked: Pooling) -> tuple[str, bool]:
        """How to pool, and whether to scale to length 1."""
        if asked == "pooler" and (self.has_head or getattr(self.model, "pooler", None) is None):
            beside = " beside its language-model head" if self.has_head else ""
            raise ScionError(f"backbone.pooling: {type(self.model).__name__} has no pooler{beside}; take mean or cls")
        if asked != "auto":
            return asked, False
        if self.folder.further:
            also = listed(self.folder.further)
            raise ScionError(f"backbone.pooling: the folder's embeddings also take {also}, which is not read here; "
                             "choose pooling: mean or cls")
        return self.folder.pooling or "mean", self.folder.normalise

    def types(self) -> Sequence[str]:
        tables = class_tables()
        writing = set(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        masked = set(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES) - writing
        if self.has_head:
            return sorted(masked)
        return sorted(masked | set(tables.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES))

    def class_of(self, kind: str) -> Any:
        tables = class_tables()
        if self.has_head:
            return class_in(tables.MODEL_FOR_MASKED_LM_MAPPING, kind)
        is_listed = kind in tables.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        return class_in(tables.MODEL_FOR_TEXT_ENCODING_MAPPING if is_listed else tables.MODEL_MAPPING, kind)

    def options_of(self, model_class: Any) -> dict[str, Any]:
        # A pooler that nothing reads would be drawn at random where the files have none, and counted everywhere.
        if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
            return {"add_pooling_layer": self._asked == "pooler"}
        return {}

    @property
    def prompts(self) -> dict[str, str]:
        """Texts that the model wants before others, by name: ``{"query": "query: ", "passage": "passage: "}``."""
        return dict(self.folder.prompts)

    def prompted(self, texts: Sequence[str], prompt: str | None = None) -> list[str]:
        """Texts as the model wants them: in lower case if it does, behind a prompt.

        Args:
            texts: the texts.
            prompt: the prompt's name; None takes the folder's default one, if there is one.

        Raises:
            ScionError: there is no prompt of that name.
        """
        name = prompt if prompt is not None else self.folder.default_prompt
        if name is not None and name not in self.folder.prompts:
            raise ScionError(f"the text encoder has no prompt {name!r}; there are "
                             f"{listed(self.folder.prompts) or 'none'}")
        before = "" if name is None else self.folder.prompts[name]
        found = [before + text for text in texts]
        return [text.lower() for text in found] if self.folder.lower_case else found

    def save_beside(self, folder: Path) -> str:
        """The tokenizer, and the files by which sentence-transformers makes the same embeddings; it has no words for
        ``pooler``."""
        found = super().save_beside(folder)
        if self.pooling == "pooler":
            return found
        longest = self.max_length if self.max_length is not None else self.folder.max_length
        said = replace(self.folder, pooling=self.pooling, normalise=self.normalise, further=(), max_length=longest)
        write_sentence_folder(folder, said, self.dim)
        return "SentenceTransformer(folder) opens it too"

    def forward(self, inputs: Inputs) -> Tensor:
        """inputs [batch, tokens] -> features [batch, dim]"""
        output = self._body_output(inputs)
        if self.pooling == "pooler":
            feature = output.pooler_output
        else:
            states = output.last_hidden_state
            feature = pooled(states, mask_of(inputs), self.pooling)
        return nn.functional.normalize(feature, dim=-1) if self.normalise else feature

    def tokens(self, inputs: Inputs) -> Tensor:
        """inputs [batch, tokens] -> all final states [batch, tokens, dim]"""
        return self._body_output(inputs).last_hidden_state

    def logits(self, inputs: Inputs, where: Tensor) -> Tensor:
        """The masked-language-model head at some positions only.

        Args:
            inputs: [batch, tokens].
            where: boolean [batch, tokens], or the positions' numbers (`core.text.reading.rows_of`).

        Returns:
            [labels, vocabulary], in the order of the positions, row by row.

        Raises:
            ScionError: it was built without a head.
        """
        return self.head_at(inputs, where)

    def _body_output(self, inputs: Inputs) -> Any:
        return self.body()(**self.arguments(inputs))
