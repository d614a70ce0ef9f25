"""`describe`: the numbers of small models by hand, published counts, and no trace."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core import describe
from core.cost import _step, safetensors_bytes
from core.errors import ScionError
from core.graft import checkpoint_activations
from core.peft import method_class
from tests.models import FAMILIES, batch, make

B, IN, HIDDEN, OUT = 4, 3, 5, 2
F32 = 4


def method(name: str, **config: Any) -> Any:
    return method_class(name)(**config)


class Tiny(nn.Module):
    """Two linear maps with a sigmoid between, which keeps its output and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(self.first(x)))


class WithHead(nn.Module):
    """A backbone in ``.backbone``, a linear head behind it."""

    def __init__(self, backbone: nn.Module, dim: int, classes: int = 3) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))


def vit(depth: int = 2) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=4,
                             num_classes=0)


def features(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


# ------------------------------------------------------------------------------------------------- by hand


def test_a_small_model_by_hand() -> None:
    cost = describe(Tiny(), torch.zeros(B, IN))
    trained = IN * HIDDEN + HIDDEN + HIDDEN * OUT
    assert cost.parameters == {"total": trained, "backbone": trained, "trained": trained, "method": 0, "norms": 0,
                               "head": 0, "other": trained, "stored": 0}
    assert cost.gradient_bytes == F32 * trained
    assert cost.optimizer_bytes == 2 * F32 * trained
    assert cost.adapter_bytes == 0
    # The sigmoid's output serves it and the second map. The first map's input is the batch, which is not counted.
    assert cost.kept_bytes == F32 * B * HIDDEN
    assert cost.forward_flops == 2 * B * (IN * HIDDEN + HIDDEN * OUT)
    # Two products for the second map, one for the first, whose input needs no gradient.
    assert cost.backward_flops == 2 * B * (2 * HIDDEN * OUT + IN * HIDDEN)
    # t and addmm; sigmoid, and a detach to keep its output; t and mm
    assert cost.forward_operators == 6


def test_a_frozen_part_keeps_nothing() -> None:
    model = Tiny()
    model.first.requires_grad_(False)
    cost = describe(model, torch.zeros(B, IN))
    assert cost.kept_bytes == F32 * B * HIDDEN  # the second map's input
    assert cost.backward_flops == 2 * B * HIDDEN * OUT
    model.requires_grad_(False)
    cost = describe(model, torch.zeros(B, IN))
    assert (cost.kept_bytes, cost.backward_flops, cost.backward_operators, cost.gradient_bytes) == (0, 0, 0, 0)


def test_a_loss_is_counted_where_one_is_given() -> None:
    plain = describe(Tiny(), torch.zeros(B, IN))
    squares = describe(Tiny(), torch.zeros(B, IN), loss=lambda out: out.square().sum())
    assert squares.kept_bytes == (plain.kept_bytes or 0) + F32 * B * OUT
    assert (squares.forward_operators or 0) > (plain.forward_operators or 0)
    assert squares.backward_flops == plain.backward_flops


@pytest.mark.parametrize("inputs", [(torch.zeros(B, IN),), [torch.zeros(B, IN)], {"x": torch.zeros(B, IN)}])
def test_inputs_by_place_and_by_name(inputs: Any) -> None:
    assert describe(Tiny(), inputs) == describe(Tiny(), torch.zeros(B, IN))


def test_attention_counts_two_products_forward_and_five_backward() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.zeros(1, 2, 7, 4))

        def forward(self, kv: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.q, kv, kv, enable_gqa=kv.shape[1] < 2)

    for heads in (2, 1):  # grouped queries do the same work
        cost = describe(Attention(), torch.zeros(1, heads, 9, 4, requires_grad=True))
        product = 2 * 2 * 7 * 9 * 4
        assert cost.forward_flops == 2 * product
        assert cost.backward_flops in (5 * product, 4 * product)  # the scores are computed again, or were kept


# ------------------------------------------------------------------------------------------------- methods


def test_vit_b16_of_the_sheet_on_the_meta_device() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    images = torch.empty(2, 3, 224, 224, device="meta")
    full = describe(model, images)
    assert full.parameters["total"] == full.parameters["backbone"] == full.parameters["trained"] == 85_798_656
    lora = method("LoRA", rank=8).attach(model)
    cost = describe(model, images)
    assert cost.parameters == {"total": 86_093_568, "backbone": 85_798_656, "trained": 294_912, "method": 294_912,
                               "norms": 0, "head": 0, "other": 0, "stored": 294_912}
    assert cost.gradient_bytes == F32 * 294_912
    assert cost.optimizer_bytes == 2 * F32 * 294_912
    assert cost.methods == (repr(lora),)
    for mine, theirs in ((cost.kept_bytes, full.kept_bytes), (cost.backward_flops, full.backward_flops)):
        assert mine is not None and theirs is not None and mine < theirs
    # two images; rank 8, q and v, 12 blocks, 197 tokens, 768 wide, in and out
    assert cost.forward_flops == (full.forward_flops or 0) + 2 * 2 * 197 * 12 * 2 * 8 * (768 + 768)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linear_probe_keeps_only_the_heads_input(family: str) -> None:
    backbone, inputs = make(family), batch(family)
    out = features(backbone, inputs)
    model = WithHead(backbone, out.shape[-1])
    method("LinearProbe").attach(backbone)
    cost = describe(model, inputs)
    assert cost.kept_bytes == out.untyped_storage().nbytes()  # a class token alone keeps the tensor it is a part of
    assert cost.parameters["head"] == cost.parameters["trained"] == sum(p.numel() for p in model.head.parameters())
    assert cost.parameters["backbone"] == sum(p.numel() for p in backbone.parameters())


@pytest.mark.parametrize("name, config", [("LoRA", {}), ("Houlsby", {}), ("PrefixTuning", {"tokens": 2}),
                                          ("BitFit", {"targets": ("mlp.up", "mlp.down")})])
def test_nothing_is_kept_below_the_lowest_trained_block(name: str, config: dict[str, Any]) -> None:
    costs = []
    for depth in (2, 5):
        model = vit(depth)
        method(name, layers=[-2, -1], **config).attach(model)
        costs.append(describe(model, torch.zeros(3, 3, 32, 32)))
    assert costs[0].kept_bytes == costs[1].kept_bytes
    assert costs[0].backward_flops == costs[1].backward_flops
    assert costs[0].backward_operators == costs[1].backward_operators
    assert costs[0].parameters["method"] == costs[1].parameters["method"]


@pytest.mark.parametrize("name, config", [
    ("LoRA", {"rank": 3, "targets": ("q", "mlp.up")}), ("Houlsby", {"bottleneck": 4, "norms": ("norm1", "norm")}),
    ("BitFit", {}), ("FullFineTuning", {}), ("LTSFT", {}), ("LinearProbe", {"norms": ("norm",)}), ("DoRA", {})])
def test_counts_and_file_size_are_the_methods_own(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = make("timm_vit")
    attached = method(name, **config).attach(model)
    cost, counts = describe(model), attached.counts()
    assert {key: cost.parameters[key] for key in counts} == counts
    assert cost.parameters["other"] == 0
    attached.save(tmp_path)
    assert cost.adapter_bytes == (tmp_path / "adapter.safetensors").stat().st_size


def test_two_methods_are_counted_together() -> None:
    model = make("timm_vit")
    method("LoRA", norms=("norm",)).attach(model)
    alone = describe(model).parameters
    method("BitFit", targets=("mlp.up", "o")).attach(model)
    both = describe(model).parameters
    biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("fc1.bias", "attn.proj.bias")))
    assert both["norms"] == alone["norms"]
    assert both["method"] == alone["method"] + biases
    assert both["trained"] == both["method"] + both["norms"]


def test_recomputed_activations_are_not_kept() -> None:
    model = vit(4)
    plain = describe(model, torch.zeros(2, 3, 32, 32))
    checkpoint_activations(model)
    cost = describe(model, torch.zeros(2, 3, 32, 32))
    assert (cost.kept_bytes or 0) < (plain.kept_bytes or 0) / 2
    assert cost.forward_flops == plain.forward_flops
    assert (cost.backward_flops or 0) > (plain.backward_flops or 0)


# ------------------------------------------------------------------------------------------------- exactness


PLAIN_OR_WITH = (None, "LoRA", "DoRA", "PrefixTuning")


@pytest.mark.parametrize(("family", "name"), [
    (family, name) for i, family in enumerate(FAMILIES) for j, name in enumerate(PLAIN_OR_WITH)
    if os.environ.get("SCION_ALL") or (i + j) % 2 == 0])
def test_stand_ins_count_what_a_real_step_does(family: str, name: str | None) -> None:
    model = make(family)
    if name:
        method(name).attach(model)
    inputs = batch(family)
    assert _step(model, inputs, None, fake=True) == _step(model, inputs, None, fake=False)


def test_a_forward_that_reads_values_is_followed_for_real() -> None:
    class Reader(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y if y.sum().item() > 1e9 else 2 * y

    assert describe(Reader(), torch.zeros(B, IN)).forward_flops == describe(Tiny(), torch.zeros(B, IN)).forward_flops
    with pytest.raises(ScionError, match="Reader reads values"):
        describe(Reader().to("meta"), torch.zeros(B, IN))


@pytest.mark.parametrize("reads", [False, True])
def test_it_leaves_no_trace(reads: bool) -> None:
    class Busy(nn.Module):
        """All that a forward can leave behind."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.map = nn.BatchNorm1d(IN), nn.Dropout(0.5), nn.Linear(IN, OUT)
            self.seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.cache = self.map(self.drop(self.norm(x)))
            self.register_buffer("late", torch.zeros(1))
            _ = np.random.rand(), random.random(), torch.rand(1)
            return self.cache if reads and self.cache.sum().item() > 1e9 else self.cache + 0

    model = Busy()
    model.drop.eval()
    model.map.bias.grad = torch.ones(OUT)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    keys = set(vars(model))
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[union-attr]
    describe(model, torch.ones(B, IN))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert modes == [module.training for module in model.modules()]
    assert set(vars(model)) == keys and model.seen == 0
    assert tensors == [id(t) for t in (*model.parameters(), *model.buffers())]
    assert all(grad is p.grad for grad, p in zip(grads, model.parameters(), strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model(torch.ones(B, IN)).sum().backward()


def test_dropout_counts_as_in_training() -> None:
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.Dropout(0.5)).eval()
    assert describe(model, torch.zeros(B, IN)).kept_bytes == F32 * B * HIDDEN  # the mask
    assert not model.training and not model[1].training


# ------------------------------------------------------------------------------------------------- faces


def test_safetensors_bytes_are_those_of_the_file(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"b": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.float16), "é": torch.zeros(1, dtype=torch.int64),
               "empty": torch.zeros(0, 2), "scalar": torch.tensor(1.0), "flags": torch.zeros(3, dtype=torch.bool),
               "half": torch.zeros(2, 2, dtype=torch.bfloat16), "bytes": torch.zeros(5, dtype=torch.uint8)}
    for chosen in ({}, *({name: tensor} for name, tensor in tensors.items()), tensors):
        save_file(chosen, tmp_path / "file", metadata={"format": "pt"})
        assert safetensors_bytes(chosen) == (tmp_path / "file").stat().st_size


def test_it_prints_and_becomes_json() -> None:
    model = make("timm_vit")
    method("LoRA").attach(model)
    cost = describe(model, batch("timm_vit"))
    assert json.loads(json.dumps(cost.to_dict())) == cost.to_dict()
    text = str(cost)
    assert "LoRA()" in text and f"{cost.kept_bytes:,}" in text and f"{cost.parameters['method']:,}" in text
    assert "kept bytes" not in str(describe(model))


def test_bad_input_is_told_in_one_line() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    with pytest.raises(ScionError, match="no tensor but str"):
        describe(Silent(), torch.zeros(1))
    with pytest.raises(ScionError, match="scalar"):
        describe(Tiny(), torch.zeros(B, IN), loss=lambda out: out)
