"""What text models of transformers have in common as backbones: found by name, a tokenizer, a longest text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from core import hub
from core.backbone import Backbone
from core.errors import ScionError
from core.hub import Wanted
from core.text.reading import Inputs, arguments_of, check_inputs, choosing
from core.text.tokens import Tokenizer, load_tokenizer

LONGEST = 10**6
"""Tokens beyond which a limit is none: tokenizers without one name a number of 31 digits."""


class TextBackbone(Backbone):
    """What encoders and language models have in common: a model by name, its tokenizer, and the longest text.

    Args:
        name: ``auto`` (the domain's default, if it is cached or can be fetched, else its ``nano`` with a warning), a
            hub id, a folder with config.json and model.safetensors, or ``nano`` where the domain has one.
        pretrained: False builds the architecture of that name with random weights; the tokenizer is the same.
        max_length: tokens of the longest text, special ones included; None takes what the model's files say.

    Raises:
        ScionError: the name leads nowhere, the model is of another kind or has no safetensors, or there is no tokenizer
            that fits it.
    """

    default: ClassVar[str] = ""
    """What ``auto`` stands for: a name on the hub."""
    nano_folder: ClassVar[Path | None] = None
    """The small model that comes along with the domain."""
    nano_maker: ClassVar[str] = ""
    """The command that makes it."""
    title: ClassVar[str] = "a text model"
    """What is looked for, as messages call it."""
    readings: tuple[str, ...] = ("feature", "tokens")
    """What tasks can read of it."""
    optional_readings = ("logits",)

    def __init__(self, name: str = "auto", pretrained: bool = True, max_length: int | None = None) -> None:
        super().__init__()
        if max_length is not None and max_length < 1:
            raise ScionError(f"backbone.max_length: {max_length} is too small, at least 1 wanted")
        note = None
        if name == "auto":
            name, note = self._auto()
        self.source = hub.find(name, self.wanted(), weights=pretrained)
        kind = hub.model_type(self.source)
        hub.check_type(self.source, kind, self.types(), self.wanted())
        self._tokenizer = load_tokenizer(self.source)
        self.model = self._build(kind, pretrained)
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary: int = table.weight.shape[0]
        """Rows of the embedding, which is the width of the logits."""
        notes = [text for text in (note, self.tokenizer.check_rows(self.vocabulary)) if text]
        self.dim = self.model.config.hidden_size  # type: ignore[union-attr]
        self.positions = positions_in(self.model)
        """Tokens that the model has positions for; None where it has no table of them."""
        self.max_length = self._longest(max_length)
        where = self.source.kind if pretrained else "random"
        self.origin = {"name": name, "pretrained": pretrained, "kind": where}
        if notes:
            self.origin["note"] = "; ".join(notes)

    @classmethod
    def wanted(cls) -> Wanted:
        """What is looked for by name."""
        names = [cls.default] if cls.default else []
        return Wanted(cls.title, names, cls.nano_folder, cls.nano_maker)

    def _auto(self) -> tuple[str, str | None]:
        if self.default:
            return hub.auto(self.default, nano="nano" if self.nano_folder is not None else None)
        raise ScionError(f"backbone.name: {type(self).__name__} has no default that auto could stand for; give a hub "
                         "id (owner/name) or a folder")

    # ------------------------------------------------------------------------------------------ building

    @abstractmethod
    def types(self) -> Sequence[str]:
        """transformers' names of the types of models that will do."""

    @abstractmethod
    def class_of(self, kind: str) -> Any:
        """transformers' class for a model of such a type."""

    def options_of(self, model_class: Any) -> dict[str, Any]:
        """Further arguments of that class."""
        return {}

    def _build(self, kind: str, pretrained: bool) -> nn.Module:
        library = hub.transformers()
        options = self.options_of(self.class_of(kind))
        if pretrained:
            options["dtype"] = self.number_type()
            return hub.load(self.source, self.wanted(), self.types(), self.class_of, **options)
        try:
            config = library.CONFIG_MAPPING[kind].from_pretrained(self.source.where, **self.source.options)
            model = self.class_of(kind)(config, **options)
        except Exception as error:  # of a folder's config.json, which may hold anything
            what = self.wanted().bare_title
            raise ScionError(f"backbone.name: {self.source.name!r}: its config.json gives no {what} "
                             f"({hub.first_line(error)})") from None
        number_type = self.number_type()
        return model if number_type == "auto" else model.to(number_type)

    def number_type(self) -> Any:
        """The floating-point type of the weights, as ``from_pretrained`` takes it."""
        return torch.float32

    def _longest(self, asked: int | None) -> int | None:
        limits = [self.positions, self.tokenizer.fast.model_max_length]
        known = [limit for limit in limits if limit is not None and limit < LONGEST]
        if asked is not None and self.positions is not None and asked > self.positions:
            raise ScionError(f"backbone.max_length: {asked} tokens, and the model has {self.positions} positions")
        return asked if asked is not None else min(known, default=None)

    # ------------------------------------------------------------------------------------------ the tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, to which data are bound."""
        return self._tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """A short hash that knows the tokenizer."""
        return self.tokenizer.fingerprint

    def save_beside(self, folder: Path) -> str:
        self.tokenizer.fast.save_pretrained(folder)
        return "transformers' AutoTokenizer opens it too"

    # ------------------------------------------------------------------------------------------ readings

    def width(self, reading: str) -> int:
        """Numbers in the last dimension of a reading: the vocabulary's for logits, else the states'."""
        return self.vocabulary if reading == "logits" else self.dim

    @abstractmethod
    def tokens(self, inputs: Inputs) -> Tensor:
        """inputs [batch, tokens] -> all final states [batch, tokens, dim]"""

    def body(self) -> nn.Module:
        """The part of the model whose final states its head reads."""
        return self.model.base_model  # type: ignore[return-value]

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        """The model's arguments for a batch."""
        check_inputs(inputs, type(self).__name__, self.positions)
        return arguments_of(self.model, inputs)

    def head_at(self, inputs: Inputs, where: Tensor) -> Tensor:
        """The model's own head at the positions ``where`` -> [labels, vocabulary]."""
        if "logits" not in self.readings:
            raise ScionError(f"backbone {type(self).__name__} was built without its language-model head; set head: "
                             "true")
        with choosing(self.body(), where):
            output: Any = self.model(**self.arguments(inputs))
        return output.logits[0]


def class_tables() -> Any:
    """transformers' tables of its classes."""
    hub.transformers()
    from transformers.models.auto import modeling_auto

    return modeling_auto


def class_in(table: Any, kind: str) -> Any:
    """The class for a type of model in one of transformers' tables."""
    found = table[hub.transformers().CONFIG_MAPPING[kind]]
    return found[0] if isinstance(found, tuple) else found


def positions_in(model: nn.Module) -> int | None:
    """Tokens that a model has positions for; None where positions are computed."""
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None or longest < 1:
        return None
    for name, module in model.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(module, nn.Embedding):
            continue
        if module.padding_idx is not None:  # RoBERTa counts from behind it
            return module.num_embeddings - module.padding_idx - 1
    return longest
