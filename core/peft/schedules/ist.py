"""IST: train the tensors of a few sampled layers at each step (Yao et al. 2024, EMNLP Findings)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from core.anatomy import dissect
from core.errors import ScionError, listed
from core.graft import Graft
from core.method import Home, PEFTMethod, Scheduled, sample_name, training_batch
from core.method.options import not_negative
from core.random_state import seed_of


class IST(Scheduled, PEFTMethod):
    """Over any methods with tensors in the layers: at each step only those of a drawn share of the layers are trained.

    Equation: layers to train: drawn without repetition with p_i ~ sigmoid(-I_i), I = 0 at the start. Every ``refresh``
        steps, for k = 1 .. candidates: draw a set S_k with p_i ~ sigmoid(I_i), multiply what the methods add in S_k by
        ``suppression`` (LoRA's and DoRA's s, the angles of rotations, the change of trained weights), take the loss l_k
        of one training batch; I_i <- I_i + mu a_k p (1 - p) for i in S_k, p = sigmoid(I_i), a_k = exp(-l_k) - mean
        exp(-l). A large I: the layer is not needed
    Trains: nothing of its own; of its hosts' tensors ``share`` at a time
    Merges: nothing to merge; its hosts merge as ever
    Source: Yao et al. 2024, arXiv:2410.11772 (number from memory), and the authors' code, whose importance has the sign
        above. Layers below the lowest drawn one keep nothing for backward. Needs core.FineTuner. Behind a host: peft:
        [LoRA, IST], or --peft+=IST

    Args:
        share: share of the layers trained at a step, in (0, 1].
        suppressed: share of the layers suppressed in a candidate, in (0, 1].
        suppression: what the hosts' change is multiplied by in these.
        candidates: sets compared each time, at least 2.
        refresh: optimizer steps between two comparisons, at least 1.
        mu: step size of the scores.
        samples: training samples in the batch of a comparison.
    """

    tags = ("unified", ("optimizer", "composition"))
    mergeable = True
    trains_backbone = False
    inference_cost = "none"

    def __init__(self, share: float = 0.25, suppressed: float = 0.5, suppression: float = 0.25, candidates: int = 3,
                 refresh: int = 10, mu: float = 10.0, samples: int = 16, **common: Any) -> None:
        super().__init__(**common)
        if not 0 < share <= 1 or not 0 < suppressed <= 1:
            raise ScionError(f"IST: share {share} and suppressed {suppressed} must lie in (0, 1]")
        if candidates < 2 or refresh < 1 or samples < 1:
            raise ScionError(f"IST: candidates {candidates} must be at least 2, refresh {refresh} and samples "
                             f"{samples} at least 1")
        not_negative("IST", mu=mu, suppression=suppression)
        self.share, self.suppressed, self.suppression = share, suppressed, suppression
        self.candidates, self.refresh, self.mu, self.samples = candidates, refresh, mu, samples
        self.importance = torch.zeros(0)
        self._trainer: Any = None
        self._flags: dict[Tensor, bool] = {}

    # --------------------------------------------------------------------------------- the rule

    def draw(self, kind: str, step: int, number: int, weights: Tensor) -> list[int]:
        """``number`` distinct layers with probability as ``weights``: a function of seed, kind and step alone."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, kind, step))
        return sorted(torch.multinomial(weights.double(), number, generator=generator).tolist())

    def layers_at(self, step: int) -> list[int]:
        """The layers that the step after ``step`` ones trains."""
        number = max(1, int(self.share * len(self.importance)))
        return self.draw("update", step, number, torch.sigmoid(-self.importance))

    def sets_at(self, step: int) -> list[list[int]]:
        """The candidates of the comparison after ``step`` steps, different ones where that is possible."""
        number = max(1, int(self.suppressed * len(self.importance)))
        found: list[list[int]] = []
        for k in range(self.candidates):
            for attempt in range(20):
                drawn = self.draw(f"suppress {k} {attempt}", step, number, torch.sigmoid(self.importance))
                if drawn not in found:
                    break
            found.append(drawn)
        return found

    def score(self, sets: list[list[int]], losses: list[float]) -> None:
        """Move the importances by what the candidates lost."""
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64))
        slope = torch.sigmoid(self.importance) * torch.sigmoid(-self.importance)
        change = torch.zeros_like(self.importance)
        for layers, advantage in zip(sets, (rewards - rewards.mean()).float(), strict=True):
            change[layers] += self.mu * advantage * slope[layers]
        self.importance = self.importance + change

    # --------------------------------------------------------------------------------- what it acts on

    def _hosts(self) -> list[PEFTMethod]:
        home: Home = self.need_root().peft  # type: ignore[assignment]
        return [method for method in home.methods.values() if method is not self and method.is_trained]

    def _grafts_by_layer(self) -> list[tuple[Graft, int]]:
        """The hosts' grafts that belong to a layer, with its number."""
        anatomy, found = dissect(self.need_root()), []
        for graft in [graft for host in self._hosts() for graft in host.grafts]:
            single = graft.site.role == "parameter"
            layer = anatomy.block_of(graft.site.weight_name) if single else graft.layer
            if layer is not None:
                found.append((graft, layer))
        return found

    def _moved_by_layer(self) -> list[tuple[Tensor, Tensor, int]]:
        """The backbone's tensors in the layers that hosts train, with their start values and the layer's number."""
        root = self.need_root()
        anatomy, parameters, found = dissect(root), dict(root.named_parameters()), []
        for name, start in [item for host in self._hosts() for item in host.base_at_start.items()]:
            layer = anatomy.block_of(name)
            if layer is not None:
                found.append((parameters[name], start, layer))
        return found

    def tensors_of_layers(self) -> list[list[Tensor]]:
        """The hosts' tensors in each layer."""
        found: list[list[Tensor]] = [[] for _ in dissect(self.need_root()).blocks]
        for graft, layer in self._grafts_by_layer():
            found[layer] += list(graft.parameters())
        for tensor, _, layer in self._moved_by_layer():
            found[layer].append(tensor)
        return found

    @contextlib.contextmanager
    def suppressing(self, layers: Sequence[int]) -> Iterator[None]:
        """The model with what the hosts add in ``layers`` multiplied by ``suppression``."""
        grafts = [graft for graft, layer in self._grafts_by_layer() if layer in layers]
        moved = [(tensor, tensor.data, start) for tensor, start, layer in self._moved_by_layer() if layer in layers]
        try:
            for graft in grafts:
                graft.strength = self.suppression
            for tensor, value, start in moved:
                tensor.data = torch.lerp(start.to(value), value, self.suppression)
            yield
        finally:
            for graft in grafts:
                graft.strength = 1.0
            for tensor, value, _ in moved:
                tensor.data = value

    def activate(self, layers: list[int]) -> None:
        """Train the hosts' tensors of ``layers`` alone; what stands outside the layers goes on."""
        for index, tensors in enumerate(self.tensors_of_layers()):
            for tensor in tensors:
                self._flags.setdefault(tensor, tensor.requires_grad)
                tensor.requires_grad_(self._flags[tensor] and index in layers)

    def release(self) -> None:
        """Train all again."""
        for tensor, flag in self._flags.items():
            tensor.requires_grad_(flag)
        self._flags = {}

    # --------------------------------------------------------------------------------- in training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not hasattr(pl_module, "loss"):
            raise ScionError(f"{self.name} compares losses of training batches: {type(pl_module).__name__} has no "
                             "loss(batch); use core.FineTuner")
        if not any(self.tensors_of_layers()):
            raise ScionError(f"{self.name} trains nothing of its own: put it behind a method that has tensors in the "
                             "layers (peft: [LoRA, IST], or --peft+=IST)")
        options = getattr(trainer.strategy, "_ddp_kwargs", {})
        if trainer.world_size > 1 and not options.get("find_unused_parameters"):
            raise ScionError(f"{self.name} leaves layers without gradients: use --trainer.strategy "
                             "ddp_find_unused_parameters_true")
        super().on_fit_start(trainer, pl_module)
        self._trainer = trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.importance = torch.zeros(len(dissect(self.need_root()).blocks))
        super().on_train_start(trainer, pl_module)
        for host in self._hosts():
            host.gradient_watch = None  # idle layers have no gradient
        self.activate(self.layers_at(self.steps))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        self.release()
        self._trainer = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.steps % self.refresh == 0 and self._trainer is not None:
            sets = self.sets_at(self.steps)
            self.score(sets, self._losses(sets))
        self.activate(self.layers_at(self.steps))

    def _losses(self, sets: list[list[int]]) -> list[float]:
        """The loss of one training batch under each candidate; nothing is left changed."""
        trainer, module = self._trainer, self._trainer.lightning_module
        loader = trainer.train_dataloader
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, "batch", self.steps))
        number = min(self.samples, len(loader.dataset))
        losses: list[float] = []
        with torch.no_grad(), torch.random.fork_rng():
            chosen = torch.randperm(len(loader.dataset), generator=generator)[:number].tolist()
            batch = training_batch(trainer, chosen)
            module.eval()
            try:
                for layers in sets:
                    with self.suppressing(layers), trainer.precision_plugin.forward_context():
                        loss = module.loss(batch).float()
                    losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
                    if not math.isfinite(losses[-1]):
                        names = listed([sample_name(trainer, index) for index in chosen], 4)
                        raise ScionError(f"{self.name}: the loss of the batch that it compares layers on is "
                                         f"{losses[-1]} ({names})")
            finally:
                module.train()
        return losses

    def training_state(self) -> dict[str, Any]:
        return {"importance": self.importance}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self.importance = state["importance"]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_trainer": None, "_flags": {}}
