"""What is particular to the encoders of transformers: fused maps, attention of their own, sound, missing norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import dissect
from core.compose import Route
from core.errors import ScionError
from core.peft import (  # type: ignore[attr-defined]
    LTSFT,
    Convpass,
    LadderSideTuning,
    LoRA,
    ParallelAdapter,
    PrefixTuning,
    PromptTuning,
)
from tests.models import DEBERTA, VOCABULARY, WIDTH, Pooled, _encoder, batch, make, spread, whisper_config
from tests.toolkit import distance, outputs, randomize

IDS = batch("bert")


def _built(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        model = build()
    return spread(model).eval()


def _deberta(**changes: Any) -> Pooled:
    build = functools.partial(_encoder, "DebertaV2", **{**DEBERTA, **changes})
    return Pooled(_built(build), padding=0).eval()


# ------------------------------------------------------------------------------------------------- DeBERTa


def test_deberta_offers_no_attention_call() -> None:
    """Refused in one line, with the model as it was."""
    model = make("deberta")
    names = set(dict(model.named_modules()))
    with pytest.raises(ScionError, match="needs the role 'attend', which DebertaV2Model does not have") as refusal:
        PrefixTuning(tokens=2).attach(model)
    assert "\n" not in str(refusal.value) and set(dict(model.named_modules())) == names


def test_deberta_maps_that_run_twice() -> None:
    """With `share_att_key`, as in every published model, queries' and keys' maps read the relative positions besides: a
    change of the map is a change of both, as merging has it, and the sublayer's input is not mistaken for theirs."""
    model = _deberta(share_att_key=True)
    base = outputs(model, IDS)
    method = LoRA(rank=2, targets=("q", "k", "v")).attach(model)
    randomize(method, size=0.2)
    moved = outputs(model, IDS)
    assert distance(moved, base) > 1e-2
    method.merge()
    assert distance(outputs(model, IDS), moved) < 1e-5
    method.unmerge()
    method.remove()

    method = ParallelAdapter(bottleneck=3, targets=("attention",), scale=1.0).attach(model)
    randomize(method, size=0.2)
    seen: list[Tensor] = []
    attention = model.model.encoder.layer[0].attention  # type: ignore[union-attr, index, operator]
    attention.self.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attention.output.dropout.register_forward_hook(lambda module, args, output: seen.append(output - args[0]))
    outputs(model, IDS)
    hidden, added = seen
    graft: Any = method.grafts[0]
    assert distance(added, graft.change(hidden)) < 1e-5 and float(added.abs().max()) > 1e-3


def test_deberta_routes_only_what_runs_once() -> None:
    """Relative positions are projected once for all samples, so that each cannot have a map of its own."""
    model = _deberta(share_att_key=True)
    for targets, works in ((("v",), True), (("q",), False)):
        variants = [LoRA(rank=2, targets=targets, name=name) for name in ("one", "two")]
        route = Route(variants).attach(model)
        randomize(route)
        with route.route([0, 1, 1]):
            if works:
                assert outputs(model, IDS).shape == (3, WIDTH)
            else:
                with pytest.raises(ScionError, match="3 samples are routed, but 1 rows arrive"):
                    outputs(model, IDS)
        route.remove()


def test_deberta_table_of_relative_positions_is_reached() -> None:
    """It is read as a parameter; while a sparse change is active there, the embedding is called, with the same bits."""
    model = make("deberta")
    base = outputs(model, IDS)
    (site,) = dissect(model).sites("position_bias")
    method = LTSFT(count=40, exclude=("embed", "block", "norm")).attach(model)
    table = site.module.weight
    with torch.no_grad():
        table += 0.3  # type: ignore[operator]
    method.advance()
    assert torch.equal(outputs(model, IDS), base)
    (graft,) = method.grafts
    assert graft.site.name == site.weight_name
    outputs_now = model(IDS)
    outputs_now.square().sum().backward()
    assert graft.values.grad is not None and bool(graft.values.grad.any())  # type: ignore[union-attr]


def test_deberta_with_a_convolution() -> None:
    """The largest models convolve beside their first block: prompts pass it, and leave behind the last block."""
    model = _deberta(conv_kernel_size=3, conv_act="gelu")
    assert {site.path for site in dissect(model).sites("norm")} == {
        "model.embeddings.LayerNorm", "model.encoder.LayerNorm", "model.encoder.conv.LayerNorm"}
    base = outputs(model, IDS)
    PromptTuning(tokens=3).attach(model)
    whole = model.model(IDS, attention_mask=(IDS != 0).long()).last_hidden_state
    assert whole.shape == (3, 12, WIDTH) and distance(outputs(model, IDS), base) > 1e-3


def test_deberta_later_head_multiplies_by_the_embedding() -> None:
    """It has no map to the vocabulary, and is left out as a whole."""
    import transformers

    config = transformers.DebertaV2Config(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1,
                                          num_attention_heads=4, intermediate_size=WIDTH, legacy=False)
    anatomy = dissect(_built(lambda: transformers.DebertaV2ForMaskedLM(config)))
    (site,) = anatomy.sites("lm_head")
    assert site.path == "lm_predictions" and anatomy.head_names() == set()


# ------------------------------------------------------------------------------------------------- text


def test_mpnet_as_one_call_is_what_it_computes() -> None:
    """To the bit, with a mask and without, so that a method that begins as the identity is one."""
    model: Any = make("mpnet").model
    (site, *_) = dissect(model).sites("attend")
    [(owner, name, call)] = site.while_active
    assert owner is site.module and name == "forward"
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(0))
    bias = model.encoder.compute_position_bias(x)
    hidden = torch.zeros(3, 1, 1, 7).masked_fill_(torch.arange(7) > 4, torch.finfo(torch.float32).min)
    for mask in (None, hidden):
        assert torch.equal(call(x, mask, bias)[0], owner(x, mask, bias)[0])
    with_weights = call(x, hidden, bias, output_attentions=True)
    assert len(with_weights) == 2


def test_modernbert_parts() -> None:
    """Thirds of Wqkv by role, the activated half of Wi as the gate, no norm at the first block's attention."""
    model: Any = make("modernbert").model
    first, second = dissect(model).blocks
    assert "norm1" not in first.sites and second.sites["norm1"].module is model.layers[1].attn_norm
    layer = model.layers[0]
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    q, k, v = layer.attn.Wqkv(x).view(2, 5, 3, 4, 8).unbind(2)
    for role, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(first.sites[role].take(layer.attn.Wqkv(x)), part.flatten(2))
    fused = layer.mlp.Wi(x)
    gate, up = first.sites["mlp.gate"].take(fused), first.sites["mlp.up"].take(fused)
    assert torch.equal(layer.mlp(x), layer.mlp.Wo(layer.mlp.act(gate) * up))


def test_electra_embeds_narrower_than_it_computes() -> None:
    model: Any = make("electra").model
    anatomy = dissect(model)
    (embed,) = anatomy.sites("embed")
    assert embed.module is model.embeddings_project and anatomy.blocks[0].dim == WIDTH
    prompts = PromptTuning(tokens=3).attach(model).trainable()
    assert [tuple(tensor.shape) for tensor in prompts.values()] == [(3, WIDTH // 2)]


# ------------------------------------------------------------------------------------------------- sound and images


def test_whisper_encoder_alone() -> None:
    """As a classifier of sound has it: sound [batch, mels, frames] in, features [batch, frames / 2, dim] out."""
    import transformers

    model = _built(lambda: transformers.WhisperForAudioClassification(whisper_config(num_labels=3)))
    anatomy = dissect(model)
    assert anatomy.family == "WhisperEncoder" and len(anatomy.blocks) == 2
    assert {name.partition(".")[0] for name in anatomy.head_names()} == {"projector", "classifier"}
    sound = batch("whisper")
    with torch.no_grad():
        base = model(sound).logits
        for method in (LoRA(rank=2), PrefixTuning(tokens=2), Convpass(bottleneck=3), PromptTuning(tokens=2)):
            method.attach(model)
            randomize(method, size=0.2)
            assert model(sound).logits.shape == base.shape and distance(model(sound).logits, base) > 1e-3, method.name
            method.remove()
            assert torch.equal(model(sound).logits, base)


def test_whisper_keys_have_no_bias() -> None:
    anatomy = dissect(make("whisper"))
    assert all(site.bias is None for site in anatomy.sites(("k", "cross.k")))
    assert all(site.bias is not None for site in anatomy.sites(("q", "v", "cross.q", "cross.v")))
    assert [block.stage for block in anatomy.blocks] == ["encoder", "encoder", "decoder", "decoder"]


@pytest.mark.parametrize("alone", [False, True])
def test_whisper_goes_on_from_a_cache(alone: bool) -> None:
    """Greedy texts with and without a cache are the same under a change of weights, a prefix and a ladder."""
    import transformers

    kind = transformers.WhisperForCausalLM if alone else transformers.WhisperForConditionalGeneration
    model = _built(lambda: kind(whisper_config(use_cache=True)))
    sound = batch("whisper", 2)
    start = torch.tensor([[1, 5], [1, 9]])
    methods = [LoRA(rank=2), PrefixTuning(tokens=2)]
    if not alone:  # the decoder alone has no states to read across
        methods.append(LadderSideTuning(reduction=2))
    for method in methods:
        method.attach(model)
        randomize(method, size=0.2)
        texts = []
        for use_cache in (True, False):
            ids = start
            cache = None
            for _ in range(4):
                fed = ids if cache is None else ids[:, -1:]
                inputs = {"input_ids": fed} if alone else {"input_features": sound, "decoder_input_ids": fed}
                with torch.no_grad():
                    out = model(**inputs, past_key_values=cache, use_cache=use_cache)
                cache = out.past_key_values if use_cache else None
                ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
            texts.append(ids)
        assert torch.equal(*texts), method.name
        method.remove()


def test_dinov2_registers() -> None:
    """The map of tokens begins behind the class token and the registers."""
    import timm
    import transformers

    config = transformers.Dinov2WithRegistersConfig(hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=4,
                                                    image_size=32, patch_size=8, num_register_tokens=4)
    ours: Any = _built(lambda: transformers.Dinov2WithRegistersModel(config))
    timms = _built(lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=32, patch_size=8,
                                             embed_dim=WIDTH, depth=1, num_heads=4))
    for model in (ours, timms):
        (block,) = dissect(model).blocks
        grid = block.grid
        assert grid is not None and (grid.height, grid.width, grid.special) == (4, 4, 5)
    base = ours(batch("dinov2")).last_hidden_state
    method = Convpass(bottleneck=3).attach(ours)
    randomize(method, size=0.3)
    assert distance(ours(batch("dinov2")).last_hidden_state, base) > 1e-3


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_giant_patch14_dinov2"])
def test_timms_dinov2(name: str) -> None:
    """Plain and gated MLP; the gate is the half that is activated."""
    import timm

    model: Any = _built(lambda: timm.create_model(name, img_size=32, patch_size=8, embed_dim=WIDTH, depth=1,
                                                  num_heads=4))
    (block,) = dissect(model).blocks
    mlp = model.blocks[0].mlp
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    hidden = mlp.fc1(x)
    if "mlp.gate" in block.sites:
        hidden = mlp.act(block.sites["mlp.gate"].take(hidden)) * block.sites["mlp.up"].take(hidden)
    else:
        hidden = mlp.act(hidden)
    assert distance(mlp(x), mlp.fc2(mlp.norm(hidden))) < 1e-6
    assert ("mlp.gate" in block.sites) == ("giant" in name)
