"""Methods as callbacks of a user's own LightningModule, which knows nothing of Scion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from core import load_adapter
from core.errors import ScionError
from core.method import methods_on
from core.peft import BitFit, FullFineTuning, Houlsby, LoRA, PrefixTuning  # type: ignore[attr-defined]
from tests.models import WIDTH, batch, make
from tests.toolkit import CLASSES, Plain, distance, loader, outputs, same, seeded, snapshot, trainer

FAMILY = "ast"


def equal_states(one: Any, two: Any) -> bool:
    """Whether two optimizers' states agree bit for bit."""
    a, b = one.state_dict(), two.state_dict()
    return a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(b["state"][key][name]))
        for key, values in a["state"].items() for name, value in values.items())


def test_fit_trains_the_method_and_the_head_alone(tmp_path: Path) -> None:
    module, method = Plain(make(FAMILY)), LoRA(rank=2)
    base, head = snapshot(module.backbone), module.head.weight.detach().clone()
    fit = trainer(tmp_path, method, max_steps=5)
    fit.fit(module, loader(FAMILY))
    assert same(base, snapshot(module.backbone)) and not torch.equal(head, module.head.weight)
    assert all(bool(graft.B.any()) for graft in method.grafts)
    held = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in [*method.trainable().values(), *module.head.parameters()]}
    fit.test(module, loader(FAMILY), verbose=False)
    assert methods_on(module) == [method] and "test_loss" in fit.callback_metrics


@pytest.mark.parametrize("broken_at", [6, 4], ids=["between epochs", "within an epoch"])
def test_resume_is_exact(broken_at: int, tmp_path: Path) -> None:
    """k + k steps equal 2k, dropout included: weights, optimizer, schedule, losses and random states."""

    def run(checkpoint: Path | None) -> tuple[Plain, L.Trainer]:
        module = Plain(make(FAMILY))
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=broken_at, save_top_k=-1)
        fit = trainer(tmp_path, LoRA(rank=2, dropout=0.3), keep, max_steps=2 * broken_at, enable_checkpointing=True)
        fit.fit(module, loader(FAMILY), ckpt_path=checkpoint)
        return module, fit

    with seeded(0):
        whole, fit_whole = run(None)
    with seeded(1):
        resumed, fit = run(tmp_path / f"step={broken_at}.ckpt")
    assert resumed.losses == whole.losses[broken_at:]
    assert same(dict(whole.named_parameters()), dict(resumed.named_parameters()))
    assert equal_states(fit_whole.optimizers[0], fit.optimizers[0])
    one, two = (f.lr_scheduler_configs[0].scheduler.state_dict() for f in (fit_whole, fit))
    assert one == two


def test_resume_from_weights_only_starts_a_new_run_from_them(tmp_path: Path) -> None:
    module = Plain(make(FAMILY))
    fit = trainer(tmp_path, LoRA(rank=2), max_steps=3)
    fit.fit(module, loader(FAMILY))
    fit.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fresh, method = Plain(make(FAMILY)), LoRA(rank=2)
    trainer(tmp_path, method).test(fresh, loader(FAMILY), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert same(dict(module.named_parameters()), dict(fresh.named_parameters()))


def test_checkpoint_loads_without_a_trainer_and_exports(tmp_path: Path) -> None:
    module = Plain(make(FAMILY))
    fit = trainer(tmp_path, LoRA(rank=2), Houlsby(bottleneck=2), max_steps=3)
    fit.fit(module, loader(FAMILY))
    module.eval()
    fit.save_checkpoint(tmp_path / "run.ckpt")
    model, again, inputs = make(FAMILY), make(FAMILY), batch(FAMILY)
    methods = load_adapter(tmp_path / "run.ckpt", model)
    assert [type(method) for method in methods] == [LoRA, Houlsby]
    assert torch.equal(outputs(model, inputs), outputs(module.backbone, inputs))
    for method in methods:
        method.save(tmp_path / method.name)
        load_adapter(tmp_path / method.name, again)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


class Late(L.LightningModule):
    """Builds its backbone in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def configure_model(self) -> None:
        self.calls += 1
        if not hasattr(self, "backbone"):
            self.backbone = make(FAMILY)
            self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, samples: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(samples[0])), samples[1])

    def test_step(self, samples: tuple[Tensor, Tensor], index: int) -> None:
        self.log("loss", F.cross_entropy(self.head(self.backbone(samples[0])), samples[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def test_module_built_in_configure_model(tmp_path: Path) -> None:
    module, method = Late(), LoRA(rank=2)
    fit = trainer(tmp_path, method, max_steps=2)
    fit.fit(module, loader(FAMILY))
    assert method.attached and methods_on(module) == [method] and module.calls == 1
    assert any(bool(graft.B.any()) for graft in method.grafts)
    assert same(snapshot(make(FAMILY)), snapshot(module.backbone))
    fit.save_checkpoint(tmp_path / "late.ckpt")
    other = Late()
    trainer(tmp_path, LoRA(rank=2)).test(other, loader(FAMILY), ckpt_path=tmp_path / "late.ckpt", verbose=False)
    assert same(dict(module.named_parameters()), dict(other.named_parameters()))


class Towers(Plain):
    """Two backbones under names of its own."""

    def __init__(self) -> None:
        super().__init__(make(FAMILY))
        self.encoders = nn.ModuleDict({"left": self.backbone, "right": make(FAMILY, seed=1)})
        del self.backbone

    def training_step(self, samples: tuple[Tensor, Tensor], index: int) -> Tensor:
        features = self.encoders["left"](samples[0]) + self.encoders["right"](samples[0])
        return F.cross_entropy(self.head(features), samples[1])


def test_on_names_the_backbone(tmp_path: Path) -> None:
    module = Towers()
    left, right = LoRA(rank=2, on="encoders.left"), BitFit(on="encoders.right")
    fit = trainer(tmp_path, left, right, max_steps=2)
    fit.fit(module, loader(FAMILY))
    assert left.root is module.encoders["left"] and right.root is module.encoders["right"]
    fit.save_checkpoint(tmp_path / "towers.ckpt")
    state = torch.load(tmp_path / "towers.ckpt", weights_only=True)["state_dict"]
    owned = {f"{method.on}.{name}" for method in (left, right) for name in method.live_tensors()}
    assert {name for name in state if not name.endswith("_extra_state")} == owned | {"head.weight", "head.bias"}
    again = Towers()
    trainer(tmp_path, LoRA(rank=2, on="encoders.left"), BitFit(on="encoders.right"), max_steps=3).fit(
        again, loader(FAMILY), ckpt_path=tmp_path / "towers.ckpt")
    with pytest.raises(ScionError, match=r"on='encoders.lef'.*'encoders.left'"):
        trainer(tmp_path, LoRA(on="encoders.lef"), max_steps=1).fit(Towers(), loader(FAMILY))
    with pytest.raises(ScionError, match=r"neither .backbone nor .model.*encoders"):
        trainer(tmp_path, LoRA(), max_steps=1).fit(Towers(), loader(FAMILY))


def test_two_callbacks_of_one_class(tmp_path: Path) -> None:
    module = Plain(make(FAMILY))
    first, second = LoRA(rank=2, name="first"), LoRA(rank=3, targets=("mlp.up",), name="second")
    fit = trainer(tmp_path, first, second, max_steps=3)
    fit.fit(module, loader(FAMILY))
    assert methods_on(module) == [first, second] and first.state_key != second.state_key
    fit.save_checkpoint(tmp_path / "two.ckpt")
    model, inputs = make(FAMILY), batch(FAMILY)
    loaded = load_adapter(tmp_path / "two.ckpt", model)
    assert [method.name for method in loaded] == ["first", "second"]
    assert torch.equal(outputs(model, inputs), outputs(module.backbone.eval(), inputs))
    with pytest.raises(Exception, match="LoRA"):
        trainer(tmp_path, LoRA(), LoRA(), max_steps=1).fit(Plain(make(FAMILY)), loader(FAMILY))


class Deaf(Plain):
    """Uses the backbone without its last block."""

    def training_step(self, samples: tuple[Tensor, Tensor], index: int) -> Tensor:
        blocks: Any = self.backbone.model.layers  # type: ignore[union-attr]
        hidden = self.backbone.model.embeddings(samples[0])  # type: ignore[union-attr, operator]
        hidden = blocks[0](hidden)
        return F.cross_entropy(self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[:, 0]), samples[1])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [LoRA, Houlsby, PrefixTuning, BitFit, FullFineTuning])
def test_a_tensor_without_gradient_stops_the_run(method: Any, accumulate: int, tmp_path: Path) -> None:
    module = Deaf(make(FAMILY))
    fit = trainer(tmp_path, method(), max_steps=50, accumulate_grad_batches=accumulate)
    with pytest.raises(ScionError, match=rf"{method.__name__}: no gradient reaches .*layers.1|"
                                         rf"{method.__name__}: no gradient reaches .*\.1-") as stop:
        fit.fit(module, loader(FAMILY))
    assert fit.global_step <= 3 and "\n" not in str(stop.value)


def test_loading_is_strict_on_the_adapter(tmp_path: Path) -> None:
    module = Plain(make(FAMILY))
    fit = trainer(tmp_path, LoRA(rank=2), max_steps=1)
    fit.fit(module, loader(FAMILY))
    fit.save_checkpoint(tmp_path / "whole.ckpt")
    whole = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    adapter = next(name for name in whole["state_dict"] if name.endswith(".A"))
    for name, state in (
        (adapter, {k: v for k, v in whole["state_dict"].items() if k != adapter}),
        ("head.bias", {k: v for k, v in whole["state_dict"].items() if k != "head.bias"}),
        ("backbone.peft.LoRA.extra", {**whole["state_dict"], "backbone.peft.LoRA.extra": torch.zeros(1)}),
        (adapter, {**whole["state_dict"], adapter: torch.zeros(7, 7)}),
    ):
        torch.save({**whole, "state_dict": state}, tmp_path / "broken.ckpt")
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            trainer(tmp_path, LoRA(rank=2), max_steps=2).fit(
                Plain(make(FAMILY)), loader(FAMILY), ckpt_path=tmp_path / "broken.ckpt")
    with pytest.raises(ScionError, match="another base"):
        trainer(tmp_path, LoRA(rank=2), max_steps=2).fit(
            Plain(make(FAMILY, seed=1)), loader(FAMILY), ckpt_path=tmp_path / "whole.ckpt")
    with pytest.raises(RuntimeError, match="rank|size mismatch"):
        trainer(tmp_path, LoRA(rank=4), max_steps=2).fit(
            Plain(make(FAMILY)), loader(FAMILY), ckpt_path=tmp_path / "whole.ckpt")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("method", [LoRA, Houlsby, PrefixTuning, FullFineTuning])
def test_precision(method: Any, precision: Any, tmp_path: Path) -> None:
    """Adapters stay in float32 under either; a base that trains itself is what the precision makes it."""
    module, callback = Plain(make(FAMILY)), method()
    inputs = batch(FAMILY)
    fit = trainer(tmp_path, callback, max_steps=4, precision=precision)
    fit.fit(module, loader(FAMILY))
    half = precision == "bf16-true"
    assert all(torch.isfinite(torch.tensor(module.losses)))
    for name, tensor in callback.trainable().items():
        expected = torch.bfloat16 if half and not name.startswith("peft.") else torch.float32
        assert tensor.dtype == expected, name
    fit.save_checkpoint(tmp_path / "half.ckpt")
    model = make(FAMILY, dtype=torch.bfloat16 if half else torch.float32)
    load_adapter(tmp_path / "half.ckpt", model)
    trained = outputs(module.backbone.eval(), inputs.to(next(model.parameters()).dtype))
    assert distance(outputs(model, inputs.to(next(model.parameters()).dtype)), trained) < 1e-6


def test_fit_twice_with_new_trainers(tmp_path: Path) -> None:
    module, method = Plain(make(FAMILY)), LoRA(rank=2)
    for _ in range(2):
        trainer(tmp_path, method, max_steps=2).fit(module, loader(FAMILY))
    assert methods_on(module) == [method] and len(module.losses) == 4
    method.remove()
    assert same(snapshot(make(FAMILY)), snapshot(module.backbone)) and not hasattr(module.backbone, "peft")


def test_module_without_anatomy(tmp_path: Path) -> None:
    module = Plain(nn.Linear(3, WIDTH))
    with pytest.raises(ScionError, match=r"the anatomy of Linear is unknown"):
        trainer(tmp_path, LoRA(), max_steps=1).fit(module, loader(FAMILY))
