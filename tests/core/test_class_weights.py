"""Weights of classes: by name and balanced, in training alone, alike for every way to cut a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from core import peft
from core.config.build import make
from core.data import BalancedSampler, EpochLoader, EpochSampler
from core.errors import ScionError
from core.tasks import Classification
from core.tasks.base import Task
from core.tasks.class_weights import balanced_weights
from core.training.finetuner import FineTuner
from tests.core.ddp_fits import Around, Samples
from tests.toolkit import CLASSES, seeded, trainer

NAMES = ["dog", "rain", "siren"]
TARGETS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])
OUTPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def task_of(weights: Any, **options: Any) -> Classification:
    task = Classification(class_weights=weights, **options)
    task.build(4, NAMES)
    task.see_training(TensorDataset(torch.zeros(8), TARGETS))
    return task.train()


def test_balanced_is_n_over_c_times_the_size_of_a_class() -> None:
    wanted = torch.tensor([8 / (3 * 5), 8 / (3 * 2), 8 / (3 * 1)])
    found = task_of("balanced").weight_of_class
    assert found is not None
    torch.testing.assert_close(found, wanted)
    assert float(wanted[TARGETS].mean()) == pytest.approx(1)
    # a class without a sample takes nothing from the others
    torch.testing.assert_close(balanced_weights(TensorDataset(TARGETS), [*NAMES, "wind"]), torch.cat(
        [wanted, torch.ones(1)]))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}], ids=str)
@pytest.mark.parametrize("weights", ["balanced", {"rain": 3.0}], ids=str)
def test_a_loss_is_weighed_in_training_alone(weights: Any, options: dict[str, Any]) -> None:
    task = task_of(weights, **options)
    each = task.weight_of_class
    assert each is not None and (weights == "balanced" or each.tolist() == [1, 3, 1])
    smoothing = options.get("label_smoothing", 0.0)
    soft = F.one_hot(TARGETS, 3) * (1 - smoothing) + smoothing / 3
    wanted = -(soft * each * OUTPUTS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(task.loss(OUTPUTS, TARGETS), wanted)
    torch.testing.assert_close(task.loss(OUTPUTS, F.one_hot(TARGETS, 3).float()), wanted)  # as mixup gives them
    parts = [task.loss(OUTPUTS[at:at + 2], TARGETS[at:at + 2]) for at in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), wanted)
    plain = F.cross_entropy(OUTPUTS, TARGETS, label_smoothing=smoothing)
    assert torch.equal(task.eval().loss(OUTPUTS, TARGETS), plain) and not torch.isclose(plain, wanted)
    assert torch.equal(task_of(None, **options).loss(OUTPUTS, TARGETS), plain)


class Uneven(Samples):
    """Noise of which most is of one class."""

    def load(self) -> None:
        super().load()
        dataset: Any = self.train_set
        dataset.tensors[1][:9] = 0


def fitted(weights: Any, folder: Path, data: Any = None, loader: EpochLoader | None = None, **settings: Any
           ) -> FineTuner:
    with seeded(0):
        tuner = FineTuner(Around(), Classification(class_weights=weights), list("abcd"))
        fit = trainer(folder, peft.make("LoRA", {"rank": 2}), max_epochs=1, limit_val_batches=0,
                      **{"precision": "64-true", **settings})
        fit.fit(tuner, train_dataloaders=loader, datamodule=data)
    return tuner


def test_a_run_counts_its_training_set(tmp_path: Path) -> None:
    """Of a datamodule or of a loader; what is cut into micro-batches trains alike."""
    data = Uneven({"train": 12}, batch_size=4, seed=0)
    tuner = fitted("balanced", tmp_path, data)
    dataset: Any = data.train_set
    counts = torch.bincount(dataset.tensors[1], minlength=CLASSES)
    assert isinstance(tuner.task, Classification) and tuner.task.weight_of_class is not None
    assert counts.tolist()[0] >= 9
    for number, weight in enumerate(tuner.task.weight_of_class.tolist()):
        size = int(counts[number])
        assert weight == pytest.approx(12 / (int((counts > 0).sum()) * size) if size else 1)
    parts = fitted("balanced", tmp_path, Uneven({"train": 12}, batch_size=2, seed=0), accumulate_grad_batches=2)
    plain = fitted(None, tmp_path, Uneven({"train": 12}, batch_size=4, seed=0))
    head, other, unweighed = (dict(one.task.named_parameters()) for one in (tuner, parts, plain))
    for name, tensor in head.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-9)
        assert not torch.allclose(tensor, unweighed[name])
    assert tuner.state_dict().keys() == plain.state_dict().keys()
    loader = EpochLoader(dataset, batch_size=4, sampler=EpochSampler(12, True, seed=0))
    again = fitted("balanced", tmp_path, loader=loader)
    assert torch.equal(again.task.weight_of_class, tuner.task.weight_of_class)  # type: ignore[arg-type]


def test_a_balanced_sampler_trains(tmp_path: Path) -> None:
    data = Uneven({"train": 12}, batch_size=4, seed=0, balanced=True)
    fitted(None, tmp_path, data)
    assert isinstance(data.train_dataloader().sampler, BalancedSampler)


@pytest.mark.parametrize(("weights", "words"), [
    ("balance", "'balance' is neither 'balanced' nor a weight for each of some classes"),
    ({}, "{} is neither"), ({"rain": 0}, "0 of 'rain' must be above 0"), ({"rain": -1.0}, "-1.0 of 'rain'"),
    ({"rian": 2.0}, "no class 'rian'.*rain.*the classes are dog, rain"),
])
def test_what_are_no_weights_is_one_line(weights: Any, words: str) -> None:
    with pytest.raises(ScionError, match=f"model.task.class_weights: {words}") as caught:
        Classification(class_weights=weights).check(NAMES)
    assert "\n" not in str(caught.value)


def test_several_labels_and_other_targets_are_refused() -> None:
    with pytest.raises(ScionError, match="class_weights: the data's samples have several labels"):
        Classification(class_weights="balanced").build(4, NAMES, multilabel=True)
    for targets, words in ((torch.tensor([0, 3]), "targets of the training set are 3, and there are 3 classes"),
                           (torch.eye(3), "one class a sample is wanted"),
                           (torch.zeros(0, dtype=torch.int64), "are none")):
        with pytest.raises(ScionError, match=words):
            balanced_weights(TensorDataset(targets), NAMES)
    with pytest.raises(ScionError, match="list has no ``targets``"):
        balanced_weights([1, 2], NAMES)


def test_a_configuration_gives_them() -> None:
    for given, wanted in (("balanced", "balanced"), ({"dog": 2}, {"dog": 2}), (None, None)):
        part = {"class_path": "Classification", "init_args": {"class_weights": given}}
        made: Any = make(part, "model.task", "vision", Task)
        assert made.class_weights == wanted
    with pytest.raises(ScionError, match="class_weights"):
        make({"class_path": "Classification", "init_args": {"class_weights": 3}}, "model.task", "vision", Task)
