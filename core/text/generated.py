"""Written texts in a file, one a line in the prompts' order, which a killed run goes on with.

Beside ``NAME.jsonl`` stands ``NAME.json``, which says what the texts follow from: another set of prompts or other
settings are not mixed with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from core.errors import ScionError, listed, printable
from core.files import is_absent, locked, open_regular, open_to_append, parse_json, read_json, write_json
from core.json_types import check
from core.text.stopping import Why

FORMAT = 1


@dataclass(frozen=True)
class Generated:
    """One written text."""

    id: str
    """Of its prompt."""
    sample: int
    """Its number among those of the prompt."""
    prompt: str
    """A hash of the prompt's text."""
    text: str
    """Without the prompt, the special tokens, and whatever made it stop."""
    tokens: tuple[int, ...]
    """The ids that were written, without the one that ended the text; those of a stop string are among them."""
    why: Why
    """``end``: a token that ends texts; ``stop``: a stop string or rule; ``length``: no room for more tokens."""

    @property
    def key(self) -> tuple[str, int, str]:
        """What is known of it before it is written."""
        return self.id, self.sample, self.prompt

    def line(self) -> str:
        """Its line in a file."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"


FIELDS: dict[str, type] = {"id": str, "sample": int, "prompt": str, "text": str, "tokens": list, "why": str}
"""The fields of a line. Texts may be of any length, which `core.json_types` does not allow."""


class GeneratedFile:
    """A file of texts that grows in the order of ``keys``.

    Args:
        path: ends in ``.jsonl``.
        keys: of all the texts that it is to hold.
        about: what they follow from, as JSON.
    """

    def __init__(self, path: str | Path, keys: Sequence[tuple[str, int, str]], about: dict[str, Any]) -> None:
        self.path = Path(path)
        self.keys, self.about = keys, {"format": FORMAT, **about}
        if self.path.suffix != ".jsonl":
            raise ScionError(f"{self.path}: texts are written as JSON lines; give a name that ends in .jsonl")
        self.side = self.path.with_suffix(".json")
        self.lock = self.path.with_name(f".{self.path.stem}.lock")
        self.done: list[Generated] = []
        """The texts that are there."""
        self._handle: IO[str] | None = None

    @contextlib.contextmanager
    def opened(self, restart: bool = False) -> Iterator[None]:
        """Hold the file, with the texts that it has in ``done``.

        Args:
            restart: begin anew where it holds texts of other prompts or settings.

        Raises:
            ScionError: it does hold such, it is damaged, or another process is writing it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.lock, f"{self.path}: another process is writing it; wait for it, or give another name"):
                self._begin(restart)
                with open_to_append(self.path) as self._handle:
                    yield
        except OSError as error:
            raise ScionError(f"{error.filename or self.path}: cannot be written ({error.strerror or error})") from None

    def add(self, generated: Generated) -> None:
        """Write the next text."""
        assert self._handle is not None
        self._handle.write(generated.line())
        self._handle.flush()
        self.done.append(generated)

    def _begin(self, restart: bool) -> None:
        """Read what is there, and cut away a line that was being written when the process was killed."""
        if self.path.is_symlink():
            raise ScionError(f"{self.path}: a link, where a file is wanted; remove it")
        if not is_absent(self.path):
            difference = self._difference()
            if difference is None:
                self._read()
                return
            if not restart:
                raise ScionError(f"{self.path}: holds texts of {difference}; give another name, or restart it")
            self.path.unlink()
        # The side file comes first: texts without one would be of unknown settings.
        write_json(self.side, self.about)

    def _difference(self) -> str | None:
        """What the texts that are there follow from, if it is not what these do."""
        if is_absent(self.side):
            return f"unknown settings ({self.side.name} is missing)"
        there = read_json(self.side)
        check(there, dict[str, Any], str(self.side))
        for name in sorted({*there, *self.about}):
            was, is_now = there.get(name), self.about.get(name)
            if was == is_now:
                continue
            if isinstance(was, dict) and isinstance(is_now, dict):
                return _first_difference(was, is_now)
            return f"another {name} ({printable(was)}, here {printable(is_now)})"
        return None

    def _read(self) -> None:
        with open_regular(self.path) as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            self.done.append(self._parse(line, number))
        if whole < len(data):
            os.truncate(self.path, whole)

    def _parse(self, line: bytes, number: int) -> Generated:
        place = f"{self.path}, line {number}"
        try:
            fields = parse_json(line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise ScionError(f"{place}: damaged, no JSON; remove it and what follows, or restart the file") from None
        _check_fields(fields, place)
        found = Generated(**{**fields, "tokens": tuple(fields["tokens"])})
        if number > len(self.keys) or found.key != self.keys[number - 1]:
            raise ScionError(f"{place}: the text of another prompt than comes here; restart the file")
        return found


def _check_fields(fields: Any, place: str) -> None:
    """Refuse a line that is none of ours."""
    names = set(fields) if isinstance(fields, dict) else set()
    if names != set(FIELDS):
        raise ScionError(f"{place}: not a text of ours, which has {listed(FIELDS)}; restart the file")
    for name, kind in FIELDS.items():
        if type(fields[name]) is not kind:
            raise ScionError(f"{place}: {name} is no {kind.__name__}; restart the file")
    if not all(type(token) is int for token in fields["tokens"]):
        raise ScionError(f"{place}: tokens are not all whole numbers; restart the file")


def _first_difference(was: dict[str, Any], is_now: dict[str, Any]) -> str:
    """The first entry in which two mappings differ."""
    for name in sorted({*was, *is_now}):
        if was.get(name) != is_now.get(name):
            return f"other settings ({printable(name)} {printable(was.get(name))}, here {printable(is_now.get(name))})"
    return "other settings"
