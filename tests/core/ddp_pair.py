"""What each of the two processes of `test_ddp` does: train every method of a list, together with the other."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
    quiet = {"backbone_mode": "eval"} | ({"dropout": 0.0} if "dropout" in cell.new().config else {})
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


def work(rank: int, folder: str, cells: list[Cell]) -> None:
    """Every cell in turn, its result or its error into a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=PATIENCE)
    for cell in cells:
        result: Any
        try:
            result = trained(cell, rank, 2)
        except Exception as error:  # told to the test of this cell; the others go on
            result = f"{type(error).__name__}: {error}"
        torch.save(result, Path(folder) / f"{cell}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
