"""LoRA with other defaults: a scale, a start, a learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from core.peft.weights.lora import LoRA


class rsLoRA(LoRA):
    """LoRA whose scale keeps the size of the change at any rank.

    Equation: y = W x + b + (alpha / sqrt(rank)) B A dropout(x)
    Trains: rank (in + out) a target, as LoRA
    Merges: W + (alpha / sqrt(rank)) B A
    Source: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2; learning rate as LoRA's here

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
        root: whether the scale is alpha / sqrt(rank).
    """

    tags = ("reparameterised", ("linear",))

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), root: bool = True, **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, root, **common)


class LoRAPlus(LoRA):
    """LoRA whose B learns faster than its A.

    Equation: y = W x + b + (alpha / rank) B A dropout(x); lr(B) = lr_ratio lr(A)
    Trains: rank (in + out) a target, as LoRA
    Merges: W + (alpha / rank) B A
    Source: Hayou et al. 2024, arXiv:2402.12354, section 4; the ratio 16 is from memory. The learning rate is A's:
        LoRA's here divided by the root of the ratio

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of A, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
        lr_ratio: learning rate of B as a multiple of A's.
    """

    tags = ("reparameterised", ("linear", "optimizer"))
    recommended = {"lr": 1.25e-3, "weight_decay": 0.1}

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), lr_ratio: float = 16.0, **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, lr_ratio=lr_ratio, **common)


class PiSSA(LoRA):
    """LoRA that begins as the principal part of the weight.

    Equation: y = W x + b + s (B A - B_0 A_0) dropout(x); A_0 = sqrt(S_r / s) V_r^T, B_0 = U_r sqrt(S_r / s), for
        W = U S V^T and s = alpha / rank; A and B start as A_0 and B_0
    Trains: rank (in + out) a target, as LoRA
    Merges: W + s (B A - B_0 A_0)
    Source: Meng et al. 2024, arXiv:2404.02948, equations 2 to 4. The paper moves the frozen weight to W - s B_0 A_0;
        here it stays, and the same function is written as a change of rank 2 rank. The file holds A_0 and B_0

    Args:
        rank: rank of the change, at least 1.
        alpha: numerator of the scale; None is the rank.
        dropout: probability of dropping an input of the change, in [0, 1).
        targets: roles to adapt; None is every linear map of the blocks.
        start: ``principal``, or ``random`` as LoRA.
    """

    tags = ("reparameterised", ("linear",))
    recommended = {"lr": 5e-4, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, rank: int = 8, alpha: float | None = None, dropout: float = 0.0,
                 targets: Sequence[str] | None = ("q", "v"), start: Literal["random", "principal"] = "principal",
                 **common: Any) -> None:
        super().__init__(rank, alpha, dropout, targets, start=start, **common)
