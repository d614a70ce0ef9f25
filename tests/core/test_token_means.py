"""A loss that counts labels: every label of a step weighs the same, over micro-batches and processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from core.data import Share
from core.errors import ScionError
from core.tasks import Classification
from core.training.finite import Losses
from core.training.token_means import TokenMeans, no_loss
from tests.core import token_fits
from tests.core.test_ddp import distance
from tests.core.token_fits import NONE, STEP, Averaging, Tagged, Tagging, fit, tuner_of

TOLERANCES = {"gradients": 1e-9, "trained": 1e-9, "rows": 1e-6, "test": 1e-6}
"""What may differ in float64; torchmetrics counts in float32."""


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """That two runs have the same gradients, weights and numbers."""
    for key, tolerance in TOLERANCES.items():
        assert distance(found[key], wanted[key]) < tolerance, key


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run whose steps are one batch."""
    return fit(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found."""
    folder = tmp_path_factory.mktemp("two")
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    children = [context.Process(target=token_fits.work, args=(rank, folder), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(180)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert not any("error" in result for result in found), found
    return found


def mean_over_labels(tuner: Any, rows: list[int], part: str) -> Tensor:
    """The mean loss over all labels of some samples, in one piece."""
    data = Tagged(seed=0)
    data.setup()
    inputs, targets = getattr(data, f"{part}_set")[rows]
    losses = F.cross_entropy(tuner(inputs.double()).flatten(0, 1), targets.flatten(), ignore_index=NONE,
                             reduction="none")
    return losses.sum() / (targets != NONE).sum()


def test_the_gradient_is_that_of_all_labels_together(one: dict[str, Any]) -> None:
    tuner, _ = tuner_of()
    data = Tagged(batch_size=STEP, seed=0)
    data.setup()
    rows = data.train_dataloader().indices(0)
    mean_over_labels(tuner.double(), rows, "train").backward()
    first = one["gradients"][0]
    assert len(first) > 4 and first["task.head.weight"].dtype == torch.float64
    for name, parameter in tuner.named_parameters():
        assert (parameter.grad is None) == (name not in first), name
        if parameter.grad is not None:
            assert parameter.grad.any() and distance(parameter.grad, first[name]) < 1e-9, name


@pytest.mark.parametrize("batches", [2, 4])
def test_micro_batches_give_the_gradient_of_one_batch(batches: int, one: dict[str, Any], tmp_path: Path) -> None:
    """Some without a label, and the short windows at the ends of the epochs; what is logged is the same as well."""
    found = fit(tmp_path, batches)
    assert found["steps"] == one["steps"] == len(found["gradients"]) == 8
    assert 0 in found["labels"] and max(found["labels"]) > 6 and len(found["labels"]) == 14 * batches // 2
    assert_equal(found, one)


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_two_processes_give_the_gradient_of_one(batches: int, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    first, second = (result[str(batches)] for result in two)
    assert first["labels"] != second["labels"] and 0 in first["labels"] + second["labels"]
    for found in (first, second):
        assert_equal(found, one)


def test_lightning_alone_gives_another_one(one: dict[str, Any], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TokenMeans, "ensure", lambda *_: None)
    found = fit(tmp_path, 4)
    assert distance(found["gradients"][0], one["gradients"][0]) > 0.01


def test_what_is_logged_is_the_mean_over_labels(one: dict[str, Any]) -> None:
    tuner, _ = tuner_of()
    tuner.double().load_state_dict(one["trained"], strict=False)
    tuner.eval()
    for part, logged in (("validation", one["rows"][-1]), ("test", one["test"])):
        wanted = float(mean_over_labels(tuner, list(range(token_fits.SIZES[part])), part))
        assert logged[f"{part}/loss"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("settings", [
    {"gradient_clip_val": 0.05}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    {"method": "AdaLoRA"}], ids=str)
def test_what_follows_sees_means(settings: dict[str, Any], one: dict[str, Any], tmp_path: Path) -> None:
    """Clipping; and a method that adds to the loss, whose term is in no batch more than in another."""
    whole, parts = fit(tmp_path, 1, **settings), fit(tmp_path, 4, **settings)
    assert_equal(whole, parts)
    if "method" in settings:
        assert whole["rows"][0]["train/penalty"] > 0
    else:
        assert distance(whole["trained"], one["trained"]) > 1e-3


def test_a_scaled_loss_is_unscaled_first(one: dict[str, Any], tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # type: ignore[attr-defined]
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    found = fit(tmp_path, 4, precision=None, plugins=[plugin])
    assert distance(found["gradients"][0], one["gradients"][0]) < 0.01
    assert max(float(gradient.abs().max()) for gradient in one["gradients"][0].values()) > 0.05


@pytest.mark.parametrize("after", [1, 3, 6, 13, *(pytest.param(after, marks=pytest.mark.slow)
                                                  for after in (2, 4, 5, 7, 8, 9, 10, 11, 12))])
def test_a_run_goes_on_amid_a_step(after: int, tmp_path: Path) -> None:
    """Behind every micro-batch of an epoch, bit for bit: a checkpoint holds what its step has added up so far."""
    whole = fit(tmp_path, 4, keep=tmp_path / "kept.ckpt", after=after)
    resumed = fit(tmp_path, 4, resume=tmp_path / "kept.ckpt")
    steps = len(resumed["gradients"])
    assert steps == 8 - after // 4
    for key in ("rows", "test", "trained"):
        assert distance(whole[key], resumed[key]) == 0, key
    assert distance(whole["gradients"][-steps:], resumed["gradients"]) == 0


def test_two_processes_go_on_amid_a_step(two: list[dict[str, Any]]) -> None:
    for result in two:
        whole, resumed = result["whole"], result["resumed"]
        assert distance(whole["trained"], resumed["trained"]) == 0 and distance(whole["rows"], resumed["rows"]) == 0
        assert distance(whole["gradients"][-7:], resumed["gradients"]) == 0


def test_a_step_without_any_label_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Tagged.load

    def unlabelled(self: Any) -> None:
        load(self)
        self.train_set.tensors[1].fill_(NONE)

    monkeypatch.setattr(Tagged, "load", unlabelled)
    found = fit(tmp_path, 2, limit_val_batches=0, max_steps=2)
    assert found["steps"] == 2 and "train/loss" not in found["rows"][0]
    assert all(not gradient.any() for step in found["gradients"] for gradient in step.values())


# ------------------------------------------------------------------------------------------------- who counts samples


def test_who_counts_samples_gets_no_scaling(tmp_path: Path) -> None:
    """Nothing is put among the callbacks; and a task that declares ``counts`` and says None is left alone."""
    assert TokenMeans.ensure(SimpleNamespace(callbacks=[]), Classification()) is None  # type: ignore[arg-type]
    always = fit(tmp_path, 4, task=Averaging)

    class Plain(Averaging):
        counts = token_fits.Task.counts  # type: ignore[assignment]

    plain = fit(tmp_path, 4, task=Plain)
    assert distance(always, plain) == 0


def test_it_comes_first_and_once() -> None:
    strategy = SimpleNamespace(handles_gradient_accumulation=False)
    trainer: Any = SimpleNamespace(callbacks=["a method"], strategy=strategy)
    means = TokenMeans.ensure(trainer, Tagging())
    assert trainer.callbacks == [means, "a method"]
    assert TokenMeans.ensure(trainer, Tagging()) is means and len(trainer.callbacks) == 2
    strategy.handles_gradient_accumulation = True
    with pytest.raises(ScionError, match="trainer.strategy: SimpleNamespace adds up gradients by itself"):
        TokenMeans.ensure(trainer, Tagging())


def windows() -> Iterator[tuple[int, int, int | None]]:
    """Number of a batch, its labels, and what the window holds behind it."""
    yield 0, 3, 3
    yield 1, 0, 3
    yield 2, 4, 4  # the next window
    yield 0, 1, 1  # the next epoch, which begins amid it


def test_windows_begin_where_gradients_do() -> None:
    means, trainer = TokenMeans(), SimpleNamespace(accumulate_grad_batches=2)
    losses = Losses(torch.ones(1), "the task", torch.tensor(0.5), [])
    for index, labels, wanted in windows():
        given = means.weigh(losses, labels, Share(2, 4, 2), trainer, index)  # type: ignore[arg-type]
        assert means.labels == wanted and float(given) * 1024 == 0.5 * labels
    # a sample that another process reads as well
    assert float(means.weigh(losses, 7, Share(0, 4, 2), trainer, 1)) == 0 and means.labels == 1  # type: ignore[arg-type]


def test_no_loss_has_gradients_of_zero() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    loss = no_loss({"logits": 2 * weight, "places": torch.arange(3)})
    loss.backward()
    assert float(loss) == 0 and loss.dtype == torch.float64
    assert weight.grad is not None and not weight.grad.any()
