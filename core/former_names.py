"""Modules under the names that they had in earlier versions: ``import core.artifact`` is ``core.adapters.load``.

A module that has been split gives what any of its parts defines: ``from core.module import FineTuner, load_run``.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

FORMER: dict[str, tuple[str, ...]] = {
    "artifact": ("adapters.load",),
    "attached": ("method.attached",),
    "base": ("method.bases",),
    "beside": ("method.beside",),
    "cache": ("peft.side._kv_cache",),
    "checkpoints": ("training.checkpoints",),
    "commands": ("cli.commands", "cli.models", "cli.merge", "cli.predict", "cli.describe", "cli.new_folder",
                 "cli.failures"),
    "config_page": ("config.page",),
    "exact_resume": ("callbacks.exact_resume",),
    "file_cache": ("data.file_cache",),
    "fingerprint": ("method.fingerprint",),
    "finite": ("training.finite",),
    "folder": ("data.own_files",),
    "imports": ("cli.fast_imports",),
    "interop": ("adapters.huggingface.convert", "adapters.huggingface.forms", "adapters.huggingface.form",
                "adapters.huggingface.wrapped", "adapters.huggingface.patterns"),
    "labelled": ("data.labelled", "data.lists", "data.folds", "data.reading", "data.sample"),
    "low_rank": ("method.low_rank",),
    "many_runs": ("training.many_runs",),
    "merging": ("method.merging",),
    "module": ("training.finetuner", "training.load_run", "training.recorded_model", "training.head_files",
               "training.optimizers", "config.optimizer", "method.beside"),
    "narrow": ("peft.side._narrow",),
    "network": ("data.download",),
    "patch_commands": ("cli.patch",),
    "pictures": ("training.gallery",),
    "prompts": ("peft.tokens._sequence",),
    "reading": ("adapters.reading",),
    "rehearsal": ("adapters.rehearsal",),
    "run": ("training.run", "training.assemble", "training.stages", "training.trainer", "training.run_record",
            "training.run_folder", "training.many_runs"),
    "run_folder": ("training.run_folder",),
    "run_log": ("training.run_log",),
    "saving": ("method.saving",),
    "schema": ("json_types",),
    "sparse": ("graft.sparse",),
    "spec": ("record",),
    "strangers": ("method.other_libraries",),
    "tally": ("training.tally",),
    "taxonomy": ("report.taxonomy",),
    "training_checks": ("method.training_checks",),
}
"""Former name -> where what it had is now; all behind ``core.``."""


class _FormerModule(Loader):
    """Gives the present module for a former name, or one that looks into several."""

    def __init__(self, parts: tuple[str, ...]) -> None:
        self.parts = [f"core.{part}" for part in parts]
        self.spec: Any = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if len(self.parts) > 1:
            return self._gathered(spec.name)
        module = importlib.import_module(self.parts[0])
        self.spec = module.__spec__
        return module

    def _gathered(self, name: str) -> ModuleType:
        module = ModuleType(name)

        def find(attribute: str) -> Any:
            for part in self.parts:
                if attribute.startswith("__"):
                    break
                found = getattr(importlib.import_module(part), attribute, None)
                if found is not None:
                    return found
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

        module.__getattr__ = find  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        if self.spec is not None:
            module.__spec__ = self.spec  # the import system has put the former name's in its place


class FormerNames(MetaPathFinder):
    """Finds modules of the core by their former names."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """What to import for ``fullname``; None where that is no former name."""
        package, _, name = fullname.rpartition(".")
        if package != "core" or name not in FORMER:
            return None
        return spec_from_loader(fullname, _FormerModule(FORMER[name]))


def install() -> None:
    """Let former names be imported; a second call changes nothing."""
    if not any(isinstance(finder, FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(FormerNames())
