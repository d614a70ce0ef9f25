"""Both ways with Hugging Face peft: its adapter folders are read and written here, without importing it.

A method that peft knows says in its own file how it is written there (``peft = PeftForm(...)``): the name of its type,
its options under their other names, its tensors under theirs. What is common to all is here: which module of the model
a site is, which roles and layers a set of modules is, options for one module alone (``rank_pattern``), heads, files.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import peft
from core.anatomy import Anatomy, Site, dissect
from core.compose import SideBySide
from core.errors import ScionError, listed, one_line
from core.files import read_json, write_json
from core.graft import Carrier, Graft
from core.method import PEFTMethod, key_of, methods_on, uncompiled
from core.reading import load_tensors, open_adapter, refusal, restore
from core.rehearsal import hollow, is_small, reach, rehearsing, twin
from core.saving import RECORD
from core.schema import check, shown
from core.spec import types_of
from core.tensors import kind_of, read_tensors, write_tensors

Names = str | list[str] | None
"""Modules, as peft names them: a pattern, or their names' endings."""
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
VERSION = "0.21.2"
"""The version of peft whose way of writing is meant."""
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
LARGEST_CONFIG = 16 * 2**20
"""Bytes of a config."""


class Inexpressible(ScionError):
    """peft has no word for an option or a place of the method."""


@dataclass
class Part:
    """What peft holds for one module: tensors by their names there, and the options of this module alone."""

    tensors: dict[str, Tensor]
    own: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plan:
    """A method to make of a peft folder: its arguments, and by site what the folder holds for it."""

    arguments: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]


class PeftForm:
    """How peft writes a method; a subclass in the method's file overrides what is not a matter of names.

    For methods of modules that is `give` and `take` (tensors), `config` and `arguments` (options). A method that does
    not stand at modules (a prefix, prompts) overrides `write` and `read`, which see the whole folder.

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

    def give(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
        """What peft holds for the module at which these grafts of the method stand."""
        graft = whole(method, grafts, self.modules)
        return Part({theirs: tensor for theirs, ours in self.tensors.items()
                     if (tensor := getattr(graft, ours)) is not None})

    def shared(self, method: PEFTMethod) -> dict[str, Tensor]:
        """Tensors of no module, by their names after ``base_model.``."""
        return {}

    def write(self, methods: list[PEFTMethod], place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
            part, name = self.give(method, grafts), place.name(path)
            configs[name] = {**self.config(method), **part.own}
            tensors |= {f"{MODEL}{name}.{theirs}": tensor for theirs, tensor in part.tensors.items()}
        conv1d = [grafts[0].site.kind == "conv1d" for _, grafts in standing.values()]
        return {**self._common(configs), "target_modules": place.pattern(configs),
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

    def take(self, method: PEFTMethod, graft: Graft, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The graft's tensors, by name, from what peft holds for its module."""
        return {ours: reshaped(tensors[theirs], getattr(graft, ours), f"{graft.site.path}.{theirs}")
                for theirs, ours in self.tensors.items() if theirs in tensors}

    def take_shared(self, method: PEFTMethod, config: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
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

    def read(self, config: dict[str, Any], given: dict[str, Tensor], place: Place) -> list[Plan]:
        """Takes from ``given`` what belongs to modules, and says which methods to make of it."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key in list(given):
            name = next((name for name in self.tensors if key.endswith(f".{name}")), None)
            if key.startswith(MODEL) and name is not None:
                path = key.removeprefix(MODEL).removesuffix(f".{name}")
                modules.setdefault(path, {})[name] = given.pop(key)
        if not modules:
            raise ScionError(f"{place.where}: holds no tensors of {self.kind}")
        paths = place.paths(modules)
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        patterned = self.by_pattern(config, modules)
        for name, tensors in modules.items():
            own = {**patterned[name], **self.own(config, name, tensors)}
            groups.setdefault(json.dumps(own, sort_keys=True), (own, []))[1].append(name)
        plans = []
        for own, names in groups.values():
            arguments = self.arguments({**config, **own})
            for layers, sites in place.cover({paths[name]: name for name in names}, self.fits):
                roles: dict[str, list[str]] = {}
                for site, name in sites:
                    roles.setdefault(site.role, []).append(name)
                plans.append(Plan({**arguments, **self.targets(config, roles), "layers": layers},
                                  {site.name: modules[name] for site, name in sites}))
        return plans

    def collect(self, method: PEFTMethod, plan: Plan, config: dict[str, Any], given: dict[str, Tensor]
                ) -> dict[str, Tensor]:
        """All tensors of an attached method, by their names in the root."""
        found = {f"{method.prefix}{name}": tensor for name, tensor in self.take_shared(method, config, given).items()}
        for graft in method.grafts:
            taken = self.take(method, graft, plan.parts[graft.site.name])
            found |= {f"{method.prefix}{key_of(graft.site.name)}.{name}": tensor for name, tensor in taken.items()}
        return found


class LowRank(PeftForm):
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

    def give(self, method: PEFTMethod, grafts: list[Graft]) -> Part:
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


SIMPLE = re.compile(r"(?:\\.|[^\\*+?{}()\[\]])*", re.DOTALL)
"""Patterns that say one text, or one of several: they are matched in the time that reading them takes."""
PATIENCE = 1.0
"""Seconds that all other patterns of a config may take together."""


class Matcher:
    """Says whether a pattern of a config means a module of that name; patterns that take too long are refused.

    A pattern is a regular expression, and some of those take time without end.
    """

    def __init__(self) -> None:
        self.left = PATIENCE

    def __call__(self, pattern: str, name: str, whole: bool = True) -> bool:
        """Whether the pattern is all of the name; without ``whole`` further parts may stand before it."""
        wide = pattern if whole else rf"(?:.*\.)?(?:{pattern})"
        try:
            return re.fullmatch(wide, name) is not None if SIMPLE.fullmatch(pattern) else self._timed(wide, name)
        except (re.error, RecursionError, OverflowError) as error:
            raise ScionError(f"{shown(pattern)} is no pattern ({one_line(error)})") from None

    def _timed(self, pattern: str, name: str) -> bool:
        try:
            import regex
        except ImportError:
            raise ScionError(f"the pattern {shown(pattern)} can only be matched with the package regex: "
                             "pip install regex") from None
        start = time.monotonic()
        try:
            return regex.fullmatch(pattern, name, timeout=max(self.left, 1e-3)) is not None
        except TimeoutError:
            raise ScionError(f"the pattern {shown(pattern)} takes too long to match {name}") from None
        except regex.error as error:
            raise re.error(str(error)) from None
        finally:
            self.left -= time.monotonic() - start


def reshaped(tensor: Tensor, like: Tensor, name: str) -> Tensor:
    """``tensor`` in the shape of ``like``, from which it may differ in axes of length 1 or flattened ones alone."""
    if tensor.numel() != like.numel() or (tensor.dim() == like.dim() and tensor.shape != like.shape):
        raise ScionError(f"{name} is {list(tensor.shape)} in the file, {list(like.shape)} here")
    return tensor.reshape(like.shape)


# ------------------------------------------------------------------------------------------------- places


class Place:
    """The model that peft wraps, inside the root of our methods, and its modules' names there."""

    def __init__(self, root: nn.Module, where: str = "") -> None:
        self.anatomy: Anatomy = dissect(root)
        self.root, self.where = root, where
        inner = self.anatomy.inputs.path
        parts = inner.split(".") if inner else []
        self.chain = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
        """Paths of the modules from the root to the described backbone."""
        library = [path for path in self.chain if self._of_library(root.get_submodule(path))]
        self.base = library[0] if library else ""
        """Path of what the library made: what is around it is a wrapper of this project."""
        self.model: Any = root.get_submodule(self.base)
        self.modules = {name for name, _ in root.named_modules(remove_duplicate=False)}

    @staticmethod
    def _of_library(module: nn.Module) -> bool:
        return hasattr(module, "save_pretrained") or hasattr(module, "pretrained_cfg")

    def name(self, path: str) -> str:
        """A path in the root as a name in the wrapped model."""
        return path.removeprefix(f"{self.base}.") if self.base else path

    def pattern(self, names: Iterable[str]) -> list[str] | str:
        """``target_modules`` for exactly these modules: peft takes every module that ends like a name in a list."""
        names = sorted(names)
        everything = {self.name(path) for path in self.modules} - set(names)
        if any(other.endswith(f".{name}") for name in names for other in everything):
            return "|".join(re.escape(name) for name in names)
        return names

    def paths(self, names: Iterable[str]) -> dict[str, str]:
        """The root's paths of modules that an adapter names, which may have been made with more or fewer wrappers."""
        names = list(names)
        for cut in range(3):
            rest = [name.split(".", cut)[-1] for name in names]
            if len({tuple(name.split(".")[:cut]) for name in names}) > 1:
                break
            for start in dict.fromkeys([self.base, *self.chain]):
                found = {name: f"{start}.{short}".lstrip(".") for name, short in zip(names, rest, strict=True)}
                if self.modules.issuperset(found.values()):
                    return found
        at_home = {f"{self.base}.{name}".lstrip("."): name for name in names}
        missing = [name for path, name in at_home.items() if path not in self.modules]
        raise ScionError(f"{self.where}: the adapter's module {(missing or names)[0]} does not exist in "
                         f"{type(self.model).__name__}; load it onto the model that it was made for")

    def cover(self, names: dict[str, str], fits: Callable[[Site], bool]
              ) -> list[tuple[list[int] | None, list[tuple[Site, str]]]]:
        """Roles and layers that are exactly the modules at these paths: for each set of layers, sites with names."""
        chosen: dict[str, Site] = {}
        for site in self.anatomy.all_sites():
            if site.rows is None and site.path in names and fits(site):
                chosen.setdefault(site.path, site)
        left = [name for path, name in names.items() if path not in chosen]
        if left:
            raise ScionError(f"{self.where}: {left[0]} plays no role in {self.anatomy.family} that the method can have")
        layers: dict[str, set[int | None]] = {}
        for site in chosen.values():
            layers.setdefault(site.role, set()).add(site.block)
        groups: dict[tuple[int, ...] | None, list[tuple[Site, str]]] = {}
        for path, site in chosen.items():
            groups.setdefault(self._layers(site.role, layers[site.role], chosen), []).append((site, names[path]))
        return [(None if group is None else list(group), sites) for group, sites in groups.items()]

    def _layers(self, role: str, blocks: set[int | None], chosen: dict[str, Site]) -> tuple[int, ...] | None:
        if role in self.anatomy.stem:
            absent = [site.path for site in self.anatomy.stem[role] if site.path not in chosen]
            if absent:
                raise ScionError(f"{self.where}: adapts some modules of the role {role!r} and not {absent[0]}; here a "
                                 "role outside the blocks is adapted as a whole")
            return None
        having = {block.index for block in self.anatomy.blocks if role in block.sites}
        return None if blocks == having else tuple(sorted(block for block in blocks if block is not None))

    def task(self) -> str | None:
        """peft's name of the task, where the model's class says it."""
        known = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
        return next((task for end, task in known.items() if type(self.model).__name__.endswith(end)), None)


# ------------------------------------------------------------------------------------------------- ours to theirs


def form_of(cls: type[PEFTMethod]) -> PeftForm | None:
    """How peft writes methods of this class; a subclass that builds other grafts is another method."""
    for base in cls.__mro__:
        if isinstance(vars(base).get("peft"), PeftForm):
            return vars(base)["peft"]
        if "build" in vars(base):
            return None
    return None


def to_peft(adapter: str | Path | PEFTMethod | Sequence[PEFTMethod], model: nn.Module, folder: str | Path) -> Path:
    """Write methods as an adapter that ``peft.PeftModel.from_pretrained(model, folder)`` opens.

    A method that peft does not have, or with options or places that it cannot express, is written as peft's LoRA where
    its change of the weights is of low rank (with a warning), and refused elsewhere.

    Args:
        adapter: a method attached to ``model``, several that peft can hold in one adapter, or a folder to load first.
        model: the backbone; peft's names are those inside the library's own model in it.
        folder: gets ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The folder.

    Raises:
        ScionError: peft cannot hold this; the message names the option or the place.
    """
    if isinstance(adapter, (str, Path)):
        methods = _loaded(adapter, model)
        try:
            return to_peft(methods, model, folder)
        finally:
            for method in reversed(methods):
                method.remove()
    methods = [adapter] if isinstance(adapter, PEFTMethod) else list(adapter)
    root = uncompiled(model)
    for method in methods:
        if not method.attached or method.root is not root:
            raise ScionError(f"{method.name} is not attached to this {type(root).__name__}, or is merged")
        _check_alone(method)
    place = Place(root)
    config, tensors = _written(methods, place)
    head, saved = _head(place, root)
    model_id = getattr(getattr(place.model, "config", None), "_name_or_path", None)
    write_folder(folder, {"peft_version": VERSION, "task_type": place.task(), "inference_mode": True, "bias": "none",
                          "base_model_name_or_path": model_id,
                          **({"modules_to_save": head} if head else {}), **config}, {**tensors, **saved})
    return Path(folder)


def _check_alone(method: PEFTMethod) -> None:
    """Refuse a method whose tensors do not say alone what it does."""
    if isinstance(method, SideBySide):
        raise ScionError(f"{method.name}: a peft adapter holds one method, and this is {len(method.methods)}; export "
                         "them one by one")
    for graft in method.grafts:
        if Carrier.of(graft) is not None:
            other = next(iter(Carrier.of(graft).grafts))  # type: ignore[union-attr]
            raise ScionError(f"{method.name}: {type(other).__name__} changes its tensors, which peft cannot do; export "
                             "the method without it")
        if graft.strength != 1 or graft.batch is not None or not graft.live:
            raise ScionError(f"{method.name}: {graft.site.name} is switched, weighed or routed, which peft cannot "
                             "hold")


def _written(methods: list[PEFTMethod], place: Place) -> tuple[dict[str, Any], dict[str, Tensor]]:
    forms = list(dict.fromkeys(form_of(type(method)) for method in methods))
    try:
        for method in methods:
            if method.norm_names:
                raise Inexpressible(f"{method.name}: norms={list(method.norms)} are trained beside it, which a peft "
                                    "adapter does not hold")
        if len(forms) > 1 or forms[0] is None:
            names = listed(method.name for method in methods)
            raise Inexpressible(f"{names}: peft has no such method" if len(methods) == 1 else
                                f"{names}: a peft adapter holds one method")
        form = forms[0]
        config, tensors = form.write(methods, place)
        return {"peft_type": form.kind, **config}, tensors
    except Inexpressible as reason:
        form = LowRank()
        if any(method.start or not method.grafts for method in methods):
            raise
        try:
            config, tensors = form.write([Together(methods)], place)  # type: ignore[list-item]
        except Inexpressible:
            raise reason from None
        warnings.warn(f"{reason}; written as LoRA, which does the same", stacklevel=4)
        return {"peft_type": form.kind, **config}, tensors


class Together:
    """Several methods whose changes of low rank add up, as one."""

    def __init__(self, methods: list[PEFTMethod]) -> None:
        self.name = listed(method.name for method in methods)
        self.config: dict[str, Any] = {}
        self.grafts = [graft for method in methods for graft in method.grafts]


def _head(place: Place, root: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """The trained head inside the model: its modules' names, and its tensors."""
    inside = f"{place.base}." if place.base else ""
    found = {name.removeprefix(inside): parameter.detach() for name, parameter in root.named_parameters()
             if name in place.anatomy.head_names() and parameter.requires_grad and name.startswith(inside)}
    modules = list(dict.fromkeys(name.partition(".")[0] for name in found))
    return modules, {f"{MODEL}{name}": tensor for name, tensor in found.items()}


def write_folder(folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Both files of a peft adapter, the config last."""
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_tensors(target / TENSORS, tensors)
        write_json(target / CONFIG, dict(sorted(config.items())), indent=2)
    except OSError as error:
        raise ScionError(f"{folder} cannot be written ({error.strerror or error})") from None


def _loaded(source: str | Path, model: nn.Module) -> list[PEFTMethod]:
    """The methods in a folder, attached to ``model``."""
    if is_peft(source):
        found = from_peft(source, model)
        return found if isinstance(found, list) else [found]
    saved = open_adapter(source)
    return restore(saved.record, saved.tensors, model, where=str(source), check_whole=saved.check_whole)


# ------------------------------------------------------------------------------------------------- theirs to ours


def is_peft(source: str | Path) -> bool:
    """Whether ``source`` is a folder that peft wrote."""
    return os.path.isfile(Path(source) / CONFIG) and not os.path.isfile(Path(source) / RECORD)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a peft adapter."""
    path = Path(folder)
    if not os.path.lexists(path / CONFIG):
        raise ScionError(f"{folder}: no {CONFIG} here; give the folder of a peft adapter")
    config = read_json(path / CONFIG, LARGEST_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ScionError(f"{path / CONFIG}: damaged, or not the config of a peft adapter")
    if not os.path.isfile(path / TENSORS) and os.path.isfile(path / "adapter_model.bin"):
        raise ScionError(f"{path / 'adapter_model.bin'}: a pickle, which can run anything when it is opened; save the "
                         f"adapter as {TENSORS} (save_pretrained of any recent peft does)")
    tensors = read_tensors(path / TENSORS)
    for name, tensor in tensors.items():
        if kind_of(tensor) != "float":
            raise ScionError(f"{path / TENSORS}: {one_line(name)} holds {tensor.dtype}, where numbers of a method are "
                             "wanted")
    return config, tensors


def method_for(config: dict[str, Any], where: str) -> tuple[type[PEFTMethod], PeftForm]:
    """The method that a config means."""
    known: set[str] = set()
    for name in peft.registry():
        cls = peft.method_class(name)
        form = vars(cls).get("peft")
        if isinstance(form, PeftForm):
            known.add(form.kind)
            if form.kind == config["peft_type"] and form.matches(config):
                return cls, form
    raise ScionError(f"{where}: peft_type {config['peft_type']} is no method here; those that are: "
                     f"{listed(sorted(known), 40)}")


def from_peft(folder: str | Path, model: nn.Module, name: str | None = None) -> Any:
    """Attach what a peft adapter holds to ``model``.

    Args:
        folder: of ``PeftModel.save_pretrained``, with safetensors.
        model: the plain backbone on which peft would open it, or a module around or inside that.
        name: of the method; None is its class's.

    Returns:
        The method; the list of methods where modules have options of their own (``rank_pattern``), or where no roles
        and layers of one method are exactly the adapter's modules.

    Raises:
        ScionError: an option, a tensor or a module that there is nothing here for; the model is untouched then.
    """
    where = str(folder)
    config, given = read_folder(folder)
    cls, form = method_for(config, where)
    form.check(config, cls, f"{where}/{CONFIG}")
    root = uncompiled(model)
    done: list[PEFTMethod] = []
    try:
        form.refuse(config, where)
        _rehearse(form, cls, config, given, root, where, name)
        tensors = _build(form, cls, config, given, root, where, name, done)
        load_tensors(done, tensors, where)
    except Exception as error:
        for method in reversed(done):
            method.remove()
        told = refusal(error)
        text = str(told) if where in str(told) else f"{where}: {told}"
        raise ScionError(text) from (None if isinstance(error, ScionError) else error)
    return done[0] if len(done) == 1 else done


def _build(form: PeftForm, cls: type[PEFTMethod], config: dict[str, Any], tensors: dict[str, Tensor], root: nn.Module,
           where: str, name: str | None, done: list[PEFTMethod]) -> dict[str, Tensor]:
    """Attach the methods that a folder means to ``root``; ``done`` is what has to be taken off again. Returns their
    tensors, by their names in the root."""
    given = dict(tensors)
    before = {method.name for method in methods_on(root)}
    base = name or cls.__name__
    place = Place(root, where)
    plans = form.read(config, given, place)
    found = _read_head(given, place, config)
    shared = {key.removeprefix(BASE): given.pop(key) for key in list(given)
              if key.startswith(BASE) and not key.startswith(MODEL)}
    if given:
        raise ScionError(f"{where}: holds {listed(map(one_line, given), 3)}, which is nothing that {cls.__name__} has")
    for number, plan in enumerate(plans, 1):
        label = base if len(plans) == 1 else f"{base}-{number}"
        if label in before:
            raise ScionError(f"{where}: a method called {label} is attached already; give this one another name")
        method = cls(**plan.arguments, **({} if label == cls.__name__ else {"name": label}))
        method.attach(root)
        done.append(method)
        found |= form.collect(method, plan, config, shared)
    return found


def _rehearse(form: PeftForm, cls: type[PEFTMethod], config: dict[str, Any], tensors: dict[str, Tensor],
              root: nn.Module, where: str, name: str | None) -> None:
    """Refuse what would be larger than the tensors of the file, without building it: see `core.rehearsal`."""
    sizes = {key: value for key, value in config.items() if key in form.sizes()}
    hollow_root = None if is_small(reach(sizes), root) else twin(root)
    if hollow_root is None:
        return
    count = len(tensors) + sum(1 for _ in root.parameters())
    done: list[PEFTMethod] = []
    with rehearsing(count):
        found = _build(form, cls, config, hollow(tensors), hollow_root, where, name, done)
        load_tensors(done, found, where, write=False)


def _read_head(given: dict[str, Tensor], place: Place, config: dict[str, Any]) -> dict[str, Tensor]:
    """Takes from ``given`` the tensors of ``modules_to_save``: heads of the root, by their names in it."""
    saved = config.get("modules_to_save") or []
    found: dict[str, Tensor] = {}
    for key in [key for key in given if any(f".{module}." in key for module in saved)]:
        name = f"{place.base}.{key.removeprefix(MODEL)}".lstrip(".")
        if name not in place.anatomy.head_names():
            raise ScionError(f"{place.where}: modules_to_save holds {key.removeprefix(MODEL)}, which is no head of "
                             f"{type(place.model).__name__}; load it onto the model with that head")
        found[name] = given.pop(key)
    return found
