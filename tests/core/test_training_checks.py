"""What goes wrong silently in other people's modules, loops and callbacks is refused, or mended."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn

from core import checkpoint_activations, load_adapter, load_method
from core.anatomy import BlockDescription, Description, family
from core.compose import Route
from core.errors import ScionError
from core.method.training_checks import check_model
from core.peft import (  # type: ignore[attr-defined]
    LTSFT,
    BitFit,
    FullFineTuning,
    HalfFineTuning,
    Houlsby,
    LinearProbe,
    LoRA,
)
from tests.models import batch, make
from tests.toolkit import Plain, distance, loader, outputs, same, seeded, snapshot, trainer

FAMILY = "timm_vit"


def vit() -> Any:
    return make(FAMILY)


def fitted(folder: Path, method: Any, module: Plain | None = None, **options: Any) -> tuple[Plain, L.Trainer]:
    module = module or Plain(make(FAMILY))
    fit = trainer(folder, method, **{"max_steps": 4, **options})
    fit.fit(module, loader(FAMILY))
    return module, fit


# ------------------------------------------------------------------------------------------------- one callback


@pytest.mark.parametrize("make_method", [
    lambda: LoRA(rank=2), lambda: FullFineTuning(), lambda: Route([LoRA(rank=2, name="a")])])
def test_a_callback_that_stands_elsewhere_is_refused(make_method: Any, tmp_path: Path) -> None:
    method = make_method()
    fitted(tmp_path, method)
    other = Plain(make(FAMILY))
    before = snapshot(other)
    with pytest.raises(ScionError, match=r"stands on another model .* remove\(\)"):
        fitted(tmp_path, method, other)
    assert same(before, snapshot(other))


def test_a_copy_of_a_callback_belongs_to_the_copied_model(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    fitted(tmp_path, method)
    with pytest.raises(ScionError, match="stands on another model"):
        fitted(tmp_path, copy.deepcopy(method), Plain(make(FAMILY)))


def test_a_removed_callback_goes_to_the_next_module(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    module, _ = fitted(tmp_path, method)
    method.remove()
    other, _ = fitted(tmp_path, method)
    assert method.root is other.backbone and not hasattr(module.backbone, "peft")
    assert any(bool(graft.B.any()) for graft in method.grafts)


def test_a_backbone_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    module, _ = fitted(tmp_path, method)
    module.backbone = make(FAMILY)
    with pytest.raises(ScionError, match="stands on another model"):
        fitted(tmp_path, method, module)


# ------------------------------------------------------------------------------------------------- the optimizer


class Early(Plain):
    """Makes its optimizer in ``__init__``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.early = [torch.optim.SGD(self.parameters(), 0.1)]

    def configure_optimizers(self) -> Any:
        return self.early[0]


class HeadAlone(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), 0.1)


class NoVectors(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad and p.dim() > 1], 0.1)


@pytest.mark.parametrize(("module_class", "method", "reason"), [
    (Early, LoRA(rank=2), "before the method was attached"), (HeadAlone, LoRA(rank=2), "peft.LoRA"),
    (HeadAlone, BitFit(), "configure_optimizers"), (NoVectors, Houlsby(bottleneck=2), "has others of the method's")])
def test_an_optimizer_without_the_tensors_is_refused(module_class: Any, method: Any, reason: str, tmp_path: Path
                                                     ) -> None:
    with pytest.raises(ScionError, match=f"no optimizer has .*{reason}"):
        fitted(tmp_path, method, module_class(make(FAMILY)))


def test_nothing_is_refused_that_has_nothing_to_train(tmp_path: Path) -> None:
    fitted(tmp_path, LinearProbe(), HeadAlone(make(FAMILY)))
    frozen = LoRA(rank=2, trainable=False)
    fitted(tmp_path, [frozen][0], HeadAlone(make(FAMILY)))
    assert frozen.attached


class Waits(Plain):
    """The method waits at a learning rate of zero while the head trains."""

    def configure_optimizers(self) -> Any:
        head, rest = [*self.head.parameters()], [p for p in self.backbone.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": head}, {"params": rest, "lr": 0.0}], 0.1)


def test_a_rate_of_zero_for_a_while_is_no_missing_gradient(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    fitted(tmp_path, method, Waits(make(FAMILY)), max_steps=40)
    assert not any(bool(graft.B.any()) for graft in method.grafts)


# ------------------------------------------------------------------------------------------------- plain loops


def loop(model: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        model(batch(FAMILY)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_plain_loop_is_checked() -> None:
    model, method = make(FAMILY), LoRA(rank=2)
    early = torch.optim.SGD(model.parameters(), 0.1)
    method.attach(model)
    with pytest.raises(ScionError, match="no optimizer has .*made before"):
        method.check_training(early)
    optimizer = torch.optim.SGD([*method.trainable().values()], 0.1)
    method.check_training(optimizer)
    loop(model, optimizer, 5)
    assert all(bool(graft.B.any()) for graft in method.grafts) and not optimizer._optimizer_step_pre_hooks


class Unread(nn.Module):
    """Has a map that its forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"used": nn.Linear(8, 8), "unread": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["used"](x)


@family(f"{__name__}:Unread")
def unread(model: Any) -> Description:
    return Description([BlockDescription("block", 8, None, {"mlp.up": "used", "mlp.down": "unread"})], {}, final="")


def test_a_plain_loop_hears_of_gradients_that_do_not_come() -> None:
    method = LoRA(rank=2, targets=["mlp.up", "mlp.down"])
    model = Unread()
    method.attach(model)
    optimizer = torch.optim.SGD([*method.trainable().values()], 0.1)
    method.check_training(optimizer)
    with pytest.raises(ScionError, match="no gradient reaches .*down"):
        for _ in range(5):
            model(torch.randn(2, 8)).sum().backward()
            optimizer.step()
    with pytest.raises(ScionError, match="no gradient reaches .*down"):  # behind a backward pass it tells at once
        method.check_training(optimizer)


# ------------------------------------------------------------------------------------------------- a head beside


class Two(Plain):
    """The commonest layout: ``self.model`` and ``self.head``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.model = self.backbone
        del self.backbone
        self.__dict__["backbone"] = self.model
        self.norm = nn.BatchNorm1d(self.head.in_features)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(outputs(self.model, x)))


def trained_two(folder: Path) -> tuple[Two, LoRA]:
    with seeded(3):
        module, method = Two(make(FAMILY)), LoRA(rank=2)
        fit = trainer(folder, method, max_steps=4)
        fit.fit(module, loader(FAMILY))
        module.norm.running_mean.add_(0.5)  # type: ignore[operator, union-attr]
        fit.save_checkpoint(folder / "two.ckpt")
    return module.eval(), method


def test_a_head_beside_the_backbone_comes_back_with_the_module(tmp_path: Path) -> None:
    module, method = trained_two(tmp_path)
    method.save(tmp_path / "adapter", module)
    for source in ("two.ckpt", "adapter"):
        other = Two(make(FAMILY))
        nn.init.normal_(other.head.weight)
        loaded = load_adapter(tmp_path / source, other)
        assert loaded.root is other.model
        assert distance(other.eval().logits(batch(FAMILY)), module.logits(batch(FAMILY))) == 0


def test_a_head_that_is_not_loaded_or_saved_is_named(tmp_path: Path) -> None:
    _, method = trained_two(tmp_path)
    with pytest.warns(UserWarning, match=r"head.bias.* not loaded into it; give load_adapter the LightningModule"):
        load_adapter(tmp_path / "two.ckpt", make(FAMILY))
    with pytest.warns(UserWarning, match=r"head.weight.*not saved: method.save\(folder, module\)"):
        method.save(tmp_path / "alone")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(tmp_path / "alone", make(FAMILY))


def test_another_head_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    trained_two(tmp_path)
    other = Two(make(FAMILY))
    other.head = nn.Linear(other.head.in_features, 7)
    before = snapshot(other)
    with pytest.raises(ScionError, match=r"head.weight is \[\d+, \d+\] in the file, \[7, \d+\] here"):
        load_adapter(tmp_path / "two.ckpt", other)
    assert same(before, snapshot(other)) and not hasattr(other.model, "peft")


# ------------------------------------------------------------------------------------------------- buffers that move


class Small(nn.Module):
    """Two convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.layers = nn.ModuleList(
                nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer["norm"](layer["conv"](x)))  # type: ignore[index]
        return x.mean((2, 3))


@family(f"{__name__}:Small")
def small(model: Any) -> Description:
    roles: dict[str, Any] = {"conv": "conv", "norm": "norm"}
    return Description([BlockDescription(f"layers.{i}", 3, None, roles) for i in range(2)], {}, final="")


def stirred(method: Any) -> tuple[Small, Tensor]:
    """A model that was trained for some steps, and its output."""
    model = Small()
    method.attach(model)
    model.train()
    optimizer = torch.optim.SGD([*method.trainable().values()], 0.01)
    for step in range(3):
        with seeded(step):
            model(3 + torch.randn(8, 3, 6, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model, model(pictures())


def pictures() -> Tensor:
    with seeded(9):
        return torch.randn(4, 3, 6, 6)


@pytest.mark.parametrize("make_method", [
    lambda: FullFineTuning(), lambda: HalfFineTuning(interval=None), lambda: LTSFT(density=0.2),
    lambda: LoRA(rank=1, targets=["conv"], backbone_mode="train")])
def test_running_statistics_are_saved_loaded_and_put_back(make_method: Any, tmp_path: Path) -> None:
    plain = Small().eval()(pictures())
    method = make_method()
    model, expected = stirred(method)
    assert distance(expected, plain) > 0.01
    before = snapshot(model)
    with method.disabled():
        assert torch.equal(model(pictures()), plain)
        model.train()
        model(pictures())  # moves neither what is in use nor the start
        model.eval()
        assert torch.equal(model(pictures()), plain) or distance(model(pictures()), plain) > 0
    assert same(before, snapshot(model)) and torch.equal(model(pictures()), expected)
    with method.disabled():
        assert torch.equal(model(pictures()), plain)
    method.save(tmp_path / "adapter")
    other = Small().eval()
    loaded = load_adapter(tmp_path / "adapter", other)
    assert torch.equal(other(pictures()), expected)
    loaded.remove()
    assert torch.equal(other(pictures()), plain) and same(Small().state_dict(), other.state_dict())
    method.remove()
    assert torch.equal(model(pictures()), plain)


def test_running_statistics_of_a_trained_adapter_stand_still(tmp_path: Path) -> None:
    """As an entry, frozen: they come from its file, no forward moves them, and its new file holds them again."""
    method: Any = FullFineTuning()
    model, _ = stirred(method)
    method.save(tmp_path / "first")
    other, images = Small(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    before = other.eval()(images)
    entry = load_method(tmp_path / "first").attach(other)
    expected = model.eval()(images)
    assert torch.equal(other.eval()(images), expected)
    other.train()(images)
    assert torch.equal(other.eval()(images), expected)
    entry.save(tmp_path / "second")
    third = Small()
    load_adapter(tmp_path / "second", third)
    assert torch.equal(third.eval()(images), expected)
    entry.remove()
    assert torch.equal(other.eval()(images), before)


def test_running_statistics_are_in_checkpoints(tmp_path: Path) -> None:
    class Wrapped(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Small()

        def training_step(self, samples: Any, index: int) -> Tensor:
            return self.backbone(3 + samples[0]).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 3, 6, 6)), 4)
    module, method = Wrapped(), FullFineTuning()
    fit = trainer(tmp_path, method, max_steps=4)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "run.ckpt")
    other = Wrapped()
    again = trainer(tmp_path, FullFineTuning(), max_steps=4)
    again.fit(other, data, ckpt_path=tmp_path / "run.ckpt")
    assert same(module.state_dict(), other.state_dict()) and "backbone.layers.0.norm.running_mean" in other.state_dict()
    model = Small()
    load_adapter(tmp_path / "run.ckpt", model)
    assert torch.equal(model.eval()(pictures()), module.eval().backbone(pictures()))


# ------------------------------------------------------------------------------------------------- unfrozen later


class Unfreezes(Plain):
    """Trains the backbone's last norm too."""

    def configure_optimizers(self) -> Any:
        backbone: Any = self.backbone
        backbone.model.norm.requires_grad_(True)
        return super().configure_optimizers()


def test_what_is_unfrozen_later_is_kept(tmp_path: Path) -> None:
    method = LoRA(rank=2)
    module, fit = fitted(tmp_path, method, Unfreezes(make(FAMILY)))
    fit.save_checkpoint(tmp_path / "run.ckpt")
    fresh = Plain(make(FAMILY))
    trainer(tmp_path, LoRA(rank=2)).test(fresh, loader(FAMILY), ckpt_path=tmp_path / "run.ckpt", verbose=False)
    there: Any = fresh.backbone
    assert distance(there.model.norm.weight, vit().model.norm.weight) > 0
    assert same(dict(module.named_parameters()), dict(fresh.named_parameters()))
    method.save(tmp_path / "adapter", module)
    for source in ("run.ckpt", "adapter"):
        other = Plain(make(FAMILY))
        with pytest.warns(UserWarning, match="norm.weight.*trained beside the methods and is written into it"):
            load_adapter(tmp_path / source, other)
        assert same(snapshot(module.eval()), snapshot(other.eval()))


class ThawsLate(BaseFinetuning):
    def freeze_before_training(self, module: Any) -> None:
        pass

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.backbone.model.blocks[1].norm1, optimizer, lr=0.1)


def test_what_a_callback_unfroze_goes_on_training_after_a_break(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    with seeded(0):
        whole = Plain(make(FAMILY))
        trainer(tmp_path, LoRA(rank=2), ThawsLate(), keep, max_epochs=3, enable_checkpointing=True).fit(
            whole, loader(FAMILY))
    resumed = Plain(make(FAMILY))
    fit = trainer(tmp_path, LoRA(rank=2), ThawsLate(), max_epochs=3)
    fit.fit(resumed, loader(FAMILY), ckpt_path=tmp_path / "epoch=1.ckpt")
    there: Any = whole.backbone
    assert distance(there.model.blocks[1].norm1.weight, vit().model.blocks[1].norm1.weight) > 0
    assert same(dict(whole.named_parameters()), dict(resumed.named_parameters()))


def test_an_adapter_says_what_of_the_base_it_brings(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    method = LoRA(rank=2)
    method.attach(make(FAMILY))
    method.save(tmp_path)
    record = (tmp_path / "adapter.json").read_text()
    assert "unfrozen" not in record
    tensors = load_file(tmp_path / "adapter.safetensors")
    tensors["model.norm.weight"] = vit().model.norm.weight.detach()
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(ScionError, match="tensors that no method here has: model.norm.weight"):
        load_adapter(tmp_path, make(FAMILY))


# ------------------------------------------------------------------------------------------------- averages


@pytest.mark.parametrize("make_average", [lambda: EMAWeightAveraging(decay=0.5),
                                          lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)])
def test_an_average_that_was_made_before_the_method_is_refused(make_average: Any, tmp_path: Path) -> None:
    with pytest.raises(ScionError, match="stands before it in callbacks .* put it behind"):
        trainer(tmp_path, make_average(), LoRA(rank=2), max_steps=2).fit(Plain(make(FAMILY)), loader(FAMILY))


def test_an_average_behind_the_method_is_tested_and_resumed(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "last", save_top_k=1)
    module, method, average = Plain(make(FAMILY)), LoRA(rank=2), EMAWeightAveraging(decay=0.5)
    fit = trainer(tmp_path, method, average, keep, max_epochs=2, enable_checkpointing=True)
    fit.fit(module, loader(FAMILY))
    averaged: dict[str, Any] = dict(average._average_model.module.named_parameters())  # type: ignore[union-attr]
    assert same(dict(module.named_parameters()), averaged)
    assert any(bool(graft.B.any()) for graft in method.grafts)
    fit.test(module, loader(FAMILY), ckpt_path="best", verbose=False)
    again = trainer(tmp_path, LoRA(rank=2), EMAWeightAveraging(decay=0.5), max_epochs=3)
    other = Plain(make(FAMILY))
    again.fit(other, loader(FAMILY), ckpt_path=tmp_path / "last.ckpt")
    assert other.global_step > module.global_step


# ------------------------------------------------------------------------------------------------- a model that changes


def causal() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with seeded(0):
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False))


def test_a_model_that_was_resized_after_attach_is_refused(tmp_path: Path) -> None:
    model, method = causal(), LoRA(rank=2, targets=["q", "lm_head"])
    method.attach(model)
    model.resize_token_embeddings(24)
    for act in (method.merge, lambda: method.save(tmp_path),
                lambda: method.check_training(torch.optim.SGD([*method.trainable().values()], 0.1))):
        with pytest.raises(ScionError, match="lm_head .* than when the method was attached.*change the model first"):
            act()
    assert not (tmp_path / "adapter.json").exists()
    method.remove()
    LoRA(rank=2, targets=["q", "lm_head"]).attach(model)


def test_a_block_that_was_exchanged_or_a_base_tensor_that_was_resized_is_refused(tmp_path: Path) -> None:
    model, method = vit(), LoRA(rank=2)
    method.attach(model)
    model.model.blocks[0].attn = vit().model.blocks[0].attn
    with pytest.raises(ScionError, match=r"model.blocks.0.attn.* is another module now"):
        method.save(tmp_path)
    full, whole = FullFineTuning(), causal()
    full.attach(whole)
    whole.resize_token_embeddings(24)
    with pytest.raises(ScionError, match="embed_tokens.weight is gone from the model, or has another shape"):
        full.save(tmp_path)


def test_a_compiled_block_is_still_the_models() -> None:
    model, method = vit(), LoRA(rank=2)
    method.attach(model)
    model.model.blocks[0] = torch.compile(model.model.blocks[0], backend="eager")
    assert check_model(method) is None


def test_checkpointing_that_does_nothing_is_told(tmp_path: Path) -> None:
    model = causal()
    model.gradient_checkpointing_enable()
    method = LoRA(rank=2)
    method.attach(model)
    optimizer = torch.optim.SGD([*method.trainable().values()], 0.1)
    model.train()
    with pytest.warns(UserWarning, match=r"does nothing.*checkpoint_activations\(model\)"):
        method.check_training(optimizer)
    model.gradient_checkpointing_disable()
    checkpoint_activations(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.check_training(optimizer)


# ------------------------------------------------------------------------------------------------- other libraries


def test_saving_as_transformers_do_is_told(tmp_path: Path) -> None:
    model, method = causal(), LoRA(rank=2)
    method.attach(model)
    for part in (model, model.model):
        with pytest.warns(UserWarning, match=r"read back as the plain base.*method.merge\(\)"):
            part.save_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        method.merge()
        model.save_pretrained(tmp_path / "model")
    assert not model._state_dict_pre_hooks


def test_a_model_around_the_adapted_one_is_told_too(tmp_path: Path) -> None:
    model, method = causal(), LoRA(rank=2)
    method.attach(model.model)
    with pytest.warns(UserWarning, match="read back as the plain base"):
        model.save_pretrained(tmp_path / "model")


def test_load_from_checkpoint_of_a_module_without_methods_says_what_to_call(tmp_path: Path) -> None:
    class Own(Plain):
        def __init__(self) -> None:
            super().__init__(make(FAMILY))

    module, fit = fitted(tmp_path, LoRA(rank=2), Own())
    fit.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ScionError, match=r"LoRA at backbone.*core.load_adapter\(checkpoint, module\)"):
        Own.load_from_checkpoint(tmp_path / "own.ckpt")
    with pytest.warns(UserWarning, match="the base alone is loaded"):
        Own.load_from_checkpoint(tmp_path / "own.ckpt", strict=False)
    with pytest.raises(ScionError, match="give the Trainer the same methods"):
        trainer(tmp_path).test(Own(), loader(FAMILY), ckpt_path=tmp_path / "own.ckpt", verbose=False)
    other = Own()
    load_adapter(tmp_path / "own.ckpt", other)
    assert same(snapshot(module.eval()), snapshot(other.eval()))


# ------------------------------------------------------------------------------------------------- other processes


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_what_is_trained_elsewhere_is_attached_here_first(strategy: str, tmp_path: Path) -> None:
    """Seen by the strategy's launcher, before a process is started."""
    fit = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, logger=False, default_root_dir=tmp_path)
    module, method = Plain(make(FAMILY)), LoRA(rank=2)
    with pytest.raises(ScionError, match=r"does not come back: call LoRA.attach\(model\) on the backbone before"):
        method.setup(fit, module, "fit")
    assert not hasattr(module.backbone, "peft")
    method.attach(module.backbone)
    method.setup(fit, module, "fit")


def test_a_fork_brings_the_trained_adapter_back(tmp_path: Path) -> None:
    module, method = Plain(make(FAMILY)), LoRA(rank=2)
    method.attach(module.backbone)
    fit = trainer(tmp_path, method, max_steps=2, devices=1, strategy="ddp_fork")
    fit.fit(module, loader(FAMILY))
    assert all(bool(graft.B.any()) for graft in method.grafts)
