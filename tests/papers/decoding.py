"""Checks on decoders that several methods share: what comes later is not seen, and a cache changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models import VOCABULARY, WIDTH, _llama_config, batch, make, spread, t5_config
from tests.toolkit import distance, outputs, randomize

LANGUAGE_MODELS = ("llama", "gpt2", "gpt_neox", "codegen", "t5")


def language_model(name: str) -> Any:
    """A tiny one that can generate; no id ends the text."""
    import transformers

    small: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    wide = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32, **small}
    with torch.random.fork_rng(devices=[]):
        if name == "llama":
            model: Any = transformers.LlamaForCausalLM(_llama_config(WIDTH))
        elif name == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**wide))
        elif name == "codegen":
            model = transformers.CodeGenForCausalLM(transformers.CodeGenConfig(n_ctx=32, rotary_dim=4, **wide))
        elif name == "gpt_neox":
            model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
                hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * WIDTH,
                max_position_embeddings=32, **small))
        else:
            model = transformers.T5ForConditionalGeneration(t5_config(WIDTH))
            model.generation_config.decoder_start_token_id = 0
    model.generation_config.eos_token_id = None
    return spread(model).eval()


def a_cache_changes_nothing(name: str, method: Any, beams: tuple[int, ...] = (1, 2)) -> None:
    """Greedy search and beams, one sample with padding on the left: the same ids, and the same scores, with a cache
    and without; a padded sample alone, without its padding, as well (where positions are not those of an encoder)."""
    model = language_model(name)
    method.attach(model)
    randomize(method, size=0.5)
    ids = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids[1, :2] = 0

    def generate(inputs: Tensor, visible: Tensor, cached: bool, width: int) -> Any:
        return model.generate(inputs, attention_mask=visible, max_new_tokens=4, do_sample=False, use_cache=cached,
                              num_beams=width, pad_token_id=0, return_dict_in_generate=True, output_logits=True)

    for width in beams:
        cached, whole = (generate(ids, mask, each, width) for each in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        assert all(distance(one, two) < 1e-4 for one, two in zip(cached.logits, whole.logits, strict=True))
        if name != "t5":
            alone = generate(ids[1:, 2:], mask[1:, 2:], True, width)
            assert torch.equal(alone.sequences[0], cached.sequences[1, 2:])
    with method.disabled():
        frozen = generate(ids, mask, True, 1)
    assert distance(frozen.logits[0], generate(ids, mask, True, 1).logits[0]) > 1e-3


def later_tokens_are_not_seen(family: str, method: Any, tokens: int = 12) -> None:
    """The states up to each position stay when the ids behind it change."""
    model: nn.Module = make(family)
    method.attach(model)
    randomize(method, size=0.5)
    inner: Any = model.model
    ids = batch(family)
    with torch.no_grad():
        states = inner(ids).last_hidden_state
        assert states.shape[1] == tokens
        for position in range(tokens - 1):
            other = ids.clone()
            other[:, position + 1:] = (other[:, position + 1:] * 7 + 3) % (VOCABULARY - 2) + 1
            changed = inner(other).last_hidden_state
            assert distance(changed[:, :position + 1], states[:, :position + 1]) < 1e-5
            assert not torch.equal(changed[:, position + 1], states[:, position + 1])
    assert outputs(model, ids).isfinite().all()
