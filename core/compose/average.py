"""Several methods whose changes are averaged, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from core.anatomy import Site
from core.compose.joined import Joined, JoinedMethods
from core.errors import ScionError
from core.graft import Graft


class AverageGraft(Joined):
    """h + sum_n w_n a_n, a_n the change that the n-th graft makes of h."""

    def __init__(self, site: Site, parts: Sequence[Graft], shares: Sequence[float]) -> None:
        super().__init__(site, parts)
        self.shares = list(shares)

    def before(self, x: Tensor) -> Tensor:
        return self._averaged(x, [part(x, verb="before") for part in self.parts])

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self._averaged(y, [part(x, y, verb="after") for part in self.parts])

    def _averaged(self, h: Tensor, changed: list[Tensor]) -> Tensor:
        mixture = h
        for share, own in zip(self.shares, changed, strict=True):
            mixture = mixture + share * (own - h)  # so that what changes nothing leaves h as it is, to the bit
        return mixture


class Average(JoinedMethods):
    """Methods whose changes are averaged at each site, such as adapters of several tasks, or of one from several seeds.

    Equation: h + sum_n w_n a_n at each site, a_n the change by method n of what stands there; w_n = weights_n / sum
        weights
    Trains: the sum of its methods
    Merges: no, its methods may be no linear changes
    Source: AdapterHub's Average of outputs (Poth et al. 2023, arXiv:2311.11077), whose weights are divided by their sum
        as well

    Args:
        methods: at least two, that stand at the same sites and change what enters or leaves them; folders of trained
            ones as a rule.
        weights: one for each, not negative, of which the shares are taken; None is equal ones.
    """

    tags = ("unified", ("composition",))
    inference_cost = "all methods compute all positions"
    refusal = "cannot be averaged; what changes states that enter or leave a module can"

    def __init__(self, methods: Sequence[Any], weights: Sequence[float] | None = None, **common: Any) -> None:
        super().__init__(methods, **common)
        if len(self.methods) < 2:
            raise ScionError(f"Average: one method ({self.methods[0].name}) is its own average")
        given = [1.0] * len(self.methods) if weights is None else list(weights)
        if len(given) != len(self.methods):
            raise ScionError(f"Average: {len(given)} weights of {len(self.methods)} methods")
        if min(given) < 0 or not 0 < sum(given) < float("inf"):
            raise ScionError(f"Average: weights {given} must be numbers from 0, not all of them 0")
        self.weights = None if weights is None else tuple(given)
        self.shares = [weight / sum(given) for weight in given]

    def fits(self, part: Graft) -> bool:
        return True

    def join(self, site: Site, parts: list[Graft]) -> Joined:
        return AverageGraft(site, parts, self.shares)
