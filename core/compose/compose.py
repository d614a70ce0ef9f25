"""Compositions of methods. A list of methods is a stack; here is what a list cannot say.

``Route`` holds methods side by side, one at a time or each for its own rows of a batch::

    languages = Route([LoRA(name="en"), LoRA(name="sw")]).attach(model)
    with languages.route("sw"):                     # the whole batch
        model(x)
    with languages.route([0, 1, 1, 0]):             # each row its own
        model(x)

``Split`` gives each its own part of the sequence, and ``Fuse`` learns to mix what trained adapters do::

    Split([LanguageAdapter(name="en"), LanguageAdapter(name="sw")], by="token_type")
    Fuse(["runs/sentiment/adapter", "runs/entailment/adapter"])

Methods are given as objects, as ``{"class": "LoRA", ...}``, or, to start from trained ones, as folders: ``"folder"``,
or ``{"adapter": "folder", "name": "a name of its own"}``.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from core import graft as grafts
from core import peft
from core.adapters.reading import method_of, read_adapter, refusal, rehearse
from core.anatomy import Anatomy, Site
from core.config import component
from core.errors import ScionError, listed, nearest
from core.graft import Graft, route_rows
from core.json_types import check
from core.method import AddsLoss, OwnOptimizer, PEFTMethod, Plan, key_of, methods_on
from core.method.fingerprint import fingerprint
from core.record import plain
from core.tensors import check_fit, check_values

if TYPE_CHECKING:
    import lightning.pytorch as L

__all__ = ["Fuse", "Route", "Split"]

HIDDEN = ("attention", "mlp", "block", "norm1", "norm2")
"""Roles where a hidden state of a block enters and leaves."""


class Trained(NamedTuple):
    """What a folder holds of a trained method."""

    folder: str
    base: str
    """The fingerprint of its base."""
    tensors: dict[str, Tensor]
    """By their names in the method's module."""
    spec: dict[str, Any]


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
        self.config["methods"] = [method if isinstance(entry, PEFTMethod) or method.name not in self.trained else entry
                                  for entry, method in zip(methods, self.methods, strict=True)]
        self.identity_at_start = not self.trained and all(method.identity_at_start for method in self.methods)

    def _method(self, entry: Any) -> PEFTMethod:
        if isinstance(entry, PEFTMethod):
            return entry
        kind = type(self).__name__
        check(entry, str | dict[str, Any], kind, "methods")
        if isinstance(entry, str) or "adapter" in entry:
            return self._from_folder({"adapter": entry} if isinstance(entry, str) else entry)
        part = component(entry, kind)
        return peft.make(part["class_path"], part["init_args"])

    def _from_folder(self, entry: dict[str, Any]) -> PEFTMethod:
        kind, folder = type(self).__name__, str(entry["adapter"])
        if unknown := sorted(set(entry) - {"adapter", "name"}):
            raise ScionError(f"{kind}: {folder}: a trained method takes a name of its own, not {unknown[0]!r}")
        record, tensors = read_adapter(folder)
        names = [spec["name"] for spec in record["methods"]]
        if len(names) != 1:
            raise ScionError(f"{kind}: {folder} holds {len(names)} methods ({listed(names)}), one is wanted")
        spec = record["methods"][0]
        check(entry.get("name"), str | None, kind, "name")
        method = method_of(spec, name=entry.get("name") or spec["name"])
        stage = _stage(spec.get("structure", {}))
        if stage and stage != _stage(plain(method.structure())):
            raise ScionError(f"{kind}: {folder}: {spec['name']} was saved in a later stage than {spec['class']} "
                             "begins with, and cannot take part")
        prefix = f"peft.{key_of(spec['name'])}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.trained[method.name] = Trained(folder, record["base"]["fingerprint"], own, spec)
        return method

    # --------------------------------------------------------------------------------- attaching

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        plans = {method.name: method.plan_on(anatomy) for method in self.methods}
        self._check_bases(anatomy)
        return {"plans": plans}

    def _check_bases(self, anatomy: Anatomy) -> None:
        if not self.trained or any(p.is_meta for p in anatomy.root.parameters()):
            return
        home: Any = getattr(anatomy.root, "peft", None)
        here = fingerprint(anatomy.root, anatomy.head_names()) if home is None else home.fingerprint
        for trained in self.trained.values():
            if trained.base != here:
                raise ScionError(f"{self.name}: {trained.folder} belongs to another base (fingerprint {trained.base}, "
                                 f"here {here})")

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
                method.restructure(self.trained[method.name].spec.get("structure", {}))
                self._load(method.name, branch)
            if not method.is_trained:
                branch.requires_grad_(False)
            module.add_module(key_of(method.name), branch)
        self.arrange(module, anatomy)

    def _rehearse(self, name: str, anatomy: Anatomy) -> None:
        """Refuse a trained method that would be larger than its file (see `core.adapters.rehearsal`)."""
        trained = self.trained[name]
        spec: Any = {**trained.spec, "name": "rehearsed"}
        tensors = {f"peft.rehearsed.{key}": tensor for key, tensor in trained.tensors.items()}
        try:
            rehearse([spec], tensors, anatomy.root, trained.folder)
        except Exception as error:
            what = str(refusal(error)).removeprefix(f"{trained.folder}: ")
            raise ScionError(f"{self.name}: {trained.folder}: {what}") from error

    def _load(self, name: str, branch: nn.Module) -> None:
        folder, tensors = self.trained[name].folder, self.trained[name].tensors
        into = {key: tensor for key, tensor in branch.state_dict().items() if not key.endswith("_extra_state")}
        packed = {key: (graft, into.pop(key)) for path, graft in branch.named_modules() if isinstance(graft, Graft)
                  for key in (f"{path}.{part}" for part in graft.packed) if key not in tensors}
        parts = {key: graft.pack(tensor) for key, (graft, tensor) in packed.items()}
        into |= {f"{key}.{part}": tensor for key, found in parts.items() for part, tensor in found.items()}
        for key in sorted(into.keys() | tensors.keys()):
            one, two = (list(side[key].shape) if key in side else "absent" for side in (tensors, into))
            if one != two:
                raise ScionError(f"{self.name}: {folder}: {key} is {one} in the file, {two} here")
        limits = {f"{path}.{key}": limit for path, graft in branch.named_modules() if isinstance(graft, Graft)
                  for key, limit in graft.limits().items()}
        for key, tensor in into.items():
            check_fit(tensors[key], tensor, key, f"{self.name}: {folder}")
            check_values(tensors[key], tensor, key, f"{self.name}: {folder}", limits.get(key))
        with torch.no_grad():
            for key, tensor in into.items():
                tensor.copy_(tensors[key])
            for key, (graft, tensor) in packed.items():
                graft.unpack({part: tensors[f"{key}.{part}"] for part in parts[key]}, tensor)

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        """Say which of the grafts in the filled branches stand at sites, and how."""

    def branch(self, method: PEFTMethod) -> list[Graft]:
        """The grafts of one of its methods."""
        return method.standing(method.module)

    def structure(self) -> dict[str, Any]:
        found = {method.name: method.structure() for method in self.methods}
        own = {name: structure for name, structure in found.items() if structure}
        return {"methods": own} if own else {}

    def restructure(self, structure: dict[str, Any]) -> None:
        for method in self.methods:
            alone, method.root = method.root, self.root  # some look at the model that they stand on
            try:
                method.restructure(structure.get("methods", {}).get(method.name, {}))
            finally:
                method.root = alone

    def spec(self) -> dict[str, Any]:  # what is saved holds the tensors, wherever a folder is by then
        found = super().spec()
        return {**found, "config": {**found["config"], "methods": [
            {"class": spec["class"], **spec["config"], "name": spec["name"]}
            for spec in (method.spec() for method in self.methods)]}}

    # --------------------------------------------------------------------------------- in training

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for method in self.methods if stage == "fit" and self.is_trained else ():
            if method.is_trained and (method.is_scheduled or isinstance(method, OwnOptimizer) or method.stages):
                raise ScionError(f"{self.name}: {method.name} steers its own training, which has no place here: train "
                                 "it alone, and give its folder, or trainable: false")
        super().setup(trainer, pl_module, stage)

    @property
    def adds_loss(self) -> bool:
        return any(method.adds_loss for method in self.methods)

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        terms = [term for method in self.methods
                 if (term := method.loss_terms(module, batch, outputs)) is not None]
        return torch.stack(terms).sum() if terms else None


def _stage(structure: dict[str, Any]) -> dict[str, Any]:
    """What of a structure says how far a method has come, and not on which weights."""
    found = {key: _stage(value) if isinstance(value, dict) else value for key, value in structure.items()
             if key not in ("shapes", "basis", "stored", "ranks")}
    return {key: value for key, value in found.items() if value != {}}


class Route(SideBySide):
    """Several variants of the same backbone, of which one is in the forward, or each row of a batch has its own.

    Equation: f(x_i) = f_{r(i)}(x_i), for the route r of the batch
    Trains: the sum of its methods
    Merges: no, it has several weights
    Source: batch splitting as in AdapterHub's Parallel and in S-LoRA

    Args:
        methods: the variants, each with a name of its own; the first is active until ``route`` says otherwise.
    """

    inference_cost = "each variant computes its own rows"

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        for i, method in enumerate(self.methods):
            for graft in self.branch(method):
                graft.active = i == 0

    def standing(self, module: nn.Module) -> list[Graft]:
        children = dict(module.named_children())
        return [graft for method in self.methods if key_of(method.name) in children
                for graft in method.standing(children[key_of(method.name)])]

    @contextlib.contextmanager
    def route(self, variant: str | Tensor | Sequence[int]) -> Iterator[None]:
        """Within this context the named variant is in the forward, or row i of a batch sees variant ``variant[i]``.

        Raises:
            ScionError: no such variant.
        """
        root = self.need_root()
        names = [method.name for method in self.methods]
        states = [graft.active for graft in self.grafts]
        route = None
        if isinstance(variant, str):
            if variant not in names:
                raise ScionError(f"{self.name}: no variant is called {variant!r}{nearest(variant, names)}; there are "
                                 f"{names}")
        else:
            route = torch.as_tensor(variant, device=next(self.module.parameters()).device).long()
            if route.dim() != 1 or (route.numel() and not 0 <= int(route.min()) <= int(route.max()) < len(names)):
                raise ScionError(f"{self.name}: a route is one index a row, 0 to {len(names) - 1}")
            for other in methods_on(root):
                if any(graft.folds for graft in other.grafts):
                    raise ScionError(f"{self.name}: {other.name} lets several streams ride in the batch, whose rows "
                                     "are then no samples to route; route the whole batch by name")
        try:
            for i, method in enumerate(self.methods):
                branch = self.branch(method)
                for graft in branch:
                    graft.active = route is not None or method.name == variant
                route_rows(branch, route, i)
            self._refresh()
            yield
        finally:
            route_rows(self.grafts, None)
            for graft, state in zip(self.grafts, states, strict=True):
                graft.active = state
            self._refresh()

    def _refresh(self) -> None:
        for graft in self.grafts:
            grafts.refresh(graft)


# ------------------------------------------------------------------------------------------------- joined at a site


class Joined(Graft):
    """The grafts of several methods at one site, which stands there for all of them."""

    def __init__(self, site: Site, parts: Sequence[Graft]) -> None:
        super().__init__(site)
        self.parts = list(parts)  # in a list: their tensors belong to the methods' branches

    @property
    def verbs(self) -> tuple[str, ...]:
        return self.parts[0].verbs

    def before(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class JoinedMethods(SideBySide):
    """Methods whose grafts are joined site by site."""

    refusal: ClassVar[str] = ""
    """What is said of a graft that does not fit."""

    def build(self, site: Site) -> Graft:
        return self.join(site, self._parts[site.name])

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        """One graft for those that the methods have at ``site``."""
        raise NotImplementedError

    def fits(self, part: Graft) -> bool:
        """Whether this can join grafts of this kind at this site."""
        raise NotImplementedError

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        self._parts: dict[str, list[Graft]] = {}
        for method in self.methods:
            for part in self.branch(method):
                if part.tap is not None:
                    raise ScionError(f"{self.name}: what {method.name} does at {part.site.name} reads "
                                     f"{part.tap.site.name} too; only what reads its own site can be joined")
                if len(part.verbs) != 1 or part.verbs[0] not in ("before", "after") or not self.fits(part):
                    raise ScionError(f"{self.name}: what {method.name} does at {part.site.name} ({type(part).__name__})"
                                     f" {self.refusal}")
                self._parts.setdefault(part.site.name, []).append(part)
        for name, parts in self._parts.items():
            if len(parts) != len(self.methods) or len({part.verbs for part in parts}) > 1:
                raise ScionError(f"{self.name}: its methods must stand at the same sites in the same way, and do not "
                                 f"at {name}")
            module.add_module(key_of(name), self.make_graft(parts[0].site, anatomy))
        self._parts = {}

    def standing(self, module: nn.Module) -> list[Graft]:
        return [child for child in module.children() if isinstance(child, Graft)]


class FusionGraft(Joined):
    """h + V sum_n p_n a_n, p = softmax_n((Q z + b_Q) . (K a_n + b_K)), a_n the change that the n-th graft makes of h.

    Q, K and V are [dim, dim]; z is the site's own output: h itself, or behind a norm that h enters, the norm's output.
    """

    def __init__(self, site: Site, parts: Sequence[Graft], dropout: float) -> None:
        super().__init__(site, parts)
        dim = site.width
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=dropout > 0)
        self.value = nn.Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            self.value.weight.fill_(1e-6).fill_diagonal_(1.0)

    def before(self, x: Tensor) -> Tensor:
        wide = x.to(self.value.weight.dtype)
        changes = torch.stack([part(wide, verb="before") - wide for part in self.parts], -2)
        return x + self.mixed(self.again(x), changes).to(x.dtype)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        wide = y.to(self.value.weight.dtype)
        changes = torch.stack([part(x, wide, verb="after") - wide for part in self.parts], -2)
        return y + self.mixed(y, changes).to(y.dtype)

    def mixed(self, z: Tensor, changes: Tensor) -> Tensor:
        """z [..., dim] and changes [..., methods, dim] -> what is added [..., dim]."""
        query = self.query(z.to(self.value.weight.dtype))
        scores = (self.key(changes) @ query[..., None]).squeeze(-1)
        weights = torch.softmax(self.dropout(scores), -1)
        return self.value((weights[..., None, :] @ changes).squeeze(-2))

    def penalty(self) -> Tensor:
        """||V - I||_F^2"""
        return (self.value.weight - torch.eye(self.site.width, device=self.value.weight.device)).square().sum()


class Fuse(JoinedMethods):
    """AdapterFusion: trained adapters, frozen, and an attention in each block that chooses among them.

    Equation: h + V sum_n softmax_n((Q z + b_Q) . (K a_n + b_K)) a_n, a_n the change by adapter n, z what it reads;
        loss + penalty sum ||V - I||_F^2
    Trains: 3 dim^2 + 2 dim a site, whatever the adapters; BERT-base with Pfeiffer's: 21,252,096
    Merges: no, the mixture depends on the input
    Source: Pfeiffer et al. 2021, arXiv:2005.00247, section 3.2, and AdapterHub: Q and K start from a normal of 0.02, V
        as the identity with 1e-6 beside it, and the scores see the dropout before the softmax. Without dropout b_K
        would cancel in the softmax, so that it is left out

    Args:
        methods: at least two, that change hidden states of the blocks at the same sites; folders of trained ones as
            a rule, since those are not trained any more.
        dropout: probability of dropping a score, in [0, 1).
        penalty: factor of the squared distance of V from the identity.
    """

    inference_cost = "all adapters, and three maps of the whole width a site"
    recommended = {"lr": 5e-5, "weight_decay": 0.0}
    refusal = ("is no change of a block's hidden state that could be fused; bottleneck adapters are (LanguageAdapter "
               "with invertible=False)")

    def __init__(self, methods: Sequence[Any], dropout: float = 0.1, penalty: float = 0.01, **common: Any) -> None:
        super().__init__(methods, **common)
        if len(self.methods) < 2:
            raise ScionError(f"Fuse: one method ({self.methods[0].name}) leaves nothing to choose")
        if not 0 <= dropout < 1 or penalty < 0:
            raise ScionError(f"Fuse: dropout {dropout} must be in [0, 1), penalty {penalty} not negative")
        self.dropout, self.penalty = dropout, penalty

    def fits(self, part: Graft) -> bool:
        return part.site.role in HIDDEN

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        return FusionGraft(site, parts, self.dropout)

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        module.requires_grad_(False)
        super().arrange(module, anatomy)

    @property
    def adds_loss(self) -> bool:
        return self.penalty > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        terms = [graft.penalty() for graft in self.grafts if isinstance(graft, FusionGraft)]
        return self.penalty * torch.stack(terms).sum() if self.penalty and self.is_trained else None


class SplitGraft(Joined):
    """The first graft's output at positions below the sample's boundary, the second's from there on."""

    momentary = (*Graft.momentary, "start")
    start: int | Tensor | None = None
    """First position of the second graft: one for all samples, or [batch]."""

    def before(self, x: Tensor) -> Tensor:
        return self._split(*(part(x, verb="before") for part in self.parts))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self._split(*(part(x, y, verb="after") for part in self.parts))

    def _split(self, first: Tensor, second: Tensor) -> Tensor:
        start, name = self.start, self.site.name
        if start is None:
            raise ScionError("Split: nothing says where the sequence is split: give by=..., or run within at(...)")
        if first.dim() != 3:
            raise ScionError(f"Split: {name} has states of shape {list(first.shape)}, not [batch, positions, channels]")
        if isinstance(start, Tensor):
            start = start if self.batch is None else start[self.batch]
            times, rest = divmod(len(first), max(1, len(start)))
            if rest:
                raise ScionError(f"Split: {len(start)} samples are split, but {len(first)} rows arrive at {name}")
            start = start.repeat_interleave(times)[:, None, None]
        return torch.where(torch.arange(first.shape[1], device=first.device)[:, None] < start, first, second)


class Boundary(Graft):
    """Reads from the model's inputs where each sample's second part begins, and leaves them as they are."""

    def __init__(self, site: Site, by: str, separator: int | None, splits: Sequence[SplitGraft]) -> None:
        super().__init__(site)
        self.by, self.separator, self.splits = by, separator, list(splits)
        self.wanted, self.position = read_by(site, by)

    def notice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = args[self.position] if self.position < len(args) else kwargs.get(self.wanted)
        if ids is None:
            raise ScionError(f"Split: by={self.by!r} reads the model's {self.wanted}, which were not given")
        if self.by == "token_type":
            second = ids == 1
        else:  # what follows the first separator, or the first run of them
            separators = ids == self.separator
            second = (separators.cumsum(-1) > 0) & ~separators
        start = (second.cumsum(-1) == 0).sum(-1)
        for graft in self.splits:
            graft.start = start


def read_by(site: Site, by: str) -> tuple[str, int]:
    """Name and place of the model's argument that says where to split; "" where it has none."""
    names = list(inspect.signature(site.module.forward).parameters)
    wanted = "token_type_ids" if by == "token_type" else "input_ids"
    return (wanted, names.index(wanted)) if wanted in names else ("", 0)


class Split(JoinedMethods):
    """Two methods that share a sequence: the first for its beginning, the second for the rest (query and document).

    Equation: h_t is method 1's for positions t < s, and method 2's for t >= s, at each of their sites
    Trains: the sum of its methods
    Merges: no, positions have weights of their own
    Source: Litschko et al. 2022, COLING (modular rerankers), where s is the first token of type 1. It belongs to whole
        sequences: a decoder with a cache sees single positions

    Args:
        methods: two, each with a name of its own, that stand at the same sites.
        by: the position s; or ``token_type``, the first token of type 1; or ``separator``, what follows the first
            separator or run of separators; None leaves it to ``at``.
        separator: the separator's id.
    """

    inference_cost = "both methods compute all positions"
    refusal = "cannot be split by positions; what changes states in the blocks or at the embedding can"

    def __init__(self, methods: Sequence[Any], by: int | str | None = None, separator: int | None = None, **common: Any
                 ) -> None:
        super().__init__(methods, **common)
        if len(self.methods) != 2:
            raise ScionError(f"Split: two methods share a sequence, got {len(self.methods)}")
        if isinstance(by, bool) or not (by is None or by in ("token_type", "separator") or (
                isinstance(by, int) and by >= 0)):
            raise ScionError(f"Split: by {by!r} is no position, nor 'token_type' or 'separator'"
                             f"{nearest(str(by), ('token_type', 'separator'))}")
        if (by == "separator") != (separator is not None):
            raise ScionError(f"Split: by='separator' and separator=<its id> go together, got by={by!r} and "
                             f"separator={separator}")
        self.by, self.separator = by, separator

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if isinstance(self.by, str) and not read_by(anatomy.inputs, self.by)[0]:
            raise ScionError(f"{self.name}: no input of {anatomy.family} says where to split by {self.by!r}")

    def fits(self, part: Graft) -> bool:
        return part.site.block is not None or part.site.role == "embed"

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        graft = SplitGraft(site, parts)
        graft.start = self.by if isinstance(self.by, int) else None
        return graft

    def arrange(self, module: nn.Module, anatomy: Anatomy) -> None:
        super().arrange(module, anatomy)
        if isinstance(self.by, str):
            splits = [graft for graft in self.standing(module) if isinstance(graft, SplitGraft)]
            module.boundary = Boundary(anatomy.inputs, self.by, self.separator, splits)

    @contextlib.contextmanager
    def at(self, positions: int | Tensor | Sequence[int]) -> Iterator[None]:
        """Within this context sample i is split at ``positions[i]``, or all at one position."""
        self.need_root()
        start: int | Tensor = positions if isinstance(positions, int) else torch.as_tensor(
            positions, device=next(self.module.parameters()).device).long()
        if (isinstance(start, Tensor) and start.dim() != 1) or bool((torch.as_tensor(start) < 0).any()):
            raise ScionError(f"{self.name}: positions are one index a sample, from 0")
        splits = [graft for graft in self.grafts if isinstance(graft, SplitGraft)]
        readers = [graft for graft in self.grafts if isinstance(graft, Boundary)]
        states = [graft.start for graft in splits], [graft.active for graft in readers]
        try:
            for graft in splits:
                graft.start = start
            for graft in readers:
                graft.active = False
            yield
        finally:
            for graft, before in zip(splits, states[0], strict=True):
                graft.start = before
            for graft, active in zip(readers, states[1], strict=True):
                graft.active = active
