"""Quantize: other methods' weights in 1, 2 or 4 bits, in training and in the file (Jie et al. 2023, ICCV)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, parameter_sites
from core.errors import ScionError, listed, nearest
from core.graft import Graft
from core.method import Home, PEFTMethod

BITS = (1, 2, 4)


@functools.cache
def positive_levels(bits: int) -> tuple[float, ...]:
    """The levels above zero: each is the median of a normal variable between the middles to its neighbours. They are
    found by setting middles and medians in turn until nothing moves."""
    normal, count = NormalDist(), 2 ** (bits - 1)
    levels = [(2 * i + 1) / count for i in range(count)]
    moved = 1.0
    while moved > 1e-13:
        middles = [(one + other) / 2 for one, other in itertools.pairwise(levels)]
        shares = [0.5, *(normal.cdf(middle) for middle in middles), 1.0]
        medians = [normal.inv_cdf((one + other) / 2) for one, other in itertools.pairwise(shares)]
        moved = max(abs(one - other) for one, other in zip(medians, levels, strict=True))
        levels = medians
    return tuple(levels)


class QuantizedGraft(Graft):
    """Q(z) sigma + mu for z = (w - mu) / (sigma + 1e-5), Q the nearest level; in backward Q is the identity.

    mu and sigma are the mean and the unbiased deviation of the whole matrix, and have their part in the gradient. A
    matrix of zeros cannot be quantized: it is seen with a little noise from the seed added.
    """

    levels: Tensor
    noise: Tensor | None

    def __init__(self, site: Site, bits: int) -> None:
        super().__init__(site)
        self.bits = bits
        above = positive_levels(bits)
        self.register_buffer("levels", torch.tensor([*(-level for level in reversed(above)), *above]), persistent=False)
        matrix = site.full_weight
        noise = nn.init.trunc_normal_(torch.empty(matrix.shape), std=1e-3, a=-2e-3, b=2e-3)
        blank = not matrix.is_meta and not bool(matrix.detach().any())
        self.register_buffer("noise", noise if blank else None, persistent=False)
        self.loaded: tuple[Tensor, Tensor] | None = None
        """mu and sigma from a file, until training goes on: those of the quantized values would not be the same."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.loaded = None  # a checkpoint brings the values that training goes on from

    def _scale(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if self.loaded is not None and not (torch.is_grad_enabled() and matrix.requires_grad and self.training):
            mean, deviation = (value.to(matrix) for value in self.loaded)
            return mean, deviation
        self.loaded = None
        return matrix.mean(), matrix.std()

    def _codes(self, matrix: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
        z = (matrix - mean) / (deviation + 1e-5)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return z, torch.bucketize(z.detach(), middles.to(z.dtype))

    def _latent(self, matrix: Tensor) -> Tensor:
        return matrix if self.noise is None else matrix + self.noise.to(matrix)

    def weight(self, weight: Tensor) -> Tensor:
        latent = self._latent(weight)
        mean, deviation = self._scale(latent)
        z, codes = self._codes(latent, mean, deviation)
        return (self.levels.to(z.dtype)[codes] + (z - z.detach())) * deviation + mean

    def pack(self, tensor: Tensor) -> dict[str, Tensor]:
        """Codes of ``bits`` bits each, the first lowest, the last byte filled with zeros; mu and sigma."""
        latent = self._latent(tensor.detach())
        if latent.is_meta:
            return {"codes": latent.new_empty((latent.numel() * self.bits + 7) // 8, dtype=torch.uint8),
                    "scale": latent.new_empty(2, dtype=torch.float32)}
        with torch.no_grad():
            mean, deviation = self._scale(latent)
            codes = self._codes(latent, mean, deviation)[1].flatten().cpu().numpy().astype(np.uint8)
        bits = (codes[:, None] >> np.arange(self.bits, dtype=np.uint8)) & 1
        return {"codes": torch.from_numpy(np.packbits(bits.flatten(), bitorder="little")),
                "scale": torch.stack([mean, deviation]).float().cpu()}

    def unpack(self, parts: dict[str, Tensor], tensor: Tensor) -> None:
        """The quantized values themselves, with the mu and sigma that make them the same again."""
        bits = np.unpackbits(parts["codes"].cpu().numpy(), count=tensor.numel() * self.bits, bitorder="little")
        codes = (bits.reshape(-1, self.bits) << np.arange(self.bits, dtype=np.uint8)).sum(1)
        mean, deviation = parts["scale"].to(tensor)
        self.noise = None
        self.loaded = (mean, deviation)
        levels = self.levels.to(tensor)[torch.from_numpy(codes.astype(np.int64)).to(tensor.device)]
        tensor.copy_((levels * (deviation + 1e-5) + mean).view(tensor.shape))


class Quantize(PEFTMethod):
    """The matrices of the methods attached before it, trained and stored with a few bits a number.

    Equation: w -> Q((w - mu) / sigma) sigma + mu for each whole matrix, Q the nearest of 2^bits levels made for a
        normal variable (1 bit: +-0.67449); the gradient takes Q for the identity, and goes through mu and sigma
    Trains: nothing of its own. Stored: bits / 8 bytes a number + 8 a matrix; LoRA of rank 32 on q and v of ViT-B/16 in
        1 bit: 147,840 bytes
    Merges: not itself; a method under it that can be merged is merged as quantized
    Source: Jie et al. 2023, ICCV (Bi-LoRA, Bi-AdaptFormer). What the hosts train beside matrices (biases) stays as it
        is, and so does the task's head. A quantized start is no identity, since zeros cannot be had

    Args:
        bits: 1, 2 or 4.
        methods: names of the methods to quantize; None is all that are attached before.
    """

    tags = ("unified", ("bits", "composition"))
    trains_backbone = False
    inference_cost = "the quantized matrices are made in each forward, or merged with their method"

    def __init__(self, bits: int = 1, methods: Sequence[str] | None = None, **common: Any) -> None:
        super().__init__(**common)
        if bits not in BITS:
            raise ScionError(f"Quantize: bits {bits} must be one of {listed(BITS)}")
        self.bits, self.hosts = bits, None if methods is None else tuple(methods)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        home = getattr(anatomy.root, "peft", None)
        known = {name: method for name, method in home.methods.items() if method is not self} if isinstance(
            home, Home) else {}
        for name in self.hosts or ():
            if name not in known:
                raise ScionError(f"{self.name}: no method is called {name!r}{nearest(name, known)}; attached before it "
                                 f"are {listed(known) or 'none'}")
        found: list[str] = []
        for name in self.hosts or known:
            called = {id(graft) for graft in known[name].grafts} | {
                id(child) for graft in known[name].grafts for child in graft.modules() if isinstance(child, nn.Linear)}
            for path, module in known[name].module.named_modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() == 2 and id(module) not in called:
                        raise ScionError(f"{self.name}: {name} shares {path}.{leaf} among its grafts, or keeps it in a "
                                         "part of them, where it cannot be quantized")
                    if parameter.dim() == 2:
                        found.append(f"{known[name].prefix}{path}.{leaf}")
        return parameter_sites(anatomy.root, found)

    def build(self, site: Site) -> Graft:
        self.identity_at_start = False
        return QuantizedGraft(site, self.bits)

    def packings(self) -> dict[str, Graft]:
        return {graft.site.weight_name: graft for graft in self.grafts if isinstance(graft, QuantizedGraft)}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.grafts:
            raise ScionError(f"{self.name} quantizes other methods: put it behind one, as in peft: [LoRA, Quantize]")
        super().on_fit_start(trainer, pl_module)
