"""`Graft.again`: the site's module once more, inside a graft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy, Site
from core.errors import ScionError
from core.graft import Graft
from core.method import PEFTMethod
from core.peft import LTSFT  # type: ignore[attr-defined]
from tests.models import batch, make
from tests.toolkit import distance, outputs, randomize


class Looking(Graft):
    """Leaves its site as it is, and keeps what a second run of it gives."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.one = nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def before(self, x: Tensor) -> Tensor:
        self.seen = [x, self.again(x)]
        return x * self.one


class Shift(Graft):
    """y + 1, and with ``first`` x + 1"""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.one = nn.Parameter(torch.ones(()))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.one


class Early(Shift):
    after = Graft.after

    def before(self, x: Tensor) -> Tensor:
        return x + self.one


class AtNorm2(PEFTMethod):
    """One kind of graft at the first block's norm."""

    def __init__(self, kind: type[Graft], **common: Any) -> None:
        super().__init__(**common)
        self.kind = kind

    def sites(self, anatomy: Anatomy) -> list[Site]:
        return anatomy.sites("norm2", (0,))

    def build(self, site: Site) -> Graft:
        return self.kind(site)


@pytest.mark.parametrize("order", [("looking", "early"), ("early", "looking")])
def test_what_a_second_run_sees(order: tuple[str, ...]) -> None:
    """The weights and outputs that other grafts make, whatever their order, and nothing before the site."""
    model, inputs = make("bert"), batch("bert")
    expected = outputs(model, inputs)
    found = {name: AtNorm2({"looking": Looking, "early": Early}[name], name=name).attach(model) for name in order}
    graft: Any = found["looking"].grafts[0]
    norm: Any = graft.site.module
    with found["early"].disabled():
        assert torch.equal(outputs(model, inputs), expected)
        assert torch.equal(graft.seen[1], norm.forward(graft.seen[0]))
    outputs(model, inputs)
    assert torch.equal(graft.seen[1], norm.forward(graft.seen[0]))
    AtNorm2(Shift, name="shift").attach(model)
    masks: Any = LTSFT(count=200, exclude=("q", "k", "v", "o", "mlp.up", "mlp.down", "embed")).attach(model)
    with torch.no_grad():
        for tensor in masks.trainable().values():
            tensor += 0.01
    masks.advance()
    randomize(masks)
    outputs(model, inputs)
    second = graft.seen[1]
    masks.merge()
    assert distance(second, norm.forward(graft.seen[0]) + 1) < 1e-6
    outputs(model, inputs)
    assert distance(graft.seen[1], second) < 1e-6


def test_a_failing_second_run_leaves_no_rewriting_behind() -> None:
    model, inputs = make("bert"), batch("bert")
    masks: Any = LTSFT(count=600).attach(model)
    masks.advance()
    method = AtNorm2(Looking).attach(model)
    graft: Any = method.grafts[0]
    graft.before = lambda x: graft.again(x[..., :-1])
    with pytest.raises(RuntimeError):
        outputs(model, inputs)
    assert torch._C._len_torch_function_stack() == 0
    del graft.before
    assert outputs(model, inputs).isfinite().all()
    with pytest.raises(ScionError, match="attached"):
        AtNorm2(Looking).attach(model)
