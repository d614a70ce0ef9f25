"""Checks of AdaLoRA: what it says of this baseline; its facts have no numbers of their own there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import peft
from core.anatomy import Anatomy
from core.peft import method_class
from tests.models import batch, make
from tests.papers.sites import bert_base, vit_b16
from tests.rows import WIDE, Row, Variant, target_shapes
from tests.toolkit import distance, outputs, randomize


def adalora_count(anatomy: Anatomy, method: Any) -> int:
    return sum(method.rank * (i + o + 1) for i, o in target_shapes(anatomy, method))


def budget_follows_formula() -> None:
    """AdaLoRA: a cubic fall from rank to target_rank a site; as many singular values are left, the most important."""
    method: Any = peft.method_class("AdaLoRA")(rank=4, target_rank=2, warmup=4, cooldown=6, interval=2)  # type: ignore[call-arg]
    model = make("timm_vit")
    method.attach(model)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.0)
    method.follow(optimizer, total=20)
    generator = torch.Generator().manual_seed(0)
    sites = len(method.grafts)
    with torch.no_grad():
        for graft in method.grafts:
            graft.E.normal_(generator=generator)
    for step in range(1, 21):
        for tensor in method.trainable().values():
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        optimizer.step()
        left = sum(int((graft.E != 0).sum()) for graft in method.grafts)
        share = 1 - (min(max(step, 4), 14) - 4) / 10
        wanted = int(2 * sites + 2 * sites * share**3)
        assert method.budget(step) == (wanted, step > 4 and (step >= 14 or step % 2 == 0))
        assert left == wanted or step < 14 and step % 2 or step <= 4 and left == 4 * sites


ROWS = {
    "AdaLoRA": Row(
        {"q, v": Variant({"rank": 4, "target_rank": 2}),
         "all": Variant({"rank": 3, "target_rank": 1, "alpha": 1, "warmup": 0, "cooldown": 1, "interval": 1, **WIDE})},
        trained=adalora_count,
        cards=(("bert_base", {}, 442_656),),
        bad=(({"rank": 0}, "rank 0"), ({"target_rank": 13}, "target_rank 13"), ({"interval": 0}, "interval 0"),
             ({"beta": 1.0}, "beta 1"), ({"targets": ("mlp.up", "block")}, "linear weight")),
        random=True, weights=True, operators=7, saved=0.8,
        schedule=budget_follows_formula, state=8,
        artifact={"rank": 1, "target_rank": 1},
    ),
}

AdaLoRA: Any = method_class("AdaLoRA")


@pytest.mark.parametrize(("model", "targets", "count"), [
    (bert_base, ("q", "v"), 442_656), (vit_b16, ("q", "v"), 442_656), (vit_b16, ("qkv",), 442_512)])
def test_counts(model: Any, targets: tuple[str, ...], count: int) -> None:
    assert AdaLoRA(rank=12, targets=targets).attach(model()).counts()["method"] == count


def test_start() -> None:
    """A and B are normal with deviation 0.02, E is zero, so that the start is the identity."""
    model, inputs = make("bert"), batch("bert")
    before = outputs(model, inputs)
    method = AdaLoRA(rank=12, targets=("q", "mlp.up")).attach(model)
    assert torch.equal(outputs(model, inputs), before)
    for graft in method.grafts:
        assert not graft.E.any() and graft.E.shape == (12, 1)
    values = torch.cat([t.detach().flatten() for graft in method.grafts for t in (graft.A, graft.B)])
    assert abs(float(values.mean())) < 1e-3 and abs(float(values.std()) - 0.02) < 1e-3


def test_equation() -> None:
    """alpha / rank B (E A) x, with the rank of the start whatever is left of it."""
    method = AdaLoRA(rank=6, alpha=3.0, targets=("mlp.up",)).attach(make("bert", dtype=torch.float64))
    randomize(method)
    generator = torch.Generator().manual_seed(0)
    for graft in method.grafts:
        with torch.no_grad():
            graft.E[2:] = 0
        x = torch.randn(5, graft.site.in_features, generator=generator, dtype=torch.float64)
        y = torch.randn(5, graft.site.out_features, generator=generator, dtype=torch.float64)
        expected = y + 3.0 / 6 * x @ (graft.B @ torch.diag(graft.E[:, 0]) @ graft.A).t()
        assert distance(graft.after(x, y), expected) < 1e-12


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_orthogonality(gamma: float) -> None:
    """gamma mean(|A A^T - I|, |B^T B - I|) over all A and B, with its gradient."""
    method = AdaLoRA(rank=4, gamma=gamma).attach(make("bert", dtype=torch.float64))
    randomize(method)
    found = method.loss_terms(None, None, None)
    eye = torch.eye(4, dtype=torch.float64)
    norms = [(m - eye).norm() for graft in method.grafts for m in (graft.A @ graft.A.t(), graft.B.t() @ graft.B)]
    expected = gamma * torch.stack(norms).mean()
    assert len(norms) == 8 and distance(found.detach(), expected.detach()) < 1e-12
    tensors = [tensor for graft in method.grafts for tensor in (graft.A, graft.B)]
    mine, theirs = (torch.autograd.grad(loss, tensors) for loss in (found, expected))
    assert all(distance(one, two) < 1e-10 for one, two in zip(mine, theirs, strict=True))


def test_budget() -> None:
    """As in the scripts for MNLI, with 24 sites: 12 ranks each until step 8,000, a cube, 8 each for the last 50,000."""
    method = AdaLoRA(rank=12, target_rank=8, warmup=8000, cooldown=50000, interval=100).attach(bert_base())
    method.total = 85_000
    assert method.budget(8000) == (288, False) and method.budget(35_000) == (192, True)
    assert method.budget(8100) == (int(192 + 96 * (1 - 100 / 27_000) ** 3), True)
    assert method.budget(21_500) == (192 + 12, True) and method.budget(21_550)[1] is False
    assert method.budget(84_999) == (192, True)
    steps = [method.budget(step)[0] for step in range(8000, 35_001, 500)]
    assert steps == sorted(steps, reverse=True)


class Follower:
    """The paper's importance and choice, on copies of a method's tensors."""

    def __init__(self, method: Any) -> None:
        self.method = method
        self.mean: dict[str, Tensor] = {}
        self.spread: dict[str, Tensor] = {}

    def see(self) -> None:
        """Importance of every number from its value and its gradient as they are now."""
        for name, tensor in self.method.module.named_parameters():
            found = (tensor.detach() * tensor.grad).abs()
            if name not in self.mean:
                self.mean[name], self.spread[name] = torch.zeros_like(found), torch.zeros_like(found)
            self.mean[name] = 0.85 * self.mean[name] + 0.15 * found
            self.spread[name] = 0.85 * self.spread[name] + 0.15 * (found - self.mean[name]).abs()

    def triplets(self) -> Tensor:
        """The worth of each triplet of the model."""
        score = {name: self.mean[name] * self.spread[name] for name in self.mean}
        sites = dict.fromkeys(name.rpartition(".")[0] for name in score)
        return torch.stack([score[f"{site}.E"][i, 0] + score[f"{site}.A"][i].mean() + score[f"{site}.B"][:, i].mean()
                            for site in sites for i in range(len(score[f"{site}.E"]))])


def test_importance_and_choice() -> None:
    """Seen after the optimizer's step with the gradients still there; the best of the whole model keep their E, the
    others' is zero, and may come back."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert", dtype=torch.float64)
    method = AdaLoRA(rank=4, target_rank=1, warmup=2, cooldown=8, interval=2, gamma=0.1).attach(model)
    optimizer = torch.optim.AdamW(method.trainable().values(), lr=2e-2)
    follower = Follower(method)
    randomize(method, size=0.3)
    choices, kept = [], []
    for step in range(1, 17):
        optimizer.zero_grad()
        loss = (model(inputs) - step % 3).square().mean()
        (loss + method.loss_terms(None, None, None)).backward()
        if step == 1:
            watch = optimizer.register_step_post_hook(lambda *_: follower.see())  # before the method's own
            method.follow(optimizer, total=16)
        optimizer.step()
        assert all(p.grad is not None for p in method.trainable().values())
        budget, chosen = method.budget(step)
        alive = torch.cat([graft.E.detach()[:, 0] != 0 for graft in method.grafts])
        if chosen:
            best = torch.zeros_like(alive)
            best[follower.triplets().topk(budget).indices] = True
            assert torch.equal(alive, best) and int(alive.sum()) == budget
            choices.append(alive)
        kept.append(int(alive.sum()))
    watch.remove()
    assert kept[:3] == [16] * 3 and kept[-1] == 4 and len(choices) == 11
    shares = [{int(part.sum()) for part in alive.split(4)} for alive in choices]
    assert any(len(share) > 1 for share in shares), "every site has as many: the choice is not over the whole model"
    revived = [bool((~one & two).any()) for one, two in zip(choices, choices[1:], strict=False)]
    assert any(revived), "no triplet came back"


def test_importance_is_peft_s() -> None:
    """The same worth of the triplets, and the same ones dropped, as in Hugging Face's allocator."""
    layer: Any = pytest.importorskip("peft.tuners.adalora.layer", reason="peft is not installed")
    from peft import AdaLoraConfig

    model = make("bert", dtype=torch.float64)
    method = AdaLoRA(rank=4, target_rank=2, warmup=2, cooldown=4, interval=1).attach(model)
    randomize(method, size=0.3)
    twin = nn.ModuleDict()
    for i, graft in enumerate(method.grafts):
        twin[str(i)] = nn.ModuleDict({f"lora_{letter}": nn.ParameterDict({"default": nn.Parameter(
            getattr(graft, letter).detach().clone())}) for letter in "ABE"})
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=4, deltaT=1, beta1=0.85, beta2=0.85, total_step=12)
    theirs = layer.RankAllocator(twin, config, "default")
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(method.trainable().values(), lr=0.0)
    method.follow(optimizer, total=12)
    left = []
    for step in range(1, 8):  # before the end, from which on the two differ: theirs keeps its last choice
        for i, graft in enumerate(method.grafts):
            for letter in "ABE":
                tensor = getattr(graft, letter)
                tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                twin[str(i)][f"lora_{letter}"]["default"].grad = tensor.grad.clone()  # type: ignore[index]
        optimizer.step()
        budget, _ = theirs.budget_schedule(step)
        assert method.budget(step)[0] == budget
        theirs.update_ipt(twin)
        if step > 2:
            theirs.mask_to_budget(twin, budget)
        for i, graft in enumerate(method.grafts):
            assert torch.equal(graft.E, twin[str(i)]["lora_E"]["default"])  # type: ignore[index]
        left.append(sum(int((graft.E != 0).sum()) for graft in method.grafts))
    assert left == [16, 16, 12, 10, 9, 8, 8]
