"""A method on a model: attached, looked at, switched off, merged, saved and taken off again."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from core import graft as grafts
from core.anatomy import NORMS, Anatomy, Site, check_layers, check_roles, dissect
from core.errors import ScionError, listed
from core.graft import Graft
from core.method import contents, merging
from core.method.attached import Home, key_of
from core.method.bases import check_base, check_quantized, check_sites
from core.method.beside import OUTSIDE, path_of, tensors_beside
from core.method.definition import MethodDefinition, device_and_dtype_beside
from core.method.membership import Membership
from core.method.options import linear_only
from core.method.plan import Plan
from core.method.saving import save_adapter
from core.method.state import MethodModule, spec_of
from core.method.training_checks import check_model, check_optimizers, shapes_of, warn_of_recomputing, watch_steps
from core.random_state import seeded

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


class MethodOnModel(MethodDefinition):
    """What users do with a method and a model; see `PEFTMethod`."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.place = 0  # in the order of attachment
        self.module: nn.Module = MethodModule(self._self)  # in a composition, its part of the composition's module
        self.buffers_at_start: dict[str, Tensor] = {}  # of the base, where its parts are in train mode
        self.shapes_at_start: dict[str, list[int]] = {}  # of the sites' weights, by name
        self.norm_names: list[str] = []
        self.membership = Membership()
        self.lightning_module: weakref.ref[nn.Module] | None = None  # what a Trainer trains it in

    @property
    def _self(self) -> PEFTMethod:
        return cast("PEFTMethod", self)

    # ------------------------------------------------------------------------------- looking

    def plan_for(self, model: nn.Module) -> Plan:
        """What this method would be on ``model``; neither changes.

        Raises:
            ScionError: it cannot be attached there, and why.
        """
        check_base(model, self.name)
        return self.plan_on(dissect(model))

    def plan_on(self, anatomy: Anatomy) -> Plan:
        """`plan_for`, on a model that is taken apart already."""
        self._check_needs(anatomy)
        if self.linear_only:
            linear_only(self.name, self.sites(anatomy), anatomy.all_sites())
        self.check(anatomy)
        numbers = self.numbers(anatomy)
        planned = copy.copy(self)  # `sites` sees the numbers, and this method stays as it is
        vars(planned).update(numbers)
        sites = planned.sites(anatomy)
        norms = self._norm_names(anatomy)
        base = list(dict.fromkeys([*planned.base_parameters(anatomy), *norms]))
        check_quantized(anatomy.root, sites, [name for name in base if name not in norms], self.name)
        check_sites(self._self, sites)
        return Plan(anatomy, tuple(sites), tuple(base), tuple(norms), numbers)

    def _check_needs(self, anatomy: Anatomy) -> None:
        for role in self.needs:
            if role not in anatomy.roles:
                raise ScionError(f"{self.name} needs the role {role!r}, which {anatomy.family} does not have "
                                 f"(it has {listed(anatomy.roles, 40)})")
        targets = self.config.get("targets")
        if targets is not None and not list(targets):
            raise ScionError(f"{self.name}: targets is empty, so there would be nothing to train; its roles are "
                             f"{listed(anatomy.roles, 40)}")
        anatomy.layer_indices(self.layers, self.name)

    def _norm_names(self, anatomy: Anatomy) -> list[str]:
        if not self.norms:
            return []
        for role in self.norms:
            if not any(f".{role}".endswith(f".{norm}") for norm in NORMS):
                raise ScionError(f"{self.name}: norms {role!r} is not one of {', '.join(NORMS)}")
        sites = anatomy.sites(self.norms, self.layers, self.name)
        return [f"{site.path}.{name}" for site in sites for name, _ in site.module.named_parameters()]

    def check_outline(self, roles: Sequence[str], blocks: int, family: str) -> None:
        """Refuse targets and layers that a backbone with these roles and blocks does not have, before it is built."""
        check_roles(self.config.get("targets") or (), roles, family, self.name)
        check_layers(self.layers, blocks, family, self.name)

    @property
    def members(self) -> list[PEFTMethod]:
        """The methods that a composition is made of; none for any other method."""
        return []

    # ------------------------------------------------------------------------------- attaching

    @property
    def attached(self) -> bool:
        """Whether the method is on a model now."""
        return self.root is not None and self.merged is None

    def need_root(self) -> nn.Module:
        """The model that the method is attached to.

        Raises:
            ScionError: there is none yet.
        """
        if self.root is None:
            raise ScionError(f"{self.name} is not attached to a model yet: call attach(model) first")
        return self.root

    def attach(self, model: nn.Module) -> PEFTMethod:
        """Freeze ``model`` (the first method does), insert the grafts, and return the method.

        Raises:
            ScionError: unknown anatomy, targets that match nothing, values that do not fit; nothing has changed then.
        """
        model = uncompiled(model)
        if self.root is model:
            return self._self
        home = self._home_for(model)
        plan = self.plan_for(model)
        others = list(home.methods.values()) if home is not None else []
        self._check_owners(plan, others)
        vars(self).update(plan.numbers)
        module = MethodModule(self._self)
        self.fill(module, plan)
        self._check_batch(module, others)
        if self.trains_backbone and not plan.base_parameters and not any(True for _ in module.parameters()):
            raise ScionError(f"{self.name}: layers={self.layers} leaves nothing to train")
        self._warn_of_ties(model, module)

        if home is None:
            home = Home(model, plan.anatomy, self.head)
            home.enter(model)
        parameters = dict(model.named_parameters())
        self.root, self.module, self.norm_names = model, module, list(plan.norms)
        home.attached += 1
        self.place = home.attached
        self.base_at_start = {name: copy_on_cpu(parameters[name]) for name in plan.base_parameters}
        self.buffers_at_start = self._moving_buffers(home)
        home.add(self._self)
        self.shapes_at_start = shapes_of(self._self)
        self.connect()
        for name in plan.base_parameters:
            parameters[name].requires_grad_(self.is_trained)
        if not self.is_trained:
            module.requires_grad_(False)
        model.train(model.training)
        return self._self

    def _home_for(self, model: nn.Module) -> Home | None:
        """Where the methods on ``model`` are, None before the first; refuses a model that cannot have this one."""
        if self.root is not None:
            raise ScionError(f"{self.name} is attached to another model already: make a new {type(self).__name__}")
        if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) or not hasattr(model, "forward"):
            raise ScionError(f"{self.name}: a bare {type(model).__name__} runs its children in a row and has no place "
                             "for `peft`: wrap it in a module that calls it")
        home = getattr(model, "peft", None)
        if home is not None and not isinstance(home, Home):
            raise ScionError(f"{self.name}: {type(model).__name__} has an attribute `peft` of its own")
        if home is not None and self.name in home.methods:
            raise ScionError(f"{self.name}: a method of that name is attached already; to start anew, take it off "
                             "first (.remove()); to have both, one on the other, name this one (name=...)")
        if any(isinstance(child, Home) and child is not home for child in model.modules()):
            raise ScionError(f"{self.name}: a module inside {type(model).__name__} has methods attached already; "
                             "attach to the same module")
        return home

    def _check_owners(self, plan: Plan, others: list[PEFTMethod]) -> None:
        """A tensor of the base has one owner."""
        for other in others:
            both = [name for name in plan.base_parameters if name in other.base_at_start]
            if both:
                raise ScionError(f"{self.name}: {listed(both, 2)} is trained by {other.name} already; a tensor of the "
                                 "backbone has one owner")

    def _check_batch(self, module: nn.Module, others: list[PEFTMethod]) -> None:
        """Two methods cannot both let streams of their own ride in the batch."""
        if not any(isinstance(graft, Graft) and graft.folds for graft in module.modules()):
            return
        for other in others:
            if any(graft.folds for graft in other.grafts):
                raise ScionError(f"{self.name}: the batch carries the streams of {other.name} already; one method "
                                 "can fold it")

    def _warn_of_ties(self, model: nn.Module, module: nn.Module) -> None:
        """Only one side of a tied weight is adapted, which is legitimate, but should not happen unnoticed."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for graft in module.modules():
            if not isinstance(graft, Graft) or graft.site.kind == "module" or graft.site.tied:
                continue
            if graft.verbs == ("before",) and type(graft).merged is Graft.merged:
                continue
            tied = [name for name in names[id(graft.site.full_weight)] if name != graft.site.weight_name]
            if tied:
                warnings.warn(f"{self.name}: {graft.site.weight_name} is tied to {listed(tied)}, which stays as it "
                              "is", stacklevel=3)

    def _moving_buffers(self, home: Home) -> dict[str, Tensor]:
        """The base's buffers that a forward in train mode may move (running statistics), where no other method has
        them."""
        if not self.is_trained or self.backbone_mode != "train":
            return {}
        kept = nn.Module.state_dict(home.root).keys()
        taken = {name for other in home.methods.values() for name in other.buffers_at_start}
        return {name: copy_on_cpu(buffer) for name, buffer in home.root.named_buffers()
                if name in kept and name not in taken and not name.startswith("peft.")}

    # ------------------------------------------------------------------------------- its grafts

    @property
    def grafts(self) -> list[Graft]:
        """The method's grafts, in the order of their sites."""
        return self.standing(self.module)

    def standing(self, module: nn.Module) -> list[Graft]:
        """Of all grafts in ``module`` those that are at sites themselves (in a composition some only take part)."""
        return [child for child in module.modules() if isinstance(child, Graft)]

    def fill(self, module: nn.Module, plan: Plan) -> None:
        """Put the method's shared tensors and grafts into ``module``."""
        with seeded(self.seed, self.name):
            self.shared(module, list(plan.sites))
        device, dtype = device_and_dtype_beside(next(plan.anatomy.root.parameters()))
        module.to(device=device, dtype=dtype)
        for site in plan.sites:
            module.add_module(key_of(site.name), self.make_graft(site, plan.anatomy))

    def make_graft(self, site: Site, anatomy: Anatomy) -> Graft:
        """`build` with its seed, on the device and in a type that fit the site."""
        with seeded(self.seed, self.name, site.name):
            graft = self.build(site)
        tensor = next(site.module.parameters(), None)
        if tensor is None:  # a dropout, an identity: as in its block
            around = site.module if site.block is None else anatomy.blocks[site.block].module
            tensor = next(around.parameters(), next(anatomy.root.parameters()))
        device, dtype = device_and_dtype_beside(tensor)
        return graft.to(device=device, dtype=dtype)

    def add_graft(self, graft: Graft) -> None:
        """Give an attached method one more graft, on the device of its site's tensor and in a type that it can train
        in: for methods whose grafts are not known when they are attached."""
        device, dtype = device_and_dtype_beside(graft.site.full_weight)
        graft.to(device=device, dtype=dtype).requires_grad_(self.is_trained)
        graft.place = self.place
        self.module.add_module(key_of(graft.site.name), graft)
        grafts.connect(graft)

    def drop_graft(self, graft: Graft) -> None:
        """Take one graft from an attached method."""
        grafts.disconnect(graft)
        delattr(self.module, key_of(graft.site.name))

    def connect(self) -> None:
        """Let the grafts act at their sites."""
        for graft in self.grafts:
            graft.place = self.place
            grafts.connect(graft)

    def disconnect(self) -> None:
        """Let them act no more."""
        for graft in self.grafts:
            grafts.disconnect(graft)

    # ------------------------------------------------------------------------------- what it holds

    @property
    def prefix(self) -> str:
        """Start of the names of the method's tensors in the root's state dict."""
        return f"peft.{key_of(self.name)}."

    def trainable(self) -> dict[str, Tensor]:
        root = self.need_root()
        if not self.is_trained or not self.attached:
            return {}
        parameters = dict(root.named_parameters())
        found: dict[str, Tensor] = {name: parameters[name] for name in self.base_at_start}
        for name, tensor in self.module.named_parameters():
            if tensor.requires_grad:
                found[f"{self.prefix}{name}"] = tensor
        return found

    def may_have_zero_gradient(self) -> set[str]:
        """Names of trained tensors whose gradient may be zero by their place (a key's bias, an embedding's row that no
        sample looks up): the base's own, and chosen entries of them."""
        entries = {id(p) for graft in self.grafts if graft.entries for p in graft.parameters()}
        return {*self.base_at_start, *(name for name, tensor in self.trainable().items() if id(tensor) in entries)}

    def packings(self) -> dict[str, Graft]:
        """Tensors (by their names in the root; another method's, even) whose stored form is not the one in use; by
        default those that the method's grafts declare."""
        return {f"{self.prefix}{path}.{name}": graft for path, graft in self.module.named_modules()
                if isinstance(graft, Graft) for name in graft.packed}

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored to rebuild the method on its base: its own tensors and the base tensors it moved.
        What some method packs is here in its stored form."""
        return contents.stored_tensors(self._self)

    def counts(self) -> dict[str, int]:
        """Trained parameters by owner: ``method``, ``norms`` (the option), ``head`` (inside the model), and ``stored``,
        the numbers that the method's file holds."""
        return contents.counts(self._self)

    def spec(self) -> dict[str, Any]:
        """How to make this method again, as JSON: the class's name in the registry, its arguments, its structure."""
        return spec_of(self._self)

    def save(self, folder: str | Path, module: nn.Module | None = None) -> Path:
        """Write ``adapter.safetensors`` and ``adapter.json`` into ``folder``; `core.load_adapter` reads them.

        Args:
            folder: made where it is missing.
            module: what is around the model; what is trained there (a head) is written along, and comes back by
                ``load_adapter(folder, module)``.
        """
        root = self.need_root()
        if module is not None:
            return save_adapter([self._self], folder, tensors_beside(module, root), beside=path_of(root, module))
        around = None if self.lightning_module is None else self.lightning_module()
        left_out = [] if around is None else [name.removeprefix(OUTSIDE) for name in tensors_beside(around, root)]
        if left_out:
            warnings.warn(f"{self.name}: {listed(left_out, 3)} of {type(around).__name__} is trained beside the model "
                          "and not saved: method.save(folder, module) writes it along", stacklevel=2)
        return save_adapter([self._self], folder)

    # ------------------------------------------------------------------------------- switching, merging, taking off

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this method: its grafts are off and base tensors that it moved are at their start."""
        with contents.base_at_start(self._self):
            states = [graft.active for graft in self.grafts]
            try:
                activate(self.grafts, [False] * len(states))
                yield
            finally:
                activate(self.grafts, states)

    @contextlib.contextmanager
    def route(self, variant: str | Tensor | Sequence[int]) -> Iterator[None]:
        """Select one of several named variants, or route each row of a batch to its own (see `core.compose.Route`)."""
        raise ScionError(f"{self.name} has one variant only: several are made by Route(methods=[...])")
        yield

    def merge(self) -> None:
        """Write the method into the weights and take it off; the model is then a plain backbone.

        Raises:
            ScionError: the method cannot be merged, a weight is tied to another, or values are not finite; nothing has
                changed then.
        """
        merging.merge(self._self)

    def unmerge(self) -> None:
        """Restore the weights bit for bit and put the method back.

        Raises:
            ScionError: the weights have changed since, by a later merge or by training.
        """
        merging.unmerge(self._self)

    def freeze(self) -> None:
        """Keep the method in the forward, but train it no longer."""
        self.is_trained = False
        parameters = dict(self.need_root().named_parameters())
        for name in self.base_at_start:
            parameters[name].requires_grad_(False)
        self.module.requires_grad_(False)

    def remove(self) -> None:
        """Take the method away without a trace: hooks and tensors are gone, moved base tensors are back at their
        start values, and the last method leaves the model as it was before the first."""
        root = self.need_root()
        if self.merged is None:
            self.disconnect()
            parameters = dict(root.named_parameters())
            with torch.no_grad():
                for name, value in self.base_at_start.items():
                    parameters[name].copy_(value)
            contents.rewind_buffers(self._self)
            home: Home = root.peft  # type: ignore[assignment]
            home.take_off(self._self)
        self.root, self.merged = None, None

    def check_training(self, *optimizers: torch.optim.Optimizer) -> None:
        """Check a training loop of one's own, as a Trainer's callback does by itself.

        To be called before the first step: the optimizers must have all that the method trains, the model must be as it
        was when the method was attached, and within their first steps each trained tensor must get a gradient; else
        ``optimizer.step()`` raises. Called behind a backward pass, it looks at that pass's gradients at once.

        Args:
            optimizers: all that train the model.

        Raises:
            ScionError: names the tensors and the likely reason.
        """
        root = self.need_root()
        check_model(self._self)
        check_optimizers(self._self, optimizers)
        warn_of_recomputing(root, self.name)
        watch_steps(self._self, optimizers)


def activate(some: Sequence[Graft], states: Sequence[bool]) -> None:
    """Let grafts take part in the forward, or not."""
    for graft, state in zip(some, states, strict=True):
        if graft.active != state:
            graft.active = state
            grafts.refresh(graft)


def copy_on_cpu(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; the tensor itself where it has no values."""
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, whose names are those without it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
