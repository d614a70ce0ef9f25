"""What a folder of sentence-transformers says beside the model: pooling, prompts, the longest text; read and written.

Source: the files that sentence-transformers writes (``modules.json``, ``1_Pooling/config.json``,
``config_sentence_transformers.json``, ``sentence_bert_config.json``), in its forms of version 2 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import ScionError, listed
from core.files import read_json, write_json
from core.hub import Source, file_of

_POOLINGS = {"cls": "cls", "mean": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
"""Its words for the ways of pooling, new and old, and ours."""

_WITHOUT_EFFECT = ("Dropout",)
"""Modules behind the pooling that change nothing when embeddings are made."""


@dataclass(frozen=True)
class SentenceFolder:
    """What is said of a text encoder beside its model."""

    pooling: str | None = None
    """``cls`` or ``mean``; None where nothing is said."""
    normalise: bool = False
    """Whether embeddings are scaled to length 1."""
    further: tuple[str, ...] = ()
    """Modules and options that embeddings depend on and that are not read here."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Texts to put before others, by name (``query``, ``passage``)."""
    default_prompt: str | None = None
    """The prompt that is taken where none is named."""
    max_length: int | None = None
    lower_case: bool = False
    """Whether texts are put into lower case before they reach the tokenizer."""


def read_sentence_folder(source: Source) -> SentenceFolder:
    """What sentence-transformers' files beside a model say; the defaults where there are none.

    Raises:
        ScionError: one of them is damaged, or the model is no transformer with a pooling behind it.
    """
    modules_file = file_of(source, "modules.json")
    if modules_file is None:
        return SentenceFolder()
    modules = _read(modules_file, list)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds[:1] != ["Transformer"]:
        raise ScionError(f"{modules_file}: the first module is {listed(kinds[:1]) or 'missing'}, not a Transformer")
    pooling, further = _pooling(source, modules, kinds)
    known = ("Transformer", "Pooling", "Normalize", *_WITHOUT_EFFECT)
    further += [kind for kind in kinds if kind not in known]
    settings = _settings(source, "config_sentence_transformers.json")
    own = _settings(source, "sentence_bert_config.json")
    prompts = {str(name): str(text or "") for name, text in (settings.get("prompts") or {}).items()}
    return SentenceFolder(pooling, "Normalize" in kinds, tuple(further), prompts, settings.get("default_prompt_name"),
                          own.get("max_seq_length"), bool(own.get("do_lower_case")))


def write_sentence_folder(folder: Path, said: SentenceFolder, dim: int) -> None:
    """Write the files by which sentence-transformers opens a folder that holds a model of transformers.

    Args:
        folder: with the model and its tokenizer.
        said: what to write; its pooling must be known.
        dim: width of the states.
    """
    parts = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if said.normalise:
        parts.append(("Normalize", "2_Normalize"))
    modules = []
    for number, (kind, path) in enumerate(parts):
        modules.append({"idx": number, "name": str(number), "path": path,
                        "type": f"sentence_transformers.models.{kind}"})
    pooling = {"word_embedding_dimension": dim, "pooling_mode_cls_token": said.pooling == "cls",
               "pooling_mode_mean_tokens": said.pooling == "mean", "pooling_mode_max_tokens": False,
               "pooling_mode_mean_sqrt_len_tokens": False}
    settings = {"prompts": said.prompts, "default_prompt_name": said.default_prompt}
    own = {"max_seq_length": said.max_length, "do_lower_case": said.lower_case}
    for _, path in parts:  # a folder of its own for each, though Normalize has nothing to say
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "config_sentence_transformers.json", settings)
    write_json(folder / "sentence_bert_config.json", own)


def _pooling(source: Source, modules: list[dict[str, Any]], kinds: list[str]) -> tuple[str | None, list[str]]:
    """How the folder pools, and what it does beside that is not read here."""
    if "Pooling" not in kinds:
        return None, []
    path = modules[kinds.index("Pooling")].get("path", "1_Pooling")
    settings = _settings(source, f"{path}/config.json")
    named = settings.get("pooling_mode")
    if named is None:
        words = [word for word, is_on in settings.items() if word.startswith("pooling_mode_") and is_on is True]
    else:
        words = [named] if isinstance(named, str) else list(named)
    further = [] if settings.get("include_prompt", True) else ["a pooling without the prompt"]
    if len(words) == 1 and words[0] in _POOLINGS:
        return _POOLINGS[words[0]], further
    return None, [*further, f"the pooling {listed(words) or 'of no name'}"]


def _settings(source: Source, name: str) -> dict[str, Any]:
    file = file_of(source, name)
    return {} if file is None else _read(file, dict)


def _read(file: Path, kind: type) -> Any:
    value = read_json(file)
    if not isinstance(value, kind) or (kind is list and not all(isinstance(one, dict) for one in value)):
        raise ScionError(f"{file}: not the {'list' if kind is list else 'mapping'} that sentence-transformers writes")
    return value
