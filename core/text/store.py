"""Texts as ids, made once and kept in the cache: int32 files that are mapped into memory, not read into it.

A corpus is a folder of parts. Each part is whole or not there, is made by one process at a time and checked before it
is used, as every file of the cache (`core.data.file_cache`); one that was finished before a kill is not made again. A
part holds some tens of thousands of samples, so that making a corpus takes the memory of one part, whatever its size.

A part's file, all in int32: a mark, samples, columns, a checksum of the rest, and the items that the samples were made
of; where each column of each sample ends; then the numbers.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from core.data import file_cache
from core.errors import ScionError
from core.files import open_regular, write_atomically

Ids = NDArray[np.int32]
Item = TypeVar("Item")
Columns = Mapping[str, Sequence[int]]
"""The numbers of one sample: ``{"input_ids": [...]}``, and what else belongs to it."""
Encode = Callable[[Sequence[Item]], Sequence[Columns]]
"""Makes the numbers of some items."""

MARK, HEAD = 0x53434931, 5
"""What a part's file begins with, SCI1, and the numbers before its content."""
SAMPLES, NUMBERS = 2**16, 2**22
"""A part ends with so many samples, or with so many numbers: 16 MiB, a little more with the last sample."""
BATCH = 1024
"""Items that are tokenised at a time."""
LARGEST = 2**31


def store_key(data: object, fingerprint: str, max_length: int | None, *further: object) -> str:
    """The name of a corpus in the cache.

    Args:
        data: what the texts are, a data module's ``listing`` for instance.
        fingerprint: of the tokenizer.
        max_length: that texts are cut to.
        further: what else the numbers depend on: prompts, order, scope.
    """
    text = json.dumps([MARK, str(data), fingerprint, max_length, *map(str, further)])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


@dataclass(frozen=True)
class _Size:
    """What a part holds: samples, and the items that were read for them."""

    samples: int
    items: int


class StoredIds(Dataset):
    """Samples of a corpus by number, read from its files as they are asked for.

    An item is ``{column: int32 array}``, views of the mapped file.
    """

    def __init__(self, folder: Path, columns: Sequence[str], sizes: Sequence[int], items: int) -> None:
        self.folder = folder
        self.columns = tuple(columns)
        self.dropped = items - sum(sizes)
        """Items of which no sample was made, for their length for instance."""
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._parts: dict[int, _Part] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Ids]:
        part, row = self._find(index)
        return dict(zip(self.columns, part.sample(row), strict=True))

    def lengths(self, column: str = "input_ids") -> NDArray[np.int64]:
        """The length of each sample, for an order by length."""
        number = self.columns.index(column)
        found = [self._part(part).lengths(number) for part in range(len(self.starts) - 1)]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _find(self, index: int) -> tuple[_Part, int]:
        size = len(self)
        index = index + size if index < 0 else index
        if not 0 <= index < size:
            raise IndexError(f"sample {index} of {size}")
        number = bisect.bisect_right(self.starts, index) - 1
        return self._part(number), index - int(self.starts[number])

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            self._parts[number] = _Part(_part_file(self.folder, number), len(self.columns))
        return self._parts[number]

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file is pickled as all of its numbers; another process maps it for itself.
        return {**self.__dict__, "_parts": {}}


class _Part:
    """One file, mapped."""

    def __init__(self, file: Path, columns: int) -> None:
        numbers: Ids = np.memmap(file, np.dtype("<i4"), "r")
        samples = int(numbers[1])
        first = HEAD + samples * columns
        self.ends = numbers[HEAD:first].reshape(samples, columns)
        self.numbers = numbers[first:]
        self.columns = columns

    def sample(self, row: int) -> list[Ids]:
        """The columns of a sample."""
        start = int(self.ends[row - 1, -1]) if row else 0
        found = []
        for end in self.ends[row].tolist():
            found.append(self.numbers[start:end])
            start = end
        return found

    def lengths(self, column: int) -> NDArray[np.int64]:
        ends = self.ends.astype(np.int64).reshape(-1)
        sizes = np.diff(ends, prepend=0)
        return sizes.reshape(-1, self.columns)[:, column]


def stored_ids(cache: Path, key: str, items: Iterable[Item], encode: Encode[Item],
               columns: Sequence[str] = ("input_ids",), what: str = "texts") -> StoredIds:
    """The numbers of all items, from the cache or made and put there.

    Args:
        cache: folder of the cache.
        key: see `store_key`.
        items: texts, pairs or records, read from the start each time they are iterated over; a generator function's
            result would be empty the second time and is refused.
        encode: makes the numbers of some of them, in their order; it may leave some out.
        columns: their names.
        what: they are, for messages and the bar.

    Raises:
        ScionError: the cache cannot be written, or what reads or encodes the items refuses.
    """
    if isinstance(items, Iterator):
        raise ScionError(f"{what}: an iterator can be read only once; give a list, or an object whose __iter__ starts "
                         "again")
    folder = cache / f"ids-{key}"
    note = folder / "corpus.json"

    def read() -> StoredIds:
        record = file_cache.read_note(note)
        if record["columns"] != list(columns):
            raise file_cache.Damaged("it is of other columns")
        sizes = [_Size(*size) for size in record["sizes"]]
        for number, size in enumerate(sizes):
            file = _part_file(folder, number)
            if _size_of(file, len(columns)) != size:
                raise file_cache.Damaged(f"{file.name} is damaged or missing")
        return StoredIds(folder, columns, [size.samples for size in sizes], sum(size.items for size in sizes))

    def make() -> None:
        sizes = _make_parts(note, items, encode, columns, what)
        file_cache.write_note(note, {"columns": list(columns), "sizes": [[size.samples, size.items] for size in sizes]})

    return file_cache.kept(note, f"ids of {what}", read, make)


def _part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.i32"


# ------------------------------------------------------------------------------------------------- making


def _make_parts(note: Path, items: Iterable[Item], encode: Encode[Item], columns: Sequence[str], what: str
                ) -> list[_Size]:
    """Write the parts that are not there yet; returns the size of each."""
    from tqdm import tqdm

    stream = iter(items)
    sizes: list[_Size] = []
    # After half a second, and on a terminal only.
    with tqdm(desc=f"tokenising {what}", unit="text", leave=False, disable=None, delay=0.5) as bar:
        while True:
            file = _part_file(note.parent, len(sizes))
            size = _size_of(file, len(columns))
            if size is None:
                size = _make_part(file, note.name, stream, encode, columns, bar)
            else:
                _skip(stream, size.items, f"{what}: there are fewer than when {file} was made under the same name")
                bar.update(size.items)
            if size.items == 0:
                return sizes
            sizes.append(size)


def _skip(stream: Iterator[Any], count: int, otherwise: str) -> None:
    skipped = sum(1 for _ in islice(stream, count))
    if skipped < count:
        raise ScionError(otherwise)


def _make_part(file: Path, owner: str, stream: Iterator[Item], encode: Encode[Item], columns: Sequence[str], bar: Any
               ) -> _Size:
    """Tokenise the next items into a file; its size is that of nothing where there are no more items."""
    ends: list[int] = []
    pieces: list[Ids] = []
    size = samples = read = 0
    while samples < SAMPLES and size < NUMBERS:
        batch = list(islice(stream, min(BATCH, SAMPLES - samples)))
        if not batch:
            break
        read += len(batch)
        for sample in encode(batch):
            samples += 1
            for column in columns:
                numbers = _as_int32(sample[column])
                pieces.append(numbers)
                size += len(numbers)
                ends.append(size)
        bar.update(len(batch))
    if not read:
        return _Size(0, 0)
    content = np.concatenate([np.array(ends, "<i4"), *pieces]).astype("<i4").tobytes()
    head = np.array([MARK, samples, len(columns), _signed(zlib.crc32(content)), read], "<i4").tobytes()
    file_cache.check_room(file.parent, len(content))
    # Under a name of the corpus, whose lock is held: what an interruption leaves is swept away with it.
    write_atomically(file, lambda path: path.write_bytes(head + content), prefix=f"{file_cache.WRITING}{owner}-")
    return _Size(samples, read)


def _as_int32(numbers: Sequence[int]) -> Ids:
    wide = np.asarray(numbers, np.int64)
    if wide.size and not -LARGEST <= wide.min() <= wide.max() < LARGEST:
        raise ScionError(f"an id of {wide.max():,} does not fit 32 bits, and no vocabulary is so large")
    return wide.astype("<i4")


def _signed(checksum: int) -> int:
    """A checksum as a signed number of 32 bits."""
    return checksum - 2**32 if checksum >= LARGEST else checksum


# ------------------------------------------------------------------------------------------------- checking


def _size_of(file: Path, columns: int) -> _Size | None:
    """The size of a part that is there and whole; None where it must be made."""
    try:
        with open_regular(file) as stream:
            head = np.frombuffer(stream.read(4 * HEAD), "<i4")
            checksum = 0
            while block := stream.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
    except (OSError, ScionError):
        return None
    if len(head) < HEAD or head[0] != MARK or head[2] != columns or head[3] != _signed(checksum):
        return None
    return _Size(int(head[1]), int(head[4]))
