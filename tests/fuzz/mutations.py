"""What a fuzzer does to a good input: changes in nested data, in bytes, and in the files of a folder.

Everything is drawn by Hypothesis, so that a failing input is made small and comes again.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Draw = Any

WORDS = ["", " ", "LoRA", "lora", "Nothing", "os.system", "builtins.eval", "core.run.run", "a.b", "..", "/", "~",
         "nan", "inf", "-1", "0", "1e999", "null", "auto", "all", "mini", "real", "last", "best", "\x1b[31mred",
         "two\nlines", "NUL\0here", "\ud800", "é", "x" * 300, "*", "[", "{", "&a",
         "!!python/object/apply:os.system [ls]", "class", "class_path", "init_args"]
"""Texts of every kind that one meets where something else was meant."""
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 7, 10**6, 10**30, -10**18, 0.0, 0.5, -0.5, 1e-30, 1e30,
                     float("nan"), float("inf"), float("-inf"), [], {}, [[]], [None], {"": None},
                     {"a": {"b": {"c": []}}}]),
    st.sampled_from(WORDS), st.lists(st.sampled_from([1, "q", None, {}]), max_size=3),
    st.dictionaries(st.sampled_from(["class", "class_path", "init_args", "rank", "name", "a"]),
                    st.sampled_from(["LoRA", 4, None, [], {}]), max_size=3))


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested data, the root's excepted."""
    found: list[tuple[Any, ...]] = []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found += [(*path, key), *_places(value, (*path, key))]
    return found


@st.composite
def nested(draw: Draw, good: Any, most: int = 3) -> Any:
    """``good`` with one to ``most`` changes: a value replaced, taken away or put elsewhere, a key added or misspelt."""
    data = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, most))):
        places = _places(data)
        if not places:
            return draw(VALUES)
        *path, last = draw(st.sampled_from(places))
        node = data
        for key in path:
            node = node[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename", "swap"]))
        if change == "replace":
            node[last] = draw(VALUES)
        elif change == "remove":
            del node[last]
        elif change == "swap":
            *other, name = draw(st.sampled_from(places))
            source = data
            for key in other:
                source = source[key]
            node[last] = copy.deepcopy(source[name])
        elif isinstance(node, dict):
            key = draw(st.one_of(st.sampled_from(WORDS), st.sampled_from([1, None, True, 2.5])))
            node[key] = node.pop(last) if change == "rename" else draw(VALUES)
        else:
            node.append(draw(VALUES))
    return data


NUMBERS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80"]
OUTSIDE = "outside.txt"
"""A file beside the folder that is changed; links point to it, and nothing may write to it."""
LINKS = ["/dev/zero", "/dev/tty", OUTSIDE, OUTSIDE, "nowhere", "/proc/self/mem"]
CHANGES = ["content", "content", "content", "remove", "folder", "pipe", "link", "loop", "closed"]


@st.composite
def changed_bytes(draw: Draw, good: bytes) -> bytes:
    """``good`` with flipped, lacking, doubled or foreign bytes."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["flip", "flip", "cut", "insert", "number", "double", "empty"]))
        if change == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif change == "cut":
            del data[place:]
        elif change == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif change == "number":  # a length or a count that is none
            data[place:place + 4] = draw(st.sampled_from(NUMBERS))
        elif change == "double":
            data[place:place] = data[place:place + 64]
        elif change == "empty" and draw(st.booleans()):
            data.clear()
    return bytes(data)


def files_of(folder: Path) -> list[str]:
    """Plain files: what a link points to belongs to somebody else, and is neither read nor written here."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*")
                  if file.is_file() and not file.is_symlink())


def check_outside(folder: Path) -> None:
    """What links in a changed folder point to is as it was."""
    assert folder.with_name(OUTSIDE).read_text() == OUTSIDE


def change_folder(data: Any, folder: Path) -> None:
    """Change one to three files of ``folder``, by draws from Hypothesis's ``data``."""
    folder.with_name(OUTSIDE).write_text(OUTSIDE)
    for _ in range(data.draw(st.integers(1, 3))):
        names = files_of(folder)
        if not names:
            return
        file = folder / data.draw(st.sampled_from(names))
        change = data.draw(st.sampled_from(CHANGES))
        content = _other_content(data, file) if change == "content" else b""
        file.unlink()
        if change == "content":
            file.write_bytes(content)
        elif change == "folder":
            file.mkdir()
        elif change == "pipe":
            os.mkfifo(file)
        elif change == "link":
            target = data.draw(st.sampled_from(LINKS))
            file.symlink_to(folder.with_name(OUTSIDE) if target == OUTSIDE else target)
        elif change == "loop":
            file.symlink_to(file.name)
        elif change == "closed":
            file.write_bytes(b"")
            file.chmod(0)


def _other_content(data: Any, file: Path) -> bytes:
    good = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        try:
            return json.dumps(data.draw(nested(json.loads(good)))).encode("utf-8", "surrogatepass")
        except ValueError:
            pass
    return data.draw(changed_bytes(good))


def copy_to(source: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
