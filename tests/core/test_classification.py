"""Classification: one label by cross-entropy, several by one yes or no each, measured by mean average precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.backbone import Backbone
from core.errors import ScionError
from core.tasks import Classification
from core.training.finetuner import FineTuner

CLASSES = ["dog", "rain", "siren"]
OUTPUTS = torch.tensor([[2.0, -1.0, 0.5], [0.3, 1.5, -2.0], [-1.0, 0.2, 0.1], [1.0, -0.5, 2.0]])
TARGETS = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]])


def _task(multilabel: bool, **options: Any) -> Classification:
    task = Classification(**options)
    task.build(4, CLASSES, multilabel)
    return task


def _average_precision(scores: Tensor, wanted: Tensor) -> float:
    """The mean, over the positives, of the precision at the place where each stands."""
    ranked = wanted[scores.argsort(descending=True)].tolist()
    hits = [sum(ranked[: place + 1]) / (place + 1) for place, hit in enumerate(ranked) if hit]
    return sum(hits) / len(hits)


def test_loss_of_several_labels_is_the_mean_of_their_binary_cross_entropies() -> None:
    probability = OUTPUTS.sigmoid()
    wanted = -(TARGETS * probability.log() + (1 - TARGETS) * (1 - probability).log()).mean()
    torch.testing.assert_close(_task(True).loss(OUTPUTS, TARGETS), wanted)
    soft = TARGETS * 0.8 + 0.1
    wanted = -(soft * probability.log() + (1 - soft) * (1 - probability).log()).mean()
    torch.testing.assert_close(_task(True, label_smoothing=0.2).loss(OUTPUTS, TARGETS), wanted)
    assert math.isclose(float(_task(False).loss(torch.zeros(2, 3), torch.tensor([0, 2]))), math.log(3), rel_tol=1e-6)


def test_mean_average_precision_is_the_mean_over_labels_that_occur() -> None:
    task = _task(True)
    assert task.selects == ("map", "max") and set(task.collection("test").keys()) == {"map", "f1"}
    metrics = task.collection("test")
    metrics.update(OUTPUTS, TARGETS)
    wanted = sum(_average_precision(OUTPUTS[:, i], TARGETS[:, i]) for i in range(3)) / 3
    assert 0 < wanted < 1 and math.isclose(float(metrics.compute()["map"]), wanted, rel_tol=1e-6)
    metrics.reset()
    metrics.update(OUTPUTS, TARGETS * torch.tensor([1, 0, 1]))  # no rain anywhere: its precision is undefined
    wanted = sum(_average_precision(OUTPUTS[:, i], TARGETS[:, i]) for i in (0, 2)) / 2
    assert math.isclose(float(metrics.compute()["map"]), wanted, rel_tol=1e-6)
    metrics.reset()
    metrics.update(OUTPUTS, TARGETS * 0)
    assert float(metrics.compute()["map"]) == 0


def test_predictions_of_several_labels_name_all_that_are_likely() -> None:
    found = _task(True).predict(OUTPUTS)
    assert [entry["labels"] for entry in found] == [["dog", "siren"], ["rain", "dog"], ["rain", "siren"],
                                                    ["siren", "dog"]]
    assert found[0]["label"] == "dog" and found[0]["score"] == pytest.approx(0.8808, abs=1e-4)
    assert _task(True).predict(-torch.ones(1, 3))[0]["labels"] == []
    assert "labels" not in _task(False).predict(OUTPUTS)[0]


class Flat(Backbone):
    """Features as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.dim = nn.Identity(), 4

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


@pytest.mark.parametrize("multilabel", [True, False])
def test_metrics_of_soft_targets_count_what_is_more_than_half(multilabel: bool) -> None:
    """Mixup makes targets of class weights."""
    tuner = FineTuner(Flat(), Classification(), CLASSES, multilabel)
    soft = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.2, 0.0, 0.8]])
    tuner.log = lambda *_, **__: None  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in tuner.task.parameters():
            parameter.copy_(torch.eye(*parameter.shape) if parameter.dim() == 2 else torch.zeros(parameter.shape))
        tuner.training_step((6 * torch.eye(3, 4) - 3, soft), 0)
        assert float(tuner.task.collection("train").compute()["f1"]) == 1
        tuner.training_step((6 * torch.eye(3, 4) - 3, soft.flip(0)), 0)
        assert 0 < float(tuner.task.collection("train").compute()["f1"]) < 1


def test_wrong_settings_are_refused() -> None:
    for options, words in (({"num_classes": 1}, "at least 2"), ({"label_smoothing": 1.0}, r"\[0, 1\)"),
                           ({"dropout": -0.1}, r"\[0, 1\)")):
        with pytest.raises(ScionError, match=words):
            Classification(**options)  # type: ignore[arg-type]
    with pytest.raises(ScionError, match="the data has 3"):
        _task(True, num_classes=4)
