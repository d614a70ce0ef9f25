"""Published parameter counts, to the unit, on full-size architectures built on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import ScionError
from core.peft import method_class


def vit() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=0)


def swin() -> nn.Module:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def ast(frames: int = 500) -> nn.Module:
    from domains.audio import AST

    return AST("MIT/ast-finetuned-audioset-10-10-0.4593", pretrained=False, frames=frames)


def ast_400() -> nn.Module:
    return ast(400)


def ast_100() -> nn.Module:
    return ast(100)
def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(vocab_size=50265, type_vocab_size=1, max_position_embeddings=514))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config())


def vit_small() -> nn.Module:
    import timm

    return timm.create_model("vit_small_patch16_224", num_classes=0)


def swin_base() -> nn.Module:
    import timm

    return timm.create_model("swin_base_patch4_window7_224", num_classes=0)


def llama_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig())


def mistral_7b() -> nn.Module:
    from transformers import MistralConfig, MistralModel

    return MistralModel(MistralConfig())


FUSED: dict[str, Any] = {"targets": ("qkv",)}
SIX = ("q", "k", "v", "o", "mlp.up", "mlp.down")
# (backbone, method, options, method's count, norms' count)
ROWS: list[tuple[Callable[[], nn.Module], str, dict[str, Any], int, int]] = [
    (vit, "FullFineTuning", {}, 85_798_656, 0),
    (bert, "FullFineTuning", {}, 109_482_240, 0),
    (swin, "FullFineTuning", {}, 27_519_354, 0),
    (ast, "FullFineTuning", {}, 85_708_032, 0),
    (ast_400, "FullFineTuning", {}, 85_615_872, 0),
    (ast_100, "FullFineTuning", {}, 85_339_392, 0),
    (vit, "LinearProbe", {"norms": ("norm1", "norm2", "norm")}, 0, 38_400),
    (bert, "LinearProbe", {"norms": ("norm1", "norm2", "norm")}, 0, 38_400),
    (vit, "rsLoRA", {}, 294_912, 0),
    (bert, "PiSSA", {"targets": SIX}, 1_327_104, 0),
    (vit, "VeRA", {}, 24_576, 0),
    (vit, "VeRA", FUSED, 30_720, 0),
    (vit, "FourierFT", FUSED, 12_000, 0),
    (bert, "FourierFT", {"frequencies": 3000}, 72_000, 0),
    (vit, "LoHa", FUSED, 589_824, 0),
    (vit, "LoKr", FUSED, 21_504, 0),
    (vit, "OFT", FUSED, 142_848, 0),
    (vit, "BOFT", FUSED, 41_472, 0),  # 64,512 with whole blocks, of which the part above the diagonal can learn
    (vit, "Bone", {"rank": 8}, 663_552, 0),
    (swin, "Bone", {"rank": 32}, 1_271_808, 0),
    (llama_7b, "Bone", {}, 87_031_808, 0),
    (llama_7b, "LoRA", {"rank": 36, "targets": None}, 89_948_160, 0),
    (mistral_7b, "Bone", {}, 88_080_384, 0),
    (vit, "SVFit", {}, 18_432, 0),
    (vit, "SVFit", {"targets": ("qkv", "o", "mlp.up", "mlp.down")}, 36_864, 0),
    (bert, "SVFit", {"targets": SIX}, 55_296, 0),
    (llama_7b, "HalfFineTuning", {}, 3_238_133_760, 0),
    (llama_7b, "LoFiT", {}, 131_072, 0),
    (bert, "PST", {}, 2_820_096, 0),
    (bert, "DiffPruning", {}, 218_964_480, 0),
    (vit, "APET", {"count": 294_912}, 294_912, 0),
    (vit_small, "SSF", {}, 102_912, 0),
    (vit_small, "VPTSP", {}, 97_536, 0),
    (vit, "VPTSP", {"tokens": 20}, 287_232, 0),
    (swin_base, "SSF", {}, 267_264, 0),
    (swin_base, "SSF", {"patch_merging": True}, 274_432, 0),
    (vit, "BitFit", {}, 102_912, 0),
    (bert, "BitFit", {}, 102_912, 0),
    (bert, "BitFit", {"targets": ("q", "mlp.up")}, 46_080, 0),
    (ast, "BitFit", {"exclude": ("patch_embed",)}, 102_144, 0),
    (vit, "Houlsby", {"bottleneck": 8}, 313_536, 0),
    (bert, "Houlsby", {"bottleneck": 64}, 2_379_264, 0),
    (vit, "Houlsby", {"reduction": 16}, 1_789_056, 0),
    (vit, "Houlsby", {"bottleneck": 64, "norms": ("norm1", "norm2", "norm")}, 2_379_264, 38_400),
    (ast, "Houlsby", {"reduction": 64, "norms": ("norm1", "norm2")}, 461_088, 36_864),  # 497,952 in the paper's table
    (vit, "FacT", {"rank": 8, "targets": SIX}, 21_504, 0),
    (vit, "FacT", {"rank": 16}, 61_440, 0),
    (vit, "FacT", {"rank": 32, "form": "tk"}, 86_528, 0),
    (vit, "Consolidator", {"groups": 384}, 304_128, 0),
    (bert, "Consolidator", {"groups": 384}, 304_128, 0),
    (vit, "RepAdapter", {}, 239_808, 0),
    (bert, "RepAdapter", {}, 239_808, 0),
    (ast, "LinearProbe", {"norms": ("norm",)}, 0, 1_536),
    (ast, "LoRA", {"rank": 6}, 221_184, 0),
    (ast, "LoRA", {"rank": 12}, 442_368, 0),
    (vit, "LoRA", {}, 294_912, 0),
    (bert, "LoRA", {}, 294_912, 0),
    (bert, "LoRA", {"targets": ("q", "k", "v", "o")}, 589_824, 0),
    (bert, "LoRA", {"targets": SIX}, 1_327_104, 0),
    (vit, "LoRA", {"targets": SIX}, 1_327_104, 0),
    (vit, "LoRA", {"targets": ("qkv",)}, 294_912, 0),
    (vit, "LoRA", {"targets": ("qkv", "o")}, 442_368, 0),
    (vit, "LoRA", {"targets": ("qkv", "o", "mlp.up", "mlp.down")}, 1_179_648, 0),
    (bert, "DoRA", {}, 313_344, 0),
    (vit, "DoRA", {"targets": ("qkv",)}, 322_560, 0),
    (vit, "PrefixTuning", {"tokens": 20}, 368_640, 0),
    (bert, "PrefixTuning", {"tokens": 20, "reparametrize": 512}, 9_864_704, 0),
    (bert, "PrefixTuning", {"tokens": 30, "reparametrize": 512}, 9_872_384, 0),
    (ast, "PrefixTuning", {"tokens": 12}, 221_184, 0),
    (bert, "PrefixTuning", {"tokens": 30}, 552_960, 0),
    (bert, "PTuningV2", {"tokens": 128}, 2_359_296, 0),
    (vit, "VPT", {}, 92_160, 0),
    (vit, "VPT", {"tokens": 50}, 460_800, 0),
    (vit, "VPT", {"deep": False}, 7_680, 0),
    (ast, "VPT", {"tokens": 25}, 230_400, 0),
    (ast, "VPT", {"tokens": 300, "deep": False}, 230_400, 0),
    (vit_small, "VPT", {}, 46_080, 0),
    (vit, "PromptTuning", {}, 15_360, 0),
    (bert, "PromptTuning", {}, 15_360, 0),
    (gpt2, "PromptTuning", {"tokens": 100}, 76_800, 0),
    (bert, "PTuning", {}, 1_787_136, 0),
    (bert, "PTuning", {"encoder": "lstm"}, 27_174_144, 0),
    (vit, "ParallelAdapter", {}, 7_091_712, 0),
    (bert, "ParallelAdapter", {"scale": "learned"}, 7_091_724, 0),
    (vit, "AdaptFormer", {}, 1_189_632, 0),
    (vit, "AdaptFormer", {"bottleneck": 8}, 156_768, 0),
    (vit, "Convpass", {}, 327_552, 0),
    (vit, "Convpass", {"targets": ("attention",)}, 163_776, 0),
    (ast, "ConformerAdapter", {"norms": ("norm2",)}, 252_288, 18_432),  # 270,720 in the paper's table
    (ast, "ConformerAdapter", {"targets": ("attention", "mlp"), "norms": ("norm1", "norm2")}, 504_576, 36_864),
    (ast, "MixtureOfAdapters", {"norms": ("norm2",)}, 903_672, 18_432),
    (bert, "MAM", {}, 22_493_984, 0),
    (bert, "MAM", {"reparametrize": False}, 7_644_672, 0),
    (roberta, "MAM", {"tokens": 16, "bottleneck": 16, "reparametrize": False}, 599_232, 0),
    (bert, "UniPELT", {}, 11_083_376, 0),
]


@functools.cache
def without_values(backbone: Callable[[], nn.Module]) -> nn.Module:
    """One model for all tests of a kind."""
    with torch.device("meta"):
        return backbone()


def counts_on(backbone: Callable[[], nn.Module], name: str, options: dict[str, Any]) -> dict[str, int]:
    """What a method counts on a backbone, which is afterwards as it was."""
    method = method_class(name)(**options).attach(without_values(backbone))
    try:
        return method.counts()
    finally:
        method.remove()


@pytest.mark.parametrize(("backbone", "name", "options", "count", "norms"), ROWS,
                         ids=[f"{i}-{row[1]}" for i, row in enumerate(ROWS)])
def test_published_count(backbone: Callable[[], nn.Module], name: str, options: dict[str, Any], count: int, norms: int
                         ) -> None:
    counts = counts_on(backbone, name, options)
    assert (counts["method"], counts["norms"]) == (count, norms)


WIDTHS = [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
"""Of Swin-B's blocks."""


@pytest.mark.parametrize(("name", "options", "count"), [
    ("LoRA", {}, sum(2 * 8 * (d + d) for d in WIDTHS)),  # q and v
    ("LoRA", {"rank": 32}, sum(2 * 32 * (d + d) for d in WIDTHS)),
    ("LoRA", {"targets": SIX}, sum(8 * (4 * 2 * d + 2 * 5 * d) for d in WIDTHS)),
    # Two branches of rank 2 at o, and at mlp.down, where the parallel one reads 4 d; each has r + d biases.
    ("Hydra", {}, sum(3 * (2 * 2 * d + 2 + d) + 2 * 5 * d + 2 + d for d in WIDTHS)),
    ("AdaptFormer", {}, sum(2 * 64 * d + 64 + d for d in WIDTHS)),
    ("AdaptFormer", {"bottleneck": 32, "biases": False}, sum(2 * 32 * d for d in WIDTHS)),
    ("ParallelAdapter", {"bottleneck": 32, "biases": False, "scale": "learned"}, sum(2 * 32 * d + 1 for d in WIDTHS)),
    ("SSF", {}, sum(22 * d for d in WIDTHS) + 2 * 2 * 128 + 2 * 1024),
    ("SSF", {"patch_merging": True}, sum(22 * d for d in WIDTHS) + 2 * 2 * 128 + 2 * 1024 + 2 * 4 * (128 + 256 + 512)),
])
def test_formula_on_swin_base(name: str, options: dict[str, Any], count: int) -> None:
    """Where widths differ from stage to stage."""
    assert counts_on(swin_base, name, options)["method"] == count


def test_no_queries_in_windows() -> None:
    with pytest.raises(ScionError, match="VQT: the blocks of SwinTransformer cut a map into windows"):
        counts_on(swin_base, "VQT", {})
