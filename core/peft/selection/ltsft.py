"""LT-SFT: lottery-ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, parameter_sites
from core.errors import ScionError
from core.graft.sparse import DESCRIBED, SparseGraft, check_budget, described, entries_of
from core.method import AddsLoss, PEFTMethod, Staged
from core.method.options import not_negative
from core.peft.selection.full import all_parameters


class LTSFT(Staged, AddsLoss, PEFTMethod):
    """Trains everything, keeps the positions that moved most, rewinds, and trains those alone.

    Equation: I = positions of the K largest |theta_dense - theta_0|; theta = theta_0 + phi, phi = 0 outside I.
        Regularised in either stage by l1 sum |theta - theta_0| / N, N the number of all parameters of the model
    Trains: all in the dense stage, K in the sparse one (plus K positions to store)
    Merges: theta_0 + phi
    Source: Ansell et al. 2022, arXiv:2110.07560, section 3; Litschko et al. 2022 for rankers. Two stages: the command
        runs both; elsewhere fit, call ``advance()``, and fit again with a new optimizer

    Args:
        density: K as a share of all the model's parameters, in (0, 1]; at most what is not excluded.
        count: alternative to ``density``: how many to keep.
        l1_dense: weight of the regulariser in the dense stage.
        l1_sparse: weight of the regulariser in the sparse stage.
        exclude: roles that stay frozen (``("norm1", "norm2", "norm")`` in the paper's language masks).
    """

    tags = ("partial", ("entries",))
    mergeable = True
    moves_base = True
    inference_cost = "none once merged"
    recommended = {"lr": 5e-5, "weight_decay": 0.0}
    structure_types = {"stage": Literal["dense", "sparse"], **DESCRIBED}
    stages = ("dense", "sparse")
    mode = "train"

    keep: int
    """Entries to keep, on this model."""
    everything: int
    """Parameters of the model."""

    def __init__(self, density: float | None = None, count: int | None = None, l1_dense: float = 0.0,
                 l1_sparse: float = 0.0, exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        check_budget("LTSFT", density, count)
        not_negative("LTSFT", l1_dense=l1_dense, l1_sparse=l1_sparse)
        self.density, self.count = 0.05 if density is None and count is None else density, count
        self.l1 = {"dense": l1_dense, "sparse": l1_sparse}
        self.exclude = tuple(exclude)
        self.stage = "dense"

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        return all_parameters(anatomy, self.layers, self.exclude, self.name)

    def check(self, anatomy: Anatomy) -> None:
        total = self._size(anatomy)
        if self.count is not None and self.count > total:
            raise ScionError(f"LTSFT: count {self.count} is more than the {total} parameters to choose from")

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        share = max(1, round((self.density or 0) * anatomy.size))
        keep = min(share, self._size(anatomy)) if self.count is None else self.count
        return {"stage": "dense", "everything": anatomy.size, "keep": keep}

    def _size(self, anatomy: Anatomy) -> int:
        """How many parameters there are to choose from."""
        parameters = dict(anatomy.root.named_parameters())
        return sum(parameters[name].numel() for name in self.base_parameters(anatomy))

    @torch.no_grad()
    def advance(self, module: nn.Module | None = None) -> None:
        """From the dense stage to the sparse one: select, rewind to the start, and leave K values to train."""
        root = self.need_root()
        if self.stage == "sparse":
            raise ScionError("LTSFT: the sparse stage is the last one")
        parameters = dict(root.named_parameters())
        moves = [(parameters[name].detach() - start.to(parameters[name].device)).abs().flatten().float()
                 for name, start in self.base_at_start.items()]
        best = torch.cat(moves).topk(self.keep).indices.sort().values
        positions: dict[str, Tensor] = {}
        offset = 0
        for name, move in zip(self.base_at_start, moves, strict=True):
            mine = best[(best >= offset) & (best < offset + move.numel())] - offset
            if mine.numel():
                positions[name] = mine
            offset += move.numel()
        self._become_sparse(positions)

    def _become_sparse(self, positions: dict[str, Tensor]) -> None:
        root = self.need_root()
        parameters = dict(root.named_parameters())
        for name, start in self.base_at_start.items():
            if not start.is_meta:
                parameters[name].data.copy_(start)
            parameters[name].requires_grad_(False)
        self.base_at_start = {}
        self.rewind_buffers()
        for site in parameter_sites(root, positions):
            self.add_graft(SparseGraft(site, positions[site.name]))
        self.stage = "sparse"

    @property
    def adds_loss(self) -> bool:
        return any(self.l1.values())

    def loss_terms(self, module: Any, batch: Any, outputs: Any) -> Tensor | None:
        factor = self.l1[self.stage]
        if not factor:
            return None
        if self.stage == "sparse":
            moves = [graft.values.abs().sum() for graft in self.grafts if isinstance(graft, SparseGraft)]
        else:
            parameters = dict(self.need_root().named_parameters())
            moves = [(parameters[name] - start.to(parameters[name].device)).abs().sum()
                     for name, start in self.base_at_start.items()]
        return factor * torch.stack(moves).sum() / self.everything

    def structure(self) -> dict[str, Any]:
        return {"stage": self.stage, "entries": described(self.grafts)}

    def restructure(self, structure: dict[str, Any]) -> None:
        if structure.get("stage") == "sparse" and self.stage == "dense":
            here = {name: list(value.shape) for name, value in self.base_at_start.items()}
            entries = entries_of(structure)
            for name, (_, *shape) in entries.items():
                if here.get(name) != shape:
                    raise ScionError(f"{self.name}: {name} is {shape} in the file, {here.get(name, 'absent')} here")
            self._become_sparse({name: torch.zeros(k, dtype=torch.int32) for name, (k, *_) in entries.items()})
