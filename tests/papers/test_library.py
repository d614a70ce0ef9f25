"""Checks of LoRA, rsLoRA, PiSSA, DoRA, VeRA, FourierFT, LoHa, LoKr, OFT, BOFT, IA3, Bone, Bat: the same function as
Hugging Face's library, where the two mean the same, on one linear map."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy
from core.peft import method_class
from tests.papers.sites import bare
from tests.rows import NOT_LINEAR, RANK, WIDE, Row, Variant, low_rank_count, target_shapes
from tests.toolkit import distance, seeded


def oft_count(anatomy: Anatomy, method: Any) -> int:
    return sum(i * (method.block - 1) // 2 for i, _ in target_shapes(anatomy, method))


def boft_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.factors * i * (method.block - 1) // 2 + o for i, o in target_shapes(anatomy, method))


def dora_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o) + o for i, o in target_shapes(anatomy, method))


ROWS = {
    "rsLoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=low_rank_count,
        bad=(({"rank": 0}, "rank 0"), ({"dropout": 1.5}, "dropout 1.5"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
    "PiSSA": Row(
        {"q, v": Variant(RANK, learns_on=dict.fromkeys(("timm_swin", "bert", "clip_vision"), {"lr": 1e-2})),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=low_rank_count,
        bad=(({"rank": 0}, "rank 0"), ({"rank": 99}, "rank 99"), ({"start": "best"}, "'best'"), *NOT_LINEAR),
        weights=True, commutes=True, operators=14, saved=0.8, stored=2.0,
        artifact={"rank": 1},
    ),
    "OFT": Row(
        {"q, v": Variant({"block": 4}, learns={"lr": 2e-2}),
         "all": Variant({"block": 2, "terms": 0, **WIDE}, learns={"lr": 3e-3})},
        trained=oft_count,
        cards=(("bert_base", {}, 285_696),),
        bad=(({"block": 1}, "block 1"), ({"terms": 1}, "terms 1"), ({"block": 13}, "block 13"),
             ({"dropout": 1.0}, "dropout 1"), ({"limit": 0.0}, "limit 0"), *NOT_LINEAR),
        weights=True, commutes=None, operators=26, saved=0.8,
        artifact={"block": 2},
    ),
    "BOFT": Row(
        {"q, v": Variant(learns={"lr": 2e-2}), "all": Variant({"block": 2, "factors": 2, **WIDE})},
        trained=boft_count,
        cards=(("bert_base", {}, 46_080),),
        bad=(({"block": 3}, "block 3"), ({"factors": 0}, "factors 0"), ({"block": 26}, "block 26"), *NOT_LINEAR),
        weights=True, commutes=False, operators=26, saved=0.8,
        artifact={"block": 2},
    ),
    "DoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=dora_count,
        cards=(("bert_base", {}, 313_344),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": -1}, "rank -1"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, commutes=False, stopped=(".A", ".B"), operators=26, saved=0.92,
        artifact={"rank": 1},
    ),
    "LoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE}),
         "dropout": Variant({**RANK, "dropout": 0.5})},
        trained=low_rank_count,
        cards=(("vit_b16", {}, 294_912), ("bert_base", {}, 294_912)),
        bad=(({"rank": 0}, "rank 0"), ({"rank": -1}, "rank -1"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
}

peft: Any = pytest.importorskip("peft", reason="peft is not installed")


class One(nn.Module):
    """What the library wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def _lora(mine: Any, theirs: Any) -> dict[str, Tensor]:
    return {"lora_A.default.weight": mine.A, "lora_B.default.weight": mine.B}


def _skewed(mine: Any) -> Tensor:
    """Our free entries as the library's whole blocks, of which it reads the skew part."""
    rows, columns = torch.triu_indices(mine.block, mine.block, 1)
    whole = mine.Q.new_zeros(*mine.Q.shape[:-1], mine.block, mine.block)
    whole[..., rows, columns] = 2 * mine.Q.detach()
    return whole


Rename = Callable[[Any, Any], dict[str, Tensor]]
TABLE: list[tuple[str, dict[str, Any], str, dict[str, Any], Rename]] = [
    ("LoRA", {"rank": 4, "alpha": 6}, "LoraConfig", {"r": 4, "lora_alpha": 6}, _lora),
    ("rsLoRA", {"rank": 4, "alpha": 6}, "LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}, _lora),
    ("PiSSA", {"rank": 4, "alpha": 6}, "LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}, _lora),
    ("DoRA", {"rank": 4, "alpha": 6}, "LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True},
     lambda mine, theirs: {**_lora(mine, theirs), "lora_magnitude_vector.default.weight": mine.magnitude}),
    ("VeRA", {"rank": 4}, "VeraConfig", {"r": 4},
     lambda mine, theirs: {"vera_lambda_b.default": mine.b, "vera_lambda_d.default": mine.d,
                           "vera_A.default": mine.projections[0].A, "vera_B.default": mine.projections[0].B}),
    ("FourierFT", {"frequencies": 20, "scale": 150.0}, "FourierFTConfig", {"n_frequency": 20, "scaling": 150.0},
     lambda mine, theirs: {"fourierft_spectrum.default": mine.c}),
    ("LoHa", {"rank": 4, "alpha": 6}, "LoHaConfig", {"r": 4, "alpha": 6},
     lambda mine, theirs: {"hada_w1_a.default": mine.B_1, "hada_w1_b.default": mine.A_1, "hada_w2_a.default": mine.B_2,
                           "hada_w2_b.default": mine.A_2}),
    ("LoKr", {"rank": 2, "alpha": 6}, "LoKrConfig", {"r": 2, "alpha": 6},
     lambda mine, theirs: {"lokr_w1.default": mine.C, "lokr_w2_a.default": mine.B, "lokr_w2_b.default": mine.A}),
    ("LoKr", {"rank": 8, "alpha": 8}, "LoKrConfig", {"r": 8, "alpha": 8},
     lambda mine, theirs: {"lokr_w1.default": mine.C, "lokr_w2.default": mine.A}),
    ("OFT", {"block": 4}, "OFTConfig", {"oft_block_size": 4, "r": 0, "use_cayley_neumann": True},
     lambda mine, theirs: {"oft_R.default.weight": mine.Q}),
    ("OFT", {"block": 4, "terms": 0}, "OFTConfig", {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False},
     lambda mine, theirs: {"oft_R.default.weight": mine.Q}),
    ("BOFT", {"block": 4}, "BOFTConfig", {"boft_block_size": 4},
     lambda mine, theirs: {"boft_R.default": _skewed(mine), "boft_s.default": mine.s[:, None]}),
    ("IA3", {"outputs": ("q",), "inputs": ()}, "IA3Config", {"feedforward_modules": []},
     lambda mine, theirs: {"ia3_l.default": mine.l[:, None]}),
    ("IA3", {"outputs": (), "inputs": ("q",)}, "IA3Config", {"feedforward_modules": ["q"]},
     lambda mine, theirs: {"ia3_l.default": mine.l[None]}),
    ("Bone", {"rank": 6}, "MissConfig", {"r": 6}, lambda mine, theirs: {"miss_block.default": mine.D}),
    ("Bat", {"rank": 8}, "MissConfig", {"r": 8, "init_weights": "bat"},
     lambda mine, theirs: {"miss_block.default": mine.Q}),
]


@pytest.mark.parametrize(("name", "options", "config", "settings", "rename"), TABLE,
                         ids=[f"{i}-{row[0]}" for i, row in enumerate(TABLE)])
def test_same_function(name: str, options: dict[str, Any], config: str, settings: dict[str, Any], rename: Rename
                       ) -> None:
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = One().eval()
        theirs = copy.deepcopy(plain)
        theirs = peft.get_peft_model(theirs, getattr(peft, config)(target_modules=["q"], **settings))
        method: Any = method_class(name)(**options)
        if name == "VeRA":
            from core.anatomy import Site

            method.shared(nn.Module(), [Site("0.q", "q", "", plain.q)])
        mine: Any = bare(method, plain.q)
        with torch.no_grad():
            for tensor in mine.parameters():
                tensor += 0.1 * torch.randn(tensor.shape)
            given = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
            for ending, value in rename(mine, theirs).items():
                target = given[f"base_model.model.q.{ending}"]
                assert target.shape == value.shape, ending
                target.copy_(value)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = plain(x), theirs.eval()(x)
        base = plain.q.__class__.forward(plain.q, x)
    assert distance(found, expected) < 1e-5 and distance(found, base) > 1e-2


def test_butterfly() -> None:
    """Three factors: the library's permutations P, and its product P B P^T (which it runs on a GPU alone)."""
    layer: Any = importlib.import_module("peft.tuners.boft.layer").BOFTLayer
    method: Any = method_class("BOFT")(block=4, factors=3)  # type: ignore[call-arg]
    mine = bare(method, nn.Linear(32, 48).double())
    with torch.no_grad():
        for tensor in mine.parameters():
            tensor += 0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        total = torch.eye(32, dtype=torch.float64)
        for level, upper in enumerate(_skewed(mine) / 2):
            q, eye = upper - upper.transpose(1, 2), torch.eye(4, dtype=torch.float64)
            blocks = torch.block_diag(*[(eye - one) @ torch.linalg.inv(eye + one) for one in q])
            p = layer.perm2mat(None, layer.block_butterfly_perm(None, 32, 8 // 2 ** level, 2, 3)).double()
            total = p @ blocks @ p.t() @ total
        weight = mine.site.full_weight
        assert distance(mine.merged(weight), mine.s[:, None] * (weight @ total.t())) < 1e-12
    assert int((total.abs() > 1e-12).sum(1).min()) == 16
