"""What each of the two processes of `test_ddp` does: train every method of a list, together with the other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core import peft
from tests.core import ddp_fits
from tests.methods import Cell
from tests.models import WIDTH, make
from tests.toolkit import CLASSES, narrowed, problem, randomize

STEPS = 3
PATIENCE = timedelta(minutes=3)


class Classifier(nn.Module):
    """A backbone and a trained head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(narrowed(self.backbone(inputs)))


def trained(cell: Cell, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The method's tensors after 3 steps on this process's share of a batch of 4."""
    classifier = Classifier(make(cell.family))
    quiet = {"backbone_mode": "eval", **cell.quiet}
    method = cell.attach(classifier.backbone, **quiet)
    randomize(method)
    model: Any = classifier
    if world > 1:
        model = DistributedDataParallel(classifier, find_unused_parameters=bool(method.idle()))
    [(inputs, labels), _], _ = problem(cell.family, size=4)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    optimizer = torch.optim.SGD([p for p in classifier.parameters() if p.requires_grad], 0.1)
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[share]), labels[share]).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in copy.copy(method.tensors()).items()}


MOVING: dict[str, dict[str, Any]] = {
    "TriAdaptLoRA": {"rank": 4, "growth": 2, "warmup": 1, "interval": 2, "targets": ("q", "v")},
    "AdaLoRA": {"rank": 4, "target_rank": 1, "warmup": 1, "cooldown": 3, "interval": 1},
    "LIFT": {"rank": 2, "interval": 3},
    "SpIEL": {"rank": 2, "interval": 4, "window": 2},
    "RAMT": {"drop": 1.0},
}
"""Methods that change as they train: what they choose must be the same in both processes."""


def moved(name: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The method's tensors after 8 steps in which its schedule has acted, with SGD or its own optimizer."""
    classifier = Classifier(make("timm_vit"))
    method: Any = peft.make(name, MOVING[name]).attach(classifier.backbone)
    randomize(method, size=0.02)
    model: Any = classifier
    if world > 1:
        model = DistributedDataParallel(classifier, find_unused_parameters=bool(method.idle()))
    [(inputs, labels), _], _ = problem("timm_vit", size=4)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    optimizer = method.make_optimizer(method.param_groups(), lr=0.01) or torch.optim.SGD(method.param_groups(), lr=0.1)
    method.follow(optimizer, total=8, around=classifier)
    trainer = SimpleNamespace(accumulate_grad_batches=1)
    for _ in range(8):
        classifier.zero_grad()
        outputs = model(inputs[share])
        term = method.loss_terms(classifier, (inputs[share], labels[share]), outputs)
        (F.cross_entropy(outputs, labels[share]) + (0 if term is None else term)).backward()
        method.on_before_optimizer_step(trainer, classifier, optimizer)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in method.live_tensors().items()}


def work(rank: int, folder: str, cells: list[Cell], methods: bool) -> None:
    """Every cell in turn, every method that moves, and runs of a `FineTuner` (of every method, or of a few): the result
    or the error into a file each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE)
    tasks: dict[str, Callable[[], Any]] = {str(cell): functools.partial(trained, cell, rank, 2) for cell in cells}
    tasks |= {name: functools.partial(moved, name, rank, 2) for name in MOVING}
    tasks |= {f"fit {name}": functools.partial(ddp_fits.result, fit, Path(folder), rank, 2)
              for name, fit in ddp_fits.everything(methods).items()}
    tasks |= {"masks": functools.partial(ddp_fits.masks, Path(folder), rank, 2),
              "stopped": functools.partial(ddp_fits.stopped, Path(folder), rank, 2)}
    for name, task in tasks.items():
        result: Any
        try:
            result = task()
        except Exception as error:  # told to the test of this task; the others go on
            result = f"{type(error).__name__}: {error}"
        torch.save(result, Path(folder) / f"{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
