"""A head of 1, 2 or 4 bits a number: what it computes, how it is stored, and that it trains and resumes."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import TensorDataset

from core import FineTuner, load_adapter
from core.adapters.load import TENSORS
from core.anatomy import parameter_sites
from core.cli import main
from core.cli.merge import save_plain
from core.config import make
from core.data import EpochLoader, EpochSampler
from core.errors import ScionError
from core.method.beside import OUTSIDE
from core.peft import method_class
from core.peft.weights.quantize import QuantizedGraft
from core.tasks import Classification, Task
from core.training.head_files import load_outside, outside
from core.training.load_run import load_run
from core.training.run_record import save_run_adapter
from tests.core.test_commands import base, config, sounds  # noqa: F401
from tests.papers.training import Deep
from tests.toolkit import trainer

AdaptFormer: Any = method_class("AdaptFormer")
Quantize: Any = method_class("Quantize")
DIM, BLOCKS = 16, 8
WEIGHT = "task.head.1.weight"


def tuner_of(bits: Any = 1, classes: int = 4, multilabel: bool = False, seed: int = 0, **options: Any) -> FineTuner:
    """A ViT of eight narrow layers with a head of ``bits`` bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FineTuner(Deep(), Classification(bits=bits, **options), [str(c) for c in range(classes)], multilabel,
                         optimizer={"lr": 1e-2, "weight_decay": 0.1})


def methods() -> list[Any]:
    return [AdaptFormer(bottleneck=4, biases=False), Quantize(bits=1)]


def with_methods(tuner: FineTuner) -> FineTuner:
    for method in methods():
        method.attach(tuner.backbone)
    return tuner


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def logits(tuner: FineTuner) -> Tensor:
    with torch.no_grad():
        return tuner.eval()(images())


def fit(folder: Path, tuner: FineTuner, *callbacks: Any, steps: int = 8, checkpoint: Path | None = None,
        multilabel: bool = False) -> FineTuner:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 2, (32, 4), generator=generator).float() if multilabel else torch.arange(32) % 4
    data = TensorDataset(torch.randn(32, 3, 16, 16, generator=generator), labels)
    batches = EpochLoader(data, batch_size=8, sampler=EpochSampler(32, shuffle=True, seed=0))
    trainer(folder, *callbacks, max_steps=steps, enable_checkpointing=any(
        isinstance(callback, ModelCheckpoint) for callback in callbacks)).fit(tuner, batches, ckpt_path=checkpoint)
    return tuner


def payload(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


# ------------------------------------------------------------------------------------------------- function


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_it_is_the_quantizer_of_the_methods(bits: int) -> None:
    """x Q(W)^T without a bias, Q as `Quantize` has it, gradient included."""
    tuner = tuner_of(bits, classes=6)
    assert [name for name, _ in tuner.task.named_parameters()] == ["head.1.weight"]
    weight = tuner.get_parameter(WEIGHT)
    twin = torch.nn.Linear(DIM, 6, bias=False)
    with torch.no_grad():
        twin.weight.copy_(weight)
    graft = QuantizedGraft(parameter_sites(twin, ["weight"])[0], bits)
    features, upstream = torch.randn(5, DIM), torch.randn(5, 6)
    found, wanted = tuner.task(features), features @ graft.weight(twin.weight).t()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    assert twin.weight.grad is not None and twin.weight.grad.any()
    torch.testing.assert_close(weight.grad, twin.weight.grad, rtol=0, atol=1e-5)
    values = tuner.task(torch.eye(DIM)).detach().unique()
    assert 2 ** bits // 3 < len(values) <= 2 ** bits
    if bits == 1:
        torch.testing.assert_close(values, (weight.mean() + weight.std() * torch.tensor([-0.67449, 0.67449])).detach())


def test_full_precision_is_as_before() -> None:
    tuner = tuner_of(None)
    assert {name: tuple(t.shape) for name, t in outside(tuner).items()} == {
        f"{OUTSIDE}{WEIGHT}": (4, DIM), f"{OUTSIDE}task.head.1.bias": (4,)}
    assert tuner.task.plain_head() is tuner.task.head and tuner.task.packings() == {}


def test_plain_head(tmp_path: Path) -> None:
    """What an exported model has for a head: torch's own modules, and the same outputs."""
    tuner = tuner_of(2)
    task = tuner.task
    head, features = task.plain_head(), torch.randn(5, DIM)
    assert [type(module) for module in head.modules()] == [
        torch.nn.Sequential, torch.nn.Dropout, torch.nn.Linear] and list(head.state_dict()) == ["1.weight"]
    assert torch.equal(head(features), task(features))
    assert not torch.equal(head.get_parameter("1.weight"), task.get_parameter("head.1.weight"))
    save_plain(tuner, tmp_path)
    assert torch.equal(load_file(tmp_path / "head.safetensors")["1.weight"], head.get_parameter("1.weight"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))],
                         ids=["deepcopy", "pickle"])
def test_copies(copied: Any) -> None:
    """A copy quantizes its own weight."""
    task = tuner_of(1).task
    twin, features = copied(task), torch.randn(5, DIM)
    assert torch.equal(twin(features), task(features))
    with torch.no_grad():
        twin.get_parameter("head.1.weight").mul_(2)
    assert not torch.equal(twin(features), task(features))
    assert twin.packings()["head.1.weight"].site.module is twin.head[1]


# ------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("classes", "multilabel"), [(4, False), (7, True), (100, False)])
def test_bytes(bits: int, classes: int, multilabel: bool, tmp_path: Path) -> None:
    """dim x classes x bits / 8 bytes and 8 for mean and deviation; a matrix of each bottleneck in the same way."""
    tuner = with_methods(tuner_of(bits, classes, multilabel))
    save_run_adapter(tuner, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    head = {name.removeprefix(OUTSIDE): t for name, t in tensors.items() if name.startswith(OUTSIDE)}
    assert {name: (t.dtype, t.numel()) for name, t in head.items()} == {
        f"{WEIGHT}.codes": (torch.uint8, DIM * classes * bits // 8), f"{WEIGHT}.scale": (torch.float32, 2)}
    assert payload(tensors) == DIM * classes * bits // 8 + 8 + BLOCKS * 2 * (4 * DIM // 8 + 8)


def test_a_last_byte_is_filled() -> None:
    """Where classes x dim is no multiple of 8 / bits."""
    for bits in (1, 2, 4):
        task, fresh = Classification(bits=bits), Classification(bits=bits)
        for one in (task, fresh):
            one.build(5, list("abc"))
        [graft], [other] = task.packings().values(), fresh.packings().values()
        parts = graft.pack(task.get_parameter("head.1.weight").detach())
        assert parts["codes"].numel() == math.ceil(15 * bits / 8)
        other.unpack(parts, fresh.get_parameter("head.1.weight").detach())
        features = torch.randn(4, 5)
        assert torch.equal(fresh.eval()(features), task.eval()(features))


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("multilabel", [False, True])
def test_round_trip(bits: int, multilabel: bool, tmp_path: Path) -> None:
    """A trained run's adapter computes the same to the bit on a fresh model, and is written again as it was."""
    whole = fit(tmp_path, with_methods(tuner_of(bits, multilabel=multilabel)), multilabel=multilabel, steps=3)
    save_run_adapter(whole, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    fresh = tuner_of(bits, multilabel=multilabel)
    load_adapter(tmp_path / "adapter", fresh.backbone)
    assert not torch.equal(logits(fresh), logits(whole))
    load_outside(fresh, tensors, "the adapter")
    assert torch.equal(logits(fresh), logits(whole))
    assert torch.equal(fresh.task.plain_head()(torch.eye(DIM)), whole.task.plain_head()(torch.eye(DIM)))
    save_run_adapter(fresh, tmp_path / "again")
    again = load_file(tmp_path / "again" / TENSORS)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in again)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    """One line, and the head is as it was."""
    stored, tuner = outside(tuner_of(1)), tuner_of(2)
    before = tuner.get_parameter(WEIGHT).detach().clone()
    for given, words in ((stored, "codes is .8. in the file, .16. here"), (outside(tuner_of(None)), "wanted"),
                         ({}, "wanted")):
        with pytest.raises(ScionError, match=words) as refusal:
            load_outside(tuner, given, "here")
        assert "\n" not in str(refusal.value) and torch.equal(tuner.get_parameter(WEIGHT), before)


# ------------------------------------------------------------------------------------------------- training


def test_it_learns() -> None:
    """The head alone brings the loss on fixed features down."""
    task = Classification(bits=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task.build(32, list("abcd"))
        targets = torch.arange(64) % 4
        features = torch.randn(4, 32)[targets] + 0.3 * torch.randn(64, 32)
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(task.loss(task(features), targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_resumes(tmp_path: Path) -> None:
    """4 + 4 steps are 8 to the bit: checkpoints hold the latent weight."""
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole = fit(tmp_path, tuner_of(1), *methods(), keep)
    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert state[WEIGHT].dtype == torch.float32 and len(state[WEIGHT].unique()) > 16
    assert [name for name in state if name.startswith("task.")] == [WEIGHT]
    assert not torch.equal(state[WEIGHT], whole.get_parameter(WEIGHT))
    again = fit(tmp_path, tuner_of(1), *methods(), checkpoint=tmp_path / "step=4.ckpt")
    assert torch.equal(again.get_parameter(WEIGHT), whole.get_parameter(WEIGHT))
    assert torch.equal(logits(again), logits(whole))


def test_a_checkpoint_after_an_adapter(tmp_path: Path) -> None:
    """What a file said of mean and deviation does not outlive the values that it brought."""
    whole = with_methods(tuner_of(1))
    save_run_adapter(whole, tmp_path)
    for parameter in (p for p in whole.parameters() if p.requires_grad):
        with torch.no_grad():
            parameter.mul_(torch.linspace(0.5, 2, parameter.numel()).view(parameter.shape))
    fresh = tuner_of(1)
    load_adapter(tmp_path, fresh.backbone)
    load_outside(fresh, load_file(tmp_path / TENSORS), "here")
    head: Any = fresh.task.head
    assert head[1].quantizer.loaded is not None
    fresh.load_state_dict(whole.state_dict())
    assert head[1].quantizer.loaded is None
    features = torch.randn(5, DIM)
    assert torch.equal(fresh.eval().task(features), whole.eval().task(features))


# ------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("bits", [3, 0, 32, 8])
def test_other_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ScionError, match=f"^Classification: bits {bits} must be one of 1, 2, 4, or None$"):
        Classification(bits=bits)


@pytest.mark.parametrize("bits", [3, "1.5", "one"])
def test_a_configuration_with_other_bits_is_refused(bits: Any) -> None:
    with pytest.raises(ScionError, match="bits") as refusal:
        make({"class_path": "Classification", "init_args": {"bits": bits}}, "model.task", "audio", Task)
    assert "\n" not in str(refusal.value)


def test_by_the_command(config: Path, tmp_path: Path) -> None:  # noqa: F811
    """A run with a head of 1 bit ends with a packed head, and its folder gives the same model again."""
    folder = tmp_path / "run"
    assert main(["run", str(config), "--run_dir", str(folder), "--peft", "AdaptFormer", "--peft.bottleneck", "8",
                 "--peft.biases", "false", "--peft+=Quantize", "--model.task.bits", "1"]) == 0
    tensors = load_file(folder / "adapter" / TENSORS)
    assert payload(tensors) == 2 * 2 * (8 * 32 // 8 + 8) + 2 * 32 // 8 + 8
    assert json.loads((folder / "adapter" / "adapter.json").read_text())["model"]["task"]["bits"] == 1
    parameters = json.loads((folder / "metrics.json").read_text())["parameters"]
    assert parameters["head"] == 2 * 32 and parameters["method"] == 2 * 2 * 8 * 32
    one, two = load_run(str(folder)), load_run(str(folder))
    inputs = torch.randn(2, 48, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one(inputs), two(inputs))
    assert all(torch.equal(value, tensors[name]) for name, value in outside(one).items())
