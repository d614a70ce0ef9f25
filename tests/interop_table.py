"""Writes docs/peft.md: what goes to Hugging Face peft and back, with the differences measured. ``python -m
tests.interop_table``. The rows are those that tests/core/test_interop.py runs."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import peft as methods
from core.adapters.huggingface.convert import from_peft, to_peft
from core.method import PEFTMethod
from tests import models

PAGE = Path(__file__).parent.parent / "docs" / "peft.md"
LIMIT = 1e-5
"""Largest difference of a feature, of values near 1."""

QKV = {"targets": ["qkv"]}
MAPS = ("bert", "llama", "t5")
"""Families whose queries, keys and values have maps of their own; timm's ViT and GPT-2 have one for all three."""


@dataclass(frozen=True)
class Ours:
    """A method of this project that goes to peft and back."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = MAPS
    kind: str = ""
    """``peft_type`` there."""
    bits: bool = True
    """Whether what comes back is the method itself, with the same bits in its tensors; else it does the same."""
    note: str = ""

    def __str__(self) -> str:
        return f"{self.method}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"


SLICES = "changes of q and v become one of the fused map, of twice the rank"
OURS = [
    Ours("LoRA", {"rank": 4, "alpha": 6}, MAPS, "LORA"),
    Ours("LoRA", {"targets": None, "layers": [1]}, ("bert", "timm_vit", "gpt2", "llama"), "LORA"),
    Ours("LoRA", {"targets": ["patch_embed", "o"]}, ("timm_vit",), "LORA", note="a convolution among the targets"),
    Ours("LoRA", {"rank": 4, "alpha": 6}, ("timm_vit", "gpt2"), "LORA", False, SLICES),
    Ours("LoRA", {"targets": ["q", "v", "o"]}, ("timm_vit", "gpt_neox"), "LORA", False, f"{SLICES}; `rank_pattern`"),
    Ours("rsLoRA", {"rank": 4}, MAPS, "LORA", note="`use_rslora`; comes back as LoRA(root=True)"),
    Ours("LoRAPlus", {}, ("bert",), "LORA", note="LoRA: the learning rates are no part of a file"),
    Ours("PiSSA", {"rank": 4}, ("bert", "gpt2", "llama"), "LORA", False,
         "B A - B_0 A_0 as LoRA of twice the rank, on the unchanged weight"),
    Ours("DoRA", {"rank": 4}, MAPS, "LORA", note="`use_dora`"),
    Ours("DoRA", {"rank": 4, "targets": ["qkv", "mlp.up"]}, ("timm_vit", "gpt2"), "LORA"),
    Ours("DoRA", {"rank": 4}, ("timm_vit", "gpt2"), "LORA", False,
         f"{SLICES}, with the weight's own norms as magnitudes of k"),
    Ours("AdaLoRA", {"rank": 4, "target_rank": 3}, MAPS, "ADALORA",
         note="peft divides by rank + 0.00001; schedules are in steps there, and stay behind"),
    Ours("AdaLoRA", {"rank": 4, **QKV}, ("gpt2",), "ADALORA"),
    Ours("VeRA", {"rank": 8}, MAPS, "VERA", note="comes back with its random map in the file"),
    Ours("VeRA", {"rank": 8, "targets": ["qkv", "mlp.down"]}, ("timm_vit", "gpt2"), "VERA"),
    Ours("FourierFT", {"frequencies": 40}, MAPS, "FOURIERFT"),
    Ours("FourierFT", {"frequencies": 40, "scale": 100.0, **QKV}, ("timm_vit", "gpt2"), "FOURIERFT"),
    Ours("OFT", {"block": 8}, MAPS, "OFT", note="terms=3 is no series of peft's"),
    Ours("OFT", {"block": 4, "terms": 0, **QKV}, ("timm_vit",), "OFT", note="`use_cayley_neumann: false`"),
    Ours("BOFT", {"block": 4}, MAPS, "BOFT", note="factors > 1 run in peft with its CUDA extension alone"),
    Ours("BOFT", {"block": 8, **QKV}, ("timm_vit",), "BOFT"),
    Ours("LoHa", {"rank": 3, "alpha": 6}, MAPS, "LOHA"),
    Ours("LoHa", {"targets": ["patch_embed", "qkv"]}, ("timm_vit",), "LOHA"),
    Ours("LoKr", {"rank": 2}, MAPS, "LOKR", note="a factor above a width's root splits otherwise there"),
    Ours("LoKr", {"rank": 2, "factor": 4, **QKV}, ("timm_vit",), "LOKR"),
    Ours("LoKr", {"rank": 16, "alpha": 3}, ("bert",), "LOKR", note="one inner matrix"),
    Ours("IA3", {}, MAPS, "IA3"),
    Ours("IA3", {"outputs": ["qkv", "mlp.up"], "inputs": ["mlp.down"]}, ("timm_vit", "gpt2"), "IA3"),
    Ours("IA3", {}, ("timm_vit", "gpt2"), "IA3", False, "the whole fused map is scaled, queries by ones"),
    Ours("LayerNormTuning", {}, ("bert", "timm_vit", "llama", "gpt2", "t5"), "LN_TUNING"),
    Ours("PrefixTuning", {"tokens": 5}, ("llama", "qwen2"), "PREFIX_TUNING", False,
         "rotary positions alone: peft moves the tokens' positions on, and keys are turned to make up for it"),
    Ours("PrefixTuning", {"tokens": 4, "reparametrize": 16}, ("llama",), "PREFIX_TUNING", False,
         "the prefixes that the MLP makes"),
    Ours("PTuningV2", {"tokens": 5}, ("llama",), "PREFIX_TUNING", False, "comes back as PrefixTuning"),
    Ours("PromptTuning", {"tokens": 5}, ("llama", "gpt2", "gpt_neox", "t5"), "PROMPT_TUNING", note="text alone"),
    Ours("PTuning", {"tokens": 5}, ("gpt2", "llama"), "P_TUNING", False, "the prompts that the network makes"),
    Ours("Bone", {"rank": 12}, ("bert", "timm_vit", "llama"), "MISS", note="peft's name is MiSS"),
    Ours("Bone", {"rank": 8, "columns": 16}, ("bert", "timm_vit", "llama"), "MISS", note='`init_weights: "mini"`'),
    Ours("Bone", {"rank": 8, **QKV}, ("gpt2",), "LORA", False, "peft's MiSS has no Conv1D: LoRA of that rank"),
    Ours("Bat", {"rank": 8}, ("bert", "timm_vit", "llama"), "MISS", note='`init_weights: "bat"`; group="inputs" is not '
                                                                         "there"),
    Ours("SVFit", {"rank": 4}, ("bert", "llama"), "LORA", False, "peft has no such method: LoRA of that rank"),
    Ours("MoS", {"rank": 2, "targets": ["q", "mlp.down"]}, ("bert",), "LORA", False,
         "peft has no such method: LoRA of its rank"),
    Ours("TriAdaptLoRA", {}, ("bert",), "LORA", False, "peft has no such method: LoRA of its rank"),
]


@dataclass(frozen=True)
class Theirs:
    """An adapter of peft that comes here."""

    name: str
    config: str
    """peft's class of configurations."""
    options: dict[str, Any] = field(default_factory=dict)
    families: dict[str, list[str]] = field(default_factory=dict)
    """Each family, with the target modules there."""
    method: str = ""
    note: str = ""

    def __str__(self) -> str:
        return self.name


MAIN = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "timm_vit": ["qkv"], "t5": ["q", "v"]}
LINEAR = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "up_proj"],
          "timm_vit": ["qkv", "mlp.fc2"]}
CONV1D = {**MAIN, "gpt2": ["c_attn", "mlp.c_proj"]}
START: dict[str, Any] = {"init_weights": False}
THEIRS = [
    Theirs("LoRA", "LoraConfig", {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}, CONV1D, "LoRA"),
    Theirs("LoRA, rank_pattern and alpha_pattern", "LoraConfig",
           {"r": 4, "rank_pattern": {"0.*query": 2, "layers.1.*up_proj": 6}, "alpha_pattern": {"1.*value": 5}},
           {"bert": LINEAR["bert"], "llama": LINEAR["llama"]}, "LoRA", "a method for each set of options"),
    Theirs("LoRA, layers_to_transform", "LoraConfig", {"layers_to_transform": [1]}, {"bert": MAIN["bert"]}, "LoRA"),
    Theirs("rsLoRA", "LoraConfig", {"r": 4, "use_rslora": True}, MAIN, "LoRA", "LoRA(root=True)"),
    Theirs("PiSSA", "LoraConfig", {"r": 4, "init_lora_weights": "pissa"}, CONV1D, "LoRA", 'LoRA(start="principal")'),
    Theirs("DoRA", "LoraConfig", {"r": 4, "use_dora": True}, CONV1D, "DoRA"),
    Theirs("AdaLoRA", "AdaLoraConfig", {"init_r": 5, "target_r": 3, "total_step": 10}, CONV1D, "AdaLoRA"),
    Theirs("VeRA", "VeraConfig", {"r": 8, **START}, {**CONV1D, "bert": LINEAR["bert"]}, "VeRA"),
    Theirs("VeRA without save_projection", "VeraConfig", {"r": 8, "save_projection": False, "projection_prng_key": 7},
           {"bert": LINEAR["bert"]}, "VeRA", "drawn again by the seed in the config"),
    Theirs("FourierFT", "FourierFTConfig",
           {"n_frequency": 30, "scaling": 50.0, "n_frequency_pattern": {"0.*query": 20}}, CONV1D, "FourierFT"),
    Theirs("OFT", "OFTConfig", {"oft_block_size": 8, **START}, LINEAR, "OFT"),
    Theirs("OFT by number of blocks", "OFTConfig",
           {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 3, **START}, LINEAR, "OFT",
           "peft's 3 terms are 4 here"),
    Theirs("OFT, exact", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False, **START}, LINEAR, "OFT"),
    Theirs("BOFT", "BOFTConfig", {"boft_block_size": 4, **START}, LINEAR, "BOFT"),
    Theirs("LoHa", "LoHaConfig", {"r": 4, "alpha": 6, **START}, LINEAR, "LoHa"),
    Theirs("LoKr", "LoKrConfig", {"r": 2, "alpha": 3, "rank_pattern": {"fc2": 16}, **START}, LINEAR, "LoKr"),
    Theirs("IA3", "IA3Config", {"init_ia3_weights": False},
           {"bert": ["key", "value", "output.dense"], "llama": ["k_proj", "v_proj", "down_proj"],
            "t5": ["k", "v", "wo"], "timm_vit": ["qkv", "mlp.fc2"], "gpt2": ["c_attn", "mlp.c_proj"]}, "IA3"),
    Theirs("LayerNorm tuning", "LNTuningConfig", {},
           {"bert": ["LayerNorm"], "llama": ["input_layernorm"], "timm_vit": ["norm1", "norm2"],
            "gpt2": ["ln_1", "ln_f"], "t5": ["layer_norm", "final_layer_norm"]}, "LayerNormTuning"),
    Theirs("Prefix tuning", "PrefixTuningConfig", {"num_virtual_tokens": 5, "task_type": "FEATURE_EXTRACTION"},
           {"llama": [], "gemma": []}, "PrefixTuning", "rotary positions alone"),
    Theirs("Prompt tuning", "PromptTuningConfig", {"num_virtual_tokens": 5, "task_type": "FEATURE_EXTRACTION"},
           {"llama": [], "gpt2": [], "t5": []}, "PromptTuning"),
    Theirs("P-tuning", "PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 8,
                                               "task_type": "FEATURE_EXTRACTION"},
           {"gpt2": [], "llama": []}, "PTuning"),
    Theirs("P-tuning, LSTM", "PromptEncoderConfig", {
        "num_virtual_tokens": 5, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM",
        "task_type": "FEATURE_EXTRACTION"}, {"gpt2": []}, "PTuning"),
    Theirs("MiSS", "MissConfig", {"r": 8}, LINEAR, "Bone"),
    Theirs("MiSS, mini", "MissConfig", {"r": 8, "mini_r": 8, "init_weights": "mini"}, LINEAR, "Bone"),
    Theirs("MiSS, bat", "MissConfig", {"r": 8, "init_weights": "bat"}, LINEAR, "Bat"),
]

HEAD = f"""# To Hugging Face peft and back

Made by `python -m tests.interop_table` from the rows that `tests/core/test_interop.py` runs with peft {{version}}: tiny
models, random values in all trained tensors, and the largest difference of their features (of values near 1) between
the two libraries, over all models of a row, in float32. All must stay below {LIMIT:g}.

    lightning export RUN FOLDER --format peft                  # or core.to_peft(method, model, folder)
    lightning import FOLDER OUT --model NAME                   # or core.load_adapter(folder, model)

A peft adapter names modules of the library's own model (`run.backbone.model`), and is opened on that. Of its files only
safetensors are read, never pickles. A trained head inside the model goes along as `modules_to_save`; the head of a task
stays in the run's own adapter. Modules with options of their own (`rank_pattern` and its like) come as several methods.

What peft cannot express is written as its LoRA where the change of the weights is of low rank, with a warning, and
refused in one line elsewhere: parts of a fused projection (but for LoRA, DoRA and IA3), `norms=...` beside a method,
prefixes under other than rotary positions or in some layers alone, Bat with `group="inputs"`, OFT with `terms=3`, LoKr
with a `factor` above a width's square root. Of peft's options those that change the function and that the method here
does not have are refused by name (`bias`, `lora_bias`, `use_qalora`, `coft`, `block_share`, `decompose_both`,
`use_effective_conv2d`, starts that move the frozen weights other than PiSSA's, ...); dropouts that are missing here act
in training alone, and are left out with a warning. Optimizers, schedules and learning rates are in neither file.

"""


def tried(family: str, method: PEFTMethod | list[PEFTMethod], model: nn.Module) -> Tensor:
    """Random values for all that methods train, and the model's features with them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in method if isinstance(method, list) else [method]:
            for tensor in one.trainable().values():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        return model(models.batch(family))


def features(family: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(models.batch(family))


def opened(family: str, folder: Path) -> Tensor:
    """The features that peft computes with an adapter."""
    import peft

    model = models.make(family)
    model.model = peft.PeftModel.from_pretrained(model.model, str(folder)).eval()  # type: ignore[arg-type]
    return features(family, model)


@dataclass
class Journey:
    """What came of a row: the change of the features, the largest difference between the libraries, and methods."""

    moved: float
    difference: float
    sent: list[PEFTMethod]
    back: list[PEFTMethod]
    back_difference: float


def outward(row: Ours, family: str, folder: Path) -> Journey:
    """Our method, in peft, and back here."""
    model = models.make(family)
    method = methods.make(row.method, row.options).attach(model)
    ours = tried(family, method, model)
    to_peft(method, model, folder)
    fresh = models.make(family)
    plain = features(family, fresh)
    back = from_peft(folder, fresh)
    return Journey(float((ours - plain).abs().max()), float((ours - opened(family, folder)).abs().max()), [method],
                   back if isinstance(back, list) else [back], float((ours - features(family, fresh)).abs().max()))


def inward(row: Theirs, family: str, folder: Path) -> Journey:
    """peft's method, here."""
    import peft

    model, options = models.make(family), dict(row.options)
    if row.families[family]:
        options["target_modules"] = row.families[family]
    if row.config == "IA3Config":
        options["feedforward_modules"] = [name for name in row.families[family] if name.split(".")[-1] in (
            "dense", "down_proj", "wo", "fc2", "c_proj")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrapped: Any = peft.get_peft_model(model.model, getattr(peft, row.config)(**options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(str(folder))
    fresh = models.make(family)
    plain = features(family, fresh)
    back = from_peft(folder, fresh)
    theirs = opened(family, folder)
    return Journey(float((theirs - plain).abs().max()), float((theirs - features(family, fresh)).abs().max()), [],
                   back if isinstance(back, list) else [back], 0.0)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def rows(measure: bool = True) -> list[str]:
    """The lines of both tables; without measuring, a question mark stands for each number."""
    def number(values: list[float]) -> str:
        return f"{max(values):.1e}" if values else "?"

    found = ["## Ours in peft", "", line("method", "models", "there", "largest difference", "comes back as", "notes"),
             line(*["---"] * 6)]
    for row in OURS:
        came = [float(outward(row, family, folder_()).difference) for family in row.families] if measure else []
        found.append(line(f"`{row}`", ", ".join(row.families), row.kind, number(came),
                          "itself, bit for bit" if row.bits else "the same function", row.note))
    found += ["", "## peft's here", "", line("adapter", "models", "here", "largest difference", "notes"),
              line(*["---"] * 5)]
    for row in THEIRS:
        came = [float(inward(row, family, folder_()).difference) for family in row.families] if measure else []
        found.append(line(str(row), ", ".join(row.families), row.method, number(came), row.note))
    return found


def folder_() -> Path:
    return Path(tempfile.mkdtemp())


def page() -> str:
    from importlib.metadata import version

    return HEAD.format(version=version("peft")) + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = page()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
