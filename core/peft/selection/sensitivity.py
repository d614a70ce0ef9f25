"""SPT: the weights that the loss is most sensitive to, by entries or by matrices (He et al. 2023, arXiv:2303.08566)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy, Site, dissect, parameter_sites
from core.errors import ScionError
from core.graft import Graft
from core.graft.sparse import SparseGraft, check_budget
from core.json_types import Count, Shapes
from core.method import PEFTMethod, Prepared, check_shapes, membership, shapes_by_site
from core.method.training_checks import GradientWatch
from core.peft.weights.lora import LoRAGraft

Plan = dict[str, int]
"""Of each chosen site the number of entries that are trained, or 0 for a low-rank change of the whole."""


class SensitivityTuning(Prepared, PEFTMethod):
    """Spends a budget where the loss is most sensitive: on single entries, or on LoRA where a matrix has many of them.

    Equation: s(w) = sum over batches of (dL/dw)^2. The tau entries with the largest s are selected, k of them in a
        given matrix: W x + B A x where k >= c / ratio, c = rank (in + out); else W + scatter(values). A vector (a bias,
        a norm) is trained as a whole where more than 1 / vector_ratio of it is selected, else not. tau is the largest
        that keeps within the budget
    Trains: a chosen number at most
    Merges: W + B A, or W with its changed entries
    Source: He et al. 2023, arXiv:2303.08566, section 3, and the authors' code (SPT-LoRA; ratio 10, vector_ratio and
        learning rate from memory; budgets of 0.2 to 1 million in ViT-B/16). q, k and v are matrices of their own,
        fused or not. Embeddings stay frozen, the class token too, which the authors train besides. Until `prepare`
        has seen data, which core.FineTuner arranges, s is the weight squared

    Args:
        density: share of the model's parameters to train at most, in (0, 1]; 0.005 where nothing else is given.
        count: alternative: how many to train at most.
        rank: of the low-rank changes, whose scale is 1.
        ratio: a matrix is changed as a whole from this fraction of the numbers that LoRA would train there.
        vector_ratio: a vector is trained as a whole from this fraction of its entries; 0 leaves all vectors frozen.
        batches: how many batches s is summed over; 0 leaves s at the weights squared.
        batch_size: examples in each of them, whose mean loss is taken.
        targets: roles to choose from; None is every linear map of the blocks. The vectors are those of the blocks.
    """

    tags = ("partial", ("entries", "linear"))
    mergeable = True
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}
    structure_types = {"plan": dict[str, Count], "shapes": Shapes}

    budget: int
    """Numbers to train, on this model."""

    def __init__(self, density: float | None = None, count: int | None = None, rank: int = 8, ratio: float = 10.0,
                 vector_ratio: float = 5.0, batches: int = 8, batch_size: int = 32,
                 targets: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        check_budget("SensitivityTuning", density, count)
        if rank < 1 or batches < 0 or batch_size < 1 or (count is not None and count < 1):
            raise ScionError(f"SensitivityTuning: count {count}, rank {rank} and batch_size {batch_size} must be at "
                             f"least 1, batches {batches} not negative")
        if ratio < 1 or vector_ratio < 0:
            raise ScionError(f"SensitivityTuning: ratio {ratio} must be at least 1, vector_ratio {vector_ratio} not "
                             "negative")
        self.density, self.count = 0.005 if density is None and count is None else density, count
        self.rank, self.ratio, self.vector_ratio = rank, ratio, vector_ratio
        self.batches, self.batch_size = batches, batch_size
        self.targets = None if targets is None else tuple(targets)
        self.plan: Plan = {}
        self.selected: dict[str, Tensor] = {}  # flat positions of the entries, by site

    # --------------------------------------------------------------------------------- what there is

    def candidates(self, anatomy: Anatomy) -> dict[str, Site]:
        """The matrices and vectors to choose from, by name."""
        roles = list(self.targets or anatomy.linear_roles())
        if self.targets is None and "qkv" in roles:
            roles[roles.index("qkv"):roles.index("qkv") + 1] = ["q", "k", "v"]
        found = {site.name: site for site in anatomy.sites(roles, self.layers, self.name)}
        inside = tuple(f"{anatomy.blocks[i].path}." for i in sorted(anatomy.layer_indices(self.layers, self.name)))
        vectors = [name for name, parameter in anatomy.root.named_parameters() if self.vector_ratio
                   and parameter.dim() == 1 and name.startswith(inside) and not name.startswith("peft.")]
        return {**found, **{site.name: site for site in parameter_sites(anatomy.root, vectors)}}

    def check(self, anatomy: Anatomy) -> None:
        candidates = self.candidates(anatomy)
        for site in candidates.values():
            if site.kind == "module" and site.role != "parameter":
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) has no linear weight")
        budget, size = self._budget(anatomy), sum(_size(site) for site in candidates.values())
        if not 0 < budget <= size:
            raise ScionError(f"{self.name}: a budget of {budget} is not between 1 and the {size} entries of its "
                             "targets")

    def _budget(self, anatomy: Anatomy) -> int:
        """How many numbers may be trained."""
        return self.count or int((self.density or 0) * anatomy.size)

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        budget, candidates = self._budget(anatomy), self.candidates(anatomy)
        if any(site.full_weight.is_meta for site in candidates.values()):  # as large as it would be, spread evenly
            matrices = [site for site in candidates.values() if site.role != "parameter"]
            total = sum(_size(site) for site in matrices)
            shares = {site.name: min(_size(site), budget * _size(site) // total) for site in matrices}
            selected = {name: torch.zeros(share) for name, share in shares.items() if share}
            plan = {name: len(index) for name, index in selected.items()}
            return {"budget": budget, "plan": plan, "selected": selected}
        looking = copy.copy(self)
        looking.budget = budget
        looking.choose(candidates, lambda site: site.matrix(site.full_weight.detach()).square())
        return {"budget": budget, "plan": looking.plan, "selected": looking.selected}

    def cost(self, site: Site, selected: int) -> int:
        """Numbers to train at a site where so many entries are selected."""
        if site.role == "parameter":
            return _size(site) if selected * self.vector_ratio > _size(site) else 0
        whole = self.rank * (site.in_features + site.out_features)
        return whole if selected * self.ratio >= whole else selected

    @torch.no_grad()
    def choose(self, candidates: dict[str, Site], sensitivity: Callable[[Site], Tensor]) -> None:
        """Plan for these sensitivities: the most entries, over all candidates together, that the budget allows."""
        scores = {name: sensitivity(site).float().flatten() for name, site in candidates.items()}
        # Floats that are not negative are ordered as their bits are: halving those finds the threshold exactly.
        low, high = -1, int(torch.tensor(torch.inf).view(torch.int32))
        while high - low > 1:
            middle = (low + high) // 2
            edge = torch.tensor(middle, dtype=torch.int32).view(torch.float32)
            spent = sum(self.cost(candidates[name], int((score > edge).sum())) for name, score in scores.items())
            low, high = (low, middle) if spent <= self.budget else (middle, high)
        edge = torch.tensor(high, dtype=torch.int32).view(torch.float32)
        self.plan, self.selected = {}, {}
        for name, score in scores.items():
            index = (score > edge).nonzero().flatten()
            cost = self.cost(candidates[name], len(index))
            if cost and candidates[name].role == "parameter":
                index = torch.arange(len(score))
            if cost:
                self.plan[name] = cost if cost == len(index) else 0
                self.selected[name] = index
        if not self.plan:
            raise ScionError(f"{self.name}: a budget of {self.budget} is too small, or no gradient came: nothing is "
                             "selected")

    # --------------------------------------------------------------------------------- what stands where

    def sites(self, anatomy: Anatomy) -> list[Site]:
        candidates = self.candidates(anatomy)
        planned = [candidates[name] for name in self.plan if name in candidates]
        return planned or list(candidates.values())

    def build(self, site: Site) -> Graft:
        if self.plan[site.name]:
            return SparseGraft(site, self.selected[site.name])
        return LoRAGraft(site, self.rank, 1.0, 0.0)

    def _rebuild(self) -> None:
        """Put what the present plan says in the place of all that stands."""
        for graft in self.grafts:
            self.drop_graft(graft)
        anatomy = dissect(self.need_root())
        for site in self.sites(anatomy):
            self.add_graft(self.make_graft(site, anatomy))

    def param_groups(self) -> list[dict[str, Any]]:  # one, for `prepare` may find matrices alone or vectors alone
        return [{"params": tensors}] if (tensors := list(self.trainable().values())) else []

    # --------------------------------------------------------------------------------- sensitivity

    @property
    def prepares(self) -> bool:
        return self.batches > 0

    def prepare(self, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> None:
        """Select by the gradients of ``loss`` without the method, and begin anew there: ``batches`` are taken together,
        ``batch_size`` at a time, and should hold one example each. What was trained before is gone."""
        root = self.need_root()
        candidates = self.candidates(dissect(root))
        weights = list({id(site.full_weight): site.full_weight for site in candidates.values()}.values())
        squares = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
        flags, training = [weight.requires_grad for weight in weights], root.training
        examples = iter(batches)
        try:
            root.eval()
            for weight in weights:
                weight.requires_grad_(True)
            with self.disabled(), torch.enable_grad():
                for _ in range(self.batches):
                    sums = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in weights}
                    number = 0
                    for example in itertools.islice(examples, self.batch_size):
                        number += 1
                        for weight, gradient in zip(weights, torch.autograd.grad(
                                loss(example), weights, allow_unused=True), strict=True):
                            if gradient is not None:
                                sums[id(weight)] += gradient
                    for key, value in sums.items():
                        squares[key] += (value / max(number, 1)) ** 2
        finally:
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag)
            root.train(training)
        self.choose(candidates, lambda site: site.matrix(squares[id(site.full_weight)]))
        self._rebuild()
        self.prepared = True

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        options = getattr(trainer.strategy, "_ddp_kwargs", {})
        will = self.prepares and not self.prepared and hasattr(pl_module, "methods")
        if will and trainer.world_size > 1 and not options.get("find_unused_parameters"):
            raise ScionError(f"{self.name} chooses its tensors when training begins: use --trainer.strategy "
                             "ddp_find_unused_parameters_true, or call prepare before")
        super().on_fit_start(trainer, pl_module)

    def prepare_in(self, trainer: Any, pl_module: Any) -> None:
        before: list[Tensor] = list(self.trainable().values())
        super().prepare_in(trainer, pl_module)
        fresh: list[Any] = list(self.trainable().values())
        if self.prepared and fresh and fresh[0] is not before[0]:
            for optimizer in trainer.optimizers:
                membership.enter(self, optimizer, fresh, beside=before)
                membership.leave(self, optimizer, before)
            self.gradient_watch = GradientWatch(self)

    # --------------------------------------------------------------------------------- files

    def structure(self) -> dict[str, Any]:
        return {"plan": self.plan, "shapes": shapes_by_site(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        plan = structure.get("plan", self.plan)
        if plan != self.plan:
            unknown = [name for name in plan if name not in self.candidates(dissect(self.need_root()))]
            if unknown:
                raise ScionError(f"{self.name}: {unknown[0]} does not exist here")
            self.plan, self.selected = plan, {name: torch.zeros(count) for name, count in plan.items() if count}
            self._rebuild()
        check_shapes(self, structure.get("shapes", {}))


def _size(site: Site) -> int:
    return site.in_features * site.out_features if site.role != "parameter" else site.full_weight.numel()
