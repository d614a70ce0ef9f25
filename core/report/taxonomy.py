"""Which family a method belongs to and what it modifies, and which known methods are not here yet.

The five families, and the names of the methods that a survey of the field sorts into them, are those of Xu et al. 2023,
arXiv:2312.12148. ``lightning methods --family additive``, ``--kind tokens``, ``--planned`` ask this table;
what a method here is stands in its class, as `tags`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.errors import ScionError, listed, nearest

FAMILIES = {
    "additive": "new modules, tokens or scales beside frozen weights",
    "partial": "some of the backbone's own parameters",
    "reparameterised": "a change of the weights in another form, which merges",
    "hybrid": "several of these together, in a fixed way",
    "unified": "one frame around several of these: over other methods, or routed",
}
KINDS = {
    "linear": "linear maps", "block": "modules in or beside a block", "tokens": "prompts and prefixes",
    "scale": "scales and shifts of activations", "entries": "chosen entries of weights or of gradients",
    "norms": "norms and biases", "head": "the task's head alone",
    "optimizer": "the optimizer, or what happens after its steps",
    "routing": "routers and mixtures", "bits": "weights in few bits", "composition": "several methods or adapters",
    "shared": "tensors that layers share, or that are generated", "side": "a network beside the backbone",
}

_ADD, _PART, _REP, _HYB, _UNI = FAMILIES

@dataclass(frozen=True)
class Known:
    """A method that the survey names."""

    name: str
    family: str
    kinds: tuple[str, ...]
    summary: str
    method: str | None = None
    """Its class here; None where it is planned."""


SURVEY: tuple[Known, ...] = (
    Known("Sequential adapter", _ADD, ("block",), "bottlenecks after attention and after the MLP", "Houlsby"),
    Known("Residual adapter", _ADD, ("block",), "one bottleneck with a norm of its own after the MLP"),
    Known("Parallel adapter", _ADD, ("block",), "a scaled bottleneck beside a sublayer", "ParallelAdapter"),
    Known("AdapterDrop", _ADD, ("block",), "no adapters in the first layers", "AdapterDrop"),
    Known("Tiny-Attn adapter", _ADD, ("block",), "attention of a tiny width in the place of a bottleneck"),
    Known("CIAT", _ADD, ("block",), "an adapter of the embedding and parallel ones, against interference of languages"),
    Known("CoDA", _ADD, ("block", "routing"), "an adapter for all tokens, the frozen block for chosen ones"),
    Known("Compacter", _ADD, ("block", "shared"), "adapters as sums of Kronecker products", "Compacter"),
    Known("AdapterFusion", _ADD, ("block", "routing", "composition"), "attention over trained adapters", "Fuse"),
    Known("MerA", _ADD, ("composition",), "trained adapters aligned and merged into one"),
    Known("HyperFormer", _ADD, ("block", "shared"), "adapters generated from embeddings of task and layer"),
    Known("WARP", _ADD, ("tokens",), "learned embeddings around the mask token, and for the labels"),
    Known("Prompt tuning", _ADD, ("tokens",), "learned tokens at the input", "PromptTuning"),
    Known("Prefix tuning", _ADD, ("tokens",), "learned keys and values in every layer", "PrefixTuning"),
    Known("P-tuning", _ADD, ("tokens",), "prompts made by an encoder", "PTuning"),
    Known("SPoT", _ADD, ("tokens", "composition"), "a prompt that starts from those of similar tasks"),
    Known("ATTEMPT", _ADD, ("tokens", "routing"), "prompts of other tasks, mixed for each sample"),
    Known("MPT", _ADD, ("tokens",), "one shared prompt, with a factor of rank one for each task"),
    Known("LST", _ADD, ("side",), "a ladder of thin blocks beside the backbone", "LadderSideTuning"),
    Known("(IA)^3", _ADD, ("scale",), "scales of keys, values and the MLP's activations", "IA3"),
    Known("PASTA", _ADD, ("tokens", "scale"), "vectors added to the states of special tokens"),
    Known("AttentionFusion", _ADD, ("side",), "attention over the hidden states of frozen layers"),
    Known("Hadamard adapter", _ADD, ("scale",), "a scale and a shift of attention's output"),
    Known("BitFit", _PART, ("norms",), "all biases", "BitFit"),
    Known("U-BitFit", _PART, ("norms", "entries"), "a searched subset of single biases"),
    Known("S-BitFit", _PART, ("norms", "entries"), "a searched subset of whole biases"),
    Known("Threshold-Mask", _PART, ("entries",), "weights switched off by learned scores", "RAMT"),
    Known("FISH Mask", _PART, ("entries", "optimizer"), "the weights with the largest Fisher information"),
    Known("LT-SFT", _PART, ("entries", "optimizer"), "the weights that moved most, trained again alone", "LTSFT"),
    Known("Child-Tuning_F", _PART, ("entries", "optimizer"), "gradients masked at random"),
    Known("Child-Tuning_D", _PART, ("entries", "optimizer"), "gradients masked by Fisher information"),
    Known("Diff pruning", _PART, ("entries",), "a sparse change under a relaxed L0 norm", "DiffPruning"),
    Known("SAM", _PART, ("entries", "optimizer"), "the weights with the largest squared gradients, in closed form"),
    Known("Intrinsic SAID", _REP, ("linear",), "all weights moved by a random projection of a few numbers"),
    Known("LoRA", _REP, ("linear",), "a low-rank change", "LoRA"),
    Known("KronA", _REP, ("linear",), "a change that is a Kronecker product", "LoKr"),
    Known("DyLoRA", _REP, ("linear", "optimizer"), "nested ranks, one drawn at each step"),
    Known("AdaLoRA", _REP, ("linear", "optimizer"), "singular triplets under a falling budget", "AdaLoRA"),
    Known("IncreLoRA", _REP, ("linear", "optimizer"), "ranks added where they are needed, one at a time"),
    Known("Delta-LoRA", _REP, ("linear", "optimizer"), "the weight moves with the change of B A"),
    Known("LoRAPrune", _REP, ("linear", "optimizer"), "structured pruning by LoRA's gradients"),
    Known("QLoRA", _REP, ("linear", "bits"), "LoRA beside weights in four bits"),
    Known("QA-LoRA", _REP, ("linear", "bits"), "LoRA by groups, which merges into quantized weights"),
    Known("LoftQ", _REP, ("linear", "bits"), "LoRA that starts as the error of quantization"),
    Known("Kernel-mix-lite", _REP, ("linear",), "LoRA head by head, as a kernel"),
    Known("Laplace-LoRA", _REP, ("composition",), "a Gaussian posterior of LoRA's weights"),
    Known("LoRA-FA", _REP, ("linear",), "LoRA with A frozen"),
    Known("LoRAHub", _REP, ("routing", "composition"), "trained LoRAs weighed without gradients"),
    Known("MOELoRA", _REP, ("routing", "composition"), "LoRAs as experts behind a gate of the task"),
    Known("L-LoRA", _REP, ("routing", "composition"), "LoRA linearised, for better fusion"),
    Known("MAM adapter", _HYB, ("block", "tokens"), "a prefix, and a parallel adapter at the MLP", "MAM"),
    Known("U-MAM", _HYB, ("block", "tokens"), "MAM with a searched structure"),
    Known("UniPELT", _HYB, ("block", "tokens", "linear", "routing"), "prefix, adapter and LoRA, gated", "UniPELT"),
    Known("AutoPEFT", _HYB, ("block", "tokens", "linear"), "Bayesian search of what stands where"),
    Known("S3Delta-M", _HYB, ("block", "linear", "norms"), "differentiable search of the structure"),
    Known("S4", _HYB, ("block", "tokens", "linear", "norms"), "groups of layers with strategies of their own"),
    Known("AdaMix", _UNI, ("block", "linear", "routing"), "copies of a module, drawn in training, averaged at the end"),
    Known("SparseAdapter", _UNI, ("block", "entries"), "wide adapters, pruned before training"),
    Known("ProPETL", _UNI, ("shared", "entries"), "one module for all layers, masked for each"),
)


def planned() -> list[Known]:
    """What the survey names and is not here."""
    return [known for known in SURVEY if known.method is None]


def check_filters(family: str | None, kind: str | None, folders: Sequence[str]) -> None:
    """Refuse families and kinds that there are not; a folder of `core.peft` is a family as well."""
    families = [*FAMILIES, *folders]
    if family is not None and family not in families:
        raise ScionError(f"methods: no family is called {family!r}{nearest(family, families)}; there are "
                         f"{listed(families, 40)}")
    if kind is not None and kind not in KINDS:
        raise ScionError(f"methods: no kind is called {kind!r}{nearest(kind, KINDS)}; there are {listed(KINDS, 40)}")
