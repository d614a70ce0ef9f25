"""Modules under the names that they had in earlier versions: ``import core.module`` is ``core.training.finetuner``."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

FORMER = {
    "artifact": "adapters.load", "attached": "method.attached", "base": "method.bases", "beside": "method.beside",
    "cache": "peft.side._kv_cache", "checkpoints": "training.checkpoints", "commands": "cli.commands",
    "config_page": "config.page", "exact_resume": "callbacks.exact_resume", "file_cache": "data.file_cache",
    "fingerprint": "method.fingerprint", "finite": "training.finite", "folder": "data.own_files",
    "imports": "cli.fast_imports", "interop": "adapters.huggingface.convert", "labelled": "data.labelled",
    "low_rank": "method.low_rank", "many_runs": "training.many_runs", "merging": "method.merging",
    "module": "training.finetuner", "narrow": "peft.side._narrow", "network": "data.download",
    "patch_commands": "cli.patch", "pictures": "training.gallery",
    "prompts": "peft.tokens._sequence", "reading": "adapters.reading", "rehearsal": "adapters.rehearsal",
    "run": "training.run", "run_folder": "training.run_folder", "run_log": "training.run_log",
    "saving": "method.saving", "schema": "json_types", "sparse": "graft.sparse", "spec": "record",
    "strangers": "method.other_libraries", "tally": "training.tally", "taxonomy": "report.taxonomy",
    "training_checks": "method.training_checks",
}
"""Former name -> present one, both behind ``core.``."""


class _SameModule(Loader):
    """Gives the present module for a former name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: Any = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has put the former name's in its place


class FormerNames(MetaPathFinder):
    """Finds modules of the core by their former names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What to import for ``fullname``; None where that is no former name."""
        package, _, name = fullname.rpartition(".")
        if package != "core" or name not in FORMER:
            return None
        return spec_from_loader(fullname, _SameModule(f"core.{FORMER[name]}"))


def install() -> None:
    """Let former names be imported; a second call changes nothing."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
