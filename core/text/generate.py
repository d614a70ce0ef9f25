"""Texts written by a language model, with whatever methods are attached to it.

    >>> settings = GenerateSettings(max_new_tokens=64, temperature=0.7, samples=3, stop="\\n\\n")
    >>> for text in generate(tuner, ["One prompt", "and another"], settings):
    ...     print(text.id, text.sample, text.why, text.text)

What a text is does not depend on the texts beside it: batches are padded on the left and masked, and a sample's draws
follow from the seed, its prompt's number and its own. In low precision the last bits of a sum do depend on a batch's
shape, and where two tokens are all but equally likely the texts may part.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import hub
from core.errors import ScionError
from core.graft import Graft, route_rows
from core.text.backbones import LanguageModel
from core.text.generate_settings import GenerateSettings
from core.text.generated import Generated, GeneratedFile
from core.text.prompts import EncodedPrompt, Prompt, Row, batches, encode_prompts
from core.text.sampling import Noise, processors
from core.text.stopping import Writing

OF_THE_MODEL = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "suppress_tokens",
                "begin_suppress_tokens")
"""What is taken of a model's own generation_config.json: how its texts begin and what is never in them, and not how
they are chosen."""

FEW = 8
"""Texts up to which there is no progress bar."""


def generate(tuner: Any, prompts: Sequence[str | Prompt], settings: GenerateSettings | None = None,
             file: str | Path | None = None, about: dict[str, str] | None = None, restart: bool = False
             ) -> list[Generated]:
    """Write ``samples`` texts for each prompt.

    A text is what its tokens decode to by themselves. It ends before a special token, a stop string or where a rule
    says so. Within ``with route.route(rows):`` each prompt has the row of its number, whatever the batches; rows of
    samples and beams follow.

    Args:
        tuner: a `LanguageModel`, or what has one as its ``backbone``.
        prompts: texts to go on from (of encoder and decoder, to read).
        settings: None is greedy.
        file: a name in ``.jsonl`` to write the texts to as they come, one a line; texts that are there already, of the
            same prompts and settings, are not written anew. None writes no file.
        about: what else the texts in a file follow from (the fingerprint of an adapter, say), by what messages call it.
        restart: begin a file anew that holds texts of other prompts or settings.

    Returns:
        All texts in the prompts' order, the samples of a prompt one after the other.

    Raises:
        ScionError: the backbone writes no texts, a prompt is empty or too long, the file holds other texts, or the
            model's scores are not finite.
    """
    settings = settings or GenerateSettings()
    backbone = _backbone_of(tuner)
    grafts = [module for module in backbone.modules() if isinstance(module, Graft) and module.live]
    encoded = encode_prompts(backbone, prompts, settings, _added_positions(grafts))
    writer = _Writer(backbone, encoded, settings, grafts)
    keys = [(prompt.id, sample, prompt.digest) for prompt in encoded for sample in range(settings.samples)]
    if file is None:
        return writer.write(len(keys), [], None)
    origin = {"settings": settings.record(), "set of prompts": _digest(encoded),
              "tokenizer": backbone.tokenizer_fingerprint, **(about or {})}
    written = GeneratedFile(file, keys, origin)
    with written.opened(restart):
        return writer.write(len(keys), written.done, written.add)


def _backbone_of(tuner: Any) -> LanguageModel:
    """The language model in a tuner, or itself."""
    found = getattr(tuner, "backbone", tuner)
    if not isinstance(found, LanguageModel):
        raise ScionError(f"{type(found).__name__} writes no texts; generation needs a LanguageModel as its backbone")
    if not found.model.can_generate():  # type: ignore[operator]
        raise ScionError(f"{type(found.model).__name__} writes no texts: transformers has no generation for it")
    return found


def _added_positions(grafts: Sequence[Graft]) -> int:
    """Positions of the context that methods take: all that stand in a row, of routed ones the most."""
    common = sum(graft.added_positions for graft in grafts if graft.route is None)
    routed = [graft.added_positions for graft in grafts if graft.route is not None]
    return common + max(routed, default=0)


def _digest(prompts: Sequence[EncodedPrompt]) -> str:
    """A hash of all the prompts in their order."""
    text = "\0".join(f"{prompt.id}\0{prompt.digest}" for prompt in prompts)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- batches


class _Writer:
    """Writes the texts of some prompts, batch by batch.

    Args:
        backbone: the model.
        prompts: all of them.
        settings: how.
        grafts: those that take part.
    """

    def __init__(self, backbone: LanguageModel, prompts: Sequence[EncodedPrompt], settings: GenerateSettings,
                 grafts: Sequence[Graft]) -> None:
        self.backbone, self.prompts, self.settings = backbone, prompts, settings
        self.model: Any = backbone.model
        self.grafts = grafts
        self.rows = _RowsOfGrafts(grafts, len(prompts))
        self.equal_lengths = any(graft.spans_tokens for graft in grafts)
        uncached = without_cache(grafts)
        self.cache = settings.cache and not uncached
        if settings.cache and uncached:
            names = ", ".join(dict.fromkeys(type(graft).__name__ for graft in uncached))
            warnings.warn(f"{names} look at whole sequences, whose earlier tokens are in no cache: texts are written "
                          "without one", stacklevel=4)
        self.ends, self.rules = _ends(backbone, settings), settings.rules

    def write(self, total: int, done: list[Generated], keep: Callable[[Generated], None] | None) -> list[Generated]:
        """All texts; those that are ``done`` are the first, and ``keep`` is given the others in their order."""
        from tqdm import tqdm

        results: list[Generated] = list(done)
        waiting: dict[int, Generated] = {}
        skip = len(done)
        hidden = total - skip <= FEW or not sys.stderr.isatty()
        with _evaluating(self.backbone), _own_choice(self.model), tqdm(
                total=total, initial=skip, unit="text", disable=hidden, file=sys.stderr) as bar:
            for window in batches(self.prompts, self.settings, self.equal_lengths):
                for batch in window:
                    missing = [row for row in batch if self._place(row) >= skip]
                    if not missing:
                        continue
                    # The whole batch, though some of its texts are there: so a text's batch is always the same.
                    for row, text in zip(batch, self._batch(batch), strict=True):
                        waiting[self._place(row)] = text
                    bar.update(len(missing))
                    while len(results) in waiting:
                        text = waiting.pop(len(results))
                        results.append(text)
                        if keep is not None:
                            keep(text)
        return results

    def _place(self, row: Row) -> int:
        """A text's place among all."""
        return row.number * self.settings.samples + row.sample

    def _batch(self, rows: Sequence[Row]) -> list[Generated]:
        prompts = [self.prompts[row.number] for row in rows]
        side = "right" if self.backbone.is_encoder_decoder else "left"
        inputs = self.backbone.tokenizer.pad([prompt.ids for prompt in prompts], side)
        device = self.model.get_input_embeddings().weight.device
        noises = [Noise(self.settings.seed, row.number, row.sample) for row in rows]
        watch = self._watch(len(rows), inputs["input_ids"].shape[1])
        cache = own_cache(self.backbone, self.grafts) if self.cache else {}
        with self.rows.of([row.number for row in rows]):
            ids: Tensor = self.model.generate(
                **cache,
                input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                generation_config=self._configuration(prompts[0].room), stopping_criteria=_criteria(watch),
                logits_processor=processors(self.settings, [prompt.name for prompt in prompts], noises))
        texts = watch.texts(ids)
        found = []
        for row, prompt, text in zip(rows, prompts, texts, strict=True):
            found.append(Generated(prompt.id, row.sample, prompt.digest, text.text, tuple(text.tokens), text.why))
        return found

    def _watch(self, rows: int, width: int) -> _Watch:
        """What follows the texts of a batch whose prompts have ``width`` tokens with their padding."""
        start = 1 if self.backbone.is_encoder_decoder else width  # a decoder begins with its start token
        kind = _BeamWatch if self.settings.beams > 1 else _Watch
        return kind(lambda: Writing(self.backbone.tokenizer, self.ends, self.rules), rows, start)

    def _configuration(self, room: int) -> Any:
        """transformers' settings; what is drawn is drawn by our own noise."""
        from transformers import GenerationConfig

        return GenerationConfig(max_new_tokens=room, do_sample=False, num_beams=self.settings.beams,
                                use_cache=self.cache, eos_token_id=sorted(self.ends) or None,
                                pad_token_id=self.backbone.tokenizer.pad_id)


def without_cache(grafts: Sequence[Graft]) -> list[Graft]:
    """Those for which earlier tokens must be computed anew at each step: they span tokens where one is written after
    the other, and not in an encoder."""
    return [graft for graft in grafts if graft.spans_tokens and (graft.site.around is None or graft.site.around.causal)]


def own_cache(backbone: LanguageModel, grafts: Sequence[Graft]) -> dict[str, Any]:
    """An empty cache as the model's argument, where grafts need another than the model makes: one whose layers are all
    alike, so that more can be put behind them. A model with windows would make some that forget."""
    from transformers import DynamicCache, EncoderDecoderCache

    if not any(graft.extends_cache for graft in grafts):
        return {}
    if backbone.is_encoder_decoder:
        return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}
    return {"past_key_values": DynamicCache()}


def _ends(backbone: LanguageModel, settings: GenerateSettings) -> frozenset[int]:
    """The ids that end a text: the model's, the tokenizer's, and special tokens among the stop strings, which are never
    in a text."""
    own = getattr(backbone.model.generation_config, "eos_token_id", None)
    found = set(own) if isinstance(own, (list, tuple)) else {own}
    found.add(backbone.tokenizer.end_id)
    for string in settings.stop_strings:
        number = backbone.tokenizer.backend.token_to_id(string)
        if number in backbone.tokenizer.special_ids:
            found.add(number)
    return frozenset(number for number in found if number is not None)


# ------------------------------------------------------------------------------------------------- watching


class _Watch:
    """Follows the texts of a batch while they are written: one of transformers' criteria to stop."""

    def __init__(self, make: Callable[[], Writing], rows: int, start: int) -> None:
        self.make, self.start = make, start
        self.writings = [make() for _ in range(rows)]

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        """ids [rows, tokens] -> which rows have stopped [rows]"""
        for writing, token in zip(self.writings, ids[:, -1].tolist(), strict=True):
            writing.add(token)
        return torch.tensor([writing.is_done for writing in self.writings], device=ids.device)

    def texts(self, ids: Tensor) -> list[Writing]:
        """The texts of the whole batch: ids [rows, tokens]."""
        return self.writings


class _BeamWatch(_Watch):
    """The same for beams, which change places and die out from step to step: it knows them by their tokens."""

    def __init__(self, make: Callable[[], Writing], rows: int, start: int) -> None:
        super().__init__(make, 0, start)
        self.known: dict[tuple[int, tuple[int, ...]], Writing] = {}
        self.prompts = rows

    def __call__(self, ids: Tensor, scores: Any) -> Tensor:
        """ids [prompts x candidates, tokens] -> which have stopped"""
        before, self.known = self.known, {}
        candidates = len(ids) // self.prompts
        is_done = []
        for row, tokens in enumerate(ids[:, self.start:].tolist()):
            prompt = row // candidates
            writing = self._followed(before.get((prompt, tuple(tokens[:-1]))), tokens)
            self.known[prompt, tuple(tokens)] = writing
            is_done.append(writing.is_done)
        return torch.tensor(is_done, device=ids.device)

    def _followed(self, before: Writing | None, tokens: Sequence[int]) -> Writing:
        """A text after its last token: as a copy, for several beams may go on from one."""
        if before is None:
            writing = self.make()
            for token in tokens:
                writing.add(token)
            return writing
        writing = before.copy()
        writing.add(tokens[-1])
        return writing

    def texts(self, ids: Tensor) -> list[Writing]:
        return [self._followed(None, tokens) for tokens in ids[:, self.start:].tolist()]


def _criteria(watch: _Watch) -> Any:
    from transformers import StoppingCriteriaList

    return StoppingCriteriaList([watch])  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------- the model


class _RowsOfGrafts:
    """What grafts know of each sample (a route), handed out batch by batch.

    Args:
        grafts: those that take part.
        prompts: how many there are.

    Raises:
        ScionError: a graft knows of another number of samples.
    """

    def __init__(self, grafts: Sequence[Graft], prompts: int) -> None:
        self.routes = [(graft, graft.route, graft.batch) for graft in grafts if graft.route is not None]
        self.others: list[tuple[Graft, str, Tensor]] = []
        for graft in grafts:
            for name in graft.sample_attributes:
                value = getattr(graft, name)
                if isinstance(value, Tensor):
                    self.others.append((graft, name, value))
        for value in [route for _, route, _ in self.routes] + [value for *_, value in self.others]:
            if len(value) != prompts:
                raise ScionError(f"{len(value)} samples are routed or split, and there are {prompts} prompts; give one "
                                 "entry for each prompt")

    @contextlib.contextmanager
    def of(self, numbers: Sequence[int]) -> Iterator[None]:
        """Within this context the grafts know of the prompts with these numbers, one a row."""
        # Grafts that share a route go on sharing one: neighbours on a site know each other by it.
        chosen = {id(route): route[list(numbers)] for _, route, _ in self.routes}
        try:
            for graft, route, _ in self.routes:
                route_rows([graft], chosen[id(route)], graft.variant)
            for graft, name, value in self.others:
                setattr(graft, name, value[list(numbers)])
            yield
        finally:
            for graft, route, rows in self.routes:
                graft.route, graft.batch = route, rows
            for graft, name, value in self.others:
                setattr(graft, name, value)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within this context a model is in eval mode, in all its parts."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def _own_choice(model: Any) -> Iterator[None]:
    """Within this context nothing of a model's generation_config.json chooses tokens (a temperature, a penalty)."""
    from transformers import GenerationConfig

    own = model.generation_config
    kept = {name: getattr(own, name, None) for name in OF_THE_MODEL}
    model.generation_config = GenerationConfig(**{name: value for name, value in kept.items() if value is not None})
    try:
        with hub.quiet():
            yield
    finally:
        model.generation_config = own
