"""Methods on disk, in one place: saving them, and loading them in our own form or Hugging Face peft's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import nn

from core.adapters.filling import Content, load_tensors
from core.adapters.huggingface.convert import from_peft, is_peft
from core.adapters.reading import (
    ModelRecord,
    Saved,
    attach,
    method_of,
    open_adapter,
    read_adapter,
    refusal,
    rehearse,
    restore,
    split_checkpoint,
)
from core.errors import ScionError, listed, one_line
from core.method import uncompiled
from core.method.attached import base_names, keep_only_owned, methods_on
from core.method.beside import OUTSIDE, load_beside
from core.method.fingerprint import fingerprint
from core.method.saving import FORMAT, RECORD, TENSORS, adapter_bytes, save_adapter, versions


def load_adapter(source: str | Path, model: nn.Module, base: Literal["same", "any"] | nn.Module = "same") -> Any:
    """Attach the methods saved in ``source`` to ``model`` and load their tensors.

    Args:
        source: an adapter folder, a run folder, a Lightning checkpoint, or an adapter folder of Hugging Face peft.
        model: the same backbone that the methods were saved from, plain, under whatever head (``BertModel`` for what
            was trained in ``BertForMaskedLM``); or the LightningModule around it, into which what was beside the
            backbone (a head) is loaded too.
        base: ``any`` carries them to other weights of the same shapes, with a warning. Where a method moved the base's
            own tensors, the file holds their values; to carry the change of them, give the base that it was trained on
            (an ``nn.Module``) instead.

    Returns:
        The method, or the list of methods where several were saved.

    Raises:
        ScionError: a damaged file, another base or tokenizer, missing, extra or misshapen tensors, values that are not
            finite; the model is untouched then.

    Warns:
        UserWarning: the file has tensors of what was beside the backbone, and ``model`` is only the backbone; or such
            as lie apart from it (a language-model head, a pooler), which ``model`` has not.
    """
    if is_peft(source):
        return from_peft(source, model)
    saved = open_adapter(source)
    root = _root_in(model, saved)

    # Passed on, for it must run once the methods are known to fit and before anything is written.
    def check_rest() -> None:
        saved.check_whole()
        if root is not model:
            load_beside(model, root, saved.tensors, str(source), write=False)

    try:
        methods = restore(saved.record, saved.tensors, root, base, str(source), check_rest)
    except ScionError as error:
        recorded = saved.record.get("model") or {}
        # A run records how to build its backbone, and its sizes may follow from the data (classes, frames).
        if not recorded.get("backbone") or "another base" not in str(error):
            raise
        raise ScionError(f"{error}; core.load_run({str(source)!r}) builds the run's own backbone (its sizes may be "
                         "those of its data) and its head") from None
    if root is model:
        _tell_of_rest(saved, str(source))
    else:
        load_beside(model, root, saved.tensors, str(source))
    return methods[0] if len(methods) == 1 else methods


def _root_in(model: nn.Module, saved: Saved) -> nn.Module:
    """The backbone in ``model``, which may be the module around it."""
    model = uncompiled(model)
    rest = set(_names_outside(saved))
    # A plain module is one around the backbone if it has all that the file has beside that.
    wraps = isinstance(model, LightningModule) or (bool(rest) and rest <= set(model.state_dict()))
    if not wraps:
        return model
    path = saved.record.get("beside", "")
    places = [path] if path else ["backbone", "model"]  # the usual names, where the file does not say it
    modules = dict(model.named_modules())
    return next((modules[place] for place in places if place in modules), model)


def _names_outside(saved: Saved) -> list[str]:
    """The names of the tensors that were beside the backbone, in the module around it."""
    return [name.removeprefix(OUTSIDE) for name in saved.tensors if name.startswith(OUTSIDE)]


def _tell_of_rest(saved: Saved, where: str) -> None:
    """Warn of tensors that were beside the backbone and are not loaded into it."""
    rest = _names_outside(saved)
    if rest:
        whole = "give load_adapter the LightningModule in its place"
        if saved.record.get("model"):
            whole = "core.load_run gives the whole model"
        warnings.warn(f"{where}: {listed(map(one_line, rest), 4)} stood beside the backbone and is not loaded into it; "
                      f"{whole}", stacklevel=3)


__all__ = ["FORMAT", "OUTSIDE", "RECORD", "TENSORS", "Content", "ModelRecord", "Saved", "adapter_bytes", "attach",
           "base_names", "fingerprint", "keep_only_owned", "load_adapter", "load_tensors", "method_of", "methods_on",
           "open_adapter", "read_adapter", "refusal", "rehearse", "restore", "save_adapter", "split_checkpoint",
           "versions"]
