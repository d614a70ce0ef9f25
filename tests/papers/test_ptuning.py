"""Checks of PTuning: the network that makes the prompts, and what is left without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import load_adapter
from core.adapters.load import save_adapter
from core.peft import method_class
from tests.models import WIDTH, batch, make
from tests.papers.decoding import a_cache_changes_nothing, later_tokens_are_not_seen
from tests.rows import NO_ATTENTION, NO_PLACE_FOR_TOKENS, Row, Variant, prompts_count
from tests.toolkit import EVERYTHING, distance, outputs, randomize

ROWS = {
    "PTuning": Row(
        {"mlp": Variant({"tokens": 4, "hidden": 8}, learns={"tokens": 20}),
         "lstm": Variant({"tokens": 2, "hidden": 8, "encoder": "lstm"}, learns={"tokens": 20}),
         "folded": Variant({"tokens": 4, "hidden": 8}, lambda method: method.fold(),  # type: ignore[attr-defined]
                           learns={"tokens": 20})},
        trained=prompts_count,
        cards=(("bert_base", {}, 1_787_136), ("bert_base", {"encoder": "lstm"}, 27_174_144)),
        bad=(({"tokens": 0}, "tokens 0"), ({"encoder": "gru"}, "'gru'"), ({"hidden": 0}, "hidden 0")),
        random=True, commutes=None, operators=30, saved=1.2,
        absent=("test_irregular_mix", "test_no_graph_below_the_first_graft"),
        artifact={"tokens": 1, "hidden": 2},
        refused={**NO_ATTENTION, **NO_PLACE_FOR_TOKENS},
    ),
}

PTuning: Any = method_class("PTuning")


def prompts_of(method: Any) -> Tensor:
    return next(graft for graft in method.grafts if hasattr(graft, "values")).values().detach()


def _written_out(encoder: Any) -> Tensor:
    """MLP(e) with three maps, or MLP(LSTM(e)) with two layers in both directions, gate by gate."""
    state = encoder.embedding
    if encoder.lstm is not None:
        for layer in range(2):
            both = []
            for suffix in ("", "_reverse"):
                W, U, b, c = (getattr(encoder.lstm, f"{name}_l{layer}{suffix}")
                              for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
                h = cell = torch.zeros(U.shape[1])
                steps = []
                for x in state.flip(0) if suffix else state:
                    i, f, g, o = (W @ x + b + U @ h + c).chunk(4)
                    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(cell)
                    steps.append(h)
                both.append(torch.stack(steps[::-1] if suffix else steps))
            state = torch.cat(both, 1)
    maps = [layer for layer in encoder.mlp if isinstance(layer, nn.Linear)]
    for layer in maps[:-1]:
        state = torch.relu(state @ layer.weight.t() + layer.bias)
    return state @ maps[-1].weight.t() + maps[-1].bias


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_1_equation(encoder: str) -> None:
    """The prompts are the network's, and the model reads them as PromptTuning's."""
    model, twin, inputs = make("bert"), make("bert"), batch("bert")
    method = PTuning(tokens=4, encoder=encoder, hidden=8).attach(model)
    randomize(method, size=0.3)
    expected = _written_out(method.module.encoder).detach()
    assert distance(prompts_of(method), expected) < 1e-6
    prompts: Any = method_class("PromptTuning")(tokens=4).attach(twin)  # type: ignore[call-arg]
    with torch.no_grad():
        next(iter(prompts.trainable().values())).copy_(expected)
    assert distance(outputs(model, inputs), outputs(twin, inputs)) < 1e-6


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_1_the_network_is_peft_s(encoder: str) -> None:
    """The same tensors give the same prompts in Hugging Face's prompt encoder."""
    tuners: Any = pytest.importorskip("peft.tuners.p_tuning", reason="peft is not installed")
    method = PTuning(tokens=4, encoder=encoder, hidden=8).attach(make("bert"))
    config = tuners.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, token_dim=WIDTH, encoder_hidden_size=8,
        encoder_reparameterization_type=encoder.upper(), num_transformer_submodules=1)
    theirs: nn.Module = tuners.PromptEncoder(config)
    mine: Any = method.module.encoder
    states = {"embedding.weight": mine.embedding}
    states |= {f"mlp_head.{name}": tensor for name, tensor in mine.mlp.state_dict().items()}
    if mine.lstm is not None:
        states |= {f"lstm_head.{name}": tensor for name, tensor in mine.lstm.state_dict().items()}
    theirs.load_state_dict(states)
    assert sum(p.numel() for p in theirs.parameters()) == method.counts()["method"]
    with torch.no_grad():
        assert distance(prompts_of(method), theirs.eval()(torch.arange(4)[None])[0]) < 1e-6


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("family", ["bert", "llama", "timm_vit"])
def test_2_fold_leaves_the_prompts(family: str, encoder: str, tmp_path: Any) -> None:
    """The same function, tokens x dim to store, and they train on; files hold what is left."""
    model, inputs = make(family), batch(family)
    method = PTuning(tokens=4, encoder=encoder, hidden=8).attach(model)
    randomize(method, size=0.3)
    expected = outputs(model, inputs)
    method.fold()
    method.fold()
    folded = outputs(model, inputs)
    assert distance(folded, expected) < 1e-6
    assert method.counts()["method"] == method.counts()["stored"] == 4 * WIDTH
    model(inputs).square().sum().backward()
    prompt, = method.trainable().values()
    assert prompt.grad is not None and prompt.grad.any()
    save_adapter([method], tmp_path / "adapter")
    fresh = make(family)
    load_adapter(tmp_path / "adapter", fresh)
    assert torch.equal(outputs(fresh, inputs), folded)


@pytest.mark.parametrize("name", ["llama", "t5"] if EVERYTHING else ["llama"])
def test_3_generation(name: str) -> None:
    a_cache_changes_nothing(name, PTuning(tokens=3, hidden=8))


def test_4_causal() -> None:
    later_tokens_are_not_seen("llama", PTuning(tokens=3, hidden=8))
