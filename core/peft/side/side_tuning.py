"""Side-tuning: a small network blended with a frozen one (Zhang et al. 2020, arXiv:1912.13503)."""

from __future__ import annotations

import inspect
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft, Tap
from core.method import PEFTMethod
from core.method.options import at_least

Network = Literal["mlp", "alexnet"]


class Blend(Graft):
    """sigmoid(a) f(x) + (1 - sigmoid(a)) g(x), f the frozen network, g the side network, a = 0 at the start"""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.a = nn.Parameter(torch.zeros(()))

    def side(self, x: Tensor, y: Tensor) -> Tensor:
        """The side network's output in the shape of y, for the root's input x."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        share = torch.sigmoid(self.a)
        return (share * y.to(self.a.dtype) + (1 - share) * self.side(x, y)).to(y.dtype)


class Padding(Graft):
    """Notices which tokens of a batch are none, where the model is told."""

    def __init__(self, site: Site, stack: str) -> None:
        super().__init__(site)
        self.names = list(inspect.signature(type(site.module).forward).parameters)[1:]
        self.name = f"{stack}_attention_mask" if stack else "attention_mask"
        self.mask: Tensor | None = None

    def notice(self, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.batch is not None and not len(self.batch):  # no row will ask
            return
        self.mask = {**dict(zip(self.names, args, strict=False)), **kwargs}.get(self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mask": None}


class SideMLP(Blend):
    """g = U gelu(D z + b) + c, z the state that enters the first block; its mean over tokens where f is one vector."""

    def __init__(self, site: Site, first: Site, dim: int, hidden: int, padding: Padding) -> None:
        super().__init__(site)
        self.tap, self.padding = Tap(first), [padding]
        assert first.around is not None
        self.channels_first = first.around.described.heads is None
        self.down, self.up = nn.Linear(first.width, hidden), nn.Linear(hidden, dim)

    def side(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.read().to(self.down.weight.dtype)
        z = (z.movedim(1, -1) if self.channels_first else z).flatten(1, -2)
        out = self.up(F.gelu(self.down(z)))
        mask, self.padding[0].mask = self.padding[0].mask, None
        out = self.mean(out, mask) if y.dim() == 2 else out
        if out.shape != y.shape:
            raise ScionError(f"{self.site.name}: the side network gives {list(out.shape)}, the backbone "
                             f"{list(y.shape)}; say its width with dim=...")
        return out

    def mean(self, out: Tensor, mask: Tensor | None) -> Tensor:
        """out [batch, tokens, dim] -> its mean over the tokens that are no padding [batch, dim]."""
        kept = None if mask is None else mask if self.batch is None else mask[self.batch]
        if kept is None or kept.shape != out.shape[:2]:
            return out.mean(1)
        return (out * kept.to(out)[..., None]).sum(1) / kept.to(out).sum(1, keepdim=True).clamp(min=1)


class SideAlexNet(Blend):
    """g = P alexnet(image), P [dim, 9216] without a bias"""

    def __init__(self, site: Site, dim: int, pretrained: bool) -> None:
        super().__init__(site)
        from torchvision.models import alexnet

        whole = alexnet(weights="DEFAULT" if pretrained else None)
        self.features, self.pool = whole.features, whole.avgpool
        for module in self.features.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        self.projection = nn.Linear(256 * 6 * 6, dim, bias=False)

    def side(self, x: Tensor, y: Tensor) -> Tensor:
        if x.dim() != 4 or y.dim() != 2:
            raise ScionError(f"{self.site.name}: AlexNet reads images [batch, 3, height, width] and gives one vector "
                             f"each; here come {list(x.shape)} and {list(y.shape)}")
        return self.projection(self.pool(self.features(x.to(self.a.dtype))).flatten(1))


class SideTuning(PEFTMethod):
    """A small network beside the whole frozen backbone; their outputs are blended by one trained number.

    Equation: out = sigmoid(a) f(x) + (1 - sigmoid(a)) g(x), a = 0 at the start
    Trains: 1 and g: for the MLP hidden (width + dim) + hidden + dim, for AlexNet 2,469,696 + 9,216 dim: ViT-B/16,
        network="alexnet": 9,547,585
    Merges: no, the side network stays
    Source: Zhang et al. 2020, arXiv:1912.13503; AlexNet as in the VPT authors' comparison. Nothing is kept for backward
        in the backbone. The paper leaves the side network open: the default here is a bottleneck on what enters the
        first block, token by token, which any backbone has (of several stacks the last one's); padding is left out of
        its mean. The learning rate is a customary one

    Args:
        network: ``mlp``, or ``alexnet`` (torchvision's) for images.
        hidden: width of the MLP.
        dim: width of the output; None is that of the last block.
        pretrained: whether AlexNet starts with torchvision's published weights (a download).
    """

    tags = ("additive", ("side",))
    readings = ("feature",)
    identity_at_start = False
    inference_cost = "the side network runs beside the backbone"
    recommended = {"lr": 1e-3, "weight_decay": 1e-4}
    start_only = ("pretrained",)  # the adapter holds the trained values

    first_block: Site
    """What the MLP reads, on this model."""
    width: int
    stack: str

    def __init__(self, network: Network = "mlp", hidden: int = 64, dim: int | None = None, pretrained: bool = False,
                 **common: Any) -> None:
        super().__init__(**common)
        if network not in get_args(Network):
            raise ScionError(f"SideTuning: network {network!r} is not one of {', '.join(get_args(Network))}")
        at_least(1, "SideTuning", hidden=hidden, dim=dim)
        if pretrained and network != "alexnet":
            raise ScionError("SideTuning: pretrained is for network='alexnet'")
        self.network, self.hidden, self.dim, self.pretrained = network, hidden, dim, pretrained

    def sites(self, anatomy: Anatomy) -> list[Site]:
        if self.layers is not None:
            raise ScionError(f"{self.name}: stands beside the whole backbone, so that layers={self.layers} has no "
                             "meaning")
        return [*([anatomy.inputs] if self.network == "mlp" else []), *anatomy.stem["feature"]]

    def numbers(self, anatomy: Anatomy) -> dict[str, Any]:
        stack = anatomy.stacks[-1]
        width = self.dim or anatomy.blocks[-1].dim
        return {"first_block": stack.blocks[0].sites["block"], "width": width, "stack": stack.name}

    def build(self, site: Site) -> Graft:
        if self.network == "alexnet":
            return SideAlexNet(site, self.width, self.pretrained)
        if site.role == "inputs":
            self._padding = Padding(site, self.stack)
            return self._padding
        return SideMLP(site, self.first_block, self.width, self.hidden, self._padding)
