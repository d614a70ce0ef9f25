"""What a row of the matrix may say, and the counts that several methods share.

A row says how a method is built, how many numbers it trains, and which sums its card prints. Abilities are read from
the class (`identity_at_start`, `mergeable`, `moves_base`, `needs`), learning rates from `recommended`: neither is
repeated here. A method's row stands in `ROWS` of its file in tests/papers, beside the checks of its paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from core.anatomy import Anatomy
from core.method import PEFTMethod

Config = dict[str, Any]

RANK = {"rank": 4}
WIDE = {"targets": ("q", "k", "v", "o", "mlp.up", "mlp.down")}
FEW = {"layers": (0,), "exclude": ("q", "k", "v", "mlp.up", "mlp.down")}
NOT_LINEAR: tuple[tuple[Config, str], ...] = (({"targets": ("mlp.up", "block")}, "linear weight"),
                                              ({"targets": ("mlp.upp",)}, "'mlp.up'"))
CAUSAL = ("llama", "t5", "clip", "clip_text", "gpt2", "gpt_neox", "codegen", "mistral", "qwen2", "gemma", "starcoder2",
          "qwen3", "gemma2", "gemma3", "phi", "phi3", "opt", "bloom", "gpt_neo", "gpt_bigcode", "xglm", "whisper")
"""Families in which, at least in one stack, a token sees only those before it."""
NO_ATTENTION = {"timm_convnext": "there is no attention that could read more keys, queries or streams"}
NO_CALL = {
    "deberta": "its scores need positions, which further keys, queries and streams do not have",
    "gemma2": "its scores are capped by a tanh before the softmax, so that they are not those of torch's attention",
    "bloom": "its attention is written out amid its forward: there is no call that could read further keys",
    "xglm": "its attention is written out amid its forward: there is no call that could read further keys"}
"""Families that do not have the role ``attend``."""
NO_PLACE_FOR_TOKENS = {"timm_swin": "its states are a map, in which there is no place for further tokens"}


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
    rounding: float = 1.0
    """Factor on half-precision bounds, where a norm of few numbers magnifies what was rounded before it."""
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
    refused: dict[str, str] = field(default_factory=dict)
    """Families on which it cannot exist, each with the mathematical reason."""
    artifact: Config = field(default_factory=dict)
    """Arguments, beside the first variant's, that make the stored regression adapter small."""


def planned_shapes(anatomy: Anatomy, method: Any) -> list[tuple[int, int]]:
    return [(site.in_features, site.out_features) for site in method.sites(anatomy)]


def target_shapes(anatomy: Anatomy, method: Any) -> list[tuple[int, int]]:
    return [(site.in_features, site.out_features) for site in anatomy.sites(method.targets, method.layers)]


def low_rank_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o) for i, o in target_shapes(anatomy, method))


def bottleneck_count(anatomy: Anatomy, method: Any) -> int:
    dims = [anatomy.blocks[i].dim for i in anatomy.layer_indices(method.layers)]
    return sum(2 * method.width(dim) * dim + method.width(dim) + dim for dim in dims)


def parallel_count(anatomy: Anatomy, method: Any) -> int:
    sites = [(method.width(s.width), s.width, s.in_features if s.role == "o" else s.width)
             for s in method.sites(anatomy)]
    return sum(m * (d + out) + m + out + (method.scale == "learned") for m, d, out in sites)


def prompts_count(anatomy: Anatomy, method: Any) -> int:
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


def prefix_count(anatomy: Anatomy, method: Any) -> int:
    roles = [role for role in ("attend", "cross.attend") if role == "attend" or type(method).__name__ == "MAM"]
    sites = anatomy.sites([role for role in roles if role in anatomy.roles], method.layers)
    widths = [2 * site.heads.key * site.heads.width for site in sites if site.heads]
    if not method.hidden or method.folded:
        return method.tokens * sum(widths)
    banks = {(site.around.stage, site.role): site.width for site in sites if site.around}
    first = sum(method.tokens * dim + (dim + 1) * method.hidden for dim in banks.values())
    return first + (method.hidden + 1) * sum(widths)


def moved_count(anatomy: Anatomy, method: Any) -> int:
    return sum(anatomy.root.get_parameter(name).numel() for name in method.moved(anatomy))


def norms_count(anatomy: Anatomy, roles: tuple[str, ...]) -> int:
    return sum(p.numel() for site in anatomy.sites(roles) for p in site.module.parameters()) if roles else 0


def whole_count(anatomy: Anatomy, method: Any) -> int:
    return sum(p.numel() for p in anatomy.root.parameters())


def to_sparse(method: Any) -> None:
    """As after a dense stage that moved everything at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in method.trainable().values():
            tensor += 0.01 * (torch.rand(tensor.shape, generator=generator) - 0.5).to(tensor)
    method.advance()
