"""How Hugging Face peft writes a method: what is common to all, which a form in `forms` overrides."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from core.adapters.huggingface.patterns import Matcher
from core.adapters.huggingface.wrapped import WrappedModel
from core.anatomy import Site
from core.errors import ScionError, listed
from core.graft import Graft
from core.json_types import check
from core.method import PEFTMethod, key_of
from core.record import types_of

Names = str | list[str] | None
"""Modules, as peft names them: a pattern, or their names' endings."""

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

BASE = "base_model."

MODEL = f"{BASE}model."
"""What peft puts before the names of the wrapped model's modules."""

BOOKKEEPING = frozenset((
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "fan_in_fan_out",
    "runtime_config"))
"""Config keys that say nothing beyond the names of the tensors in the file."""

TYPES: dict[str, Any] = {
    "peft_type": str, "target_modules": Names, "exclude_modules": Names, "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None, "layers_pattern": Names, "bias": str, "fan_in_fan_out": bool | None}
"""Types of keys that all configs have."""


class Inexpressible(ScionError):
    """peft has no word for an option or a place of the method."""


@dataclass
class Part:
    """What peft holds for one module: tensors by their names there, and the options of this module alone."""

    tensors: dict[str, Tensor]
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class FolderPlan:
    """A method to make of a peft folder: its arguments, and by site what the folder holds for it."""

    arguments: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


class PeftForm:
    """How peft writes a method; a subclass in `forms` overrides what is not a matter of names.

    For methods of modules that is `to_hf` and `from_hf` (tensors), `config` and `arguments` (options). A method that
    is not at modules (a prefix, prompts) overrides `write` and `read`, which see the whole folder.

    Args:
        kind: ``peft_type``.
        options: the method's arguments -> keys of the config.
        tensors: names of a module's tensors in the file -> those of the method's graft.
        fixed: keys of the config that mark the method among others of its type, with their values.
        training: keys that act in training or at the start alone, so that any value may stand there.
        patterns: keys that hold other values of an option for some modules -> that option's key.
        modules: kinds of modules that peft can adapt so (see `Site.kind`).
    """

    types: Mapping[str, Any] = {}
    """Types of the config's keys that this form reads itself, beside those of ``options`` and ``patterns``."""

    def __init__(self, kind: str, options: Mapping[str, str] | None = None, tensors: Mapping[str, str] | None = None, *,
                 fixed: Mapping[str, Any] | None = None, training: Sequence[str] = (),
                 patterns: Mapping[str, str] | None = None, modules: Sequence[str] = ("linear",)) -> None:
        self.kind, self.options, self.tensors = kind, dict(options or {}), dict(tensors or {})
        self.fixed, self.training, self.patterns = dict(fixed or {}), tuple(training), dict(patterns or {})
        self.modules = tuple(modules)

    # ------------------------------------------------------------------------------- ours to theirs

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        """The method's options as peft names them."""
        given = {ours: method.config[ours] for ours in self.options}
        return {**self.fixed, **{theirs: getattr(method, ours) if given[ours] is None else given[ours]
                                 for ours, theirs in self.options.items()}}

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        """What peft holds for the module at which these grafts of the method stand."""
        graft = whole(method, grafts, self.modules)
        return Part({theirs: tensor for theirs, ours in self.tensors.items()
                     if (tensor := getattr(graft, ours)) is not None})

    def shared(self, method: PEFTMethod) -> dict[str, Tensor]:
        """Tensors of no module, by their names after ``base_model.``."""
        return {}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config and tensors of a folder that holds ``methods``, all of this form."""
        standing: dict[str, tuple[PEFTMethod, list[Graft]]] = {}
        for method in methods:
            for graft in method.grafts:
                owner, grafts = standing.setdefault(graft.site.path, (method, []))
                if owner is not method:
                    raise Inexpressible(f"{method.name} and {owner.name} stand at one module, {graft.site.path}; in "
                                        "peft an adapter stands there once")
                grafts.append(graft)
        tensors: dict[str, Tensor] = {}
        for method in methods:
            for name, tensor in self.shared(method).items():
                if tensors.setdefault(f"{BASE}{name}", tensor) is not tensor:
                    raise Inexpressible(f"{method.name}: {name} is one for all modules of a peft adapter, and another "
                                        "method here has its own")
        configs: dict[str, dict[str, Any]] = {}
        for path, (method, grafts) in standing.items():
            part, name = self.to_hf(method, grafts), wrapped.name(path)
            configs[name] = {**self.config(method), **part.own}
            tensors |= {f"{MODEL}{name}.{theirs}": tensor for theirs, tensor in part.tensors.items()}
        conv1d = [grafts[0].site.kind == "conv1d" for _, grafts in standing.values()]
        return {**self._common(configs), "target_modules": wrapped.pattern(configs),
                "fan_in_fan_out": bool(conv1d) and all(conv1d)}, tensors

    def _common(self, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One config for all modules, with patterns for those that differ."""
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(key for config in configs.values() for key in config):
            values = [config.get(key) for config in configs.values()]
            merged[key] = Counter(map(repr, values)).most_common(1)[0][0]
            merged[key] = next(value for value in values if repr(value) == merged[key])
            others = {f"^{re.escape(name)}": config.get(key) for name, config in configs.items()
                      if config.get(key) != merged[key]}
            pattern = next((pattern for pattern, of in self.patterns.items() if of == key), None)
            if others and pattern is None:
                raise Inexpressible(f"{key} differs between modules ({listed(dict.fromkeys(map(str, values)))}), and "
                                    "peft has one for all")
            if others and pattern is not None:
                merged[pattern] = others
        return merged

    # ------------------------------------------------------------------------------- theirs to ours

    def check(self, config: dict[str, Any], cls: type[PEFTMethod], where: str) -> None:
        """Refuse a config in which something that is read has another type than peft gives it.

        Raises:
            ScionError: begins with ``where`` and names the key.
        """
        ours = {theirs: types_of(cls)[option] for option, theirs in self.options.items()}
        patterns = {pattern: dict[str, ours.get(key, Any)] | None for pattern, key in self.patterns.items()}
        for key, kind in {**ours, **patterns, **TYPES, **self.types}.items():
            if key in config:
                check(config[key], kind, where, key)

    def sizes(self) -> set[str]:
        """The config's keys that may say how large something is."""
        return {*self.options.values(), *self.patterns, *self.types}

    def matches(self, config: dict[str, Any]) -> bool:
        """Whether a config of this type means this method."""
        return all((config.get(key) or False) == value for key, value in self.fixed.items())

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        """The method's arguments that a config means."""
        return {ours: config[theirs] for ours, theirs in self.options.items() if theirs in config}

    def own(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The options of one module alone, beside those that a pattern gives it."""
        return {}

    def by_pattern(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The options that patterns give to modules, by the modules' names."""
        matches = Matcher()
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            found[name] = {}
            for pattern, key in self.patterns.items():
                for module, value in (config.get(pattern) or {}).items():
                    if matches(module, name, whole=False):
                        found[name][key] = value
                        break
        return found

    def targets(self, config: dict[str, Any], roles: dict[str, list[str]]) -> dict[str, Any]:
        """The arguments that name the sites, from roles and the modules that play them."""
        return {"targets": list(roles)}

    def fits(self, site: Site) -> bool:
        """Whether the method can stand at a site."""
        return site.kind != "module" and site.role not in ("attention", "mlp")

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The graft's tensors, by name, from what peft holds for its module."""
        return {ours: reshaped(tensors[theirs], getattr(graft, ours), f"{graft.site.path}.{theirs}")
                for theirs, ours in self.tensors.items() if theirs in tensors}

    def shared_from_hf(self, method: PEFTMethod, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's shared tensors, by their names in its module, from the file's tensors of no module."""
        return {}

    def refuse(self, config: dict[str, Any], where: str) -> None:
        """Refuse options that change the function and that the method does not have."""
        known = {*BOOKKEEPING, *self.options.values(), *self.fixed, *self.training, *self.patterns}
        for key, value in config.items():
            if key in self.training and "dropout" in key and value:
                warnings.warn(f"{where}: {key} {value} acts in training alone, and is left out", stacklevel=4)
            if key not in known and value and not (key == "bias" and value == "none"):
                raise ScionError(f"{where}: {key} {json.dumps(value)} is an option of peft's {self.kind} that the "
                                 "method here does not have")

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        """Takes from ``given`` what belongs to modules, and says which methods to make of it."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key in list(given):
            name = next((name for name in self.tensors if key.endswith(f".{name}")), None)
            if key.startswith(MODEL) and name is not None:
                path = key.removeprefix(MODEL).removesuffix(f".{name}")
                modules.setdefault(path, {})[name] = given.pop(key)
        if not modules:
            raise ScionError(f"{wrapped.where}: holds no tensors of {self.kind}")
        paths = wrapped.paths(modules)
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        patterned = self.by_pattern(config, modules)
        for name, tensors in modules.items():
            own = {**patterned[name], **self.own(config, name, tensors)}
            groups.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(name)
        plans = []
        for own, names in groups.values():
            arguments = self.arguments({**config, **own})
            for layers, sites in wrapped.cover({paths[name]: name for name in names}, self.fits):
                roles: dict[str, list[str]] = {}
                for site, name in sites:
                    roles.setdefault(site.role, []).append(name)
                plans.append(FolderPlan({**arguments, **self.targets(config, roles), "layers": layers},
                                  {site.name: modules[name] for site, name in sites}))
        return plans

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        """All tensors of an attached method, by their names in the root."""
        shared = self.shared_from_hf(method, config, given)
        found = {f"{method.prefix}{name}": tensor for name, tensor in shared.items()}
        for graft in method.grafts:
            taken = self.from_hf(method, graft, plan.parts[graft.site.name])
            found |= {f"{method.prefix}{key_of(graft.site.name)}.{name}": tensor for name, tensor in taken.items()}
        return found


class LoRAShapedForm(PeftForm):
    """peft's LoRA. It has one a module: several changes there, or of some rows each, become one of their ranks' sum."""

    def __init__(self, **more: Any) -> None:
        super().__init__("LORA", {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "root": "use_rslora"},
                         {"lora_A.weight": "A", "lora_B.weight": "B"},
                         training=("init_lora_weights", "megatron_core", "qalora_group_size", "eva_config"),
                         patterns={"rank_pattern": "r", "alpha_pattern": "lora_alpha"},
                         modules=("linear", "conv1d", "conv"), **more)

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        given = method.config
        return {**self.fixed, "lora_dropout": given.get("dropout", 0.0), "use_rslora": given.get("root", False)}

    def pair(self, graft: Graft) -> tuple[Tensor, Tensor, float]:
        """A [rank, in], B [out, rank] and the scale of one graft's change."""
        factors = graft.factors()
        if factors is None:
            raise Inexpressible(f"{graft.site.name}: {type(graft).__name__} is no change of low rank")
        return factors[1], factors[0], 1.0

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        site = grafts[0].site
        grouped = site.kind == "conv" and site.module.groups != 1  # type: ignore[operator]
        if site.kind not in self.modules or grouped or site.by_weight:
            raise Inexpressible(f"{method.name}: {site.path} ({type(site.module).__name__}) is none that peft's LoRA "
                                "can adapt")
        pairs = [self.pair(graft) for graft in grafts]
        down = torch.cat([down for down, _, _ in pairs])
        up = torch.cat([placed(graft.site, up) for graft, (_, up, _) in zip(grafts, pairs, strict=True)], 1)
        rank, scale = len(down), pairs[0][2]  # grafts of one method have one scale
        alpha = round(scale * (math.sqrt(rank) if self.config(method)["use_rslora"] else rank), 12)
        if site.kind == "conv":
            down = down.view(rank, *site.full_weight.shape[1:])
            up = up.view(*up.shape, *[1] * (down.dim() - 2))
        return Part({"lora_A.weight": down, "lora_B.weight": up},
                    {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha})


def whole(method: PEFTMethod, grafts: list[Graft], kinds: Sequence[str]) -> Graft:
    """The only graft at a module that peft can adapt, on all of its rows."""
    site = grafts[0].site
    if site.rows is not None or len(grafts) > 1:
        raise Inexpressible(f"{method.name}: {site.name} is a part of {site.path}, which peft adapts as a whole only "
                            "(for q, k and v that is the target 'qkv')")
    if site.kind not in kinds or site.by_weight:
        raise Inexpressible(f"{method.name}: {site.path} is a {type(site.module).__name__}, and peft has the method "
                            f"for {', '.join(kinds)} alone")
    return grafts[0]


def placed(site: Site, rows: Tensor, fill: Tensor | None = None) -> Tensor:
    """A site's ``rows`` [out, ...] in place among all of its module's; the others are zero, or ``fill``'s."""
    if site.rows is None:
        return rows
    axis = 1 if site.kind == "conv1d" else 0
    everything = rows.new_zeros(site.full_weight.shape[axis], *rows.shape[1:]) if fill is None else fill
    return site.rows.put(everything, rows)


def reshaped(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """``tensor`` in the shape of ``like``, from which it may differ in axes of length 1 or flattened ones alone."""
    if tensor.numel() != like.numel() or (tensor.dim() == like.dim() and tensor.shape != like.shape):
        raise ScionError(f"{name} is {list(tensor.shape)} in the file, {list(like.shape)} here")
    return tensor.reshape(like.shape)
