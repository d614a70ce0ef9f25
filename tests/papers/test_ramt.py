"""Checks of RAMT: the checks by their numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from core import dissect, load_adapter
from core.peft import method_class
from core.peft.selection.ramt import MaskGraft, dropped
from tests.models import batch, make
from tests.papers.training import run
from tests.rows import Row, Variant, target_shapes
from tests.toolkit import outputs, randomize

ROWS = {
    "RAMT": Row(
        {"attention": Variant(learns={"lr": 1e-2}),
         "mlp": Variant({"targets": ("mlp.up", "mlp.down"), "layers": (-1,), "l2": 0.0, "drop": 1.0},
                        learns={"lr": 1e-2})},
        trained=lambda anatomy, method: sum(i * o for i, o in target_shapes(anatomy, method)),
        cards=(("vit_b16", {}, 28_311_552),),
        bad=(({"drop": 1.5}, "drop 1.5"), ({"l2": -1.0}, "l2 -1"), ({"teacher": "now"}, "'now'"),
             ({"targets": ("mlp.up", "block")}, "linear weight"), ({"targets": ("mlp.upp",)}, "'mlp.up'")),
        stopped=(".scores",), operators=6, saved=0.96, decays=False, without_attention={"targets": ("mlp.down",)},
        absent=("test_gradcheck",),  # no gradient is the function's derivative: tests/papers has the one it should be
        artifact={"targets": ("o",)},
    ),
}

RAMT: Any = method_class("RAMT")
ATTENTION, CONVOLUTION, MLP = ("q", "k", "v", "o"), ("patch_embed",), ("mlp.up", "mlp.down")


def _vit() -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224", num_classes=0)


@pytest.mark.parametrize(("targets", "count"), [(ATTENTION, 28_311_552), (ATTENTION + CONVOLUTION, 28_901_376),
                                                (("qkv", "o", "patch_embed"), 28_901_376),
                                                (ATTENTION + CONVOLUTION + MLP, 85_524_480)])
def test_1_counts(targets: tuple[str, ...], count: int) -> None:
    assert RAMT(targets=targets).attach(_vit()).counts()["method"] == count


def test_2_stored_bytes() -> None:
    """28,901,376 scores are stored in 3,612,672 bytes."""
    method = RAMT(targets=ATTENTION + CONVOLUTION).attach(_vit())
    assert sum(tensor.numel() * tensor.element_size() for tensor in method.tensors().values()) == 3_612_672


def test_3_identity_at_start() -> None:
    model, inputs = make("timm_vit"), batch("timm_vit")
    before = outputs(model, inputs)
    method = RAMT(targets=ATTENTION + CONVOLUTION + MLP).attach(model)
    assert torch.equal(outputs(model, inputs), before)
    assert all(bool(graft.mask.all()) for graft in method.grafts)


def test_4_gradient_of_the_scores() -> None:
    """dL/dM = dL/dW' * W, also where the weight is masked; W has none."""
    model, inputs = make("bert", dtype=torch.float64), batch("bert", dtype=torch.float64)
    method = RAMT(targets=("mlp.up",)).attach(model)
    randomize(method, size=0.02)
    twin = make("bert", dtype=torch.float64)
    for graft in method.grafts:
        assert 0.2 < float((graft.mask == 0).double().mean()) < 0.6
        twin.get_parameter(graft.site.weight_name).data *= graft.mask.detach()
    model(inputs).pow(2).sum().backward()
    twin(inputs).pow(2).sum().backward()
    for graft in method.grafts:
        dense = twin.get_parameter(graft.site.weight_name).grad
        torch.testing.assert_close(graft.scores.grad, dense * graft.site.full_weight, rtol=1e-10, atol=1e-12)
        assert graft.site.full_weight.grad is None


def test_5_nothing_can_be_masked_before_63_steps() -> None:
    method = RAMT().attach(make("timm_vit"))
    optimizer = torch.optim.Adam(method.param_groups(), lr=method.suggested["lr"])
    for step in range(1, 65):
        for scores in method.scores:
            scores.grad = torch.ones_like(scores)
        optimizer.step()
        masked = [bool((graft.mask == 0).any()) for graft in method.grafts]
        assert not any(masked) if step <= 62 else step < 64 or all(masked)


def test_6_gradient_dropout() -> None:
    """Agreeing gradients stay; opposite ones of equal size are dropped half of the time, others in the proportion of
    their sizes; drop 0 keeps all, drop 0.3 shrinks to 0.7."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1_000_000, generator=generator)
    draw = torch.rand(1_000_000, generator=generator)
    assert torch.equal(dropped(one, one, draw, 1.0), one)
    assert torch.equal(dropped(one, -3 * one, draw, 0.0), one)
    assert float((dropped(one, -one, draw, 1.0) != 0).float().mean()) == pytest.approx(0.5, abs=0.002)
    assert float((dropped(one, -3 * one, draw, 1.0) != 0).float().mean()) == pytest.approx(0.25, abs=0.002)
    conflict = dropped(one, -one, draw, 0.3)
    torch.testing.assert_close(conflict, torch.where(conflict == one, one, 0.7 * one))
    assert not dropped(torch.zeros(5), torch.ones(5), torch.full((5,), 0.99), 1.0).any()


def test_7_regulariser() -> None:
    """Its derivative at the start is l2 / sqrt(numel) for each score, and pushes down."""
    method = RAMT(drop=0.0, targets=("o",)).attach(make("timm_vit"))
    term = method.loss_terms(None, None, torch.zeros(1))
    term.backward()
    for scores in method.scores:
        torch.testing.assert_close(scores.grad, torch.full_like(scores, 1e-4 / scores.numel() ** 0.5))


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 1), (7, 9)])
def test_8_bits(shape: tuple[int, int]) -> None:
    """The round trip for sizes that fill no byte; the first bit is the lowest."""
    mask = MaskGraft(dissect(make("timm_vit")).sites("o")[0])
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    parts = mask.pack(scores)
    assert parts["bits"].numel() == (scores.numel() + 7) // 8 and parts["bits"].dtype == torch.uint8
    assert int(parts["bits"][0]) & 1 == int(scores[0, 0] > 5e-3)
    back = torch.zeros(*shape)
    mask.unpack(parts, back)
    assert torch.equal(back > 5e-3, scores > 5e-3) and torch.equal(mask.pack(back)["bits"], parts["bits"])


def test_8_a_file_computes_the_same(tmp_path: Path) -> None:
    model, inputs = make("timm_vit"), batch("timm_vit")
    method = RAMT().attach(model)
    randomize(method, size=0.02)
    method.save(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(s.numel() for s in method.scores) // 8
    other = make("timm_vit")
    load_adapter(tmp_path, other)
    assert torch.equal(outputs(other, inputs), outputs(model, inputs))


def test_9_only_scores_are_trained(tmp_path: Path) -> None:
    """And the teacher is what it was: the model with its masks off."""
    module = run(tmp_path, RAMT(lr=1e-2))
    trained = {name for name, p in module.backbone.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith(".scores") for name in trained)
    method, images = module.methods[0], torch.randn(4, 3, 16, 16)
    with method.disabled(), torch.no_grad():
        teacher = module.backbone(images)
    method.remove()
    with torch.no_grad():
        assert torch.equal(module.backbone.eval()(images), teacher)


def test_10_the_threshold_itself_is_masked() -> None:
    method = RAMT(targets=("o",)).attach(make("timm_vit"))
    with torch.no_grad():
        method.scores[0].fill_(5e-3)
    assert not method.grafts[0].mask.any()


@pytest.mark.parametrize("teacher_of", ["start", "current"])
def test_two_gradients_equal_manual_ones(teacher_of: str, tmp_path: Path) -> None:
    """What the Trainer's hooks combine is what two explicit backward passes give, over two micro-batches; the teacher's
    head is the one that training began with, or as it is."""
    class Watch(Callback):
        first: dict[str, Tensor] = {}

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.first = {name: p.detach().clone() for name, p in module.named_parameters() if "peft" not in name}

        seen: list[tuple[Any, Any]] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            method = module.methods[0]
            wanted = [torch.zeros_like(s) for s in method.scores], [torch.zeros_like(s) for s in method.scores]
            for images, labels in self.batches:
                out = module(images)
                with torch.no_grad(), method.disabled():
                    head = self.first if teacher_of == "start" else {}
                    teacher = torch.func.functional_call(module, head, (images,)).softmax(-1)
                for total, loss in zip(wanted, (F.cross_entropy(out, labels) + 1e-4 * sum(
                        s.norm() for s in method.scores), F.cross_entropy(out, teacher)), strict=True):
                    for sum_, part in zip(total, torch.autograd.grad(loss, method.scores, retain_graph=True),
                                          strict=True):
                        sum_ += part / 2
            from core.random_state import seeded

            with seeded(method.seed, method.name, method.steps):
                expected = [dropped(a, b, torch.rand(a.shape), 1.0) for a, b in zip(*wanted, strict=True)]
            self.seen.append((expected, [s.grad.clone() for s in method.scores]))
            self.batches = []

        batches: list[Any] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            self.batches = [*self.batches, batch]

    watch = Watch()
    run(tmp_path, RAMT(drop=1.0, lr=1e-2, teacher=teacher_of), steps=4, listen=watch, accumulate_grad_batches=2)
    assert len(watch.seen) == 4
    for expected, found in watch.seen:
        for one, two in zip(expected, found, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)
        assert any(bool((two == 0).any()) for two in found)


def test_resumed_run_equals_the_unbroken_one(tmp_path: Path) -> None:
    whole = run(tmp_path, RAMT(lr=1e-2), listen=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5,
                                                               save_top_k=-1))
    again = run(tmp_path, RAMT(lr=1e-2), checkpoint=tmp_path / "step=5.ckpt")
    for (name, one), two in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_sparsity_by_layer() -> None:
    """As shares of the masked weights, of all parameters, and of each layer's; a run records them."""
    model = make("timm_vit")
    total = sum(p.numel() for p in model.parameters())
    method = RAMT().attach(model)
    assert method.figures() == {"sparsity": 0.0, "sparsity_of_all": 0.0, "sparsity_by_layer": {"0": 0.0, "1": 0.0}}
    [graft] = [graft for graft in method.grafts if graft.site.name == "1.o"]
    with torch.no_grad():
        graft.scores[:16] = 0.0
    figures = method.figures()
    assert figures["sparsity_by_layer"] == {"0": 0.0, "1": 16 * 32 / (4 * 32 * 32)}
    assert figures["sparsity"] == 16 * 32 / (8 * 32 * 32) and figures["sparsity_of_all"] == 16 * 32 / total
