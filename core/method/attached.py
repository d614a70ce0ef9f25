"""The subtree ``peft`` of a model that methods are attached to, and what a checkpoint leaves out of such a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError, listed
from core.method.described import Base, key_of
from core.method.other_libraries import end_watch, watch_saving

if TYPE_CHECKING:
    from core.anatomy import Anatomy
    from core.method import PEFTMethod


class Home(nn.Module):
    """The one subtree ``peft`` on the module given to ``attach``: every method's tensors, and the base's state."""

    def __init__(self, root: nn.Module, anatomy: Anatomy, head: str) -> None:
        super().__init__()
        self.methods: dict[str, PEFTMethod] = {}
        self.attached = 0
        """Methods attached so far."""
        self.keep_float32 = False
        """Whether ``.to(bfloat16)`` leaves the methods' tensors as they are: so within a Trainer, whose true
        half-precision plugins convert the whole module, while small updates need float32."""
        self._root = [root]  # in a list, so that the root is not registered as a child
        self.trained_head: frozenset[str] = frozenset(getattr(root, "trained_head", ()))
        """Names of what a task trains in the base itself (`core.backbone.Backbone.trained_head`)."""
        self.heads = sorted(anatomy.head_names() | self.trained_head)
        self.base: Base | None = Base.of(anatomy)
        """The base before the first method; None where its values arrive later."""
        self.fingerprint = self.base.whole
        self.without_values = any(p.is_meta for p in root.parameters())
        self.head = head
        self.flags = {name: p.requires_grad for name, p in root.named_parameters()}
        self.odd = {name: module.training for name, module in root.named_modules() if module.training != root.training}
        """Modules that are not in the root's mode, with theirs."""

    def _replicate_for_data_parallel(self) -> Home:
        raise ScionError("nn.DataParallel copies a module for each device, and the copies would read the first one's "
                         "methods: train with one process a device (Trainer(strategy='ddp'), torchrun)")

    def enter(self, root: nn.Module) -> None:
        """Become ``root.peft`` and freeze the backbone."""
        root.add_module("peft", self)
        self._freeze(root)
        watch_saving(root)

    def _freeze(self, root: nn.Module) -> None:
        for name, parameter in root.named_parameters():
            if not name.startswith("peft."):
                is_head = name in self.heads and self.head == "train"
                parameter.requires_grad_(is_head or name in self.trained_head)

    def add(self, method: PEFTMethod) -> None:
        self.methods[method.name] = method
        self.methods = dict(sorted(self.methods.items(), key=lambda item: item[1].place))
        self.add_module(key_of(method.name), method.module)

    def drop(self, method: PEFTMethod) -> None:
        del self.methods[method.name]
        delattr(self, key_of(method.name))

    def take_off(self, method: PEFTMethod) -> None:
        """Drop a method; the last one leaves the root as it was before the first."""
        self.drop(method)
        parameters = dict(self.root.named_parameters())
        for name in method.base_at_start:
            parameters[name].requires_grad_(False)
        if not self.methods:
            self.leave(self.root)

    def leave(self, root: nn.Module) -> None:
        """Remove the subtree and give the parameters their flags back."""
        training = root.training
        end_watch(root)
        del root.peft
        for name, parameter in root.named_parameters():
            parameter.requires_grad_(self.flags.get(name, parameter.requires_grad))
        root.train(training)
        for name, mode in self.odd.items():
            root.get_submodule(name).training = mode

    def _apply(self, fn: Any, recurse: bool = True) -> Home:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            half = tensor.dtype == torch.float32 and moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(moved.device) if half else moved

        return super()._apply(keep if self.keep_float32 else fn, recurse)

    @property
    def root(self) -> nn.Module:
        """What the methods are attached to."""
        return self._root[0]

    def base_now(self) -> Base:
        """The base before the first method, or as it is where that is not known."""
        return self.base or Base.of(dissect(self.root))

    def owned(self) -> set[str]:
        """Names (in the root) of base tensors that a run must save: what methods move, and what else is trained now (a
        head, parts that were unfrozen since)."""
        trained = {name for name, p in self.root.named_parameters() if p.requires_grad}
        moved = {name for method in self.methods.values() for name in (*method.base_at_start, *method.buffers_at_start)}
        return moved | {name for name in trained if not name.startswith("peft.")}

    def unfrozen(self) -> dict[str, Tensor]:
        """The base's parameters that are trained now and belong neither to a method nor to a head."""
        owned = {*self.heads, *(name for method in self.methods.values() for name in method.base_at_start)}
        return {name: p.detach() for name, p in self.root.named_parameters()
                if p.requires_grad and name not in owned and not name.startswith("peft.")}

    def train(self, mode: bool = True) -> Home:
        """The root calls this last of its children: put its frozen parts, methods too, back into eval mode."""
        super().train(mode)
        for method in self.methods.values():
            if not method.is_trained:
                method.module.eval()
        if mode and all(method.backbone_mode == "eval" for method in self.methods.values()):
            root = self._root[0]
            heads = {name.rpartition(".")[0] for name in self.heads}
            for name, child in root.named_modules():
                if name and name.split(".")[0] != "peft" and name not in heads:
                    child.training = False
        return self


def methods_on(model: nn.Module) -> list[PEFTMethod]:
    """The methods attached to ``model`` or to a module inside it, in order."""
    return [method for module in model.modules() if isinstance(module, Home) for method in module.methods.values()]


def home_in(model: nn.Module) -> tuple[str, nn.Module] | None:
    """(path, module) of the module inside ``model`` that methods are attached to."""
    for name, module in model.named_modules():
        if isinstance(module._modules.get("peft"), Home):
            return name, module
    return None


# ------------------------------------------------------------------------------------------------- checkpoints


def keep_only_owned(module: nn.Module) -> None:
    """Let the state dict of a LightningModule leave out its frozen backbone, and its strict loading forgive exactly
    that, also where the module stands in another one (an average of it). The hooks are plain functions, so they copy
    and pickle with the module; a second call changes nothing."""
    if _leave_out_base not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_leave_out_base)
        module.register_load_state_dict_pre_hook(_note_prefix)
        module.register_load_state_dict_post_hook(_forgive_base)


def base_names(module: nn.Module) -> set[str]:
    """Names, in ``module``'s state dict, of the frozen base tensors that no method owns."""
    names: set[str] = set()
    for prefix, home in _homes(module):
        owned = home.owned()
        names |= {prefix + name for name in nn.Module.state_dict(home.root)
                  if name not in owned and not name.startswith("peft.")}
    return names


def _homes(module: nn.Module) -> Iterator[tuple[str, Home]]:
    """The homes in ``module``, each with what the names of its root's tensors begin with."""
    for path, root in module.named_modules():
        home = root._modules.get("peft")
        if isinstance(home, Home):
            yield f"{path}." if path else "", home


def _leave_out_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in base_names(module):
        state.pop(prefix + name, None)


def _note_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Keep what the module's names begin with in the state dict that is being loaded."""
    module.__dict__["_prefix"] = prefix


def _forgive_base(module: nn.Module, incompatible: Any) -> None:
    """Called when all is loaded, methods' structures included."""
    prefix = module.__dict__.pop("_prefix", "")
    unfrozen = {prefix + root + name for root, home in _homes(module) for name in home.unfrozen()}
    buffers = {prefix + root + name for root, home in _homes(module) for method in home.methods.values()
               for name in method.buffers_at_start}  # files of earlier versions lack them
    forgiven = {prefix + name for name in base_names(module)} | buffers | unfrozen
    kept = sorted(unfrozen & set(incompatible.missing_keys))
    if kept:
        warnings.warn(f"{listed(kept, 3)} of the base is trained now and was frozen when the checkpoint was written: "
                      "it keeps its present values", stacklevel=2)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in forgiven]
