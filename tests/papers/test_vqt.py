"""Checks of VQT: the checks by their numbers there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import FineTuner
from core.anatomy import Anatomy, dissect
from core.backbone import Backbone
from core.cli import main
from core.errors import ScionError
from core.peft import method_class
from core.tasks import Classification
from core.training.load_run import load_run
from tests.core.test_commands import base, config, sounds  # noqa: F401
from tests.models import FAMILIES, WIDTH, batch, make, with_head
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant
from tests.toolkit import EVERYTHING, distance, loader, outputs, randomize, same, saved_bytes, snapshot, trainer, uneven


def vqt_count(anatomy: Anatomy, method: Any) -> int:
    blocks = [block for block in anatomy.blocks if block.index in anatomy.layer_indices(method.layers)]
    return sum(method.tokens * (block.dim + (method.reduce == "sum")) for block in blocks)


def to_compact(method: Any) -> None:
    """As after a wide stage that left a head of random columns."""
    head: Any = nn.utils.skip_init(nn.Linear, method.feature_dim(WIDTH, dissect(method.root)), 4)
    with torch.no_grad():
        head.weight.copy_(torch.rand(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    method.advance(head)


ROWS = {
    "VQT": Row(
        {"concat": Variant(learns_on={"codegen": {"tokens": 3, "lr": 0.06}}),
         "mean": Variant({"tokens": 3, "reduce": "mean", "dropout": 0.0, "normalize": False}),
         "sum": Variant({"tokens": 3, "reduce": "sum"}),
         "compact": Variant({"keep": 0.5}, to_compact, alone=True)},
        trained=vqt_count,
        cards=(("vit_b16", {}, 9_216), ("vit_b16", {"tokens": 10}, 92_160), ("vit_b16", {"tokens": 20}, 184_320)),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"reduce": "max"}, "'max'"),
             ({"reduce": "sum"}, "2 tokens"), ({"keep": 0.0}, "keep 0"), ({"sparsity": -1.0}, "sparsity -1"),
             ({"lr_factor": 0.0}, "lr_factor 0")),
        random=True, commutes=False, operators=24, saved=0.25, stored=2.0,
        artifact={},
        refused={
            "timm_swin": "its blocks cut a map into windows, each with keys of its own; queries are no map",
            **NO_ATTENTION, **NO_CALL},
    ),
}

VQT: Any = method_class("VQT")
LoRA: Any = method_class("LoRA")
SEQUENCES = tuple(family for family in FAMILIES if family != "timm_swin")


class Encoder(Backbone):
    """A tiny model of the matrix as a backbone."""

    def __init__(self, model: nn.Module | None = None, dim: int = WIDTH) -> None:
        super().__init__()
        self.model, self.dim = model or make("timm_vit"), dim

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)


def vit_b16(device: str = "meta") -> nn.Module:
    import timm

    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model("vit_base_patch16_224", num_classes=0)


def tuner_of(model: nn.Module | None = None, dim: int = WIDTH, classes: int = 4) -> FineTuner:
    """The same start each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FineTuner(Encoder(model, dim), Classification(), classes=[str(c) for c in range(classes)],
                         optimizer={"lr": 1e-2, "weight_decay": 0.0}, schedule={"name": "constant"})


def fit(folder: Path, method: Any, tuner: FineTuner | None = None, steps: int = 6, **options: Any) -> FineTuner:
    tuner = tuner or tuner_of()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        run = trainer(folder, method, max_steps=steps)
        run.fit(tuner, loader("timm_vit"), **options)
        run.save_checkpoint(folder / "last.ckpt")
    return tuner.eval()


def head_of(tuner: FineTuner) -> Any:
    return tuner.task.head[1]  # type: ignore[index]


# ------------------------------------------------------------------------------------------------- the checks


@pytest.mark.parametrize(("tokens", "count"), [(1, 9_216), (10, 92_160), (20, 184_320)])
def test_1_query_parameters(tokens: int, count: int) -> None:
    method = VQT(tokens=tokens).attach(vit_b16())
    assert method.counts() == {"method": count, "norms": 0, "head": 0, "stored": count}
    assert {tuple(t.shape) for t in method.trainable().values()} == {(tokens, 768)}


def test_2_head_parameters() -> None:
    """998,500 for 100 classes; 6,988 of 9,984 columns are kept at 0.7."""
    tuner = tuner_of(vit_b16(), dim=768, classes=100)
    method = VQT(keep=0.7).attach(tuner.backbone)
    tuner.fit_head()
    assert sum(p.numel() for p in tuner.task.head.parameters()) == 998_500
    method.advance(tuner)
    tuner.fit_head()
    assert head_of(tuner).in_features == 6_988
    assert sum(p.numel() for p in tuner.task.head.parameters()) == 698_900


@pytest.mark.parametrize("family", SEQUENCES)
def test_3_the_tokens_do_not_see_the_queries(family: str) -> None:
    """All states of the stream and the feature are the frozen backbone's, bit for bit, whatever P is."""
    model, inputs = make(family), batch(family)
    states: list[Tensor] = []
    for block in dissect(model).blocks:
        block.module.register_forward_hook(lambda module, args, out: states.append(
            (out[0] if isinstance(out, tuple) else out).clone()))
    feature = outputs(model, inputs)
    frozen = list(states)
    method = VQT(tokens=3, normalize=False).attach(model)
    for change in (lambda p: p, lambda p: p.mul_(30), lambda p: p.copy_(p.flip(0))):
        with torch.no_grad():
            for tensor in method.trainable().values():
                change(tensor)
        states.clear()
        assert torch.equal(outputs(model, inputs)[:, :WIDTH], feature)
        assert len(states) == len(frozen) and all(map(torch.equal, states, frozen))


@pytest.mark.parametrize("family", SEQUENCES)
def test_4_layers_are_independent(family: str) -> None:
    model, inputs = make(family), batch(family)
    method = VQT(tokens=2).attach(model)
    before = outputs(model, inputs)
    for index, tensor in enumerate(method.trainable().values()):
        start = tensor.detach().clone()
        with torch.no_grad():
            tensor += 0.3
        changed = outputs(model, inputs)
        mine = slice(WIDTH + index * 2 * WIDTH, WIDTH + (index + 1) * 2 * WIDTH)
        others = torch.ones(before.shape[1], dtype=torch.bool)
        others[mine] = False
        assert torch.equal(changed[:, others], before[:, others])
        assert distance(changed[:, mine], before[:, mine]) > 1e-3
        with torch.no_grad():
            tensor.copy_(start)


class Joined(nn.Module):
    """The paper's own way: queries joined to the tokens of each layer, one pass for both."""

    def __init__(self, vit: Any, queries: list[Tensor]) -> None:
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.queries = nn.ParameterList(query.detach().clone() for query in queries)

    def forward(self, images: Tensor) -> Tensor:
        vit = self.vit
        z = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        n, parts = z.shape[1], []
        for block, query in zip(vit.blocks, self.queries, strict=True):
            x = torch.cat([z, query.expand(z.shape[0], -1, -1)], dim=1)
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n])
            x = x + attention.proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
            z, summary = x[:, :n], x[:, n:]
            parts.append(F.normalize(summary.flatten(1), dim=-1))
        return torch.cat([F.normalize(vit.norm(z)[:, 0], dim=-1), *parts], dim=-1)


def both(vit: nn.Module, tokens: int) -> tuple[nn.Module, Any, Joined]:
    """The split stream on ``vit``, its method, and the joined one with the same queries."""
    import copy

    twin = copy.deepcopy(vit)
    method = VQT(tokens=tokens, dropout=0.0).attach(vit)
    return vit, method, Joined(twin, list(method.trainable().values()))


@pytest.mark.parametrize("tokens", [1, 3])
def test_5_split_stream_equals_the_joined_one(tokens: int) -> None:
    """Features and gradients."""
    split, method, joined = both(make("timm_vit").model, tokens)
    inputs = batch("timm_vit")
    mine, theirs = split(inputs), joined(inputs)
    assert distance(mine.detach(), theirs.detach()) < 1e-5
    uneven(mine).backward()
    uneven(theirs).backward()
    for one, two in zip(method.trainable().values(), joined.queries, strict=True):
        assert one.grad is not None and two.grad is not None and bool(two.grad.any())
        assert distance(one.grad, two.grad) < 1e-5


def test_5_bytes_kept() -> None:
    """ViT-B/16, 4 images, 1 token: at most a quarter of the joined stream's, and mostly keys and values; less than
    LoRA's and full fine-tuning's."""
    split, _, joined = both(vit_b16("cpu"), 1)
    images = torch.zeros(4, 3, 224, 224)
    kept = saved_bytes(split.train(), images)
    keys_and_values = 2 * 12 * 4 * 197 * 768 * 4
    assert keys_and_values < kept < 1.05 * keys_and_values
    assert kept <= 0.25 * saved_bytes(joined, images)
    if EVERYTHING:
        full, lora = vit_b16("cpu"), vit_b16("cpu")
        LoRA(rank=8).attach(lora)
        assert kept < 0.13 * saved_bytes(full.train(), images) and kept < 0.19 * saved_bytes(lora.train(), images)


def test_6_norms() -> None:
    for family in SEQUENCES:
        model = make(family)
        randomize(VQT(tokens=2).attach(model))
        feature = outputs(model, batch(family))
        for part in (feature[:, :WIDTH], *feature[:, WIDTH:].split(2 * WIDTH, dim=1)):
            assert torch.allclose(part.norm(dim=1), torch.ones(3), atol=1e-6)
        layers = len(dissect(model).blocks)
        assert torch.allclose(feature.norm(dim=1), torch.full((3,), 1.0 + layers).sqrt(), atol=1e-6)


def test_7_the_backbone_stays_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    tuner = tuner_of()
    before = snapshot(tuner.backbone)
    method = VQT()
    fit(tmp_path, method, tuner)
    assert tuner.train() is tuner and same(before, snapshot(tuner.backbone))
    assert not any(module.training for name, module in tuner.backbone.named_modules()
                   if name and not name.startswith("peft"))
    assert all(module.training for module in method.module.modules())


def test_8_without_penalty_the_first_stage_is_plain(tmp_path: Path) -> None:
    plain = fit(tmp_path, VQT())
    first = fit(tmp_path, VQT(keep=0.7, sparsity=0.0))
    other = fit(tmp_path, VQT(keep=0.7, sparsity=1e-2))
    for one, two in zip(plain.parameters(), first.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(head_of(other).weight, head_of(plain).weight)


def test_8_penalty() -> None:
    tuner = tuner_of()
    method = VQT(keep=0.5, sparsity=0.3).attach(tuner.backbone)
    tuner.fit_head()
    term = method.loss_terms(tuner, None, None)
    expected = 0.3 * torch.stack([head_of(tuner).weight[:, j].norm() for j in range(3 * WIDTH)]).sum()
    assert torch.allclose(term, expected)
    method.advance(tuner)
    tuner.fit_head()
    assert method.loss_terms(tuner, None, None) is None


def test_8_second_stage(tmp_path: Path) -> None:
    """The columns with the largest norms, in ascending order, are what a new head reads; both stages load."""
    method = VQT(keep=0.4)
    tuner = fit(tmp_path, method)
    head, inputs = head_of(tuner).weight.detach().clone(), batch("timm_vit")
    wide = outputs(tuner.backbone, inputs)
    k = int(3 * WIDTH * 0.4)
    expected = sorted(head.norm(dim=0).argsort(descending=True)[:k].tolist())
    loaded = FineTuner.load_from_checkpoint(tmp_path / "last.ckpt", backbone=Encoder(), task=Classification())
    assert torch.equal(outputs(loaded.eval(), inputs), outputs(tuner, inputs))
    method.advance(tuner)
    assert torch.equal(outputs(tuner.backbone, inputs), wide[:, expected])
    assert method.suggested["lr"] == VQT.recommended["lr"] / 2
    with pytest.raises(ScionError, match="call fit_head"):
        tuner(inputs)
    queries = {name: tensor.detach().clone() for name, tensor in method.trainable().items()}
    fit(tmp_path, method, tuner)
    assert not any(torch.equal(tensor, queries[name]) for name, tensor in method.trainable().items())
    assert sum(p.numel() for p in tuner.task.head.parameters()) == k * 4 + 4
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["backbone.peft.VQT.feature.kept"].tolist() == expected
    loaded = FineTuner.load_from_checkpoint(tmp_path / "last.ckpt", backbone=Encoder(), task=Classification())
    assert torch.equal(outputs(loaded.eval(), inputs), outputs(tuner, inputs))
    again = tuner_of()  # fresh objects go on from the second stage's checkpoint
    fit(tmp_path, VQT(keep=0.4), again, steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert head_of(again).in_features == k
    with pytest.raises(ScionError, match="the last one"):
        method.advance(tuner)
    with pytest.raises(ScionError, match="one stage only"):
        VQT().attach(make("timm_vit")).advance(tuner)
    with pytest.raises(ScionError, match="needs the module"):
        VQT(keep=0.4).attach(make("timm_vit")).advance()


@pytest.mark.parametrize("options", [{}, {"keep": 0.5}], ids=["one stage", "two stages"])
def test_8_by_the_command(options: dict[str, Any], config: Path, tmp_path: Path) -> None:  # noqa: F811
    """``lightning run`` builds the head for the wide feature, goes through both stages, and its folder loads."""
    arguments = [part for key, value in options.items() for part in (f"--peft.{key}", str(value))]
    assert main(["run", str(config), "--peft", "VQT", *arguments, "--run_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    width = 48 if options else 96
    assert metrics["parameters"]["head"] == 2 * width + 2 and metrics["status"] == "finished"
    assert head_of(load_run(str(tmp_path / "run"))).in_features == width


@pytest.mark.parametrize("family", SEQUENCES)
def test_9_samples_are_independent(family: str) -> None:
    model, inputs = make(family), batch(family, 4)
    randomize(VQT(tokens=2).attach(model))
    together = outputs(model, inputs)
    for i in range(4):
        assert distance(outputs(model, inputs[i:i + 1]), together[i:i + 1]) < 1e-5


# ------------------------------------------------------------------------------------------------- beyond them


def test_padding_is_hidden_from_the_queries() -> None:
    """A padded text has the features of the text without padding."""
    model = make("bert")
    randomize(VQT(tokens=2).attach(model))
    ids = batch("bert", 2)[1:2]
    assert bool((ids[:, -4:] == 0).all()) and bool((ids[:, :-4] != 0).all())
    assert distance(outputs(model, ids), outputs(model, ids[:, :-4])) < 1e-5


def test_queries_see_all_tokens_of_a_causal_model() -> None:
    """Every token moves the summaries; the state of the first token depends on itself alone."""
    model = make("llama")
    randomize(VQT(layers=(0,), normalize=False).attach(model))
    ids = batch("llama", 1)
    before = outputs(model, ids)
    for place in range(ids.shape[1]):
        other = ids.clone()
        other[0, place] = ids[0, place] % 48 + 1
        assert distance(outputs(model, other)[:, WIDTH:], before[:, WIDTH:]) > 1e-4


@pytest.mark.parametrize("family", ["timm_vit", "llama"])
def test_gradients_are_exact_beside_other_methods(family: str) -> None:
    """Where another method trains what keys and values come from, they carry its gradient."""
    from torch.autograd import gradcheck
    from torch.func import functional_call

    model, inputs = make(family, dtype=torch.float64), batch(family, 2, dtype=torch.float64)
    methods = [LoRA(rank=2, targets=("q", "k", "v", "mlp.up")), VQT(tokens=2, dropout=0.0),
               method_class("PrefixTuning")(tokens=2)]  # type: ignore[call-arg]
    for method in methods:
        method.attach(model)
        randomize(method)
    names = [name for method in methods for name in method.trainable()]

    def function(*tensors: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, tensors, strict=True)), (inputs,))

    start = dict(model.named_parameters())
    tensors = tuple(start[name].detach().clone().requires_grad_() for name in names)
    assert gradcheck(function, tensors, eps=1e-6, atol=1e-6, rtol=1e-6, fast_mode=True)


@pytest.mark.parametrize("family", SEQUENCES)
def test_queries_see_a_prefix(family: str) -> None:
    """In either order of attachment."""
    found = []
    for order in ((0, 1), (1, 0)):
        model = make(family)
        methods = [VQT(tokens=2), method_class("PrefixTuning")(tokens=3)]  # type: ignore[call-arg]
        for i in order:
            methods[i].attach(model)
            randomize(methods[i], seed=i)
        found.append(outputs(model, batch(family)))
        with methods[1].disabled():
            assert distance(outputs(model, batch(family)), found[-1]) > 1e-3
    assert distance(found[0], found[1]) < 1e-6


def test_nothing_is_left_behind() -> None:
    """State lives for one call of the root: nothing after it, nothing without it, nothing stale after an error."""
    model, inputs = make("timm_vit"), batch("timm_vit")
    method = VQT().attach(model)
    expected = outputs(model, inputs)

    def empty() -> bool:
        exchange = method.exchange
        return not (exchange.keys or exchange.features or exchange.running or exchange.answering)

    assert empty()
    assert outputs(model.model, inputs).shape[-1] == WIDTH and empty()  # the root was not called
    blocks: Any = model.model.blocks

    def fail(*args: Any) -> None:
        if method.exchange.answering:
            raise ValueError

    handle = blocks[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ValueError):
        model(inputs)
    handle.remove()
    assert torch.equal(outputs(model, inputs), expected) and empty()


def test_learning_rates(tmp_path: Path) -> None:
    """The head has the run's rate, the queries a multiple of it."""
    tuner, method = tuner_of(), VQT(lr_factor=0.1)
    method.attach(tuner.backbone)
    tuner.fit_head()
    rates = {id(p): group["lr"] for group in tuner.param_groups() for p in group["params"]}
    assert all(abs(rates[id(p)] - 1e-3) < 1e-12 for p in method.trainable().values())
    assert all(rates[id(p)] == 1e-2 for p in tuner.task.head.parameters())


def test_refusals() -> None:
    with pytest.raises(ScionError, match=r"holds its head itself \(head\)"):
        VQT().attach(with_head())
    with pytest.raises(ScionError, match="no place there"):
        VQT().attach(make("timm_swin"))
    tokens = make("bert").model
    VQT().attach(tokens)
    with pytest.raises(ScionError, match="one feature a sample.*BertModel returns"):
        tokens(batch("bert"))
    tuner = FineTuner(Encoder(), Classification(), classes=["a", "b"])
    VQT(keep=0.5).attach(tuner.backbone)
    with pytest.raises(ScionError, match="0 linear maps that could be it"):
        tuner.methods[0].loss_terms(tuner, None, None)
