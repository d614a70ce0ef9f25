"""Errors and warnings where other libraries save or load a model without its methods."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as L
from torch import nn

from core.anatomy.description import class_names
from core.errors import ScionError, listed

SAVERS = ("transformers", "sentence_transformers", "diffusers")
"""Packages whose functions with ``save`` in their names write a model that only they read."""
DEPTH = 60
"""Frames to look back for them."""
ROW = ("sentence_transformers.base.model:BaseModel", "sentence_transformers.SentenceTransformer:SentenceTransformer")
"""Classes of sentence-transformers (of versions 6 and before) that run modules in a row."""
IN_ROW = ("sentence_transformers.base.modules.transformer:Transformer",
          "sentence_transformers.models.Transformer:Transformer")
"""Those of the modules in it that hold a model of transformers, as ``auto_model``."""


def sentence_backbone(model: nn.Module) -> nn.Module:
    """The transformers model in a ``SentenceTransformer`` or ``CrossEncoder``, under its classifier where it has one;
    any other model itself.

    Raises:
        ScionError: there is none in it, or several.
    """
    if not _is_one_of(model, ROW):
        return model
    holders = {path: module for path, module in model.named_modules() if _is_one_of(module, IN_ROW)}
    kind = type(model).__name__
    if not holders:
        raise ScionError(f"{kind} holds no transformer (its modules are {listed(_kinds(model))}), and no method can "
                         "stand on those")
    if len(holders) > 1:
        raise ScionError(f"{kind} holds several transformers ({listed(holders)}): give attach the auto_model of one")
    [holder] = holders.values()
    return holder.auto_model  # type: ignore[return-value]


def _is_one_of(module: nn.Module, names: Sequence[str]) -> bool:
    return any(name in names for name in class_names(module))


def _kinds(model: nn.Module) -> list[str]:
    return [type(child).__name__ for child in model.children()]


# ------------------------------------------------------------------------------------------------- saving


def watch_saving(root: nn.Module) -> None:
    """Warn when a library saves ``root``, or a part of it, without what is attached; a second call changes nothing."""
    for module in _savable(root):
        if _warn_of_saving not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_warn_of_saving)


def end_watch(root: nn.Module) -> None:
    """Undo of `watch_saving`."""
    for module in _savable(root):
        hooks = module._state_dict_pre_hooks
        ours = [key for key, hook in hooks.items() if hook is _warn_of_saving]
        for key in ours:
            del hooks[key]


def _savable(root: nn.Module) -> list[nn.Module]:
    """The root, and the models of other libraries in it, each of which can be saved by itself."""
    return [module for module in root.modules() if module is root or hasattr(module, "save_pretrained")]


def _warn_of_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """The hook of `watch_saving`. torch also calls it where a module around this one is saved, with a prefix then."""
    attached = "peft" in module._modules
    # The root of the methods warns in any case; a part of it only where it is saved by itself.
    if (prefix and not attached) or not _is_saved():
        return
    warnings.warn(f"{type(module).__name__} is being saved with methods attached, and what is written is read back as "
                  "the plain base, without them: call method.merge() before, or method.save(folder) for the method "
                  "alone (core.load_adapter reads that)", stacklevel=2)


def _is_saved() -> bool:
    """Whether one of the `SAVERS` is asking."""
    frame: Any = sys._getframe(2)  # 0 is here, 1 the hook, 2 the caller of the hook
    for _ in range(DEPTH):
        if frame is None:
            return False
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in SAVERS and "save" in frame.f_code.co_name:
            return True
        frame = frame.f_back
    return False


# ------------------------------------------------------------------------------------------------- loading


def watch_loading() -> None:
    """Let LightningModules refuse a checkpoint with methods that they do not have.

    torch would show hundreds of missing keys, or with ``strict=False`` load nothing without a word.
    """
    L.LightningModule.load_state_dict = _load_state_dict  # type: ignore[method-assign]


def _load_state_dict(self: L.LightningModule, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
                     ) -> Any:
    """``LightningModule.load_state_dict``, behind a check for methods that would be lost."""
    lost = _methods_lost(self, state_dict)
    if lost:
        message = (f"the checkpoint holds {listed(lost, 3)}, which {type(self).__name__} does not have: make the "
                   "module, then core.load_adapter(checkpoint, module) attaches the methods and loads all; or give the "
                   "Trainer the same methods as callbacks")
        if strict:
            raise ScionError(message)
        warnings.warn(f"{message}. Without that the base alone is loaded", stacklevel=3)
    return super(L.LightningModule, self).load_state_dict(state_dict, strict=strict, assign=assign)


def _methods_lost(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the methods in ``state`` whose places in ``module`` are empty."""
    found: list[str] = []
    modules = dict(module.named_modules())
    for name in state:
        # <path of the root>peft.<method>._extra_state holds each method's record; modules inside may have one as well.
        path, home, method = name.removesuffix("._extra_state").rpartition("peft.")
        is_record = bool(home) and name.endswith("._extra_state")
        if not is_record or "." in method:
            continue
        root = modules.get(path.removesuffix("."))
        if root is None or "peft" not in root._modules:
            found.append(f"{method} at {path.removesuffix('.') or 'its root'}")
    return found
