"""`PEFTMethod`: what all methods share. A method says where its grafts stand and what they are; the rest is here.

A method is a Lightning callback::

    Trainer(callbacks=[LoRA(rank=8)]).fit(module)        # any LightningModule that has .backbone or .model

and works on any ``nn.Module`` with a known anatomy just as well::

    method = LoRA(rank=8).attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values())
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import warnings
import weakref
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NotRequired, TypedDict

import torch
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import _MockOptimizer
from torch import Tensor, nn

from core import graft as grafts
from core.anatomy import NORMS, Anatomy, Site, check_layers, check_roles, dissect
from core.errors import ScionError, listed, nearest
from core.files import parse_json
from core.graft import Graft
from core.json_types import Digest, Name, check, check_fields
from core.method import merging
from core.method.attached import Home, keep_only_owned, key_of
from core.method.attached import home_in as home_in
from core.method.attached import methods_on as methods_on
from core.method.bases import check_base, check_quantized, check_sites
from core.method.beside import OUTSIDE, path_of, tensors_beside
from core.method.other_libraries import watch_loading
from core.method.saving import save_adapter
from core.method.training_checks import (
    GradientWatch,
    check_averages,
    check_launcher,
    check_model,
    check_optimizers,
    check_place,
    shapes_of,
    warn_of_recomputing,
    watch_steps,
)
from core.random_state import random_states, restore_random_states, seed_of, seeded
from core.record import Recorded, plain, signature
from core.training import exact_resume

if TYPE_CHECKING:
    import lightning.pytorch as L


class PEFTMethod(Recorded, Callback, ABC):
    """Base of all methods. Class attributes declare what a method is; the tests and the command read them.

    Args:
        layers: indices of the blocks to adapt (negative ones count from the end); None is all.
        norms: norm roles whose weights are trained as well (``("norm2", "norm")``); counted apart.
        name: the method's name on the model, in state-dict keys and files; by default its class's name.
        on: path of the backbone in a LightningModule; by default ``backbone`` or ``model``.
        trainable: False keeps the method in the forward but frozen.
        seed: of the method's random values, together with its name and each site's.
        head: whether a task head inside the backbone is trained (a language model's head never is).
        backbone_mode: ``eval`` keeps frozen parts without dropout, drop-path and batch statistics; ``train`` does not;
            None takes the method's own.
        lr: learning rate of this method (and of the head, if it is the first one) where the run says ``auto``; None is
            the recommended one.
    """

    identity_at_start: bool = True
    """Attaching leaves the output as it is; an option may say otherwise on the instance."""
    trains_backbone: ClassVar[bool] = True
    """Trains something in the backbone, or refuses; a probe does not."""
    mergeable: ClassVar[bool] = False
    """``merge`` can write the method into the weights."""
    moves_base: ClassVar[bool] = False
    """Trains the backbone's own tensors."""
    by_rows: ClassVar[bool] = True
    """Rows of one batch can have adapters of their own (`core.compose`); a method that moves the base cannot anyway."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Roles without which a backbone cannot have this method."""
    inference_cost: ClassVar[str] = "none once merged"
    recommended: ClassVar[dict[str, float]] = {"lr": 1e-3, "weight_decay": 0.0}
    """Learning rate and weight decay from the paper, taken by ``lr: auto``; ``head_lr`` where the rate of a new head
    beside the method must be another one."""
    former_options: ClassVar[dict[str, Any]] = {}
    """Options that files of earlier versions name, with the one value that they had there."""
    stages: tuple[str, ...] = ()
    """Names of the runs that the method needs one after the other; empty means one. An option may say otherwise on the
    instance."""
    mode: ClassVar[Literal["eval", "train"]] = "eval"
    """Default of ``backbone_mode``."""
    structure_types: ClassVar[Mapping[str, Any] | None] = None
    """The keys of `structure` with the types of their values (see `core.json_types`), against which files are checked;
    None checks nothing."""
    start_only: ClassVar[tuple[str, ...]] = ()
    """Arguments that only say what the method starts from (a folder, a download): files leave them at their
    defaults."""
    hf_form: ClassVar[Any] = None
    """How Hugging Face peft writes a method of another distribution, a `core.adapters.huggingface.form.PeftForm`; those
    of this one are in `core.adapters.huggingface.forms`."""

    def __init__(
        self,
        *,
        layers: Sequence[int] | None = None,
        norms: Sequence[str] = (),
        name: str | None = None,
        on: str | None = None,
        trainable: bool = True,
        seed: int = 0,
        head: Literal["train", "frozen"] = "train",
        backbone_mode: Literal["eval", "train"] | None = None,
        lr: float | None = None,
    ) -> None:
        if name is not None and (not name or "." in name):
            raise ScionError(f"{type(self).__name__}: name {name!r} must be a word without dots")
        self.layers = None if layers is None else list(layers)
        self.norms = tuple(norms)
        self.name = name or type(self).__name__
        self.on, self.is_trained, self.seed, self.head = on, trainable, seed, head
        self.backbone_mode: str = backbone_mode or self.mode
        if lr is not None and lr <= 0:
            raise ScionError(f"{type(self).__name__}: lr {lr} must be positive")
        self.suggested = {**self.recommended, **({} if lr is None else {"lr": lr})}
        self.root: nn.Module | None = None
        self.place = 0  # in the order of attachment
        self.module: nn.Module = MethodModule(self)  # within a composition, its part of the composition's module
        self.start: dict[str, Tensor] = {}  # start values of the base tensors that this method moves
        self._merged: dict[str, tuple[Tensor, Tensor]] | None = None  # name -> (before, after)
        self._made: list[str] = []  # biases that merging made
        self._home: Home | None = None  # where it stood before it was merged
        self.start_buffers: dict[str, Tensor] = {}  # likewise of the base's buffers, where its parts are in train mode
        self.shapes_at_start: dict[str, list[int]] = {}  # of the sites' weights, by name
        self._module: weakref.ref[nn.Module] | None = None  # what a Trainer trains it in
        self._gradient_watch: GradientWatch | None = None  # for gradients that never come
        self._resume: dict[str, Any] | None = None
        self.prepared = False  # by `prepare`, or with values loaded
        self.steps, self.total = 0, 0  # of the optimizer, where the method has something to do after each
        self._following: Any = None
        self._around: nn.Module | None = None  # the module whose parameters the optimizer has
        self._late: list[Tensor] = []  # tensors that came after data-parallel training had begun

    # --------------------------------------------------------------------------------- what a method defines

    targets: Sequence[str] | None = ()

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Where grafts stand; by default ``targets`` in ``layers``, where None means every linear map of the blocks."""
        targets = anatomy.linear_roles() if self.targets is None else self.targets
        return anatomy.sites(targets, self.layers, self.name) if targets else []

    def build(self, site: Site) -> Graft:
        """The graft for a site. Called with the random state seeded by (seed, name, site); use ``nn.init`` freely."""
        raise NotImplementedError

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        """Register tensors that many grafts share on ``module``, before ``build`` is called."""

    def moved(self, anatomy: Anatomy) -> list[str]:
        """Names of the backbone's own parameters that the method trains."""
        return []

    def check(self, anatomy: Anatomy) -> None:
        """Refuse, before anything changes, a backbone that this method cannot have. It answers only, as `sites` and
        `moved` do: what the method keeps of a backbone it takes in `begin`."""

    def begin(self, anatomy: Anatomy) -> None:
        """Take from the backbone what `sites`, `moved` and `build` need, and go back to the first stage. Called after
        `check` where the method is about to be attached."""

    def feature_dim(self, dim: int, anatomy: Anatomy) -> int:
        """Width of the root's feature with this method on it, where it is ``dim`` without; what reads the feature is
        built for it (`FineTuner.fit_head`)."""
        return dim

    def structure(self) -> dict[str, Any]:
        """What, beside the constructor's arguments, rebuilds the method's tensors (phases, grown ranks): JSON."""
        return {}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Bring an attached method into a saved ``structure``, before its tensors are loaded."""

    def shapes(self) -> dict[str, list[int]]:
        """The weights' shapes by site: the `structure` of methods whose tensors do not show them."""
        return {graft.site.weight_name: list(graft.site.full_weight.shape) for graft in self.grafts}

    def check_shapes(self, saved: dict[str, list[int]]) -> None:
        """Refuse, in `restructure`, weights that differ from the saved `shapes`."""
        for name, shape in self.shapes().items():
            if saved.get(name, shape) != shape:
                raise ScionError(f"{self.name}: {name} is {saved[name]} in the file, {shape} here")

    def figures(self) -> dict[str, Any]:
        """What a run records of the method beside its counts (a sparsity, by layer, say): JSON."""
        return {}

    def idle(self) -> set[str]:
        """Names of trained tensors that may go without a gradient."""
        return set()

    def resting(self) -> set[str]:
        """Names of trained tensors whose gradient may be zero by their place (a key's bias, an embedding's row that no
        sample looks up): the base's own, and chosen entries of them."""
        sparse = {id(p) for graft in self.grafts if graft.entries for p in graft.parameters()}
        return {*self.start, *(name for name, tensor in self.trainable().items() if id(tensor) in sparse)}

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; tensors with fewer than two axes are not decayed. Keys beside ``params`` override
        the run's optimizer settings; ``lr_factor`` multiplies its learning rate."""
        tensors = list(self.trainable().values())
        decayed, plain_ = [t for t in tensors if t.dim() > 1], [t for t in tensors if t.dim() < 2]
        return [group for group in ({"params": decayed}, {"params": plain_, "weight_decay": 0.0}) if group["params"]]

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer | None:
        """The optimizer of a method that is one, for its own groups; None leaves them to the run's optimizer."""
        return None

    def packings(self) -> dict[str, Graft]:
        """Tensors (by their names in the root; another method's, even) whose stored form is not the one in use; by
        default those that the method's grafts declare."""
        return {f"{self.prefix}{path}.{name}": graft for path, graft in self.module.named_modules()
                if isinstance(graft, Graft) for name in graft.packed}

    def optimizer_bytes(self) -> int:
        """What the optimizer keeps of the method's tensors: Adam's two moments, unless `make_optimizer` says otherwise;
        counters of steps are left out."""
        return sum(2 * tensor.numel() * tensor.element_size() for tensor in self.trainable().values())

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        """A term to add to the task's loss in FineTuner, or None."""
        return None

    @property
    def adds_loss(self) -> bool:
        """Whether the method is not itself without its `loss_terms`."""
        return False

    def training_loss(self, pl_module: Any, batch: Any, outputs: Any) -> Tensor | None:
        """In the place of the task's loss in a training step of `FineTuner`, from the batch (inputs, targets) and the
        task's outputs; None leaves it to the task. The first method that gives one has its way."""
        return None

    def beside(self, pl_module: Any) -> nn.Module | None:
        """What the method puts beside the model of a `FineTuner` when that begins to train, its head being there: a
        module under ``pl_module.aside``, trained and kept in checkpoints, but in no adapter and not in inference."""
        return None

    prepares: bool = False
    """Whether `prepare` has something to do before training."""

    def prepare(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """What a method computes from data before its first step, into tensors of its own, so that it is saved. The
        callback calls it once, when a `FineTuner` begins to train and neither resumes nor has loaded the method, with
        the training samples one by one in random order as ``batches`` and ``FineTuner.loss``; elsewhere it is called by
        hand. It sets ``prepared``."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What a method with a schedule does after each step of the optimizer. Gradients are still there;
        ``self.steps`` counts the steps, this one included, and ``self.total`` is their number in the whole run."""

    def training_state(self) -> dict[str, Any]:
        """What training needs beside the method's tensors (running scores, say): tensors and JSON, for checkpoints
        only."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Undo of `training_state`."""

    @property
    def settled(self) -> bool:
        """Whether the method is what it is to be in the end: a schedule may reach its sparsity or its budget in the
        last steps alone. The best epoch of a run is chosen among those behind that."""
        return True

    # --------------------------------------------------------------------------------- attaching

    @property
    def attached(self) -> bool:
        """Whether the method stands on a model now."""
        return self.root is not None and self._merged is None

    @property
    def grafts(self) -> list[Graft]:
        """The method's grafts, in the order of their sites."""
        return self.standing(self.module)

    def standing(self, module: nn.Module) -> list[Graft]:
        """Of all grafts in ``module`` those that stand at sites themselves (in a composition some only take part)."""
        return [child for child in module.modules() if isinstance(child, Graft)]

    def attach(self, model: nn.Module) -> PEFTMethod:
        """Freeze ``model`` (the first method does), place the grafts, and return the method.

        Raises:
            ScionError: unknown anatomy, targets that match nothing, values that do not fit; nothing has changed then.
        """
        model = uncompiled(model)
        if self.root is not None:
            if self.root is model:
                return self
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
        anatomy = self._begun(model)
        norms = self._norm_names(anatomy)
        moved = list(dict.fromkeys([*self.moved(anatomy), *norms]))
        for other in home.methods.values() if home is not None else ():
            both = [name for name in moved if name in other.start]
            if both:
                raise ScionError(f"{self.name}: {listed(both, 2)} is trained by {other.name} already; a tensor of the "
                                 "backbone has one owner")
        parameters = dict(model.named_parameters())
        module = MethodModule(self)
        self._fill(module, anatomy)
        self._check_folds(home, module)
        if self.trains_backbone and not moved and not any(True for _ in module.parameters()):
            raise ScionError(f"{self.name}: layers={self.layers} leaves nothing to train")

        self._warn_of_ties(model, module)
        if home is None:
            home = Home(model, anatomy, self.head)
            home.enter(model)
        self.root, self.module, self.norm_names = model, module, norms
        home.attached += 1
        self.place = home.attached
        self.start = {name: _copied(parameters[name]) for name in moved}
        self.start_buffers = self._moving_buffers(home)
        home.add(self)
        self.shapes_at_start = shapes_of(self)
        self._connect()
        for name in moved:
            parameters[name].requires_grad_(self.is_trained)
        if not self.is_trained:
            module.requires_grad_(False)
        model.train(model.training)
        return self

    def _moving_buffers(self, home: Home) -> dict[str, Tensor]:
        """The base's buffers that a forward in train mode may move (running statistics), where no other method has
        them."""
        if not self.is_trained or self.backbone_mode != "train":
            return {}
        root = home.root
        kept = nn.Module.state_dict(root).keys()
        taken = {name for other in home.methods.values() for name in other.start_buffers}
        return {name: _copied(buffer) for name, buffer in root.named_buffers()
                if name in kept and name not in taken and not name.startswith("peft.")}

    @torch.no_grad()
    def rewind_buffers(self) -> None:
        """Put the base's buffers that the method moves back to their start."""
        for name, buffer in self.live_buffers().items():
            if not self.start_buffers[name].is_meta:
                buffer.copy_(self.start_buffers[name])

    def _check_folds(self, home: Home | None, module: nn.Module) -> None:
        """Two methods cannot both let streams of their own ride in the batch."""
        if any(isinstance(graft, Graft) and graft.folds for graft in module.modules()):
            for other in home.methods.values() if home is not None else ():
                if any(graft.folds for graft in other.grafts):
                    raise ScionError(f"{self.name}: the batch carries the streams of {other.name} already; one method "
                                     "can fold it")

    def _warn_of_ties(self, model: nn.Module, module: nn.Module) -> None:
        """One side of a tied weight is adapted alone, which is legitimate, but nothing to happen unnoticed."""
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        for graft in module.modules():
            if isinstance(graft, Graft) and graft.site.kind != "module" and (
                    graft.verbs != ("before",) or type(graft).merged is not Graft.merged):
                tied = [name for name in names[id(graft.site.full_weight)] if name != graft.site.weight_name]
                if tied and not graft.site.tied:
                    warnings.warn(f"{self.name}: {graft.site.weight_name} is tied to {listed(tied)}, which stays as it "
                                  "is", stacklevel=3)

    def examine(self, model: nn.Module) -> Anatomy:
        """The anatomy of ``model``, if this method can stand on it; changes nothing, the method included.

        Raises:
            ScionError: it cannot, and why.
        """
        return self._stand_in()._begun(model)

    def _stand_in(self) -> PEFTMethod:
        """A copy that can look at a backbone in this method's place."""
        return copy.copy(self)

    def _begun(self, model: nn.Module) -> Anatomy:
        """`check` and `begin` on ``model``."""
        check_base(model, self.name)
        anatomy = dissect(model)
        for role in self.needs:
            if role not in anatomy.roles:
                raise ScionError(f"{self.name} needs the role {role!r}, which {anatomy.family} does not have "
                                 f"(it has {listed(anatomy.roles, 40)})")
        targets = self.config.get("targets")
        if targets is not None and not list(targets):
            raise ScionError(f"{self.name}: targets is empty, so there would be nothing to train; its roles are "
                             f"{listed(anatomy.roles, 40)}")
        anatomy.layer_indices(self.layers, self.name)
        self.check(anatomy)
        self.begin(anatomy)
        sites = self.sites(anatomy)
        check_quantized(model, sites, self.moved(anatomy), self.name)
        check_sites(self, sites)
        return anatomy

    def foresee(self, roles: Sequence[str], blocks: int, family: str) -> None:
        """Refuse targets and layers that a backbone with these roles and blocks does not have, before it is built."""
        check_roles(self.config.get("targets") or (), roles, family, self.name)
        check_layers(self.layers, blocks, family, self.name)

    def need_linear(self, anatomy: Anatomy) -> None:
        """Refuse sites that are no linear map; for `check`."""
        for site in self.sites(anatomy):
            if site.kind == "module":
                roles = dict.fromkeys(site.role for site in anatomy.all_sites() if site.kind != "module")
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) has no linear weight; roles "
                                 f"that have one: {', '.join(roles)}")

    def _fill(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Put the method's shared tensors and grafts into ``module``."""
        sites = self.sites(anatomy)
        with seeded(self.seed, self.name):
            self.shared(module, sites)
        device, dtype = home_of(next(anatomy.root.parameters()))
        module.to(device=device, dtype=dtype)
        for site in sites:
            module.add_module(key_of(site.name), self._build(site, anatomy))

    def _build(self, site: Site, anatomy: Anatomy) -> Graft:
        with seeded(self.seed, self.name, site.name):
            graft = self.build(site)
        # Sites without weights (a dropout, an identity) take device and type from their block.
        around = site.module if site.block is None else anatomy.blocks[site.block].module
        tensor = next(site.module.parameters(), None)
        tensor = next(around.parameters(), next(anatomy.root.parameters())) if tensor is None else tensor
        device, dtype = home_of(tensor)
        return graft.to(device=device, dtype=dtype)

    def add_graft(self, graft: Graft) -> None:
        """Give an attached method one more graft, on the device of its site's tensor and in a type that it can train
        in: for methods whose grafts are not known when they are attached."""
        device, dtype = home_of(graft.site.full_weight)
        graft.to(device=device, dtype=dtype).requires_grad_(self.is_trained)
        graft.place = self.place
        self.module.add_module(key_of(graft.site.name), graft)
        grafts.connect(graft)

    def _norm_names(self, anatomy: Anatomy) -> list[str]:
        if not self.norms:
            return []
        unknown = [role for role in self.norms if not f".{role}".endswith(tuple(f".{norm}" for norm in NORMS))]
        if unknown:
            raise ScionError(f"{self.name}: norms {unknown[0]!r} is not one of {', '.join(NORMS)}")
        prefix = [(site.path, site.module) for site in anatomy.sites(self.norms, self.layers, self.name)]
        return [f"{path}.{name}" for path, module in prefix for name, _ in module.named_parameters()]

    def _connect(self) -> None:
        for graft in self.grafts:
            graft.place = self.place
            grafts.connect(graft)

    def _disconnect(self) -> None:
        for graft in self.grafts:
            grafts.disconnect(graft)

    def freeze(self) -> None:
        """Keep the method in the forward, but train it no longer."""
        self.is_trained = False
        parameters = dict(self._need_root().named_parameters())
        for name in self.start:
            parameters[name].requires_grad_(False)
        self.module.requires_grad_(False)

    def advance(self, module: nn.Module | None = None) -> None:
        """Carry a method that has several ``stages`` on into its next one; ``module`` is what stands around the root,
        a head included, for methods that look there."""
        raise ScionError(f"{self.name} has one stage only")

    def remove(self) -> None:
        """Take the method away without a trace: hooks and tensors are gone, moved base tensors are back at their
        start values, and the last method leaves the model as it was before the first."""
        root = self._need_root()
        if self._merged is None:
            self._disconnect()
            with torch.no_grad():
                parameters = dict(root.named_parameters())
                for name, value in self.start.items():
                    parameters[name].copy_(value)
            self.rewind_buffers()
            self._leave_home(root)
        self.root, self._merged = None, None

    def _leave_home(self, root: nn.Module) -> None:
        home: Home = root.peft  # type: ignore[assignment]
        home.drop(self)
        parameters = dict(root.named_parameters())
        for name in self.start:
            parameters[name].requires_grad_(False)
        if not home.methods:
            home.leave(root)

    def _need_root(self) -> nn.Module:
        if self.root is None:
            raise ScionError(f"{self.name} is not attached to a model yet: call attach(model) first")
        return self.root

    # --------------------------------------------------------------------------------- what it holds

    def trainable(self) -> dict[str, Tensor]:
        """``{name in the root: tensor}`` of all that this method trains."""
        root = self._need_root()
        if not self.is_trained or self._merged is not None:
            return {}
        own = {f"{self.prefix}{name}": tensor for name, tensor in self.module.named_parameters()
               if tensor.requires_grad}
        parameters = dict(root.named_parameters())
        return {**{name: parameters[name] for name in self.start}, **own}

    @property
    def prefix(self) -> str:
        """Start of the names of the method's tensors in the root's state dict."""
        return f"peft.{key_of(self.name)}."

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored to rebuild the method on its base: its own tensors and the base tensors it moved.
        What some method packs is here in its stored form."""
        packings = self.all_packings()
        found: dict[str, Tensor] = {}
        for name, tensor in self.live_tensors().items():
            if name in packings:
                found |= {f"{name}.{part}": stored for part, stored in packings[name].pack(tensor).items()}
            else:
                found[name] = tensor
        return found

    def live_tensors(self) -> dict[str, Tensor]:
        """What `tensors` stores, as it is in use."""
        parameters = dict(self._need_root().named_parameters())
        own = {f"{self.prefix}{name}": tensor.detach() for name, tensor in self.module.state_dict().items()
               if not name.endswith("_extra_state")}
        return {**{name: parameters[name].detach() for name in self.start}, **self.live_buffers(), **own}

    def live_buffers(self) -> dict[str, Tensor]:
        """The base's buffers that the method moves, as they are in use."""
        buffers = dict(self._need_root().named_buffers()) if self.start_buffers else {}
        return {name: buffers[name] for name in self.start_buffers}

    def all_packings(self) -> dict[str, Graft]:
        """The packings of all methods on the root."""
        home = getattr(self._need_root(), "peft", None)
        methods = home.methods.values() if isinstance(home, Home) else [self]
        return {name: packing for method in methods for name, packing in method.packings().items()}

    def counts(self) -> dict[str, int]:
        """Trained parameters by owner: ``method``, ``norms`` (the option), ``head`` (inside the model), and ``stored``,
        the numbers that the method's file holds."""
        root = self._need_root()
        norms = set(self.norm_names)
        trained = {name: tensor.numel() for name, tensor in self.trainable().items()}
        heads = dissect(root).head_names() if self.head == "train" else set()
        return {
            "method": sum(count for name, count in trained.items() if name not in norms),
            "norms": sum(count for name, count in trained.items() if name in norms),
            "head": sum(p.numel() for name, p in root.named_parameters() if name in heads and name not in trained),
            "stored": sum(tensor.numel() for tensor in self.tensors().values()),
        }

    # --------------------------------------------------------------------------------- switching

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this method: its grafts are off and base tensors that it moved are at their start."""
        root = self._need_root()
        states = [graft.active for graft in self.grafts]
        parameters = dict(root.named_parameters())
        base = {**{name: before for name, (before, _) in (self._merged or {}).items()}, **self.start}
        base |= self.start_buffers
        moved = {name: parameters[name] for name in base if name in parameters} | self.live_buffers()
        values = {name: tensor.data for name, tensor in moved.items()}
        try:
            self._activate([False] * len(states))
            for name, tensor in moved.items():  # other storage, not other values: a backward under way stays valid
                tensor.data = base[name].to(tensor.device, tensor.dtype, copy=name in self.start_buffers)
            yield
        finally:
            for name, tensor in moved.items():
                tensor.data = values[name]
            self._activate(states)

    def _activate(self, states: Sequence[bool]) -> None:
        for graft, state in zip(self.grafts, states, strict=True):
            if graft.active != state:
                graft.active = state
                grafts.refresh(graft)

    @contextlib.contextmanager
    def route(self, variant: str | Tensor | Sequence[int]) -> Iterator[None]:
        """Select one of several named variants, or route each row of a batch to its own (see `core.compose.Route`)."""
        raise ScionError(f"{self.name} has one variant only: several are made by Route(methods=[...])")
        yield

    # --------------------------------------------------------------------------------- merging

    def merge(self) -> None:
        """Write the method into the weights and take it off; the model is then a plain backbone.

        Raises:
            ScionError: the method cannot be merged, a weight is tied to another, or values are not finite; nothing has
                changed then.
        """
        root = self._need_root()
        if self._merged is not None:
            warnings.warn(f"{self.name} is merged already", stacklevel=2)
            return
        check_model(self)
        if not self.mergeable:
            raise ScionError(f"{self.name} cannot be merged into the weights: {self.inference_cost}")
        parameters = dict(root.named_parameters())
        shared = {name for name, _ in root.named_parameters(remove_duplicate=False)} - set(parameters)
        for name, tensor in self.live_tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise ScionError(f"{self.name}: {name} holds values that are not finite: it cannot be merged")
        for graft in self.grafts:
            if graft.dropped:
                continue
            name = graft.site.weight_name
            merging.check_order(self, graft)
            if name in shared or (not graft.site.tied and any(  # tied modules that all have the graft change as one
                    root.get_parameter(other) is parameters[name] for other in shared)):
                raise ScionError(f"{self.name}: {merging.tied(root, name)}")
        merged = merging.merged_values(self, parameters)
        with torch.no_grad():
            self._made = [name for name in merged if name not in parameters]
            for name in self._made:
                module = root.get_submodule(name.rpartition(".")[0])
                module.bias = parameters[name] = nn.Parameter(merged[name][0].clone(), requires_grad=False)
            for name, (_, after) in merged.items():
                parameters[name].copy_(after)
            for name in self.start:  # the base's own tensors, moved: they must be the same when the method comes back
                value = parameters[name].detach().clone()
                merged[name] = (value, value)
        self._disconnect()
        self._merged, self._home = merged, root.peft  # type: ignore[assignment]
        self._leave_home(root)
        merging.note(self)

    def unmerge(self) -> None:
        """Restore the weights bit for bit and put the method back.

        Raises:
            ScionError: the weights have changed since, by a later merge or by training.
        """
        root = self._need_root()
        if self._merged is None:
            raise ScionError(f"{self.name} is not merged")
        parameters = dict(root.named_parameters())
        merging.take_out(self, self._merged, parameters)
        merging.forget(self)
        for name in self._made:
            root.get_submodule(name.rpartition(".")[0]).bias = None  # type: ignore[assignment]
        self._made = []
        home = getattr(root, "peft", None)
        if not isinstance(home, Home):
            home = self._home  # the one that knows the base as it was at the first attach
            assert home is not None
            home.enter(root)
        if home is not self._home:  # all that stand there now came later
            self.place = min(method.place for method in home.methods.values()) - 1
        self._merged = self._home = None
        home.add(self)
        self._connect()
        for name in self.start:
            parameters[name].requires_grad_(self.is_trained)
        root.train(root.training)

    # --------------------------------------------------------------------------------- files

    def save(self, folder: str | Path, module: nn.Module | None = None) -> Path:
        """Write ``adapter.safetensors`` and ``adapter.json`` into ``folder``; `core.load_adapter` reads them.

        Args:
            folder: made where it is missing.
            module: what stands around the model; what is trained there (a head) is written along, and comes back by
                ``load_adapter(folder, module)``.
        """
        root = self._need_root()
        if module is not None:
            return save_adapter([self], folder, tensors_beside(module, root), beside=path_of(root, module))
        around = self._module() if self._module is not None else None
        left_out = [] if around is None else [name.removeprefix(OUTSIDE) for name in tensors_beside(around, root)]
        if left_out:
            warnings.warn(f"{self.name}: {listed(left_out, 3)} of {type(around).__name__} is trained beside the model "
                          "and not saved: method.save(folder, module) writes it along", stacklevel=2)
        return save_adapter([self], folder)

    def spec(self) -> dict[str, Any]:
        """How to make this method again, as JSON: the class's name in the registry, its arguments, its structure."""
        config = {key: plain(value) for key, value in self.config.items()}
        for key in self.start_only:
            config[key] = plain(signature(type(self)).parameters[key].default)
        return {"class": type(self).__name__, "name": self.name, "config": config, "structure": self.structure()}

    # --------------------------------------------------------------------------------- as a callback

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}:{self.name}"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Graft once, before weights are restored and before the optimizer is made."""
        if self.root is None:
            check_launcher(self, trainer)
            root = self._find_root(pl_module)
            if root is None:
                self._wait_for_configure_model(pl_module)
            else:
                self.attach(root)
        else:
            check_place(self, pl_module)
        self._module = weakref.ref(pl_module)
        if stage == "fit":
            check_averages(self, trainer, pl_module)
        keep_only_owned(pl_module)
        if self.is_optimizer and stage == "fit" and not hasattr(pl_module, "methods"):
            warnings.warn(f"{self.name} is an optimizer: {type(pl_module).__name__}.configure_optimizers should return "
                          "method.make_optimizer(method.param_groups()), as core.FineTuner does", stacklevel=2)
        if self.prepares and not self.prepared and stage == "fit" and not hasattr(pl_module, "methods"):
            warnings.warn(f"{self.name} computes start values from data: call method.prepare(batches, loss) before "
                          "fitting, or use core.FineTuner", stacklevel=2)
        if self.adds_loss and stage == "fit" and not hasattr(pl_module, "methods"):
            warnings.warn(f"{self.name}: {type(pl_module).__name__} does not add the method's own loss; add "
                          f"method.loss_terms(self, batch, outputs) to yours, or use core.FineTuner", stacklevel=2)
        if self.attached:
            self.root.peft.keep_float32 = True  # type: ignore[union-attr]
        self._resume = None
        self._convert_early(trainer, pl_module)

    def _convert_early(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Once all methods are attached: they begin with the weights as they are."""
        callbacks: list[Any] = getattr(trainer, "callbacks", [])
        last = [callback for callback in callbacks if isinstance(callback, PEFTMethod)][-1:]
        if last and last[0] is self:
            exact_resume.convert_early(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.attached:
            self.root.peft.keep_float32 = False  # type: ignore[union-attr]

    def _find_root(self, pl_module: nn.Module) -> nn.Module | None:
        if self.on is not None:
            try:
                return pl_module.get_submodule(self.on)
            except AttributeError:
                names = [name for name, _ in pl_module.named_modules() if name]
                raise ScionError(f"{self.name}: on={self.on!r} names no module of {type(pl_module).__name__}"
                                 f"{nearest(self.on, names)}") from None
        for name in ("backbone", "model"):
            root = getattr(pl_module, name, None)
            if isinstance(root, nn.Module):
                return root
        if is_overridden(pl_module, "configure_model") and not getattr(pl_module, "_scion_configured", False):
            return None
        raise ScionError(f"{self.name}: {type(pl_module).__name__} has neither .backbone nor .model; name the backbone "
                         f"with on=... (its children are {listed(name for name, _ in pl_module.named_children())})")

    def _wait_for_configure_model(self, pl_module: Any) -> None:
        """The backbone is only made in ``configure_model``: graft at the end of that."""
        original = pl_module.configure_model

        def configure_model() -> None:
            original()
            if self.root is None:
                pl_module.__dict__.pop("configure_model", None)
                pl_module._scion_configured = True
                root = self._find_root(pl_module)
                assert root is not None
                self.attach(root)
                del pl_module._scion_configured
                self._convert_early(pl_module.trainer, pl_module)

        pl_module.__dict__["configure_model"] = configure_model

    # ------------------------------------------------------------------------------- following an optimizer

    @property
    def is_scheduled(self) -> bool:
        """Whether the method acts after each optimizer step."""
        return type(self).after_step is not PEFTMethod.after_step

    @property
    def is_optimizer(self) -> bool:
        """Whether the method brings an optimizer for its own tensors."""
        return type(self).make_optimizer is not PEFTMethod.make_optimizer

    def follow(self, optimizer: torch.optim.Optimizer, total: int, around: nn.Module | None = None) -> Any:
        """Let a scheduled method act after each step of ``optimizer``; a Trainer's callback does this by itself.

        Args:
            optimizer: holds the method's tensors.
            total: steps of the whole run.
            around: the module whose parameters the optimizer has, in their order; None is the root.

        Returns:
            A handle whose ``remove()`` ends it.
        """
        self.total, self._around = total, around

        def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self.steps += 1
            if self.is_trained and self._merged is None:
                self.after_step(optimizer)

        return optimizer.register_step_post_hook(hook)

    def enter_optimizer(self, optimizer: torch.optim.Optimizer, fresh: Sequence[nn.Parameter],
                        beside: Iterable[Tensor] | None = None) -> None:
        """Give ``fresh`` tensors of this method to ``optimizer``: in the group of those ``beside`` which they come (by
        default all that it has of this method), so that schedules go on, and in the order in which a new optimizer
        would have them, so that its state can be loaded."""
        mine = {id(tensor) for tensor in (self.trainable().values() if beside is None else beside)}
        order = {id(p): i for i, p in enumerate((self._around or self._need_root()).parameters())}
        groups = [(group, [p.dim() > 1 for p in group["params"] if id(p) in mine]) for group in optimizer.param_groups]
        for tensor in fresh:
            # Matrices stand in groups of their own where they are decayed.
            fitting = [group for group, matrices in groups if (tensor.dim() > 1) in matrices] or [
                group for group, matrices in groups if matrices]
            if not fitting:
                raise ScionError(f"{self.name}: the optimizer has none of its tensors")
            tensors = fitting[0]["params"]
            places = [order.get(id(p), 0) for p in tensors]
            tensors.append(tensor)
            if places == sorted(places):
                tensors.sort(key=lambda p: order.get(id(p), 0))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._late += fresh

    def leave_optimizer(self, optimizer: torch.optim.Optimizer, gone: Iterable[Tensor]) -> None:
        """Take tensors from ``optimizer``, with what it keeps of them."""
        lost = {id(tensor): tensor for tensor in gone}
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if id(p) not in lost]
        for one in getattr(optimizer, "optimizers", [optimizer]):
            for tensor in lost.values():
                one.state.pop(tensor, None)
        self._late = [tensor for tensor in self._late if id(tensor) not in lost]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        for tensor in self._late:  # DistributedDataParallel averages the gradients of those that it was made with
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            torch.distributed.all_reduce(gradient)
            tensor.grad = gradient / torch.distributed.get_world_size()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_following()

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.remove()
        self._following, self._around, self._late = None, None, []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _resumes_exactly(pl_module):
            exact_resume.keep_open(trainer, self._resume)
        self._gradient_watch = GradientWatch(self) if self.attached else None

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._gradient_watch is not None:
            self._gradient_watch.look(trainer.optimizers, 1 / trainer.accumulate_grad_batches)

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
        self._need_root()
        check_model(self)
        check_optimizers(self, optimizers)
        warn_of_recomputing(self._need_root(), self.name)
        watch_steps(self, optimizers)

    # What Lightning's checkpoints leave out is kept by the module where that is a `FineTuner`, and here otherwise.

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        resume = checkpoint.setdefault("resume", {"methods": {}})
        if self.attached:
            home: Home = self._need_root().peft  # type: ignore[assignment]
            resume["unfrozen"] = {**resume.get("unfrozen", {}), self.name: sorted(home.unfrozen())}
        if self.is_scheduled:
            resume["methods"][self.name] = {"steps": self.steps, **self.training_state()}
        if "processes" not in resume and not _resumes_exactly(pl_module):
            exact_resume.save(trainer, checkpoint)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resume = checkpoint.get("resume")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.attached:
            check_model(self)
            warn_of_recomputing(self._need_root(), self.name)
            if not all(isinstance(optimizer, _MockOptimizer) for optimizer in trainer.optimizers):
                check_optimizers(self, trainer.optimizers)
        resume, self._resume = self._resume, None
        if self.is_scheduled:
            self._stop_following()  # of a run that an error ended
            total = trainer.estimated_stepping_batches
            if math.isinf(total):
                raise ScionError(f"{self.name} follows a schedule over the whole run: give the Trainer max_epochs or "
                                 "max_steps")
            self.steps = 0
            self._following = self.follow(trainer.optimizers[0], int(total), pl_module)
        if resume is None:
            self._prepare(trainer, pl_module)
            return
        parameters = dict(self._need_root().named_parameters())
        for name in resume.get("unfrozen", {}).get(self.name, ()):  # a callback that did so will not do it again
            parameters[name].requires_grad_(True)
        mine = dict(resume.get("methods", {}).get(self.name, {}))
        if mine:
            self.steps = mine.pop("steps")
            self.load_training_state(mine)
        if not _resumes_exactly(pl_module):
            exact_resume.restore(trainer, resume)

    def _prepare(self, trainer: L.Trainer, pl_module: Any) -> None:
        """`prepare` on the Trainer's data and in its precision; data and random states afterwards stand where they
        stood. Several processes see the same samples, and draw alike."""
        if not self.prepares or self.prepared or not self.attached or not hasattr(pl_module, "methods"):
            return
        loader: Any = trainer.train_dataloader
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, "prepare"))
        order = torch.randperm(len(loader.dataset), generator=generator).tolist()
        read: list[int] = []

        def samples() -> Iterator[Any]:
            for index in order:
                read.append(index)
                yield training_batch(trainer, [index])

        def loss(batch: Any) -> Tensor:
            with trainer.precision_plugin.forward_context():
                value = pl_module.loss(batch)
            if not bool(torch.isfinite(value)):
                raise ScionError(f"{self.name}: the loss of {sample_name(trainer, read[-1])} is {float(value)}, before "
                                 "anything is trained; look at the sample")
            return value

        states = random_states()
        restore_random_states(exact_resume.gather(states, trainer)[0])
        self.prepare(samples(), loss)
        restore_random_states(states)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs its logging functions, and with them the Trainer, on every callback.
        return {key: None if key in ("_following", "_module") else value for key, value in self.__dict__.items()
                if key not in ("log", "log_dict")}


class MethodModule(nn.Module):
    """All tensors that one method adds: shared ones directly, each graft under its site's name."""

    def __init__(self, method: PEFTMethod) -> None:
        super().__init__()
        self.method = method

    def get_extra_state(self) -> Tensor:
        home = getattr(self.method.root, "peft", None)
        record = {**self.method.spec(), "base": home.fingerprint if isinstance(home, Home) else ""}
        return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        saved = decode_extra_state(state, "the checkpoint")
        home: Home = self.method.root.peft  # type: ignore[union-attr, assignment]
        if saved["class"] != type(self.method).__name__:
            raise ScionError(f"the checkpoint holds {saved['class']} where {type(self.method).__name__} is attached")
        if home.without_values:  # built on the meta device: the values arrive with this very checkpoint
            home.fingerprint, home.without_values = saved["base"], False
        if saved["base"] != home.fingerprint:
            raise ScionError(f"{self.method.name} was trained on another base ({saved['base']}) than this one "
                             f"({home.fingerprint}): build the same backbone with the same weights")
        check_structure(type(self.method), saved.get("structure", {}), "the checkpoint")
        self.method.restructure(saved.get("structure", {}))
        self.method.prepared = True


Spec = TypedDict("Spec", {"class": str, "name": Name, "config": dict[str, Any],
                          "structure": NotRequired[dict[str, Any]]})
"""What `PEFTMethod.spec` gives, and files hold."""
Own = TypedDict("Own", {"class": str, "name": Name, "config": dict[str, Any], "structure": NotRequired[dict[str, Any]],
                        "base": Digest})
"""A method's record in a checkpoint: its spec, and its base's fingerprint."""
LARGEST_STATE = 16 * 2**20
"""Bytes of such a record."""


def decode_extra_state(state: Any, where: str) -> dict[str, Any]:
    """The JSON record in a method's ``_extra_state``: spec and base fingerprint.

    Raises:
        ScionError: it is no such record; begins with ``where``.
    """
    if not (isinstance(state, Tensor) and state.dtype == torch.uint8 and state.dim() == 1 and not state.is_meta
            and state.layout == torch.strided and state.numel() <= LARGEST_STATE):
        raise ScionError(f"{where}: a method's record is damaged")
    try:
        record = parse_json(state.cpu().numpy().tobytes().decode())
    except (ValueError, RecursionError):
        raise ScionError(f"{where}: a method's record is damaged") from None
    check(record, Own, where)
    return record


def check_structure(cls: type[PEFTMethod], structure: Any, where: str) -> None:
    """Refuse what this class's `PEFTMethod.structure` cannot have given.

    Raises:
        ScionError: begins with ``where`` and says what is wrong.
    """
    fields = {} if cls.structure is PEFTMethod.structure else cls.structure_types
    if fields is not None:
        check_fields(structure, fields, where, f"{cls.__name__}.structure")


# ------------------------------------------------------------------------------------------------- helpers


def _copied(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory; the tensor itself where it has no values."""
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def home_of(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and type of what is grafted beside ``tensor``: small updates of half-precision weights need float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.device, torch.float32 if half else tensor.dtype


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, whose names are those without it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def training_batch(trainer: L.Trainer, indices: Iterable[int]) -> Any:
    """These samples of the training set as a training step gets them: one batch, in the Trainer's precision and on its
    device."""
    loader: Any = trainer.train_dataloader
    batch = loader.collate_fn([loader.dataset[i] for i in indices])
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def sample_name(trainer: L.Trainer, index: int, dataset: Any = None) -> str:
    """What a sample is called, in the training set unless another is given: its file, where the data know it."""
    name_of = getattr(trainer.datamodule, "name_of", None)  # type: ignore[attr-defined]
    if name_of is None:
        return f"sample {index}"
    loader: Any = trainer.train_dataloader
    return name_of(loader.dataset if dataset is None else dataset, index)


def _resumes_exactly(pl_module: Any) -> bool:
    return getattr(pl_module, "resumes_exactly", False)


def is_overridden(module: Any, hook: str) -> bool:
    """Whether a LightningModule defines ``hook`` itself."""
    import lightning.pytorch as L

    return getattr(type(module), hook, None) is not getattr(L.LightningModule, hook)


watch_loading()
