"""A method on a model: attached, looked at, switched off, merged, saved and taken off again."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core import graft as grafts
from core.anatomy import NORMS, Anatomy, check_layers, check_roles, dissect
from core.errors import ScionError, listed
from core.graft import Graft
from core.method import contents, merging
from core.method.attached import Home
from core.method.bases import check_base, check_quantized, check_sites
from core.method.beside import OUTSIDE, path_of, tensors_beside
from core.method.definition import Values
from core.method.options import linear_only
from core.method.other_libraries import sentence_backbone
from core.method.plan import Plan
from core.method.saving import save_adapter
from core.method.state import MethodModule, spec_of
from core.method.training_checks import check_model, check_optimizers, shapes_of, warn_of_recomputing, watch_steps
from core.method.with_grafts import MethodWithGrafts

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


class MethodOnModel(MethodWithGrafts):
    """What users do with a method and a model; see `PEFTMethod`."""

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
        if self.values is not None and self.root is None:
            self.values.check(self.as_peft_method, anatomy)
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
        check_sites(self.as_peft_method, sites)
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

    # ------------------------------------------------------------------------------- attaching

    def attach(self, model: nn.Module) -> PEFTMethod:
        """Freeze ``model`` (the first method does), insert the grafts, and return the method.

        Raises:
            ScionError: unknown anatomy, targets that match nothing, values that do not fit; nothing has changed then.
        """
        model = uncompiled(model)
        if self.root is model:
            return self.as_peft_method
        # Everything that can be refused is refused before the first line that changes something.
        home = self._home_for(model)
        plan = self.plan_for(model)
        others = list(home.methods.values()) if home is not None else []
        self._check_owners(plan, others)
        vars(self).update(plan.numbers)
        module = MethodModule(self.as_peft_method)
        self.fill(module, plan)
        self._check_batch(module, others)
        if self.trains_backbone and not plan.base_parameters and not any(True for _ in module.parameters()):
            raise ScionError(f"{self.name}: layers={self.layers} leaves nothing to train")
        self._warn_of_ties(model, module)

        # From here on the model changes.
        if home is None:
            home = Home(model, plan.anatomy, self.head)
            home.enter(model)
        parameters = dict(model.named_parameters())
        self.root, self.module, self.norm_names = model, module, list(plan.norms)
        home.attached += 1
        self.place = home.attached
        self.base_at_start = {name: copy_on_cpu(parameters[name]) for name in plan.base_parameters}
        self.buffers_at_start = self._moving_buffers(home)
        home.add(self.as_peft_method)
        self.shapes_at_start = shapes_of(self.as_peft_method)
        self.connect()
        for name in plan.base_parameters:
            parameters[name].requires_grad_(self.is_trained)
        if not self.is_trained:
            module.requires_grad_(False)
        if self.values is not None:
            self._fill_values(self.values)
        model.train(model.training)  # frozen parts go into eval mode
        return self.as_peft_method

    def _fill_values(self, values: Values) -> None:
        """Write the values that the method came with; where they do not fit it is taken off again."""
        try:
            values.fill(self.as_peft_method)
        except Exception:
            self.remove()
            raise
        if not self.is_trained:
            self.backbone_mode = "eval"  # or running statistics that belong to it would go on moving

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
        # Also of a frozen method: its file holds those of the time when it was trained.
        if self.backbone_mode != "train":
            return {}
        kept = nn.Module.state_dict(home.root).keys()
        taken = {name for other in home.methods.values() for name in other.buffers_at_start}
        return {name: copy_on_cpu(buffer) for name, buffer in home.root.named_buffers()
                if name in kept and name not in taken and not name.startswith("peft.")}

    # ------------------------------------------------------------------------------- what it holds

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored to rebuild the method on its base: its own tensors and the base tensors it moved.
        What some method packs is here in its stored form."""
        return contents.stored_tensors(self.as_peft_method)

    def counts(self) -> dict[str, int]:
        """Trained parameters by owner: ``method``, ``norms`` (the option), ``head`` (inside the model), and ``stored``,
        the numbers that the method's file holds."""
        return contents.counts(self.as_peft_method)

    def spec(self) -> dict[str, Any]:
        """How to make this method again, as JSON: the class's name in the registry, its arguments, its structure."""
        return spec_of(self.as_peft_method)

    def save(self, folder: str | Path, module: nn.Module | None = None) -> Path:
        """Write ``adapter.safetensors`` and ``adapter.json`` into ``folder``; `core.load_adapter` reads them.

        Args:
            folder: made where it is missing.
            module: what is around the model; what is trained there (a head) is written along, and comes back by
                ``load_adapter(folder, module)``.
        """
        root = self.need_root()
        if module is not None:
            beside = tensors_beside(module, root)
            return save_adapter([self.as_peft_method], folder, beside, beside=path_of(root, module))
        around = None if self.lightning_module is None else self.lightning_module()
        left_out = [] if around is None else [name.removeprefix(OUTSIDE) for name in tensors_beside(around, root)]
        if left_out:
            warnings.warn(f"{self.name}: {listed(left_out, 3)} of {type(around).__name__} is trained beside the model "
                          "and not saved: method.save(folder, module) writes it along", stacklevel=2)
        return save_adapter([self.as_peft_method], folder)

    # ------------------------------------------------------------------------------- switching, merging, taking off

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this method: its grafts are off and base tensors that it moved are at their start."""
        with contents.base_at_start(self.as_peft_method):
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
        merging.merge(self.as_peft_method)

    def unmerge(self) -> None:
        """Restore the weights bit for bit and put the method back.

        Raises:
            ScionError: the weights have changed since, by a later merge or by training.
        """
        merging.unmerge(self.as_peft_method)

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
            contents.rewind_buffers(self.as_peft_method)
            home: Home = root.peft  # type: ignore[assignment]
            home.take_off(self.as_peft_method)
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
        check_model(self.as_peft_method)
        check_optimizers(self.as_peft_method, optimizers)
        warn_of_recomputing(root, self.name)
        watch_steps(self.as_peft_method, optimizers)


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
    """The module inside ``torch.compile``'s wrapper, whose names are those without it; of a model of
    sentence-transformers, which is a row of modules, the transformer in it."""
    inner = getattr(model, "_orig_mod", model)
    return sentence_backbone(inner if isinstance(inner, nn.Module) else model)
