"""R-AMT: a binary mask on frozen weights, with gradients that a teacher regularises (ICCV 2023, arXiv:2307.15049)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Site, dissect
from core.errors import ScionError
from core.graft import Graft
from core.method import AddsLoss, PEFTMethod, Scheduled
from core.random_state import seeded

if TYPE_CHECKING:
    import lightning.pytorch as L

START, THRESHOLD = 1e-2, 5e-3


class MaskGraft(Graft):
    """1[M > threshold] * W, with scores M of W's shape; the gradient passes the comparison as if it were not there.

    Scores are trained in float32 and stored as one bit each.
    """

    reads_weight = True
    remade = True
    packed = ("scores",)

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.scores = nn.Parameter(torch.full((site.out_features, site.in_features), START))

    @property
    def mask(self) -> Tensor:
        """1[M > threshold], in whose backward M stands for it."""
        kept = (self.scores > THRESHOLD).to(self.scores.dtype)
        return kept + (self.scores - self.scores.detach())

    def weight(self, weight: Tensor) -> Tensor:
        return (self.mask * weight).to(weight.dtype)

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """The bits of M > threshold, row by row, the first in the lowest place, the last byte filled with zeros."""
        bits = (tensor > THRESHOLD).flatten()
        if bits.is_meta:
            return {"bits": torch.empty((len(bits) + 7) // 8, dtype=torch.uint8, device="meta")}
        return {"bits": torch.from_numpy(np.packbits(bits.cpu().numpy(), bitorder="little"))}

    def unpack(self, parts: dict[str, Tensor], tensor: Tensor) -> None:
        """Scores as at the start where the bit is set, and as far below the threshold where it is not."""
        bits = np.unpackbits(parts["bits"].cpu().numpy(), count=tensor.numel(), bitorder="little")
        kept = torch.from_numpy(bits).to(tensor.device).view(tensor.shape).bool()
        tensor.copy_(torch.where(kept, START, 2 * THRESHOLD - START))


class RAMT(Scheduled, AddsLoss, PEFTMethod):
    """Learns which frozen weights to switch off; what contradicts the frozen model is learned less.

    Equation: W' = 1[M > 0.005] * W, M = 0.01 at the start, dL/dM = dL/dW' * W. L_a = task + l2 sum |M|_2;
        L_b = cross entropy to the outputs without masks (the teacher's, temperature 1). With g_a, g_b their gradients,
        P = (1 + sign(g_a) (g_a + g_b) / (|g_a| + |g_b|)) / 2 and U uniform, the step is taken on
        ((1 - drop) + drop 1[P > U]) g_a. The teacher has the head, and whatever else is trained beside the masks, as it
        was when training began; the paper's classifier is fixed from the start
    Trains: a score for each weight, stored in one bit; ViT-B/16, attention: 28,311,552
    Merges: 1[M > 0.005] * W
    Source: R-AMT, ICCV 2023, arXiv:2307.15049, and the authors' code, which masks the patch projection of CLIP as
        well: add "patch_embed" for its 28,901,376. The second gradient needs ``loss_terms`` (FineTuner adds it) and the
        Trainer's callbacks; drop=0 (AMT) does not. Scores take 12 bytes each in training with their moments

    Args:
        drop: share of a conflicting gradient that is dropped, in [0, 1]; the paper takes 0.3 with 16 samples a class,
            mostly, and 1 with fewer.
        l2: weight of the scores' norms.
        targets: roles to mask.
        teacher: ``start``: with the head as training finds it; ``current``: with the head as it is at each step.
    """

    tags = ("partial", ("entries",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 8e-5, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, drop: float = 0.3, l2: float = 1e-4, targets: Sequence[str] = ("q", "k", "v", "o"),
                 teacher: Literal["start", "current"] = "start", **common: Any) -> None:
        super().__init__(**common)
        if not 0 <= drop <= 1 or l2 < 0:
            raise ScionError(f"RAMT: drop {drop} must lie in [0, 1], l2 {l2} must not be negative")
        if teacher not in ("start", "current"):
            raise ScionError(f"RAMT: teacher {teacher!r} must be 'start' or 'current'")
        self.drop, self.l2, self.teacher = drop, l2, teacher
        self.first: dict[str, Tensor] | None = None
        """What is trained beside the masks, by its names in the module, as it was when training began."""
        self.targets = tuple(targets)
        self.against: list[Tensor] = []  # g_b of the steps' micro-batches so far, summed

    def build(self, site: Site) -> Graft:
        return MaskGraft(site)

    @property
    def scores(self) -> list[Tensor]:
        """The scores, in the order of their sites."""
        return [graft.scores for graft in self.grafts if isinstance(graft, MaskGraft)]

    def param_groups(self) -> list[dict[str, Any]]:
        return [{**group, "weight_decay": 0.0} for group in super().param_groups()]

    @property
    def adds_loss(self) -> bool:
        return self.drop > 0 or self.l2 > 0

    @property
    def is_scheduled(self) -> bool:  # the draws follow the number of the step
        return True

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        if self.drop and self.is_trained and torch.is_grad_enabled() and outputs.requires_grad:
            with torch.no_grad(), self.disabled(), self._at_the_start(module):
                teacher = module(batch[0]).softmax(-1)
            share = getattr(module, "share", 1.0)  # of a short joint batch a process may have more samples than another
            against = torch.autograd.grad(share * F.cross_entropy(outputs, teacher), self.scores, retain_graph=True)
            self.against = [a + b for a, b in zip(self.against or [0.0] * len(against), against, strict=True)]
        return self.l2 * torch.stack([scores.norm() for scores in self.scores]).sum() if self.l2 else None

    def figures(self) -> dict[str, Any]:
        """Shares of weights that are switched off: of those with a mask, of all the model's, and layer by layer."""
        off: dict[str, int] = {}
        size: dict[str, int] = {}
        for graft in self.grafts:
            if isinstance(graft, MaskGraft):
                layer = "outside" if graft.layer is None else str(graft.layer)
                off[layer] = off.get(layer, 0) + int((graft.scores <= THRESHOLD).sum())
                size[layer] = size.get(layer, 0) + graft.scores.numel()
        masked, everything = sum(off.values()), dissect(self.need_root()).size
        return {"sparsity": masked / sum(size.values()), "sparsity_of_all": masked / everything,
                "sparsity_by_layer": {layer: off[layer] / size[layer] for layer in size}}

    @contextlib.contextmanager
    def _at_the_start(self, module: nn.Module) -> Iterator[None]:
        """The module with all that is trained beside the masks as the teacher has it."""
        if self.teacher == "current":
            yield
            return
        own = {id(scores) for scores in self.scores}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in own}
        if self.first is None:
            self.first = {name: p.detach().clone() for name, p in trained.items()}
        now = {name: p.data for name, p in trained.items()}
        try:
            for name, parameter in trained.items():  # other storage: the backward under way keeps its values
                parameter.data = self.first.get(name, now[name]).to(now[name])
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = now[name]

    def training_state(self) -> dict[str, Any]:
        return {"teacher": self.first or {}}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.first = dict(state["teacher"]) or None if "teacher" in state else None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first = None
        super().on_fit_start(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule,
                                 optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        self.regularise(trainer.accumulate_grad_batches)

    @torch.no_grad()
    def regularise(self, batches: int = 1) -> None:
        """Let the teacher's gradients, gathered over ``batches`` micro-batches, drop parts of the scores' gradients."""
        against, self.against = self.against, []
        if not against:
            return
        with seeded(self.seed, self.name, self.steps):
            for scores, other in zip(self.scores, against, strict=True):
                if scores.grad is None:
                    continue
                other = other / batches
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.all_reduce(other)
                    other /= torch.distributed.get_world_size()
                scores.grad.copy_(dropped(scores.grad, other, torch.rand(scores.shape).to(scores), self.drop))


def dropped(gradient: Tensor, against: Tensor, uniform: Tensor, drop: float) -> Tensor:
    """The gradient, less ``drop`` of it where a draw exceeds the purity P of its direction."""
    purity = (1 + gradient.sign() * (gradient + against) / (gradient.abs() + against.abs() + 1e-8)) / 2
    return ((1 - drop) + drop * (purity > uniform)) * gradient
