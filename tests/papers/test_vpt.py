"""Checks of VPT: its entry, and sheet 06's prompts that are thrown away behind each block, as hooks on plain models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.anatomy import dissect
from core.errors import ScionError
from core.peft import method_class
from tests.models import Pooled, batch, make, spread
from tests.papers.decoding import LANGUAGE_MODELS, a_cache_changes_nothing, later_tokens_are_not_seen
from tests.papers.explicit import SPECIAL, insert
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant, prompts_count
from tests.toolkit import EVERYTHING, distance, outputs, randomize

ROWS = {
    "VPT": Row(
        {"deep": Variant({"tokens": 4}, learns={"tokens": 20}, refused=NO_CALL),
         "shallow": Variant({"tokens": 3, "deep": False}, refused={"timm_swin": "a map has no place for tokens"},
                            learns={"tokens": 20})},
        trained=prompts_count,
        cards=(("vit_b16", {}, 92_160), ("vit_b16", {"deep": False}, 7_680)),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"deep": False, "dropout": 0.1}, "deep")),
        random=True, commutes=None, operators=40, saved=0.9,
        artifact={"tokens": 1},
        refused=NO_ATTENTION,
    ),
}

VPT: Any = method_class("VPT")
LoRA: Any = method_class("LoRA")


def prompts_of(method: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in method.trainable().values()]


def dino(**changes: Any) -> nn.Module:
    """A ViT with norms of queries and keys, scaled sublayers and registers."""
    import timm

    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4,
                                  num_classes=0, **{"qk_norm": True, "init_values": 0.3, "reg_tokens": 2, **changes})
    return spread(model).eval()


# ------------------------------------------------------------------------------------------------- deep


@pytest.mark.parametrize("family", ["timm_vit", "ast", "clip_vision", "timm_eva", "bert", "llama", "clip_text"])
def test_1_deep_is_insert_run_take_out(family: str) -> None:
    """Prompts into each block, the block run, the prompts taken out; in text they stand in front."""
    model, plain, inputs = make(family), make(family), batch(family)
    method = VPT(tokens=3).attach(model)
    randomize(method, size=1.0)
    insert(plain, prompts_of(method), SPECIAL.get(family, 0))
    expected = outputs(plain, inputs)
    assert distance(expected, outputs(make(family), inputs)) > 1e-2
    assert distance(outputs(model, inputs), expected) < 1e-6 * (20 if family == "timm_eva" else 10)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 0}, {"qk_norm": False}])
def test_1_deep_with_normed_queries_and_scaled_sublayers(options: dict[str, Any]) -> None:
    model, plain, inputs = dino(**options), dino(**options), batch("timm_vit")
    method = VPT(tokens=3).attach(model)
    randomize(method, size=1.0)
    insert(plain, prompts_of(method), special=1 + options.get("reg_tokens", 2))
    assert distance(outputs(model, inputs), outputs(plain, inputs)) < 1e-6


@pytest.mark.parametrize("order", ["LoRA first", "VPT first"])
def test_1_deep_with_lora_stacked(order: str) -> None:
    """The prompts' keys and values go through LoRA's q and v, as those of all other tokens do."""
    model, plain, inputs = make("timm_vit"), make("timm_vit"), batch("timm_vit")
    lora, method = LoRA(rank=2, alpha=6.0, targets=("q", "v")), VPT(tokens=3)
    for each in (lora, method) if order == "LoRA first" else (method, lora):
        each.attach(model)
        randomize(each, size=0.5)
    with torch.no_grad():
        for graft in lora.grafts:
            rows = graft.site.rows
            weight: Any = plain.get_parameter(graft.site.weight_name)
            weight[rows.start:rows.stop] += 3.0 * graft.B @ graft.A
    without = outputs(plain, inputs)
    insert(plain, prompts_of(method), special=1)
    expected = outputs(plain, inputs)
    assert distance(without, expected) > 1e-2 and distance(outputs(model, inputs), expected) < 2e-6
    with lora.disabled(), method.disabled():
        assert torch.equal(outputs(model, inputs), outputs(make("timm_vit"), inputs))


def test_1_deep_behind_a_changed_norm() -> None:
    """What another method makes of the norm before attention, the prompts meet as well."""
    model, plain, inputs = make("timm_vit"), make("timm_vit"), batch("timm_vit")
    ssf: Any = method_class("SSF")()
    ssf.attach(model)
    randomize(ssf, size=0.3)
    twin: Any = method_class("SSF")()
    twin.attach(plain)
    randomize(twin, size=0.3)
    twin.merge()
    method = VPT(tokens=3).attach(model)
    randomize(method, size=1.0)
    insert(plain, prompts_of(method), special=1)
    assert distance(outputs(model, inputs), outputs(plain, inputs)) < 1e-5


def test_1_layers() -> None:
    """Blocks without prompts are the frozen ones."""
    model, plain, inputs = make("timm_vit"), make("timm_vit"), batch("timm_vit")
    method = VPT(tokens=2, layers=(1,)).attach(model)
    prompt, = prompts_of(method)
    block: Any = dissect(plain).blocks[1].module
    block.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], prompt.expand(3, -1, -1)], 1),))
    block.register_forward_hook(lambda module, args, out: out[:, :-2])
    assert distance(outputs(model, inputs), outputs(plain, inputs)) < 1e-6


def test_1_gradients() -> None:
    model, plain, inputs = (make("timm_vit", dtype=torch.float64), make("timm_vit", dtype=torch.float64),
                            batch("timm_vit", dtype=torch.float64))
    method = VPT(tokens=3).attach(model)
    copies = [tensor.requires_grad_() for tensor in prompts_of(method)]
    insert(plain, copies, special=1)
    for each in (model, plain):
        each(inputs).square().sum().backward()
    mine = [tensor.grad for tensor in method.trainable().values()]
    assert all(distance(one, two.grad) < 1e-10 for one, two in zip(mine, copies, strict=True))  # type: ignore[arg-type]


def _t5_attention(module: Any, x: Tensor, bias: Tensor, prompt: Tensor) -> Tensor:
    """T5's attention (no scale, a bias that is zero for prompts) over [prompt; x]."""
    both = torch.cat([prompt.expand(len(x), -1, -1), x], 1)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (module.n_heads, -1)).transpose(1, 2)

    q, k, v = heads(module.q(x)), heads(module.k(both)), heads(module.v(both))
    scores = q @ k.transpose(2, 3) + F.pad(bias, (len(prompt), 0))
    return module.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_1_deep_in_t5() -> None:
    """One layer of encoder and decoder: prompts behind the sublayer's norm, without a relative position."""
    model = make("t5")
    method = VPT(tokens=3).attach(model)
    randomize(method, size=1.0)
    seen: list[tuple[Any, Tensor, Tensor | None, Tensor, Tensor]] = []
    for graft in method.grafts:
        graft.site.module.register_forward_hook(lambda module, args, kwargs, out, graft=graft: seen.append(
            (graft, args[0], kwargs["mask"], out[0], out[1])), with_kwargs=True)
    outputs(model, batch("t5"))
    assert len(seen) == 4 and seen[0][2] is not None  # padding
    for graft, x, mask, y, bias in seen:
        block = graft.site.around
        if mask is None and block.stage == "decoder":
            mask = torch.ones(12, 12, dtype=torch.bool).tril()
        assert mask is not None
        with torch.no_grad(), method.disabled():
            own = bias.masked_fill(~mask, -1e30)
            prompt = block.sites["norm1"].module(graft.prompt)
            assert distance(y, _t5_attention(graft.site.module, x, own, prompt)) < 1e-5


# ------------------------------------------------------------------------------------------------- windows


def _windowed(attention: Any, norm: Any, prompt: Tensor) -> Any:
    """Swin's attention, written out, with prompts in front of every window: no relative bias, no shift's mask."""

    def forward(x: Tensor, mask: Tensor | None = None) -> Tensor:
        tokens, heads = len(prompt), attention.num_heads
        both = torch.cat([norm(prompt).expand(len(x), -1, -1), x], 1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in attention.qkv(both).chunk(3, -1))
        table = attention.relative_position_bias_table[attention.relative_position_index.flatten()]
        area = x.shape[1]
        bias = torch.zeros(len(x), heads, tokens + area, tokens + area)
        bias[:, :, tokens:, tokens:] = table.view(area, area, heads).permute(2, 0, 1)
        if mask is not None:
            bias[:, :, tokens:, tokens:] += mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        weights = ((q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return attention.proj((weights @ v).transpose(1, 2).flatten(2)[:, tokens:])

    return forward


def test_2_every_window_reads_the_prompts() -> None:
    model, plain, inputs = make("timm_swin"), make("timm_swin"), batch("timm_swin")
    method = VPT(tokens=3).attach(model)
    randomize(method, size=1.0)
    assert [len(p) for p in prompts_of(method)] == [3] * 4
    blocks: list[Any] = [block.module for block in dissect(plain).blocks]
    assert any(any(block.shift_size) for block in blocks), "no shifted windows: no mask"
    for block, prompt in zip(blocks, prompts_of(method), strict=True):
        block.attn.forward = _windowed(block.attn, block.norm1, prompt)
    expected = outputs(plain, inputs)
    assert distance(expected, outputs(make("timm_swin"), inputs)) > 1e-2
    assert distance(outputs(model, inputs), expected) < 1e-6


@pytest.mark.parametrize("family", ["timm_swin", "timm_vit"])
def test_2_samples_do_not_meet(family: str) -> None:
    """A sample's feature is its own, whatever stands beside it in the batch."""
    model, inputs = make(family), batch(family)
    randomize(VPT(tokens=3).attach(model), size=1.0)
    alone = torch.cat([outputs(model, sample[None]) for sample in inputs])
    assert distance(outputs(model, inputs), alone) < 1e-5
    others = torch.cat([inputs[:1], -2 * inputs[1:]])
    assert distance(outputs(model, others)[:1], alone[:1]) < 1e-5


# ------------------------------------------------------------------------------------------------- shallow


@pytest.mark.parametrize("family", ["timm_vit", "vit", "ast", "clip_vision", "timm_eva", "clip_text"])
def test_3_shallow(family: str) -> None:
    """In behind the special tokens at the first block, out behind the last, the rest of the model as it is."""
    model, plain, inputs = make(family), make(family), batch(family)
    method = VPT(tokens=3, deep=False).attach(model)
    randomize(method, size=1.0)
    insert(plain, prompts_of(method), SPECIAL.get(family, 0))
    expected = outputs(plain, inputs)
    assert distance(expected, outputs(make(family), inputs)) > 1e-2
    assert distance(outputs(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("method", ["deep", "shallow", "PromptTuning"])
def test_3_padding_in_clip_text(method: str) -> None:
    """With a padding mask, each query's row grows in front: it sees the prompts, and they nothing but each other."""
    plain: Any = make("clip_text").model
    model: Any = make("clip_text").model
    ids = batch("clip_text")
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    made: Any = (method_class("PromptTuning")(tokens=3) if method == "PromptTuning"  # type: ignore[call-arg]
                 else VPT(tokens=3, deep=method == "deep"))
    made.attach(model)
    randomize(made, size=1.0)
    insert(plain, prompts_of(made))
    with torch.no_grad():
        found, expected = (each(ids, attention_mask=mask) for each in (model, plain))
    assert found.last_hidden_state.shape == (3, 12, 32)
    assert distance(found.last_hidden_state[1, :8], expected.last_hidden_state[1, :8]) < 1e-5
    assert distance(found.pooler_output, expected.pooler_output) < 1e-5
    with torch.no_grad():
        short = model(ids[1:2, :8]).last_hidden_state
    assert distance(found.last_hidden_state[1:2, :8], short) < 1e-5


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["timm_vit", "ast", "clip_text"])
def test_4_the_sequence_keeps_its_length(family: str, deep: bool) -> None:
    """Sheet 06: the number of tokens at each block's end is that of the input (deep), and of the final state always."""
    model, inputs = make(family), batch(family)
    lengths: list[int] = []
    for block in dissect(model).blocks:
        block.module.register_forward_hook(lambda module, args, out: lengths.append(
            (out[0] if isinstance(out, tuple) else out).shape[1]))
    outputs(model, inputs)
    frozen, lengths[:] = list(lengths), []
    VPT(tokens=3, deep=deep).attach(model)
    outputs(model, inputs)
    assert lengths[-1] == frozen[-1] + (0 if deep else 3)  # seen before the prompts are taken out
    assert lengths[0] == frozen[0] + (0 if deep else 3)
    inner: Any = model.model
    with torch.no_grad():
        state = inner.forward_features(inputs) if family == "timm_vit" else inner(inputs).last_hidden_state
    assert state.shape[1] == frozen[-1]


def test_5_start() -> None:
    """Uniform within sqrt(6 / (3 16 16 + 768)) = 0.0625 on ViT-B/16."""
    import timm

    model = Pooled(timm.create_model("vit_base_patch16_224", num_classes=0, depth=1), token=None)
    values = prompts_of(VPT(tokens=50).attach(model.model))[0]
    assert values.abs().max() <= 0.0625 and abs(float(values.std()) - 0.0625 / math.sqrt(3)) < 1e-3


def test_6_dropout() -> None:
    """Of whole numbers of the prompts, in training alone."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method = VPT(tokens=3, dropout=0.5).attach(model)
    still = outputs(model, inputs)
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(outputs(model, inputs), outputs(model, inputs))
    assert torch.equal(outputs(model.eval(), inputs), still)
    assert all(graft.dropout.p == 0.5 for graft in method.grafts)


def test_refusals() -> None:
    with pytest.raises(ScionError, match="map"):
        VPT(deep=False).attach(make("timm_swin"))
    with pytest.raises(ScionError, match="attend"):
        VPT().attach(make("timm_convnext"))
    with pytest.raises(ScionError, match="layers"):
        VPT(deep=False, layers=(1,)).attach(make("timm_vit"))


@pytest.mark.parametrize("name", LANGUAGE_MODELS if EVERYTHING else ("llama", "codegen", "t5"))
def test_7_generation(name: str) -> None:
    a_cache_changes_nothing(name, VPT(tokens=3))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["llama", "clip_text"])
def test_8_causal(family: str, deep: bool) -> None:
    later_tokens_are_not_seen(family, VPT(tokens=3, deep=deep))
