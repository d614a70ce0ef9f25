"""Checks of LadderSideTuning (LST): the checks by their place there; tests without a number go beyond them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from core.anatomy import Anatomy, dissect
from core.backbone import Backbone
from core.compose import Route
from core.errors import ScionError
from core.peft import method_class
from core.tasks import Classification
from core.training.finetuner import FineTuner
from tests.models import WIDTH, _llama_config, batch, make, spread, t5_config
from tests.papers.decoding import language_model
from tests.rows import NO_ATTENTION, Row, Variant
from tests.toolkit import (
    EVERYTHING,
    Plain,
    distance,
    loader,
    outputs,
    randomize,
    saved_bytes,
    seeded,
    snapshot,
    trainer,
)


def ladder_count(anatomy: Anatomy, method: Any) -> int:
    """1 / r^2 of each map of a kept block and 1 / r of its norms and shifts; what is a number a head stays."""
    r, kept, total = method.reduction, method.kept(anatomy), 0
    for stack in anatomy.stacks:
        first = stack.blocks[0]
        total += (first.dim + 1) * first.dim // r
        for block in stack.blocks:
            if block.entry is not None:
                total += sum(p.numel() // r ** p.dim() for p in block.entry.module.parameters())
            if block.index in kept:
                total += 1 + (block.dim + 1) * block.dim // r
                total += sum(p.numel() if "relative" in name else p.numel() // r ** p.dim()
                             for name, p in block.module.named_parameters())
        if stack.final is not None:
            total += sum(p.numel() // r for p in stack.final.module.parameters())
        if first.index not in kept and any(block.index in kept for block in stack.blocks):  # the first kept one has it
            total += sum(p.numel() for name, p in first.module.named_parameters() if "relative_attention_bias" in name)
    last = anatomy.stacks[-1].blocks[-1].dim
    return total + (last // r + 1) * last


ROWS = {
    "LadderSideTuning": Row(
        {"all": Variant({"reduction": 4, "dropout": 0.0},
                        refused={"codegen": "its two frequencies of rotary positions are not divided by four"}),
         "dropped": Variant({"reduction": 2, "drop": (0,), "init": "random", "temperature": 1.0, "dropout": 0.0})},
        trained=ladder_count,
        cards=(("vit_b16", {}, 2_376_492),),
        bad=(({"reduction": 0}, "reduction 0"), ({"reduction": 3}, "reduction 3 does not divide"),
             ({"drop": (9,)}, "layer 9"), ({"layers": ()}, "no block"), ({"temperature": 0.0}, "temperature 0"),
             ({"init": "fishre"}, "'fishre'"), ({"samples": 0}, "samples 0"), ({"dropout": 1.0}, "dropout 1")),
        random=True, operators=120, saved=0.8, rounding=2.5,
        artifact={"reduction": 8},
        refused={
            **NO_ATTENTION,
            "albert": "one layer runs many times, so that there is no ladder of layers beside it",
            "deberta": "its relative positions are embedded as wide as the blocks, and would not fit thinner ones",
            "timm_eva": "its rotary positions are made for one width of head, and end in the attention",
            "clip": "the vision tower's final norm sees the pooled token alone, not the sequence",
            "clip_vision": "the vision tower's final norm sees the pooled token alone, not the sequence"},
    ),
}

LST: Any = method_class("LadderSideTuning")
FAMILIES = ("timm_vit", "timm_swin", "bert", "ast", "llama", "t5")


def t5_base(real: bool = False) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32_100, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12,
                      decoder_start_token_id=0)  # type: ignore[call-arg]
    with torch.device("cpu" if real else "meta"):
        return T5ForConditionalGeneration(config)


def vit_base() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0)


def translator(**changes: Any) -> Any:
    """A tiny T5 with its language-model head."""
    from transformers import T5ForConditionalGeneration

    config = t5_config(use_cache=True, decoder_start_token_id=0, **changes)
    with torch.random.fork_rng(devices=[]):
        return spread(T5ForConditionalGeneration(config)).eval()


def speaker() -> Any:
    """A tiny Llama with its language-model head."""
    from transformers import LlamaForCausalLM

    config = _llama_config(WIDTH)
    config.use_cache = True
    with torch.random.fork_rng(devices=[]):
        return spread(LlamaForCausalLM(config)).eval()


def attached(family: str, **options: Any) -> tuple[Any, Any]:
    model = make(family)
    method = LST(**{"reduction": 4, "dropout": 0.0, **options}).attach(model)
    randomize(method, size=0.3)
    return model, method


@pytest.mark.parametrize(("kept", "published"), [
    ([1, 2, 3, 5, 6, 7, 9, 10, 11], 3_878_712), (range(12), 5_097_240), ([3, 7, 11], 1_441_656)])
def test_1_counts(kept: Any, published: int) -> None:
    """The published count has a gate for each dropped layer too; these cannot learn and do not exist here."""
    model = t5_base()
    assert sum(p.numel() for p in model.parameters()) == 222_882_048
    method = LST(drop=[i for i in range(12) if i not in kept]).attach(model)
    assert method.counts()["method"] == published - 2 * (12 - len(kept))
    parts = {"side": 0, "first": 0, "down": 0, "alpha": 0, "norm": 0, "up": 0}
    for graft in method.grafts:
        for name, tensor in graft.named_parameters():
            parts[name.split(".")[0]] += tensor.numel()
    layers = len(kept)
    assert parts == {"side": layers * (4 * 96 * 96 + 2 * 96 * 384 + 2 * 96) + layers * (
        8 * 96 * 96 + 2 * 96 * 384 + 3 * 96) + 2 * 384, "first": 2 * (768 * 96 + 96),
        "down": 2 * layers * (768 * 96 + 96), "alpha": 2 * layers, "norm": 192, "up": 96 * 768 + 768}


def test_2_count_of_the_adapters_beside_it() -> None:
    houlsby: Any = method_class("Houlsby")
    counts = houlsby(bottleneck=48, norms=("norm1", "norm2", "cross.norm", "norm")).attach(t5_base()).counts()
    assert counts["method"] == 48 * (2 * 768 * 48 + 48 + 768) and counts["norms"] == 62 * 768
    assert counts["method"] + counts["norms"] == 3_625_728


@pytest.mark.parametrize("family", FAMILIES)
def test_3_nothing_runs_back_through_the_backbone(family: str) -> None:
    """What the ladders read needs no gradient; the backbone without gradients gives the same; it gets none."""
    model, method = attached(family)
    seen: list[Tensor] = []
    for graft in method.grafts:
        graft.register_forward_pre_hook(lambda module, args: seen.extend(args[:2]))
    model.train()
    out = model(batch(family))
    assert out.requires_grad and seen and not any(tensor.requires_grad for tensor in seen)
    out.square().sum().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("peft."))
    assert all(bool(p.grad.any()) for p in method.trainable().values())
    assert distance(outputs(model, batch(family)), out.detach()) < 1e-6


def test_4_kept_bytes() -> None:
    """A small ViT keeps them in proportion; of ViT-B/16 and T5-base the published shares hold (on demand: seconds and
    gigabytes)."""
    import timm

    def kept(model: nn.Module, name: str, inputs: Tensor, **options: Any) -> int:
        full = {"backbone_mode": "train"} if name == "FullFineTuning" else {}
        method_class(name)(**options, **full).attach(model)  # type: ignore[call-arg]
        return saved_bytes(model.train(), inputs)

    def models() -> Any:
        yield (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=4)), (3, 64, 64)
        if EVERYTHING:
            yield vit_base, (3, 224, 224)

    for build, shape in models():
        pictures = torch.rand(4, *shape)
        full = kept(build(), "FullFineTuning", pictures)
        ladder, fewer = (kept(build(), "LadderSideTuning", pictures, drop=drop) for drop in ((), (0, 2)))
        assert fewer < ladder <= 0.3 * full
        assert kept(build(), "Houlsby", pictures, bottleneck=48) >= 0.6 * full


class Labelled(nn.Module):
    """T5 on ids and fixed labels."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids[:, :8].contiguous(), use_cache=False).logits


def test_4_kept_bytes_of_t5() -> None:
    ids = batch("t5", 4)
    model = Labelled(t5_base(real=True) if EVERYTHING else translator(num_layers=4))
    bare = copy.deepcopy(model)
    LST(reduction=8, drop=(0,)).attach(model)
    method_class("FullFineTuning")(backbone_mode="train").attach(bare)  # type: ignore[call-arg]
    assert saved_bytes(model.train(), ids) <= 0.35 * saved_bytes(bare.train(), ids)


def test_5_gates() -> None:
    _, method = attached("timm_vit", init="magnitude")
    fresh = LST(reduction=4).attach(make("timm_vit"))
    for graft in fresh.grafts:
        if graft.alpha is not None:
            assert graft.mu.item() == 0.5
            [slope] = torch.autograd.grad(graft.mu, graft.alpha)
            assert float(slope) == pytest.approx(2.5)
    assert any(graft.mu.item() != 0.5 for graft in method.grafts if graft.alpha is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_6_a_dropped_block_is_not_read(family: str) -> None:
    """The output does not depend on h_i of a dropped block i, only through the blocks behind it: with the last block
    dropped, not at all."""
    model, method = attached(family, drop=(-1,))
    expected, last = outputs(model, batch(family)), dissect(model).blocks[-1].module
    assert not any(name.endswith("side") for graft in method.grafts if graft.site.module is last
                   for name, child in graft.named_children() if child is not None)

    def noise(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1

    handle = last.register_forward_hook(noise, prepend=True)
    assert torch.equal(outputs(model, batch(family)), expected)
    handle.remove()
    with method.disabled():
        base = outputs(model, batch(family))
        handle = last.register_forward_hook(noise, prepend=True)
        assert not torch.equal(outputs(model, batch(family)), base)
        handle.remove()


@pytest.mark.parametrize(("family", "reduction", "words"), [
    ("timm_vit", 5, "reduction 5 does not divide the width 32"),
    ("timm_vit", 16, "reduction 16 does not divide the heads' width 8"),
    ("llama", 8, "reduction 8 does not divide the heads' width 8 .* into pairs"),
    ("t5", 16, "reduction 16 does not divide the heads' width 8")])
def test_7_shapes_divide(family: str, reduction: int, words: str) -> None:
    model = make(family)
    values = snapshot(model)
    with pytest.raises(ScionError, match=words):
        LST(reduction=reduction).attach(model)
    assert not hasattr(model, "peft") and all(torch.equal(values[k], v) for k, v in snapshot(model).items())
    from transformers import T5Model

    with torch.device("meta"):
        odd = T5Model(t5_config(d_ff=60))
    with pytest.raises(ScionError, match="reduction 8 does not divide the MLP 60"):
        LST(reduction=8).attach(odd)


@pytest.mark.parametrize("family", FAMILIES)
def test_8_pruning(family: str) -> None:
    """Index sets have 1/r of the entries, in order; q, k and v share rows; a thin q is q[rows][:, columns]."""
    from core.peft.side.ladder import first_channels, prune

    model, ratio = make(family), 2
    anatomy = dissect(model)
    method = LST(reduction=ratio).attach(model)
    thin = {graft.site.name: graft.side for graft in method.grafts}
    for stack in anatomy.stacks:
        hidden = first_channels(anatomy, stack, torch.abs, ratio)
        for block in stack.blocks:
            if block.entry is not None:
                break
            before, (keep, hidden) = hidden, prune(block, hidden, lambda weight: weight.detach().double().abs(), ratio)
            heads = block.sites["q"].heads
            assert heads is not None
            sizes = {"q": heads.query * heads.width, "k": heads.key * heads.width, "v": heads.key * heads.width,
                     "o": block.dim, "mlp.up": block.sites["mlp.up"].out_features, "mlp.down": block.dim}
            for role, size in sizes.items():
                rows, columns = keep[role]
                assert columns is not None and len(rows) == size // ratio
                assert all(bool((index.diff() > 0).all()) for index in (rows, columns))
            assert keep["k"][0] is keep["v"][0] and keep["q"][1] is before
            assert heads.key < heads.query or torch.equal(keep["q"][0], keep["k"][0])
            site, side = block.sites["q"], thin[f"{block.index}.block"]
            own = side.get_submodule(site.path.removeprefix(block.path).lstrip(".")).weight
            own = own if site.rows is None else own.chunk(3)[0]
            rows, columns = keep["q"]
            assert columns is not None and torch.equal(own, site.matrix(site.full_weight)[rows][:, columns])


def _incremental(model: Any, tokens: Tensor, **given: Any) -> Tensor:
    cache, parts = None, []
    for step in tokens.split(1, 1):
        name = "decoder_input_ids" if given else "input_ids"
        out = model(**{name: step}, **given, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_9_incremental_decoding(gated: bool) -> None:
    """Token by token with both caches equals the whole sequence at once; so do greedy search and beams."""
    ids, tokens = batch("t5", 2), torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = (ids != 0).long()
    model = translator(**({"feed_forward_proj": "gated-gelu"} if gated else {}))
    randomize(LST(reduction=2, drop=(0,)).attach(model), size=0.3)
    whole = model(ids, attention_mask=mask, decoder_input_ids=tokens, use_cache=False).logits
    encoded = model.get_encoder()(ids, attention_mask=mask)
    assert distance(_incremental(model, tokens, encoder_outputs=encoded, attention_mask=mask), whole) < 1e-4
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": beams}
        with_cache, without = (model.generate(ids, **options, use_cache=use) for use in (True, False))
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("reduction", [1, 2])
@torch.no_grad()
def test_9_incremental_decoding_with_a_table_of_positions(reduction: int) -> None:
    """CodeGen's attention holds its own sines and cosines: a thinner one keeps every so many of the frequencies. At
    width 1 a thin block is the backbone's own."""
    model = language_model("codegen")
    block = dissect(model).blocks[1].module
    table = block.attn.embed_positions  # type: ignore[union-attr]
    method = LST(reduction=reduction).attach(model)
    [graft] = [graft for graft in method.grafts if graft.site.name == "1.block"]
    thin: Any = graft.side
    sines, cosines = table.chunk(2, dim=1)  # type: ignore[operator]
    assert torch.equal(thin.attn.embed_positions, torch.cat([sines[:, ::reduction], cosines[:, ::reduction]], 1))
    assert (thin.attn.head_dim, thin.attn.rotary_dim) == (8 // reduction, 4 // reduction)
    assert thin.attn.scale_attn == pytest.approx((8 / reduction) ** 0.5)
    if reduction == 1:
        states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
        positions = torch.arange(5)[None].expand(2, -1)
        assert torch.equal(thin(states, position_ids=positions)[0], block(states, position_ids=positions)[0])
        return
    randomize(method, size=0.3)
    tokens = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert distance(_incremental(model, tokens), model(tokens, use_cache=False).logits) < 1e-4
    with pytest.raises(ScionError, match="reduction 4 does not divide the 2 frequencies of the rotary"):
        LST(reduction=4).attach(language_model("codegen"))


@torch.no_grad()
def test_9_incremental_decoding_without_an_encoder() -> None:
    tokens = batch("llama", 2)
    model = speaker()
    randomize(LST(reduction=2).attach(model), size=0.3)
    assert distance(_incremental(model, tokens), model(tokens, use_cache=False).logits) < 1e-4
    for beams in (1, 3):
        with_cache, without = (model.generate(tokens, max_new_tokens=6, num_beams=beams, use_cache=use, pad_token_id=0)
                               for use in (True, False))
        assert torch.equal(with_cache, without)


@torch.no_grad()
def test_caches_that_do_not_fit_are_refused() -> None:
    """A cache of fixed size, one begun without the side network, and another encoder's states."""
    ids = batch("t5", 2)
    model = translator()
    method = LST(reduction=2).attach(model)
    with pytest.raises(ScionError, match="must be a DynamicCache"):
        model.generate(ids, max_new_tokens=3, cache_implementation="static")
    with method.disabled():
        begun = model(ids, decoder_input_ids=ids[:, :3], use_cache=True)
        encoded = model.get_encoder()(ids)
    again = {"decoder_input_ids": ids[:, 3:4], "use_cache": True}
    model.get_encoder()(ids)
    with pytest.raises(ScionError, match="begin with an empty cache"):
        model(ids, past_key_values=begun.past_key_values, **again)
    model.get_encoder()(ids.flip(0))
    with pytest.raises(ScionError, match="other encoder states"):
        model(encoder_outputs=encoded, **again)


def _by_hand(model: Any, method: Any, ids: Tensor) -> Tensor:
    """The equations on a ViT, from the backbone's hidden states."""
    with method.disabled(), torch.no_grad():
        vit = model.model
        states = [vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(ids))))]
        for block in vit.blocks:
            states.append(block(states[-1]))
    first, second, last = method.grafts
    s = nn.functional.linear(states[0], first.first.weight, first.first.bias)
    for graft, h in ((first, states[1]), (second, states[2])):
        mu = torch.sigmoid(graft.alpha / 0.1)
        s = graft.side(mu * s + (1 - mu) * nn.functional.linear(h, graft.down.weight, graft.down.bias))
    return nn.functional.linear(last.norm(s), last.up.weight, last.up.bias)[:, 0]


def test_equations() -> None:
    model, method = attached("timm_vit")
    assert distance(outputs(model, batch("timm_vit")), _by_hand(model, method, batch("timm_vit"))) < 1e-6


def test_copies_in_the_midst_of_things() -> None:
    """A forward that failed, and an encoder that waits for its decoder, leave nothing that a copy would carry."""
    model, _ = attached("t5")
    expected = outputs(model, batch("t5"))
    model(batch("t5"))  # with a graph
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, batch("t5")), expected)


@pytest.mark.parametrize("family", ["timm_swin", "bert", "t5"])
def test_a_noisy_trunk(family: str) -> None:
    """With the backbone in train mode its dropout reaches the ladders; a decoder still finds its encoder's side."""
    model, _ = attached(family, backbone_mode="train")
    model.train()
    with seeded(0):
        first, second = model(batch(family)), model(batch(family))
    assert not torch.equal(first, second) and first.requires_grad
    (first + second).sum().backward()


def test_two_side_networks_add_their_changes() -> None:
    base = outputs(make("timm_vit"), batch("timm_vit"))
    alone = []
    for name in ("a", "b"):
        model = make("timm_vit")
        randomize(LST(reduction=4, name=name).attach(model), seed=ord(name))
        alone.append(outputs(model, batch("timm_vit")))
    model = make("timm_vit")
    for name in ("a", "b"):
        randomize(LST(reduction=4, name=name).attach(model), seed=ord(name))
    assert distance(outputs(model, batch("timm_vit")), alone[0] + alone[1] - base) < 1e-5


# ------------------------------------------------------------------------------------------------- fisher


def test_fisher_chooses_by_squared_gradients() -> None:
    """`prepare` gives what the walk gives on sums of squared gradients; it leaves flags and values of the backbone."""
    model, samples = make("bert"), batch("bert", 4).split(1)
    method = LST(reduction=2, init="fisher", samples=3).attach(model)
    values, flags = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in method.tensors().items()}
    method.prepare(samples, lambda ids: model(ids).square().sum())
    assert method.prepared
    with pytest.raises(ScionError, match="Route: .* start values from data"):
        Route([LST(init="fisher")])
    assert all(torch.equal(value, now) for value, now in zip(values.values(), snapshot(model).values(), strict=True))
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    changed = {name for name, tensor in method.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed and all(".side." in name for name in changed)

    plain = make("bert")
    total: dict[str, Tensor] = {}
    for ids in samples[:3]:
        plain.zero_grad()
        plain(ids).square().sum().backward()
        for name, p in plain.named_parameters():
            total[name] = total.get(name, torch.zeros_like(p)) + p.grad.detach() ** 2  # type: ignore[union-attr]
    embedding = sum(v.sum(0) for k, v in total.items() if "embeddings" in k and v.dim() == 2)
    columns = embedding.topk(16).indices.sort().values  # type: ignore[union-attr]
    prefix = "model.encoder.layer.0.attention.self."
    joint = torch.stack([total[f"{prefix}{name}.weight"][:, columns].double() for name in ("query", "key", "value")])
    rows = joint.prod(0).sum(1).topk(16).indices.sort().values
    query = plain.get_parameter(f"{prefix}query.weight")
    assert torch.equal(method.grafts[0].side.attention.self.query.weight, query[rows][:, columns])


class Ready(Backbone):
    """A tiny BERT as a domain's backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.dim = make("bert"), WIDTH

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def test_fisher_within_a_run(tmp_path: Path) -> None:
    """FineTuner prepares once, before the first step, and the data stand where they stood; a method that is loaded or
    resumed is not prepared again."""
    calls: list[int] = []

    class Watched(LST):
        def prepare(self, batches: Any, loss: Any) -> None:
            calls.append(self.steps)
            super().prepare(batches, loss)

    def fit(method: Any, steps: int, checkpoint: Path | None = None, module: Any = None) -> FineTuner:
        module = module or FineTuner(Ready(), Classification(), classes=list("abcd"), optimizer={"lr": 1e-2})
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
        trainer(tmp_path, method, keep, max_steps=steps, enable_checkpointing=True).fit(
            module, loader("bert"), ckpt_path=checkpoint)
        return module

    def new(**options: Any) -> Any:
        return Watched(reduction=2, samples=5, **{"init": "fisher", "dropout": 0.0, **options})

    with seeded(0):
        whole = fit(new(), 4)
    assert calls == [0]
    with seeded(1):
        resumed = fit(new(), 4, tmp_path / "step=2.ckpt")
    assert calls == [0]
    assert all(torch.equal(a, b) for a, b in zip(whole.methods[0].tensors().values(),
                                                 resumed.methods[0].tensors().values(), strict=True))
    fit(whole.methods[0], 2, module=whole)
    assert calls == [0]
    with seeded(0):
        other = fit(new(init="magnitude"), 4)
    assert calls == [0] and any(not torch.equal(a, b) for a, b in zip(
        whole.methods[0].tensors().values(), other.methods[0].tensors().values(), strict=True))
    with pytest.warns(UserWarning, match=r"call method.prepare\(batches, loss\)"):
        trainer(tmp_path, new(), max_steps=1).fit(Plain(make("bert")), loader("bert"))
