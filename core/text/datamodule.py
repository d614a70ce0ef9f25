"""Data of texts: what every datamodule of a text domain shares.

A domain's class says where its texts and targets are; ids, padding, the longest text, an order by length, files for
prediction and examples for people are done here.

    class Reviews(TextDataModule):
        def load(self) -> None:
            self.classes = ["bad", "good"]
            self.train_set = self.text_set(texts, targets, "training texts")
            ...
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.data.batch import stack
from core.data.datamodule import DataModule, Source
from core.data.info import DataInfo
from core.errors import ScionError, listed
from core.text.files import STANDARD_INPUT, Record, has_columns, read_json_lines, read_records
from core.text.store import StoredIds, store_key, stored_ids
from core.text.tokens import IGNORED, Encoded, Tokenizer

Text = str | tuple[str, str]
"""What a model reads of a sample: one text, or two."""
TextInputs = dict[str, Tensor]
"""One sample as ids: ``input_ids`` and, where the model reads them, ``token_type_ids``, each [tokens]."""

EXAMPLE = 512
"""Tokens of an example batch, at most: where a model has no limit, costs are counted for texts of this length."""


class TextSet(Dataset):
    """Texts as ids, with their targets. An item is ``(inputs, target)``, inputs as `TextInputs`.

    Args:
        ids: the columns ``input_ids`` and, where the model reads them, ``token_type_ids``.
        targets: one for each text: a class, a tensor, or a mapping of tensors.

    Raises:
        ScionError: there are more or fewer targets than texts.
    """

    def __init__(self, ids: StoredIds, targets: Sequence[Any]) -> None:
        if len(ids) != len(targets):
            raise ScionError(f"data: {len(targets)} targets of {len(ids)} texts")
        self.ids, self.targets = ids, targets

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.ids.lengths().tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[TextInputs, Any]:
        columns = self.ids[index]
        inputs = {name: torch.tensor(numbers, dtype=torch.long) for name, numbers in columns.items()}
        return inputs, self.targets[index]


class TextDataModule(DataModule):
    """Texts, read by a backbone with a tokenizer.

    A subclass defines ``load``, in which `text_set` makes the sets. Where prediction reads other fields than ``text``
    (and ``text_pair``, if a line has one), it sets ``fields``.

    Args:
        max_length: tokens of the longest text, special ones included; longer ones are cut, of a pair the longer text
            first. None takes the backbone's.
        prompt: name of the prompt that is put before a text (`core.text.backbones.TextEncoder.prompts`); None takes the
            model's default one, if it has one.
        cache: folder in which ids are kept; None is ``$SCION_CACHE`` or ``~/.cache/scion``.
        root, source, batch_size, num_workers, seed, balanced, length_groups: see `core.data.DataModule`.
    """

    fields: ClassVar[tuple[str, ...]] = ("text",)
    """The one or two fields of a line that are read for prediction: ``("question", "context")``, ``("prompt",)``."""
    optional_fields: ClassVar[tuple[str, ...]] = ("text_pair",)
    """A field that is read where a line has it."""

    def __init__(self, root: str | None = None, source: Source = "auto", max_length: int | None = None,
                 prompt: str | None = None, cache: str | None = None, batch_size: int = 32, num_workers: int = 0,
                 seed: int | None = None, balanced: bool = False, length_groups: int | None = None) -> None:
        super().__init__(root, source, batch_size, num_workers, seed, balanced, length_groups)
        if max_length is not None and max_length < 1:
            raise ScionError(f"data.max_length: {max_length} must be at least 1")
        self.max_length = max_length
        self.prompt = prompt
        caches = cache or os.environ.get("SCION_CACHE") or "~/.cache/scion"
        self.cache = Path(os.path.expanduser(caches)) / "text"
        self._tokenizer: Tokenizer | None = None
        self._prompted: Callable[..., list[str]] | None = None
        self._limit = max_length

    # ------------------------------------------------------------------------------ the backbone's tokenizer

    def bind(self, backbone: Any) -> None:
        """Take the backbone's tokenizer, the length of its longest text, and its prompts.

        Raises:
            ScionError: it has no tokenizer, or takes shorter texts than ``max_length``, or has no such prompt.
        """
        tokenizer = getattr(backbone, "tokenizer", None)
        if not isinstance(tokenizer, Tokenizer):
            raise ScionError(f"data: {type(self).__name__} holds texts, and the backbone {type(backbone).__name__} has "
                             "no tokenizer; take a text backbone")
        longest = getattr(backbone, "max_length", None)
        if self.max_length is not None and longest is not None and self.max_length > longest:
            raise ScionError(f"data.max_length: {self.max_length} tokens, and the backbone takes {longest}")
        self._tokenizer = tokenizer
        self._limit = longest if self.max_length is None else self.max_length
        self._prompted = getattr(backbone, "prompted", None)
        if self.prompt is not None:
            self._with_prompt([""])

    @property
    def tokenizer(self) -> Tokenizer:
        """The backbone's tokenizer.

        Raises:
            ScionError: the data are bound to none.
        """
        if self._tokenizer is None:
            raise ScionError(f"data: {type(self).__name__} has no tokenizer yet; call bind(backbone) before setup")
        return self._tokenizer

    @property
    def longest(self) -> int | None:
        """Tokens that texts are cut to; None where there is no limit."""
        return self._limit

    @property
    def info(self) -> DataInfo:
        """The classes, and the tokenizer's ids once it is known."""
        found = super().info
        if self._tokenizer is None:
            return found
        return replace(found, special_ids=self._tokenizer.special_by_name, vocabulary=self._tokenizer.size)

    # ------------------------------------------------------------------------------ from texts to ids

    def text_set(self, texts: Sequence[Text], targets: Sequence[Any], what: str = "texts") -> TextSet:
        """Texts and their targets as a data set; the ids are made once and kept in the cache.

        Args:
            texts: one text or a pair for each sample; anything with a length that can be iterated over more than once.
            targets: one for each.
            what: they are, for messages.
        """
        key = store_key(_content_of(texts), self.tokenizer.fingerprint, self.longest, self.prompt or "",
                        *self._with_prompt([""]))
        return TextSet(stored_ids(self.cache, key, texts, self._columns, self._column_names(), what), targets)

    def encode(self, texts: Iterable[Text]) -> list[Encoded]:
        """Texts or pairs as ids: behind the prompt, cut to the longest.

        Raises:
            ScionError: some are single texts and some pairs.
        """
        items = list(texts)
        firsts = [item if isinstance(item, str) else item[0] for item in items]
        seconds = [item[1] for item in items if not isinstance(item, str)]
        if seconds and len(seconds) != len(items):
            raise ScionError(f"data: {len(seconds)} of {len(items)} samples are pairs of texts, the others single ones")
        return self.tokenizer.encode(self._with_prompt(firsts), seconds or None, self.longest)

    def _with_prompt(self, texts: list[str]) -> list[str]:
        """Texts as the model wants them, where it says so."""
        if self._prompted is not None:
            return self._prompted(texts, self.prompt)
        if self.prompt is not None:
            raise ScionError(f"data.prompt: {self.prompt!r}, and the backbone has no prompts; leave it out")
        return texts

    def _column_names(self) -> tuple[str, ...]:
        return ("input_ids", "token_type_ids") if self.tokenizer.has_types else ("input_ids",)

    def _columns(self, texts: Sequence[Text]) -> list[dict[str, list[int]]]:
        """The ids of some texts as the store takes them."""
        names = self._column_names()
        found = []
        for sample in self.encode(texts):
            columns = {"input_ids": sample.ids, "token_type_ids": sample.types}
            found.append({name: columns[name] for name in names})
        return found

    # ------------------------------------------------------------------------------ batches

    def collate(self, train: bool) -> Callable[[list[Any]], Any]:
        """Makes a batch of samples, each padded to the longest of them."""
        return self.batch

    def batch(self, samples: Sequence[tuple[TextInputs, Any]]) -> tuple[TextInputs, Any]:
        """Samples as (inputs, targets): inputs as `stack` makes them; ``labels`` among the targets, one for each token,
        are padded with -100, other targets are stacked."""
        inputs = self.stack([sample for sample, _ in samples])
        targets = [target for _, target in samples]
        if not isinstance(targets[0], Mapping) or "labels" not in targets[0]:
            return inputs, stack(targets)
        rows = [target["labels"] for target in targets]
        padded: TextInputs = {"labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)}
        others = [{name: value for name, value in target.items() if name != "labels"} for target in targets]
        return inputs, {**stack(others), **padded}

    def stack(self, inputs: Sequence[Any]) -> TextInputs:
        """Samples as one batch: ``input_ids``, ``attention_mask`` and what else they have, [samples, tokens]."""
        ids = [sample["input_ids"].tolist() for sample in inputs]
        further = [name for name in inputs[0] if name != "input_ids"]
        columns = {name: [sample[name].tolist() for sample in inputs] for name in further}
        return self.tokenizer.pad(ids, "right", **columns)

    def example(self, batch_size: int = 1) -> TextInputs:
        """A batch of the longest texts, of at most `EXAMPLE` tokens."""
        tokens = min(self.longest or EXAMPLE, EXAMPLE)
        ids = torch.full((batch_size, tokens), self.tokenizer.pad_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    # ------------------------------------------------------------------------------ files and people

    def read(self, file: str | Path) -> TextInputs:
        """The one text of a file.

        Raises:
            ScionError: it holds none, or several (`entries` gives all), or cannot be read.
        """
        made = [make for _, make in self.entries(str(file))]
        if len(made) != 1:
            raise ScionError(f"{file}: holds {len(made)} texts, where one is wanted")
        return made[0]()

    def entries(self, file: str) -> list[tuple[str, Callable[[], TextInputs]]]:
        """The texts of a file by file and line: JSON lines (``.jsonl``), a table with a header (``.tsv``), or else a
        text a line; ``-`` is standard input. What is wrong with a line is told when it is read. A line that ends the
        reading of a file (no UTF-8, no JSON) is the last entry."""
        found: list[tuple[str, Callable[[], TextInputs]]] = []
        try:
            for record in self._records(file):
                found.append((record.place, _reads(self.sample_of, record)))
        except ScionError as error:
            found.append((file, _raises(error)))
        return found

    def _records(self, file: str) -> Iterable[Record]:
        if len(self.fields) == 1:
            return read_records(file, plain=self.fields[0])
        if file == STANDARD_INPUT:
            return read_json_lines(file)
        if not has_columns(file):
            raise ScionError(f"{file}: a line of it is one text, and {listed(self.fields)} are wanted; give JSON lines "
                             "(.jsonl) or a table with a header (.tsv)")
        return read_records(file)

    def sample_of(self, record: Record) -> TextInputs:
        """One line of a file as the model reads it.

        Raises:
            ScionError: a field is missing or no text; the file and the line are named.
        """
        names = [*self.fields, *(name for name in self.optional_fields if name in record.fields)]
        texts = [record.text(name) for name in names]
        [columns] = self._columns([(texts[0], texts[1]) if len(texts) > 1 else texts[0]])
        return {name: torch.tensor(numbers, dtype=torch.long) for name, numbers in columns.items()}

    def text_of(self, dataset: Any, index: int) -> str | None:
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)):  # of a class of the domain's own
            return None
        inputs = sample[0]
        return self.tokenizer.decode(inputs["input_ids"].tolist())


def _content_of(texts: Iterable[Text]) -> str:
    """A hash of texts, by which their ids are found again."""
    digest = hashlib.sha256()
    for text in texts:
        parts = [text] if isinstance(text, str) else list(text)
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data) + data)
        digest.update(b";")
    return digest.hexdigest()


def _reads(read: Callable[[Record], TextInputs], record: Record) -> Callable[[], TextInputs]:
    return lambda: read(record)


def _raises(error: ScionError) -> Callable[[], TextInputs]:
    def fail() -> TextInputs:
        raise error

    return fail
