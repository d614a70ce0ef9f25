"""The methods of the matrix: one row each.

A row says how a method is built, how many numbers it trains, and which sums its card prints. Abilities are read from
the class (`identity_at_start`, `mergeable`, `moves_base`, `needs`), learning rates from `recommended`: neither is
repeated here. Adding a method = its file under core/peft + one row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from core import peft
from core.anatomy import Anatomy, dissect
from core.method import PEFTMethod, key_of
from tests.models import EVERY_FAMILY, FAMILIES, WIDTH, make

Config = dict[str, Any]

CAUSAL = ("llama", "t5", "clip", "clip_text", "gpt2", "gpt_neox", "codegen", "mistral", "qwen2", "gemma", "starcoder2")
"""Families in which, at least in one stack, a token sees only those before it."""

@dataclass(frozen=True)
class Variant:
    """One way to build a method: its arguments, and what happens after it is attached."""

    config: Config = field(default_factory=dict)
    ready: Callable[[PEFTMethod], None] | None = None
    """Brings an attached method into a later stage."""
    everywhere: bool = False
    """Met by the quick tier, as the first variant is; the others are left to the long one."""
    trains: bool = True
    """Whether it trains anything inside a backbone without a head."""
    random: bool | None = None
    """Whether its start values depend on the seed; None is what the row says."""
    moves_base: bool | None = None
    """Whether it trains the backbone's own tensors in this stage; None is what the class declares."""
    noise: bool = False
    """Its forward is random in training, beyond dropout."""
    alone: bool = False
    """What made it ready holds for the feature as it was, without another of its kind."""
    own_optimizer: bool = False
    """It trains with the method's own optimizer alone."""
    refused: dict[str, str] = field(default_factory=dict)
    """Families that cannot have it, beside the method's own, with the reason."""
    learns: Config = field(default_factory=dict)
    """Arguments for invariant 16, where a share of a tiny model times the recommended learning rate cannot reach."""
    learns_on: dict[str, Config] = field(default_factory=dict)
    """Such arguments by family, where it cannot on a few of them alone."""


@dataclass(frozen=True)
class Row:
    """What the tests must know of a method beyond what it declares."""

    variants: dict[str, Variant]
    """The first is the method with settings for tiny models."""
    trained: Callable[[Anatomy, PEFTMethod], int]
    """Closed formula of the number of trained parameters, on the plain backbone."""
    cards: tuple[tuple[str, Config, int], ...] = ()
    """Counts that the card prints: (model in `CARD_MODELS`, arguments, count)."""
    bad: tuple[tuple[Config, str], ...] = ()
    """Arguments refused at construction or at attach, and what the message says."""
    random: bool = False
    """Start values depend on the seed."""
    weights: bool = False
    """`targets` are linear maps, parts of fused ones included."""
    commutes: bool | None = True
    """Two of its adapters give the same function in either order; None where that depends (rotations of a plane do,
    scales without shifts)."""
    stopped: tuple[str, ...] = ()
    """Endings of the names of tensors whose gradient, by the paper, is not the function's derivative."""
    operators: int = 0
    """Operators that one graft may add to a forward."""
    saved: float = 1.0
    """Bytes that the first variant keeps for backward, at most, as a share of full fine-tuning's on the same model."""
    size: float = 0.05
    """Spread of the random values with which merging is compared; less where many of them add up in one weight."""
    decays: bool | None = None
    """Whether its tensors are decayed: all, none, or (None) those of two axes and more."""
    running: bool = False
    """Forwards in train mode move running statistics of its own."""
    state: int = 0
    """Bytes for each trained number that a checkpoint holds beside it and its two moments."""
    carries: Config = field(default_factory=dict)
    """Arguments with which its file can go onto another base."""
    stored: float = 1.0
    """Numbers that the file may hold for each trained one (positions, indices)."""
    schedule: Callable[[], None] | None = None
    """Asserts that what changes in training (a rank, a mask) follows the method's formula."""
    absent: tuple[str, ...] = ()
    """Tests of the matrix that do not apply: those that train a method which works on others, alone."""
    without_attention: Config = field(default_factory=dict)
    """Arguments on a family without attention; for methods of linear maps the MLP's are taken."""
    artifact: Config = field(default_factory=dict)
    """Arguments, beside the first variant's, that make the stored regression adapter small."""


# ------------------------------------------------------------------------------------------------- counts


def _all_linear(anatomy: Anatomy, method: Any) -> list[tuple[int, int]]:
    return [(site.in_features, site.out_features) for site in method.sites(anatomy)]


def _lift(anatomy: Anatomy, method: Any) -> int:
    return sum(min((i + o) * method.rank, i * o) for i, o in _all_linear(anatomy, method))


def _spiel(anatomy: Anatomy, method: Any) -> int:
    shapes = _all_linear(anatomy, method)
    everything, targets = _everything(anatomy, method), sum(i * o for i, o in shapes)
    budget = method.count or int((method.density or 0) * everything) or method.rank * sum(i + o for i, o in shapes)
    return sum(int(budget * i * o / targets) for i, o in shapes)


def _sensitivity(anatomy: Anatomy, method: Any) -> int:
    candidates = method.candidates(anatomy)
    spent = sum(count or method.rank * (candidates[name].in_features + candidates[name].out_features)
                for name, count in method.plan.items())
    assert 0.3 * method.budget < spent <= method.budget
    return spent


def _diff(anatomy: Anatomy, method: Any) -> int:
    sizes = [p.numel() for p in anatomy.root.parameters() if p.dim()]
    tensors, numbers = len(sizes) if method.structured else 0, sum(sizes)
    return 2 * numbers + tensors if method.stage == "masks" else method.keep


def _tensor_apet(anatomy: Anatomy, method: Any) -> int:
    """Of the backbone at most half of the budget; of what is added less than one unit more than the other half."""
    sizes = {site.name: sum(method.sizes(site)) for site in anatomy.sites(method.targets)}
    added, moved = sum(sizes[name] for name in method.added), sum(t.numel() for t in method.start.values())
    half = method.budget(anatomy) // 2
    assert moved <= half and added < half + max(sizes.values()) and len(method.grafts) == len(method.added)
    return added + moved


def _pst(anatomy: Anatomy, method: Any) -> int:
    return sum((method.rank + method.score_rank + 1) * (i + o) for i, o in _all_linear(anatomy, method))


def _linear(anatomy: Anatomy, method: Any) -> list[tuple[int, int]]:
    return [(site.in_features, site.out_features) for site in anatomy.sites(method.targets, method.layers)]


def _lora(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o) for i, o in _linear(anatomy, method))


def _vera(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank + o for _, o in _linear(anatomy, method))


def _fourier(anatomy: Anatomy, method: Any) -> int:
    return method.frequencies * len(method.sites(anatomy))


def _oft(anatomy: Anatomy, method: Any) -> int:
    return sum(i * (method.block - 1) // 2 for i, _ in _linear(anatomy, method))


def _svfit(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank or min(i, o) for i, o in _linear(anatomy, method))


def _lokr(anatomy: Anatomy, method: Any) -> int:
    from core.peft.weights.lokr import split

    total = 0
    for i, o in _linear(anatomy, method):
        (out_1, out_2), (in_1, in_2) = split(o, method.factor), split(i, method.factor)
        small = method.rank < max(out_2, in_2) / 2
        total += out_1 * in_1 + (method.rank * (out_2 + in_2) if small else out_2 * in_2)
    return total


def _boft(anatomy: Anatomy, method: Any) -> int:
    return sum(method.factors * i * (method.block - 1) // 2 + o for i, o in _linear(anatomy, method))


def _bone(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (method.columns or o) for _, o in _all_linear(anatomy, method))


def _bat(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (o if method.group == "outputs" else i) for i, o in _all_linear(anatomy, method))


def _ia3(anatomy: Anatomy, method: Any) -> int:
    outputs = sum(s.out_features for s in anatomy.sites(method.outputs)) if method.outputs else 0
    return outputs + (sum(s.in_features for s in anatomy.sites(method.inputs)) if method.inputs else 0)


def _ssf(anatomy: Anatomy, method: Any) -> int:
    return sum((1 + site.takes_bias) * site.out_features for site in method.sites(anatomy))


def _layernorms(anatomy: Anatomy, method: Any) -> int:
    names = anatomy.norm_names() if method.roles is None else {
        name for site in anatomy.sites(method.roles) for name in site.parameter_names}
    return sum(anatomy.root.get_parameter(name).numel() for name in names)


def _dora(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o) + o for i, o in _linear(anatomy, method))


def _mam(anatomy: Anatomy, method: Any) -> int:
    return _prefix(anatomy, method) + _parallel_at(anatomy, method.adapter)


def _parallel_at(anatomy: Anatomy, adapter: Any) -> int:
    return sum(2 * adapter.width(s.width) * s.width + adapter.width(s.width) + s.width + (adapter.scale == "learned")
               for s in anatomy.sites("mlp", adapter.layers))


def _unipelt(anatomy: Anatomy, method: Any) -> int:
    gates = sum(s.width + 1 for role in ("attend", "q", "v", "mlp") for s in anatomy.sites(role, method.layers))
    lora = sum(method.rank * (s.in_features + s.out_features) for s in anatomy.sites(("q", "v"), method.layers))
    return _prefix(anatomy, method) + lora + _pfeiffer(anatomy, method.adapter) + gates


def _houlsby(anatomy: Anatomy, method: Any) -> int:
    sites = anatomy.sites(method.targets, method.layers)
    bottlenecks = sum(2 * method.width(s.width) * s.width + method.width(s.width) + s.width for s in sites)
    return bottlenecks + _norms(anatomy, method.norms)


def _fact(anatomy: Anatomy, method: Any) -> int:
    cuts = [method.cut(site) for site in method.sites(anatomy)]
    slices = sum(rows * columns for _, rows, columns in cuts)
    widths, r = {dim for dim, *_ in cuts}, method.rank
    return 2 * r * sum(widths) + (slices * r**2 if method.form == "tt" else slices * r + len(widths) * r**3)


def _consolidator(anatomy: Anatomy, method: Any) -> int:
    return sum(s.in_features * s.out_features // method.groups_at(s) + (s.out_features if s.bias is not None else 0)
               for s in method.sites(anatomy))


def _repadapter(anatomy: Anatomy, method: Any) -> int:
    inputs = {(site.block, site.role.startswith("mlp")): [] for site in method.sites(anatomy)}
    for site in method.sites(anatomy):
        inputs[site.block, site.role.startswith("mlp")].append(site)
    total, h = 0, method.bottleneck
    for sites in inputs.values():
        d = sites[0].in_features
        total += d * h + h * d // method.groups + (h + d if all(s.bias is not None for s in sites) else 0)
    return total


def _pfeiffer(anatomy: Anatomy, method: Any) -> int:
    dims = [anatomy.blocks[i].dim for i in anatomy.layer_indices(method.layers)]
    return sum(2 * method.width(dim) * dim + method.width(dim) + dim for dim in dims)


def _parallel(anatomy: Anatomy, method: Any) -> int:
    sites = [(method.width(s.width), s.width, s.in_features if s.role == "o" else s.width)
             for s in method.sites(anatomy)]
    return sum(m * (d + out) + m + out + (method.scale == "learned") for m, d, out in sites)


def _convpass(anatomy: Anatomy, method: Any) -> int:
    m = method.bottleneck
    return sum(2 * m * s.width + 9 * m * m + 2 * m + s.width for s in method.sites(anatomy))


def _conformer(anatomy: Anatomy, method: Any) -> int:
    sites = [(s.width, method.width(s.width)) for s in method.sites(anatomy) if s.around]
    return sum(d * (3 * m + 1 + 2 * method.layer_norm) + m * (method.kernel + 5) for d, m in sites)


def _moa(anatomy: Anatomy, method: Any) -> int:
    sites = [(s.width, method.width(s.width)) for s in method.sites(anatomy)]
    return sum(method.adapters * (2 * d * m + m + d + (d * method.slots if method.kind == "soft" else d + 1))
               for d, m in sites)


def _compacter(anatomy: Anatomy, method: Any) -> int:
    total = method.n ** 3 if method.is_shared else 0
    for site in method.sites(anatomy):
        d, m, n = site.width, method.width(site.width), method.n
        maps = 2 * d * m // n if method.rank is None else 2 * method.rank * (d + m)
        total += maps + m + d + (0 if method.is_shared else 2 * n ** 3)
    return total + _norms(anatomy, method.norms)


def _side(anatomy: Anatomy, method: Any) -> int:
    width, dim = anatomy.stacks[-1].blocks[0].dim, method.dim or anatomy.blocks[-1].dim
    if method.network == "alexnet":
        return 2_469_696 + 9_216 * dim + 1
    return method.hidden * (width + dim) + method.hidden + dim + 1


def _language_adapter(anatomy: Anatomy, method: Any) -> int:
    dim, last = anatomy.blocks[0].dim, anatomy.blocks[-1].dim
    invertible = 4 * (dim // 2) * (dim // 4) + 2 * (dim // 2 + dim // 4) if method.invertible else 0
    dropped = 2 * method.width(last) * last + method.width(last) + last if method.drop_last else 0
    return _pfeiffer(anatomy, method) + invertible - dropped


def _prompts(anatomy: Anatomy, method: Any) -> int:
    if getattr(method, "deep", False):
        return method.tokens * sum(site.width for site in anatomy.sites("attend", method.layers))
    widths = [stack.text.module.get_input_embeddings().weight.shape[1] if stack.text else stack.blocks[0].dim  # type: ignore[operator]
              for stack in anatomy.stacks if "cross.q" not in stack.blocks[0].sites]
    if not hasattr(method, "encoder") or method.folded:
        return method.tokens * sum(widths)
    total = 0
    for d in widths:
        h = method.hidden or d
        lstm = sum(2 * 4 * h * (i + h + 2) for i in (d, 2 * h))
        mlp = (d * h + h) + (h * h + h) + (h * d + d)
        total += method.tokens * d + (mlp if method.encoder == "mlp" else lstm + (4 * h * h + 2 * h) + (2 * h * d + d))
    return total


def _vptsp(anatomy: Anatomy, method: Any) -> int:
    prompts = sum(max(0, method.tokens - i * method.step) * site.width
                  for i, site in enumerate(anatomy.sites("attend", method.layers)))
    biases = [p for name, p in anatomy.root.named_parameters()
              if name.rpartition(".")[2] == "bias" and name not in anatomy.head_names()] if method.biases else []
    return prompts + sum(p.numel() for p in biases)


def _prefix(anatomy: Anatomy, method: Any) -> int:
    roles = [role for role in ("attend", "cross.attend") if role == "attend" or type(method).__name__ == "MAM"]
    sites = anatomy.sites([role for role in roles if role in anatomy.roles], method.layers)
    widths = [2 * site.heads.key * site.heads.width for site in sites if site.heads]
    if not method.hidden or method.folded:
        return method.tokens * sum(widths)
    banks = {(site.around.stage, site.role): site.width for site in sites if site.around}
    first = sum(method.tokens * dim + (dim + 1) * method.hidden for dim in banks.values())
    return first + (method.hidden + 1) * sum(widths)


def _vqt(anatomy: Anatomy, method: Any) -> int:
    blocks = [block for block in anatomy.blocks if block.index in anatomy.layer_indices(method.layers)]
    return sum(method.tokens * (block.dim + (method.reduce == "sum")) for block in blocks)


def _adalora(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o + 1) for i, o in _linear(anatomy, method))


def _triadapt(anatomy: Anatomy, method: Any) -> int:
    total = 0
    for graft in method.grafts:
        rank = 0
        for width in graft.blocks:
            rank += width
            total += 2 * width * rank
        total += rank * (graft.site.in_features + graft.site.out_features)
    return total


def _full(anatomy: Anatomy, method: Any) -> int:
    return sum(anatomy.root.get_parameter(name).numel() for name in method.moved(anatomy))


def _mos(anatomy: Anatomy, method: Any) -> int:
    sites = method.sites(anatomy)
    return sum(method.budget * (s.in_features + s.out_features) for s in sites)


def _ladder(anatomy: Anatomy, method: Any) -> int:
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


def _hydra(anatomy: Anatomy, method: Any) -> int:
    def branch(i: int, o: int, rank: int, bias: bool) -> int:
        return rank * (i + o) + (rank + o if bias else 0)

    total = 0
    for site in anatomy.sites(method.targets, method.layers):
        bias = site.bias is not None if method.bias is None else method.bias
        total += branch(site.in_features, site.out_features, method.rank, bias)
        total += branch(site.out_features, site.out_features, method.sequential_rank, bias)
    return total


def _mtlora(anatomy: Anatomy, method: Any) -> int:
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


def _norms(anatomy: Anatomy, roles: tuple[str, ...]) -> int:
    return sum(p.numel() for site in anatomy.sites(roles) for p in site.module.parameters()) if roles else 0


def _everything(anatomy: Anatomy, method: Any) -> int:
    return sum(p.numel() for p in anatomy.root.parameters())


def _biases(anatomy: Anatomy, method: Any) -> int:
    if method.roles is not None:
        return sum(site.module.bias.numel() for site in anatomy.sites(method.roles, method.layers))  # type: ignore
    modules = {id(site.module): site.module for site in anatomy.all_sites() if isinstance(
        getattr(site.module, "bias", None), nn.Parameter)}
    return sum(module.bias.numel() for module in modules.values())  # type: ignore[operator]


def _lofit(anatomy: Anatomy, method: Any) -> int:
    sites = method.sites(anatomy)
    return sum(s.in_features for s in sites) if method.stage == "heads" else method.count * sites[0].heads.width


def _ltsft(anatomy: Anatomy, method: Any) -> int:
    if method.stage == "dense":
        return _everything(anatomy, method)
    return method.count or round(method.density * anatomy.size)


# ------------------------------------------------------------------------------------------------- stages


def _to_sparse(method: Any) -> None:
    """As after a dense stage that moved everything at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.01 * (torch.rand(tensor.shape, generator=generator) - 0.5).to(tensor)
    method.advance()


def _to_offsets(method: Any) -> None:
    """As after a stage in which one head of each layer was scaled most, more in the first layers."""
    with torch.no_grad():
        for i, graft in enumerate(method.grafts):
            graft.A[i % len(graft.A)] += 1 / (1 + i)
    method.advance()


def _to_compact(method: Any) -> None:
    """As after a wide stage that left a head of random columns."""
    from core.anatomy import dissect

    head: Any = nn.utils.skip_init(nn.Linear, method.feature_dim(WIDTH, dissect(method.root)), 4)
    with torch.no_grad():
        head.weight.copy_(torch.rand(head.weight.shape, generator=torch.Generator().manual_seed(0)))
    method.advance(head)


def _patched(method: Any) -> None:
    """As made from a saved patch of rank 2, with values of zero."""
    from core.anatomy import dissect

    anatomy = dissect(method.root)
    weights = {site.weight_name: site.full_weight for site in anatomy.sites(
        ("mlp.up", "o") if "o" in anatomy.roles else ("mlp.up",))}
    method.restructure({"changes": {name: [[weight.shape[0], 2], [2, weight.numel() // weight.shape[0]]]
                                    for name, weight in weights.items()}})


def _grown(method: Any) -> None:
    """As after two checks: every other site has grown."""
    for graft in method.grafts[::2]:
        method.grow(graft)
        method.grow(graft)


def _selection_follows_formula() -> None:
    """LIFT: the positions are the largest of the rank-r part of the present weight, at the start and after each
    selection; entries that stay keep their moments, those that leave their values."""
    from tests.models import make

    method: Any = peft.method_class("LIFT")(rank=2, interval=3, targets=("q", "mlp.up"))  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.AdamW(method.param_groups(), lr=0.05)
    method.follow(optimizer, total=9)
    generator = torch.Generator().manual_seed(0)

    def expected(graft: Any) -> set[int]:
        u, s, v = torch.linalg.svd(graft(graft.site.matrix(graft.site.full_weight.detach()), verb="weight").detach())
        near = (u[:, :2] * s[:2]) @ v[:2]
        return set(near.abs().flatten().argsort(descending=True)[:len(graft.index)].tolist())

    moved = 0
    for step in range(1, 10):
        before = {graft: (graft.index.tolist(), graft(torch.zeros(graft.site.out_features, graft.site.in_features),
                                                      verb="weight").detach()) for graft in method.grafts}
        assert step % 3 != 1 or all(set(graft.index.tolist()) == expected(graft) for graft in method.grafts)
        for graft in method.grafts:
            graft.values.grad = torch.randn(graft.values.shape, generator=generator)
        optimizer.step()
        for graft in method.grafts:
            old, change = before[graft]
            now = graft(torch.zeros_like(change), verb="weight").detach()
            touched = (now != change).flatten().nonzero().flatten().tolist()
            assert set(touched) <= set(old) and len(touched) == len(old)  # also those that have left since
            state = optimizer.state[graft.values]
            fresh = [i for i, position in enumerate(graft.index.tolist()) if position not in old]
            stays = [i for i, position in enumerate(graft.index.tolist()) if position in old]
            moved += len(fresh)
            assert (step % 3 == 0 or not fresh) and not state["exp_avg"][fresh].any()
            assert bool((state["exp_avg"][stays] != 0).all()) and state["step"] == step
    assert moved > 20


def _halves_follow_formula() -> None:
    """HalfFineTuning: every three steps another half; what is frozen stays to the bit and has neither gradient nor
    state; over many rounds each matrix is trained in about half."""
    from tests.models import make

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


def _positions_follow_formula() -> None:
    """SpIEL: windows, shares and counts of the schedule; positions stay distinct and k stays what it was."""
    from tests.models import make

    for kind in ("AG", "MA"):
        method: Any = peft.method_class("SpIEL")(rank=2, kind=kind, targets=("q", "mlp.up"))  # type: ignore[call-arg]
        model = make("timm_vit")
        method.attach(model)
        optimizer = method.make_optimizer(method.param_groups(), lr=0.01)
        method.follow(optimizer, total=60)
        generator = torch.Generator().manual_seed(0)
        sizes = [len(graft.index) for graft in method.grafts]
        shares = {5: 1.0, 25: 0.2 * (1 - 25 / 60), 45: 0.2 * (1 - 45 / 60)}
        assert all(method.replaced(step) == share for step, share in shares.items())
        for step in range(1, 61):
            assert all((graft.watch is not None) == (kind == "AG" and (step <= 5 or (step - 1) % 20 >= 19 or (
                step - 1) % 20 < 5 and step > 20)) for graft in method.grafts), step
            before = [graft.index.clone() for graft in method.grafts]
            for graft in method.grafts:
                gradient = torch.randn(graft.site.out_features * graft.site.in_features, generator=generator)
                graft.values.grad = gradient[graft.index.long()]
                if graft.watch is not None:
                    graft.watch(graft, gradient)
            optimizer.step()
            for graft, old, size in zip(method.grafts, before, sizes, strict=True):
                positions = graft.index.tolist()
                assert len(set(positions)) == size and min(positions) >= 0
                assert max(positions) < graft.site.out_features * graft.site.in_features
                changed = (graft.index != old).nonzero().flatten()
                if step not in shares:
                    assert not len(changed)
                    continue
                most = int(size * shares[step])
                assert 0 < len(changed) <= most and not graft.values[changed].any()
                if kind == "MA":
                    assert len(changed) == most and not set(graft.index[changed].tolist()) & set(old.tolist())


def _budget_follows_formula() -> None:
    """AdaLoRA: a cubic fall from rank to target_rank a site; as many singular values are left, the most important."""
    from tests.models import make

    method: Any = peft.method_class("AdaLoRA")(rank=4, target_rank=2, warmup=4, cooldown=6, interval=2)  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.0)
    method.follow(optimizer, total=20)
    generator = torch.Generator().manual_seed(0)
    sites = len(method.grafts)
    with torch.no_grad():
        for graft in method.grafts:
            graft.E.normal_(generator=generator)
    for step in range(1, 21):
        for tensor in method.trainable().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()
        left = sum(int((graft.E != 0).sum()) for graft in method.grafts)
        share = 1 - (min(max(step, 4), 14) - 4) / 10
        wanted = int(2 * sites + 2 * sites * share**3)
        assert method.budget(step) == (wanted, step > 4 and (step >= 14 or step % 2 == 0))
        assert left == wanted or step < 14 and step % 2 or step <= 4 and left == 4 * sites


def _sparsity_follows_formula() -> None:
    """PST: the cubic rise, and as many zeros in each effective weight, those of the smallest scores."""
    from tests.models import make

    method: Any = peft.method_class("PST")(sparsity=0.8, warmup=2, cooldown=3, rank=2)  # type: ignore[call-arg]
    method.attach(make("timm_vit"))
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.01)
    method.follow(optimizer, total=15)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 16):
        for tensor in method.trainable().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()
        share = 0.8 - 0.8 * (1 - min(max(step - 2, 0), 10) / 10) ** 3
        assert abs(method.sparsity - share) < 1e-12
        for graft in method.grafts:
            base = graft.site.matrix(graft.site.full_weight.detach())
            changed = base + graft.U @ graft.V
            scores = changed.abs() + graft.A @ graft.B + graft.R[:, None] + graft.C
            order = scores.flatten().argsort(stable=True)[:int(method.sparsity * base.numel())]
            expected = changed.detach().flatten().index_fill(0, order, 0.0).view_as(base)
            torch.testing.assert_close(graft.weight(base).detach(), expected)


def _rank_follows_formula() -> None:
    """TriAdaptLoRA: the sites with the largest growth of |C| / blocks gain ranks, until the budget is met."""
    from tests.models import make

    method: Any = peft.method_class("TriAdaptLoRA")(rank=4, growth=2, warmup=2, interval=2)  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=0.0)
    method.follow(optimizer, total=12)
    sites = len(method.grafts)
    before: list[float] = [0.0] * sites
    for step in range(1, 13):
        ranks = [sum(graft.blocks) for graft in method.grafts]
        old = list(method.trainable().values())
        for tensor in old:
            tensor.grad = torch.zeros_like(tensor)
        with torch.no_grad():
            for i, graft in enumerate(method.grafts):
                graft.L[0] += 0.1 * ((i * 7 + step) % sites)
        optimizer.step()
        now = [sum(graft.blocks) for graft in method.grafts]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in method.trainable().values()} and all(id(p) in held for p in old)
        left = 4 * sites - sum(ranks)
        if step <= 2 or step % 2 or left <= 0:
            assert now == ranks
            continue
        cores = [torch.zeros(r, r) for r in ranks]
        for core, graft in zip(cores, method.grafts, strict=True):
            end = 0
            for rows, columns in zip(list(graft.L), list(graft.U), strict=True):
                if end + len(rows) > len(core):
                    break
                core[end:end + len(rows), :end + len(rows)] += rows.detach()
                core[:end + len(rows), end:end + len(rows)] += columns.detach()
                end += len(rows)
        counts = [1 if r == 1 else (r - 1) // 2 + 1 for r in ranks]
        norms = [float(core.norm()) / n for core, n in zip(cores, counts, strict=True)]
        scores = [a - b for a, b in zip(norms, before, strict=True)]
        before = norms
        wanted = max(1, min(sites, int(left * (step - 2) / 10)))
        best = sorted(scores, reverse=True)[wanted - 1]
        assert now == [r + 2 * (score >= best) for r, score in zip(ranks, scores, strict=True)]
    assert 4 * sites <= sum(now) < 4 * sites + 2 * sites


def _galore_follows_formula() -> None:
    """GaLore: at full rank and scale 1, rotated back, the first step is Adam's on the rotated gradient; the state of a
    matrix holds two moments of rank max(m, n) and a basis of rank min(m, n); the rest has AdamW."""
    from tests.models import make

    model = make("timm_vit")
    method: Any = peft.method_class("GaLore")(rank=4, scale=0.5, interval=2)  # type: ignore[call-arg]
    method.attach(model)
    optimizer: Any = method.make_optimizer(method.param_groups(), lr=1e-2, weight_decay=0.0)
    start = {name: tensor.detach().clone() for name, tensor in method.trainable().items()}
    generator = torch.Generator().manual_seed(0)
    for tensor in method.trainable().values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    optimizer.step()
    for name, tensor in method.trainable().items():
        moved = tensor.detach() - start[name]
        if name not in method.projected:
            torch.testing.assert_close(moved, -1e-2 * tensor.grad.sign(), rtol=1e-3, atol=1e-6)
            continue
        m, n = tensor.shape
        u, _, v = torch.linalg.svd(tensor.grad, full_matrices=False)
        low = (tensor.grad @ v[:4].t()).sign() @ v[:4] if m >= n else u[:, :4] @ (u[:, :4].t() @ tensor.grad).sign()
        torch.testing.assert_close(moved, -1e-2 * 0.5 * low, rtol=1e-3, atol=1e-5)
        state = optimizer.state[tensor]
        assert state["exp_avg"].numel() == 4 * max(m, n) and state["basis"].numel() == 4 * min(m, n)


def _mask_follows_formula() -> None:
    """LT-SFT: the mask is the K largest moves over all tensors together."""
    from tests.models import make

    model = make("timm_vit")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    method: Any = peft.method_class("LTSFT")(count=100).attach(model)  # type: ignore[call-arg]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter += torch.randn(parameter.shape, generator=generator)
    moves = torch.cat([(method.trainable()[name] - value).abs().flatten() for name, value in start.items()])
    expected = set(moves.argsort(descending=True)[:100].tolist())
    method.advance()
    offsets, total = {}, 0
    for name, value in start.items():
        offsets[key_of(name)] = total
        total += value.numel()
    found = {offsets[key] + int(i) for key, graft in method.module.named_children() for i in graft.index}
    assert found == expected


# ------------------------------------------------------------------------------------------------- the table

RANK = {"rank": 4}
WIDE = {"targets": ("q", "k", "v", "o", "mlp.up", "mlp.down")}
FEW = {"layers": (0,), "exclude": ("q", "k", "v", "mlp.up", "mlp.down")}

NOT_LINEAR: tuple[tuple[Config, str], ...] = (({"targets": ("mlp.up", "block")}, "linear weight"),
                                              ({"targets": ("mlp.upp",)}, "'mlp.up'"))

METHODS: dict[str, Row] = {
    "rsLoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=_lora,
        bad=(({"rank": 0}, "rank 0"), ({"dropout": 1.5}, "dropout 1.5"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
    "LoRAPlus": Row(
        {"q, v": Variant(RANK, learns_on=dict.fromkeys(("timm_swin", "bert"), {"lr": 3e-3})),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=_lora,
        bad=(({"rank": 0}, "rank 0"), ({"lr_ratio": 0.0}, "lr_ratio 0"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
    "PiSSA": Row(
        {"q, v": Variant(RANK, learns_on=dict.fromkeys(("timm_swin", "bert", "clip_vision"), {"lr": 1e-2})),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=_lora,
        bad=(({"rank": 0}, "rank 0"), ({"rank": 99}, "rank 99"), ({"start": "best"}, "'best'"), *NOT_LINEAR),
        weights=True, commutes=True, operators=14, saved=0.8, stored=2.0,
        artifact={"rank": 1},
    ),
    "VeRA": Row(
        {"q, v": Variant({"rank": 8}), "all": Variant({"rank": 4, **WIDE})},
        trained=_vera,
        cards=(("bert_base", {}, 24_576),),
        bad=(({"rank": 0}, "rank 0"), ({"start": 0.0}, "start 0"), *NOT_LINEAR),
        weights=True, operators=12, saved=0.9,
        artifact={"rank": 2},
    ),
    "FourierFT": Row(
        {"q, v": Variant({"frequencies": 20, "scale": 30.0}, learns={"frequencies": 200, "lr": 3e-2}),
         "all": Variant({"frequencies": 9, "scale": 20.0, "init": "normal", **WIDE}, random=True,
                        learns={"lr": 5e-2})},
        trained=_fourier,
        cards=(("bert_base", {}, 24_000),),
        bad=(({"frequencies": 0}, "frequencies 0"), ({"scale": 0}, "scale 0"), ({"init": "one"}, "'one'"),
             ({"frequencies": 10**6}, "fewer"), *NOT_LINEAR),
        weights=True, operators=14, saved=0.8,
        artifact={"frequencies": 2},
    ),
    "LoHa": Row(
        {"q, v": Variant(RANK, learns_on={"timm_swin": {"lr": 1e-2}}),
         "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=lambda anatomy, method: 2 * _lora(anatomy, method),
        cards=(("bert_base", {}, 589_824),),
        bad=(({"rank": 0}, "rank 0"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=0.8,
        artifact={"rank": 1},
    ),
    "LoKr": Row(
        {"q, v": Variant(RANK, learns={"lr": 1e-2}),
         "all": Variant({"rank": 1, "factor": 2, **WIDE}, learns={"lr": 3e-3})},
        trained=_lokr,
        cards=(("bert_base", {}, 26_112),),
        bad=(({"rank": 0}, "rank 0"), ({"factor": 0}, "factor 0"), *NOT_LINEAR),
        random=True, weights=True, operators=12, saved=0.8,
        artifact={"rank": 1},
    ),
    "OFT": Row(
        {"q, v": Variant({"block": 4}, learns={"lr": 2e-2}),
         "all": Variant({"block": 2, "terms": 0, **WIDE}, learns={"lr": 3e-3})},
        trained=_oft,
        cards=(("bert_base", {}, 285_696),),
        bad=(({"block": 1}, "block 1"), ({"terms": 1}, "terms 1"), ({"block": 13}, "block 13"),
             ({"dropout": 1.0}, "dropout 1"), ({"limit": 0.0}, "limit 0"), *NOT_LINEAR),
        weights=True, commutes=None, operators=26, saved=0.8,
        artifact={"block": 2},
    ),
    "BOFT": Row(
        {"q, v": Variant(learns={"lr": 2e-2}), "all": Variant({"block": 2, "factors": 2, **WIDE})},
        trained=_boft,
        cards=(("bert_base", {}, 46_080),),
        bad=(({"block": 3}, "block 3"), ({"factors": 0}, "factors 0"), ({"block": 26}, "block 26"), *NOT_LINEAR),
        weights=True, commutes=False, operators=26, saved=0.8,
        artifact={"block": 2},
    ),
    "Bone": Row(
        {"all": Variant({"rank": 4}),
         "mini": Variant({"rank": 5, "columns": 8, "targets": ("q", "v")}, learns={"lr": 3e-3})},
        trained=_bone,
        cards=(("vit_b16", {}, 5_308_416),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 10**6}, "inputs"), ({"rank": 2, "columns": 7}, "columns 7"),
             *NOT_LINEAR),
        weights=True, operators=8, saved=0.9, size=0.01,
        artifact={"rank": 1},
    ),
    "Bat": Row(
        {"outputs": Variant({"rank": 2}), "inputs": Variant({"rank": 4, "group": "inputs", "targets": ("q", "v")})},
        trained=_bat,
        cards=(("vit_b16", {}, 5_308_416), ("vit_b16", {"group": "inputs"}, 4_128_768)),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 7}, "rank 7"), ({"group": "rows"}, "'rows'"), *NOT_LINEAR),
        weights=True, commutes=False, operators=14, saved=1.0,
        artifact={"rank": 1},
    ),
    "Consolidator": Row(
        {"all": Variant(learns={"groups": 2, "lr": 1e-2}),
         "zeros": Variant({"groups": 4, "init": "zeros", "dropout": 0.2, "targets": ("q", "v")}, random=False,
                          learns={"groups": 2, "lr": 3e-2})},
        trained=_consolidator,
        cards=(("vit_b16", {}, 304_128), ("bert_base", {}, 304_128)),
        bad=(({"groups": 0}, "groups 0"), ({"groups": 7}, "groups 7 does not divide"), ({"dropout": 1.0}, "dropout 1"),
             ({"init": "one"}, "'one'"), *NOT_LINEAR),
        random=True, weights=True, operators=8, saved=1.25,
        artifact={"groups": 8, "targets": ("o",)},
    ),
    "FacT": Row(
        {"tt": Variant({"rank": 4, "dropout": 0.0}, learns={"lr": 1e-2}),
         "tk": Variant({"rank": 3, "form": "tk", "scale": 2.0, "dropout": 0.0, "targets": ("q", "v", "mlp.up")},
                       learns={"rank": 8, "lr": 1e-2})},
        trained=_fact,
        cards=(("vit_b16", {}, 61_440), ("vit_b16", {"rank": 32, "form": "tk"}, 86_528)),
        bad=(({"rank": 0}, "rank 0"), ({"scale": 0}, "scale 0"), ({"form": "tucker"}, "'tucker'"),
             ({"dropout": 1.0}, "dropout 1"), *NOT_LINEAR),
        random=True, weights=True, operators=14, saved=1.15,
        artifact={"rank": 1},
    ),
    "SVFit": Row(
        {"q, v": Variant(), "all": Variant({"rank": 3, **WIDE}, learns={"lr": 3e-2})},
        trained=_svfit,
        cards=(("bert_base", {}, 18_432),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": 99}, "rank 99"), ({"energy": 0.0}, "energy 0"),
             ({"energy": 0.9, "rank": 3}, "not both"), *NOT_LINEAR),
        weights=True, operators=7, saved=0.85, size=0.02, carries={"save_basis": True},
        artifact={"rank": 1},
    ),
    "IA3": Row(
        {"k, v, mlp": Variant(learns={"lr": 3e-2}),
         "outputs": Variant({"outputs": ("q", "mlp.up"), "inputs": ()}, learns={"lr": 2e-2})},
        trained=_ia3,
        cards=(("vit_b16", {}, 55_296), ("bert_base", {}, 55_296)),
        bad=(({"outputs": (), "inputs": ()}, "neither"), ({"inputs": ("q",), "outputs": ("q",)}, "q")),
        operators=4, saved=1.1, without_attention={"outputs": ("mlp.up",)},
        artifact={"inputs": ()},
    ),
    "SSF": Row(
        {"published": Variant(), "identity": Variant({"init": "identity", "patch_merging": True}, random=False),
         "few": Variant({"targets": ("norm", "mlp.down")})},
        trained=_ssf,
        cards=(("vit_b16", {}, 205_824),),
        bad=(({"init": "zero"}, "'zero'"), ({"shift": "some"}, "'some'"),
             ({"targets": ("block",)}, "no weight of its own"), ({"targets": ("nrom1",)}, "'norm1'")),
        random=True, commutes=None, operators=3, saved=1.4, absent=("test_no_graph_below_the_first_graft",), size=0.01,
        artifact={"targets": ("o",)},
    ),
    "LayerNormTuning": Row(
        {"all": Variant(learns={"lr": 1e-2}), "few": Variant({"targets": ("norm",)}, learns={"lr": 2e-2})},
        trained=_layernorms,
        cards=(("vit_b16", {}, 38_400), ("bert_base", {}, 38_400)),
        bad=(({"targets": ("mlp.up",)}, "no norm"), ({"targets": ("nrom1",)}, "'norm1'")),
        saved=0.9, absent=("test_no_graph_below_the_first_graft",),
        artifact={"targets": ("norm2",)},
    ),
    "BitFit": Row(
        {"all": Variant(),
         "mlp": Variant({"targets": ("mlp.up", "mlp.down"), "layers": (-1,)}, learns={"lr": 3e-2},
                        refused={"timm_eva": "gate and up are one projection with one bias",
                                 "qwen2": "its MLP has no biases"})},
        trained=_biases,
        cards=(("vit_b16", {}, 102_912), ("bert_base", {}, 102_912)),
        bad=(({"targets": ("q", "qq")}, "'qq'"), ({"exclude": ("nrom",)}, "'norm'")),
        saved=0.72,
        artifact={"targets": ("o", "mlp.down")},
    ),
    "DiffPruning": Row(
        {"masks": Variant(noise=True, learns={"lr": 3e-4}),
         "structured": Variant({"structured": True, "l0": 0.0}, noise=True, learns={"lr": 3e-4}),
         "fixed": Variant({"density": 0.01}, _to_sparse, everywhere=True, learns={"density": 1.0, "lr": 3e-4})},
        trained=_diff,
        cards=(("vit_b16", {}, 171_597_312),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 10**9}, "count 1000000000"),
             ({"count": 10, "density": 0.5}, "not both"), ({"l0": -1.0}, "l0 -1"), ({"mask_lr": 0.0}, "mask_lr 0"),
             ({"exclude": ("pol",)}, "'pol'")),
        operators=12, saved=2.5, stored=2.0, decays=False,
        artifact={"layers": (0,), "exclude": WIDE["targets"]},
    ),
    "DoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE})},
        trained=_dora,
        cards=(("bert_base", {}, 313_344),),
        bad=(({"rank": 0}, "rank 0"), ({"rank": -1}, "rank -1"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, commutes=False, stopped=(".A", ".B"), operators=26, saved=0.92,
        artifact={"rank": 1},
    ),
    "FullFineTuning": Row(
        {"all": Variant()},
        trained=_everything,
        cards=(("vit_b16", {}, 85_798_656), ("bert_base", {}, 109_482_240)),
        bad=(({"exclude": ("pol",)}, "'pol'"),),
        artifact=FEW,
    ),
    "GaLore": Row(
        {"all": Variant({"rank": 4, "interval": 5}, learns={"rank": 16, "lr": 1e-3}),
         "few": Variant({"rank": 8, "scale": 1.0, "targets": ("mlp.up",), "layers": (0,)}, learns={"lr": 1e-3})},
        trained=_full,
        cards=(("vit_b16", {}, 85_798_656),),
        bad=(({"rank": 0}, "rank 0"), ({"interval": 0}, "interval 0"), ({"exclude": ("pol",)}, "'pol'"),
             ({"targets": ("block",)}, "no linear weight")),
        schedule=_galore_follows_formula,
        artifact=FEW,
    ),
    "HalfFineTuning": Row(
        {"one round": Variant(learns={"lr": 2e-4}), "rounds": Variant({"interval": 2, "whole": ("norm",)},
                                                                     learns={"lr": 2e-4})},
        trained=_full,
        bad=(({"interval": 0}, "interval 0"), ({"whole": ("nrom1",)}, "'norm1'")),
        random=True,
        schedule=_halves_follow_formula,
        artifact={"layers": (0,)},
    ),
    "Houlsby": Row(
        {"zero_up": Variant({"bottleneck": 4}), "near_identity": Variant({"reduction": 8, "init": "near_identity"}),
         "norms": Variant({"bottleneck": 4, "norms": ("norm1", "norm2")}, moves_base=True)},
        trained=_houlsby,
        cards=(("vit_b16", {}, 2_379_264), ("bert_base", {}, 2_379_264)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": -2}, "reduction -2"),
             ({"targets": ("q",)}, "no hidden state"), ({"targets": ("atention",)}, "'attention'")),
        random=True, commutes=False, operators=4, saved=0.68, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
    ),
    "LTSFT": Row(
        {"dense": Variant({"density": 0.01}), "sparse": Variant({"density": 0.01}, _to_sparse, everywhere=True,
                                                                   moves_base=False, learns={"density": 1.0})},
        trained=_ltsft,
        bad=(({"density": 0.0}, "density 0"), ({"density": 1.5}, "density 1.5"), ({"count": 0}, "count 0"),
             ({"count": 10**9}, "count 1000000000"), ({"count": 10, "density": 0.5}, "not both")),
        operators=1, stored=2.0,
        schedule=_mask_follows_formula,
        artifact={"density": None, "count": 64, **FEW},
    ),
    "LanguageAdapter": Row(
        {"invertible": Variant({"bottleneck": 4}, learns={"lr": 1e-2}),
         "drop_last": Variant({"reduction": 8, "init": "normal", "drop_last": True}, learns={"lr": 1e-2}),
         "plain": Variant({"bottleneck": 4, "invertible": False}, learns={"lr": 1e-2})},
        trained=_language_adapter,
        cards=(("bert_base", {}, 7_387_776), ("bert_base", {"drop_last": True}, 6_796_800)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"init": "zero"}, "'zero'")),
        random=True, commutes=False, operators=12, saved=0.9, without_attention={"invertible": False},
        artifact={"bottleneck": 1},
    ),
    "ParallelAdapter": Row(
        {"mlp": Variant({"bottleneck": 4}, learns={"lr": 1e-3}),
         "heads": Variant({"reduction": 8, "scale": "learned", "targets": ("o", "mlp"), "input": "residual"},
                          refused={"timm_swin": "attention is cut into windows, the residual stream is a map"},
                          learns={"lr": 1e-2}),
         "attention": Variant({"bottleneck": 3, "scale": 2.0, "targets": ("attention",), "init": "normal"},
                              learns={"lr": 1e-2})},
        trained=_parallel,
        cards=(("vit_b16", {}, 7_091_712), ("bert_base", {"scale": "learned"}, 7_091_724)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"scale": "big"}, "'big'"),
             ({"dropout": 1.0}, "dropout 1"), ({"input": "norm"}, "'norm'"), ({"init": "zero"}, "'zero'"),
             ({"targets": ("q",)}, "no output of a sublayer")),
        random=True, operators=6, saved=0.7, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
    ),
    "AdaptFormer": Row(
        {"mlp": Variant({"bottleneck": 4, "dropout": 0.0}, learns={"lr": 1e-2})},
        trained=_parallel,
        cards=(("vit_b16", {}, 1_189_632), ("vit_b16", {"bottleneck": 8}, 156_768)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0.0}, "scale 0")),
        random=True, operators=6, saved=0.7,
        artifact={"bottleneck": 1},
    ),
    "Convpass": Row(
        {"both": Variant({"bottleneck": 4, "dropout": 0.0}, learns={"lr": 1e-2}),
         "mlp": Variant({"bottleneck": 3, "targets": ("mlp",), "scale": 4.0}, learns={"lr": 1e-2})},
        trained=_convpass,
        cards=(("vit_b16", {}, 327_552), ("vit_b16", {"targets": ("attention",)}, 163_776)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0}, "scale 0"), ({"dropout": 1.0}, "dropout 1"),
             ({"targets": ("q",)}, "no sublayer")),
        random=True, operators=24, saved=0.9, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1},
    ),
    "ConformerAdapter": Row(
        {"parallel": Variant({"bottleneck": 4, "kernel": 5}),
         "sequential": Variant({"bottleneck": 3, "kernel": 3, "parallel": False, "layer_norm": False,
                                "targets": ("attention", "mlp")})},
        trained=_conformer,
        cards=(("vit_b16", {}, 252_288),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"kernel": 4}, "kernel 4"), ({"targets": ("q",)}, "no sublayer"),
             ({"parallel": "after"}, "'after'")),
        random=True, commutes=None, operators=24, saved=0.9, stored=1.3, running=True,
        absent=("test_accumulation", "test_two_processes"), without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 1, "kernel": 3},
    ),
    "MixtureOfAdapters": Row(
        {"dense": Variant({"kind": "dense", "adapters": 3, "bottleneck": 2}),
         "soft": Variant({"adapters": 2, "bottleneck": 2, "slots": 2, "targets": ("attention", "mlp")},
                         refused=dict.fromkeys(CAUSAL, "a soft mixture would see tokens to come"))},
        trained=_moa,
        cards=(("vit_b16", {}, 903_672),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"kind": "hard"}, "'hard'"), ({"adapters": 0}, "adapters 0"),
             ({"targets": ("q",)}, "no sublayer")),
        random=True, operators=24, saved=0.9, without_attention={"targets": ("mlp",)},
        artifact={"adapters": 1, "bottleneck": 1},
    ),
    "PTuningV2": Row(
        {"plain": Variant({"tokens": 4, "dropout": 0.0}, learns={"tokens": 20, "lr": 1e-2})},
        trained=_prefix,
        cards=(("bert_base", {"tokens": 128}, 2_359_296),),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"targets": ("q",)}, "no attention")),
        random=True, operators=20, saved=0.75,
        artifact={"tokens": 1},
    ),
    "MAM": Row(
        {"mlp": Variant({"tokens": 4, "reparametrize": 8, "bottleneck": 4}, learns={"lr": 1e-2}),
         "plain": Variant({"tokens": 3, "reparametrize": False, "reduction": 8, "scale": "learned",
                           "input": "normed"}, learns={"lr": 1e-2}),
         "folded": Variant({"tokens": 4, "reparametrize": 8, "bottleneck": 4},
                           lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"lr": 1e-2})},
        trained=_mam,
        cards=(("bert_base", {}, 22_493_984),),
        bad=(({"tokens": 0}, "tokens 0"), ({"bottleneck": 0}, "bottleneck 0"), ({"scale": 0}, "scale 0")),
        random=True, commutes=None, operators=30, saved=0.9,
        artifact={"tokens": 1, "reparametrize": False, "bottleneck": 1},
    ),
    "UniPELT": Row(
        {"mlp": Variant({"tokens": 4, "reparametrize": 8, "rank": 2, "reduction": 6}, learns={"lr": 1e-2}),
         "plain": Variant({"tokens": 3, "reparametrize": False, "rank": 1, "reduction": 8}, learns={"lr": 1e-2})},
        trained=_unipelt,
        cards=(("bert_base", {}, 11_083_376),),
        bad=(({"tokens": 0}, "tokens 0"), ({"rank": 0}, "rank 0"), ({"reduction": 0}, "reduction 0")),
        random=True, commutes=False, operators=40, saved=0.95,
        artifact={"tokens": 1, "reparametrize": False, "rank": 1},
    ),
    "Compacter": Row(
        {"shared": Variant({"bottleneck": 8, "std": 0.1}),
         "phm": Variant({"bottleneck": 4, "n": 2, "rank": None, "shared": False, "std": 0.1}),
         "norms": Variant({"bottleneck": 4, "rank": 2, "std": 0.1, "norms": ("norm1", "norm2")}, moves_base=True)},
        trained=_compacter,
        cards=(("bert_base", {}, 57_088),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"n": 0}, "n 0"), ({"n": 5}, "must divide"), ({"rank": 0}, "rank 0"),
             ({"targets": ("q",)}, "no hidden state")),
        random=True, commutes=False, operators=20, saved=0.8, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 4},
    ),
    "CompacterPlusPlus": Row(
        {"shared": Variant({"bottleneck": 8, "std": 0.1}, learns={"lr": 1e-2})},
        trained=_compacter,
        cards=(("bert_base", {}, 28_576),),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"n": 5}, "must divide")),
        random=True, commutes=False, operators=20, saved=0.8,
        artifact={"bottleneck": 4},
    ),
    "SideTuning": Row(
        {"mlp": Variant({"hidden": 16}, learns={"lr": 1e-2}, learns_on={"timm_convnext": {"lr": 3e-2}})},
        trained=_side,
        cards=(("vit_b16", {"network": "alexnet"}, 9_547_585),),
        bad=(({"hidden": 0}, "hidden 0"), ({"network": "vgg"}, "'vgg'"), ({"pretrained": True}, "alexnet"),
             ({"layers": (0,)}, "layers")),
        random=True, commutes=False, operators=24, saved=0.3,
        absent=("test_no_graph_below_the_first_graft",),
        artifact={"hidden": 1},
    ),
    "AdapterDrop": Row(
        {"alone": Variant({"drop": 1}, trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"drop": 0}, "drop 0"), ({"drop": "some"}, "'some'"), ({"drop": 99}, "drop 99"),
             ({"drop": "random", "maximum": 99}, "maximum 99"), ({"inference": -1}, "inference -1")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
    ),
    "VPT": Row(
        {"deep": Variant({"tokens": 4}, learns={"tokens": 20}),
         "shallow": Variant({"tokens": 3, "deep": False}, refused={"timm_swin": "a map has no place for tokens"},
                            learns={"tokens": 20})},
        trained=_prompts,
        cards=(("vit_b16", {}, 92_160), ("vit_b16", {"deep": False}, 7_680)),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"deep": False, "dropout": 0.1}, "deep")),
        random=True, commutes=None, operators=40, saved=0.9,
        artifact={"tokens": 1},
    ),
    "VPTSP": Row(
        {"prompts": Variant({"tokens": 4}, learns={"lr": 1e-2}, refused=dict.fromkeys(
            ("llama", "t5", "mistral", "gemma"), "it has no bias to train; the other variant trains none")),
         "falling": Variant({"tokens": 3, "step": 1, "class_depth": 1, "biases": False, "gate": "gru"},
                            moves_base=False, learns={"tokens": 20, "lr": 1e-2})},
        trained=_vptsp,
        cards=(("vit_b16", {}, 195_072),),
        bad=(({"tokens": -1}, "tokens -1"), ({"class_tokens": 0}, "class_tokens 0"), ({"depth": 0}, "depth 0"),
             ({"beta": 1.5}, "beta 1.5"), ({"gate_dropout": 1.0}, "gate_dropout 1"), ({"gate": "lstm"}, "'lstm'"),
             ({"step": -1}, "step -1")),
        random=True, commutes=None, operators=40, saved=0.9,
        artifact={"tokens": 1, "biases": False},
    ),
    "PromptTuning": Row(
        {"vocabulary": Variant({"tokens": 4}, learns={"tokens": 20}),
         "normal": Variant({"tokens": 2, "init": "normal"}, learns={"tokens": 20})},
        trained=_prompts,
        cards=(("vit_b16", {}, 15_360), ("bert_base", {}, 15_360)),
        bad=(({"tokens": 0}, "tokens 0"), ({"init": "zero"}, "'zero'"), ({"layers": (0,)}, "layers")),
        random=True, commutes=None, operators=12, saved=1.2,
        absent=("test_irregular_mix", "test_no_graph_below_the_first_graft"),  # its grafts act together; no layers
        artifact={"tokens": 1},
    ),
    "PTuning": Row(
        {"mlp": Variant({"tokens": 4, "hidden": 8}, learns={"tokens": 20}),
         "lstm": Variant({"tokens": 2, "hidden": 8, "encoder": "lstm"}, learns={"tokens": 20}),
         "folded": Variant({"tokens": 4, "hidden": 8}, lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"tokens": 20})},
        trained=_prompts,
        cards=(("bert_base", {}, 1_787_136), ("bert_base", {"encoder": "lstm"}, 27_174_144)),
        bad=(({"tokens": 0}, "tokens 0"), ({"encoder": "gru"}, "'gru'"), ({"hidden": 0}, "hidden 0")),
        random=True, commutes=None, operators=30, saved=1.2,
        absent=("test_irregular_mix", "test_no_graph_below_the_first_graft"),
        artifact={"tokens": 1, "hidden": 2},
    ),
    "LinearProbe": Row(
        {"head": Variant(trains=False), "norm": Variant({"norms": ("norm",)}, moves_base=True,
                                                        learns={"lr": 1e-2})},
        trained=lambda anatomy, method: _norms(anatomy, method.norms),
        cards=(("vit_b16", {}, 0), ("vit_b16", {"norms": ("norm",)}, 1536)),
        bad=(({"norms": ("nrm",)}, "'nrm'"),),
        saved=0.0,
        artifact={"norms": ("norm",)},
    ),
    "LoFiT": Row(
        {"heads": Variant(learns={"lr": 5e-2}),
         "offsets": Variant({"heads": 2}, _to_offsets, everywhere=True, learns={"heads": 4, "lr": 5e-2})},
        trained=_lofit,
        cards=(("bert_base", {}, 9_216),),
        bad=(({"heads": 0}, "heads 0"), ({"heads": 999}, "heads 999"), ({"l1": -1.0}, "l1 -1"),
             ({"spread": -1.0}, "spread -1"), ({"targets": ("mlp.down",)}, "does not read heads")),
        random=True, operators=6, saved=0.9, stored=2.0,
    ),
    "LIFT": Row(
        {"all": Variant({"rank": 2}, learns={"rank": 16, "lr": 1e-2}),
         "few": Variant({"rank": 3, "filter_rank": 1, "interval": 2, "targets": ("q", "mlp.down")},
                        learns={"rank": 32, "lr": 1e-2})},
        trained=_lift,
        cards=(("bert_base", {"targets": ("q", "k", "v", "o", "mlp.up", "mlp.down")}, 1_327_104),),
        bad=(({"rank": 0}, "rank 0"), ({"filter_rank": 0}, "filter_rank 0"), ({"interval": 0}, "interval 0"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        operators=2, saved=0.96, stored=4.0, state=12,
        schedule=_selection_follows_formula,
        artifact={"rank": 1, "targets": ("o",)},
    ),
    "SensitivityTuning": Row(
        {"both": Variant({"rank": 2, "count": 800, "batches": 0}, learns={"lr": 1e-2, "count": 2000}),
         "entries": Variant({"rank": 16, "density": 0.02, "ratio": 1.0, "vector_ratio": 0.0, "batches": 0},
                            random=False, learns={"lr": 2e-2})},
        trained=_sensitivity,
        bad=(({"density": 0.0}, "density 0"), ({"density": 0.1, "count": 3}, "not both"), ({"count": 0}, "count 0"),
             ({"count": 10**9}, "1000000000"), ({"rank": 0}, "rank 0"), ({"ratio": 0.5}, "ratio 0.5"),
             ({"batches": -1}, "batches -1"), *NOT_LINEAR),
        random=True, operators=8, saved=0.96, stored=2.0, decays=True,
        artifact={"count": 300},
    ),
    "SpIEL": Row(
        {"AG": Variant({"rank": 2}, learns={"rank": None, "density": 0.4, "lr": 1e-2}),
         "MA": Variant({"density": 0.05, "kind": "MA", "targets": ("q", "mlp.down")},
                       learns={"density": 0.2, "lr": 3e-2}, own_optimizer=True)},
        trained=_spiel,
        cards=(("vit_b16", {"rank": 8}, 1_179_648),),
        bad=(({"density": 0.0}, "density 0"), ({"rank": 0}, "rank 0"), ({"count": 10**9}, "1000000000 entries"),
             ({"count": 3}, "none falls to"), ({"window": 20}, "window 20"), ({"share": 0.0}, "share 0"),
             ({"kind": "SM3"}, "'SM3'"), ({"momentum": 0.9}, "kind 'MA'"), ({"rank": 2, "density": 0.1}, "give one of"),
             ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, operators=2, saved=0.96, stored=2.0, state=24, decays=True,
        schedule=_positions_follow_formula,
        artifact={"rank": None, "count": 60, "targets": ("o",)},
    ),
    "APET": Row(
        {"all": Variant({"density": 0.02}, learns={"density": 0.4, "lr": 1e-2}),
         "few": Variant({"count": 300, "targets": ("q", "mlp.down")}, learns={"count": 1500, "lr": 3e-2})},
        trained=lambda anatomy, method: getattr(method, "count", None) or int(
            getattr(method, "density", 0.0) * _everything(anatomy, method)),
        cards=(("vit_b16", {}, 257_395),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 10**9}, "1000000000 entries"),
             ({"count": 3, "density": 0.1}, "not both"), *NOT_LINEAR),
        random=True, operators=2, saved=0.96, stored=2.0,
        artifact={"density": None, "count": 60, "targets": ("mlp.up",)},
    ),
    "PST": Row(
        {"dense": Variant({"rank": 2, "score_rank": 2}, learns={"lr": 1e-3}),
         "pruned": Variant({"rank": 2, "score_rank": 3, "initial": 0.4, "sparsity": 0.6, "alpha2": 0.5, **WIDE},
                           learns={"lr": 3e-3})},
        trained=_pst,
        cards=(("vit_b16", {}, 2_506_752), ("bert_base", {}, 2_820_096)),
        bad=(({"rank": 0}, "rank 0"), ({"score_rank": 0}, "score_rank 0"), ({"sparsity": 1.0}, "sparsity 1"),
             ({"initial": 0.95}, "initial 0.95"), ({"warmup": 0.8}, "warmup 0.8"), ({"spread": 0.0}, "spread 0"),
             *NOT_LINEAR),
        random=True, weights=True, commutes=None, operators=34, saved=0.96,
        absent=("test_gradcheck",),  # as RAMT
        schedule=_sparsity_follows_formula,
        artifact={"rank": 1, "score_rank": 1},
    ),
    "RAMT": Row(
        {"attention": Variant(learns={"lr": 1e-2}),
         "mlp": Variant({"targets": ("mlp.up", "mlp.down"), "layers": (-1,), "l2": 0.0, "drop": 1.0},
                        learns={"lr": 1e-2})},
        trained=lambda anatomy, method: sum(i * o for i, o in _linear(anatomy, method)),
        cards=(("vit_b16", {}, 28_311_552),),
        bad=(({"drop": 1.5}, "drop 1.5"), ({"l2": -1.0}, "l2 -1"), ({"teacher": "now"}, "'now'"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        stopped=(".scores",), operators=6, saved=0.96, decays=False, without_attention={"targets": ("mlp.down",)},
        absent=("test_gradcheck",),  # no gradient is the function's derivative: tests/papers has the one it should be
        artifact={"targets": ("o",)},
    ),
    "LoRA": Row(
        {"q, v": Variant(RANK), "all": Variant({"rank": 2, "alpha": 4, **WIDE}),
         "dropout": Variant({**RANK, "dropout": 0.5})},
        trained=_lora,
        cards=(("vit_b16", {}, 294_912), ("bert_base", {}, 294_912)),
        bad=(({"rank": 0}, "rank 0"), ({"rank": -1}, "rank -1"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, operators=8, saved=0.76,
        artifact={"rank": 1},
    ),
    "AdaLoRA": Row(
        {"q, v": Variant({"rank": 4, "target_rank": 2}),
         "all": Variant({"rank": 3, "target_rank": 1, "alpha": 1, "warmup": 0, "cooldown": 1, "interval": 1, **WIDE})},
        trained=_adalora,
        cards=(("bert_base", {}, 442_656),),
        bad=(({"rank": 0}, "rank 0"), ({"target_rank": 13}, "target_rank 13"), ({"interval": 0}, "interval 0"),
             ({"beta": 1.0}, "beta 1"), ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=7, saved=0.8,
        schedule=_budget_follows_formula, state=8,
        artifact={"rank": 1, "target_rank": 1},
    ),
    "TriAdaptLoRA": Row(
        {"q, v": Variant({"rank": 4, "targets": ("q", "v")}),
         "grown": Variant({"rank": 4, "growth": 2, "scale": "alpha/reference", **WIDE}, _grown)},
        trained=_triadapt,
        cards=(("bert_base", {}, 166_032),),
        bad=(({"rank": 0}, "rank 0"), ({"init_rank": 9}, "init_rank 9"), ({"growth": 0}, "growth 0"),
             ({"interval": 0}, "interval 0"), ({"scale": "alpha"}, "'alpha'"),
             ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=18, saved=0.9,
        schedule=_rank_follows_formula,
        artifact={"rank": 1},
    ),
    "MoS": Row(
        {"shared": Variant({"rank": 2, "targets": ("q", "mlp.down")}),
         "no private": Variant({"rank": 2, "private": 0, "shards": 4, "alpha": 4, **WIDE})},
        trained=_mos,
        cards=(("vit_b16", {"targets": ("qkv", "o", "mlp.up", "mlp.down")}, 294_912),),
        bad=(({"rank": 0}, "rank 0"), ({"budget": 0}, "budget 0"), ({"private": 3}, "private 3"),
             ({"rank": 3, "private": 2}, "must be the same"), ({"shards": 7}, "does not divide"),
             ({"rank": 99}, "at most"), ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=12, saved=0.9, stored=1.2,
        artifact={"rank": 2},
    ),
    "Hydra": Row(
        {"both": Variant(), "no bias": Variant({"rank": 4, "sequential_rank": 3, "bias": False, "scale": 0.5, **WIDE})},
        trained=_hydra,
        cards=(("vit_b16", {}, 239_712),),
        bad=(({"rank": 0}, "rank 0"), ({"sequential_rank": 0}, "sequential_rank 0"), ({"dropout": 1.5}, "dropout 1.5"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        random=True, weights=True, commutes=False, operators=16, saved=0.9,
        artifact={"rank": 1, "sequential_rank": 1},
    ),
    "LadderSideTuning": Row(
        {"all": Variant({"reduction": 4, "dropout": 0.0}),
         "dropped": Variant({"reduction": 2, "drop": (0,), "init": "random", "temperature": 1.0, "dropout": 0.0})},
        trained=_ladder,
        cards=(("vit_b16", {}, 2_376_492),),
        bad=(({"reduction": 0}, "reduction 0"), ({"reduction": 3}, "reduction 3 does not divide"),
             ({"drop": (9,)}, "layer 9"), ({"layers": ()}, "no block"), ({"temperature": 0.0}, "temperature 0"),
             ({"init": "fishre"}, "'fishre'"), ({"samples": 0}, "samples 0"), ({"dropout": 1.0}, "dropout 1")),
        random=True, operators=120, saved=0.8,
        artifact={"reduction": 8},
    ),
    "IST": Row(
        {"alone": Variant(trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"share": 0.0}, "share 0"), ({"suppressed": 1.5}, "suppressed 1.5"), ({"candidates": 1}, "candidates 1"),
             ({"refresh": 0}, "refresh 0")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
    ),
    "MTLoRA": Row(
        {"two tasks": Variant({"tasks": ("a", "b"), "rank": 4, "task_rank": 2, "dropout": 0.0}),
         "plus": Variant({"tasks": ("b.c", "train"), "rank": 2, "targets": ("q", "v", "mlp.down"),
                          "train": ("norm1", "norm2"), "downsample": "lora"})},
        trained=_mtlora,
        cards=(("vit_b16", {}, 3_023_616),),
        bad=(({"rank": 0}, "rank 0"), ({"task_rank": 0}, "task_rank 0"), ({"tasks": ()}, "tasks"),
             ({"tasks": ("a", "a")}, "different names"), ({"tasks": ("shared",)}, "'shared'"),
             ({"tasks": "depth"}, "'depth'"), ({"dropout": 1.5}, "dropout 1.5"), ({"downsample": "no"}, "'no'"),
             ({"mode": "addition"}, "'addition'"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"train": ("norm", "nrom1")}, "'norm1'"),
             ({"layers": (0,)}, "take one of")),
        random=True, operators=12, saved=1.75,  # half of a tiny model's blocks are last ones, with three streams
        artifact={"tasks": ("a",), "rank": 1, "task_rank": 1, "targets": ("o",), "train": ("norm2",)},
    ),
    "Pfeiffer": Row(
        {"zero_up": Variant({"bottleneck": 8}, learns={"lr": 3e-3}),  # of four all may be dead
         "normal": Variant({"reduction": 4, "init": "normal"}, learns={"lr": 3e-3})},
        trained=_pfeiffer,
        cards=(("vit_b16", {}, 894_528), ("bert_base", {"bottleneck": 64}, 1_189_632)),
        bad=(({"bottleneck": 0}, "bottleneck 0"), ({"reduction": 0}, "reduction 0"), ({"init": "zero"}, "'zero'")),
        random=True, commutes=False, operators=5, saved=0.68,
        artifact={"bottleneck": 1},
    ),
    "RepAdapter": Row(
        {"both": Variant({"dropout": 0.0}, learns={"lr": 1e-2}),
         "mlp": Variant({"bottleneck": 4, "groups": 4, "scale": 0.5, "targets": ("mlp",)}, learns={"lr": 3e-2})},
        trained=_repadapter,
        cards=(("vit_b16", {}, 239_808), ("bert_base", {}, 239_808)),
        bad=(({"bottleneck": 7}, "bottleneck 7"), ({"groups": 0}, "groups 0"), ({"scale": 0}, "scale 0"),
             ({"dropout": 1.0}, "dropout 1"), ({"bottleneck": 10, "groups": 5}, "groups 5 does not divide"),
             ({"targets": ("mlp.up",)}, "no sublayer")),
        random=True, commutes=False, operators=10, saved=0.95, without_attention={"targets": ("mlp",)},
        artifact={"bottleneck": 2, "targets": ("mlp",)},
    ),
    "PortLLM": Row(
        {"low rank": Variant({"scale": 0.5}, _patched, trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"patch": "nowhere"}, "patch.json"),),
        operators=4, saved=0.5,
        absent=("test_checkpoint", "test_resume", "test_reproducible", "test_nothing_to_train", "test_adapter_file",
                "test_no_graph_below_the_first_graft", "test_what_the_rows_share_cannot_be_routed"),
    ),
    "Quantize": Row(
        {"alone": Variant(trains=False)},
        trained=lambda anatomy, method: 0,
        bad=(({"bits": 3}, "bits 3"), ({"methods": ("LoRAA",)}, "'LoRAA'")),
        saved=0.0,
        absent=("test_nothing_to_train", "test_checkpoint", "test_resume", "test_reproducible",
                "test_no_graph_below_the_first_graft"),
    ),
    "PrefixTuning": Row(
        {"direct": Variant({"tokens": 3}, learns={"tokens": 20}),
         "reparametrized": Variant({"tokens": 3, "reparametrize": 8}),
         "folded": Variant({"tokens": 3, "reparametrize": 8}, lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"tokens": 20})},
        trained=_prefix,
        cards=(("bert_base", {}, 368_640), ("bert_base", {"reparametrize": True}, 9_864_704)),
        bad=(({"tokens": 0}, "tokens 0"), ({"reparametrize": -1}, "reparametrize -1")),
        random=True, operators=13, saved=0.71,
        artifact={"tokens": 1},
    ),
    "VQT": Row(
        {"concat": Variant(learns_on={"codegen": {"tokens": 3, "lr": 0.06}}),
         "mean": Variant({"tokens": 3, "reduce": "mean", "dropout": 0.0, "normalize": False}),
         "sum": Variant({"tokens": 3, "reduce": "sum"}),
         "compact": Variant({"keep": 0.5}, _to_compact, alone=True)},
        trained=_vqt,
        cards=(("vit_b16", {}, 9_216), ("vit_b16", {"tokens": 10}, 92_160), ("vit_b16", {"tokens": 20}, 184_320)),
        bad=(({"tokens": 0}, "tokens 0"), ({"dropout": 1.0}, "dropout 1"), ({"reduce": "max"}, "'max'"),
             ({"reduce": "sum"}, "2 tokens"), ({"keep": 0.0}, "keep 0"), ({"sparsity": -1.0}, "sparsity -1"),
             ({"lr_factor": 0.0}, "lr_factor 0")),
        random=True, commutes=False, operators=24, saved=0.25, stored=2.0,
        artifact={},
    ),
    "TensorAPET": Row(
        {"drawn": Variant({"count": 6000, "rank": 2, "bottleneck": 4}, learns={"count": 30000, "lr": 3e-3}),
         "modules": Variant({"count": 3000, "rank": 2, "bottleneck": 4, "seed": 3, "exclude": ("norm",)},
                            learns={"count": 20000, "lr": 3e-3})},
        trained=_tensor_apet,
        cards=(("vit_b16", {}, 259_632),),
        bad=(({"density": 0.0}, "density 0"), ({"count": 0}, "count 0"), ({"count": 1}, "budget of 1"),
             ({"count": 3, "density": 0.1}, "not both"), ({"rank": 0}, "rank 0"), ({"bottleneck": 0}, "bottleneck 0"),
             ({"targets": ("feature",)}, "neither a linear map")),
        random=True, operators=8, saved=0.98, commutes=False, without_attention={"targets": ("mlp.up", "mlp")},
        artifact={"count": 120, "targets": ("mlp",), "bottleneck": 1},
    ),
}

REFUSED: dict[tuple[str, str], str] = {
    ("VQT", "timm_swin"): "its blocks cut a map into windows, each with keys of its own; queries are no map",
    ("BitFit", "llama"): "no module of LlamaModel has a bias, so there is nothing to train",
    **{("BitFit", family): f"no module of {name} has a bias, so there is nothing to train" for family, name in (
        ("t5", "T5Model"), ("mistral", "MistralModel"), ("gemma", "GemmaModel"))},
    **{(method, "timm_convnext"): "there is no attention that could read more keys, queries or streams" for method in (
        "PrefixTuning", "VQT", "MTLoRA", "LadderSideTuning", "VPT", "VPTSP", "PromptTuning", "PTuning",
        "PTuningV2", "MAM", "UniPELT", "LoFiT")},
    **{("UniPELT", family): "its gates are means over the sequence, and a causal model may not see what is to come"
       for family in CAUSAL},
    **{(method, "timm_swin"): "its states are a map, in which there is no place for further tokens" for method in (
        "PromptTuning", "PTuning")},
    **{("Convpass", family): f"the tokens of {name} are no grid" for family, name in (
        ("bert", "BertModel"), ("roberta", "RobertaModel"), ("albert", "AlbertModel"), ("t5", "T5Model"),
        ("llama", "LlamaModel"), ("mistral", "MistralModel"), ("qwen2", "Qwen2Model"), ("gemma", "GemmaModel"),
        ("starcoder2", "Starcoder2Model"), ("gpt2", "GPT2Model"), ("gpt_neox", "GPTNeoXModel"),
        ("codegen", "CodeGenModel"), ("clip_text", "CLIPTextModel"))},
    ("AdapterDrop", "albert"): "its one layer runs many times, so that there is no first layer to leave out",
    ("LadderSideTuning", "albert"): "one layer runs many times, so that there is no ladder of layers beside it",
    ("LadderSideTuning", "timm_eva"): "its rotary positions are made for one width of head, and end in the attention",
    ("LadderSideTuning", "codegen"): "its rotary positions are made for one width of head, and end in the attention",
    **{("LadderSideTuning", family): "the vision tower's final norm sees the pooled token alone, not the sequence"
       for family in ("clip", "clip_vision")},
    ("MTLoRA", "albert"): "one layer runs many times: streams that part in it would enter it again",
    ("MTLoRA", "codegen"): "attention and MLP run side by side, so that streams part before and meet behind both",
    ("MTLoRA", "timm_eva"): "gate and MLP are one fused map, whose rows the tasks' streams cannot share",
}
"""Cells that cannot exist, each with the mathematical reason: at most a tenth of all."""


@cache
def roles(family: str) -> tuple[str, ...]:
    """The roles of a family's parts."""
    return tuple(dissect(make(family)).roles)


@dataclass(frozen=True)
class Cell:
    """A method in one variant on one family."""

    method: str
    variant: str
    family: str

    def __str__(self) -> str:
        return f"{self.method}[{self.variant}]-{self.family}".replace(", ", ",")

    @property
    def row(self) -> Row:
        return METHODS[self.method]

    @property
    def cls(self) -> type[PEFTMethod]:
        return peft.method_class(self.method)

    @property
    def refused(self) -> str | None:
        """Why this cell cannot exist."""
        return (REFUSED.get((self.method, self.family))
                or self.row.variants[self.variant].refused.get(self.family))

    @property
    def mergeable(self) -> bool:
        return self.cls.mergeable

    def new(self, **changes: Any) -> PEFTMethod:
        """The method, not attached."""
        return self.cls(**{**self.row.variants[self.variant].config, **self.elsewhere, **changes})

    @property
    def quiet(self) -> Config:
        """Arguments with which a forward in training is not random."""
        return {name: value for name, value in (("dropout", 0.0), ("draw", False)) if name in self.new().config}

    @property
    def elsewhere(self) -> Config:
        """Arguments that the family asks for: of the variant's norms those that it has, of its targets, where there is
        no attention, those of the MLP."""
        config, attention = self.row.variants[self.variant].config, EVERY_FAMILY[self.family].attention
        chosen = {name: tuple(role for role in config[name] if role in roles(self.family))
                  for name in ("norms", *(() if attention else ("targets",))) if name in config}
        if attention:
            return chosen
        return {**chosen, **({"targets": ("mlp.up", "mlp.down")} if self.row.weights else {}),
                **self.row.without_attention}

    @property
    def learns(self) -> Config:
        """Arguments for invariant 16, beside the variant's; without any it is at the recommended settings."""
        variant = self.row.variants[self.variant]
        return {**variant.learns, **variant.learns_on.get(self.family, {})}

    @property
    def random(self) -> bool:
        """Whether start values depend on the seed."""
        own = self.row.variants[self.variant].random
        return self.row.random if own is None else own

    def attach(self, model: nn.Module, **changes: Any) -> PEFTMethod:
        """The method on ``model``, in the variant's stage."""
        method = self.new(**changes).attach(model)
        self.make_ready(method)
        return method

    def make_ready(self, method: PEFTMethod) -> None:
        ready = self.row.variants[self.variant].ready
        if ready is not None:
            ready(method)

    @property
    def trains(self) -> bool:
        """Whether the method has tensors in the backbone at all."""
        return self.row.variants[self.variant].trains

    @property
    def moves_base(self) -> bool:
        """Whether it trains the backbone's own tensors in this stage."""
        declared = self.row.variants[self.variant].moves_base
        return self.cls.moves_base if declared is None else declared


SHARE_OF_ALL = 1 if os.environ.get("SCION_ALL") == "whole" else 6
"""In the long tier each variant meets every sixth of all families, which ones turning likewise; or all of them."""


def cells(everything: bool, number: int = 0, families: Sequence[str] = ()) -> list[Cell]:
    """The cells of invariant ``number``: each method on one family, which turns with the number.

    Args:
        everything: all variants, on a share of all families.
        number: shifts the rotation, so that one method does not meet the same family in every invariant.
        families: through which the quick tier turns, where not all have the same share.
    """
    families = list(families or FAMILIES)
    found = []
    for m, (method, row) in enumerate(METHODS.items()):
        for v, (name, variant) in enumerate(row.variants.items()):
            if everything:
                share = list(EVERY_FAMILY)[(m + v + number) % SHARE_OF_ALL::SHARE_OF_ALL]
                found += [Cell(method, name, family) for family in share]
            elif v == 0 or variant.everywhere:
                turn = families[(m + v + number) % len(families):] + families[:(m + v + number) % len(families)]
                found.append(next(cell for f in turn if not (cell := Cell(method, name, f)).refused))
    return found
