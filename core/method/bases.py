"""Bases that no method can be attached to: each is refused in one line, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from core.anatomy import Site
from core.errors import ScionError, listed

if TYPE_CHECKING:
    from core.method import PEFTMethod

QUANTIZERS = ("torch.ao.nn.quantized", "optimum.quanto", "hqq", "gptqmodel", "auto_gptq", "awq")
"""Packages whose modules hold a weight in few bits that is no parameter."""
WAY_OUT = ("methods stand on floating-point weights so far: load the base without quantization, or dequantize it "
           "first (model.dequantize() in transformers)")


def check_base(model: nn.Module, asker: str = "") -> None:
    """Refuse a model whose tensors are missing, or not in a form that can be read.

    Raises:
        ScionError: it has no parameters; it is offloaded; a part of it has no values; its weights are quantized by a
            library whose tensors cannot be looked into.
    """
    who = f"{asker}: " if asker else ""
    kind = type(model).__name__
    for path, module in model.named_modules():
        if _offloads(vars(module).get("_hf_hook")):
            raise ScionError(f"{who}{path or kind} is offloaded by accelerate, so that its weights come and go with "
                             "each call: load the model whole onto one device (device_map={'': 0}), or take the hooks "
                             "off (accelerate.hooks.remove_hook_from_submodules)")
        if _packs(module):
            raise ScionError(f"{who}{path} ({type(module).__name__}) holds a quantized weight; {WAY_OUT}")
    parameters = _own_parameters(model)
    if not parameters:
        raise ScionError(f"{who}{kind} has no parameters, so there is nothing to adapt")
    for name, parameter in parameters.items():
        if isinstance(parameter, UninitializedTensorMixin):
            raise ScionError(f"{who}{name} gets its shape with the first forward: run the model once, then attach")
        if type(parameter).__module__.startswith("torchao"):
            raise ScionError(f"{who}{name} is quantized ({type(parameter).__name__}); {WAY_OUT}")
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    # A model that is on the meta device as a whole is meant so: methods are counted and planned on it.
    if empty and len(empty) < len(parameters):
        raise ScionError(f"{who}{len(empty)} of the {len(parameters)} parameters of {kind} are on the meta device, "
                         f"without values ({listed(empty, 2)}): load them first")


def check_quantized(model: nn.Module, sites: Iterable[Site], moved: Iterable[str], asker: str) -> None:
    """Refuse to graft onto, or to train, weights in few bits; methods that do neither can have such a base."""
    codes = [name for name, parameter in _own_parameters(model).items() if is_quantized(parameter)]
    moved = set(moved)
    has_sites = any(True for _ in sites)  # an iterator may have no length
    touched = codes if has_sites else [name for name in codes if name in moved]
    if touched:
        owner = model.get_submodule(touched[0].rpartition(".")[0])
        raise ScionError(f"{asker}: {touched[0]} is quantized ({type(owner).__name__}); {WAY_OUT}")


def check_sites(method: PEFTMethod, sites: Iterable[Site]) -> None:
    """Refuse sites whose weight a method could not change.

    Those are weights that are made from other tensors in each forward; and, at maps that are never called as modules,
    methods that cannot be written into the weight.
    """
    for site in sites:
        if site.kind != "module" and site.parameter not in site.module._parameters:
            raise ScionError(f"{method.name}: the weight of {site.path} is made from other tensors in each forward "
                             "(weight_norm, spectral_norm, pruning): make it one again first "
                             "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm, "
                             "torch.nn.utils.remove_spectral_norm, torch.nn.utils.prune.remove)")
        if not site.by_weight:
            continue
        part = (f"{method.name}: {site.name} is a part of {site.path} ({type(site.module).__name__}) that is never "
                "called")
        if not method.mergeable:
            raise ScionError(f"{part}: only methods that merge into the weight can act there; take other targets")
        if method.config.get("dropout"):
            raise ScionError(f"{part}, so that its input cannot be dropped: set dropout to 0")


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the base, without those of methods on it."""
    return {name: p for name, p in model.named_parameters() if "peft" not in name.split(".")}


def is_quantized(tensor: Tensor) -> bool:
    """Whether a parameter holds codes, or numbers of eight bits, instead of a weight."""
    codes = not (tensor.is_floating_point() or tensor.is_complex())
    # A vector of whole numbers is no weight: it may count or index something.
    return tensor.dim() > 1 and (codes or tensor.dtype.itemsize == 1)


def _packs(module: nn.Module) -> bool:
    """Whether a module is one of a quantizing library, whose weight is no parameter."""
    return any(cls.__module__.startswith(QUANTIZERS) for cls in type(module).__mro__)


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate (or one of a row of them) moves weights in and out."""
    if getattr(hook, "offload", False):
        return True
    return any(_offloads(one) for one in getattr(hook, "hooks", ()))
