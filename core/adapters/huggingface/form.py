"""How Hugging Face peft writes a method: what all methods have in common. A form in `forms` overrides parts of it."""

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
"""How peft names modules: one regular expression, or a list of endings of their names."""

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

BASE = "base_model."
"""What peft puts before the names of all tensors but those of prompts and prefixes."""

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
    """peft cannot express an option or a place of the method."""


@dataclass
class Part:
    """What peft holds for one module: tensors by their names there, and the options that only this module has."""

    tensors: dict[str, Tensor]
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class FolderPlan:
    """A method to make of a peft folder: its arguments, and by site what the folder holds for it."""

    arguments: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


@dataclass
class _Adapted:
    """A module that a method adapts, with the method's grafts there."""

    method: PEFTMethod
    grafts: list[Graft]


@dataclass
class _Alike:
    """Modules of one folder that have the same options."""

    options: dict[str, Any]
    names: list[str] = field(default_factory=list)


class PeftForm:
    """How peft writes a method. A subclass in `forms` overrides what is more than a difference of names.

    Methods that adapt modules override `to_hf` and `from_hf` (tensors), `config` and `arguments` (options). A method
    that does not (a prefix, prompts) overrides `write` and `read`, which see the whole folder.

    Args:
        kind: ``peft_type``.
        options: the method's arguments -> keys of the config.
        tensors: names of a module's tensors in the file -> those of the method's graft.
        fixed: keys of the config that mark the method among others of its type, with their values.
        training: keys that act only in training or at the start, so that any value is accepted.
        patterns: keys that hold other values of an option for some modules -> that option's key.
        modules: kinds of modules that peft can adapt so (see `Site.kind`).
    """

    types: Mapping[str, Any] = {}
    """Types of further keys of the config that this form reads, beside those of ``options`` and ``patterns``."""

    def __init__(self, kind: str, options: Mapping[str, str] | None = None, tensors: Mapping[str, str] | None = None, *,
                 fixed: Mapping[str, Any] | None = None, training: Sequence[str] = (),
                 patterns: Mapping[str, str] | None = None, modules: Sequence[str] = ("linear",)) -> None:
        self.kind = kind
        self.options = dict(options or {})
        self.tensors = dict(tensors or {})
        self.fixed = dict(fixed or {})
        self.training = tuple(training)
        self.patterns = dict(patterns or {})
        self.modules = tuple(modules)

    # ------------------------------------------------------------------------------- ours to theirs

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        """The method's options as peft names them."""
        config = dict(self.fixed)
        for ours, theirs in self.options.items():
            given = method.config[ours]
            # None leaves the value to the method, which holds it as an attribute of the same name.
            config[theirs] = getattr(method, ours) if given is None else given
        return config

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        """What peft holds for the module that these grafts of the method adapt."""
        graft = whole(method, grafts, self.modules)
        tensors: dict[str, Tensor] = {}
        for theirs, ours in self.tensors.items():
            tensor = getattr(graft, ours)
            if tensor is not None:
                tensors[theirs] = tensor
        return Part(tensors)

    def shared(self, method: PEFTMethod) -> dict[str, Tensor]:
        """Tensors of no module, by their names after ``base_model.``."""
        return {}

    def write(self, methods: list[PEFTMethod], wrapped: WrappedModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config and tensors of a folder that holds ``methods``, all of this form."""
        adapted = self._adapted_modules(methods)
        tensors = self._shared_tensors(methods)
        configs: dict[str, dict[str, Any]] = {}
        for path, module in adapted.items():
            part = self.to_hf(module.method, module.grafts)
            name = wrapped.name(path)
            configs[name] = {**self.config(module.method), **part.own}
            for theirs, tensor in part.tensors.items():
                tensors[f"{MODEL}{name}.{theirs}"] = tensor
        config = self._common(configs)
        config["target_modules"] = wrapped.pattern(configs)
        conv1d = [module.grafts[0].site.kind == "conv1d" for module in adapted.values()]
        config["fan_in_fan_out"] = bool(conv1d) and all(conv1d)
        return config, tensors

    def _adapted_modules(self, methods: list[PEFTMethod]) -> dict[str, _Adapted]:
        """The modules that the methods adapt, by their paths; two methods at one module are refused."""
        adapted: dict[str, _Adapted] = {}
        for method in methods:
            for graft in method.grafts:
                module = adapted.setdefault(graft.site.path, _Adapted(method, []))
                owner = module.method
                if owner is not method:
                    raise Inexpressible(f"{method.name} and {owner.name} stand at one module, {graft.site.path}; in "
                                        "peft an adapter stands there once")
                module.grafts.append(graft)
        return adapted

    def _shared_tensors(self, methods: list[PEFTMethod]) -> dict[str, Tensor]:
        """The tensors of no module, by their names in the file."""
        tensors: dict[str, Tensor] = {}
        for method in methods:
            for name, tensor in self.shared(method).items():
                if tensors.setdefault(f"{BASE}{name}", tensor) is not tensor:
                    raise Inexpressible(f"{method.name}: {name} is one for all modules of a peft adapter, and another "
                                        "method here has its own")
        return tensors

    def _common(self, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """One config for all modules, with patterns for those that differ."""
        pattern_of: dict[str, str] = {}
        for pattern, key in self.patterns.items():
            pattern_of.setdefault(key, pattern)
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(key for config in configs.values() for key in config):
            values = [config.get(key) for config in configs.values()]
            usual = _most_frequent(values)
            merged[key] = usual
            others: dict[str, Any] = {}
            for name, config in configs.items():
                if config.get(key) != usual:
                    # peft matches the end of a module's name; ^ makes it the whole name.
                    others[f"^{re.escape(name)}"] = config.get(key)
            if not others:
                continue
            if key not in pattern_of:
                raise Inexpressible(f"{key} differs between modules ({listed(dict.fromkeys(map(str, values)))}), and "
                                    "peft has one for all")
            merged[pattern_of[key]] = others
        return merged

    # ------------------------------------------------------------------------------- theirs to ours

    def check(self, config: dict[str, Any], cls: type[PEFTMethod], where: str) -> None:
        """Refuse a config in which a key that is read has another type than in peft.

        Raises:
            ScionError: begins with ``where`` and names the key.
        """
        arguments = types_of(cls)
        options = {theirs: arguments[ours] for ours, theirs in self.options.items()}
        patterns: dict[str, Any] = {}
        for pattern, key in self.patterns.items():
            patterns[pattern] = dict[str, options.get(key, Any)] | None
        for key, kind in {**options, **patterns, **TYPES, **self.types}.items():
            if key in config:
                check(config[key], kind, where, key)

    def sizes(self) -> set[str]:
        """The config's keys that may say how large something is."""
        return {*self.options.values(), *self.patterns, *self.types}

    def matches(self, config: dict[str, Any]) -> bool:
        """Whether a config of this type means this method."""
        # A key that is absent, or null, means false: earlier versions of peft did not have all of them.
        return all((config.get(key) or False) == value for key, value in self.fixed.items())

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        """The method's arguments that a config means."""
        return {ours: config[theirs] for ours, theirs in self.options.items() if theirs in config}

    def own(self, config: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The options that only this module has, beside those that a pattern gives it."""
        return {}

    def by_pattern(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The options that patterns give to modules, by the modules' names."""
        matches = Matcher()
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            found[name] = {}
            for pattern, key in self.patterns.items():
                values = config.get(pattern) or {}
                for module, value in values.items():
                    if matches(module, name, whole=False):
                        found[name][key] = value
                        break  # as in peft, the first pattern that matches decides
        return found

    def targets(self, config: dict[str, Any], roles: dict[str, list[str]]) -> dict[str, Any]:
        """The arguments that name the sites, from roles and the modules that play them."""
        return {"targets": list(roles)}

    def fits(self, site: Site) -> bool:
        """Whether the method can adapt a site."""
        return site.kind != "module" and site.role not in ("attention", "mlp")

    def from_hf(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The graft's tensors, by name, from what peft holds for its module."""
        found: dict[str, Tensor] = {}
        for theirs, ours in self.tensors.items():
            if theirs in tensors:
                found[ours] = reshaped(tensors[theirs], getattr(graft, ours), f"{graft.site.path}.{theirs}")
        return found

    def shared_from_hf(self, method: PEFTMethod, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's shared tensors, by their names in its module, from the file's tensors of no module."""
        return {}

    def refuse(self, config: dict[str, Any], where: str) -> None:
        """Refuse options that change the function and that the method does not have."""
        known = {*BOOKKEEPING, *self.options.values(), *self.fixed, *self.training, *self.patterns}
        for key, value in config.items():
            if key in self.training and "dropout" in key and value:
                warnings.warn(f"{where}: {key} {value} acts in training alone, and is left out", stacklevel=4)
            says_nothing = not value or (key == "bias" and value == "none")
            if key not in known and not says_nothing:
                raise ScionError(f"{where}: {key} {json.dumps(value)} is an option of peft's {self.kind} that the "
                                 "method here does not have")

    def read(self, config: dict[str, Any], given: dict[str, Tensor], wrapped: WrappedModel) -> list[FolderPlan]:
        """Take from ``given`` what belongs to modules, and return which methods to make of it."""
        modules = self._take_modules(given)
        if not modules:
            raise ScionError(f"{wrapped.where}: holds no tensors of {self.kind}")
        paths = wrapped.paths(modules)
        plans: list[FolderPlan] = []
        for alike in self._groups(config, modules):
            arguments = self.arguments({**config, **alike.options})
            names = {paths[name]: name for name in alike.names}
            for layers, sites in wrapped.cover(names, self.fits):
                roles: dict[str, list[str]] = {}
                for site, name in sites:
                    roles.setdefault(site.role, []).append(name)
                parts = {site.name: modules[name] for site, name in sites}
                plans.append(FolderPlan({**arguments, **self.targets(config, roles), "layers": layers}, parts))
        return plans

    def _take_modules(self, given: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Take from ``given`` the tensors of modules, by the modules' names and by their own."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key in list(given):
            name = next((name for name in self.tensors if key.endswith(f".{name}")), None)
            if key.startswith(MODEL) and name is not None:
                module = key.removeprefix(MODEL).removesuffix(f".{name}")
                modules.setdefault(module, {})[name] = given.pop(key)
        return modules

    def _groups(self, config: dict[str, Any], modules: dict[str, dict[str, Tensor]]) -> list[_Alike]:
        """The modules by their options: each group becomes at least one method."""
        patterned = self.by_pattern(config, modules)
        groups: dict[str, _Alike] = {}
        for name, tensors in modules.items():
            options = {**patterned[name], **self.own(config, name, tensors)}
            same = json.dumps(options, sort_keys=True)  # values may be lists, which are no keys of a dict
            groups.setdefault(same, _Alike(options)).names.append(name)
        return list(groups.values())

    def collect(self, method: PEFTMethod, plan: FolderPlan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        """All tensors of an attached method, by their names in the root."""
        shared = self.shared_from_hf(method, config, given)
        found = {f"{method.prefix}{name}": tensor for name, tensor in shared.items()}
        for graft in method.grafts:
            site = graft.site.name
            taken = self.from_hf(method, graft, plan.parts[site])
            for name, tensor in taken.items():
                found[f"{method.prefix}{key_of(site)}.{name}"] = tensor
        return found


class LoRAShapedForm(PeftForm):
    """peft's LoRA. It has one per module, so several changes of a module become one, whose rank is their ranks' sum."""

    def __init__(self, **more: Any) -> None:
        options = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "root": "use_rslora"}
        tensors = {"lora_A.weight": "A", "lora_B.weight": "B"}
        training = ("init_lora_weights", "megatron_core", "qalora_group_size", "eva_config")
        patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
        modules = ("linear", "conv1d", "conv")
        super().__init__("LORA", options, tensors, training=training, patterns=patterns, modules=modules, **more)

    def config(self, method: PEFTMethod) -> dict[str, Any]:
        # r and lora_alpha are left to `to_hf`, which knows the rank of each module's sum.
        config = dict(self.fixed)
        config["lora_dropout"] = method.config.get("dropout", 0.0)
        config["use_rslora"] = method.config.get("root", False)
        return config

    def pair(self, graft: Graft) -> tuple[Tensor, Tensor, float]:
        """A [rank, in], B [out, rank] and the scale of one graft's change."""
        factors = graft.factors()
        if factors is None:
            raise Inexpressible(f"{graft.site.name}: {type(graft).__name__} is no change of low rank")
        up, down = factors
        return down, up, 1.0

    def to_hf(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        site = grafts[0].site
        grouped = site.kind == "conv" and site.module.groups != 1  # type: ignore[operator]
        if site.kind not in self.modules or grouped or site.by_weight:
            raise Inexpressible(f"{method.name}: {site.path} ({type(site.module).__name__}) is none that peft's LoRA "
                                "can adapt")
        pairs = [self.pair(graft) for graft in grafts]
        down = torch.cat([down for down, _, _ in pairs])
        ups = [placed(graft.site, up) for graft, (_, up, _) in zip(grafts, pairs, strict=True)]
        up = torch.cat(ups, 1)
        rank = len(down)
        _, _, scale = pairs[0]  # grafts of one method have one scale
        divisor = math.sqrt(rank) if self.config(method)["use_rslora"] else rank
        # Rounded, for the scale is alpha / divisor itself, with an error in its last bits.
        alpha = round(scale * divisor, 12)
        if site.kind == "conv":
            # [rank, in x height x width] -> [rank, in, height, width]; [out, rank] -> [out, rank, 1, 1]
            down = down.view(rank, *site.full_weight.shape[1:])
            ones = [1] * (down.dim() - 2)
            up = up.view(*up.shape, *ones)
        own = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        return Part({"lora_A.weight": down, "lora_B.weight": up}, own)


def _most_frequent(values: list[Any]) -> Any:
    """The value that occurs most often; the first of several."""
    # They are counted by their repr: lists cannot be counted as they are, and True would count as 1.
    counts = Counter(map(repr, values))
    [(winner, _)] = counts.most_common(1)
    return next(value for value in values if repr(value) == winner)


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
    axis = 1 if site.kind == "conv1d" else 0  # transformers' Conv1D holds its weight as [in, out]
    if fill is None:
        fill = rows.new_zeros(site.full_weight.shape[axis], *rows.shape[1:])
    return site.rows.put(fill, rows)


def reshaped(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """``tensor`` in the shape of ``like``; only axes of length 1, or flattened ones, may differ."""
    # A shape of as many axes is never another way to write the same: [3, 2] for [2, 3] is an error.
    other_shape = tensor.dim() == like.dim() and tensor.shape != like.shape
    if other_shape or tensor.numel() != like.numel():
        raise ScionError(f"{name} is {list(tensor.shape)} in the file, {list(like.shape)} here")
    return tensor.reshape(like.shape)
