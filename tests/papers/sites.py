"""What the tests of single sites share: a site's weight as a matrix, and a site compared with its paper's equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core.anatomy import Site
from core.graft import Graft, connect
from tests.toolkit import distance


def meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A full-size model without values."""
    with torch.device("meta"):
        return build()


def vit_b16() -> nn.Module:
    """The sheets' V."""
    import timm

    return meta(lambda: timm.create_model("vit_base_patch16_224", num_classes=0))


def bert_base() -> nn.Module:
    """The sheets' B, pooler included."""
    from transformers import BertConfig, BertModel

    return meta(lambda: BertModel(BertConfig()))


def names(method: Any) -> set[str]:
    """Names in the backbone of the tensors that a method moves."""
    return set(method.start)


def matrix(graft: Graft) -> Tensor:
    """The frozen weight at a graft's site, W [out, in]."""
    return graft.site.matrix(graft.site.full_weight.detach())


def shift(graft: Graft) -> Tensor:
    """The frozen bias at a graft's site [out]; zeros where there is none."""
    bias = graft.site.bias
    return torch.zeros(graft.site.out_features).to(matrix(graft)) if bias is None else bias.detach()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in double precision."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(graft: Graft, x: Tensor) -> Tensor:
    """The site's own channels of what its module gives for ``x``, with all that stands there."""
    return graft.site.take(graft.site.module(x))


def check_equation(graft: Graft, equation: Callable[[Tensor], Tensor]) -> None:
    """The site maps x [2, 3, in] as ``equation`` does, with the same gradient in x and in all that is trained."""
    x = numbers(2, 3, graft.site.module.in_features).requires_grad_()  # type: ignore[arg-type]
    tensors = [x, *(p for p in graft.parameters() if p.requires_grad)]
    found, expected = run(graft, x), equation(x)
    assert distance(found.detach(), expected.detach()) < 1e-10
    weights = numbers(*expected.shape, seed=1)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), tensors) for y in (found, expected)), strict=True)
    assert all(bool(two.any()) and distance(one, two) < 1e-9 for one, two in pairs)


def check_effective(graft: Graft, weight: Callable[[Tensor], Tensor]) -> None:
    """As `check_equation`, for a method that is an effective weight: ``weight`` takes W [out, in]. Merging gives the
    same one."""
    check_equation(graft, lambda x: x @ weight(matrix(graft)).t() + shift(graft))
    assert distance(graft.merged(matrix(graft)).detach(), weight(matrix(graft)).detach()) < 1e-10


def bare(method: Any, module: nn.Module) -> Any:
    """One of the method's grafts on a module by itself, connected."""
    site = Site(name="0.q", role="q", path="", module=module, block=0, width=module.out_features)  # type: ignore
    graft = method.build(site).to(next(module.parameters()).dtype)
    connect(graft)
    return graft
