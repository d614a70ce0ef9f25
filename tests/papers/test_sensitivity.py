"""Checks of SensitivityTuning: what the paper says of it (SPT), and the cross-method checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from core import load_adapter
from core.anatomy import Anatomy, dissect
from core.errors import ScionError
from core.graft.sparse import SparseGraft
from core.peft import method_class
from core.peft.weights.lora import LoRAGraft
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import NOT_LINEAR, Row, Variant
from tests.toolkit import distance, outputs, randomize


def sensitivity_count(anatomy: Anatomy, method: Any) -> int:
    candidates = method.candidates(anatomy)
    spent = sum(count or method.rank * (candidates[name].in_features + candidates[name].out_features)
                for name, count in method.plan.items())
    assert 0.3 * method.budget < spent <= method.budget
    return spent


ROWS = {
    "SensitivityTuning": Row(
        {"both": Variant({"rank": 2, "count": 800, "batches": 0}, learns={"lr": 1e-2, "count": 2000}),
         "entries": Variant({"rank": 16, "density": 0.02, "ratio": 1.0, "vector_ratio": 0.0, "batches": 0},
                            random=False, learns={"lr": 2e-2})},
        trained=sensitivity_count,
        bad=(({"density": 0.0}, "density 0"), ({"density": 0.1, "count": 3}, "not both"), ({"count": 0}, "count 0"),
             ({"count": 10**9}, "1000000000"), ({"rank": 0}, "rank 0"), ({"ratio": 0.5}, "ratio 0.5"),
             ({"batches": -1}, "batches -1"), *NOT_LINEAR),
        random=True, operators=8, saved=0.97, stored=2.0, decays=True,
        artifact={"count": 300},
    ),
}

SensitivityTuning: Any = method_class("SensitivityTuning")


def _scores(method: Any, seed: int = 0) -> dict[str, Tensor]:
    """Sensitivities that differ from site to site by powers of two."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, site in method.candidates(dissect(method.root)).items():
        shape = site.matrix(site.full_weight).shape
        found[name] = torch.rand(shape, generator=generator) * 2.0 ** torch.randint(6, (), generator=generator)
    return found


def _costs(method: Any, scores: dict[str, Tensor], tau: int) -> dict[str, int]:
    """What the paper's rule costs with the ``tau`` largest entries, site by site, written out."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    owners = torch.cat([torch.full((score.numel(),), i) for i, score in enumerate(scores.values())])
    chosen = owners[everything.argsort(descending=True)[:tau]]
    costs: dict[str, int] = {}
    for i, (name, score) in enumerate(scores.items()):
        k = int((chosen == i).sum())
        if score.dim() == 1:
            costs[name] = len(score) if k / len(score) > 1 / method.vector_ratio else 0
        else:
            whole = method.rank * sum(score.shape)
            costs[name] = whole if k >= whole / method.ratio else k
    return costs


@pytest.mark.parametrize("count", [40, 300, 1500])
def test_rule_and_budget(count: int) -> None:
    """The plan is that of the largest tau within the budget: one entry more would exceed it. Entries where a matrix has
    few, LoRA where it has many, vectors as a whole or not at all."""
    method = SensitivityTuning(count=count, rank=3, ratio=6.0, vector_ratio=3.0).attach(make("timm_vit"))
    scores = _scores(method)
    method.choose(method.candidates(dissect(method.root)), lambda site: scores[site.name])
    tau, more = 0, sum(score.numel() for score in scores.values())
    while more - tau > 1:
        middle = (tau + more) // 2
        tau, more = (middle, more) if sum(_costs(method, scores, middle).values()) <= count else (tau, middle)
    costs, beyond = _costs(method, scores, tau), _costs(method, scores, tau + 1)
    assert {name: (3 * sum(scores[name].shape) if not n else n) for name, n in method.plan.items()} == {
        name: cost for name, cost in costs.items() if cost}
    assert sum(costs.values()) <= count < sum(beyond.values())
    method._rebuild()
    assert method.counts()["method"] == sum(costs.values())
    edge = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values[tau]
    for graft in method.grafts:
        score = scores[graft.site.name]
        if graft.site.role == "parameter":
            assert graft.index.tolist() == list(range(score.numel()))
        elif isinstance(graft, SparseGraft):
            assert graft.index.tolist() == (score > edge).flatten().nonzero().flatten().tolist()
        else:
            assert isinstance(graft, LoRAGraft)
    if count == 1500:
        kinds = {(type(graft), graft.site.role == "parameter") for graft in method.grafts}
        assert kinds == {(SparseGraft, False), (LoRAGraft, False), (SparseGraft, True)}


def _examples(number: int) -> list[tuple[Tensor, Tensor]]:
    images = batch("timm_vit", number, seed=4)
    return [(images[i:i + 1], torch.tensor([i % 4])) for i in range(number)]


def _loss_of(model: nn.Module) -> Any:
    head = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return lambda example: F.cross_entropy(model(example[0]) @ head, example[1])


def test_sensitivity_is_the_sum_of_squared_gradients() -> None:
    """Of batches' mean losses on the model without the method; what was trained is gone, flags and modes are back. q, k
    and v are rows of one weight, and chosen apart."""
    model, plain = make("timm_vit"), make("timm_vit")
    method = SensitivityTuning(count=600, rank=2, batches=3, batch_size=4).attach(model)
    randomize(method)
    examples = _examples(15)
    squares = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    loss = _loss_of(plain)
    for i in range(3):
        plain.zero_grad()
        torch.stack([loss(example) for example in examples[4 * i:4 * i + 4]]).mean().backward()
        for name, p in plain.named_parameters():
            squares[name] += 0 if p.grad is None else p.grad ** 2
    other = SensitivityTuning(count=600, rank=2).attach(make("timm_vit"))
    other.choose(other.candidates(dissect(other.root)),
                 lambda site: site.matrix(squares[site.weight_name]))
    model.train()
    flags = {name: p.requires_grad for name, p in model.named_parameters() if not name.startswith("peft.")}
    iterator = iter(examples)
    method.prepare(iterator, _loss_of(model))
    assert len(list(iterator)) == 3 and method.prepared and model.training
    assert flags == {name: p.requires_grad for name, p in model.named_parameters() if name in flags}
    assert method.plan == other.plan
    for name, index in method.selected.items():
        mine, theirs = set(index.tolist()), set(other.selected[name].tolist())
        assert len(mine & theirs) >= len(theirs) - 1  # of nearly equal ones rounding may choose another
    assert {name.partition(".")[2] for name in method.plan} > {"v"} and not any("qkv" in name for name in method.plan
                                                                                if name.endswith("weight"))
    assert torch.equal(outputs(model.eval(), batch("timm_vit")), outputs(plain, batch("timm_vit")))


def test_before_data_the_largest_weights() -> None:
    method = SensitivityTuning(count=200, rank=100, ratio=1.0, vector_ratio=0.0).attach(make("bert"))
    weights = {name: site.matrix(site.full_weight.detach()).abs()
               for name, site in method.candidates(dissect(method.root)).items()}
    edge = torch.cat([weight.flatten() for weight in weights.values()]).sort(descending=True).values[199]
    assert sum(method.plan.values()) == 200
    for graft in method.grafts:
        assert bool((weights[graft.site.name].flatten()[graft.index.long()] >= edge).all())


def test_in_a_run(tmp_path: Path) -> None:
    """FineTuner prepares before the first step, once: the optimizer then holds what was chosen and nothing else. A run
    resumed from a checkpoint ends as the unbroken one, to the bit; the adapter holds plan and values; merged it is the
    same function."""
    def spt() -> Any:
        return SensitivityTuning(count=500, rank=2, batches=2, batch_size=8)

    before = spt()
    whole = run(tmp_path, before, listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1))
    again = run(tmp_path, spt(), checkpoint=tmp_path / "step=5.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    backbone: Any = whole.backbone.eval()
    start = SensitivityTuning(count=500, rank=2)
    start.attach(type(backbone)())
    assert before.prepared and before.plan != start.plan
    held = [p for group in whole.trainer.optimizers[0].param_groups for p in group["params"]]
    head = {id(p) for p in whole.task.parameters()}
    assert [id(p) for p in held if id(p) not in head] == [id(t) for t in before.trainable().values()]
    assert all(bool(t.ne(0).any()) for t in before.trainable().values())

    inputs = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = outputs(backbone, inputs)
    before.save(tmp_path / "adapter")
    before.merge()
    assert distance(outputs(backbone, inputs), expected) < 1e-5
    before.unmerge()
    before.remove()
    loaded = load_adapter(tmp_path / "adapter", backbone)
    assert torch.equal(outputs(backbone, inputs), expected) and loaded.plan == before.plan


def test_1_budget_of_vit_b16() -> None:
    """The head and the embeddings are no candidates: 84.9 million entries of the blocks' maps, and their vectors."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    method = SensitivityTuning(count=400_000).attach(model)
    sizes = [site.full_weight.numel() if site.rows is None else site.in_features * site.out_features
             for site in method.candidates(dissect(model)).values() if site.role != "parameter"]
    assert sum(sizes) == 84_934_656 and len(sizes) == 72
    assert 399_900 < method.counts()["method"] <= 400_000


def test_refusals() -> None:
    method = SensitivityTuning(count=100).attach(make("timm_vit"))
    with pytest.raises(ScionError, match="no gradient came"):
        method.prepare([], _loss_of(method.root))
