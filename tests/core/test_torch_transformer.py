"""torch's own transformer: the same functions as on a network with a module for each map, in eval mode, under masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import dissect, load_adapter, peft
from core.anatomy import BlockDescription, Description, Rows, family
from core.anatomy.torch_attention import attention_forward
from core.errors import ScionError
from tests.toolkit import differences, distance, outputs, randomize, same, snapshot, trace

DIM, HEADS = 16, 4
WIDE = ("q", "k", "v", "o", "mlp.up", "mlp.down")


class Layer(nn.Module):
    """nn.TransformerEncoderLayer with a module for each map."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention, self.mlp, self.attend = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, padding: Tensor | None) -> Tensor:
        h = self.norm1(x)
        q, k, v = (part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mask = None if padding is None else ~padding[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.attention(self.o(out))
        return x + self.mlp(self.down(F.relu(self.up(self.norm2(x)))))


class Separate(nn.Module):
    """nn.TransformerEncoder of such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(Layer() for _ in range(2)), nn.LayerNorm(DIM)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask)
        return self.norm(x)


@family(f"{__name__}:Separate", "tests.core.test_torch_transformer:Separate")
def separate(model: Any) -> Description:
    roles: Any = {"q": "q", "k": "k", "v": "v", "o": "o", "attention": "attention", "norm1": "norm1", "mlp.up": "up",
                  "mlp.down": "down", "mlp": "mlp", "norm2": "norm2"}
    return Description([BlockDescription(path=f"layers.{i}", dim=DIM, heads=(HEADS, HEADS, DIM // HEADS), roles=roles)
                        for i in range(2)], {"norm": "norm", "final_norm": "norm"}, final="norm")


class Described(nn.Module):
    """A network of one's own around torch's encoder, described as docs/families.md shows."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@family(f"{__name__}:Described", "tests.core.test_torch_transformer:Described")
def described(model: Any) -> Description:
    thirds: Any = {role: ("self_attn", Rows(i * DIM, (i + 1) * DIM)) for i, role in enumerate("qkv")}
    roles: Any = {**thirds, "o": "self_attn.out_proj", "attend": "self_attn", "mlp.up": "linear1",
                  "mlp.down": "linear2", "attention": "dropout1", "mlp": "dropout2", "norm1": "norm1", "norm2": "norm2"}
    return Description([BlockDescription(path=f"encoder.layers.{i}", dim=DIM, heads=(HEADS, HEADS, DIM // HEADS),
                                         roles=roles) for i in range(2)])


def _encoder(dtype: torch.dtype = torch.float64, **options: Any) -> nn.TransformerEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True, norm_first=True,
                                           **options)
        encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.3)
    return encoder.to(dtype).eval()


def _postnorm(dtype: torch.dtype = torch.float32) -> nn.TransformerEncoder:
    """The form that takes torch's fast path and nested tensors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.1, batch_first=True)
        return nn.TransformerEncoder(layer, 2).to(dtype).eval()


def _as_separate(encoder: nn.TransformerEncoder) -> Separate:
    other: Any = Separate().double().eval()
    stack: Any = encoder
    for mine, theirs in zip(stack.layers, other.layers, strict=True):
        for i, part in enumerate((theirs.q, theirs.k, theirs.v)):
            part.weight.data = mine.self_attn.in_proj_weight.detach()[i * DIM:(i + 1) * DIM].clone()
            part.bias.data = mine.self_attn.in_proj_bias.detach()[i * DIM:(i + 1) * DIM].clone()
        for own, part in ((mine.self_attn.out_proj, theirs.o), (mine.linear1, theirs.up), (mine.linear2, theirs.down),
                          (mine.norm1, theirs.norm1), (mine.norm2, theirs.norm2)):
            part.load_state_dict(own.state_dict())
    other.norm.load_state_dict(stack.norm.state_dict())
    return other


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[2, 4:] = True
    return x, padding


ON_MAPS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 2}, "PiSSA": {"rank": 2}, "DoRA": {"rank": 2}, "AdaLoRA": {"rank": 2}, "MoS": {"rank": 2},
    "TriAdaptLoRA": {"rank": 2}, "VeRA": {"rank": 3}, "FourierFT": {"frequencies": 5}, "LoHa": {"rank": 2},
    "LoKr": {"rank": 1}, "OFT": {"block": 4}, "BOFT": {}, "Bone": {"rank": 4}, "Bat": {"rank": 2}, "SVFit": {},
    "Hydra": {}, "FacT": {"rank": 2, "dropout": 0.0}, "Consolidator": {"groups": 2}, "LIFT": {"rank": 1},
    "SpIEL": {"rank": 1}, "APET": {"count": 60}, "PST": {"rank": 2, "score_rank": 1, "initial": 0.3}, "RAMT": {}}
OTHERS: dict[str, dict[str, Any]] = {
    "RepAdapter": {"dropout": 0.0}, "IA3": {}, "LoFiT": {}, "Houlsby": {"bottleneck": 3}, "Pfeiffer": {"bottleneck": 3},
    "ParallelAdapter": {"bottleneck": 3, "targets": ("mlp", "o")}, "SSF": {"targets": ("o", "mlp.up", "norm1", "norm")}}
ALL = {**{name: {**config, "targets": WIDE} for name, config in ON_MAPS.items()}, **OTHERS}


@pytest.mark.parametrize(("name", "config"), ALL.items(), ids=ALL)
def test_as_with_separate_maps(name: str, config: dict[str, Any]) -> None:
    """Outputs, under padding and without gradients too, and gradients; the base comes back to the last bit."""
    found: list[list[Any]] = []
    values_of: list[Tensor] = []
    x, padding = _inputs()
    encoder = _encoder()
    left, values, start = trace(encoder), snapshot(encoder), outputs(encoder, x)
    for model in (encoder, _as_separate(encoder)):
        method: Any = peft.method_class(name)(**config).attach(model)
        randomize(method, size=0.2)
        values_of = [t.detach().clone() for t in method.trainable().values()] if not found else values_of
        with torch.no_grad():
            for tensor, value in zip(method.trainable().values(), values_of, strict=True):
                tensor.copy_(value)  # what stands at the fused map has a name, and so draws, of its own
            silent = [model(x), model(x, src_key_padding_mask=padding)[~padding]]
        out = model(x, src_key_padding_mask=padding)
        out[~padding].square().sum().backward()
        found.append([*silent, out[~padding].detach(), *(t.grad for t in method.trainable().values())])
        if method.mergeable:
            method.merge()
            assert distance(outputs(model, x), silent[0]) < 1e-10
            method.unmerge()
    assert distance(found[0][0], start) > 1e-3
    for one, two in zip(*found, strict=True):
        assert one.shape == two.shape and float((one - two).abs().max()) < 1e-9 * max(1.0, float(two.abs().max()))
    methods = encoder.peft.methods.values()  # type: ignore[union-attr]
    for method in [*methods]:
        method.remove()
    encoder.zero_grad(set_to_none=True)
    assert differences(left, trace(encoder)) == [] and same(values, snapshot(encoder))
    assert torch.equal(outputs(encoder, x), start)


@pytest.mark.parametrize("wrap", [False, True], ids=["built in", "described"])
@pytest.mark.parametrize("targets", [("mlp.up",), ("o",), ("q", "v"), ("norm1",)], ids=str)
def test_the_fast_path_hides_nothing(targets: tuple[str, ...], wrap: bool) -> None:
    """In eval mode, without gradients, torch computes a whole layer in one call: not while something stands in it."""
    encoder = _postnorm()
    model: Any = Described(encoder) if wrap else encoder
    x, padding = _inputs(torch.float32)
    start = outputs(model, x)
    method = (peft.method_class("SSF") if targets == ("norm1",) else peft.method_class("LoRA"))(targets=targets)
    method.attach(model)
    randomize(method, size=0.3)
    with torch.no_grad():
        silent = model(x)
    assert distance(silent, start) > 1e-3 and distance(silent, model(x).detach()) < 1e-5
    with method.disabled():
        assert torch.equal(outputs(model, x), start)
    method.merge()
    assert distance(outputs(model, x), silent) < 1e-4


@pytest.mark.parametrize("wrap", [False, True], ids=["built in", "described"])
def test_training_with_a_padding_mask(wrap: bool) -> None:
    """Frozen layers are in eval mode, where torch would make nested tensors; every tensor gets its gradient."""
    encoder = _postnorm()
    model: Any = Described(encoder) if wrap else encoder
    x, padding = _inputs(torch.float32)
    method = peft.method_class("LoRA")(targets=WIDE).attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values(), 1e-2)
    losses = []
    model.train()
    for _ in range(4):
        out = model(x, padding) if wrap else model(x, src_key_padding_mask=padding)
        loss = out[~padding].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(t.grad is not None and bool(t.grad.any()) for t in method.trainable().values())
    assert encoder.use_nested_tensor is False
    method.remove()
    assert encoder.use_nested_tensor is True


def test_one_method_off_leaves_the_other_its_path() -> None:
    model, (x, _) = _postnorm(), _inputs(torch.float32)
    one = peft.method_class("LoRA")(targets=("mlp.up",), name="one").attach(model)
    two = peft.method_class("LoRA")(targets=("mlp.down", "o"), name="two").attach(model)
    randomize(one, size=0.3)
    randomize(two, seed=1, size=0.3)
    alone = copy.deepcopy(model)
    alone.peft.methods["one"].remove()  # type: ignore[union-attr]
    with one.disabled():
        assert torch.equal(outputs(model, x), outputs(alone, x))
    one.remove()
    assert torch.equal(outputs(model, x), outputs(alone, x))


def test_encoder_and_decoder(tmp_path: Any) -> None:
    """nn.Transformer: cross-attention has maps of its own, whose queries and keys come from different states."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = nn.Transformer(DIM, HEADS, 2, 2, 2 * DIM, dropout=0.0, batch_first=True).double().eval()
    (source, padding), target = _inputs(), _inputs()[0][:, :4] + 0.5
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)

    def run() -> Tensor:
        with torch.no_grad():
            return model(source, target, tgt_mask=causal, src_key_padding_mask=padding,
                         memory_key_padding_mask=padding, tgt_is_causal=True)

    start = run()
    anatomy = dissect(model)
    assert [block.stage for block in anatomy.blocks] == ["encoder"] * 2 + ["decoder"] * 2
    method: Any = peft.method_class("LoRA")(rank=2, targets=("q", "v", "cross.q", "cross.k", "cross.v", "cross.o"))
    method.attach(model)
    assert method.counts()["method"] == 2 * 2 * DIM * (4 + 4 + 4 * 2)
    assert distance(run(), start) < 1e-12
    randomize(method, size=0.3)
    expected = run()
    assert distance(expected, start) > 1e-3
    method.save(tmp_path)
    method.merge()
    assert distance(run(), expected) < 1e-10
    method.unmerge()
    method.remove()
    assert torch.equal(run(), start)
    load_adapter(tmp_path, model)
    assert distance(run(), expected) < 1e-12
    shorter = model(source, target[:, :2], tgt_mask=causal[:2, :2], src_key_padding_mask=padding,
                    memory_key_padding_mask=padding)
    assert distance(shorter.detach(), expected[:, :2]) < 1e-10  # causal all the same


@pytest.mark.parametrize("name", ["PrefixTuning", "VPT", "PTuningV2", "VQT"])
def test_methods_of_attention(name: str) -> None:
    model, (x, padding) = _encoder(), _inputs()
    start = outputs(model, x)
    if name == "VQT":
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = model

            def forward(self, x: Tensor) -> Tensor:
                return self.encoder(x)[:, 0]

        wrapped: Any = Pooled().eval()
        method = peft.method_class(name)(dropout=0.0).attach(wrapped)
        assert outputs(wrapped, x).shape == (3, 3 * DIM)
        return
    method = peft.method_class(name)(tokens=3).attach(model)
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)[~padding]
    assert distance(outputs(model, x), start) > 1e-3 and bool(torch.isfinite(found).all())
    model(x).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in method.trainable().values())


def test_biases_of_the_fused_map() -> None:
    model = _encoder()
    method = peft.method_class("BitFit")().attach(model)
    total = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
    assert method.counts()["method"] == total and any("in_proj_bias" in name for name in method.trainable())
    part = peft.method_class("BitFit")(targets=("qkv", "o")).attach(_encoder())
    assert {name.rpartition(".")[2] for name in part.trainable()} == {"in_proj_bias", "bias"}


def test_what_cannot_be() -> None:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM)
    with pytest.raises(ScionError, match="batch_first=True"):
        peft.method_class("LoRA")().attach(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))
    with pytest.raises(ScionError, match="set dropout to 0"):
        peft.method_class("LoRA")(dropout=0.1).attach(_encoder())
    with pytest.raises(ScionError, match="only methods that merge"):
        peft.method_class("UniPELT")(reparametrize=False, targets=("q", "v")).attach(_encoder())
    peft.method_class("LoRA")(dropout=0.1, targets=("o", "mlp.up")).attach(_encoder())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_is_torch_s(batch_first: bool, need_weights: bool) -> None:
    """Masks of all kinds, unbatched and cross, with the weights where they are asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first).double()
        q, kv = torch.randn(2, 5, DIM).double(), torch.randn(2, 7, DIM).double()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    seen = torch.ones(5, 7, dtype=torch.bool).triu(3)
    masks: list[dict[str, Any]] = [
        {}, {"key_padding_mask": padding}, {"attn_mask": seen}, {"attn_mask": seen.double() * -3},
        {"attn_mask": seen.repeat(2 * HEADS, 1, 1), "key_padding_mask": padding.double() * -5}]
    for mask in masks:
        for average in (True, False):
            given = (q, kv, kv) if batch_first else tuple(x.transpose(0, 1) for x in (q, kv, kv))
            one, weights = attention(*given, need_weights=need_weights, average_attn_weights=average, **mask)
            two, found = attention_forward(attention, *given, need_weights=need_weights, average_attn_weights=average,
                                           **mask)
            assert distance(two, one) < 1e-12 and (weights is None) == (found is None)
            assert weights is None or found is None or distance(found, weights) < 1e-12
    alone, _ = attention(q[0], q[0], q[0], need_weights=need_weights)
    assert distance(attention_forward(attention, q[0], q[0], q[0], need_weights=need_weights)[0], alone) < 1e-12
