"""Corpora as files of ids: made once, whole or not there, whoever makes them and however it ends."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import ScionError
from core.text import store
from core.text.store import StoredIds, store_key, stored_ids


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SAMPLES", 100)
    monkeypatch.setattr(store, "BATCH", 30)


def lengths(items: Sequence[int]) -> list[dict[str, list[int]]]:
    """Item n is n numbers n, and two labels."""
    return [{"input_ids": [n] * (n % 7), "labels": [-100, n]} for n in items]


def refuse(items: Sequence[int]) -> list[dict[str, list[int]]]:
    pytest.fail("all of it is in the cache")


BOTH = ("input_ids", "labels")


def check(stored: StoredIds, count: int) -> None:
    assert len(stored) == count
    for n in (*range(0, count, 37), count - 1):
        assert stored[n]["input_ids"].tolist() == [n] * (n % 7) and stored[n]["labels"].tolist() == [-100, n]
    assert stored.lengths().tolist() == [n % 7 for n in range(count)]
    assert stored.lengths("labels").tolist() == [2] * count


def test_made_once_and_mapped(tmp_path: Path) -> None:
    stored = stored_ids(tmp_path, "k", range(250), lengths, BOTH)
    check(stored, 250)
    assert sorted(os.listdir(tmp_path / "ids-k")) == ["corpus.json", *(f"part-{n:05d}.i32" for n in range(3))]
    again = stored_ids(tmp_path, "k", range(250), refuse, BOTH)
    check(again, 250)
    numbers = again[9]["input_ids"]
    assert isinstance(numbers, np.memmap) and numbers.dtype == np.int32 and not numbers.flags.writeable
    copy = pickle.dumps(again)
    assert len(copy) < 2000  # as a loader's process gets it: names, and no numbers
    check(pickle.loads(copy), 250)
    assert again[-1]["labels"].tolist() == [-100, 249]
    with pytest.raises(IndexError, match="sample 250 of 250"):
        again[250]
    assert len(stored_ids(tmp_path, "empty", [], lengths, BOTH)) == 0


def test_a_part_ends_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "NUMBERS", 60)
    check(stored_ids(tmp_path, "k", range(250), lengths, BOTH), 250)
    assert len(list((tmp_path / "ids-k").glob("part-*"))) == 9


def test_items_that_are_left_out_are_counted(tmp_path: Path) -> None:
    def even(items: Sequence[int]) -> list[dict[str, list[int]]]:
        return lengths([n for n in items if n % 2 == 0 and n >= 100])

    for encode in (even, refuse):
        stored = stored_ids(tmp_path, "k", range(250), encode, BOTH)
        assert len(stored) == 75 and stored.dropped == 175
        assert stored[0]["labels"].tolist() == [-100, 100] and stored[74]["labels"].tolist() == [-100, 248]


def test_a_damaged_part_is_made_again_and_others_are_kept(tmp_path: Path) -> None:
    stored_ids(tmp_path, "k", range(250), lengths, BOTH)
    file = tmp_path / "ids-k" / "part-00001.i32"
    kept = (tmp_path / "ids-k" / "part-00000.i32").stat().st_mtime_ns
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:200] + b"\xff" + whole[201:], b"", whole[:8]):
        file.write_bytes(damaged)
        with pytest.warns(UserWarning, match="part-00001.i32 is damaged or missing.*made again"):
            check(stored_ids(tmp_path, "k", range(250), lengths, BOTH), 250)
        assert file.read_bytes() == whole
    assert (tmp_path / "ids-k" / "part-00000.i32").stat().st_mtime_ns == kept


class Slow:
    """Items of which the 180th waits until it is allowed."""

    def __init__(self, go: Path) -> None:
        self.go = go

    def __iter__(self) -> Iterator[int]:
        for n in range(250):
            while n == 180 and not self.go.exists():
                time.sleep(0.01)
            yield n


def _make(cache: Path, go: Path) -> None:
    store.SAMPLES, store.BATCH = 100, 30
    check(stored_ids(cache, "k", Slow(go), lengths, BOTH), 250)


def _wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


@pytest.fixture
def context() -> Any:
    return multiprocessing.get_context("fork")


def test_a_kill_leaves_finished_parts(tmp_path: Path, context: Any) -> None:
    process = context.Process(target=_make, args=(tmp_path, tmp_path / "go"))
    process.start()
    first = tmp_path / "ids-k" / "part-00000.i32"
    _wait_for(first)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    time_of = first.stat().st_mtime_ns
    (tmp_path / "ids-k" / ".writing-corpus.json-left.i32").write_bytes(b"half")
    made: list[int] = []

    def counted(items: Sequence[int]) -> list[dict[str, list[int]]]:
        made.extend(items)
        return lengths(items)

    check(stored_ids(tmp_path, "k", range(250), counted, BOTH), 250)
    assert made == list(range(100, 250)) and first.stat().st_mtime_ns == time_of
    assert not list((tmp_path / "ids-k").glob(".*"))


def test_two_processes_at_once(tmp_path: Path, context: Any) -> None:
    go = tmp_path / "go"
    processes = [context.Process(target=_make, args=(tmp_path, go)) for _ in range(3)]
    for process in processes:
        process.start()
    _wait_for(tmp_path / "ids-k" / "part-00000.i32")
    go.touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    check(stored_ids(tmp_path, "k", range(250), refuse, BOTH), 250)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="an iterator can be read only once"):
        stored_ids(tmp_path, "k", iter([1, 2]), lengths, BOTH)
    with pytest.raises(ScionError, match="an id of 2,147,483,648 does not fit 32 bits"):
        stored_ids(tmp_path, "k", [0], lambda items: [{"input_ids": [2**31]}])
    stored_ids(tmp_path, "m", range(250), lengths, BOTH)
    (tmp_path / "ids-m" / "corpus.json").unlink()
    with pytest.raises(ScionError, match="there are fewer than when .*part-00001.i32 was made"):
        stored_ids(tmp_path, "m", range(150), lengths, BOTH)


def test_keys_tell_corpora_apart() -> None:
    keys = {store_key("data", "tokenizer", 128), store_key("data", "tokenizer", 64), store_key("data", "other", 128),
            store_key("others", "tokenizer", 128), store_key("data", "tokenizer", None),
            store_key("data", "tokenizer", 128, "query: ")}
    assert len(keys) == 6 and store_key("data", "tokenizer", 128) in keys
