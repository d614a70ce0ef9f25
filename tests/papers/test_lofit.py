"""Checks of LoFiT: the checks by their numbers there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import load_adapter
from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.graft import hidden_out
from core.peft import method_class
from tests.models import batch, make, spread
from tests.papers.training import Deep, run
from tests.rows import NO_ATTENTION, Row, Variant
from tests.toolkit import distance, outputs, same, snapshot, train


def lofit_count(anatomy: Anatomy, method: Any) -> int:
    sites = method.sites(anatomy)
    return sum(s.in_features for s in sites) if method.stage == "heads" else method.count * sites[0].heads.width


def to_offsets(method: Any) -> None:
    """As after a stage in which one head of each layer was scaled most, more in the first layers."""
    with torch.no_grad():
        for i, graft in enumerate(method.grafts):
            graft.A[i % len(graft.A)] += 1 / (1 + i)
    method.advance()


ROWS = {
    "LoFiT": Row(
        {"heads": Variant(learns={"lr": 5e-2}),
         "offsets": Variant({"heads": 2}, to_offsets, everywhere=True, learns={"heads": 4, "lr": 5e-2})},
        trained=lofit_count,
        cards=(("bert_base", {}, 9_216),),
        bad=(({"heads": 0}, "heads 0"), ({"heads": 999}, "heads 999"), ({"l1": -1.0}, "l1 -1"),
             ({"spread": -1.0}, "spread -1"), ({"targets": ("mlp.down",)}, "does not read heads")),
        random=True, operators=6, saved=0.9, stored=2.0,
        refused={**NO_ATTENTION},
    ),
}

LoFiT: Any = method_class("LoFiT")


def _llama_2(width: int, hidden: int, layers: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
                                  num_attention_heads=heads))


def _gemma_7b() -> nn.Module:
    from transformers import GemmaConfig, GemmaModel

    return GemmaModel(GemmaConfig())


def _language_model() -> Any:
    """A small Llama with grouped queries and an output layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
                         tie_word_embeddings=False, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        return spread(LlamaForCausalLM(config)).eval()


def _ids() -> Tensor:
    return torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(_ids()).logits


def _chosen(model: nn.Module, scores: dict[tuple[int, int], float], **options: Any) -> Any:
    """A method in its second stage, after scales with these norms (zero elsewhere)."""
    method = LoFiT(spread=0.0, **options).attach(model)
    with torch.no_grad():
        for (layer, head), norm in scores.items():
            method.grafts[layer].A[head] = norm / math.sqrt(method.grafts[layer].A.shape[1])
    method.advance()
    return method


@pytest.mark.parametrize(("build", "first", "kept", "second"), [
    (lambda: _llama_2(4096, 11008, 32, 32), 131_072, 32, 4_096),
    (lambda: _llama_2(4096, 11008, 32, 32), 131_072, 102, 13_056),
    (lambda: _llama_2(5120, 13824, 40, 40), 204_800, 48, 6_144), (_gemma_7b, 114_688, 16, 4_096)],
    ids=["7b", "7b, a tenth", "13b", "gemma"])
def test_1_counts(build: Any, first: int, kept: int, second: int) -> None:
    """Layers x heads x width in the first stage, chosen heads x width in the second; Gemma's heads are 256 wide."""
    with torch.device("meta"):
        model = build()
    method = LoFiT(heads=kept).attach(model)
    assert method.counts()["method"] == first
    shares = [kept // len(method.grafts) + (i < kept % len(method.grafts)) for i in range(len(method.grafts))]
    method.restructure({"stage": "offsets", "heads": {
        graft.site.name: share for graft, share in zip(method.grafts, shares, strict=True) if share}})
    assert method.counts()["method"] == second


def test_2_start() -> None:
    """A = 0 and v = 0 are the base to the bit; right after a random start no entry changes by 0.6 % of itself."""
    model = _language_model()
    base = _logits(model)
    method = LoFiT(spread=0.0, heads=3).attach(model)
    assert method.identity_at_start and torch.equal(_logits(model), base)
    method.advance()
    assert torch.equal(_logits(model), base)
    method.remove()
    for graft in LoFiT().attach(model).grafts:
        z = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
        change = graft.before(z) - z
        assert bool(change.any()) and bool((change.abs() <= 0.006 * z.abs()).all())


@pytest.mark.parametrize("stage", ["heads", "offsets"])
def test_3_to_4_merged(stage: str) -> None:
    """Into columns of W_o, or into a bias of W_o that Llama does not have: the same logits, and the same texts with
    keys and values kept; unmerging takes the bias away."""
    model = _language_model()
    keys, values, base = list(model.state_dict()), snapshot(model), _logits(model)
    method = LoFiT(heads=5, spread=0.2).attach(model)
    if stage == "offsets":
        method.advance()
    expected = _logits(model)
    text = model.generate(_ids(), max_new_tokens=12, do_sample=False, use_cache=True)
    assert distance(expected, base) > 1e-3
    sites = [graft.site for graft in method.grafts]
    method.merge()
    assert distance(_logits(model), expected) < 1e-5
    assert torch.equal(model.generate(_ids(), max_new_tokens=12, do_sample=False, use_cache=True), text)
    assert {key for key in model.state_dict() if key not in keys} == (
        {f"{site.path}.bias" for site in sites} if stage == "offsets" else set())
    with method.disabled():
        assert distance(_logits(model), base) < 1e-6
    method.unmerge()
    method.remove()
    assert list(model.state_dict()) == keys and same(values, snapshot(model))


def test_5_selection() -> None:
    """Exactly K pairs, by falling norm; of equal ones the lower layer first, then the lower head."""
    method = LoFiT(heads=5, spread=0.0).attach(_language_model())
    with torch.no_grad():
        for (layer, head), norm in {(2, 1): 3.0, (0, 3): 2.0, (1, 0): 2.0, (0, 1): 2.0}.items():
            method.grafts[layer].A[head, 0] = -norm
    assert method.best() == [("2.o", 1), ("0.o", 1), ("0.o", 3), ("1.o", 0), ("0.o", 0)]
    method.advance()
    assert {graft.site.name: graft.index.tolist() for graft in method.grafts} == {
        "0.o": [0, 1, 3], "1.o": [0], "2.o": [1]}
    with pytest.raises(ScionError, match="last"):
        method.advance()


def test_6_penalty() -> None:
    """Its gradient is l1 sign(A), whatever the batch and the number of heads; the second stage has none."""
    method = LoFiT(l1=5e-4, heads=3).attach(make("llama"))
    assert method.adds_loss
    method.loss_terms(None, None, None).backward()
    for graft in method.grafts:
        assert torch.equal(graft.A.grad, 5e-4 * graft.A.detach().sign())
    method.advance()
    assert not method.adds_loss and method.loss_terms(None, None, None) is None


def test_7_only_chosen_heads_move(tmp_path: Path) -> None:
    """The base stays to the bit; the file holds K x width numbers and the heads."""
    model = make("bert")
    start = snapshot(model)
    method = _chosen(model, {(0, 2): 1.0, (1, 0): 2.0, (1, 3): 3.0}, heads=3)
    train(model, method, "bert", steps=4)
    assert same(start, snapshot(model))
    for graft, heads in zip(method.grafts, ([2], [0, 3]), strict=True):
        assert graft.index.tolist() == heads
        offset = graft.offset.detach().view(4, 8)
        assert bool(offset[heads].ne(0).all()) and not offset[[h for h in range(4) if h not in heads]].any()
    assert method.counts() == {"method": 24, "norms": 0, "head": 0, "stored": 27}
    method.save(tmp_path)
    fresh, inputs = make("bert"), batch("bert")
    load_adapter(tmp_path, fresh)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


def test_8_grouped_queries() -> None:
    """An offset of each query head beside half as many keys and values, whose cache keeps its shape."""
    model = _language_model()
    with torch.no_grad():
        shape = model(_ids(), use_cache=True).past_key_values.layers[1].keys.shape
        method = _chosen(model, {(1, 3): 1.0}, heads=1)
        method.grafts[0].v.fill_(0.5)
        found = model(_ids(), use_cache=True).past_key_values.layers
    assert found[1].keys.shape == found[1].values.shape == shape == (2, 2, 9, 8)
    assert method.grafts[0].offset.view(4, 8).sum(1).tolist() == [0, 0, 0, 4]


def test_9_locality() -> None:
    """An offset in layer l leaves what comes before it as it was, and changes what comes behind."""
    model, inputs = make("llama"), batch("llama")
    blocks = [block.module for block in dissect(model).blocks]
    seen: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(hidden_out(out)))
    outputs(model, inputs)
    method = _chosen(model, {(1, 0): 1.0}, heads=1)
    with torch.no_grad():
        method.grafts[0].v.fill_(0.5)
    outputs(model, inputs)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[1], seen[3])


def test_10_preference_loss_begins_at_ln_2() -> None:
    """The reference is the model with the method off: the log ratio is 0 at v = 0, and the loss ln 2."""
    model = _language_model()
    method = _chosen(model, {}, heads=2)

    def log_probability(ids: Tensor) -> Tensor:
        logits = model(ids).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).sum((1, 2))

    better, worse = _ids()
    with torch.no_grad(), method.disabled():
        reference = [log_probability(ids[None]) for ids in (better, worse)]
    ratios = [log_probability(ids[None]) - base for ids, base in zip((better, worse), reference, strict=True)]
    assert not any(bool(ratio.any()) for ratio in ratios)
    loss = -F.logsigmoid(0.5 * (ratios[0] - ratios[1])).mean()
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    loss.backward()
    assert all(bool(graft.v.grad.any()) for graft in method.grafts)


def _steps(model: nn.Module, method: Any) -> None:
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=method.suggested["lr"])
    inputs = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()


def test_11_second_stage_is_reproducible(tmp_path: Path) -> None:
    """From one file of the first stage's end, twice: the same vectors, to the bit; another seed gives others."""
    first = LoFiT(heads=4)
    run(tmp_path, first, steps=4)
    first.advance()
    first.save(tmp_path / "stage")
    found = []
    for _ in range(2):
        backbone = Deep()
        backbone.load_state_dict({name: tensor for name, tensor in first.root.state_dict().items()
                                  if not name.startswith("peft.")})
        again = load_adapter(tmp_path / "stage", backbone)
        _steps(backbone, again)
        found.append(again.tensors())
    assert same(*found)
    assert first.suggested["lr"] == 1e-2 and LoFiT(lr=1e-4).suggested["lr"] == 1e-4


def test_bias_only_where_it_is_needed() -> None:
    """BERT's own bias takes the shift: W_o v is added to it."""
    model = make("bert", dtype=torch.float64)
    before = model.model.encoder.layer[1].attention.output.dense.bias.detach().clone()  # type: ignore
    method = _chosen(model, {(1, 2): 1.0}, heads=1)
    vector = torch.linspace(-1, 1, 8, dtype=torch.float64)
    with torch.no_grad():
        method.grafts[0].v.copy_(vector)
    keys = {key for key in model.state_dict() if not key.startswith("peft.")}
    method.merge()
    dense: Any = model.model.encoder.layer[1].attention.output.dense  # type: ignore
    torch.testing.assert_close(dense.bias.detach(), before + dense.weight.detach()[:, 16:24] @ vector)
    assert set(model.state_dict()) == keys
