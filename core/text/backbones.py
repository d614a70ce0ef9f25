"""Text models of transformers as backbones: an encoder with one feature a text, and a language model.

    >>> encoder = TextEncoder("path/to/all-MiniLM-L6-v2")
    >>> batch = encoder.tokenizer.pad(encoder.tokenizer.ids(["one text", "and another"]))
    >>> encoder(batch).shape
    torch.Size([2, 384])

Inputs are mappings, ``{"input_ids", "attention_mask"}`` and what else the model reads, each [batch, tokens]. A domain
subclasses them to say what ``auto`` and ``nano`` stand for.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core import hub
from core.backbone import Backbone
from core.errors import ScionError, listed
from core.hub import Wanted
from core.text.reading import (
    Inputs,
    arguments_of,
    check_inputs,
    choosing,
    is_accepted,
    last_positions,
    mask_of,
    pooled,
    positions_of,
)
from core.text.sentence_folder import SentenceFolder, read_sentence_folder
from core.text.tokens import Tokenizer, load_tokenizer

Pooling = Literal["auto", "cls", "mean", "pooler"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

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
        tables = _tables()
        writing = set(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        masked = set(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES) - writing
        if self.has_head:
            return sorted(masked)
        return sorted(masked | set(tables.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES))

    def class_of(self, kind: str) -> Any:
        tables = _tables()
        if self.has_head:
            return _class_in(tables.MODEL_FOR_MASKED_LM_MAPPING, kind)
        is_listed = kind in tables.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
        return _class_in(tables.MODEL_FOR_TEXT_ENCODING_MAPPING if is_listed else tables.MODEL_MAPPING, kind)

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
            where: boolean [batch, tokens].

        Returns:
            [labels, vocabulary], in the order of the positions, row by row.

        Raises:
            ScionError: it was built without a head.
        """
        return self.head_at(inputs, where)

    def _body_output(self, inputs: Inputs) -> Any:
        return self.body()(**self.arguments(inputs))


class LanguageModel(TextBackbone):
    """A causal language model, or one of encoder and decoder, with its own head.

    Of a model of encoder and decoder the states and logits are the decoder's. What it reads is ``decoder_input_ids``,
    or else ``labels`` among the inputs, moved by the model's own rule; without either, its start token alone.

    Args:
        name: see `TextBackbone`.
        pretrained: see `TextBackbone`.
        dtype: of the weights; ``auto`` is what the files are in.
        max_length: see `TextBackbone`.

    Raises:
        ScionError: as `TextBackbone`.
    """

    title = "a language model"
    readings = ("feature", "tokens", "logits")

    def __init__(self, name: str = "auto", pretrained: bool = True, dtype: DType = "float32",
                 max_length: int | None = None) -> None:
        self._dtype = dtype
        super().__init__(name, pretrained, max_length)
        self.is_encoder_decoder: bool = self.model.config.is_encoder_decoder  # type: ignore[union-attr]

    def types(self) -> Sequence[str]:
        tables = _tables()
        # Encoders have classes there that read from left to right, which their weights were not trained for.
        causal = set(tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        return sorted(causal | set(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES))

    def class_of(self, kind: str) -> Any:
        tables = _tables()
        has_two = kind in tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return _class_in(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if has_two
                         else tables.MODEL_FOR_CAUSAL_LM_MAPPING, kind)

    def number_type(self) -> Any:
        return "auto" if self._dtype == "auto" else getattr(torch, self._dtype)

    def body(self) -> nn.Module:
        return self.model.get_decoder()  # type: ignore[operator]

    def forward(self, inputs: Inputs) -> Tensor:
        """inputs [batch, tokens] -> the state at each sample's last token [batch, dim]"""
        arguments = self.arguments(inputs)
        mask = arguments["decoder_attention_mask"] if self.is_encoder_decoder else mask_of(inputs)
        states = self._states(arguments)
        if mask is None:
            mask = torch.ones_like(states[:, :, 0])
        if mask.dim() != 2:
            raise ScionError("a row that is packed of several samples has no one feature; give each a row of its own")
        return states[torch.arange(len(states), device=states.device), last_positions(mask)]

    def tokens(self, inputs: Inputs) -> Tensor:
        """inputs [batch, tokens] -> all final states [batch, tokens, dim]"""
        return self._states(self.arguments(inputs))

    def logits(self, inputs: Inputs, where: Tensor) -> Tensor:
        """The language-model head at some positions only.

        Args:
            inputs: [batch, tokens].
            where: boolean [batch, tokens], of the decoder's tokens where there are two stacks.

        Returns:
            [labels, vocabulary], in the order of the positions, row by row: the scores of what comes next there.
        """
        return self.head_at(inputs, where)

    def _states(self, arguments: dict[str, Any]) -> Tensor:
        # By way of the whole model, whose head then has nothing to do: some heads call an inner part of the body.
        with choosing(self.body(), None) as final:
            self.model(**arguments)
        assert final.states is not None
        return final.states

    def arguments(self, inputs: Inputs) -> dict[str, Any]:
        arguments = super().arguments(inputs)
        if is_accepted(self.model, "use_cache"):
            arguments["use_cache"] = False  # what a cache keeps is of use when text is generated, not here
        mask = mask_of(inputs)
        if self.is_encoder_decoder:
            return {**arguments, **self._decoder_arguments(inputs)}
        if mask.dim() == 4:
            arguments["attention_mask"] = self._mask_of_pairs(mask)
        elif mask.is_meta:
            pass  # without padding, positions are those that the model counts
        elif "position_ids" not in arguments and is_accepted(self.model, "position_ids"):
            arguments["position_ids"] = positions_of(mask)
        return arguments

    def _decoder_arguments(self, inputs: Inputs) -> dict[str, Tensor | None]:
        """What the decoder reads, and which of it is no padding."""
        ids = inputs.get("decoder_input_ids")
        mask = inputs.get("decoder_attention_mask")
        if ids is None:
            labels = inputs.get("labels")
            if labels is None:
                ids = inputs["input_ids"].new_full((len(inputs["input_ids"]), 1), self._start())
            else:
                ids = self.model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[operator]
                mask = self._read(labels)
        if mask is None:
            mask = torch.ones_like(ids)
        return {"decoder_input_ids": ids, "decoder_attention_mask": None if mask.is_meta else mask}

    def _start(self) -> int:
        """The token with which a decoder begins."""
        config: Any = self.model.config
        for name in ("decoder_start_token_id", "bos_token_id", "eos_token_id"):
            found = getattr(config, name, None)
            if found is not None:
                return found
        raise ScionError(f"{config.model_type}: its config.json names no token to begin with; give labels or "
                         "decoder_input_ids")

    def _read(self, labels: Tensor) -> Tensor:
        """1 up to each sample's last label: the decoder reads nothing behind it."""
        numbers = torch.arange(labels.shape[1], device=labels.device)
        last = ((labels >= 0).long() * numbers).amax(dim=1)
        return (numbers <= last[:, None]).long()

    def _mask_of_pairs(self, mask: Tensor) -> Tensor:
        """A boolean mask [batch, 1, queries, keys] as the model's attention takes it."""
        config: Any = self.model.config
        window = getattr(config, "sliding_window", None)
        if window is not None and mask.shape[-1] > window:
            raise ScionError(f"{config.model_type} looks back {window} tokens in some layers, which a mask for each "
                             f"query does not say: packed rows have at most {window} tokens")
        if mask.dtype != torch.bool or config._attn_implementation == "sdpa":
            return mask
        if config._attn_implementation != "eager":
            raise ScionError(f"packed rows need sdpa or eager attention, not {config._attn_implementation}")
        # Attention that is written out adds its mask to the scores; a boolean one would be added as ones.
        number_type: torch.dtype = self.model.dtype  # type: ignore[assignment]
        closed = torch.finfo(number_type).min
        return torch.zeros_like(mask, dtype=number_type).masked_fill(~mask, closed)


def _tables() -> Any:
    """transformers' tables of its classes."""
    hub.transformers()
    from transformers.models.auto import modeling_auto

    return modeling_auto


def _class_in(table: Any, kind: str) -> Any:
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
