"""Checks of SSF: the checks by their numbers there (8 is about the training script's schedule)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.anatomy import Anatomy
from core.errors import ScionError
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import meta
from tests.rows import Row, Variant
from tests.toolkit import distance, optimizer_of, outputs, same, snapshot, train


def ssf_count(anatomy: Anatomy, method: Any) -> int:
    return sum((1 + site.takes_bias) * site.out_features for site in method.sites(anatomy))


ROWS = {
    "SSF": Row(
        {"published": Variant(), "identity": Variant({"init": "identity", "patch_merging": True}, random=False),
         "few": Variant({"targets": ("norm", "mlp.down")})},
        trained=ssf_count,
        cards=(("vit_b16", {}, 205_824),),
        bad=(({"init": "zero"}, "'zero'"), ({"shift": "some"}, "'some'"),
             ({"targets": ("block",)}, "no weight of its own"), ({"targets": ("nrom1",)}, "'norm1'")),
        random=True, commutes=None, operators=3, saved=1.4, absent=("test_no_graph_below_the_first_graft",), size=0.01,
        artifact={"targets": ("o",)},
    ),
}

SSF: Any = method_class("SSF")


def _timm(name: str, classes: int = 0) -> nn.Module:
    import timm

    return meta(lambda: timm.create_model(name, num_classes=classes))


def _spread(method: Any, size: float = 0.2) -> Any:
    """gamma normal (1, size), beta normal (0, size)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for graft in method.grafts:
            for tensor, mean in ((graft.gamma, 1.0), (graft.beta, 0.0)):
                if tensor is not None:
                    tensor.copy_(mean + size * torch.randn(tensor.shape, generator=generator))
    return method


# ------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("name", "classes", "count", "head"), [
    ("vit_base_patch16_224", 0, 205_824, 0),
    ("vit_base_patch16_224", 100, 205_824, 282_724 - 205_824),
    ("vit_base_patch16_224", 1000, 205_824, 974_824 - 205_824),
    ("vit_small_patch16_224", 0, 102_912, 0),
    ("swin_base_patch4_window7_224", 0, 267_264, 0),
    ("swin_base_patch4_window7_224", 100, 267_264, 369_764 - 267_264)])
def test_1_and_3_counts_with_a_head(name: str, classes: int, count: int, head: int) -> None:
    counts = SSF().attach(_timm(name, classes)).counts()
    assert (counts["method"], counts["head"]) == (count, head)


def test_1_per_block() -> None:
    """2 (D + 3 D + D + D + 4 D + D) = 22 D in a block; the patches' projection and the final norm outside."""
    method = SSF().attach(_timm("vit_base_patch16_224"))
    inside = [graft for graft in method.grafts if graft.site.block == 3]
    assert {graft.site.role: graft.gamma.numel() // 768 for graft in inside} == {
        "norm1": 1, "qkv": 3, "o": 1, "norm2": 1, "mlp.up": 4, "mlp.down": 1}
    assert sum(p.numel() for graft in inside for p in graft.parameters()) == 16_896
    assert {graft.site.path for graft in method.grafts if graft.site.block is None} == {"patch_embed.proj", "norm"}


def test_3_patch_merging() -> None:
    """The released code never builds the scales in front of Swin's three downsamplings; the option does. On Swin-B they
    are 7,168 numbers."""
    methods = [SSF(patch_merging=on).attach(_timm("swin_base_patch4_window7_224")) for on in (False, True)]
    paths = [{graft.site.path for graft in method.grafts} for method in methods]
    assert paths[1] - paths[0] == {f"layers.{i}.downsample.norm" for i in (1, 2, 3)} and paths[0] < paths[1]
    assert [method.counts()["method"] for method in methods] == [267_264, 274_432]


def test_sites_of_a_convolutional_network() -> None:
    """Stem, each block's convolution, norm and two maps, the norm and convolution between stages, the final norm."""
    method = SSF().attach(_timm("convnext_tiny"))
    per_block = {graft.site.role for graft in method.grafts if graft.site.block == 0}
    assert per_block == {"conv", "norm2", "mlp.up", "mlp.down"}
    outside = {graft.site.path for graft in method.grafts if graft.site.block is None}
    between = {f"stages.{i}.downsample.{j}" for i in (1, 2, 3) for j in (0, 1)}
    assert outside == {"stem.0", "stem.1", "head.norm"} | between
    dims, depths = (96, 192, 384, 768), (3, 3, 9, 3)
    blocks = sum(depth * 2 * (1 + 1 + 4 + 1) * dim for dim, depth in zip(dims, depths, strict=True))
    stem, joints = 4 * 96, sum(2 * (before + after) for before, after in zip(dims, dims[1:], strict=False))
    assert method.counts()["method"] == blocks + stem + joints + 2 * 768


# ------------------------------------------------------------------------------------------------- function


def test_4_start() -> None:
    """Ones and zeros give the backbone bit for bit; the published start, normal with 0.02, is near it."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    expected = outputs(model, inputs)
    SSF(init="identity").attach(model)
    assert torch.equal(outputs(model, inputs), expected)
    model = make("timm_vit")
    method = SSF().attach(model)
    assert 1e-3 < distance(outputs(model, inputs), expected) < 1
    for name, mean in (("gamma", 1.0), ("beta", 0.0)):
        values = torch.cat([getattr(graft, name).detach() for graft in method.grafts])
        assert abs(float(values.std()) - 0.02) < 2e-3 and abs(float(values.mean()) - mean) < 2e-3


@pytest.mark.parametrize("family", ["timm_vit", "timm_swin", "timm_convnext", "bert"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_5_merge(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """The same outputs, exactly the backbone's keys, shapes and number of parameters, and no module of the method."""
    model, inputs = make(family, dtype=dtype), batch(family, dtype=dtype)
    before, modules = snapshot(model), [type(module) for module in model.modules()]
    total = sum(p.numel() for p in model.parameters())
    method = _spread(SSF().attach(model))
    expected = outputs(model, inputs)
    method.merge()
    assert float((outputs(model, inputs) - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))
    assert {name: t.shape for name, t in model.state_dict().items()} == {name: t.shape for name, t in before.items()
                                                                          if name in model.state_dict()}
    assert [type(module) for module in model.modules()] == modules
    assert sum(p.numel() for p in model.parameters()) == total
    method.unmerge()
    assert same(before, snapshot(model))


def _written_out(block: Any, at: dict[str, Any], x: Tensor, behind_gelu: bool = False) -> Tensor:
    """The paper's block: every operator's output is scaled and shifted; the MLP's first one before its GELU."""
    def ssf(role: str, y: Tensor) -> Tensor:
        return at[role].gamma * y + at[role].beta

    def linear(module: Any, y: Tensor) -> Tensor:
        return y @ module.weight.t() + module.bias

    def norm(module: Any, y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

    def gelu(y: Tensor) -> Tensor:
        return y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))

    attention, mlp = block.attn, block.mlp
    h = ssf("qkv", linear(attention.qkv, ssf("norm1", norm(block.norm1, x))))
    q, k, v = h.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    x = x + ssf("o", linear(attention.proj, (scores @ v).transpose(1, 2).flatten(2)))
    u = linear(mlp.fc1, ssf("norm2", norm(block.norm2, x)))
    u = ssf("mlp.up", gelu(u)) if behind_gelu else gelu(ssf("mlp.up", u))
    return x + ssf("mlp.down", linear(mlp.fc2, u))


def test_6_places_in_a_block() -> None:
    """The block with SSF is the one written out; with the MLP's first scale behind the activation it is another."""
    model: Any = make("timm_vit", dtype=torch.float64)
    method = _spread(SSF().attach(model))
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for index, block in enumerate(model.model.blocks):
        at = {graft.site.role: graft for graft in method.grafts if graft.site.block == index}
        with torch.no_grad():
            found = block(x)
            assert distance(found, _written_out(block, at, x)) < 1e-10
            assert distance(found, _written_out(block, at, x, behind_gelu=True)) > 1e-2


def test_6_patches_before_positions_final_norm_before_pooling() -> None:
    model: Any = make("timm_vit", dtype=torch.float64)
    inputs = batch("timm_vit", dtype=torch.float64)
    vit = model.model
    method = _spread(SSF(targets=("patch_embed", "norm")).attach(model))
    first, last = method.grafts
    seen: list[Tensor] = []
    vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    found = outputs(model, inputs)
    with torch.no_grad(), method.disabled():
        patches = first.gamma * vit.patch_embed.proj(inputs).flatten(2).transpose(1, 2) + first.beta
        tokens = torch.cat([vit.cls_token.expand(len(inputs), -1, -1), patches], 1) + vit.pos_embed
        assert distance(seen[0], tokens) < 1e-12
        assert distance(found, (last.gamma * vit.norm(seen[1]) + last.beta)[:, 0]) < 1e-12


def test_6_first_part_of_a_fused_projection_is_q() -> None:
    """Its scale has 3 D entries; the first D change q alone."""
    model: Any = make("timm_vit", dtype=torch.float64)
    method = SSF(init="identity", targets=("qkv",), layers=(0,)).attach(model)
    graft, = method.grafts
    assert graft.gamma.shape == (96,)
    linear = graft.site.module
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        base = linear(x)
        graft.gamma[:32] = 1.5
        changed = linear(x)
    assert torch.equal(changed[..., 32:], base[..., 32:]) and distance(changed[..., :32], 1.5 * base[..., :32]) < 1e-12


def test_7_one_step() -> None:
    """The frozen tensors stay bit for bit; gradients are at gamma and beta alone; nothing of one axis is decayed."""
    model = make("timm_vit")
    before = snapshot(model)
    method = SSF().attach(model)
    assert {name.rpartition(".")[2] for name in method.trainable()} == {"gamma", "beta"}
    optimizer = optimizer_of(method, 1e-2, 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in method.trainable().values()}
    assert all(group["weight_decay"] == 0.0 for group in optimizer.param_groups)
    train(model, method, "timm_vit", steps=1)
    assert same(before, snapshot(model))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name.startswith("peft."))


# ------------------------------------------------------------------------------------------------- where it may stand


def test_hosts_without_a_weight() -> None:
    """A norm without gain and shift, an activation or a whole attention has nothing to take a scale in."""
    model: Any = make("timm_vit")
    model.model.blocks[0].norm1 = nn.LayerNorm(32, elementwise_affine=False)
    with pytest.raises(ScionError, match="0.norm1 .LayerNorm. has no weight of its own"):
        SSF(targets=("norm1",)).attach(model)
    with pytest.raises(ScionError, match="no weight of its own"):
        SSF(targets=("attention",)).attach(make("timm_vit"))


def _without_biases(dtype: torch.dtype = torch.float32) -> Any:
    """A ViT of width 4 whose fused projection has no bias."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=4, depth=1, num_heads=2,
                                 num_classes=0, qkv_bias=False).to(dtype).eval()


def test_5_hosts_without_a_bias_get_one() -> None:
    """b' = gamma b + beta with b = 0: all 2 x 52 numbers of a block and its ends are there, and merge exactly."""
    model = _without_biases(torch.float64)
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = snapshot(model)
    method = _spread(SSF().attach(model))
    assert method.counts()["method"] == 2 * (4 + 4 + 12 + 4 + 4 + 16 + 4 + 4) == 104
    expected = outputs(model, inputs)
    qkv = next(graft for graft in method.grafts if graft.site.role == "qkv")
    method.merge()
    assert torch.equal(model.blocks[0].attn.qkv.bias, qkv.beta)
    assert distance(outputs(model, inputs), expected) < 1e-10
    method.unmerge()
    assert same(values, snapshot(model)) and model.blocks[0].attn.qkv.bias is None


@pytest.mark.parametrize(("family", "without"), [
    ("t5", {"norm", "norm1", "norm2", "cross.norm"}), ("llama", {"norm", "norm1", "norm2"}), ("timm_eva", {"qkv"})])
def test_where_no_bias_can_be(family: str, without: set[str]) -> None:
    """Norms by root mean square, and a projection whose bias the attention adds itself, have gamma alone."""
    model, inputs = make(family, dtype=torch.float64), batch(family, dtype=torch.float64)
    method = _spread(SSF().attach(model))
    assert {graft.site.role for graft in method.grafts if graft.beta is None} == without
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-10


def test_shift_everywhere_or_where_there_are_biases() -> None:
    """As in files of earlier versions: null is where the operator has a bias; true is behind every one."""
    model, inputs = make("t5"), batch("t5")
    method = SSF(shift=None).attach(model)
    assert all(graft.beta is None for graft in method.grafts)
    expected = outputs(model, inputs)
    method.merge()
    assert distance(outputs(model, inputs), expected) < 1e-5
    model = make("t5")
    shifted = SSF(shift=True, targets=("norm1",)).attach(model)
    assert all(graft.beta is not None for graft in shifted.grafts)
    with pytest.raises(ScionError, match="bias"):
        shifted.merge()
    assert all(graft.beta is None for graft in SSF(shift=False).attach(make("timm_vit")).grafts)
