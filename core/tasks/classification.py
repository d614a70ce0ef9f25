"""Classification of a sample from one feature vector: one label, or several."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from core.anatomy import parameter_sites
from core.data.info import DataInfo
from core.errors import ScionError, listed
from core.graft import Graft
from core.peft.weights.quantize import BITS, QuantizedGraft
from core.tasks.base import Task
from core.tasks.class_weights import ASKER, ClassWeights, balanced_weights, check_names, check_weights, named_weights
from core.tasks.metrics import MetricList, metrics_by_name


class MeanAveragePrecision(MultilabelAveragePrecision):
    """The mean of the average precisions of the labels that occur among the targets; 0 where none does.

    torchmetrics counts a label that never occurs, whose average precision is undefined, as 0.
    """

    def __init__(self, labels: int, **common: Any) -> None:
        super().__init__(labels, average="none", **common)

    def compute(self) -> Tensor:
        with warnings.catch_warnings():
            # said of every label that does not occur, and those are left out below
            warnings.filterwarnings("ignore", "No positive samples")
            found = super().compute()
        occurs = dim_zero_cat(self.target).sum(0) > 0
        if not occurs.any():
            return found.new_zeros(())
        return found[occurs].mean()


class QuantizedLinear(nn.Linear):
    """y = x Q(W)^T without a bias: W [outputs, inputs] is seen, and stored, with a few bits a number, as `Quantize`
    does it for methods."""

    def __init__(self, inputs: int, outputs: int, bits: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        [site] = parameter_sites(self, ["weight"])
        self.quantizer = QuantizedGraft(site, bits)

    def forward(self, input: Tensor) -> Tensor:
        """[batch, inputs] -> [batch, outputs]"""
        return F.linear(input, self.quantizer.weight(self.weight))

    def plain(self) -> nn.Linear:
        """The same map with the quantized weight as its own."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.quantizer.weight(self.weight).detach())
        return linear


class Classification(Task):
    """A linear head with cross-entropy; for data with several labels a sample one yes or no for each, with binary
    cross-entropy and mean average precision (over the labels that occur; a target is a vector [classes]).

    Args:
        num_classes: number of classes; None takes it from the data, a number must agree with it.
        label_smoothing: in [0, 1); targets become (1 - s) y + s / classes, or (1 - s) y + s / 2 with several labels.
        dropout: on the features, in [0, 1).
        bits: 1, 2 or 4 quantizes the head (Jie et al. 2023, ICCV): it has no bias then, and its dim x classes numbers
            take bits / 8 bytes each + 8 in the run's adapter; None is a head in full precision.
        class_weights: what the loss of a sample is multiplied by in training, by the name of its class (1 for classes
            without a name), or ``balanced``, N / (C n_c) with the n_c of N training samples that are of class c, one of
            C. The loss of a batch is the sum over its samples divided by their number, so that parts of a batch add up
            to it; losses of validation and test are without weights, and can be compared. Not for several labels.
        metrics: further ones, by the names of torchmetrics' classes, without ``Multiclass`` or ``Multilabel``:
            ``[CohenKappa, {class: CalibrationError, n_bins: 10}]``.
    """

    needs_classes = True

    def __init__(self, num_classes: int | None = None, label_smoothing: float = 0.0, dropout: float = 0.0,
                 bits: int | None = None, class_weights: ClassWeights = None, metrics: MetricList = ()) -> None:
        super().__init__()
        for name, value in (("label_smoothing", label_smoothing), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ScionError(f"Classification: {name} {value} must lie in [0, 1)")
        if num_classes is not None and num_classes < 2:
            raise ScionError(f"Classification: num_classes {num_classes} must be at least 2")
        if bits is not None and bits not in BITS:
            raise ScionError(f"Classification: bits {bits} must be one of {listed(BITS)}, or None")
        check_weights(class_weights)
        self.class_weights: ClassWeights = class_weights
        self.weight_of_class: Tensor | None = None
        """Of the classes in training [classes]; None where they weigh alike."""
        self.bits = bits
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        self.dropout = dropout
        self.further_metrics = list(metrics)
        self.classes: list[str] = []
        self.multilabel = False

    def check(self, classes: Sequence[str]) -> None:
        if self.num_classes is not None and self.num_classes != len(classes):
            raise ScionError(f"model.task.num_classes: {self.num_classes} classes are asked for, the data has "
                             f"{len(classes)}; leave num_classes out to take the data's")
        check_names(self.class_weights, classes)

    def build(self, dim: int, info: DataInfo | Sequence[str], multilabel: bool = False) -> None:
        info = DataInfo.of(info, multilabel)
        self.check(info.classes)
        if info.multilabel and self.class_weights is not None:
            raise ScionError(f"{ASKER}: the data's samples have several labels, and a weight is for samples of one; "
                             "leave class_weights out")
        self.classes, self.multilabel = list(info.classes), info.multilabel
        if isinstance(self.class_weights, dict):
            self.weight_of_class = named_weights(self.class_weights, self.classes)
        size = len(self.classes)
        self.head = nn.Sequential(nn.Dropout(self.dropout), self._new_linear(dim, size))
        kind = "Multilabel" if self.multilabel else "Multiclass"
        further = metrics_by_name(self.further_metrics, {"num_classes": size, "num_labels": size}, [kind])
        self.set_metrics({**self.make_metrics(size), **further})
        self.selects = ("map", "max") if self.multilabel else ("accuracy", "max")

    def see_training(self, dataset: Any) -> None:
        if self.class_weights == "balanced":
            self.weight_of_class = balanced_weights(dataset, self.classes)

    def _new_linear(self, dim: int, classes: int) -> nn.Linear:
        if self.bits is None:
            return nn.Linear(dim, classes)
        return QuantizedLinear(dim, classes, self.bits)

    def packings(self) -> dict[str, Graft]:
        found: dict[str, Graft] = {}
        for path, module in self.named_modules():
            if isinstance(module, QuantizedLinear):
                found[f"{path}.weight"] = module.quantizer
        return found

    def plain_head(self) -> nn.Module:
        dropout, linear = self.head  # type: ignore[misc]
        if not isinstance(linear, QuantizedLinear):
            return self.head
        return nn.Sequential(dropout, linear.plain())

    def make_metrics(self, n: int) -> dict[str, Any]:
        """The metrics of ``n`` classes by their names."""
        from torchmetrics import classification as c

        if self.multilabel:
            return {"map": MeanAveragePrecision(n), "f1": c.MultilabelF1Score(n)}
        return {"accuracy": c.MulticlassAccuracy(n, average="micro"), "f1": c.MulticlassF1Score(n, average="macro"),
                "confusion": c.MulticlassConfusionMatrix(n)}

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.multilabel:
            # half of the smoothing goes to each of the two answers, yes and no
            hard = targets.to(outputs.dtype)
            soft = hard * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(outputs, soft)
        if self.weight_of_class is None or not self.training:
            return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        # torch would divide by the weights of the batch's samples, and a sample's part would depend on its batch.
        weights = self.weight_of_class.to(outputs)
        losses = F.cross_entropy(outputs, targets, weights, label_smoothing=self.label_smoothing, reduction="none")
        return losses.mean()

    def scores(self, outputs: Tensor) -> Tensor:
        """The probabilities of several labels: torchmetrics would guess batch by batch whether it is given such, and
        take a batch of small logits for them."""
        return outputs.sigmoid() if self.multilabel else outputs

    def update(self, stage: str, outputs: Tensor, targets: Tensor) -> None:
        hard = targets
        if targets.is_floating_point():  # class weights, of mixup for one, or the zeros and ones of several labels
            hard = (targets >= 0.5).int() if self.multilabel else targets.argmax(-1)
        super().update(stage, outputs, hard)

    def truth(self, target: Any) -> list[str]:
        if isinstance(target, Tensor) and target.dim() == 1:
            return [name for name, on in zip(self.classes, target.tolist(), strict=True) if on >= 0.5]
        return [self.classes[int(target)]]

    def summary(self, tests: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """The harmonic mean of two test sets ``base`` and ``novel``, of classes that were trained and others; the mean
        over any other sets."""
        metric = self.selects[0]
        values = [found[metric] for found in tests.values() if metric in found]
        if len(values) < 2 or len(values) < len(tests):
            return {}
        if set(tests) == {"base", "novel"}:
            return {f"harmonic_mean/{metric}": harmonic_mean(values)}
        return {f"mean/{metric}": sum(values) / len(values)}

    def probabilities(self, outputs: Tensor) -> list[dict[str, float]]:
        logits = outputs.float()
        scores = logits.sigmoid() if self.multilabel else logits.softmax(-1)
        return [dict(zip(self.classes, row, strict=True)) for row in scores.tolist()]

    def predict(self, outputs: Tensor) -> list[dict[str, Any]]:
        logits = outputs.float()
        scores = logits.sigmoid() if self.multilabel else logits.softmax(-1)
        found = []
        for row in scores:
            order = torch.argsort(row, descending=True).tolist()
            rounded = {self.classes[i]: round(float(row[i]), 4) for i in order[:5]}
            best = order[0]
            score = round(float(row[best]), 4)
            prediction: dict[str, Any] = {"label": self.classes[best], "score": score, "scores": rounded}
            if self.multilabel:
                prediction["labels"] = [self.classes[i] for i in order if row[i] >= 0.5]
            found.append(prediction)
        return found


def harmonic_mean(values: Sequence[float]) -> float:
    """n / (1 / v_1 + ... + 1 / v_n); 0 where one of them is."""
    if min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)
