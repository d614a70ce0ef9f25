"""A language model as a backbone: the states of its decoder, and its own head where something is to be said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.errors import ScionError
from core.text.finite_masks import keep_masks_finite
from core.text.reading import Inputs, choosing, is_accepted, last_positions, mask_of, positions_of
from core.text.text_backbone import TextBackbone, class_in, class_tables

DType = Literal["auto", "float32", "bfloat16", "float16"]


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
        keep_masks_finite(self.model)
        self.is_encoder_decoder: bool = self.model.config.is_encoder_decoder  # type: ignore[union-attr]

    def types(self) -> Sequence[str]:
        tables = class_tables()
        # Encoders have classes there that read from left to right, which their weights were not trained for.
        causal = set(tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
        return sorted(causal | set(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES))

    def class_of(self, kind: str) -> Any:
        tables = class_tables()
        has_two = kind in tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        return class_in(tables.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if has_two
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
            where: boolean [batch, tokens], of the decoder's tokens where there are two stacks; or the positions'
                numbers (`core.text.reading.rows_of`).

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
            # No values to look into: without padding, positions are those that the model counts, and a mask for each
            # query is taken as it is.
            if arguments["attention_mask"] is None:
                tokens = mask.shape[1]
                arguments["attention_mask"] = mask.new_ones(len(mask), 1, tokens, tokens, dtype=torch.bool)
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
