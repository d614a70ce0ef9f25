"""A method's grafts and tensors, once it is on a model."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from core import graft as grafts
from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method.attached import key_of
from core.method.definition import MethodDefinition, device_and_dtype_beside
from core.method.membership import Membership
from core.method.plan import Plan
from core.method.state import MethodModule
from core.random_state import seeded

if TYPE_CHECKING:
    from core.method.base import PEFTMethod


class MethodWithGrafts(MethodDefinition):
    """Inserts, finds and takes out a method's grafts; see `PEFTMethod`."""

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)
        self.place = 0  # in the order of attachment
        self.module: nn.Module = MethodModule(self.as_peft_method)  # in a composition, a part of its module
        self.buffers_at_start: dict[str, Tensor] = {}  # of the base, where its parts are in train mode
        self.shapes_at_start: dict[str, list[int]] = {}  # of the sites' weights, by name
        self.norm_names: list[str] = []
        self.membership = Membership()
        self.lightning_module: weakref.ref[nn.Module] | None = None  # what a Trainer trains it in

    @property
    def as_peft_method(self) -> PEFTMethod:
        return cast("PEFTMethod", self)

    @property
    def attached(self) -> bool:
        """Whether the method is on a model now."""
        return self.root is not None and self.merged is None

    def need_root(self) -> nn.Module:
        """The model that the method is attached to.

        Raises:
            ScionError: there is none yet.
        """
        if self.root is None:
            raise ScionError(f"{self.name} is not attached to a model yet: call attach(model) first")
        return self.root

    @property
    def members(self) -> list[PEFTMethod]:
        """The methods that a composition is made of; none for any other method."""
        return []

    # ------------------------------------------------------------------------------- its grafts

    @property
    def grafts(self) -> list[Graft]:
        """The method's grafts, in the order of their sites."""
        return self.standing(self.module)

    def standing(self, module: nn.Module) -> list[Graft]:
        """Of all grafts in ``module`` those that are at sites themselves (in a composition some only take part)."""
        return [child for child in module.modules() if isinstance(child, Graft)]

    def fill(self, module: nn.Module, plan: Plan) -> None:
        """Put the method's shared tensors and grafts into ``module``."""
        with seeded(self.seed, self.name):
            self.shared(module, list(plan.sites))
        device, dtype = device_and_dtype_beside(next(plan.anatomy.root.parameters()))
        module.to(device=device, dtype=dtype)
        for site in plan.sites:
            module.add_module(key_of(site.name), self.make_graft(site, plan.anatomy))

    def make_graft(self, site: Site, anatomy: Anatomy) -> Graft:
        """`build` with its seed, on the device and in a type that fit the site."""
        with seeded(self.seed, self.name, site.name):
            graft = self.build(site)
        tensor = next(site.module.parameters(), None)
        if tensor is None:  # a dropout, an identity: as in its block
            around = site.module if site.block is None else anatomy.blocks[site.block].module
            tensor = next(around.parameters(), next(anatomy.root.parameters()))
        device, dtype = device_and_dtype_beside(tensor)
        return graft.to(device=device, dtype=dtype)

    def add_graft(self, graft: Graft) -> None:
        """Give an attached method one more graft, on the device of its site's tensor and in a type that it can train
        in: for methods whose grafts are not known when they are attached."""
        device, dtype = device_and_dtype_beside(graft.site.full_weight)
        graft.to(device=device, dtype=dtype).requires_grad_(self.is_trained)
        graft.place = self.place
        self.module.add_module(key_of(graft.site.name), graft)
        grafts.connect(graft)

    def drop_graft(self, graft: Graft) -> None:
        """Take one graft from an attached method."""
        grafts.disconnect(graft)
        delattr(self.module, key_of(graft.site.name))

    def connect(self) -> None:
        """Let the grafts act at their sites."""
        for graft in self.grafts:
            graft.place = self.place
            grafts.connect(graft)

    def disconnect(self) -> None:
        """Let them act no more."""
        for graft in self.grafts:
            grafts.disconnect(graft)

    # ------------------------------------------------------------------------------- its tensors

    @property
    def prefix(self) -> str:
        """Start of the names of the method's tensors in the root's state dict."""
        return f"peft.{key_of(self.name)}."

    def trainable(self) -> dict[str, Tensor]:
        root = self.need_root()
        if not self.is_trained or not self.attached:
            return {}
        parameters = dict(root.named_parameters())
        found: dict[str, Tensor] = {name: parameters[name] for name in self.base_at_start}
        for name, tensor in self.module.named_parameters():
            if tensor.requires_grad:
                found[f"{self.prefix}{name}"] = tensor
        return found

    def may_have_zero_gradient(self) -> set[str]:
        """Names of trained tensors whose gradient may be zero by their place (a key's bias, an embedding's row that no
        sample looks up): the base's own, and chosen entries of them."""
        entries = {id(p) for graft in self.grafts if graft.entries for p in graft.parameters()}
        return {*self.base_at_start, *(name for name, tensor in self.trainable().items() if id(tensor) in entries)}

    def packings(self) -> dict[str, Graft]:
        """Tensors (by their names in the root; another method's, even) whose stored form is not the one in use; by
        default those that the method's grafts declare."""
        return {f"{self.prefix}{path}.{name}": graft for path, graft in self.module.named_modules()
                if isinstance(graft, Graft) for name in graft.packed}
