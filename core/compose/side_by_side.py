"""What compositions share: several methods, each in a branch of its own of the composition's module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from core import peft
from core.adapters.entry import SavedValues, check_name
from core.adapters.filling import Content
from core.adapters.reading import base_of, method_of, read_adapter, refusal, rehearse
from core.anatomy import Anatomy
from core.component import Component, class_and_arguments, is_trained_adapter
from core.errors import ScionError, listed, nearest
from core.graft import Graft
from core.json_types import check
from core.method import AddsLoss, OwnOptimizer, PEFTMethod, Plan, Spec, key_of
from core.method.described import named_in_module
from core.method.saving import FROM_ROOT, check_tokenizer
from core.record import plain
from core.tensors import check_fit, check_values

if TYPE_CHECKING:
    import lightning.pytorch as L


class Trained(NamedTuple):
    """What a folder holds of a trained method."""

    folder: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    """By their names in the method's module, as the file has them."""
    spec: Spec

    @property
    def from_root(self) -> bool:
        """Whether the file counts from the root, as those of earlier versions do."""
        return self.record["format"] == FROM_ROOT

    def on(self, anatomy: Anatomy) -> Content:
        """What the file means for this model."""
        return Content.of({**self.record, "methods": [self.spec]}, self.tensors, anatomy)


class SideBySide(AddsLoss, PEFTMethod):
    """What compositions share: several methods, each in a branch of its own of the composition's module."""

    plans: dict[str, Plan]
    """What each of the methods will be on this model."""

    def __init__(self, methods: Sequence[Any], **common: Any) -> None:
        super().__init__(**common)
        kind = type(self).__name__
        self.trained: dict[str, Trained] = {}
        """What there is of those methods that come from folders, by their names."""
        self.methods: list[PEFTMethod] = [self._method(entry) for entry in methods]
        self._check_methods(kind)
        self.config["methods"] = self._noted(methods)
        self.identity_at_start = not self.trained and all(method.identity_at_start for method in self.methods)

    def _check_methods(self, kind: str) -> None:
        """Refuse methods that cannot share a batch."""
        names = [method.name for method in self.methods]
        if not names or len(set(names)) < len(names):
            raise ScionError(f"{kind}: the methods need names of their own, got {names}; give name=... to each")
        if self.layers is not None:
            raise ScionError(f"{kind}: layers belong to its methods, not to itself")
        for method in self.methods:
            if method.moves_base or method.norms:
                raise ScionError(f"{kind}: {method.name} trains the backbone itself, which all rows of a batch share")
            if not method.by_rows:
                raise ScionError(f"{kind}: {method.name} changes every tensor, and all rows of a batch share some of "
                                 "them (positions, a class token)")
            if method.prepares:
                raise ScionError(f"{kind}: {method.name} computes start values from data, alone on its backbone")

    def _noted(self, entries: Sequence[Any]) -> list[Any]:
        """What the configuration notes of the methods: of those from folders the folder, otherwise the method."""
        found = []
        for entry, method in zip(entries, self.methods, strict=True):
            # a method given as an object may have the name of one that comes from a folder
            is_from_folder = method.name in self.trained and not isinstance(entry, PEFTMethod)
            found.append(entry if is_from_folder else method)
        return found

    def _method(self, entry: Any) -> PEFTMethod:
        """The method that an entry of ``methods`` describes: an object, a folder, or a class with its arguments."""
        if isinstance(entry, PEFTMethod):
            self._take_values(entry)
            return entry
        kind = type(self).__name__
        check(entry, str | dict[str, Any], kind, "methods")
        if isinstance(entry, str):
            return self._from_folder({"adapter": entry})
        if is_trained_adapter(entry):
            return self._from_folder(entry)
        part = class_and_arguments(entry, kind)
        check(part, Component, kind)
        return peft.make(part["class_path"], part["init_args"])

    @property
    def members(self) -> list[PEFTMethod]:
        return self.methods

    def _take_values(self, method: PEFTMethod) -> None:
        """Keep what a method brings from a folder (`core.load_method`) in ``trained``, as if the folder were given."""
        values = method.values
        if not isinstance(values, SavedValues):
            return
        if len(values.together) > 1:
            names = listed(one.name for one in values.together)
            raise ScionError(f"{type(self).__name__}: {values.folder} holds {len(values.together)} methods ({names}), "
                             "one is wanted")
        self.trained[method.name] = Trained(values.folder, values.record, values.own(), values.spec)
        method.values = None

    def _from_folder(self, entry: dict[str, Any]) -> PEFTMethod:
        """A trained method; its tensors are kept in ``trained`` until it is on a model.

        Unless the entry says ``trainable: false`` it takes part in the composition's training, from its values on.
        """
        kind = type(self).__name__
        folder = str(entry["adapter"])
        known = ("adapter", "name", "trainable")
        unknown = sorted(set(entry) - set(known))
        if unknown:
            raise ScionError(f"{kind}: {folder}: a trained method takes a name of its own and trainable, not "
                             f"{unknown[0]!r}{nearest(unknown[0], known)}")
        record, tensors = read_adapter(folder)
        names = [spec["name"] for spec in record["methods"]]
        if len(names) != 1:
            raise ScionError(f"{kind}: {folder} holds {len(names)} methods ({listed(names)}), one is wanted")
        spec = record["methods"][0]
        check(entry.get("name"), str | None, kind, "name")
        check(entry.get("trainable"), bool | None, kind, "trainable")
        changes: dict[str, Any] = {"name": entry.get("name") or spec["name"]}
        if entry.get("trainable") is not None:
            changes["trainable"] = entry["trainable"]
        method = method_of(spec, **changes)
        # a later stage has other tensors, and only its own training leads to it
        stage = _stage(spec.get("structure", {}))
        if stage and stage != _stage(plain(method.structure())):
            raise ScionError(f"{kind}: {folder}: {spec['name']} was saved in a later stage than {spec['class']} "
                             "begins with, and cannot take part")
        prefix = f"peft.{key_of(spec['name'])}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.trained[method.name] = Trained(folder, record, own, spec)
        return method

    # --------------------------------------------------------------------------------- attaching

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        plans = {method.name: method.plan_on(anatomy) for method in self.methods}
        self._check_bases(anatomy)
        return {"plans": plans}

    def _check_bases(self, anatomy: Anatomy) -> None:
        """Refuse trained methods of another base."""
        if not self.trained or any(p.is_meta for p in anatomy.root.parameters()):
            return
        here = base_of(anatomy)
        methods = {method.name: method for method in self.methods}
        for name, trained in self.trained.items():
            check_name(methods[name], trained.spec, anatomy, trained.folder)
            check_tokenizer(trained.record, anatomy.root, f"{self.name}: {trained.folder}")
            saved = trained.record["base"]
            if not here.agrees(saved, trained.from_root):
                raise ScionError(f"{self.name}: {trained.folder} belongs to another base (fingerprint "
                                 f"{saved['fingerprint']}, here {here.fingerprint(trained.from_root)})")

    def feature_dim(self, dim: int, anatomy: Anatomy) -> int:
        widths = {method.name: method.feature_dim(dim, anatomy) for method in self.methods}
        if len(set(widths.values())) > 1:
            raise ScionError(f"{self.name}: one head cannot read features of different widths: {widths}")
        return widths[self.methods[0].name]

    def check_outline(self, roles: Sequence[str], blocks: int, family: str) -> None:
        for method in self.methods:
            method.check_outline(roles, blocks, family)

    def fill(self, module: nn.Module, plan: Plan) -> None:
        anatomy = plan.anatomy
        for method in self.methods:
            branch = nn.Module()
            if method.name in self.trained:
                self._rehearse(method.name, anatomy)
            own = self.plans[method.name]
            vars(method).update(own.numbers)
            method.fill(branch, own)
            method.module = branch
            if method.name in self.trained:
                content = self.trained[method.name].on(anatomy)
                method.restructure(content.specs[0].get("structure", {}))
                self._load(method.name, branch, content)
            if not method.is_trained:
                branch.requires_grad_(False)
            module.add_module(key_of(method.name), branch)
        self.arrange(module, anatomy)

    def _rehearse(self, name: str, anatomy: Anatomy) -> None:
        """Refuse a trained method that would be larger than its file (see `core.adapters.rehearsal`)."""
        trained = self.trained[name]
        content = trained.on(anatomy)
        spec: Any = {**content.specs[0], "name": "rehearsed"}
        tensors = {f"peft.rehearsed.{key}": tensor for key, tensor in trained.tensors.items()}
        try:
            rehearse(replace(content, specs=[spec], tensors=tensors), anatomy.root, trained.folder)
        except Exception as error:
            what = str(refusal(error)).removeprefix(f"{trained.folder}: ")
            raise ScionError(f"{self.name}: {trained.folder}: {what}") from error

    def _load(self, name: str, branch: nn.Module, content: Content) -> None:
        """Copy a trained method's tensors into its branch; what a graft packs may be packed in the file, or plain."""
        folder, tensors = self.trained[name].folder, named_in_module(content.tensors, branch, content.names)
        into = {key: tensor for key, tensor in branch.state_dict().items() if not key.endswith("_extra_state")}
        grafts = {path: graft for path, graft in branch.named_modules() if isinstance(graft, Graft)}
        packed: dict[str, tuple[Graft, Tensor]] = {}
        for path, graft in grafts.items():
            for part in graft.packed:
                key = f"{path}.{part}"
                if key not in tensors:
                    packed[key] = graft, into.pop(key)
        parts = {key: graft.pack(tensor) for key, (graft, tensor) in packed.items()}
        for key, found in parts.items():
            for part, tensor in found.items():
                into[f"{key}.{part}"] = tensor
        self._check_tensors(folder, tensors, into, grafts)
        with torch.no_grad():
            for key, tensor in into.items():
                tensor.copy_(tensors[key])
            # the tensors that a graft packs are not in ``into``: their parts there are copies that nobody keeps
            for key, (graft, tensor) in packed.items():
                graft.unpack({part: tensors[f"{key}.{part}"] for part in parts[key]}, tensor)

    def _check_tensors(self, folder: str, tensors: dict[str, Tensor], into: dict[str, Tensor],
                       grafts: dict[str, Graft]) -> None:
        """Refuse tensors of a file that are not those that the method has here."""
        for key in sorted(into.keys() | tensors.keys()):
            there, here = _shape(tensors, key), _shape(into, key)
            if there != here:
                raise ScionError(f"{self.name}: {folder}: {key} is {there} in the file, {here} here")
        limits = {}
        for path, graft in grafts.items():
            for key, limit in graft.limits().items():
                limits[f"{path}.{key}"] = limit
        where = f"{self.name}: {folder}"
        for key, tensor in into.items():
            check_fit(tensors[key], tensor, key, where)
            check_values(tensors[key], tensor, key, where, limits.get(key))

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Say which of the grafts in the filled branches are at sites, and how."""

    def branch(self, method: PEFTMethod) -> list[Graft]:
        """The grafts of one of its methods."""
        return method.standing(method.module)

    def structure(self) -> dict[str, Any]:
        found = {method.name: method.structure() for method in self.methods}
        own = {name: structure for name, structure in found.items() if structure}
        return {"methods": own} if own else {}

    def restructure(self, structure: dict[str, Any]) -> None:
        for method in self.methods:
            own_root = method.root
            method.root = self.root  # some look at the model that they are on
            try:
                method.restructure(structure.get("methods", {}).get(method.name, {}))
            finally:
                method.root = own_root

    def spec(self) -> dict[str, Any]:  # what is saved holds the tensors, wherever a folder is by then
        found = super().spec()
        methods = []
        for method in self.methods:
            spec = method.spec()
            methods.append({"class": spec["class"], **spec["config"], "name": spec["name"]})
        config = {**found["config"], "methods": methods}
        return {**found, "config": config}

    # --------------------------------------------------------------------------------- in training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and self.is_trained:
            self._check_training()
        super().setup(trainer, pl_module, stage)

    def _check_training(self) -> None:
        """Refuse to train a method that wants a say in the training."""
        for method in self.methods:
            if method.is_trained and (method.is_scheduled or isinstance(method, OwnOptimizer) or method.stages):
                raise ScionError(f"{self.name}: {method.name} steers its own training, which has no place here: train "
                                 "it alone, and give its folder, or trainable: false")

    @property
    def adds_loss(self) -> bool:
        return any(method.adds_loss for method in self.methods)

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        terms = []
        for method in self.methods:
            term = method.loss_terms(module, batch, outputs)
            if term is not None:
                terms.append(term)
        return torch.stack(terms).sum() if terms else None


def _shape(tensors: dict[str, Tensor], key: str) -> list[int] | str:
    """The shape of a tensor, for messages."""
    return list(tensors[key].shape) if key in tensors else "absent"


def _stage(structure: dict[str, Any]) -> dict[str, Any]:
    """What of a structure says how far a method has come, and not on which weights."""
    found = {}
    for key, value in structure.items():
        if key in ("shapes", "basis", "stored", "ranks"):
            continue
        if isinstance(value, dict):
            value = _stage(value)
        if value != {}:
            found[key] = value
    return found
