"""What texts are written from: prompts as ids, and the batches in which they are worked on.

Batches follow from all the prompts and the settings, and not from which texts are there already: a run that goes on
after a kill computes each text in the same batch as one that was not killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.errors import ScionError
from core.text.backbones import LanguageModel
from core.text.generate_settings import GenerateSettings

WINDOW = 16
"""Batches of neighbouring prompts that are sorted by length together: texts are kept in memory until those before them
are written, and lost when the process is killed."""


@dataclass(frozen=True)
class Prompt:
    """A text to go on from.

    Args:
        text: the text.
        id: what it is called in files and messages; None is its number.
    """

    text: str
    id: str | None = None


@dataclass(frozen=True)
class Row:
    """One text to be written."""

    number: int
    """Of its prompt."""
    sample: int
    """Its own among those of the prompt."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model reads it."""

    number: int
    id: str
    text: str
    ids: list[int]
    room: int
    """Tokens that may follow it."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"prompt {self.id}"

    @property
    def digest(self) -> str:
        """A hash by which files know the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def encode_prompts(backbone: LanguageModel, prompts: Sequence[str | Prompt], settings: GenerateSettings,
                   further: int = 0) -> list[EncodedPrompt]:
    """Prompts as ids, each with the room behind it.

    Args:
        backbone: its tokenizer makes the ids, and its context limits them.
        prompts: at least one.
        settings: how many tokens are to follow.
        further: positions that methods take for tokens of their own.

    Raises:
        ScionError: there is none, two have one id, or one is empty or leaves no room in the model's context.
    """
    named = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    if not named:
        raise ScionError("no prompts to go on from; give at least one")
    tokenizer = backbone.tokenizer
    before, behind = tokenizer.around()
    found: list[EncodedPrompt] = []
    all_ids = tokenizer.ids([prompt.text for prompt in named], special=False)
    for number, (prompt, own) in enumerate(zip(named, all_ids, strict=True)):
        name = str(number) if prompt.id is None else prompt.id
        if not own:
            raise ScionError(f"prompt {name}: {'empty' if not prompt.text else 'no token of the tokenizer in it'}; "
                             "give it a text to go on from")
        # What stands behind a text ends it: an encoder has read all of it then, and a causal model is to go on.
        ids = before + own + (behind if backbone.is_encoder_decoder else [])
        room = _room(backbone, name, len(ids), settings, further)
        found.append(EncodedPrompt(number, name, prompt.text, ids, room))
    _check_ids(found)
    return found


def _check_ids(prompts: Sequence[EncodedPrompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ScionError(f"two prompts have the id {prompt.id!r}; give each one of its own")
        seen.add(prompt.id)


def _room(backbone: LanguageModel, name: str, length: int, settings: GenerateSettings, further: int) -> int:
    """How many tokens may follow a prompt of ``length`` tokens."""
    context = backbone.max_length
    if backbone.is_encoder_decoder:
        if context is not None and length > context:
            raise ScionError(f"prompt {name}: {length} tokens, and the model's context has {context}; shorten it")
        positions = backbone.positions  # of the decoder, whose first one is the start token's
        return settings.max_new_tokens if positions is None else min(settings.max_new_tokens, positions - 1)
    if context is None:
        return settings.max_new_tokens
    taken = f"{length} tokens" if not further else f"{length} tokens and {further} of the methods"
    if length + further >= context:
        raise ScionError(f"prompt {name}: {taken}, and the model's context has {context}, which leaves no room for a "
                         "text; shorten it")
    return min(settings.max_new_tokens, context - length - further)


def batches(prompts: Sequence[EncodedPrompt], settings: GenerateSettings, equal_lengths: bool = False
            ) -> Iterator[list[list[Row]]]:
    """The batches of one window after the other: the shortest prompts together, so that little is padded.

    Args:
        prompts: all of them.
        settings: how large a batch is, and how many texts a prompt has.
        equal_lengths: whether a batch may hold prompts of one length only.
    """
    size = max(1, WINDOW * settings.batch_size // settings.samples)
    for start in range(0, len(prompts), size):
        window = prompts[start:start + size]
        rows = [Row(prompt.number, sample) for prompt in window for sample in range(settings.samples)]
        # The longest first: a batch that does not fit into memory is met at once.
        rows.sort(key=lambda row: (-prompts[row.number].room, -len(prompts[row.number].ids), row.number, row.sample))
        yield _split(rows, prompts, settings, equal_lengths)


def _split(rows: Sequence[Row], prompts: Sequence[EncodedPrompt], settings: GenerateSettings, equal_lengths: bool
           ) -> list[list[Row]]:
    found: list[list[Row]] = []
    for row in rows:
        if not found or not _fits(row, found[-1], prompts, settings, equal_lengths):
            found.append([])
        found[-1].append(row)
    return found


def _fits(row: Row, batch: Sequence[Row], prompts: Sequence[EncodedPrompt], settings: GenerateSettings,
          equal_lengths: bool) -> bool:
    """Whether a row may join a batch of others that are as long or longer."""
    longest, own = prompts[batch[0].number], prompts[row.number]
    if len(batch) >= settings.batch_size:
        return False
    # All rows of a batch run as long as the longest text: beyond its own room one would run out of the context.
    if own.room != longest.room or (equal_lengths and len(own.ids) != len(longest.ids)):
        return False
    if settings.batch_tokens is None:
        return True
    tokens = (len(batch) + 1) * settings.beams * (len(longest.ids) + longest.room)
    return tokens <= settings.batch_tokens
