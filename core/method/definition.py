"""What a method defines: declarations about itself, and the few functions that make it what it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError, listed
from core.graft import Graft
from core.record import Recorded

if TYPE_CHECKING:
    from core.method.base import PEFTMethod
    from core.method.merging import MergedWeights


class Declarations:
    """What a method says of itself; tests, the command and files read it."""

    identity_at_start: bool = True
    """Attaching leaves the output as it is; an option may say otherwise on the instance."""
    trains_backbone: ClassVar[bool] = True
    """False for methods that train nothing inside the backbone (a linear probe)."""
    mergeable: ClassVar[bool] = False
    """``merge`` can write the method into the weights."""
    moves_base: ClassVar[bool] = False
    """Trains the backbone's own tensors."""
    by_rows: ClassVar[bool] = True
    """Rows of one batch can have adapters of their own (`core.compose`); a method that moves the base cannot anyway."""
    linear_only: ClassVar[bool] = False
    """All its sites must be linear maps."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Roles without which a backbone cannot have this method."""
    tags: ClassVar[tuple[str, tuple[str, ...]]] = ("", ())
    """Its family and what it modifies, in the words of `core.report.taxonomy`; for ``lightning methods``."""
    readings: ClassVar[tuple[str, ...]] = ()
    """What a task on the backbone may read, by its name (`core.backbone.Backbone`); empty is anything."""
    inference_cost: ClassVar[str] = "none once merged"
    recommended: ClassVar[dict[str, float]] = {"lr": 1e-3, "weight_decay": 0.0}
    """Learning rate and weight decay from the paper, taken by ``lr: auto``; ``head_lr`` where the rate of a new head
    beside the method must be another one."""
    mode: ClassVar[Literal["eval", "train"]] = "eval"
    """Default of ``backbone_mode``."""

    # In files:

    structure_types: ClassVar[Mapping[str, Any] | None] = None
    """The keys of `structure` with the types of their values (see `core.json_types`), against which files are checked;
    None checks nothing."""
    start_only: ClassVar[tuple[str, ...]] = ()
    """Arguments that only say what the method starts from (a folder, a download): files leave them at their
    defaults."""
    former_options: ClassVar[dict[str, Any]] = {}
    """Options that files of earlier versions name, with the one value that they had there."""
    hf_form: ClassVar[Any] = None
    """How Hugging Face peft writes a method of another distribution, a `core.adapters.huggingface.form.PeftForm`; those
    of this one are in `core.adapters.huggingface.forms`."""


class Values(Protocol):
    """What a method that was trained before brings along, until it is attached (`core.adapters.entry`)."""

    def check(self, method: PEFTMethod, anatomy: Anatomy) -> None:
        """Refuse a model that the values do not fit."""

    def owned(self, anatomy: Anatomy) -> set[str]:
        """Names of the base's tensors that the method will own once it has its values."""
        ...

    def fill(self, method: PEFTMethod) -> None:
        """Write the values into the attached method."""


class MethodDefinition(Declarations, Recorded, ABC):
    """What an author writes. All of it answers questions: only `shared`, `build` and `restructure` make something.

    Args:
        layers: indices of the blocks to adapt (negative ones count from the end); None is all.
        norms: norm roles whose weights are trained as well (``("norm2", "norm")``); counted apart.
        name: the method's name on the model, in state-dict keys and files; by default its class's name.
        on: path of the backbone in a LightningModule; by default ``backbone`` or ``model``.
        trainable: False keeps the method in the forward but frozen.
        seed: of the method's random values, together with its name and each site's.
        head: whether a task head inside the backbone is trained (a language model's head never is).
        backbone_mode: ``eval`` keeps frozen parts without dropout, drop-path and batch statistics; ``train`` does not;
            None takes the method's own.
        lr: learning rate of this method (and of the head, if it is the first one) where the run says ``auto``; None is
            the recommended one.
    """

    def __init__(
        self,
        *,
        layers: Sequence[int] | None = None,
        norms: Sequence[str] = (),
        name: str | None = None,
        on: str | None = None,
        trainable: bool = True,
        seed: int = 0,
        head: Literal["train", "frozen"] = "train",
        backbone_mode: Literal["eval", "train"] | None = None,
        lr: float | None = None,
    ) -> None:
        if name is not None and (not name or "." in name):
            raise ScionError(f"{type(self).__name__}: name {name!r} must be a word without dots")
        if lr is not None and lr <= 0:
            raise ScionError(f"{type(self).__name__}: lr {lr} must be positive")
        self.layers = None if layers is None else list(layers)
        self.norms = tuple(norms)
        self.name = name or type(self).__name__
        self.on, self.is_trained, self.seed, self.head = on, trainable, seed, head
        self.backbone_mode: str = backbone_mode or self.mode
        self.suggested = dict(self.recommended)
        if lr is not None:
            self.suggested["lr"] = lr
        self.root: nn.Module | None = None
        self.merged: MergedWeights | None = None
        self.base_at_start: dict[str, Tensor] = {}  # values of the base's tensors that this method trains, before
        self.prepared = False  # by `Prepared.prepare`, or with values loaded
        self.values: Values | None = None  # of an earlier training, which `attach` writes

    targets: Sequence[str] | None = ()

    # ------------------------------------------------------------------------------- on which model, and where

    def check(self, anatomy: Anatomy) -> None:
        """Refuse a backbone that this method cannot have, before anything changes.

        Raises:
            ScionError: says what is wrong and what would be right.
        """

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        """Attributes that the method has on this model: sizes that follow from it, and the first stage. They are set
        when the method is attached, and `sites`, `shared` and `build` see them."""
        return {}

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Where grafts are; by default ``targets`` in ``layers``, where None means every linear map of the blocks."""
        targets = anatomy.linear_roles() if self.targets is None else self.targets
        return anatomy.sites(targets, self.layers, self.name) if targets else []

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        """Names of the backbone's own parameters that the method trains."""
        return []

    def feature_dim(self, dim: int, anatomy: Anatomy) -> int:
        """Width of the root's feature with this method on it, where it is ``dim`` without; what reads the feature is
        built for it (`FineTuner.fit_head`)."""
        return dim

    def outputs(self, outputs: Any) -> Any:
        """The outputs of a task on this model, to which the method may add named ones."""
        return outputs

    def check_reading(self, reading: str, task: str) -> None:
        """Refuse a task that reads what the method does not work with."""
        if self.readings and reading not in self.readings:
            raise ScionError(f"{self.name}: works with tasks that read {listed(self.readings)}, and {task} reads "
                             f"{reading!r}")

    # ------------------------------------------------------------------------------- what is made

    def shared(self, module: nn.Module, sites: list[Site]) -> None:
        """Register tensors that many grafts share on ``module``, before ``build`` is called."""

    def build(self, site: Site) -> Graft:
        """The graft for a site. Called with the random state seeded by (seed, name, site); use ``nn.init`` freely."""
        raise NotImplementedError

    def structure(self) -> dict[str, Any]:
        """What, beside the constructor's arguments, rebuilds the method's tensors (phases, grown ranks): JSON."""
        return {}

    def restructure(self, structure: dict[str, Any]) -> None:
        """Bring an attached method into a saved ``structure``, before its tensors are loaded."""

    # ------------------------------------------------------------------------------- in training

    @abstractmethod
    def trainable(self) -> dict[str, Tensor]:
        """``{name in the root: tensor}`` of all that this method trains."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer; tensors with fewer than two axes are not decayed. Keys beside ``params`` override
        the run's optimizer settings; ``lr_factor`` multiplies its learning rate."""
        tensors = list(self.trainable().values())
        decayed = {"params": [tensor for tensor in tensors if tensor.dim() > 1]}
        plain = {"params": [tensor for tensor in tensors if tensor.dim() < 2], "weight_decay": 0.0}
        return [group for group in (decayed, plain) if group["params"]]

    def may_lack_gradient(self) -> set[str]:
        """Names of trained tensors that may go without a gradient."""
        return set()

    def figures(self) -> dict[str, Any]:
        """What a run records of the method beside its counts (a sparsity, by layer, say): JSON."""
        return {}


def device_and_dtype_beside(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and type of what is grafted beside ``tensor``: small updates of half-precision weights need float32."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.device, torch.float32 if half else tensor.dtype
