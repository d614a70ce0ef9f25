"""AdapterDrop: no adapters in the first layers (Rueckle et al. 2021, arXiv:2010.11918)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from core.anatomy import Anatomy
from core.errors import ScionError, listed
from core.graft import Graft, refresh
from core.method import Home, PEFTMethod
from core.random_state import seed_of


class AdapterDrop(PEFTMethod):
    """Over any methods with grafts in the layers: switches those of the first ``drop`` layers off.

    Equation: x_l = L_l(x_{l-1}) without its hosts' change for l < n; n = drop, or n uniform in 0 .. maximum, drawn for
        each step
    Trains: nothing of its own; of its hosts' tensors those of the other layers: BERT-base, Pfeiffer, drop 5: 521,808
    Merges: nothing to merge; its hosts merge without what is dropped
    Source: Rueckle et al. 2021, arXiv:2010.11918, section 3. Layers below the first adapter keep nothing for
        backward, and what is dropped costs nothing. A number is for one place to drop, in training and after it;
        trained with ``random``, one model serves many: `dropped` says how many. Layers are counted in the order in
        which they run, an encoder's before a decoder's. What hosts share between layers, or have outside them, stays.
        Behind a host: peft: [Pfeiffer, AdapterDrop], or --peft+=AdapterDrop; a random number is drawn in a Trainer

    Args:
        drop: number of layers without adapters, or ``random``.
        maximum: of a random number; None is all layers but one.
        inference: layers without adapters outside training steps, where ``drop`` is random.
    """

    tags = ("additive", ("block", "composition"))
    mergeable = True
    trains_backbone = False
    inference_cost = "none; less than its hosts', whose dropped parts do not run"

    def __init__(self, drop: int | Literal["random"] = 5, maximum: int | None = None, inference: int = 0, **common: Any
                 ) -> None:
        super().__init__(**common)
        if drop != "random" and (isinstance(drop, str) or drop < 1):
            raise ScionError(f"AdapterDrop: drop {drop!r} must be at least 1, or 'random'")
        if inference < 0 or (maximum is not None and maximum < 1):
            raise ScionError(f"AdapterDrop: inference {inference} must not be negative, maximum {maximum} at least 1")
        self.drop, self.maximum, self.inference = drop, maximum, inference
        self.count = 0
        """Layers without adapters now."""
        self._frozen: list[Tensor] = []
        self.last = 0  # number of the last layer, once there is a backbone

    def check(self, anatomy: Anatomy) -> None:
        last = len(anatomy.blocks) - 1
        for what, value in (("drop", self.drop), ("maximum", self.maximum), ("inference", self.inference)):
            if isinstance(value, int) and value > last:
                raise ScionError(f"{self.name}: {what} {value} leaves no layer of {anatomy.family} its adapters; at "
                                 f"most {last} can go")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        return {"last": len(anatomy.blocks) - 1}

    def connect(self) -> None:
        super().connect()
        self.switch(self.at_rest)
        if not isinstance(self.drop, str):  # for good: they are no part of training
            self._frozen = [tensor for graft in self._in_layers() if graft.dropped for tensor in graft.parameters()
                            if tensor.requires_grad]
            for tensor in self._frozen:
                tensor.requires_grad_(False)

    def disconnect(self) -> None:
        self.switch(0)
        for tensor in self._frozen:
            tensor.requires_grad_(True)
        self._frozen = []
        super().disconnect()

    def merge(self) -> None:
        """Leave the model, which its hosts must have left before: merged, that is, without what is dropped."""
        standing = {host.name for host in self.hosts() if any(graft.dropped for graft in host.grafts)
                    } if self.attached else set()
        if standing:
            raise ScionError(f"{self.name} cannot be merged before another method that it acts on: merge "
                             f"{listed(sorted(standing))} first")
        super().merge()

    @property
    def at_rest(self) -> int:
        """Layers without adapters outside training steps."""
        return self.inference if isinstance(self.drop, str) else self.drop

    def number_at(self, step: int) -> int:
        """Layers without adapters in the step after ``step`` ones: a function of seed and step alone."""
        if not isinstance(self.drop, str):
            return self.drop
        most = self.last if self.maximum is None else self.maximum
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.name, step))
        return int(torch.randint(most + 1, (), generator=generator))

    def hosts(self) -> list[PEFTMethod]:
        """The methods that it acts on: those that stand before it."""
        home: Home = self.need_root().peft  # type: ignore[assignment]
        return [method for method in home.methods.values() if method is not self and method.place < self.place]

    def _in_layers(self) -> list[Graft]:
        return [graft for host in self.hosts() for graft in host.grafts if graft.layer is not None]

    def switch(self, count: int) -> None:
        """Let the first ``count`` layers be without adapters."""
        self.count = count
        for graft in self._in_layers():
            dropped = graft.layer is not None and graft.layer < count
            if graft.dropped != dropped:
                graft.dropped = dropped
                refresh(graft)

    @contextlib.contextmanager
    def dropped(self, count: int) -> Iterator[None]:
        """The model with the first ``count`` layers without adapters."""
        before = self.count
        self.switch(count)
        try:
            yield
        finally:
            self.switch(before)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The hosts whole again."""
        self.need_root()
        with self.dropped(0) if self.attached else contextlib.nullcontext():
            yield

    # --------------------------------------------------------------------------------- in training

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._in_layers():
            raise ScionError(f"{self.name} acts on other methods: put it behind one that has adapters in the layers "
                             "(peft: [Pfeiffer, AdapterDrop], or --peft+=AdapterDrop)")
        options = getattr(trainer.strategy, "_ddp_kwargs", {})
        if isinstance(self.drop, str) and trainer.world_size > 1 and not options.get("find_unused_parameters"):
            raise ScionError(f"{self.name} leaves layers without gradients: use --trainer.strategy "
                             "ddp_find_unused_parameters_true")
        super().on_fit_start(trainer, pl_module)
        for host in self.hosts():
            host.gradient_watch = None  # what is dropped has no gradient

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.switch(self.number_at(trainer.global_step))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.switch(self.at_rest)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.switch(self.at_rest)
