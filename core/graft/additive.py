"""Grafts that add something to the output of a map."""

from __future__ import annotations

from torch import Tensor

from core.graft.graft import Graft


class AdditiveGraft(Graft):
    """y + delta(x), at the site's own channels of the output."""

    def delta(self, x: Tensor) -> Tensor:
        """Input x [..., in] of the site -> what is added to its output [..., out]."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.site.put(y, self.site.take(y) + self.delta(x))
