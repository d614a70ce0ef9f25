"""SpIEL: sparse changes whose positions drop and grow in training (Ansell et al. 2024, arXiv:2401.16405)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.graft.sparse import SparseGraft, state_of, state_vectors
from core.method import OwnOptimizer, PEFTMethod, Scheduled
from core.method.options import at_least
from core.optim import run_closure

Kind = Literal["AG", "MA"]


class SpIELAdam(Optimizer):
    """Adam in which each number has an age of its own, since it came into the selection; decay after the step."""

    def __init__(self, groups: Any, **options: Any) -> None:
        super().__init__(groups, {"lr": 1e-4, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-6, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = run_closure(closure)
        for group in self.param_groups:
            first, second = group["betas"]
            for delta in (delta for delta in group["params"] if delta.grad is not None):
                state, gradient = self.state[delta], delta.grad
                if not state:
                    state |= {"age": torch.ones_like(delta), "exp_avg": torch.zeros_like(delta),
                              "exp_avg_sq": torch.zeros_like(delta)}
                age, mean, square = state["age"], state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(gradient, 1 - first)
                square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
                correction = (1 - first**age) / (1 - second**age).sqrt()
                delta.sub_(group["lr"] * mean / ((square.sqrt() + group["eps"]) * correction))
                delta.mul_(1 - group["lr"] * group["weight_decay"])
                age += 1
        return loss


class SpIELSM3(Optimizer):
    """SM3: one accumulator for each row and one for each column; a number's is the smaller of its two. With
    ``momentum`` a running mean of the steps is taken."""

    def __init__(self, groups: Any, grafts: Sequence[SparseGraft], **options: Any) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.0, **options})
        self.grafts = {graft.values: graft for graft in grafts}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = run_closure(closure)
        for group in self.param_groups:
            for delta in (delta for delta in group["params"] if delta.grad is not None):
                state, gradient, graft = self.state[delta], delta.grad, self.grafts[delta]
                width = graft.site.in_features
                if not state:
                    state |= {"rows": delta.new_zeros(graft.site.out_features), "columns": delta.new_zeros(width)}
                row, column = graft.index.long() // width, graft.index.long() % width
                found = torch.minimum(state["rows"][row], state["columns"][column]) + gradient**2
                state["rows"].scatter_reduce_(0, row, found, "amax")
                state["columns"].scatter_reduce_(0, column, found, "amax")
                step = gradient / (found + 1e-8).sqrt()
                if group["momentum"]:
                    mean = state.setdefault("mean", torch.zeros_like(delta))
                    step = mean.lerp_(step, 1 - group["momentum"])
                delta.sub_(group["lr"] * step)
                delta.mul_(1 - group["lr"] * group["weight_decay"])
        return loss


class SpIEL(Scheduled, OwnOptimizer, PEFTMethod):
    """Changes of a few entries of each weight: the small ones are dropped, others grow where gradients are large.

    Equation: y = (W + scatter(I, delta)) x + b. ``window`` steps after every ``interval``-th, the share
        p = share (1 - t / T) of the entries (all of them, the first time) with the smallest |delta| is dropped, and as
        many grow at 0: AG takes the largest |sum of G| over the window among the k largest |G| of its first backward,
        G the gradient of the whole weight; MA the largest product of SM3's row and column accumulators
    Trains: int(N |W_m| / sum |W|) of each target, N = ``density`` of all the model's parameters, ``count``, or
        ``rank`` sum (in + out); ViT-B/16, rank 8: 1,179,648
    Merges: W + scatter(I, delta)
    Source: Ansell et al. 2024, arXiv:2401.16405, and the authors' optimizers, which FineTuner makes (elsewhere
        ``method.make_optimizer(groups)``). The largest learning rates that they search; they add a weight decay of 1 to
        30. At most one whole gradient is alive at a time, and the changed weight is not kept. A checkpoint in a window
        holds its sums as well

    Args:
        density: share of the model's parameters to train, in (0, 1]; 0.01 where nothing else is given.
        count: alternative: how many to train.
        rank: alternative: as many as LoRA of this rank.
        kind: ``AG`` (accumulated gradients, Adam) or ``MA`` (SM3, whose state grows with rows and columns alone).
        interval: steps between two selections.
        window: steps over which gradients are summed, below ``interval``.
        share: of the entries to replace, at the start of its decay, in (0, 1].
        decay: of the share over the run, ``linear`` or ``cosine``.
        targets: roles to adapt; None is every linear map of the blocks.
        momentum: of SM3's steps, in [0, 1); it costs one number for each entry.
    """

    tags = ("partial", ("entries", "optimizer"))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}

    counts_of: dict[str, int]
    """Entries of each tensor, on this model."""

    def __init__(self, density: float | None = None, count: int | None = None, rank: int | None = None,
                 kind: Kind = "AG", interval: int = 20, window: int = 5, share: float = 0.2,
                 decay: Literal["linear", "cosine"] = "linear", targets: Sequence[str] | None = None,
                 momentum: float = 0.0, **common: Any) -> None:
        super().__init__(**common)
        if sum(given is not None for given in (density, count, rank)) > 1:
            raise ScionError(f"SpIEL: give one of density ({density}), count ({count}) and rank ({rank})")
        if density is not None and not 0 < density <= 1:
            raise ScionError(f"SpIEL: density {density} must lie in (0, 1]")
        at_least(1, "SpIEL", count=count, rank=rank)
        if not 1 <= window < interval:
            raise ScionError(f"SpIEL: window {window} must be at least 1 and below interval {interval}")
        if not 0 < share <= 1:
            raise ScionError(f"SpIEL: share {share} must lie in (0, 1]")
        if kind not in ("AG", "MA") or decay not in ("linear", "cosine"):
            raise ScionError(f"SpIEL: kind {kind!r} must be 'AG' or 'MA', decay {decay!r} 'linear' or 'cosine'")
        self.density = 0.01 if density is None and count is None and rank is None else density
        self.count, self.rank, self.kind, self.share, self.decay = count, rank, kind, share, decay
        if not 0 <= momentum < 1 or (momentum and kind == "AG"):
            raise ScionError(f"SpIEL: momentum {momentum} must lie in [0, 1), and is for kind 'MA'")
        self.interval, self.window, self.momentum = interval, window, momentum
        self.targets = None if targets is None else tuple(targets)
        if kind == "MA" and self.config.get("lr") is None:
            self.suggested["lr"] = 1e-3
        self.sums: dict[str, dict[str, Tensor]] = {}  # of an open window, by site: positions, sum of G, sum of G^2, n

    # --------------------------------------------------------------------------------- where

    def check(self, anatomy: Anatomy) -> None:
        self._counts(anatomy)

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"counts_of": self._counts(anatomy)}

    def _counts(self, anatomy: Anatomy) -> dict[str, int]:
        """How many entries each site has."""
        sites = self.sites(anatomy)
        sizes = {site.name: site.in_features * site.out_features for site in sites}
        budget = self.count or int((self.density or 0) * anatomy.size) or (self.rank or 0) * sum(
            site.in_features + site.out_features for site in sites)
        if budget > sum(sizes.values()):
            raise ScionError(f"{self.name}: {budget} entries are more than the {sum(sizes.values())} of the targets")
        counts = {name: budget * size // sum(sizes.values()) for name, size in sizes.items()}
        empty = [name for name, count in counts.items() if not count]
        if empty:
            raise ScionError(f"{self.name}: of {budget} entries none falls to {empty[0]}; give a larger density, count "
                             "or rank, or fewer targets")
        return counts

    def build(self, site: Site) -> Graft:
        count, size = self.counts_of[site.name], site.in_features * site.out_features
        if site.full_weight.is_meta:
            return SparseGraft(site, torch.zeros(count, dtype=torch.int64, device="meta"))
        return SparseGraft(site, torch.randperm(size)[:count].sort().values)

    @property
    def _grafts(self) -> list[SparseGraft]:
        return [graft for graft in self.grafts if isinstance(graft, SparseGraft)]

    # --------------------------------------------------------------------------------- optimizer

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.trainable().values()]}] if self.trainable() else []

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        if self.kind == "AG":
            return SpIELAdam(groups, **options)
        return SpIELSM3(groups, self._grafts, momentum=self.momentum, **options)

    def optimizer_bytes(self) -> int:
        found = 0
        for graft in self._grafts if self.trainable() else ():
            lines = graft.site.out_features + graft.site.in_features
            # Adam's moments and ages; or accumulators, and a mean with momentum.
            times = 3 if self.kind == "AG" else int(self.momentum > 0)
            kept = times * graft.values.numel() + (lines if self.kind == "MA" else 0)
            found += kept * graft.values.element_size()
        return found

    # --------------------------------------------------------------------------------- drop and grow

    def follow(self, optimizer: Optimizer, total: int, around: torch.nn.Module | None = None) -> Any:
        self._watch(self.steps == 0)
        return super().follow(optimizer, total, around)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._watch(False)  # of a run that an error ended
        super().on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._watch(False)

    def _watch(self, on: bool) -> None:
        """Open a window, or close it and forget its sums."""
        self.sums = {}
        for graft in self._grafts:
            graft.watch = self._observe if on and self.kind == "AG" and self.is_trained else None

    @torch.no_grad()
    def _observe(self, graft: SparseGraft, gradient: Tensor) -> None:
        gradient = gradient.to(graft.values.dtype)
        if graft.site.name not in self.sums:
            gradient = _mean(gradient)
            index = gradient.abs().topk(len(graft.index)).indices
            zeros = torch.zeros_like(graft.values)
            self.sums[graft.site.name] = {"index": index.to(graft.index.dtype), "sum": zeros, "square": zeros.clone(),
                                          "samples": torch.zeros(())}
            mine = gradient[index]
        else:
            mine = _mean(gradient[self.sums[graft.site.name]["index"]])
        sums = self.sums[graft.site.name]
        sums["sum"] += mine
        sums["square"] += mine**2
        sums["samples"] += 1

    def replaced(self, step: int) -> float:
        """The share of entries that the selection after ``step`` steps replaces."""
        done = step / self.total
        if self.decay == "cosine":
            return self.share * (1 + math.cos(math.pi * done)) / 2
        return 1.0 if step == self.window else self.share * (1 - done)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        if self.steps % self.interval == self.window:
            for graft in self._grafts:
                small = graft.values.abs().topk(int(len(graft.values) * self.replaced(self.steps)), largest=False)
                select = self._by_gradient if self.kind == "AG" else self._by_accumulators
                select(graft, small.indices, optimizer)
            self._watch(False)
        if (self.steps + 1) % self.interval == 0:
            self._watch(True)

    def _by_gradient(self, graft: SparseGraft, dropped: Tensor, optimizer: Optimizer) -> None:
        """Grow where the sum of gradients is largest, and seed the moments with what the window has seen."""
        sums = self.sums.get(graft.site.name)
        if sums is None:  # no gradient came in the whole window
            return
        stays = torch.ones_like(graft.index, dtype=torch.bool)
        stays[dropped] = False
        free = ~torch.isin(sums["index"], graft.index[stays])
        best = sums["sum"].abs().masked_fill(~free, -1).topk(min(len(dropped), int(free.sum()))).indices
        grown = sums["index"][best]
        # What is dropped and grown at once stays as it is; of the others the smallest go first.
        dropped = dropped[~torch.isin(graft.index[dropped], grown)]
        best = best[~torch.isin(grown, graft.index)]
        dropped = dropped[:len(best)]
        samples = float(sums["samples"])
        age = self.window + (self.steps != self.window)  # a later window opens one step before its interval ends
        first, second = _betas(optimizer, graft.values)
        seeds = {"age": age, "exp_avg": sums["sum"][best] / samples * (1 - first**age),
                 "exp_avg_sq": sums["square"][best] / samples * (1 - second**age)}
        self._replace(graft, dropped, sums["index"][best], optimizer, seeds)

    def _by_accumulators(self, graft: SparseGraft, dropped: Tensor, optimizer: Optimizer) -> None:
        """Grow where SM3's estimate of the squared gradient is largest, at no active and no just dropped position."""
        state = state_of(optimizer, graft.values)
        if "rows" not in state:
            raise ScionError(f"{self.name}: kind 'MA' grows by SM3's accumulators: take method.make_optimizer(groups)")
        worth = torch.outer(state["rows"], state["columns"]).flatten()
        worth[graft.index.long()] = -1
        dropped = dropped[:len(worth) - len(graft.index)]
        self._replace(graft, dropped, worth.topk(len(dropped)).indices, optimizer, {})

    def _replace(self, graft: SparseGraft, places: Tensor, grown: Tensor, optimizer: Optimizer,
                 seeds: dict[str, Any]) -> None:
        graft.index[places] = grown.to(graft.index.dtype)
        graft.values[places] = 0
        for name, vector in state_vectors(optimizer, graft.values).items():
            if name not in ("rows", "columns"):
                vector[places] = seeds.get(name, 0)

    # --------------------------------------------------------------------------------- resuming

    def training_state(self) -> dict[str, Any]:
        return {"sums": self.sums, "open": any(graft.watch is not None for graft in self._grafts)}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._watch(state["open"])
        devices = {graft.site.name: graft.values.device for graft in self._grafts}
        self.sums = {name: {key: value.to(devices[name]) for key, value in sums.items()}
                     for name, sums in state["sums"].items()}


def _mean(gradient: Tensor) -> Tensor:
    """The mean over all processes: gradients are summed here before `DistributedDataParallel` averages them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return gradient
    total = gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _betas(optimizer: Optimizer, parameter: Tensor) -> tuple[float, float]:
    for group in optimizer.param_groups:
        if any(one is parameter for one in group["params"]):
            return group.get("betas", (0.9, 0.999))
    return 0.9, 0.999
