"""GaLore: Adam in a low-rank space of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.method import OwnOptimizer
from core.method.options import at_least, positive
from core.optim import run_closure
from core.peft.selection.full import FullFineTuning


def _adam_step(optimizer: Optimizer) -> None:
    """AdamW's own step without the hooks that torch wraps around it, which the caller's step runs already."""
    inspect.unwrap(AdamW.step)(optimizer)


class GaLoreAdamW(AdamW):
    """AdamW, in whose groups with a ``rank`` a matrix G [m, n] is seen through R = G P^T, or P G where m < n.

    State of a matrix: two moments of R, and P [rank, min(m, n)], the leading singular vectors of G, found anew every
    ``interval`` steps; the moments stay.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved: torch would round the moments of R to the parameter's type."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = run_closure(closure)  # before groups are set aside: it clears the gradients of all of them
        everything, self.param_groups = self.param_groups, [g for g in self.param_groups if "rank" not in g]
        try:
            _adam_step(self)
        finally:
            self.param_groups = everything
        for group in everything:
            for parameter in group["params"] if "rank" in group else ():
                if parameter.grad is not None:
                    self._low_rank_step(parameter, group)
        return loss

    def _low_rank_step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        gradient = gradient.flatten(1).to(torch.promote_types(gradient.dtype, torch.float32))
        right = gradient.shape[0] >= gradient.shape[1]
        if not state:
            state["step"] = torch.zeros(())
        if int(state["step"]) % group["interval"] == 0:
            left_vectors, _, right_vectors = torch.linalg.svd(gradient, full_matrices=False)
            basis = right_vectors if right else left_vectors.t()
            state["basis"] = basis[: group["rank"]].contiguous()  # [rank, min(m, n)]
        basis = state["basis"].to(gradient)
        low = gradient @ basis.t() if right else basis @ gradient
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(low)
        state["step"] += 1
        first, second = group["betas"]
        mean, square, step = state["exp_avg"], state["exp_avg_sq"], int(state["step"])
        mean.lerp_(low, 1 - first)
        square.mul_(second).addcmul_(low, low, value=1 - second)
        low = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + group["eps"])
        update = group["scale"] * (low @ basis if right else basis.t() @ low)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_((group["lr"] * update).view_as(parameter).to(parameter.dtype))


class GaLore(OwnOptimizer, FullFineTuning):
    """Full training whose Adam moments are kept in a low-rank space of the gradient.

    Equation: G [m, n], m >= n: P = leading ``rank`` right singular vectors of G, every ``interval`` steps; R = G P^T;
        W <- W - lr scale Adam(R) P (m < n: P from the left)
    Trains: all, as FullFineTuning; ViT-B/16: 85,798,656. Optimizer state of a projected matrix: 2 rank max(m, n) +
        rank min(m, n), instead of 2 m n
    Merges: the weights are the base's own
    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2. Learning rate: full training's, over the scale. What is not
        projected (biases, norms, embeddings) has AdamW. FineTuner makes the optimizer; elsewhere
        ``method.make_optimizer(groups)`` does. eps is added to the root of the corrected second moment, as torch does;
        the authors' code adds it before the correction, which only shows where gradients are as small as eps

    Args:
        rank: rank of the projection, at least 1.
        scale: factor of the projected update, positive.
        interval: steps between two decompositions, at least 1.
        targets: roles whose weights are projected; None is every linear map of the blocks.
        exclude: roles that stay frozen.
    """

    tags = ("partial", ("optimizer",))
    recommended = {"lr": 2e-4, "weight_decay": 0.1, "head_lr": 1e-3}

    def __init__(self, rank: int = 128, scale: float = 0.25, interval: int = 200, targets: Sequence[str] | None = None,
                 exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(exclude, **common)
        at_least(1, "GaLore", rank=rank, interval=interval)
        positive("GaLore", scale=scale)
        self.rank, self.scale, self.interval, self.roles = rank, scale, interval, targets
        self.projected: list[str] = []

    def _projections(self, anatomy: Anatomy) -> list[Site]:
        """Where weights are projected, if they are trained."""
        return anatomy.sites(anatomy.linear_roles() if self.roles is None else self.roles, self.layers, self.name)

    def check(self, anatomy: Anatomy) -> None:
        for site in self._projections(anatomy):
            if site.kind == "module":
                raise ScionError(f"{self.name}: {site.name} ({type(site.module).__name__}) has no linear weight")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        trained = set(self.base_parameters(anatomy))
        names = [site.weight_name for site in self._projections(anatomy)]
        return {"projected": list(dict.fromkeys(name for name in names if name in trained))}

    def param_groups(self) -> list[dict[str, Any]]:
        trained = self.trainable()
        low = [trained[name] for name in self.projected if name in trained]
        held = {id(tensor) for tensor in low}
        rest = [{**group, "params": [p for p in group["params"] if id(p) not in held]}
                for group in super().param_groups()]
        options = {"rank": self.rank, "scale": self.scale, "interval": self.interval}
        return [group for group in ({"params": low, **options}, *rest) if group["params"]]

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> Optimizer:
        return GaLoreAdamW(groups, **options)

    def optimizer_bytes(self) -> int:
        found = 0
        for name, tensor in self.trainable().items():
            if name not in self.projected:
                found += 2 * tensor.numel() * tensor.element_size()
                continue
            shorter, longer = sorted((tensor.shape[0], tensor.numel() // tensor.shape[0]))
            rank = min(self.rank, shorter)
            found += max(4, tensor.element_size()) * rank * (2 * longer + shorter)  # two moments, and the projection
        return found
