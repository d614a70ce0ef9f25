"""Writes docs/counts.md: published parameter counts beside ours. ``python -m tests.counts``

The tests hold every number on the page: `tests/core/test_published_counts.py` its ROWS, `tests/core/test_matrix.py` the
methods' cards, `tests/core/test_counts_page.py` the SUMMARY below.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import peft
from tests.core.test_published_counts import ROWS
from tests.methods import METHODS
from tests.papers.__main__ import paper_of

PAGE = Path(__file__).parent.parent / "docs" / "counts.md"
Config = dict[str, Any]
Key = tuple[str, str, str]
"""Backbone, method, all arguments in one order."""

BACKBONES = {"vit": "ViT-B/16", "bert": "BERT-base", "swin": "Swin-T", "swin_base": "Swin-B", "vit_small": "ViT-S/16",
             "ast": "AST", "ast_400": "AST, 400 frames", "ast_100": "AST, 100 frames", "llama_7b": "LLaMA-2-7B",
             "mistral_7b": "Mistral-7B"}
"""How the page calls the builders in test_published_counts; another one goes by its own name."""
CARDS = {"vit_b16": "vit", "bert_base": "bert"}
@dataclass(frozen=True)
class Count:
    """A published count.

    Args:
        label: the configuration as it is published.
        backbone: name of a builder in test_published_counts.
        published: the number.
        method: the class, whether it is in the registry or not.
        options: its arguments; None while there is no such class.
        ours: our number, where it is another one.
        why: the reason then.
        made: how it is written where it is no method of the registry, but a composition (which has tests of its own).
    """

    label: str
    backbone: str
    published: int
    method: str
    options: Config | None = None
    ours: int | None = None
    why: str = ""
    made: str = ""

    @property
    def count(self) -> int:
        """What the method has to train."""
        return self.published if self.ours is None else self.ours


def key(backbone: str, method: str, options: Config) -> Key:
    """One for all ways to give the same arguments."""
    return backbone, method, repr(sorted((_defaults(method) | options).items()))


@functools.cache
def _defaults(method: str) -> Config:
    if method not in peft.registry():
        return {}
    parameters = inspect.signature(peft.method_class(method).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def both(label: str, published: int, method: str, options: Config | None = None, **rest: Any) -> list[Count]:
    """One count that holds for ViT-B/16 and for BERT-base."""
    return [Count(label, backbone, published, method, options, **rest) for backbone in ("vit", "bert")]


Q_V: Config = {"targets": ("q", "v")}
QKV: Config = {"targets": ("qkv",)}
SIX: Config = {"targets": ("q", "k", "v", "o", "mlp.up", "mlp.down")}
FOUR: Config = {"targets": ("qkv", "o", "mlp.up", "mlp.down")}
DEAD = ("whole blocks are counted, of whose 16 entries 6 are free: what is below the diagonal is what is above it, "
        "negative")
MASKED = "what is left after pruning; before, a change and a score of each weight are trained"

SUMMARY: list[Count] = [
    Count("full", "vit", 85_798_656, "FullFineTuning", {}), Count("full", "bert", 109_482_240, "FullFineTuning", {}),
    *both("BitFit", 102_912, "BitFit", {}),
    *both("norms only", 38_400, "LayerNormTuning", {}),
    *both("Houlsby m=8", 313_536, "Houlsby", {"bottleneck": 8}),
    *both("Houlsby m=48", 1_789_056, "Houlsby", {"reduction": 16}),
    *both("Houlsby m=64", 2_379_264, "Houlsby", {"bottleneck": 64}),
    *both("Pfeiffer m=8", 156_768, "Pfeiffer", {"bottleneck": 8}),
    *both("Pfeiffer m=48", 894_528, "Pfeiffer", {}),
    *both("Pfeiffer m=64", 1_189_632, "Pfeiffer", {"bottleneck": 64}),
    *both("AdaptFormer m=8", 156_768, "AdaptFormer", {"bottleneck": 8}),
    *both("AdaptFormer m=48", 894_528, "AdaptFormer", {"bottleneck": 48}),
    *both("AdaptFormer m=64", 1_189_632, "AdaptFormer", {}),
    *both("parallel adapter m=384", 7_091_712, "ParallelAdapter", {}),
    Count("Convpass h=8", "vit", 327_552, "Convpass", {}),
    Count("Convpass h=8, attention only", "vit", 163_776, "Convpass", {"targets": ("attention",)}),
    *both("RepAdapter h=8 g=2", 239_808, "RepAdapter", {}),
    *both("Consolidator g=384", 304_128, "Consolidator", {}),
    *both("LoRA r=8 q,v", 294_912, "LoRA", {}),
    *both("LoRA r=8 q,k,v,o", 589_824, "LoRA", {"targets": ("q", "k", "v", "o")}),
    *both("LoRA r=8 six linears", 1_327_104, "LoRA", SIX),
    Count("LoRA r=8 q,v, fused", "vit", 294_912, "LoRA", QKV),
    Count("LoRA r=8 q,k,v,o, fused", "vit", 442_368, "LoRA", {"targets": ("qkv", "o")}),
    Count("LoRA r=8 six linears, fused", "vit", 1_179_648, "LoRA", FOUR),
    *both("DoRA r=8 q,v", 313_344, "DoRA", {}),
    Count("DoRA r=8 q,v, fused", "vit", 322_560, "DoRA", QKV),
    *both("AdaLoRA init_r=12 q,v", 442_656, "AdaLoRA", Q_V),
    Count("AdaLoRA init_r=12 q,v, fused", "vit", 442_512, "AdaLoRA", QKV),
    *both("VeRA r=256 q,v", 24_576, "VeRA", {}),
    Count("VeRA r=256 q,v, fused", "vit", 30_720, "VeRA", QKV),
    *both("FourierFT n=1000 q,v", 24_000, "FourierFT", {}),
    Count("FourierFT n=1000 q,v, fused", "vit", 12_000, "FourierFT", QKV),
    *both("OFT block 32 q,v", 285_696, "OFT", {}),
    Count("OFT block 32 q,v, fused", "vit", 142_848, "OFT", QKV),
    *both("BOFT block 4 m=1 q,v", 92_160, "BOFT", {}, ours=46_080, why=DEAD),
    Count("BOFT block 4 m=1 q,v, fused", "vit", 64_512, "BOFT", QKV, ours=41_472, why=DEAD),
    *both("LoHa r=8 q,v", 589_824, "LoHa", {}),
    Count("LoHa r=8 q,v, fused", "vit", 589_824, "LoHa", QKV),
    *both("LoKr r=8 q,v", 26_112, "LoKr", {}),
    Count("LoKr r=8 q,v, fused", "vit", 21_504, "LoKr", QKV),
    *both("(IA)^3 k,v,ffn", 55_296, "IA3", {}),
    *both("FacT-TT r=16", 61_440, "FacT", {"rank": 16}),
    *both("FacT-TK r=32", 86_528, "FacT", {"rank": 32, "form": "tk"}),
    Count("prompt p=20, input only", "vit", 15_360, "VPT", {"tokens": 20, "deep": False}),
    Count("prompt p=20, input only", "bert", 15_360, "PromptTuning", {}),
    *both("VPT-deep p=10", 92_160, "VPT", {}),
    *both("prefix, flat, p=20", 368_640, "PrefixTuning", {"tokens": 20}),
    *both("prefix MLP p=30 h=512", 9_872_384, "PrefixTuning", {"tokens": 30, "reparametrize": 512}),
    Count("MAM", "bert", 22_493_984, "MAM", {}),
    Count("UniPELT", "bert", 11_083_376, "UniPELT", {}),
    Count("AdapterFusion", "bert", 21_252_096, "Fuse", made="`Fuse([Pfeiffer(), ...])`"),
    Count("MAD-X language (+inv)", "bert", 7_387_776, "LanguageAdapter", {}),
    Count("MAD-X task", "bert", 894_528, "Pfeiffer", {}),
    Count("diff pruning, 0.5 % stored", "vit", 428_993, "DiffPruning", {}, 171_597_312, MASKED),
    Count("diff pruning, 0.5 % stored", "bert", 547_411, "DiffPruning", {}, 218_964_480, MASKED),
    Count("side-tuning with AlexNet", "vit", 9_547_585, "SideTuning", {"network": "alexnet"}),
]
"""Counts that papers print for the usual baselines. A method that comes gives its rows their options."""

OTHERWISE: dict[Key, str] = {
    key("ast", "Houlsby", {"reduction": 64, "norms": ("norm1", "norm2")}): "497,952, norms included",
    key("bert", "BOFT", {}): f"92,160: {DEAD}",
}
"""Of the other counts, those that are published as another number or in another way."""

HEAD = """# Parameter counts: published and ours

Made by `python -m tests.counts`. The tests assert every number of ours on the full-size architecture; task heads are
left out. "Published" is what a paper prints or what follows from its numbers.

## Summary

| configuration | backbone | published | ours | as | difference |
|---|---|---|---|---|---|
"""
REST = """
## Further counts

| paper | backbone | method | count | published otherwise |
|---|---|---|---|---|
"""


def shown(method: str, options: Config) -> str:
    return f"`{method}({', '.join(f'{name}={value!r}' for name, value in options.items())})`"


def tested() -> dict[Key, tuple[Config, int, int]]:
    """Counts of the method and of norms that other tests assert, with their options."""
    found = {key(CARDS[model], method, options): (options, count, 0) for method, row in METHODS.items()
             for model, options, count in row.cards}
    return found | {key(build.__name__, method, options): (options, count, norms)
                    for build, method, options, count, norms in ROWS}


def page() -> str:
    """The whole page."""
    lines = []
    for c in SUMMARY:
        written = c.made if c.options is None else shown(c.method, c.options)
        ours = f"{c.count:,}" if written else "-"
        lines.append(f"| {c.label} | {BACKBONES[c.backbone]} | {c.published:,} | {ours} | "
                     f"{written or f'{c.method} is not here yet'} | {c.why} |")
    above = {key(c.backbone, c.method, c.options or {}) for c in SUMMARY}

    further = [f"| {paper_of(method)} | {BACKBONES.get(backbone, backbone)} | {shown(method, options)} | "
               f"{count:,}{f' and {norms:,} of norms' if norms else ''} | "
               f"{OTHERWISE.get((backbone, method, text), '')} |"
               for (backbone, method, text), (options, count, norms) in tested().items()
               if (backbone, method, text) not in above]
    return HEAD + "\n".join(lines) + "\n" + REST + "\n".join(sorted(further)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
