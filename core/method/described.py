"""What files say of a base: names of tensors within the described model, and a fingerprint of that alone.

An adapter that is trained under a language-model head goes into the bare encoder, or under a classifier, because its
file counts from the model that `core.anatomy.dissect` finds: ``encoder.layer.0.output.dense.bias``, wherever the
encoder stands. A tensor of the module around that is called ``around.<name>``, of the one around both
``around.around.<name>``. In a model, and in the checkpoints of a Trainer, names begin at the root as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from torch import Tensor, nn

from core.anatomy import Anatomy
from core.graft import Graft
from core.json_types import Digest
from core.method.fingerprint import Fingerprint, fingerprint_of, sampled

if TYPE_CHECKING:
    from core.method.base import PEFTMethod

AROUND = "around."
"""What the name of a tensor begins with that lies in a module around the described one, once for each step outwards."""
APART = ("head", "lm_head", "pool")
"""Roles whose modules one class of a family has and another has not, although both have the same backbone."""

# Written as a call, for class is a keyword of Python.
BaseRecord = TypedDict("BaseRecord", {"class": str, "fingerprint": Digest, "stacks": NotRequired[dict[str, Digest]],
                                      "pooler": NotRequired[Digest]})
"""Which model the methods belong to, as files hold it."""


# ------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class Names:
    """The names of a model's tensors in files, and back."""

    path: str = ""
    """Where in the root the described model is."""
    apart: tuple[str, ...] = ()
    """Paths, in the root, of the described model's own modules that play one of the `APART` roles."""
    from_root: bool = False
    """Whether files count from the root, as those of earlier versions do; nothing is apart then."""

    @classmethod
    def of(cls, anatomy: Anatomy) -> Names:
        """The names of a model that is taken apart."""
        paths: list[str] = []
        for role in APART:
            paths += [site.path for site in anatomy.stem.get(role, ())]
        return cls(anatomy.inputs.path, tuple(paths))

    def in_file(self, name: str) -> str:
        """What a file calls the tensor that the root calls ``name``."""
        if self.from_root:
            return name
        path, steps = self.path, 0
        while path and not name.startswith(f"{path}."):
            path = path.rpartition(".")[0]
            steps += 1
        return AROUND * steps + name[len(path):].removeprefix(".")

    def in_root(self, name: str) -> str | None:
        """What the root calls the tensor that a file calls ``name``; None where it has no module so far outside."""
        if self.from_root:
            return name
        parts = self.path.split(".") if self.path else []
        while name.startswith(AROUND):
            if not parts:
                return None
            parts.pop()
            name = name.removeprefix(AROUND)
        return ".".join([*parts, name])

    def is_apart(self, name: str) -> bool:
        """Whether the tensor that the root calls ``name`` is no part of the backbone that an adapter belongs to."""
        if self.from_root:
            return False
        outside = bool(self.path) and not name.startswith(f"{self.path}.")
        return outside or name.startswith(tuple(f"{path}." for path in self.apart))


def key_of(name: str) -> str:
    """A name as a key of nn.Module children: no dots, no clash with the module's own attributes."""
    key = name.replace(".", "-")
    return f"{key}_" if hasattr(nn.Module, key) or key in ("training", "methods", "method", "heads", "flags") else key


class FileNames:
    """The same for all tensors of attached methods, whose own may be called after a parameter of the base."""

    def __init__(self, names: Names, methods: Iterable[PEFTMethod]) -> None:
        self.names = names
        self.grafts: dict[str, str] = {}
        """Start of a graft's names in the root -> the parameter of the base that it is called after."""
        for method in methods:
            self.grafts |= grafts_of_parameters(method.module, method.prefix)

    def of(self, name: str) -> str:
        """What a file calls the tensor that the root calls ``name``."""
        if not name.startswith("peft."):
            return self.names.in_file(name)
        graft = self._graft(name)
        if graft is None:
            return name
        return graft_in_file(graft, self.grafts[graft], self.names) + name.removeprefix(graft)

    def is_apart(self, name: str) -> bool:
        """Whether a tensor belongs to what is apart from the backbone: lies there, or changes what does."""
        if not name.startswith("peft."):
            return self.names.is_apart(name)
        graft = self._graft(name)
        return graft is not None and self.names.is_apart(self.grafts[graft])

    def _graft(self, name: str) -> str | None:
        """The graft called after a parameter that this tensor is a part of."""
        while name:
            name = name.rpartition(".")[0]
            if name in self.grafts:
                return name
        return None


def grafts_of_parameters(module: nn.Module, prefix: str = "") -> dict[str, str]:
    """The grafts in ``module`` that are called after a parameter of the base: path (behind ``prefix``) -> its name."""
    found: dict[str, str] = {}
    for path, graft in module.named_modules():
        if isinstance(graft, Graft) and graft.site.role == "parameter":
            if path.rpartition(".")[2] == key_of(graft.site.name):
                found[prefix + path] = graft.site.name
    return found


def graft_in_file(path: str, parameter: str, names: Names) -> str:
    """The path in a file of a graft that is called after a parameter of the base."""
    if parameter.startswith("peft."):  # a tensor of another method
        return path
    return path.removesuffix(key_of(parameter)) + key_of(names.in_file(parameter))


def named_in_module(tensors: Mapping[str, Tensor], module: nn.Module, names: Names) -> dict[str, Tensor]:
    """A method's tensors by their names in its module, from those that a file gives them there."""
    own: dict[str, str] = {}
    for path, parameter in grafts_of_parameters(module).items():
        own[graft_in_file(path, parameter, names)] = path
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        graft, _, leaf = name.rpartition(".")
        while graft and graft not in own:  # a graft's parts may have parts
            graft, _, outer = graft.rpartition(".")
            leaf = f"{outer}.{leaf}"
        found[f"{own[graft]}.{leaf}" if graft else name] = tensor
    return found


# ------------------------------------------------------------------------------------------------- structures


def structure_in_file(structure: Any, names: Names, known: Collection[str], apart: set[str]) -> dict[str, Any]:
    """A method's structure in which keys that are ``known`` names of the root's parameters are those of files; those
    that are apart from the backbone are added to ``apart``."""

    def rename(key: str) -> str | None:
        if key not in known:
            return key
        name = names.in_file(key)
        if names.is_apart(key):
            apart.add(name)
        return name

    return {key: _renamed(value, rename) for key, value in structure.items()}


def structure_in_root(structure: Any, names: Names, known: Collection[str], apart: Collection[str]) -> dict[str, Any]:
    """Undo of `structure_in_file` on another model; names of what is ``apart`` and not in it are left out."""

    def rename(key: str) -> str | None:
        name = names.in_root(key)
        if name in known:
            return name
        return None if key in apart else key

    return {key: _renamed(value, rename) for key, value in structure.items()}


def _renamed(value: Any, rename: Any) -> Any:
    """A part of a structure with its keys renamed; entries whose key has no new name are left out."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, part in value.items():
        name = rename(key)
        if name is not None:
            found[name] = _renamed(part, rename)
    return found


def parameter_names(root: nn.Module) -> set[str]:
    """All names of the base's parameters, also the second ones of tied weights."""
    return {name for name, _ in root.named_parameters(remove_duplicate=False) if not name.startswith("peft.")}


# ------------------------------------------------------------------------------------------------- the base


@dataclass(frozen=True)
class Base:
    """Which base a model is, told from samples of its weights."""

    names: Names
    family: str
    """The class that the described model is known by."""
    whole: Fingerprint
    """Of all but a task head, under the root's names: what checkpoints and files of earlier versions hold."""
    described: Fingerprint
    """Of the described model alone, under its own names and without what is apart."""
    stacks: dict[str, str] = field(default_factory=dict)
    """Of encoder and decoder by themselves, where those are modules: some classes of a family hold one of them."""
    pooler: str = ""
    """Of its pooler, where it has one: random where the checkpoint has none."""

    @classmethod
    def of(cls, anatomy: Anatomy) -> Base:
        """The base that a model is now."""
        names, samples = Names.of(anatomy), sampled(anatomy.root)
        heads = anatomy.head_names()
        own = {names.in_file(name): part for name, part in samples.items() if not names.is_apart(name)}
        stacks: dict[str, str] = {}
        for stack in anatomy.stacks:
            if stack.name and stack.text is not None:
                start = f"{names.in_file(stack.text.path)}."
                parts = {name: part for name, part in own.items() if name.startswith(start)}
                stacks[stack.name] = str(fingerprint_of(parts))
        poolers = tuple(f"{site.path}." for site in anatomy.stem.get("pool", ()))
        pooler = {names.in_file(name): part for name, part in samples.items() if name.startswith(poolers)}
        return cls(
            names=names,
            family=anatomy.family,
            whole=fingerprint_of({name: part for name, part in samples.items() if name not in heads}),
            described=fingerprint_of(own),
            stacks=stacks,
            pooler=str(fingerprint_of(pooler)) if pooler else "",
        )

    def record(self) -> dict[str, Any]:
        """What files say of it (`BaseRecord`)."""
        found: dict[str, Any] = {"class": self.family, "fingerprint": self.described}
        if self.stacks:
            found["stacks"] = self.stacks
        if self.pooler:
            found["pooler"] = self.pooler
        return found

    def as_recorded(self, whole: str, saved: Mapping[str, Any] | None) -> Base | None:
        """This base, of which there are no values here, with what a checkpoint says of them; None where it is one of an
        earlier version, which does not say all."""
        if saved is None:
            return None
        described = Fingerprint(saved["fingerprint"])
        return replace(self, whole=Fingerprint(whole), described=described, stacks=saved.get("stacks", {}),
                       pooler=saved.get("pooler", ""))

    def fingerprint(self, from_root: bool) -> Fingerprint:
        """The fingerprint as a file has it."""
        return self.whole if from_root else self.described

    def agrees(self, saved: Mapping[str, Any], from_root: bool) -> bool:
        """Whether this is the base that a file says."""
        if self.fingerprint(from_root) == saved["fingerprint"]:
            return True
        theirs: dict[str, str] = saved.get("stacks", {})
        common = self.stacks.keys() & theirs.keys()
        # A class with the encoder alone and one with both agree where what both have is the same.
        if from_root or not common or self.stacks.keys() == theirs.keys():
            return False
        return all(Fingerprint(self.stacks[name]) == theirs[name] for name in common)

    def has_other_pooler(self, saved: Mapping[str, Any]) -> bool:
        """Whether the pooler has other values than a file says; False where either has none."""
        theirs = saved.get("pooler", "")
        return bool(theirs and self.pooler) and Fingerprint(self.pooler) != theirs
