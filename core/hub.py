"""Models of transformers by name: from a folder, from the hub or its cache, or the small one that comes along.

A name leads to a `Source` or to one line that says why not, within seconds; only then is anything loaded. Weights are
read from safetensors alone, and no code that lies beside them is ever run.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.data.download import reachable
from core.errors import ScionError, listed, nearest

WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
"""The file of a model's weights, or the list of those that they are spread over."""

Ask = Callable[[str], bool]
"""Says whether an address answers, see `core.data.download.reachable`."""


@dataclass(frozen=True)
class Wanted:
    """What a backbone takes, as messages call it."""

    title: str
    """With its article: ``an AST``."""
    names: Sequence[str] = ()
    """Names that it knows, for who mistypes one."""
    nano: Path | None = None
    """Folder of the small model that comes along; None where there is none."""
    nano_maker: str = ""
    """The command that makes it, where its weights are missing."""

    @property
    def bare_title(self) -> str:
        """The title without its article."""
        return self.title.partition(" ")[2]


@dataclass(frozen=True)
class Source:
    """Where the files of a model are."""

    name: str
    """As it was given."""
    kind: str
    """``hub``, ``local`` or ``nano``, as in a backbone's ``origin``."""
    where: str
    """Folder, or name on the hub: what transformers' ``from_pretrained`` takes."""
    problem: str
    """What to say where they cannot be read."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``from_pretrained``."""


# ------------------------------------------------------------------------------------------------- names


def auto(default: str, ask: Ask = reachable, nano: str | None = "nano") -> tuple[str, str | None]:
    """What the name ``auto`` stands for: ``default`` if it is cached or can be fetched, else ``nano`` with a warning.

    Args:
        default: a name on the hub.
        ask: says whether the hub answers.
        nano: the name to fall back to; None where nothing comes along.

    Returns:
        The name, and the warning to keep with the results if there was one.

    Raises:
        ScionError: neither can be had.
    """
    if is_cached(default) or ask(hub_address()):
        return default, None
    absent = f"backbone.name auto: {default} is not cached and the hub does not answer"
    if nano is None:
        raise ScionError(f"{absent}; connect, or give a local folder")
    note = f"{absent}, so this is the built-in {nano}"
    warnings.warn(note, stacklevel=3)
    return nano, note


def find(name: str, wanted: Wanted, weights: bool = True, ask: Ask = reachable) -> Source:
    """Where the model of that name is: the one that comes along, a folder, or on the hub.

    Args:
        name: ``nano``, a folder, or ``OWNER/NAME``.
        wanted: what it shall be.
        weights: whether its weights are needed, or its configuration only.
        ask: says whether the hub answers.

    Raises:
        ScionError: there is no such model, it has no safetensors, or it is not cached and the hub does not answer.
    """
    if name == "nano" and wanted.nano is not None:
        return _nano(wanted, wanted.nano)
    if is_path(name):
        folder = Path(os.path.expanduser(name))
        _check_folder(folder, weights)
        return Source(name, "local", str(folder), f"not a readable {wanted.bare_title} checkpoint")
    if name.count("/") != 1:
        raise _unknown(name, wanted)
    if is_cached(name, weights):
        return Source(name, "hub", name, "its cached copy is damaged", {"local_files_only": True})
    if not ask(hub_address()):
        instead = "a local folder or the built-in nano" if wanted.nano is not None else "a local folder"
        raise ScionError(f"backbone.name: {name!r} is not in the cache and the hub does not answer; connect, or take "
                         f"{instead}")
    return Source(name, "hub", name, f"not on the hub as {wanted.title} with safetensors")


def is_path(name: str) -> bool:
    """Whether a name is that of a folder, and not of a model on the hub."""
    return os.path.exists(name) or name.startswith((".", "/", "~"))


def hub_address() -> str:
    """Where the hub is asked."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_cached(name: str, weights: bool = True) -> bool:
    """Whether configuration and weights of a model on the hub are in the cache.

    Raises:
        ScionError: the hub has no such names.
    """
    if _cached_file(name, "config.json") is None:
        return False
    if not weights or _cached_file(name, WEIGHTS) is not None:
        return True
    shards = _cached_file(name, SHARDS)
    return shards is not None and all(_cached_file(name, file) is not None for file in _files_in(shards))


def _cached_file(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file)
    except ValueError:
        raise ScionError(f"backbone.name: {name!r} is no name of a model on the hub, as OWNER/NAME") from None
    return Path(found) if isinstance(found, str) else None


def _files_in(shards: Path) -> set[str]:
    """The files that a list of shards names; a damaged list names none that could be there."""
    try:
        return set(json.loads(shards.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"a damaged list"}


def file_of(source: Source, name: str) -> Path | None:
    """A file that lies beside a model, fetched if need be; None where there is none of that name."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source.where, name, _raise_exceptions_for_missing_entries=False,
                            _raise_exceptions_for_connection_errors=False, **source.options)
    except OSError:  # the hub has no such model, or the folder may not be looked into
        return None
    return None if found is None else Path(found)


def _nano(wanted: Wanted, folder: Path) -> Source:
    if not (folder / WEIGHTS).is_file():
        raise ScionError(f"backbone.name: nano's weights are missing here; make them by {wanted.nano_maker}")
    return Source("nano", "nano", str(folder), f"its files in {folder} are damaged")


def _check_folder(folder: Path, weights: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ScionError(f"backbone.name: no config.json in the folder {folder}")
    if weights and not (folder / WEIGHTS).is_file() and not (folder / SHARDS).is_file():
        raise ScionError(f"backbone.name: no {WEIGHTS} in {folder} (pickled weights are not read; save them again "
                         "with save_pretrained)")


def _unknown(name: str, wanted: Wanted) -> ScionError:
    kinds = "auto, nano, a hub id" if wanted.nano is not None else "auto, a hub id"
    hint = nearest(name, ["auto", *wanted.names])
    return ScionError(f"backbone.name: {name!r} is neither {kinds} (owner/name) nor a folder{hint}")


# ------------------------------------------------------------------------------------------------- models


def load(source: Source, wanted: Wanted, types: Sequence[str], class_of: Callable[[str], Any],
         may_lack: Callable[[str], bool] | None = None, **options: Any) -> Any:
    """The model of a source, with its weights.

    Args:
        source: where it is.
        wanted: what it shall be.
        types: transformers' ``model_type`` of the models that will do.
        class_of: the class to load a model of such a type into.
        may_lack: says of a tensor's name whether the files may do without it; by default none.
        options: of transformers' ``from_pretrained``.

    Raises:
        ScionError: it is of another type, which is found out before its weights are read, or is damaged.
    """
    try:
        # the type is asked for first: transformers would load any model into any class, with nothing but a warning
        kind = model_type(source)
        check_type(source, kind, types, wanted)
        with quiet():
            loaded: Any = class_of(kind).from_pretrained(source.where, use_safetensors=True, output_loading_info=True,
                                                         **options, **source.options)
        model, report = loaded
    except (ScionError, ModuleNotFoundError):  # the latter where transformers is not installed
        raise
    except Exception as error:  # from hub, config, safetensors or torch: whatever it was, the file cannot be used
        raise _unusable(source, error) from None
    missing = sorted(name for name in report["missing_keys"] if may_lack is None or not may_lack(name))
    if missing:
        raise ScionError(f"backbone.name: {source.name!r} lacks {listed(missing, 3)}: not a whole {wanted.bare_title}")
    return model


def model_type(source: Source) -> str:
    """transformers' name for the kind of a source's model, of its config.json alone.

    Raises:
        ScionError: that cannot be read.
    """
    from transformers import PreTrainedConfig

    try:
        found: dict[str, Any] = PreTrainedConfig.get_config_dict(source.where, **source.options)[0]
    except Exception as error:  # from the hub or json: whatever it was, the file cannot be used
        raise _unusable(source, error) from None
    return found.get("model_type")  # type: ignore[return-value]


def _unusable(source: Source, error: Exception) -> ScionError:
    return ScionError(f"backbone.name: {source.name!r}: {source.problem} ({first_line(error)})")


def check_type(source: Source, kind: str, types: Sequence[str], wanted: Wanted) -> None:
    """Refuse a model that is of none of these types.

    Raises:
        ScionError: says which type it is, and what is wanted.
    """
    if kind in types:
        return
    few = " or ".join(map(repr, types)) if len(types) < 4 else wanted.title
    raise ScionError(f"backbone.name: {source.name!r} is a model of type {kind!r}; {few} wanted")


def transformers() -> Any:
    """The library, imported on the CPU: it imports torchaudio, which keeps a constant tensor that must not be a meta
    one, as it would be where a model is built without values."""
    with torch.device("cpu"):
        import transformers

    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bar and its report of weights that were not asked for (a head on top)."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line of what a library says of an error, cut where it is long."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else repr(error)
