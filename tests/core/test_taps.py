"""Grafts that read another site than their own: recomputed, copied, failed, switched and routed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.compose import Fuse, Route, Split
from core.errors import ScionError
from core.graft import Carrier, Graft, checkpoint_activations
from core.peft import method_class
from tests.models import batch, make
from tests.toolkit import distance, outputs, randomize

OPTIONS: dict[str, dict[str, Any]] = {
    "AdaptFormer": {"bottleneck": 3, "dropout": 0.0},
    "ParallelAdapter": {"bottleneck": 3, "targets": ("attention", "o", "mlp")},
    "MixtureOfAdapters": {"kind": "dense", "adapters": 2, "bottleneck": 2, "targets": ("attention", "mlp")},
    "ConformerAdapter": {"bottleneck": 3, "kernel": 3},
    "Convpass": {"bottleneck": 3, "dropout": 0.0},
}
ON_IMAGES = [(name, family) for name in OPTIONS for family in ("timm_vit", "timm_swin")]
ELSEWHERE = [(name, family) for name in ("AdaptFormer", "ParallelAdapter") for family in ("bert", "albert", "t5")]


def _attached(name: str, family: str, **options: Any) -> tuple[nn.Module, Any]:
    model = make(family)
    method = method_class(name)(**{**OPTIONS[name], **options}).attach(model)
    randomize(method, size=0.3)
    return model, method


def _held(model: nn.Module) -> list[Tensor]:
    """What taps hold between two forwards."""
    return [module.tap.value for module in model.modules()
            if isinstance(module, Graft) and module.tap is not None and module.tap.value is not None]


@pytest.mark.parametrize(("name", "family"), [*ON_IMAGES, *ELSEWHERE])
def test_recomputed_blocks_give_the_same_gradients(name: str, family: str) -> None:
    inputs, gradients = batch(family), []
    for on in (False, True):
        model, method = _attached(name, family)
        checkpoint_activations(model, on)
        model(inputs).square().sum().backward()
        gradients.append([tensor.grad for tensor in method.trainable().values()])
        assert not _held(model)
    assert gradients[0] and all(one is not None and one.any() and torch.equal(one, two)
                                for one, two in zip(*gradients, strict=True))


def _fail(module: nn.Module, args: Any, output: Any) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("name", "family"), [("AdaptFormer", "timm_vit"), ("ParallelAdapter", "bert"),
                                              ("Convpass", "timm_swin")])
def test_copies_after_a_failed_forward(name: str, family: str, how: str) -> None:
    """A forward that ends between the two sites leaves nothing that a copy carries, and nothing that the next forward
    reads; a copy reads its own modules."""
    model, method = _attached(name, family)
    inputs, other = batch(family), batch(family, seed=5)
    expected = outputs(model, other)
    down = dissect(model).blocks[0].sites["mlp.down"].module
    handle = down.register_forward_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        outputs(model, inputs)
    assert _held(model), "the forward failed before anything was read: the test asks nothing"
    handle.remove()
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        twin = copy.deepcopy(model)
    assert not _held(twin)
    assert torch.equal(outputs(twin, other), expected) and torch.equal(outputs(model, other), expected)
    assert not _held(model)
    modules = {id(module) for module in twin.modules()}
    for graft in (module for module in twin.modules() if isinstance(module, Graft)):
        assert graft.tap is not None and id(graft.tap.site.module) in modules
        assert graft in Carrier.of(graft.tap.site.module).readers  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor.zero_()
    assert torch.equal(outputs(twin, other), expected) and not torch.equal(outputs(model, other), expected)


def test_what_has_not_run_is_not_read() -> None:
    """Called without the site that it reads: one clear line."""
    model, method = _attached("AdaptFormer", "timm_vit")
    block = dissect(model).blocks[0].module
    with pytest.raises(ScionError, match="0.mlp: 0.norm2, which is read there, has not run before it"):
        block.mlp(torch.zeros(1, 5, 32))  # type: ignore[operator]


def test_readers_go_with_their_method() -> None:
    """Switched off it reads nothing; removed, the site that it read has no hooks of ours any more."""
    model, method = _attached("AdaptFormer", "timm_vit")
    inputs = batch("timm_vit")
    with method.disabled():
        assert torch.equal(outputs(model, inputs), outputs(make("timm_vit"), inputs)) and not _held(model)
    norms = [block.sites["norm2"].module for block in dissect(model).blocks]
    assert all(Carrier.of(norm) is not None for norm in norms)
    method.remove()
    assert all(Carrier.of(norm) is None for norm in norms)
    assert torch.equal(outputs(model, inputs), outputs(make("timm_vit"), inputs))


@pytest.mark.parametrize(("name", "family"), [("AdaptFormer", "timm_swin"), ("ParallelAdapter", "bert")])
def test_routed_rows_read_their_own(name: str, family: str) -> None:
    """Each sample meets the adapter of its variant alone, and a variant without samples keeps nothing."""
    inputs = batch(family, size=4)
    model, alone = make(family), []
    route: Any = Route([method_class(name)(name=str(variant), **OPTIONS[name]) for variant in range(2)])
    route.attach(model)
    randomize(route, size=0.3)
    for variant in range(2):
        plain = make(family)
        method: Any = method_class(name)(name=str(variant), **OPTIONS[name]).attach(plain)
        with torch.no_grad():
            for key, tensor in method.trainable().items():
                tensor.copy_(route.trainable()[key.replace("peft.", route.prefix, 1)])
        alone.append(outputs(plain, inputs))
    assert distance(*alone) > 1e-2
    for rows in ([0, 1, 1, 0], [1, 1, 1, 1]):
        with route.route(rows):
            mixed = outputs(model, inputs)
        expected = torch.stack([alone[variant][i] for i, variant in enumerate(rows)])
        assert distance(mixed, expected) < 1e-5
        assert not _held(model)


@pytest.mark.parametrize("kind", [Fuse, Split])
def test_joined_methods_refuse_them(kind: Any) -> None:
    """Joined grafts stand for others at one site, and nobody would tell these what another site sees."""
    model = make("bert")
    with pytest.raises(ScionError, match="reads 0.mlp.up too"):
        kind([method_class("AdaptFormer")(name=name) for name in "ab"],
             **({"by": "token_type"} if kind is Split else {})).attach(model)
    assert not any(Carrier.of(module) for module in model.modules()) and not hasattr(model, "peft")
