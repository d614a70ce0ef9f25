"""``lightning predict RUN FILE --generate.max_new_tokens 64``: texts that a run's language model writes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed
from core.errors import ScionError, listed, nearest, printable
from core.text.files import STANDARD_INPUT, read_records

if TYPE_CHECKING:
    from core.text.generate_settings import GenerateSettings
    from core.text.generated import Generated
    from core.text.prompts import Prompt

PREFIX = "generate."
FIELDS = ("prompt", "text")
"""Where a prompt stands in a record, the first that is there."""
OF_FILES = ("set", "restart")
"""Keys that say where the texts go, and nothing of the texts."""


@says_what_failed
def generate_texts(run: str, files: list[str], keys: Sequence[str], as_json: bool, features: bool = False,
                   out: str | None = None) -> int:
    """Print what the run's model writes behind each prompt, a line a text, and keep it in ``RUN/generated``.

    Args:
        run: folder of a finished run.
        files: with a prompt a line, JSON lines or a table with ``prompt`` (and ``id``), or ``-`` for standard input.
        keys: ``--generate.X VALUE``: the settings (`core.text.generate_settings.GenerateSettings`), and ``set`` and
            ``restart``.
        as_json: print JSON.
        features: refused, as ``out`` is: they are of predictions.
    """
    settings, set_name, restart = _settings(keys)
    if features or out:
        option = "--features" if features else "--out"
        raise ScionError(f"{option}: is for predictions; what is written is in {run}/generated, a line a text")
    names = _set_names(files, set_name)
    prompts = {file: _prompts(file) for file in files}

    import torch

    from core.text.generate import generate  # start-up time
    from core.training.load_run import load_run  # start-up time

    tuner = load_run(run, "cuda" if torch.cuda.is_available() else "cpu")
    about = {"adapter": _adapter(run)}
    entries: list[dict[str, Any]] = []
    for file, name in zip(files, names, strict=True):
        target = Path(run) / "generated" / f"{name}.jsonl"
        found = generate(tuner, prompts[file], settings, target, about, restart)
        print(f"{printable(str(target))}: {len(found)} texts", file=sys.stderr)
        for text in found:
            if as_json:
                entries.append({"file": file, **dataclasses.asdict(text)})
            else:
                print(_line(text, settings.samples))
    if as_json:
        print(json.dumps(entries, indent=1, allow_nan=False))
    return 0


def _settings(keys: Sequence[str]) -> tuple[GenerateSettings, str | None, bool]:
    """The settings, the name of the set, and whether to begin anew."""
    from core.config.document import parse  # start-up time
    from core.config.overrides import split  # start-up time
    from core.text.generate_settings import GenerateSettings  # start-up time

    known = [field.name for field in dataclasses.fields(GenerateSettings)]
    given: dict[str, Any] = {}
    for key, operator, value in split(list(keys)):
        name = key.removeprefix(PREFIX)
        if name not in (*known, *OF_FILES):
            raise ScionError(f"--{key}: unknown{nearest(name, [*known, *OF_FILES])}; there are "
                             f"{listed([*known, *OF_FILES], 20)}")
        if operator != "=":
            raise ScionError(f"--{key}+=: nothing can be added; give a list, as in --{key} '[a, b]'")
        given[name] = value if name == "set" else parse(value, f"--{key}")
    set_name = given.pop("set", None)
    restart = given.pop("restart", False)
    if not isinstance(restart, bool):
        raise ScionError(f"--{PREFIX}restart: {restart!r:.60} is neither true nor false")
    return GenerateSettings(**given), set_name, restart


def _set_names(files: Sequence[str], given: str | None) -> list[str]:
    """What the texts of each file are called."""
    if not files:
        raise ScionError("no files given")
    if given is not None and len(files) > 1:
        raise ScionError(f"--{PREFIX}set: names the texts of one file, and there are {len(files)}")
    names = [given] if given is not None else [_stem(file) for file in files]
    for name in names:
        if not name or name.startswith(".") or not name.isprintable() or "/" in name:
            raise ScionError(f"--{PREFIX}set: {printable(name)!r:.60} is no name for a file; give a plain word")
        if names.count(name) > 1:
            raise ScionError(f"two files are called {name}; write their texts one after the other, with "
                             f"--{PREFIX}set NAME")
    return names


def _stem(file: str) -> str:
    return "stdin" if file == STANDARD_INPUT else Path(file).stem


def _prompts(file: str) -> list[Prompt]:
    """The prompts in a file; each is known by its field ``id``, or else the number of its line."""
    from core.text.prompts import Prompt  # start-up time

    found = []
    for record in read_records(file):
        field = next((name for name in FIELDS if name in record.fields), FIELDS[0])
        text = record.text(field)
        if not text:
            record.filled(field)  # which says where
        found.append(Prompt(text, str(record.fields.get("id", record.line))))
    if not found:
        raise ScionError(f"{file}: holds no prompts; give one a line")
    return found


def _adapter(run: str) -> str:
    """A hash of the run's trained tensors."""
    data = (Path(run) / "adapter" / "adapter.safetensors").read_bytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _line(text: Generated, samples: int) -> str:
    """A text on one line; of several samples with the prompt's id and the sample's number before it."""
    shown = printable(text.text)
    return shown if samples == 1 else f"{printable(text.id)}\t{text.sample}\t{shown}"
