"""Checks of HalfFineTuning: those of the survey's checks that are about it; they have no numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from core import load_adapter, peft
from core.anatomy import dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import Row, Variant, moved_count
from tests.toolkit import outputs, randomize, same, snapshot


def halves_follow_formula() -> None:
    """HalfFineTuning: every three steps another half; what is frozen stays to the bit and has neither gradient nor
    state; over many rounds each matrix is trained in about half."""
    model = make("llama")
    method: Any = peft.method_class("HalfFineTuning")(interval=3)  # type: ignore[call-arg]
    method.attach(model)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.01, weight_decay=0.1)
    method.follow(optimizer, total=180)
    trained: dict[str, int] = {}
    for step in range(180):
        chosen = set(method.trainable())
        if step % 3 == 0:
            trained |= {name: trained.get(name, 0) + 1 for name in chosen}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in method.trainable().values()}
        for tensor in method.trainable().values():
            tensor.grad = torch.ones_like(tensor)
        optimizer.step()
        assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == chosen
        assert {id(p) for p in optimizer.state} <= {id(p) for p in method.trainable().values()}
    blocks = [name for name, _ in model.named_parameters() if ".layers." in name]
    assert set(trained) == set(blocks) and method.round == 59
    assert all(15 <= count <= 45 for count in trained.values())


ROWS = {
    "HalfFineTuning": Row(
        {"one round": Variant(learns={"lr": 2e-4}), "rounds": Variant({"interval": 2, "whole": ("norm",)},
                                                                     learns={"lr": 2e-4})},
        trained=moved_count,
        bad=(({"interval": 0}, "interval 0"), ({"whole": ("nrom1",)}, "'norm1'")),
        random=True,
        schedule=halves_follow_formula,
        artifact={"layers": (0,)},
    ),
}

HalfFineTuning: Any = method_class("HalfFineTuning")


def _llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        return LlamaModel(LlamaConfig(**{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                                         **changes}))


@pytest.mark.parametrize("seed", range(3))
def test_exactly_half(seed: int) -> None:
    """LLaMA-2-7B: of each layer 2 of 4 maps of attention and 1 of 2 norms, 2 of 3 maps of the MLP in half of the
    layers and 1 in the others: 3,238,133,760 of 6,476,267,520 in any draw. Embeddings and the final norm are frozen."""
    model = _llama()
    method = HalfFineTuning(seed=seed).attach(model)
    trained = method.trainable()
    assert sum(t.numel() for t in trained.values()) == 3_238_133_760
    assert sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.")) == 6_476_267_520
    numbers: list[int] = []
    for layer in range(32):
        mine = [name for name in trained if name.startswith(f"layers.{layer}.")]
        assert sum("self_attn" in name for name in mine) == 2 and sum("layernorm" in name for name in mine) == 1
        numbers.append(sum(".mlp." in name for name in mine))
    assert sorted(numbers) == [1] * 16 + [2] * 16
    assert not any("embed" in name or name == "norm.weight" for name in trained)
    assert set(HalfFineTuning(seed=seed + 1).attach(_llama()).trainable()) != set(trained)


def test_half_in_expectation() -> None:
    """Grouped queries make k and v smaller: the number that a draw really trains is what is counted."""
    method = HalfFineTuning().attach(_llama(num_key_value_heads=8))
    blocks = sum(p.numel() for name, p in method.root.named_parameters() if name.startswith("layers."))
    anatomy = dissect(method.root)
    counts = [sum(method.root.get_parameter(name).numel() for name in method.draw(anatomy, i)) for i in range(200)]
    assert counts[0] == method.counts()["method"] and len(set(counts)) > 8
    assert abs(sum(counts) / len(counts) / blocks - 0.5) < 0.002


def test_fused_projection_falls_as_a_whole() -> None:
    """timm's ViT-B/16: qkv (three maps) in half of the layers and the output's in the others; exactly half of the
    weights again, with their biases."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = HalfFineTuning().attach(model)
    trained = method.trainable()
    assert sum(t.numel() for name, t in trained.items() if name.endswith("weight") and "norm" not in name) == 42_467_328
    for layer in range(12):
        assert (f"blocks.{layer}.attn.qkv.weight" in trained) != (f"blocks.{layer}.attn.proj.weight" in trained)
        assert (f"blocks.{layer}.mlp.fc1.bias" in trained) != (f"blocks.{layer}.mlp.fc2.bias" in trained)
    assert sum(name.endswith("qkv.weight") for name in trained) == 6


def test_whole_roles() -> None:
    """Embeddings and what stands outside the blocks, where they are asked for."""
    model = make("llama")
    method = HalfFineTuning(whole=("embed", "norm")).attach(model)
    assert {"model.embed_tokens.weight", "model.norm.weight"} < set(method.trainable())


def test_rounds_in_a_run(tmp_path: Path) -> None:
    """A run of four rounds: a checkpoint behind a draw resumes to the bit; state is the present half's alone; the file
    has all that any round moved; merged, unmerged and removed it leaves what it should."""
    def half() -> Any:
        return HalfFineTuning(interval=3)

    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    whole = run(tmp_path, half(), listen=keep)
    again = run(tmp_path, half(), checkpoint=tmp_path / "step=7.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    method: Any = whole.methods[0]
    optimizer: Any = whole.trainer.optimizers[0]
    trained = method.trainable()
    head = {id(p) for p in whole.task.parameters()}
    assert method.round == 3 and {id(p) for p in optimizer.state} - head == {id(p) for p in trained.values()}
    assert set(trained) < set(method.start) and method.counts()["stored"] > method.counts()["method"]

    backbone: Any = whole.backbone.eval()
    inputs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, values = outputs(backbone, inputs), snapshot(backbone)
    method.save(tmp_path / "adapter")
    method.merge()
    method.unmerge()
    assert same(values, snapshot(backbone)) and torch.equal(outputs(backbone, inputs), expected)
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == set(trained)
    method.remove()
    base = outputs(backbone, inputs)
    assert not torch.equal(base, expected)
    load_adapter(tmp_path / "adapter", backbone)
    assert torch.equal(outputs(backbone, inputs), expected)


def test_checkpoint_of_any_module_knows_the_start() -> None:
    """Values that a state dict brings do not count as the base's: taking the method away gives the base."""
    model, other = make("bert"), make("bert")
    base = outputs(model, batch("bert"))
    one, two = HalfFineTuning(interval=1).attach(model), HalfFineTuning(interval=1).attach(other)
    for _ in range(3):
        randomize(one)
        one.next_round()
    other.load_state_dict(model.state_dict())
    assert two.round == 3 and set(two.trainable()) == set(one.trainable())
    assert torch.equal(outputs(other, batch("bert")), outputs(model, batch("bert")))
    two.remove()
    assert torch.equal(outputs(other, batch("bert")), base)


def test_a_tensor_has_one_owner() -> None:
    model = make("bert")
    method = HalfFineTuning(interval=1).attach(model)
    norms: Any = method_class("LayerNormTuning")
    taken = [i for i in (0, 1) if f"model.encoder.layer.{i}.output.LayerNorm.weight" in method.trainable()]
    free = next(i for i in (0, 1) if i not in taken) if len(taken) < 2 else None
    if free is not None:
        norms(targets=("norm2",), layers=(free,)).attach(model)
    else:
        norms(targets=("norm1",), layers=(0,)).attach(model)
    with pytest.raises(ScionError, match="of the next half is trained by LayerNormTuning"):
        for _ in range(20):
            method.next_round()
