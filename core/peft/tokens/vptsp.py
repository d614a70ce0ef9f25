"""VPTSP: visual prompts, and class proxies made from prompts of each class (Ren et al. 2024, arXiv:2402.02340)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Attention, Graft
from core.method import OwnLoss, PEFTMethod, key_of
from core.peft.selection.bitfit import BitFit
from core.peft.tokens.vpt import DeepPrompts
from core.random_state import seeded


class SwappedPrompts(DeepPrompts):
    """Deep prompts that give way to others, one set a sample, while those are shown."""

    momentary = (*Graft.momentary, "shown")

    def __init__(self, site: Site, prompt: Tensor) -> None:
        super().__init__(site, prompt, 0.0)
        if not len(prompt):
            self.register_parameter("prompt", None)
        self.shown: Tensor | None = None
        """Prompts [samples, tokens, dim] in the place of its own; without tokens there are none."""

    def tokens(self) -> Tensor:
        return super().tokens() if self.shown is None else self.shown

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, x: Tensor, attention: Attention) -> Tensor:
        own = self.prompt if self.shown is None else self.shown
        if own is None or not own.shape[-2]:
            return attention(q, k, v, mask)
        return super().attend(q, k, v, mask, x, attention)


class VPTSP(OwnLoss, PEFTMethod):
    """Deep prompts and biases for retrieval, trained against class proxies that a second pass of the model makes.

    Equation: [x_l, _] = L_l([x_{l-1}, P_l]), z = normalise(head(x)); in training, for each sample of class c with the
        class's prompts in P's place, p = normalise(head'(x')); u = sigmoid(W_u p + U_u h + b_u), r alike,
        n = relu(W_n p + r * U_n h + b_n), h <- (1 - u) n + u h, from h = G_c on; G_c <- normalise(h);
        proxy_c = normalise(beta B_c + (1 - beta) G_c), B the task's own proxies
    Trains: prompts and biases; ViT-B/16: 195,072. Beside the model, in training alone: the second head, the gate
        (6 E^2 + 3 E), and the prompts of each class
    Merges: no, the prompts are tokens of the sequence
    Source: Ren et al. 2024, arXiv:2402.02340 (VPTSP-G); sizes of ViT-S/16 on CUB, learning rate of AdamW on Cars. Of
        what their code counts, E numbers in the gate and the prompts that `step` leaves out are never used, and are not
        made here

    It wants the task `Embedding` in a `FineTuner`, and batches that hold each of their classes once, with the same
    number of samples in a row (``data.per_class``). Elsewhere, and at inference, it is its prompts and biases alone.

    The trained biases belong to the model, so both passes have them ("the same frozen ViT", in the paper's code as
    well), and both train them. The prompts of all classes are one table. Only the rows of a batch's classes are read,
    and Adam updates only those, and their moments (`torch.optim.SparseAdam`, whatever the run's optimizer is): a class
    stands still until it comes up again, where Adam over the whole table would let it drift. Its count of steps is one
    for all rows. So the table can stay on the CPU (``bank``) and give the same numbers.

    Args:
        tokens: prompts of the first layer, at least 0.
        depth: layers that have prompts; None is all of ``layers``.
        step: each layer has so many fewer than the one before.
        class_tokens: prompts of each class in the first layer, at least 1.
        class_depth: layers that have them; None is all of ``layers``.
        class_step: each layer has so many fewer than the one before.
        beta: share of the task's own proxies, from 0 to 1; at 1 there is no second pass.
        gate: the gate's new value is behind a ``relu``, or behind tanh as a ``gru``'s.
        gate_dropout: of what the gate gives.
        biases: whether all biases of ``layers`` and outside the blocks are trained.
        bank: keep the prompts of the classes on the CPU, for data with thousands of classes.
    """

    tags = ("hybrid", ("tokens", "norms"))
    readings = ("feature",)
    identity_at_start = False
    moves_base = True
    needs = ("attend",)
    inference_cost = "every layer reads `tokens` more tokens"
    recommended = {"lr": 5e-4, "weight_decay": 0.0}

    def __init__(self, tokens: int = 10, depth: int | None = None, step: int = 0, class_tokens: int = 3,
                 class_depth: int | None = None, class_step: int = 0, beta: float = 0.5,
                 gate: Literal["relu", "gru"] = "relu", gate_dropout: float = 0.0, biases: bool = True,
                 bank: bool = False, **common: Any) -> None:
        super().__init__(**common)
        for what, count, least in (("tokens", tokens, 0), ("step", step, 0), ("class_tokens", class_tokens, 1),
                                   ("class_step", class_step, 0)):
            if count < least:
                raise ScionError(f"VPTSP: {what} {count} must be at least {least}")
        for what, layers in (("depth", depth), ("class_depth", class_depth)):
            if layers is not None and layers < 1:
                raise ScionError(f"VPTSP: {what} {layers} must be at least 1, or null for all layers")
        if not 0 <= beta <= 1 or not 0 <= gate_dropout < 1:
            raise ScionError(f"VPTSP: beta {beta} must lie in [0, 1], gate_dropout {gate_dropout} in [0, 1)")
        if gate not in ("relu", "gru"):
            raise ScionError(f"VPTSP: gate {gate!r} is neither 'relu' nor 'gru'")
        self.tokens, self.depth, self.step = tokens, depth, step
        self.class_tokens, self.class_depth, self.class_step = class_tokens, class_depth, class_step
        self.beta, self.gate, self.gate_dropout, self.biases, self.bank = beta, gate, gate_dropout, biases, bank
        self.number_of: dict[str, int] = {}

    # --------------------------------------------------------------------------------- the model

    def sites(self, anatomy: Anatomy) -> list[Site]:
        sites = anatomy.sites("attend", self.layers, self.name)
        return [site for number, site in enumerate(sites) if self._length(number) or self._class_length(number)]

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        sites = anatomy.sites("attend", self.layers, self.name)
        return {"number_of": {site.name: number for number, site in enumerate(sites)}}

    def length(self, site: Site) -> int:
        """Prompts of a layer."""
        return self._length(self.number_of[site.name])

    def class_length(self, site: Site) -> int:
        """Prompts that each class has in a layer."""
        return self._class_length(self.number_of[site.name])

    def _length(self, number: int) -> int:
        return _length(number, self.tokens, self.depth, self.step)

    def _class_length(self, number: int) -> int:
        return _length(number, self.class_tokens, self.class_depth, self.class_step)

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        if not self.biases:
            return []
        if not any(name.rpartition(".")[2] == "bias" for name, _ in anatomy.root.named_parameters()):
            raise ScionError(f"{self.name}: {anatomy.family} has no bias to train; set biases to false")
        return BitFit(layers=self.layers, name=self.name).base_parameters(anatomy)

    def build(self, site: Site) -> Graft:
        # Xavier-normal values of a tensor [1, tokens, dim], as in the paper's code.
        start = torch.randn(self.length(site), site.width) * math.sqrt(2 / (site.width * (self.tokens + 1)))
        return SwappedPrompts(site, start)

    # --------------------------------------------------------------------------------- training

    def training_module(self, pl_module: Any) -> nn.Module | None:
        task = pl_module.task
        if not hasattr(task, "new_head") or self.beta == 1:  # no task with proxies (`core.tasks.Embedding`)
            return None
        trainer = getattr(pl_module, "_trainer", None)
        if trainer is not None and trainer.world_size > 1:
            raise ScionError(f"{self.name}: its proxies go on from step to step in one process, and this run has "
                             f"{trainer.world_size}; set trainer.devices to 1")
        sizes = [(self.class_length(graft.site), graft.site.width) for graft in self.grafts]
        with seeded(self.seed, self.name, "beside"):
            return SemanticPath(sizes, len(task.classes), self.class_tokens,
                                lambda: task.new_head(pl_module.feature_dim), task.dim, self.gate, self.gate_dropout,
                                self.bank)

    def training_loss(self, pl_module: Any, batch: Any, outputs: Any) -> Tensor | None:
        path = pl_module.aside[key_of(self.name)] if key_of(self.name) in pl_module.aside else None
        if path is None:
            return None
        inputs, targets = batch
        classes, count = self._classes(targets)
        with self._showing(path.prompts(classes), count):
            features = pl_module.backbone(inputs)
        proxies = path(torch.unflatten(features, 0, (-1, count)), classes, pl_module.task.proxies, self.beta)
        return pl_module.task.loss(outputs, targets, proxies)

    def _classes(self, targets: Tensor) -> tuple[Tensor, int]:
        """The classes of a batch in their order, and how many samples each has."""
        labels = targets if targets.dim() == 1 else targets[:, 0]
        if not labels.is_floating_point():
            classes, counts = labels.unique_consecutive(return_counts=True)
            if len(classes.unique()) == len(classes) and int(counts.min()) == int(counts.max()):
                return classes, int(counts[0])
        raise ScionError(f"{self.name}: a batch must hold each of its classes once, with the same number of samples in "
                         "a row, which data.per_class does (the class MetricLearning, or a sampler of classes)")

    @contextlib.contextmanager
    def _showing(self, prompts: list[Tensor], count: int) -> Iterator[None]:
        """The model with the prompts [classes, tokens, dim] of each layer in place of its own, for ``count`` samples of
        each class."""
        grafts: list[Any] = self.grafts
        try:
            for graft, own in zip(grafts, prompts, strict=True):
                graft.shown = own.repeat_interleave(count, 0)
            yield
        finally:
            for graft in grafts:
                graft.shown = None


def _length(number: int, tokens: int, depth: int | None, step: int) -> int:
    return max(0, tokens - number * step) if depth is None or number < depth else 0


# ------------------------------------------------------------------------------------------------- beside the model


class SemanticPath(nn.Module):
    """What makes the proxies: the prompts of each class, the second head, the gate, and the running proxies G
    (``running`` [classes, dim], unit vectors, no parameter).

    Args:
        sizes: of each layer the prompts of a class, and their width.
        classes: number of classes.
        tokens: prompts of a class in the first layer.
        features: width of the feature.
        dim: width of a proxy.
        norm: whether the head begins with a layer norm.
        kind: of the gate.
        dropout: of what the gate gives.
        bank: whether the prompts stay on the CPU.
    """

    running: Tensor

    def __init__(self, sizes: list[tuple[int, int]], classes: int, tokens: int, make_head: Callable[[], nn.Module],
                 dim: int, kind: str, dropout: float, bank: bool) -> None:
        super().__init__()
        self.sizes = sizes
        # Xavier-normal values of a tensor [classes, tokens, dim], as in the paper's code.
        start = [torch.randn(classes, count * width) * math.sqrt(2 / (width * (tokens + classes)))
                 for count, width in sizes]
        self.table = (Bank if bank else nn.Embedding).from_pretrained(torch.cat(start, 1), freeze=False, sparse=True)
        self.head = make_head()
        self.gate = Gate(dim, kind, dropout)
        self.register_buffer("running", F.normalize(nn.init.xavier_uniform_(torch.empty(classes, dim)), dim=-1))

    def prompts(self, classes: Tensor) -> list[Tensor]:
        """Of each layer the prompts [classes, tokens, dim] of these classes [classes]."""
        rows = self.table(classes.to(self.table.weight.device)).to(classes.device)
        parts = rows.split([count * width for count, width in self.sizes], dim=1)
        return [torch.unflatten(part, 1, size) for part, size in zip(parts, self.sizes, strict=True)]

    def forward(self, features: Tensor, classes: Tensor, bias: Tensor, beta: float) -> Tensor:
        """Take the running proxies on, and give the proxies of all classes [all classes, dim], with the gradient of
        this step alone.

        Args:
            features: of the second pass [classes, samples, features].
            classes: those of the batch [classes].
            bias: the trained part of the proxies [all classes, dim].
            beta: its share.
        """
        p, kind = self.head(features), self.gate.from_input.weight.dtype
        with torch.autocast(p.device.type, enabled=False):
            p = F.normalize(p.to(kind), dim=-1)
            state = self.running[classes].to(kind)
            for sample in p.unbind(1):
                state = self.gate(sample, state)
            running = F.normalize(self.running.to(kind).index_copy(0, classes, state), dim=-1)
            self.running.copy_(running.detach())
            return F.normalize(beta * bias.to(kind) + (1 - beta) * running, dim=-1)


class Gate(nn.Module):
    """u, r = sigmoid(W x + U h + b); n = relu(W x + r * U h + b), or tanh; (1 - u) n + u h."""

    def __init__(self, dim: int, kind: str, dropout: float) -> None:
        super().__init__()
        self.from_input, self.from_state = nn.Linear(dim, 3 * dim), nn.Linear(dim, 3 * dim, bias=False)
        for weight in (self.from_input.weight, self.from_state.weight):
            for part in weight.detach().chunk(3):
                nn.init.xavier_uniform_(part)
        nn.init.zeros_(self.from_input.bias)
        self.activation: Callable[[Tensor], Tensor] = torch.relu if kind == "relu" else torch.tanh
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h [classes, dim] -> the new h [classes, dim]"""
        (xu, xr, xn), (hu, hr, hn) = self.from_input(x).chunk(3, -1), self.from_state(h).chunk(3, -1)
        u, r = torch.sigmoid(xu + hu), torch.sigmoid(xr + hr)
        return self.dropout((1 - u) * self.activation(xn + r * hn) + u * h)


class Bank(nn.Embedding):
    """A table that stays on the CPU, in its own type, wherever the modules around it go."""

    def _apply(self, fn: Any, recurse: bool = True) -> Bank:
        return self
