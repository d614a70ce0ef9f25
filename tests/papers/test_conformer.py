"""Checks of ConformerAdapter: its block written out, and the checks and pitfalls that concern it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core import load_adapter
from core.adapters.load import save_adapter
from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.graft import checkpoint_activations
from core.peft import method_class
from tests.models import batch, make
from tests.papers.decoding import language_model, later_tokens_are_not_seen
from tests.rows import Row, Variant
from tests.toolkit import distance, outputs, randomize


def conformer_count(anatomy: Anatomy, method: Any) -> int:
    sites = [(s.width, method.width(s.width)) for s in method.sites(anatomy) if s.around]
    return sum(d * (3 * m + 1 + 2 * method.layer_norm) + m * (method.kernel + 5) for d, m in sites)


ROWS = {
    "ConformerAdapter": Row(
        {"parallel": Variant({"bottleneck": 4, "kernel": 5}),
         "sequential": Variant({"bottleneck": 3, "kernel": 3, "parallel": False, "layer_norm": False,
                                "targets": ("attention", "mlp")})},
        trained=conformer_count,
        cards=(("vit_b16", {}, 252_288),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"kernel": 4}, "kernel 4"), ({"targets": ("q",)}, "no sublayer"),
             ({"parallel": "after"}, "'after'")),
        random=True, commutes=None, operators=24, saved=0.9, stored=1.3, running=True,
        absent=("test_accumulation", "test_two_processes"), without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1, "kernel": 3},
        refused={"opt": "its MLP gets the tokens of all samples in one row: a kernel would run across samples"},
    ),
}

ConformerAdapter: Any = method_class("ConformerAdapter")


def written_out(graft: Any, x: Tensor, kernel: int, layer_norm: bool, causal: bool = False) -> Tensor:
    """[LN], 1x1 conv to 2r, GLU, depthwise conv over the tokens, batch norm, SiLU, 1x1 conv back; channels first."""
    if layer_norm:
        x = F.layer_norm(x, x.shape[-1:], graft.norm.weight, graft.norm.bias)
    z = F.conv1d(x.transpose(1, 2), graft.down.weight[:, :, None], graft.down.bias)
    value, gate = z.chunk(2, 1)
    z = value * torch.sigmoid(gate)
    taps, moved = graft.conv.weight[:, 0], torch.zeros_like(z)
    for tap in range(kernel):  # out[t] = sum_k w[k] z[t + k - offset]
        shift = tap - (kernel - 1 if causal else kernel // 2)
        for t in range(z.shape[2]):
            if 0 <= t + shift < z.shape[2]:
                moved[:, :, t] += taps[:, tap] * z[:, :, t + shift]
    z = moved + graft.conv.bias[:, None]
    norm = graft.batch_norm
    z = (z - norm.running_mean[:, None]) / (norm.running_var[:, None] + 1e-5).sqrt()
    z = z * norm.weight[:, None] + norm.bias[:, None]
    z = z * torch.sigmoid(z)
    return F.conv1d(z, graft.up.weight[:, :, None], graft.up.bias).transpose(1, 2)


def _with_statistics(method: Any) -> None:
    """Statistics of a batch norm that has seen something."""
    generator = torch.Generator().manual_seed(3)
    for graft in method.grafts:
        if hasattr(graft, "batch_norm"):
            for buffer, low in ((graft.batch_norm.running_mean, -0.2), (graft.batch_norm.running_var, 0.5)):
                buffer.copy_(low + torch.rand(buffer.shape, generator=generator))


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("role", ["mlp", "attention"])
def test_1_equation(role: str, parallel: bool, layer_norm: bool) -> None:
    """y = F(x) + A(x) beside the sublayer, which reads the normed stream; y = F(x) + A(F(x)) behind it."""
    model = make("timm_vit", dtype=torch.float64)
    method = ConformerAdapter(bottleneck=3, kernel=5, targets=(role,), parallel=parallel, layer_norm=layer_norm,
                              layers=(0,)).attach(model)
    randomize(method, size=0.5)
    _with_statistics(method)
    graft, block = method.grafts[0], dissect(model).blocks[0].module
    assert hasattr(graft.norm, "weight") == layer_norm
    sublayer: Any = {"mlp": block.mlp, "attention": block.attn}[role]
    x = torch.randn(2, 17, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = sublayer(x)
        with method.disabled():
            frozen = sublayer(x)
        expected = frozen + written_out(graft, x if parallel else frozen, 5, layer_norm)
    assert distance(found, expected) < 1e-12 and distance(found, frozen) > 1e-3


@pytest.mark.parametrize("family", ["timm_vit", "bert", "gpt2"])
@pytest.mark.parametrize("role", ["mlp", "attention"])
def test_1_before(role: str, family: str) -> None:
    """y = F(x + A(x)): the branch feeds the sublayer, and stands where that reads."""
    model, inputs = make(family, dtype=torch.float64), batch(family)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    method = ConformerAdapter(bottleneck=3, kernel=5, targets=(role,), parallel="before", layers=(0,)).attach(model)
    randomize(method, size=0.5)
    _with_statistics(method)
    [graft] = [graft for graft in method.grafts if hasattr(graft, "conv")]
    found = outputs(model, inputs)
    entry = dissect(model).blocks[0].into(role)

    def enter(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        changed = x + written_out(graft, x, 5, True, causal=family == "gpt2")
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    with method.disabled():
        frozen = outputs(model, inputs)
        handle = entry.module.register_forward_pre_hook(enter, with_kwargs=True)
        expected = outputs(model, inputs)
        handle.remove()
    assert distance(found, expected) < 1e-12 and distance(found, frozen) > 1e-3


def test_1_before_a_gated_mlp_is_refused() -> None:
    with pytest.raises(ScionError, match="mlp of LlamaModel reads its input in several maps"):
        ConformerAdapter(parallel="before").attach(make("llama"))


def test_1_reads_the_normed_stream() -> None:
    """AST: y = h + FFN(LN2 h) + A(LN2 h)."""
    model = make("ast", dtype=torch.float64)
    method = ConformerAdapter(bottleneck=3, kernel=3).attach(model)
    randomize(method, size=0.5)
    _with_statistics(method)
    layer: Any = dissect(model).blocks[0].module
    seen: list[Tensor] = []
    layer.layernorm_after.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    layer.register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    outputs(model, batch("ast", dtype=torch.float64))
    h, found = seen
    with torch.no_grad(), method.disabled():
        normed = layer.layernorm_after(h)
        expected = h + layer.mlp(normed) + written_out(method.grafts[0], normed, 3, True)
    assert distance(found, expected) < 1e-12


def test_2_start() -> None:
    """With zeros in the last projection: the frozen model, to the bit, in training as well."""
    model, inputs = make("ast"), batch("ast")
    expected = outputs(model, inputs)
    method = ConformerAdapter(bottleneck=4).attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    model.train()
    assert torch.equal(outputs(model, inputs), expected)
    assert all(graft.conv.weight.shape == (4, 1, 31) for graft in method.grafts)


def test_3_statistics_are_kept(tmp_path: Any) -> None:
    """Batch norms learn from training alone; what they have learned is saved, and comes back."""
    model, inputs = make("ast"), batch("ast")
    method = ConformerAdapter(bottleneck=3, kernel=3).attach(model)
    randomize(method, size=0.3)
    norm = method.grafts[0].batch_norm
    outputs(model, inputs)
    assert not norm.running_mean.any() and bool((norm.running_var == 1).all())
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
    model.train()
    outputs(model, inputs)
    model.eval()
    batch_mean, batch_var = seen[0].mean((0, 2)), seen[0].transpose(0, 1).flatten(1).var(1)
    assert distance(norm.running_mean, 0.1 * batch_mean) < 1e-5
    assert distance(norm.running_var, 0.9 + 0.1 * batch_var) < 1e-5
    save_adapter([method], tmp_path / "adapter")
    fresh = make("ast")
    loaded = load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(loaded.grafts[0].batch_norm.running_mean, norm.running_mean)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_3_a_recomputed_batch_counts_once() -> None:
    inputs, statistics = batch("ast"), []
    for on in (False, True):
        model = make("ast")
        method = ConformerAdapter(bottleneck=3, kernel=3).attach(model)
        randomize(method, size=0.3)
        checkpoint_activations(model, on)
        model.train()
        model(inputs).square().sum().backward()
        statistics.append([buffer.clone() for buffer in method.module.buffers()])
        statistics.append([tensor.grad for tensor in method.trainable().values()])
    assert statistics[0] and all(torch.equal(*pair) for pair in zip(statistics[0], statistics[2], strict=True))
    assert all(torch.equal(*pair) for pair in zip(statistics[1], statistics[3], strict=True))


def test_4_causal_kernel() -> None:
    """Behind causal attention the kernel sees the token itself and those before it."""
    model = make("llama", dtype=torch.float64)
    method = ConformerAdapter(bottleneck=3, kernel=5, layers=(0,)).attach(model)
    randomize(method, size=0.5)
    _with_statistics(method)
    mlp: Any = dissect(model).blocks[0].module.mlp
    x = torch.randn(2, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = mlp(x)
        with method.disabled():
            expected = mlp(x) + written_out(method.grafts[0], x, 5, True, causal=True)
    assert distance(found, expected) < 1e-12


@pytest.mark.parametrize("family", ["llama", "clip_text"])
def test_4_causal(family: str) -> None:
    later_tokens_are_not_seen(family, ConformerAdapter(bottleneck=3, kernel=5, targets=("attention", "mlp")))


@pytest.mark.parametrize("name", ["llama", "t5", "codegen"])
def test_4_a_cache_is_refused(name: str) -> None:
    """Earlier tokens are not in a cache; without one it generates; an encoder's adapters do not mind it."""
    model = language_model(name)
    method = ConformerAdapter(bottleneck=3, kernel=3).attach(model)
    randomize(method, size=0.3)
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ScionError, match="use_cache=False"):
        model.generate(ids, use_cache=True, **options)
    assert len(model.generate(ids, use_cache=False, **options)) == 2
    if name == "t5":
        encoder = language_model(name)
        randomize(ConformerAdapter(bottleneck=3, kernel=3, targets=("encoder.mlp",)).attach(encoder), size=0.3)
        assert torch.equal(encoder.generate(ids, use_cache=True, **options),
                           encoder.generate(ids, use_cache=False, **options))


def test_5_counts_of_a_layer() -> None:
    """LN 1,536, down 12,304, convolution 256, batch norm 16, up 6,912 at width 768, reduction 96."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0, depth=1)
    graft = ConformerAdapter().attach(model).grafts[0]
    counts = {name: sum(p.numel() for p in child.parameters()) for name, child in graft.named_children()}
    assert counts == {"norm": 1_536, "down": 12_304, "conv": 256, "batch_norm": 16, "up": 6_912}
