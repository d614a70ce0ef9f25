"""Checks of Compacter: the checks by their numbers there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import load_adapter
from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.rows import Row, Variant, norms_count
from tests.toolkit import distance, outputs, randomize


def compacter_count(anatomy: Anatomy, method: Any) -> int:
    total = method.n ** 3 if method.is_shared else 0
    for site in method.sites(anatomy):
        d, m, n = site.width, method.width(site.width), method.n
        maps = 2 * d * m // n if method.rank is None else 2 * method.rank * (d + m)
        total += maps + m + d + (0 if method.is_shared else 2 * n ** 3)
    return total + norms_count(anatomy, method.norms)


ROWS = {
    "Compacter": Row(
        {"shared": Variant({"bottleneck": 8, "std": 0.1}),
         "phm": Variant({"bottleneck": 4, "n": 2, "rank": None, "shared": False, "std": 0.1}),
         "norms": Variant({"bottleneck": 4, "rank": 2, "std": 0.1, "norms": ("norm1", "norm2")}, moves_base=True)},
        trained=compacter_count,
        cards=(("bert_base", {}, 57_088),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"n": 0}, "n 0"), ({"n": 5}, "must divide"), ({"rank": 0}, "rank 0"),
             ({"targets": ("q",)}, "no hidden state")),
        random=True, commutes=False, operators=20, saved=0.8, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 4},
    ),
    "CompacterPlusPlus": Row(
        {"shared": Variant({"bottleneck": 8, "std": 0.1}, learns={"lr": 1e-2})},
        trained=compacter_count,
        cards=(("bert_base", {}, 28_576),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"n": 5}, "must divide")),
        random=True, commutes=False, operators=20, saved=0.8,
        artifact={"bottleneck": 4},
    ),
}

Compacter: Any = method_class("Compacter")
CompacterPlusPlus: Any = method_class("CompacterPlusPlus")
NORMS = ("norm1", "cross.norm", "norm2", "norm")


def t5_base(vocabulary: int = 32_100) -> nn.Module:
    from transformers import T5Config, T5Model

    with torch.device("meta"):
        return T5Model(T5Config(vocab_size=vocabulary, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))


def _by_hand(rule: Tensor, phm: Any) -> Tensor:
    """H = sum_i A_i (x) s_i t_i, with torch.kron."""
    small = [phm.B[i] if "B" in phm._parameters else phm.s[i] @ phm.t[i] for i in range(len(rule))]
    return torch.stack([torch.kron(rule[i], small[i]) for i in range(len(rule))]).sum(0)


def test_1_one_adapter() -> None:
    """d = 768, r = 24, n = 4: 1,584 in the factors, 792 in the shifts; the rule apart."""
    method = Compacter(layers=(0,), targets=("mlp",)).attach(t5_base())
    sizes = {name.rpartition("mlp.")[2]: t.numel() for name, t in method.trainable().items()}
    [graft] = method.grafts
    assert [p.numel() for p in (graft.down.s, graft.down.t, graft.up.s, graft.up.t)] == [768, 24, 24, 768]
    assert sum(p.numel() for p in graft.parameters()) == 2_376 and sum(sizes.values()) == 2_376 + 64


@pytest.mark.parametrize(("cls", "options", "own", "percent"), [
    (Compacter, {}, 114_112, 0.073), (CompacterPlusPlus, {}, 57_088, 0.047),
    (Compacter, {"n": 12, "rank": None, "shared": False, "std": 0.01}, 351_360, 0.179)])
def test_2_and_3_counts(cls: Any, options: dict[str, Any], own: int, percent: float) -> None:
    """T5-base: Compacter 161,728 with the norms, Compacter++ 104,704, PHM-Adapter 398,976."""
    model = t5_base()
    base = sum(p.numel() for p in model.parameters())
    counts = cls(norms=NORMS, **options).attach(model).counts()
    assert base == 222_882_048 and (counts["method"], counts["norms"]) == (own, 47_616)
    assert round(100 * (own + 47_616) / base, 3) == percent


def test_4_norms() -> None:
    """62 vectors: 25 in the encoder, 37 in the decoder."""
    method = Compacter(norms=NORMS).attach(t5_base())
    assert len(method.norm_names) == 62 and sum("encoder" in name for name in method.norm_names) == 25


@pytest.mark.parametrize("rank", [1, 2, None])
def test_5_sums_of_kronecker_products(rank: int | None) -> None:
    """H [in, out] by torch.kron, B_i of rank ``rank``, and the whole layer by hand."""
    model = make("timm_vit", dtype=torch.float64)
    method = Compacter(bottleneck=8, rank=rank, std=0.1).attach(model)
    randomize(method)
    graft, rule = method.grafts[1], method.module.rule.A
    for phm, shape in ((graft.down, (32, 8)), (graft.up, (8, 32))):
        assert phm.matrix.shape == shape and distance(phm.matrix, _by_hand(rule, phm)) < 1e-12
        if rank is not None:
            assert all(torch.linalg.matrix_rank(phm.s[i] @ phm.t[i]) == rank for i in range(4))
    x = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    down, up = _by_hand(rule, graft.down), _by_hand(rule, graft.up)
    expected = x + F.gelu(x @ down + graft.down.bias, approximate="tanh") @ up + graft.up.bias
    assert distance(graft(x, x, verb="after"), expected) < 1e-12


def test_5_one_rule_for_all(tmp_path: Any) -> None:
    """Counted and saved once, one still after a copy; each adapter hears of a change; its gradient is their sum."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    method = Compacter(bottleneck=8, std=0.1).attach(model)
    randomize(method)
    assert [name for name in method.tensors() if name.endswith(".A")] == ["peft.Compacter.rule.A"]
    copied: Any = copy.deepcopy(model)
    assert len({id(phm.rule[0]) for graft in copied.peft.methods["Compacter"].grafts
                for phm in (graft.down, graft.up)}) == 1

    before = [(graft.down.matrix.detach(), graft.up.matrix.detach()) for graft in method.grafts]
    with torch.no_grad():
        method.module.rule.A[0, 0, 0] += 1
    assert all(not torch.equal(one, two) for graft, old in zip(method.grafts, before, strict=True)
               for one, two in zip(old, (graft.down.matrix, graft.up.matrix), strict=True))

    model(inputs).square().sum().backward()
    whole = method.module.rule.A.grad.clone()
    parts = torch.zeros_like(whole)
    for graft in method.grafts:  # the rule of one map after the other stands alone
        for phm in (graft.down, graft.up):
            own, shared = copy.deepcopy(phm.rule[0]), phm.rule
            own.zero_grad()
            phm.rule = [own]
            model(inputs).square().sum().backward()
            phm.rule = shared
            parts += own.A.grad
    torch.testing.assert_close(whole, parts)

    method.save(tmp_path)
    fresh = make("timm_vit", dtype=torch.float64)
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_6_start() -> None:
    """Near the base and not it; from A = 0 a map alone learns A before s and t, two in a row never would: refused."""
    model, inputs = make("timm_vit", dtype=torch.float64), batch("timm_vit", dtype=torch.float64)
    base = outputs(model, inputs)
    method = Compacter(bottleneck=8).attach(model)
    assert 0 < distance(outputs(model, inputs), base) < 1e-5
    with torch.no_grad():
        method.module.rule.A.zero_()
    assert torch.equal(outputs(model, inputs), base)
    phm: Any = method.grafts[0].down
    phm(torch.ones(2, 32, dtype=torch.float64)).sum().backward()
    assert method.module.rule.A.grad.any() and not phm.s.grad.any() and not phm.t.grad.any()
    model.zero_grad()
    model(inputs).square().sum().backward()
    assert not method.module.rule.A.grad.any()
    with pytest.raises(ScionError, match="std 0"):
        Compacter(std=0.0)


@pytest.mark.parametrize("options", [{"n": 5}, {"bottleneck": 6}, {"reduction": 3}])
def test_7_n_divides_width_and_bottleneck(options: dict[str, Any]) -> None:
    with pytest.raises(ScionError, match=r"n \d must divide the width 32 .* bottleneck \d+"):
        Compacter(**options).attach(make("timm_vit"))


def test_8_two_a_block_and_norms_by_choice() -> None:
    for family in ("timm_vit", "bert", "t5"):
        model = make(family)
        anatomy = dissect(make(family))
        method = Compacter(bottleneck=8).attach(model)
        assert [(g.site.block, g.site.role) for g in method.grafts if g.site.block == 0] == [
            (0, "attention"), (0, "mlp")]
        assert len(method.grafts) == 2 * len(anatomy.blocks) and method.counts()["norms"] == 0


def test_9_materialise() -> None:
    """Kept, each H is made once and gives the same outputs; a changed factor, and training, have their own."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method = Compacter(bottleneck=8, std=0.1).attach(model)
    randomize(method)
    expected, phm, made = outputs(model, inputs), method.grafts[0].down, []
    original = phm.made
    phm.made = lambda: made.append(1) or original()
    method.materialise()
    assert all(torch.equal(outputs(model, inputs), expected) for _ in range(3)) and len(made) == 1
    with torch.no_grad():
        method.module.rule.A.add_(0.1)
    changed = outputs(model, inputs)
    assert len(made) == 2 and not torch.equal(changed, expected)
    method.materialise(False)
    assert torch.equal(outputs(model, inputs), changed) and len(made) == 3
    method.materialise()
    model(inputs).sum().backward()
    assert all(tensor.grad is not None for tensor in method.trainable().values())
    assert torch.equal(outputs(copy.deepcopy(model), inputs), changed)
