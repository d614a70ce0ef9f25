"""Checks of MTLoRA: the checks by their place there (2 is the decoders' count, which are no part of the method)."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from core.anatomy import Anatomy, dissect
from core.compose import Route
from core.cost import describe
from core.errors import ScionError
from core.graft import checkpoint_activations
from core.peft import method_class
from tests.models import FAMILIES, batch, make, spread
from tests.rows import NO_ATTENTION, NO_CALL, Row, Variant
from tests.toolkit import Plain, differences, distance, loader, outputs, randomize, saved_bytes, trace, trainer


def mtlora_count(anatomy: Anatomy, method: Any) -> int:
    shared = [*(method.targets or anatomy.linear_roles())]
    shared += ["downsample"] if method.downsample == "lora" and "downsample" in anatomy.roles else []
    total = sum(method.rank * (s.in_features + s.out_features) for s in anatomy.sites(shared, method.layers))
    for stage in anatomy.stages:
        own = [site for role, site in stage[-1].sites.items()
               if role in ("o", "cross.o", "mlp.up", "mlp.gate", "mlp.down")]
        total += len(method.tasks) * sum(method.task_rank * (s.in_features + s.out_features) for s in own)
    final = {site.path for site in anatomy.stem.get("final_norm", [])}
    kept = method.roles or ("norm1", "cross.norm", "norm2", "norm", "patch_embed", "downsample")
    for site in anatomy.sites([role for role in kept if role in anatomy.roles]):
        if (site.role != "downsample" or method.downsample == "train") and site.path not in final:
            total += sum(p.numel() for p in site.module.parameters())
    if method.roles is None and "position_bias" in anatomy.roles:
        total += sum(site.full_weight.numel() for site in anatomy.sites("position_bias"))
    return total


ROWS = {
    "MTLoRA": Row(
        {"two tasks": Variant({"tasks": ("a", "b"), "rank": 4, "task_rank": 2, "dropout": 0.0}),
         "plus": Variant({"tasks": ("b.c", "train"), "rank": 2, "targets": ("q", "v", "mlp.down"),
                          "train": ("norm1", "norm2"), "downsample": "lora"})},
        trained=mtlora_count,
        cards=(("vit_b16", {}, 3_023_616),),
        bad=(({"rank": 0}, "rank 0"), ({"task_rank": 0}, "task_rank 0"), ({"tasks": ()}, "tasks"),
             ({"tasks": ("a", "a")}, "different names"), ({"tasks": ("shared",)}, "'shared'"),
             ({"tasks": "depth"}, "'depth'"), ({"dropout": 1.5}, "dropout 1.5"), ({"downsample": "no"}, "'no'"),
             ({"mode": "addition"}, "'addition'"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"train": ("norm", "nrom1")}, "'norm1'"),
             ({"layers": (0,)}, "take one of")),
        random=True, operators=12, saved=1.75,  # half of a tiny model's blocks are last ones, with three streams
        artifact={"tasks": ("a",), "rank": 1, "task_rank": 1, "targets": ("o",), "train": ("norm2",)},
        refused={
            **NO_ATTENTION, "deberta": NO_CALL["deberta"],
            "albert": "one layer runs many times: streams that part in it would enter it again",
            "codegen": "attention and MLP run side by side, so that streams part before and meet behind both",
            "modernbert": "gate and MLP are one fused map, whose rows the tasks' streams cannot share",
            "phi": "attention and MLP run side by side, so that streams part before and meet behind both",
            "phi3": "gate and MLP are one fused map, whose rows the tasks' streams cannot share",
            "timm_eva": "gate and MLP are one fused map, whose rows the tasks' streams cannot share"},
    ),
}

MTLoRA: Any = method_class("MTLoRA")
LoRA: Any = method_class("LoRA")
PASCAL = ("semseg", "human_parts", "sal", "normals")
DECODERS = 1_946_624


def swin_t() -> Any:
    """The paper's trunk on the meta device; timm has a final norm (1,536) beside it."""
    import timm

    with torch.device("meta"):
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=448, num_classes=0)


def small(size: int = 64, width: int = 16, dtype: torch.dtype = torch.float32) -> Any:
    """A Swin of four stages with shifted windows; the last stage's one window is not shifted."""
    import timm

    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("swin_tiny_patch4_window7_224", img_size=size, patch_size=2, window_size=4,
                                  embed_dim=width, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=0)
    return spread(model).eval().to(dtype)


def pictures(number: int = 2, size: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(method: Any, task: str) -> dict[str, Tensor]:
    """A task's own tensors."""
    return {name: tensor for name, tensor in method.trainable().items() if f".tasks.{task}." in name}


def sizes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(("rank", "shared"), [(16, 1_130_496), (32, 2_260_992), (64, 4_521_984)])
def test_1_changes(rank: int, shared: int) -> None:
    method = MTLoRA(PASCAL, rank).attach(swin_t())
    tasks = [sizes(parts(method, task)) for task in PASCAL]
    own = {name: tensor for name, tensor in method.trainable().items() if name.startswith("peft.")}
    assert tasks == [69_120] * 4 and sizes(own) == shared + 276_480
    assert sizes(own) == {16: 1_406_976, 32: 2_537_472, 64: 4_798_464}[rank]


def test_3_base_tensors() -> None:
    method = MTLoRA(PASCAL).attach(swin_t())
    base = {name: tensor for name, tensor in method.trainable().items() if not name.startswith("peft.")}

    def of(*words: str) -> int:
        return sizes({name: tensor for name, tensor in base.items() if any(word in name for word in words)})

    assert of("patch_embed") == 4_896 and of("position_bias_table") == 23_322 and of("reduction") == 1_548_288
    assert of("norm") - of("patch_embed.norm") == 23_040
    assert sizes(base) == 1_599_546 and "norm.weight" not in base


@pytest.mark.parametrize(("rank", "downsample", "total"), [
    (16, "train", 4_953_146), (32, "train", 6_083_642), (64, "train", 8_344_634),
    (16, "lora", 3_469_370), (64, "lora", 7_054_394), (4, "lora", 2_573_114)])
def test_4_totals(rank: int, downsample: str, total: int) -> None:
    method = MTLoRA(PASCAL, rank, downsample=downsample).attach(swin_t())
    assert sizes(method.trainable()) == total - DECODERS


def test_5_backbone() -> None:
    model = swin_t()
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.norm.parameters()) == 27_517_818


# ------------------------------------------------------------------------------------------------- streams


def test_6_streams_start_as_the_shared_one() -> None:
    """At every stage and in every family, to the last bit."""
    for model, inputs in [(small(), pictures()), *((make(family), batch(family)) for family in FAMILIES)]:
        before = outputs(model, inputs)
        method = MTLoRA(("a", "b")).attach(model)
        assert torch.equal(outputs(model, inputs), before)
        assert len(method.streams) == len(dissect(model).stages)
        for streams in method.streams:
            assert list(streams) == ["shared", "a", "b"]
            assert all(torch.equal(stream, streams["shared"]) for stream in streams.values())


def test_7_one_changed_B() -> None:
    model, inputs = small(), pictures()
    method = MTLoRA(PASCAL, dropout=0.0).attach(model)
    randomize(method)
    first = outputs(model, inputs)
    before = method.streams
    last = dissect(model).stages[2][-1].index
    [name] = [name for name in parts(method, "sal") if name.endswith("B") and f".{last}-mlp-down." in name]
    with torch.no_grad():
        method.trainable()[name].normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(outputs(model, inputs), first)
    for stage, (one, two) in enumerate(zip(before, method.streams, strict=True)):
        for stream in one:
            assert torch.equal(one[stream], two[stream]) == ((stage, stream) != (2, "sal"))


@pytest.mark.parametrize("task", ["shared", *PASCAL])
def test_8_gradients_stay_in_their_task(task: str) -> None:
    model = small()
    method = MTLoRA(PASCAL).attach(model)
    randomize(method)
    model.train()(pictures())
    torch.stack([streams[task].square().mean() for streams in method.streams]).sum().backward()
    moved = {name for name, tensor in method.trainable().items() if tensor.grad is not None and bool(tensor.grad.any())}
    every = {name: name.split(".tasks.")[1].split(".")[0] for name in method.trainable() if ".tasks." in name}
    assert {name for name in every if name in moved} == {name for name, owner in every.items() if owner == task}
    shared = set(method.trainable()) - set(every)
    last = {name for name in shared if name.startswith("peft.MTLoRA.7-mlp-down.")}  # no task's stream passes it
    assert len(last) == 2 and shared - moved == (set() if task == "shared" else last)
    assert method.idle() == set(every) | last


def test_9_frozen() -> None:
    model = small()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    method = MTLoRA(PASCAL).attach(model)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=1e-2, weight_decay=0.05)
    model.train()(pictures())
    torch.stack([stream.square().mean() for streams in method.streams for stream in streams.values()]).sum().backward()
    optimizer.step()
    for name, tensor in before.items():
        kept = any(word in name for word in (".qkv.", ".proj.weight", ".proj.bias", ".fc1.", ".fc2."))
        kept = kept and "patch_embed" not in name or name.startswith("norm.")
        assert torch.equal(model.get_parameter(name), tensor) == kept, name


def test_10_shapes() -> None:
    model = swin_t()
    method = MTLoRA(PASCAL).attach(model)
    with torch.no_grad():
        model(torch.empty(2, 3, 448, 448, device="meta"))
    for streams, shape in zip(method.streams, [(3136, 192), (784, 384), (196, 768), (196, 768)], strict=True):
        assert all(stream.shape == (2, *shape) for stream in streams.values())


# ------------------------------------------------------------------------------------------------- a copied forward


class Copied:
    """The forward as it is written down in the paper, with the method's tensors, on a plain Swin."""

    def __init__(self, model: Any, method: Any) -> None:
        self.model, self.method = model, method

    def tensor(self, *path: object) -> Tensor:
        return self.method.module.get_parameter(".".join(map(str, path)))

    def change(self, *path: object) -> Tensor:
        return self.method.scale * self.tensor(*path, "B") @ self.tensor(*path, "A")

    def linear(self, module: nn.Linear, x: Tensor, *path: object) -> Tensor:
        return F.linear(x, module.weight + self.change(*path), module.bias)

    def own(self, module: nn.Linear, index: int, role: str, x: Tensor, xs: dict[str, Tensor]
            ) -> tuple[Tensor, dict[str, Tensor]]:
        y = module(x)
        return (y + x @ self.change(f"{index}-{role}.all").t(),
                {task: y + x_t @ self.change(f"{index}-{role}.tasks.{task}").t() for task, x_t in xs.items()})

    def heads(self, block: Any, index: int, x: Tensor) -> Tensor:
        """Windowed attention up to its output projection."""
        from timm.models.swin_transformer import window_partition

        attention = block.attn
        shift = tuple(-s for s in block.shift_size)
        windows = window_partition(torch.roll(x, shift, (1, 2)), block.window_size).flatten(1, 2)
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                   for t in self.linear(attention.qkv, windows, f"{index}-qkv").chunk(3, -1))
        scores = attention.scale * q @ k.mT + attention._get_rel_pos_bias()
        if block.attn_mask is not None:
            mask = block.attn_mask
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[None, :, None]).flatten(0, 1)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def back(self, block: Any, windows: Tensor, x: Tensor) -> Tensor:
        from timm.models.swin_transformer import window_reverse

        windows = windows.unflatten(1, block.window_size)
        return torch.roll(window_reverse(windows, block.window_size, *x.shape[1:3]), block.shift_size, (1, 2))

    def block(self, block: Any, index: int, x: Tensor) -> Tensor:
        windows = self.linear(block.attn.proj, self.heads(block, index, block.norm1(x)), f"{index}-o")
        x = x + self.back(block, windows, x)
        hidden = F.gelu(self.linear(block.mlp.fc1, block.norm2(x), f"{index}-mlp-up"))
        return x + self.linear(block.mlp.fc2, hidden, f"{index}-mlp-down")

    def last(self, block: Any, index: int, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        heads = self.heads(block, index, block.norm1(x))
        shared, tasks = self.own(block.attn.proj, index, "o", heads, dict.fromkeys(self.method.tasks, heads))
        a, a_t = x + self.back(block, shared, x), {t: x + self.back(block, y, x) for t, y in tasks.items()}
        up, up_t = self.own(block.mlp.fc1, index, "mlp-up", block.norm2(a), {t: block.norm2(y) for t, y in a_t.items()})
        down, down_t = self.own(block.mlp.fc2, index, "mlp-down", F.gelu(up), {t: F.gelu(y) for t, y in up_t.items()})
        return a + down, {t: a_t[t] + y for t, y in down_t.items()}

    def __call__(self, inputs: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        def merged(x: Tensor) -> Tensor:
            x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
            return following.reduction(following.norm(x))

        x, index, found = self.model.patch_embed(inputs), 0, []
        for s, stage in enumerate(self.model.layers):
            for block in stage.blocks[:-1]:
                x, index = self.block(block, index, x), index + 1
            x, tasks = self.last(stage.blocks[-1], index, x)
            index += 1
            if s + 1 < len(self.model.layers):
                following = self.model.layers[s + 1].downsample
                x, tasks = merged(x), {task: merged(y) for task, y in tasks.items()}
            found.append({name: y.flatten(1, 2) for name, y in {"shared": x, **tasks}.items()})
        return self.model.norm(x).mean((1, 2)), found


def test_copied_forward() -> None:
    """Outputs, streams and gradients of everything trained, within 1e-12 in float64."""
    model, plain = small(dtype=torch.float64), small(dtype=torch.float64)
    inputs = pictures(dtype=torch.float64)
    method = MTLoRA(PASCAL, 4, dropout=0.0).attach(model)
    randomize(method)
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            tensor.copy_(model.get_parameter(name))
    weights = torch.randn(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(forward: Callable[[], tuple[Tensor, list[dict[str, Tensor]]]]) -> tuple[list[Tensor], dict[str, Tensor]]:
        out, found = forward()
        streams = [stream for streams in found for stream in streams.values()]
        loss = out.square().sum() + (weights * torch.stack([stream.square().mean() for stream in streams])).sum()
        gradients = torch.autograd.grad(loss, list(method.trainable().values()))
        return [out, *streams], dict(zip(method.trainable(), gradients, strict=True))

    mine, slopes = run(lambda: (model(inputs), method.streams))
    for name in method.start:  # the copied model's trained tensors are the method's
        plain.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = model.get_parameter(name)
    theirs, expected = run(lambda: Copied(plain, method)(inputs))
    assert len(mine) == 21 and all(distance(one, two) < 1e-12 for one, two in zip(mine, theirs, strict=True))
    assert all(bool(slope.any()) for slope in slopes.values())
    assert all(distance(slope, expected[name]) < 1e-10 for name, slope in slopes.items())


# ------------------------------------------------------------------------------------------------- cost


def test_four_tasks_cost_little() -> None:
    """Under 1.3 times one encoder's forward, and the same for each task."""
    flops = {}
    for number in (0, 1, 2, 4):
        model = swin_t()
        if number:
            MTLoRA(PASCAL[:number]).attach(model)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 448, 448, device="meta"))
        flops[number] = counter.get_total_flops()
    assert 1 < flops[4] / flops[0] < 1.3
    assert flops[4] - flops[2] == 2 * (flops[2] - flops[1]) < 0.1 * flops[0]


def per_task(model: Any, tokens: int) -> int:
    """Numbers that one more task keeps for backward in a small Swin: in each last block of width C the folded input,
    the stream at norm2's input and output, before and behind the activation (4 C each), norm2's two statistics, three
    low-rank hidden values; behind it, in front of the reduction, norm's input and output, and its statistics (a row of
    4 C in place of 4 rows); and the feature itself."""
    total = 0
    for stage in dissect(model).stages:
        width = stage[0].dim
        total += tokens * (11 * width + 2 + 3 * 4)
        if stage[0].stage != "stage3":
            total += tokens * 2 * width + tokens // 4 * 2
            tokens, width = tokens // 4, 2 * width
        total += tokens * width
    return total


@pytest.mark.parametrize(("size", "width"), [(64, 16), (128, 16), (64, 32)])
def test_memory_of_a_task(size: int, width: int) -> None:
    """To the byte, and each task the same."""
    kept = []
    for number in (1, 2, 4):
        model = small(size, width)
        MTLoRA(PASCAL[:number], 4, dropout=0.0, backbone_mode="eval").attach(model)
        kept.append(saved_bytes(model.train(), pictures(2, size)))
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])
    assert kept[1] - kept[0] == 4 * 2 * per_task(small(size, width), (size // 2) ** 2)


# ------------------------------------------------------------------------------------------------- in training


def _losses(model: nn.Module, method: Any, forwards: int) -> Tensor:
    found = []
    for seed in range(forwards):
        model(pictures(seed=seed))
        found += [stream.square().mean() for streams in method.streams for stream in streams.values()]
    return torch.stack(found).sum()


@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing(forwards: int) -> None:
    """Gradients of all tasks' losses, dropout included, also for two forwards before one backward."""
    model = small()
    method = MTLoRA(PASCAL).attach(model)
    randomize(method)
    model.train()
    found = []
    for on in (False, True):
        checkpoint_activations(model, on)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.zero_grad()
            _losses(model, method, forwards).backward()
        found.append([tensor.grad.clone() for tensor in method.trainable().values()])
    checkpoint_activations(model, False)
    scale = max(float(gradient.abs().max()) for gradient in found[0])
    assert all(float((a - b).abs().max()) < 1e-6 * scale for a, b in zip(*found, strict=True))


class Dense(Plain):
    """A user's module with two dense tasks."""

    method: Any

    def training_step(self, samples: tuple[Tensor, Tensor], index: int) -> Tensor:
        self.backbone(samples[0])
        streams = self.method.streams[-1]
        loss = streams["a"].square().mean() + (streams["b"] - 1).square().mean()
        self.losses.append(loss.item())
        return loss


def test_a_users_module(tmp_path: Any) -> None:
    """Streams come in the Trainer's own run, and every task's part learns."""
    module = Dense(make("timm_swin"))
    method = MTLoRA(("a", "b"), 4)
    module.method = method.attach(module.backbone)
    before = {name: tensor.detach().clone() for name, tensor in method.trainable().items() if name.endswith("B")}
    trainer(tmp_path, method, max_steps=12).fit(module, loader("timm_swin"))
    assert sum(module.losses[-3:]) < sum(module.losses[:3])
    last = {name for name in before if name.startswith("peft.MTLoRA.3-") and ".tasks." in name}
    assert len(last) == 6 and all(not torch.equal(before[name], method.trainable()[name]) for name in last)


# ------------------------------------------------------------------------------------------------- what stays behind


def test_streams_are_of_the_last_forward() -> None:
    """A copy has none, and with a part switched off tasks have the shared stream."""
    model = small()
    method = MTLoRA(("a", "b")).attach(model)
    randomize(method)
    model(pictures(1))
    earlier = [weakref.ref(stream) for streams in method.streams for stream in streams.values()]
    model(pictures(3))
    assert len(earlier) == 12 and all(stream() is None for stream in earlier)
    assert method.streams[0]["a"].requires_grad and len(method.streams[0]["a"]) == 3
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for twin in twins:
        [other] = twin.peft.methods.values()
        assert other.streams == [{}] * 4
        outputs(twin, pictures(1))
        assert len(other.streams[3]["b"]) == 1 and len(method.streams[3]["b"]) == 3
    [up] = [graft for graft in method.grafts if graft.site.name == "3.mlp.up"]
    up.active = False
    outputs(model, pictures(1))
    for stage, streams in enumerate(method.streams):
        assert torch.equal(streams["a"], streams["shared"]) == (stage == 1)
    up.active = True


def test_counting_costs_leaves_the_streams() -> None:
    model = make("timm_vit")
    method = MTLoRA(("a",)).attach(model)
    outputs(model, batch("timm_vit"))
    [held] = method.streams
    describe(model, batch("timm_vit"))
    assert method.streams[0] is held and list(held) == ["shared", "a"]


def test_an_error_leaves_nothing() -> None:
    model, inputs = small(), pictures()
    method = MTLoRA(("a",), dropout=0.0).attach(model)
    randomize(method)
    expected = outputs(model, inputs)
    left, streams = trace(model), method.streams

    def fail(*args: object) -> None:
        raise ValueError

    for path in ("layers.1.blocks.1.mlp.fc1", "layers.1.blocks.1.mlp.act", "layers.1.blocks.1.attn.proj_drop"):
        handle = model.get_submodule(path).register_forward_pre_hook(fail)
        with pytest.raises(ValueError):
            outputs(model, inputs)
        handle.remove()
        assert torch.equal(outputs(model, inputs), expected) and differences(left, trace(model)) == []
        assert all(torch.equal(one["a"], two["a"]) for one, two in zip(method.streams, streams, strict=True))


@pytest.mark.parametrize("targets", [("o", "mlp.up"), ("mlp.down", "q")])
@pytest.mark.parametrize("first", [True, False])
def test_beside_another_method(targets: tuple[str, ...], first: bool) -> None:
    """Behind the tasks' maps another method changes W x alone, in either order, for shared and task streams."""
    model, plain = small(dtype=torch.float64), small(dtype=torch.float64)
    inputs = pictures(dtype=torch.float64)
    methods = [MTLoRA(("a",), dropout=0.0), LoRA(rank=2, targets=targets)]
    for method in methods if first else methods[::-1]:
        method.attach(model)
        randomize(method, seed=int(type(method) is LoRA))
    outputs(model, inputs)
    lora = LoRA(rank=2, targets=targets).attach(plain)
    with torch.no_grad():
        for one, two in zip(lora.trainable().values(), methods[1].trainable().values(), strict=True):
            one.copy_(two)
    lora.merge()
    alone = MTLoRA(("a",), dropout=0.0).attach(plain)
    randomize(alone, seed=0)
    outputs(plain, inputs)
    for one, two in zip(methods[0].streams, alone.streams, strict=True):
        assert all(distance(one[name], two[name]) < 1e-10 for name in ("shared", "a"))


def test_streams_are_no_samples() -> None:
    """A second method cannot fold the batch, nor rows be routed in it; whole batches can."""
    model = small()
    MTLoRA(("a",)).attach(model)
    left = trace(model)
    with pytest.raises(ScionError, match="other: the batch carries the streams of MTLoRA"):
        MTLoRA(("a",), train=("final_norm",), name="other").attach(model)
    assert differences(left, trace(model)) == []
    route = Route([LoRA(name="one"), LoRA(name="two")])
    route.attach(model)
    with pytest.raises(ScionError, match="MTLoRA lets several streams ride"), route.route([0, 1]):
        pass
    with route.route("two"):
        assert outputs(model, pictures()).shape == (2, 128)


def test_weighed_by_another_method() -> None:
    """A strength of zero is no change, also where the rows change."""
    model, inputs = small(dtype=torch.float64), pictures(dtype=torch.float64)
    method = MTLoRA(("a",), train=("norm1",)).attach(model)
    expected = outputs(model, inputs)
    with torch.no_grad():
        for graft in method.grafts:
            for tensor in graft.parameters():
                tensor.normal_(generator=torch.Generator().manual_seed(0))
            graft.strength = 0.0
    assert distance(outputs(model, inputs), expected) < 1e-12
    assert all(distance(streams["a"], streams["shared"]) < 1e-12 for streams in method.streams)


def test_layers() -> None:
    """Only stages whose last block is among them have streams, and nothing outside these blocks is trained."""
    model = small()
    method = MTLoRA(("a",), layers=(2, 3, 7)).attach(model)
    outputs(model, pictures())
    assert [tuple(streams["a"].shape) for streams in method.streams] == [(2, 64, 64), (2, 16, 128)]
    assert all(name.startswith(("layers.1.blocks", "layers.3.blocks.1", "peft")) for name in method.trainable())
    with pytest.raises(ScionError, match=r"no stage's last block.*\[1, 3, 5, 7\]"):
        MTLoRA(("a",), layers=(0, 2)).attach(small())


def test_7_matrixv2() -> None:
    """y_t has the shared change too: at o, whose tasks' own change is zero, the streams are the shared one; without
    shared changes both modes are one function."""
    inputs = pictures()
    found = {}
    for mode in ("matrix", "matrixv2"):
        model = small()
        method = MTLoRA(("a",), dropout=0.0, mode=mode).attach(model)
        randomize(method)
        last = dissect(model).stages[0][-1]
        grafts = {graft.site.role: graft for graft in method.grafts if graft.site.block == last.index
                  and hasattr(graft, "tasks")}
        x = torch.randn(2, 4, 4, grafts["o"].site.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            graft, site = grafts["o"], grafts["o"].site
            y = site.module(x)[:2]
            shared, task = graft.after(x, y).chunk(2)
            change = 4.0 * x @ graft.all.A.t() @ graft.all.B.t()
            own = 4.0 * x @ graft.tasks["a"].A.t() @ graft.tasks["a"].B.t()
        assert distance(shared, y + change) < 1e-5
        assert distance(task, y + own + (change if mode == "matrixv2" else 0)) < 1e-5
        outputs(model, inputs)
        found[mode] = [streams["a"] for streams in method.streams]
    assert all(distance(one, two) > 1e-4 for one, two in zip(*found.values(), strict=True))
