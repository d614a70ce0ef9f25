"""Both ways with Hugging Face peft: the same function there and here, the same bits back, and one line for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from core import load_adapter
from core.adapters.huggingface.convert import CONFIG, TENSORS, from_peft, is_peft, to_peft
from core.adapters.huggingface.forms import form_of
from core.adapters.huggingface.wrapped import WrappedModel
from core.compose import Route
from core.errors import ScionError
from core.method import PEFTMethod, methods_on
from core.peft import make, method_class, registry
from core.random_state import seeded
from tests import models
from tests.interop_table import (
    LIMIT,
    OURS,
    PAGE,
    THEIRS,
    Ours,
    Theirs,
    features,
    inward,
    opened,
    outward,
    rows,
    tried,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def every(table: list[Any]) -> list[Any]:
    """Each row on each of its families; the quick tier meets the first one."""
    return [pytest.param(row, family, id=f"{row}-{family}", marks=[pytest.mark.slow] if number else [])
            for row in table for number, family in enumerate(row.families)]


@pytest.mark.parametrize(("row", "family"), every(OURS))
def test_ours_in_peft_and_back(row: Ours, family: str, tmp_path: Path) -> None:
    came = outward(row, family, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == row.kind
    assert came.moved > 1e-2
    assert came.difference < LIMIT and came.back_difference < LIMIT
    if row.bits:
        sent, back = came.sent[0], came.back[0]
        before = {name.removeprefix(sent.prefix): tensor for name, tensor in sent.tensors().items()}
        after = {name.removeprefix(back.prefix): tensor for name, tensor in back.tensors().items()}
        if row.method == "VeRA":  # its random map is in the file now
            assert {name for name in after if name not in before} == {"projections.A", "projections.B"}
        assert before.keys() <= after.keys() and len(came.back) == 1
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("row", "family"), every(THEIRS))
def test_theirs_here(row: Theirs, family: str, tmp_path: Path) -> None:
    came = inward(row, family, tmp_path)
    assert came.moved > 1e-2
    assert came.difference < LIMIT
    assert {type(method).__name__ for method in came.back} == {row.method}


def test_every_form_is_in_the_table() -> None:
    forms = {name for name in registry() if form_of(method_class(name)) is not None}
    assert forms <= {row.method for row in OURS}
    assert {row.method for row in THEIRS} == forms - {
        "rsLoRA", "LoRAPlus", "PiSSA", "PTuningV2"}  # which come as LoRA and PrefixTuning


def test_page_is_current() -> None:
    def without_numbers(lines: list[str]) -> list[str]:
        return [re.sub(r"\| (\?|\d\.\de[+-]\d\d) \|", "| |", line) for line in lines]

    text = PAGE.read_text()
    made = rows(measure=False)
    assert without_numbers(text.splitlines()[-len(made):]) == without_numbers(made), "run python -m tests.interop_table"
    numbers = [float(found) for found in re.findall(r"\| (\d\.\de[+-]\d\d) \|", text)]
    assert len(numbers) == len(OURS) + len(THEIRS) and max(numbers) < LIMIT


# ------------------------------------------------------------------------------------------------- more than one method


def test_folders_of_peft_are_adapters(tmp_path: Path) -> None:
    model = models.make("bert")
    method = make("LoRA", {"rank": 2}).attach(model)
    ours = tried("bert", method, model)
    to_peft(method, model, tmp_path / "there")
    method.save(tmp_path / "here")
    assert is_peft(tmp_path / "there") and not is_peft(tmp_path / "here")
    fresh = models.make("bert")
    assert type(load_adapter(tmp_path / "there", fresh)).__name__ == "LoRA"
    assert torch.equal(features("bert", fresh), ours)
    plain = models.make("bert")
    to_peft(tmp_path / "here", plain, tmp_path / "again")  # a folder is loaded for the time
    assert not methods_on(plain)
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / "there" / TENSORS).read_bytes()


def test_patterns_go_back_as_one_adapter(tmp_path: Path) -> None:
    model = models.make("llama")
    several = [make("LoRA", {"rank": 4, "targets": ["q"], "name": "one"}).attach(model),
               make("LoRA", {"rank": 2, "alpha": 3, "targets": ["v"], "layers": [0], "name": "two"}).attach(model),
               make("LoRA", {"rank": 2, "alpha": 5, "targets": ["mlp.up"], "name": "three"}).attach(model)]
    ours = tried("llama", several, model)
    to_peft(several, model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert len(config["rank_pattern"]) == 2 or len(config["rank_pattern"]) == 3
    assert (ours - opened("llama", tmp_path)).abs().max() < LIMIT
    fresh = models.make("llama")
    back = from_peft(tmp_path, fresh)
    assert sorted((one.rank, one.alpha) for one in back) == [(2, 3), (2, 5), (4, 4)]
    assert torch.allclose(features("llama", fresh), ours, atol=LIMIT)


def test_a_stack_of_low_rank_changes_is_one_lora(tmp_path: Path) -> None:
    model = models.make("timm_vit")
    stack = [make("LoRA", {"rank": 2}).attach(model), make("VeRA", {"rank": 4, "targets": ["qkv"]}).attach(model)]
    ours = tried("timm_vit", stack, model)
    to_peft(stack, model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["r"] == 2 + 2 + 4
    assert (ours - opened("timm_vit", tmp_path)).abs().max() < LIMIT


def test_adalora_after_its_budget_fell(tmp_path: Path) -> None:
    """peft stores the triplets that are left; here they come with empty places for the others."""
    import peft

    model = models.make("bert")
    with seeded(0):
        wrapped: Any = peft.get_peft_model(model.model, peft.AdaLoraConfig(  # type: ignore[arg-type]
            init_r=4, target_r=1, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=["query", "value"]))
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    model.model = wrapped
    for step in range(6):
        model(models.batch("bert")).square().mean().backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wrapped.save_pretrained(str(tmp_path))
    stored = {len(tensor) for name, tensor in load_file(tmp_path / TENSORS).items() if name.endswith("lora_E")}
    assert stored != {4}
    fresh = models.make("bert")
    plain = features("bert", fresh)
    method = from_peft(tmp_path, fresh)
    assert {len(graft.E) for graft in method.grafts} == {4}
    assert (features("bert", fresh) - plain).abs().max() > 1e-2
    assert (features("bert", fresh) - opened("bert", tmp_path)).abs().max() < LIMIT


def test_boft_with_several_factors(tmp_path: Path) -> None:
    """peft computes them with a CUDA extension alone; its own permutations and block matrices say what that gives."""
    from peft.tuners.boft.layer import BOFTLayer

    model = models.make("bert")
    method = make("BOFT", {"block": 4, "factors": 3, "targets": ["q"], "layers": [0]}).attach(model)
    tried("bert", method, model)
    to_peft(method, model, tmp_path)
    held = {name.rpartition(".")[2]: tensor for name, tensor in load_file(tmp_path / TENSORS).items()}
    site = method.grafts[0].site
    layer: Any = BOFTLayer.__new__(BOFTLayer)
    rotation = torch.eye(site.in_features)
    for level, blocks in enumerate(held["boft_R"]):
        order = layer.block_butterfly_perm(site.in_features, len(blocks) // 2**level, 2, 2)
        p = torch.eye(site.in_features)[order]
        rotation = p @ torch.block_diag(*layer.cayley_batch(blocks)) @ p.t() @ rotation
    theirs = (rotation @ site.full_weight.t()).t() * held["boft_s"]
    assert torch.allclose(method.grafts[0](site.full_weight, verb="weight"), theirs, atol=1e-6)
    assert not torch.allclose(theirs, site.full_weight, atol=1e-2)


def test_boft_factors_reach_every_channel() -> None:
    """With log2(blocks) + 1 factors each channel is mixed with all others (arXiv:2311.06243, section 4)."""
    model = models.make("bert")
    for factors in (1, 2, 3, 4):
        method = make("BOFT", {"block": 4, "factors": factors, "targets": ["q"], "layers": [0]}).attach(model)
        tried("bert", method, model)
        reached = (method.grafts[0](torch.eye(32), verb="weight").abs() > 1e-9).sum(1)
        assert reached.tolist() == [4 * 2 ** (factors - 1)] * 32
        method.remove()


# ------------------------------------------------------------------------------------------------- heads and wrappers


def test_trained_head_goes_along(tmp_path: Path) -> None:
    import peft

    model: Any = models.with_head()
    method = make("LoRA", {"rank": 2, "targets": ["qkv"]}).attach(model)
    with torch.no_grad():
        model.head.weight.mul_(2)
    tried("timm_vit", method, model)
    to_peft(method, model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["modules_to_save"] == ["head"]
    theirs = peft.PeftModel.from_pretrained(models.with_head(), str(tmp_path)).eval()  # type: ignore[arg-type]
    fresh = models.with_head()
    from_peft(tmp_path, fresh)
    assert torch.allclose(features("timm_vit", model), features("timm_vit", theirs), atol=LIMIT)
    assert torch.equal(features("timm_vit", model), features("timm_vit", fresh))


def test_classifier_of_transformers(tmp_path: Path) -> None:
    """peft trains a sequence classifier's head by itself and stores it."""
    import peft
    from transformers import BertConfig, BertForSequenceClassification

    def classifier() -> Any:
        config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                            intermediate_size=64, max_position_embeddings=32)
        config.num_labels = 3
        with torch.random.fork_rng(devices=[]):
            return models.spread(BertForSequenceClassification(config)).eval()

    with seeded(0):
        wrapped: Any = peft.get_peft_model(classifier(), peft.LoraConfig(
            task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0.0)
    wrapped.save_pretrained(str(tmp_path))
    ids = models.batch("bert")
    fresh = classifier()
    method = from_peft(tmp_path, fresh)
    assert isinstance(method, PEFTMethod)
    assert torch.allclose(fresh(ids).logits, wrapped(ids).logits, atol=LIMIT)
    with pytest.raises(ScionError, match="modules_to_save holds classifier.[a-z]*, which is no head of BertModel"):
        from_peft(tmp_path, models.make("bert"))


def test_language_models_with_and_without_their_head(tmp_path: Path) -> None:
    """An adapter made around LlamaForCausalLM fits the LlamaModel inside one as well."""
    import peft

    with seeded(0):
        wrapped: Any = peft.get_peft_model(models.tied_llama(), peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    wrapped.save_pretrained(str(tmp_path / "theirs"))
    ids = models.batch("llama")
    whole = models.tied_llama()
    method = from_peft(tmp_path / "theirs", whole)
    assert torch.allclose(whole(ids).logits, wrapped(ids).logits, atol=LIMIT)
    inside = models.tied_llama().model
    from_peft(tmp_path / "theirs", inside)
    assert torch.allclose(inside(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    to_peft(method, whole, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["target_modules"][0].startswith("model.layers.0.")
    again: Any = peft.PeftModel.from_pretrained(models.tied_llama(), str(tmp_path / "ours")).eval()
    assert torch.equal(again(ids).logits, wrapped(ids).logits)


class Twin(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder


def test_names_that_end_alike(tmp_path: Path) -> None:
    """In a list of targets, peft takes all modules whose names end like one; here only those meant are adapted."""
    import peft

    def bert() -> Any:
        model = models.make("bert").model
        model.add_module("twin", Twin(models.make("bert").model.encoder))  # type: ignore[arg-type]
        return model

    model = bert()
    method = make("LoRA", {"rank": 2, "layers": [0]}).attach(model)
    to_peft(method, model, tmp_path)
    assert isinstance(json.loads((tmp_path / CONFIG).read_text())["target_modules"], str)
    wrapped: Any = peft.PeftModel.from_pretrained(bert(), str(tmp_path))
    adapted = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [f"base_model.model.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    assert WrappedModel(model).pattern(["twin.encoder.layer.0"]) == ["twin.encoder.layer.0"]


# ------------------------------------------------------------------------------------------------- refusals


REFUSED_THERE = [
    ("Hydra", {}, "bert", "Hydra: peft has no such method"),
    ("BitFit", {}, "bert", "BitFit: peft has no such method"),
    ("LoRA", {"norms": ["norm1"]}, "bert", r"LoRA: norms=\['norm1'\] are trained beside it"),
    ("Bat", {"rank": 8, "group": "inputs"}, "bert", "Bat: group 'inputs' is none that peft has"),
    ("Bat", {"rank": 8}, "gpt2", "is a Conv1D, and peft has the method for linear alone"),
    ("OFT", {"block": 8, "terms": 3}, "bert", "OFT: terms 3 means"),
    ("OFT", {"block": 8}, "timm_vit", "OFT: 0.q is a part of model.blocks.0.attn.qkv, which peft adapts as a whole"),
    ("LoKr", {"rank": 2, "factor": 16}, "bert", "LoKr: factor 16 splits the width 32 of 0.q in another way in peft"),
    ("PrefixTuning", {"tokens": 3}, "gpt2", "plain rotary positions can make up for; GPT2Model has others"),
    ("PrefixTuning", {"tokens": 3}, "mistral", "plain rotary positions can make up for; MistralModel has others"),
    ("PromptTuning", {"tokens": 3}, "timm_vit", "one set of prompts before embedded ids"),
    ("MAM", {"tokens": 3, "bottleneck": 2}, "llama", "peft has no such method"),
    ("PrefixTuning", {"tokens": 3, "layers": [0]}, "llama", "peft has one prefix, in all 2 layers of LlamaModel"),
]


@pytest.mark.parametrize(("method", "options", "family", "message"), REFUSED_THERE)
def test_what_peft_cannot_hold(method: str, options: dict[str, Any], family: str, message: str, tmp_path: Path) -> None:
    model = models.make(family)
    attached = make(method, options).attach(model)
    with pytest.raises(ScionError, match=message) as caught:
        to_peft(attached, model, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_only_what_is_attached_is_written(tmp_path: Path) -> None:
    model = models.make("bert")
    method = make("LoRA", {}).attach(model)
    with pytest.raises(ScionError, match="LoRA is not attached to this Pooled, or is merged"):
        to_peft(method, models.make("bert"), tmp_path)
    other = make("DoRA", {"name": "two"}).attach(model)
    with pytest.raises(ScionError, match="LoRA, two: a peft adapter holds one method"):
        to_peft([method, other], model, tmp_path)


def test_only_what_stands_alone_is_written(tmp_path: Path) -> None:
    """peft would compute something else: nothing here may be written as if it were a plain method."""
    model = models.make("bert")
    method = make("LoRA", {}).attach(model)
    quantize = make("Quantize", {"bits": 2}).attach(model)
    with pytest.raises(ScionError, match="LoRA: QuantizedGraft changes its tensors"):
        to_peft(method, model, tmp_path)
    quantize.remove()
    with method.disabled(), pytest.raises(ScionError, match="LoRA: 0.q is switched, weighed or routed"):
        to_peft(method, model, tmp_path)
    to_peft(method, model, tmp_path)
    method.remove()
    route = Route([make("LoRA", {"name": "one"}), make("LoRA", {"name": "two"})]).attach(model)
    with pytest.raises(ScionError, match="Route: a peft adapter holds one method, and this is 2"):
        to_peft(route, model, tmp_path)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    import peft

    model: Any = models.make("bert").model
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"])).save_pretrained(str(tmp_path))
    return tmp_path


def config_with(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / TENSORS)

    return change


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


REFUSED_HERE = [
    (as_pickle, "adapter_model.bin: a pickle"),
    (config_with(bias="all"), 'bias "all" is an option of peft'),
    (config_with(use_qalora=True), "use_qalora true is an option of peft's LORA that the method here does not have"),
    (config_with(lora_bias=True), "lora_bias true is an option of peft"),
    (config_with(init_lora_weights="olora"), "init_lora_weights 'olora' changes the frozen weights"),
    (config_with(peft_type="VBLORA"), "peft_type VBLORA is no method here; those that are: ADALORA, BOFT"),
    (config_with(peft_type=3), "not the config of a peft adapter"),
    (config_with(r=3), r"lora_A.weight is \[2, 32\] in the file, \[3, 32\] here"),
    (renamed("encoder.layer.1", "encoder.layer.7"), "encoder.layer.7.attention.self.query does not exist in Bert"),
    (renamed("lora_A", "lora_embedding_A"), "lora_embedding_A.weight, which is nothing that LoRA has"),
    (renamed("layer.0.attention.self.query", "layer.0.attention.output.LayerNorm"), "plays no role in BertModel that"),
    (lambda folder: (folder / TENSORS).write_bytes(b"short"), "damaged or cut short"),
    (lambda folder: (folder / TENSORS).unlink(), "adapter_model.safetensors: missing"),
    (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json: damaged"),
    (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json here"),
]


@pytest.mark.parametrize(("damage", "message"), REFUSED_HERE, ids=[message[:30] for _, message in REFUSED_HERE])
def test_what_is_not_known_here(damage: Callable[[Path], None], message: str, theirs: Path) -> None:
    damage(theirs)
    model = models.make("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ScionError, match=message) as caught:
        from_peft(theirs, model)
    assert str(theirs) in str(caught.value) and "\n" not in str(caught.value)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_dropout_that_is_missing_here_is_told(tmp_path: Path) -> None:
    import peft

    model: Any = models.make("bert").model
    peft.get_peft_model(model, peft.VeraConfig(r=2, vera_dropout=0.1, target_modules=["query"])).save_pretrained(
        str(tmp_path))
    with pytest.warns(UserWarning, match="vera_dropout 0.1 acts in training alone, and is left out"):
        from_peft(tmp_path, models.make("bert"))


def test_a_second_adapter_needs_a_name_of_its_own(theirs: Path) -> None:
    model = models.make("bert")
    from_peft(theirs, model)
    with pytest.raises(ScionError, match="called LoRA is attached already"):
        from_peft(theirs, model)
    assert [method.name for method in methods_on(model)] == ["LoRA"]
    assert from_peft(theirs, model, name="second").name == "second"
