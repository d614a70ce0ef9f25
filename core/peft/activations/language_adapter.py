"""MAD-X language adapters: bottlenecks, and an invertible map of the embedding (Pfeiffer et al. 2020,
arXiv:2005.00052)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site, renamed
from core.errors import ScionError
from core.graft import Graft
from core.peft.activations.houlsby import Init
from core.peft.activations.pfeiffer import Pfeiffer


class InvertibleGraft(Graft):
    """e = (e1, e2) becomes (y1, y2), y1 = e1 + F(e2), y2 = e2 + G(y1); F and G halve the width once more."""

    def __init__(self, site: Site, init: Init) -> None:
        super().__init__(site)
        self.F, self.G = (self._coupling(site.width // 2, init) for _ in "FG")

    @staticmethod
    def _coupling(half: int, init: Init) -> nn.Sequential:
        down, up = nn.Linear(half, half // 2), nn.Linear(half // 2, half)
        nn.init.zeros_(up.bias)
        if init == "zero_up":
            nn.init.zeros_(up.weight)
        else:
            nn.init.zeros_(down.bias)
            for linear in (down, up):
                nn.init.normal_(linear.weight, std=2e-2)
        return nn.Sequential(down, nn.ReLU(), up)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        e1, e2 = self._halves(y)
        y1 = e1 + self.F(e2)
        return torch.cat([y1, e2 + self.G(y1)], -1).to(y.dtype)

    def invert(self, y: Tensor) -> Tensor:
        """Undo of ``after``: y [..., dim] -> e [..., dim]."""
        y1, y2 = self._halves(y)
        e2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(e2), e2], -1).to(y.dtype)

    def _halves(self, y: Tensor) -> tuple[Tensor, Tensor]:
        one, two = y.to(self.F[0].weight.dtype).chunk(2, -1)  # type: ignore[arg-type]
        return one, two


class FurtherGraft(Graft):
    """A decoder's embedding goes through the encoder's map."""

    def __init__(self, site: Site, invertible: InvertibleGraft) -> None:
        super().__init__(site)
        self.invertible = [invertible]  # in a list: its tensors belong to the other graft

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.invertible[0].after(x, y)


class InverseGraft(Graft):
    """What enters the language-model head's projection goes back through the embedding's invertible map."""

    def __init__(self, site: Site, invertible: InvertibleGraft) -> None:
        super().__init__(site)
        self.invertible = [invertible]

    def before(self, x: Tensor) -> Tensor:
        return self.invertible[0].invert(x)


class LanguageAdapter(Pfeiffer):
    """Pfeiffer's bottlenecks with an invertible map of the embedding, to be trained as a language model and then kept,
    frozen, under a task's adapter: ``[LanguageAdapter(trainable=False), Pfeiffer()]``.

    Equation: h <- h + A(h) in each block, as Pfeiffer; at the embedding's output e = (e1, e2): y1 = e1 + F(e2),
        y2 = e2 + G(y1), F and G each U relu(D z + b_D) + b_U from dim / 2 over dim / 4; before a language-model head's
        projection e2 = y2 - G(y1), e1 = y1 - F(e2). Encoder and decoder share the map, as they share the embedding
    Trains: as Pfeiffer, and dim^2 / 2 + 3 dim / 2 at the embedding; BERT-base: 7,387,776, with drop_last 6,796,800
    Merges: no, the bottleneck is not linear
    Source: Pfeiffer et al. 2020, arXiv:2005.00052 (MAD-X), sections 4.1 and 4.2; without the last block: MAD-X 2.0,
        Pfeiffer et al. 2021, arXiv:2012.15562. Where there is no language-model head nothing is inverted, as in the
        paper's task training

    Args:
        reduction: the bottleneck is the block's width divided by this, rounded.
        bottleneck: its width, at least 1; None leaves it to ``reduction``.
        init: ``zero_up`` starts as the identity; ``normal`` (0.02, biases zero) as AdapterHub.
        invertible: whether the embedding has its map.
        drop_last: whether the last block goes without a bottleneck.
    """

    tags = ("additive", ("block",))
    recommended = {"lr": 1e-4, "weight_decay": 0.0, "head_lr": 1e-3}

    def __init__(self, reduction: float = 2, bottleneck: int | None = None, init: Init = "zero_up",
                 invertible: bool = True, drop_last: bool = False, **common: Any) -> None:
        super().__init__(reduction, bottleneck, init, **common)
        self.invertible, self.drop_last = invertible, drop_last

    def check(self, anatomy: Anatomy) -> None:
        width = anatomy.blocks[0].dim
        if not self.invertible:
            return
        if "embed" not in anatomy.stem:
            raise ScionError(f"{self.name} needs the role 'embed', which {anatomy.family} does not have: take "
                             "invertible=False")
        if width % 2 or width < 4:
            raise ScionError(f"{self.name}: the invertible map works on two halves of the embedding, which is {width} "
                             "wide: take invertible=False")
        for head in anatomy.stem.get("lm_head", []):
            if head.kind == "module" or head.in_features != width:
                raise ScionError(f"{self.name}: {head.name} does not project an embedding's {width} channels, so there "
                                 "is no place for the inverse: take invertible=False")

    def sites(self, anatomy: Anatomy) -> list[Site]:
        found = [site for site in super().sites(anatomy)
                 if not self.drop_last or site.block != anatomy.blocks[-1].index]
        if not self.invertible:
            return found
        embeddings = {id(site.module): renamed(site, width=anatomy.blocks[0].dim) for site in anatomy.stem["embed"]}
        return [*embeddings.values(), *found, *anatomy.stem.get("lm_head", [])]

    def build(self, site: Site) -> Graft:
        if site.role == "lm_head":
            return InverseGraft(site, self._map)
        if site.role != "embed":
            return super().build(site)
        if site.name in ("embed", "embed.0"):
            self._map = InvertibleGraft(site, self.init)
            return self._map
        return FurtherGraft(site, self._map)
