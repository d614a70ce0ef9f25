"""Descriptions of causal language models: heads, fused maps, layouts that one family has several of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from core.anatomy import dissect
from core.anatomy.families.transformers_decoders import gpt_neo_attention
from core.errors import ScionError
from core.peft import LoRA, PrefixTuning, PromptTuning  # type: ignore[attr-defined]
from core.peft.side._narrow import narrow
from core.peft.side.ladder import prune
from tests.models import EVERY_FAMILY, Pooled, _gpt_bigcode, _opt, batch, make, spread
from tests.toolkit import distance, outputs, randomize

HEADS = {"Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "Qwen3ForCausalLM": "qwen3",
         "PhiForCausalLM": "phi", "Phi3ForCausalLM": "phi3", "OPTForCausalLM": "opt", "BloomForCausalLM": "bloom",
         "GPTNeoForCausalLM": "gpt_neo", "GPTBigCodeForCausalLM": "gpt_bigcode", "XGLMForCausalLM": "xglm",
         "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2",
         "GemmaForCausalLM": "gemma", "Starcoder2ForCausalLM": "starcoder2", "GPT2LMHeadModel": "gpt2",
         "GPTNeoXForCausalLM": "gpt_neox", "CodeGenForCausalLM": "codegen"}


def language_model(name: str) -> Any:
    """The tiny model of a family with its head."""
    config: Any = make(HEADS[name]).model.config
    with torch.random.fork_rng(devices=[]):
        return spread(getattr(transformers, name)(config)).eval()


@pytest.mark.parametrize("name", HEADS)
def test_whole_head_of_a_language_model_is_one_role(name: str) -> None:
    model = language_model(name)
    anatomy = dissect(model)
    backbone = anatomy.inputs.path
    outside = {key for key, _ in model.named_parameters(remove_duplicate=False) if not key.startswith(f"{backbone}.")}
    sites = anatomy.sites("lm_head")
    assert outside == {key for site in sites for key in site.parameter_names} and anatomy.head_names() == set()
    assert sites[0].module is model.get_output_embeddings()


def queries_keys_values(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What reaches the first block's attention, as [batch, tokens, numbers]."""
    found: list[Tensor] = []

    class Catch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            if func is nn.functional.scaled_dot_product_attention and not found:
                found.extend(part.transpose(1, 2).flatten(2) for part in args[:3])
            return func(*args, **(kwargs or {}))

    with Catch():
        outputs(model, ids)
    return found


@pytest.mark.parametrize("multi_query", [True, False])
def test_rows_of_gpt_bigcode(multi_query: bool) -> None:
    """Its fused map holds queries, then one key and one value, or the three of each head."""
    with torch.random.fork_rng(devices=[]):
        model = Pooled(spread(_gpt_bigcode(multi_query=multi_query)), token=-1).eval()
    block = dissect(model).blocks[0]
    fused: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        fused.append(output)

    handle = block.sites["qkv"].module.register_forward_hook(keep)
    seen = queries_keys_values(model, batch("gpt_bigcode"))
    handle.remove()
    for role, expected in zip("qkv", seen, strict=True):
        part = block.sites[role].take(fused[0])
        repeats = expected.shape[-1] // part.shape[-1]  # one key for all heads may arrive repeated
        assert torch.equal(part.repeat(1, 1, repeats), expected)
    assert block.sites["k"].out_features == (8 if multi_query else 32)


def test_rows_of_bloom() -> None:
    """Of each head its query, its key, its value."""
    block = dissect(make("bloom")).blocks[0]
    fused = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0))
    parts = block.module.self_attention._reshape(fused)  # type: ignore[union-attr, operator]
    for role, expected in zip("qkv", parts, strict=True):
        assert torch.equal(block.sites[role].take(fused), expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_gpt_neo_as_one_call(layer: int, padded: bool) -> None:
    """The call that `attend` rewrites computes what the library does, in global layers and in those with a window."""
    attention: Any = make("gpt_neo").model.h[layer].attn.attention  # type: ignore[union-attr, index]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=generator)
    mask = None
    if padded:
        mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo(torch.float32).min)
        mask[1, ..., :3] = torch.finfo(torch.float32).min
    ours, _ = gpt_neo_attention(attention, q, k, v, mask)
    theirs, _ = attention._attn(q, k, v, mask)
    seen = slice(3, None) if padded else slice(None)  # what stands on padding alone sees nothing either way
    assert distance(ours[:, :, seen], theirs[:, :, seen]) < 1e-5


def test_small_opt() -> None:
    """OPT of 350 million: norms behind the sums, no final norm, embeddings narrower than the states."""
    with torch.random.fork_rng(devices=[]):
        plain = spread(_opt(do_layer_norm_before=False, word_embed_proj_dim=16))
    model, ids = Pooled(plain, token=-1, padding=0).eval(), batch("opt")
    anatomy = dissect(model)
    assert not anatomy.blocks[0].pre_norm and anatomy.stacks[0].final is None
    assert anatomy.stem["embed"][0].module is plain.decoder.project_in  # type: ignore[union-attr]
    base = outputs(model, ids)
    lora = LoRA(rank=2, targets=("q", "mlp.up")).attach(model)
    randomize(lora)
    moved = outputs(model, ids)
    lora.merge()
    assert distance(outputs(model, ids), moved) < 1e-5 < distance(moved, base)
    lora.unmerge()
    lora.remove()
    prompts = PromptTuning(tokens=3).attach(model)
    assert prompts.counts()["method"] == 3 * 16 and outputs(model, ids).shape == base.shape
    assert distance(outputs(model, ids), base) > 1e-5


def test_prompts_reach_the_decoder_inside_opt() -> None:
    """OPTForCausalLM goes past OPTModel; positions count from the mask, in which the prompts are."""
    model, ids = language_model("OPTForCausalLM"), batch("opt")
    embedded = model.get_input_embeddings()(ids)
    method = PromptTuning(tokens=3).attach(model)
    prompt = method.grafts[0].prompt.expand(len(ids), -1, -1)
    with method.disabled(), torch.no_grad():
        expected = model(inputs_embeds=torch.cat([prompt, embedded], 1)).logits[:, 3:]
    assert distance(model(ids).logits, expected) < 1e-6


@pytest.mark.parametrize("family", ["gemma2", "bloom", "xglm"])
def test_attention_that_is_no_call_is_refused(family: str) -> None:
    with pytest.raises(ScionError, match="^PrefixTuning needs the role 'attend', which .* does not have"):
        PrefixTuning(tokens=2).attach(make(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "gemma3", "phi", "phi3", "opt",
                                    "bloom", "gpt_neo", "gpt_bigcode", "xglm"])
def test_a_thin_copy_that_keeps_all_is_the_block(family: str) -> None:
    """Whatever is fused, normed, turned or scaled: with a ratio of 1 nothing has changed its place."""
    model = make(family)
    block = dissect(model).blocks[1]
    keep, _ = prune(block, torch.arange(block.dim), lambda weight: weight.detach().double().abs(), 1)
    number = getattr(next((m for m in block.module.modules() if hasattr(m, "layer_idx")), None), "layer_idx", 1)
    copied = narrow(block, 1, keep, number=number)
    found: list[tuple[Any, Any]] = []
    handle = block.module.register_forward_hook(
        lambda module, args, kwargs, output: found.append((copied(*args, **kwargs), output)), with_kwargs=True)
    outputs(model, batch(family))
    handle.remove()
    [(ours, theirs)] = found
    ours, theirs = (part[0] if isinstance(part, tuple) else part for part in (ours, theirs))
    assert torch.equal(ours, theirs)


def test_all_tiny_decoders_are_here() -> None:
    causal = {family for family in EVERY_FAMILY if hasattr(make(family), "model")
              and dissect(make(family)).blocks[0].causal and family not in ("t5", "clip", "clip_text")}
    assert causal == set(HEADS.values())
