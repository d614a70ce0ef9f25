"""AdaLoRA: singular triplets that compete for a shrinking budget (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.errors import ScionError
from core.graft import AdditiveGraft, Graft
from core.method import AddsLoss, PEFTMethod, Scheduled
from core.method.low_rank import LowRankMethod
from core.optim import steps_of
from core.peft.weights._orthogonality import orthogonality


class AdaLoRAGraft(AdditiveGraft):
    """y + s B (E A) x, with A [rank, in], B [out, rank] and one singular value E for each of the ranks."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.empty(rank, site.in_features).normal_(std=0.02))
        self.B = nn.Parameter(torch.empty(site.out_features, rank).normal_(std=0.02))
        self.E = nn.Parameter(torch.zeros(rank, 1))
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    def delta(self, x: Tensor) -> Tensor:
        return self.site.low_rank(self.dropout(x.to(self.A.dtype)), self.E * self.A, self.B, self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.B @ (self.E * self.A)).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.B, self.E * self.A


class AdaLoRA(Scheduled, AddsLoss, LowRankMethod, PEFTMethod):
    """LoRA as singular triplets, of which those with the least importance are zeroed, over all sites together.

    Equation: y = W x + s B diag(E) A x, s = alpha / rank; loss + gamma mean (|A A^T - I| + |B^T B - I|).
        Importance of an entry: I = |w dL/dw|, I_ <- beta I_ + (1 - beta) I, U <- beta U + (1 - beta) |I - I_|,
        s = I_ U; of a triplet: s(E_i) + mean s(A_i) + mean s(B_i); the best b(t) triplets keep their E, the others'
        are set to zero; b falls as a cube from rank to target_rank a site
    Trains: rank (in + out) + rank a target; BERT-base, q and v, rank 12: 442,656
    Merges: W + s B diag(E) A
    Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3, algorithm 1. Learning rate as LoRA's here; gamma
        of the authors' scripts (0.5 in Hugging Face peft); warmup, cooldown and interval after their MNLI run. A
        checkpoint holds the two running scores of each number as well

    Args:
        rank: ranks of each target at the start.
        target_rank: mean ranks of a target at the end, at most ``rank``; None is two thirds of it (the paper's 12 and
            8).
        warmup: share of all steps (below 1), or their number, before anything is zeroed.
        cooldown: share of all steps, or their number, at the end with the final budget.
        interval: steps between two selections while the budget falls.
        beta: smoothing of importance and of its uncertainty, in [0, 1).
        gamma: weight of the orthogonality term.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt.
    """

    tags = ("reparameterised", ("linear", "optimizer"))
    settles_late = True

    def __init__(self, rank: int = 12, target_rank: int | None = None, warmup: float = 0.1, cooldown: float = 0.5,
                 interval: int = 10, beta: float = 0.85, gamma: float = 0.1, alpha: float | None = None,
                 dropout: float = 0.0, targets: Sequence[str] = ("q", "v"), **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, **common)
        self.target_rank = max(1, round(rank * 2 / 3)) if target_rank is None else target_rank
        if not 1 <= self.target_rank <= rank:
            raise ScionError(f"AdaLoRA: target_rank {target_rank} must lie between 1 and rank {rank}")
        if warmup < 0 or cooldown < 0 or interval < 1:
            raise ScionError(f"AdaLoRA: warmup {warmup} and cooldown {cooldown} must not be negative, interval "
                             f"{interval} at least 1")
        if not 0 <= beta < 1 or gamma < 0:
            raise ScionError(f"AdaLoRA: beta {beta} must lie in [0, 1), gamma {gamma} must not be negative")
        self.warmup, self.cooldown, self.interval = warmup, cooldown, interval
        self.beta, self.gamma = beta, gamma
        self.scores: dict[str, Tensor] = {}  # "<tensor>/mean" and "<tensor>/spread"

    def build(self, site: Site) -> Graft:
        return AdaLoRAGraft(site, self.rank, self.alpha / self.rank, self.dropout)

    @property
    def adds_loss(self) -> bool:
        return self.gamma > 0

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        if not self.gamma:
            return None
        factors = []
        for graft in self._grafts:
            factors += [graft.A, graft.B.t()]
        return self.gamma * orthogonality(factors).mean()

    @property
    def _grafts(self) -> list[AdaLoRAGraft]:
        return [graft for graft in self.grafts if isinstance(graft, AdaLoRAGraft)]

    def may_lack_gradient(self) -> set[str]:  # of triplets without a singular value
        return {name for name in self.trainable() if name.endswith((".A", ".B"))}

    def budget(self, step: int) -> tuple[int, bool]:
        """The triplets that may stay after ``step`` steps, over all sites, and whether they are selected now."""
        count = len(self.grafts)
        first, last = self.rank * count, self.target_rank * count
        start = steps_of(self.warmup, self.total)
        end = self.total - steps_of(self.cooldown, self.total)
        if step <= start:
            return first, False
        if step >= end:
            return last, True
        left = 1 - (step - start) / (end - start)
        return int(last + (first - last) * left**3), step % self.interval == 0

    @property
    def settled(self) -> bool:
        return self.steps >= self.total - steps_of(self.cooldown, self.total)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(tensor): name for name, tensor in self.module.named_parameters()}
        for name, tensor in self.module.named_parameters():
            gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            self._observe(name, (tensor * gradient).abs())
        keep, is_due = self.budget(self.steps)
        if not is_due or not self.scores:
            return
        # The triplets of all sites compete together, so one topk chooses among them.
        worth = torch.cat([self._worth(names[id(g.A)], names[id(g.B)], names[id(g.E)]) for g in self._grafts])
        is_dropped = torch.ones_like(worth, dtype=torch.bool)
        is_dropped[worth.topk(keep).indices] = False
        ranks = [len(graft.E) for graft in self._grafts]
        for graft, lost in zip(self._grafts, is_dropped.split(ranks), strict=True):
            graft.E[lost] = 0

    def _observe(self, name: str, importance: Tensor) -> None:
        """Take the importance I of a tensor's entries into its running mean I_ and uncertainty U."""
        zero = torch.zeros_like(importance)
        mean_before = self.scores.get(f"{name}/mean", zero).to(importance)
        spread_before = self.scores.get(f"{name}/spread", zero).to(importance)
        mean = mean_before.lerp(importance, 1 - self.beta)
        self.scores[f"{name}/mean"] = mean
        self.scores[f"{name}/spread"] = spread_before.lerp((importance - mean).abs(), 1 - self.beta)

    def _score(self, name: str) -> Tensor:
        """I_ U, entry by entry."""
        return self.scores[f"{name}/mean"] * self.scores[f"{name}/spread"]

    def _worth(self, a: str, b: str, e: str) -> Tensor:
        """Importance of a graft's triplets [rank], from the names of its A, B and E."""
        return self._score(e)[:, 0] + self._score(a).mean(1) + self._score(b).mean(0)

    def training_state(self) -> dict[str, Any]:
        found = {}
        for kind in ("mean", "spread"):
            values = [value.flatten() for name, value in self.scores.items() if name.endswith(f"/{kind}")]
            if values:
                found[kind] = torch.cat(values)
        return found

    def load_training_state(self, state: dict[str, Any]) -> None:
        tensors = dict(self.module.named_parameters())
        sizes = [tensor.numel() for tensor in tensors.values()]
        self.scores = {}
        for kind, values in state.items():
            for (name, tensor), part in zip(tensors.items(), values.split(sizes), strict=True):
                self.scores[f"{name}/{kind}"] = part.view_as(tensor).clone()
