"""Names that methods had in earlier versions, for classes and scripts that were written for those."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from core.anatomy import Anatomy
from core.errors import ScionError
from core.method.abilities import AddsLoss, OwnLoss, OwnOptimizer, Prepared, Scheduled, Staged
from core.method.contents import live_buffers, live_tensors, packings_on, rewind_buffers
from core.method.on_model import MethodOnModel
from core.method.options import linear_only
from core.method.state import check_shapes, shapes_by_site

ABILITIES = {
    "after_step": Scheduled, "advance": Staged, "prepare": Prepared, "loss_terms": AddsLoss, "training_loss": OwnLoss,
    "make_optimizer": OwnOptimizer,
}
"""The hook that makes an ability what it is, which was enough to have it."""
RENAMED = {
    "moved": "base_parameters", "idle": "may_lack_gradient", "resting": "may_have_zero_gradient",
    "foresee": "check_outline", "beside": "training_module", "_fill": "fill", "_connect": "connect",
    "_disconnect": "disconnect",
}
"""Former name of a function that a class may define -> the present one."""


def adopt(cls: Any) -> None:
    """Let a class that was written for an earlier version mean what it meant: its hooks by their present names, and the
    abilities that it has without declaring them."""
    for former, present in RENAMED.items():
        if former in vars(cls) and present not in vars(cls):
            setattr(cls, present, vars(cls)[former])
    for hook, ability in ABILITIES.items():
        # Not issubclass: an abstract class remembers its answers, and this one is about to change.
        if hook in vars(cls) and ability not in cls.__mro__:
            warnings.warn(f"{cls.__name__} defines {hook}: declare it, class {cls.__name__}({ability.__name__}, "
                          "PEFTMethod)", DeprecationWarning, stacklevel=4)
            cls.__bases__ = (ability, *cls.__bases__)


class FormerMembers(MethodOnModel):
    """What every method answered to once, whatever it could do. New code asks ``isinstance(method, AddsLoss)``."""

    stages: tuple[str, ...] = ()
    prepares: bool = False
    is_scheduled: bool = False
    adds_loss: bool = False
    settled: bool = True

    @property
    def is_optimizer(self) -> bool:
        return isinstance(self, OwnOptimizer)

    @property
    def start(self) -> dict[str, Tensor]:
        return self.base_at_start

    def moved(self, anatomy: Anatomy) -> list[str]:
        return self.base_parameters(anatomy)

    def idle(self) -> set[str]:
        return self.may_lack_gradient()

    def resting(self) -> set[str]:
        return self.may_have_zero_gradient()

    def examine(self, model: nn.Module) -> Anatomy:
        return self.plan_for(model).anatomy

    def foresee(self, roles: Sequence[str], blocks: int, family: str) -> None:
        self.check_outline(roles, blocks, family)

    def need_linear(self, anatomy: Anatomy) -> None:
        linear_only(self.name, self.sites(anatomy), anatomy.all_sites())

    def shapes(self) -> dict[str, list[int]]:
        return shapes_by_site(self.as_peft_method)

    def check_shapes(self, saved: dict[str, list[int]]) -> None:
        check_shapes(self.as_peft_method, saved)

    def live_tensors(self) -> dict[str, Tensor]:
        return live_tensors(self.as_peft_method)

    def live_buffers(self) -> dict[str, Tensor]:
        return live_buffers(self.as_peft_method)

    def all_packings(self) -> dict[str, Any]:
        return packings_on(self.as_peft_method)

    def rewind_buffers(self) -> None:
        rewind_buffers(self.as_peft_method)

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        return None

    def training_loss(self, pl_module: Any, batch: Any, outputs: Any) -> Tensor | None:
        return None

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> Any:
        return None

    def optimizer_bytes(self) -> int:
        return sum(2 * tensor.numel() * tensor.element_size() for tensor in self.trainable().values())

    def prepare(self, batches: Iterable[Any], loss: Any) -> None:
        return None

    def advance(self, module: nn.Module | None = None) -> None:
        raise ScionError(f"{self.name} has one stage only")
