"""APET: arbitrary few parameters, drawn at random, one by one or by tensors (Su et al. 2023, arXiv:2306.02320)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.graft.sparse import SparseGraft, check_budget
from core.json_types import Shapes
from core.method import PEFTMethod, check_shapes, shapes_by_site
from core.method.options import at_least
from core.peft.activations.houlsby import BottleneckGraft
from core.peft.selection.full import all_parameters
from core.peft.weights.lora import LoRAGraft
from core.random_state import seed_of


def distinct(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` distinct numbers below ``total``, ascending, every set of them equally likely."""
    if 3 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.zeros(0, dtype=torch.int64)
    while len(found) < count:  # never more than are missing, so that none has to be dropped again
        found = torch.cat([found, torch.randint(total, (count - len(found),), generator=generator)]).unique()
    return found


def _drawn(sites: Sequence[Site], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """``count`` positions drawn from all sites together, by site; those of none are left out."""
    sizes = [site.in_features * site.out_features for site in sites]
    with torch.device("cpu"):  # positions have values wherever the model is
        drawn = distinct(sum(sizes), count, generator)
        ends = torch.tensor(sizes).cumsum(0)
        parts = drawn.tensor_split(torch.searchsorted(drawn, ends[:-1]))
    return {site.name: part - (end - size) for site, part, end, size in zip(
        sites, parts, ends.tolist(), sizes, strict=True) if len(part)}


class APET(PEFTMethod):
    """Trains exactly N entries of the blocks' weights, wherever they happen to lie.

    Equation: W' = W + scatter(I, v), v = 0 at the start; I over all targets together: N entries drawn uniformly without
        repetition
    Trains: N numbers, and stores their positions; ViT-B/16 at 0.3 %: 257,395
    Merges: W with its changed entries
    Source: Su et al. 2023, arXiv:2306.02320, whose trained set is an arbitrary one of a given size; the authors'
        release draws whole tensors and modules instead, so that it meets sizes only about. Learning rate of its raw
        budgets

    Args:
        density: share of the model's parameters to train, in (0, 1]; 0.003 where nothing else is given.
        count: alternative: how many to train.
        targets: roles to draw from; None is every linear map of the blocks.
        rearranged: whether the entries of each role are drawn once more, as many as the role has got, from all its
            matrices together: other places at the same numbers, to see whether places matter.
    """

    tags = ("partial", ("entries",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"shapes": Shapes}

    def __init__(self, density: float | None = None, count: int | None = None, targets: Sequence[str] | None = None,
                 rearranged: bool = False, **common: Any) -> None:
        super().__init__(**common)
        check_budget(type(self).__name__, density, count)
        self.density, self.count = 0.003 if density is None and count is None else density, count
        self.targets = None if targets is None else tuple(targets)
        self.rearranged = rearranged
        self.positions: dict[str, Tensor] = {}

    def budget(self, anatomy: Anatomy) -> int:
        """How many numbers are to be trained."""
        return self.count or int((self.density or 0) * anatomy.size)

    def check(self, anatomy: Anatomy) -> None:
        total = sum(site.in_features * site.out_features for site in super().sites(anatomy))
        count = self.budget(anatomy)
        if not 0 < count <= total:
            raise ScionError(f"{self.name}: {count} entries are not between 1 and the {total} of the targets")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        sites = super().sites(anatomy)
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, "positions"))
        positions = _drawn(sites, self.budget(anatomy), generator)
        if self.rearranged:
            counts = {site.name: len(positions.get(site.name, ())) for site in sites}
            positions = {}
            for role in dict.fromkeys(site.role for site in sites):
                alike = [site for site in sites if site.role == role]
                positions |= _drawn(alike, sum(counts[site.name] for site in alike), generator)
        return {"positions": positions}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = super().sites(anatomy)
        return [site for site in found if site.name in self.positions] if self.positions else found

    def build(self, site: Site) -> Graft:
        return SparseGraft(site, self.positions[site.name])

    def structure(self) -> dict[str, Any]:
        return {"shapes": shapes_by_site(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        check_shapes(self, structure.get("shapes", {}))


def draw(units: Sequence[tuple[str, Sequence[int]]], tensors: Sequence[tuple[str, int]], budget: int,
         seed: int) -> tuple[list[str], list[str]]:
    """The names of the added units (each with its tensors' sizes) and of the base's tensors (with their size) that are
    trained. Half of the budget is for either; a unit is taken if its first tensor fits into what is left, and is paid
    for as a whole."""
    chance = random.Random(budget * seed)
    units, tensors = list(units), list(tensors)
    chance.shuffle(units)
    chance.shuffle(tensors)
    added, moved = [], []
    left = budget // 2
    for name, sizes in units:
        if sizes[0] <= left:
            added.append(name)
            left -= sum(sizes)
    left = budget // 2
    for name, size in tensors:
        if size <= left:
            moved.append(name)
            left -= size
    return added, moved


class TensorAPET(PEFTMethod):
    """Trains whole tensors that are drawn at random: the backbone's own, and modules added at random places.

    Equation: theta_S <- theta_S - lr g(theta_S) with S drawn from the backbone's tensors, and LoRA, y + (16 / r) B A x,
        or a bottleneck, h + U gelu(D h + b_D) + b_U, at places drawn from the targets
    Trains: about N numbers: at most N / 2 of the backbone's, and modules of N / 2, of which the last may exceed it by
        less than its size; ViT-B/16 at 0.3 %: 259,632
    Merges: no, the bottlenecks are not linear
    Source: Su et al. 2023, arXiv:2306.02320, as released: LoRA of rank 8, bottlenecks of 24, a draw seeded by N times
        the seed. Its bottlenecks begin near the identity, ours (U = 0) with it; learning rate of its raw budgets

    Args:
        density: share of the model's parameters to train, in (0, 1]; 0.003 where nothing else is given.
        count: alternative: how many to train.
        targets: linear maps that may get LoRA, and sublayers that may get a bottleneck.
        rank: of LoRA, at least 1.
        bottleneck: width of the bottleneck, at least 1.
        exclude: roles whose own tensors stay frozen (``("norm",)``).
    """

    tags = ("unified", ("entries", "block", "linear"))
    moves_base = True
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}
    structure_types = {"shapes": Shapes}
    inference_cost = "LoRA and bottlenecks at the places drawn"

    def __init__(self, density: float | None = None, count: int | None = None,
                 targets: Sequence[str] = ("q", "v", "attention", "mlp"), rank: int = 8, bottleneck: int = 24,
                 exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        check_budget("TensorAPET", density, count)
        self.density, self.count = 0.003 if density is None and count is None else density, count
        self.targets = tuple(targets)
        at_least(1, "TensorAPET", rank=rank, bottleneck=bottleneck)
        self.rank, self.bottleneck, self.exclude = rank, bottleneck, tuple(exclude)
        self.added: list[str] = []
        self.drawn: list[str] = []

    def budget(self, anatomy: Anatomy) -> int:
        """How many numbers are to be trained, about."""
        return self.count or int((self.density or 0) * anatomy.size)

    def sizes(self, site: Site) -> tuple[int, ...]:
        """Numbers in the tensors of the module that may be added at ``site``."""
        if site.kind == "module":
            return self.bottleneck * site.width, self.bottleneck, site.width * self.bottleneck, site.width
        return self.rank * site.in_features, site.out_features * self.rank

    def check(self, anatomy: Anatomy) -> None:
        places = super().sites(anatomy)
        for site in places:
            if site.kind == "module" and site.role not in ("attention", "mlp", "block"):
                raise ScionError(f"{self.name}: {site.name} is neither a linear map nor a hidden state of a block")
        if not any(self._draw(anatomy)):
            raise ScionError(f"{self.name}: no tensor fits into half of a budget of {self.budget(anatomy)}")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        added, drawn = self._draw(anatomy)
        return {"added": added, "drawn": drawn}

    def _draw(self, anatomy: Anatomy) -> tuple[list[str], list[str]]:
        """Sites that get a module, and names of the backbone's tensors that are trained."""
        parameters = dict(anatomy.root.named_parameters())
        names = all_parameters(anatomy, self.layers, self.exclude, self.name)
        units = [(site.name, self.sizes(site)) for site in super().sites(anatomy)]
        tensors = [(name, parameters[name].numel()) for name in names]
        return draw(units, tensors, self.budget(anatomy), self.seed)

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        return self.drawn

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return [site for site in super().sites(anatomy) if site.name in self.added]

    def build(self, site: Site) -> Graft:
        if site.kind == "module":
            return BottleneckGraft(site, self.bottleneck, "zero_up")
        return LoRAGraft(site, self.rank, 16 / self.rank, 0.0)

    def structure(self) -> dict[str, Any]:
        return {"shapes": self._all_shapes()}

    def restructure(self, structure: dict[str, Any]) -> None:
        check_shapes(self, structure.get("shapes", {}), self._all_shapes())

    def _all_shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in self.need_root().named_parameters()
                if tensor.dim() > 1 and not name.startswith("peft.")}  # what was drawn depends on them all
