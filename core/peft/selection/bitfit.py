"""BitFit: train the biases (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from core.anatomy import Anatomy
from core.errors import ScionError
from core.method import PEFTMethod
from core.method.options import excluded


class BitFit(PEFTMethod):
    """Trains the backbone's biases and nothing else.

    Equation: y = W x + (b + db), for every bias b of the backbone
    Trains: all biases; ViT-B/16 and BERT-base: 102,912
    Merges: the weights are the base's own
    Source: Ben Zaken et al. 2021, arXiv:2106.10199, section 3; learning rate of Cappellazzo et al. 2024 (PETL-AST)

    Args:
        targets: roles whose biases are trained; None is every bias outside a task head.
        exclude: roles whose biases stay frozen (``("patch_embed",)`` gives the PETL-AST count).
    """

    tags = ("partial", ("norms",))
    mergeable = True
    moves_base = True
    inference_cost = "none"
    recommended = {"lr": 5e-3, "weight_decay": 0.0}

    def __init__(self, targets: Sequence[str] | None = None, exclude: Sequence[str] = (), **common: Any) -> None:
        super().__init__(**common)
        self.roles, self.exclude = None if targets is None else tuple(targets), tuple(exclude)

    def base_parameters(self, anatomy: Anatomy) -> list[str]:
        left_out = set(excluded(self.name, self.exclude, anatomy))
        if self.roles is None:
            keep = anatomy.layer_indices(self.layers, self.name)
            other = tuple(f"{block.path}." for block in anatomy.blocks if block.index not in keep)
            names = [name for name, _ in anatomy.root.named_parameters()
                     if name.rpartition(".")[2] in ("bias", "in_proj_bias") and name not in anatomy.head_names()
                     and not name.startswith((*other, "peft."))]
        else:
            sites = anatomy.sites(self.roles, self.layers, self.name)
            for site in sites:
                parts = [part.role for part in anatomy.all_sites() if part.path == site.path and part.rows is not None]
                if site.rows is not None and not set(parts) <= set(self.roles):
                    raise ScionError(f"{self.name}: {site.name} shares one bias with the other parts of a fused "
                                     f"projection; take them all: {', '.join(parts)}")
            names = [site.bias_name for site in sites if site.bias is not None]
            names = list(dict.fromkeys(names))
        names = [name for name in names if name.rpartition(".")[0] not in left_out]
        if not names:
            raise ScionError(f"{self.name}: {anatomy.family} has no bias at {self.roles or 'any of its modules'}")
        return names
