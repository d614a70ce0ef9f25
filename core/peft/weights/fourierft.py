"""FourierFT: a change that is sparse in the frequencies of the weight (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.json_types import Shapes
from core.method import PEFTMethod, check_shapes, shapes_by_site


class FourierGraft(Graft):
    """W + scale Re(ifft2(F)), where F [out, in] is c at fixed places and zero elsewhere.

    The real part is the transform of F's even part, of which one half of the columns says all: it costs half as much.
    """

    remade = True
    places: Tensor
    share: Tensor

    def __init__(self, site: Site, frequencies: int, scale: float, places: int, random: bool) -> None:
        super().__init__(site)
        shape = site.out_features, site.in_features
        generator = torch.Generator().manual_seed(places)
        u, v = torch.unravel_index(torch.randperm(shape[0] * shape[1], generator=generator)[:frequencies], shape)
        far = v > shape[1] // 2  # the opposite frequency stands for it
        u, v = torch.where(far, -u % shape[0], u), torch.where(far, shape[1] - v, v)
        alone = (v == 0) | (2 * v == shape[1])  # columns that are their own opposites
        self.shape = shape[1] // 2 + 1, shape[0]
        self.register_buffer("places", v * shape[0] + u, persistent=False)
        self.register_buffer("share", torch.where(alone, 1.0, 0.5), persistent=False)
        self.c = nn.Parameter(torch.randn(frequencies) if random else torch.zeros(frequencies))
        self.scale = scale

    def weight(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(self.c.dtype, torch.float32)  # there is no transform in half precision
        parts = self.scale * self.share.to(wide) * self.c.to(wide)
        spectrum = parts.new_zeros(self.shape[0] * self.shape[1]).index_add(0, self.places, parts).view(self.shape)
        # irfft takes the real part of the columns that are alone.
        change = torch.fft.irfft(torch.fft.ifft(spectrum).t(), n=weight.shape[1], dim=1)
        return change.to(weight.dtype).add_(weight)


class FourierFT(PEFTMethod):
    """A few trained frequencies of each weight's change, at places that all layers of one shape share.

    Equation: y = (W + scale Re(ifft2(F))) x + b, F [out, in] zero but for c at ``frequencies`` places, drawn once
    Trains: frequencies a target; BERT-base, q and v, 1,000 frequencies: 24,000
    Merges: W + scale Re(ifft2(F))
    Source: Gao et al. 2024, arXiv:2405.03003, section 3; the places are drawn by the seed 777 as in the released code,
        which starts c from a normal of 1 (init="normal"): zeros make the start exact. The learning rate is from memory

    Args:
        frequencies: trained entries of F, at least 1.
        scale: factor of the change; the paper's 300 is for language models and ViT, 100 to 150 for GLUE.
        targets: roles to adapt; None is every linear map of the blocks.
        init: ``zeros`` or ``normal``.
        places: seed of the places.
    """

    tags = ("reparameterised", ("linear",))
    linear_only = True
    mergeable = True
    recommended = {"lr": 1e-2, "weight_decay": 0.0}
    structure_types = {"shapes": Shapes}

    def __init__(self, frequencies: int = 1000, scale: float = 300.0, targets: Sequence[str] | None = ("q", "v"),
                 init: Literal["zeros", "normal"] = "zeros", places: int = 777, **common: Any) -> None:
        super().__init__(**common)
        if frequencies < 1 or scale == 0:
            raise ScionError(f"FourierFT: frequencies {frequencies} must be at least 1, scale {scale} not zero")
        if init not in ("zeros", "normal"):
            raise ScionError(f"FourierFT: init {init!r} must be 'zeros' or 'normal'")
        self.frequencies, self.scale, self.places, self.init = frequencies, scale, places, init
        self.targets = None if targets is None else tuple(targets)
        self.identity_at_start = init == "zeros"

    def check(self, anatomy: Anatomy) -> None:
        for site in self.sites(anatomy):
            if self.frequencies > site.in_features * site.out_features:
                raise ScionError(f"{self.name}: {site.name} has {site.in_features * site.out_features} places, fewer "
                                 f"than frequencies {self.frequencies}")

    def build(self, site: Site) -> Graft:
        return FourierGraft(site, self.frequencies, self.scale, self.places, self.init == "normal")

    def structure(self) -> dict[str, Any]:
        return {"shapes": shapes_by_site(self)}

    def restructure(self, structure: dict[str, Any]) -> None:
        check_shapes(self, structure.get("shapes", {}))
