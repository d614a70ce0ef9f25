"""What a model says of pictures, shown: a grid of inputs with predictions and scores, or queries with their nearest
neighbours. Data in which there is nothing to see (`DataModule.illustrate`) leave no picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import report
from core.data import DataModule
from core.training.finetuner import FineTuner


def of_run(tuner: FineTuner, data: DataModule, file: Path, title: str = "") -> bool:
    """Show some of the test set, spread evenly (of the validation set where no test is made): each picture with the
    prediction, its score, and the truth where that is another; where samples are compared, queries with their nearest
    neighbours. Returns whether there was something to see."""
    dataset: Any = getattr(data, "test_set", None) or data.validation_set
    if dataset is None or not len(dataset) or data.illustrate(dataset[0][0][None]) is None:
        return False
    if tuner.task.compares:
        table = next((found for stage in ("test", "validation")
                      if (found := tuner.tables.get(f"{stage}/neighbours")) is not None), None)
        if table is None:
            return False
        _neighbours(data, [[dataset[int(i)] for i in row] for row in table], file, title)
        return True
    count = min(report.MOST, len(dataset))
    items = [dataset[int(i)] for i in torch.linspace(0, len(dataset) - 1, count).round()]
    inputs = torch.stack([item[0] for item in items])
    with torch.inference_mode():
        outputs = tuner.eval()(inputs.to(next(tuner.parameters()).device))
    texts, right = [], []
    for (_, target), prediction in zip(items, tuner.task.predict(outputs), strict=True):
        truth = _names(target, data.classes)
        said = prediction["labels"] if "labels" in prediction else [prediction["label"]]
        right.append(sorted(said) == sorted(truth))
        texts.append(caption(prediction) + ("" if right[-1] else f"\nis {', '.join(truth) or 'none'}"))
    report.gallery(data.illustrate(inputs), texts, file, title, right)
    return True


def _names(target: Any, classes: Sequence[str]) -> list[str]:
    if isinstance(target, Tensor) and target.dim() == 1:
        return [name for name, on in zip(classes, target.tolist(), strict=True) if on >= 0.5]
    return [classes[int(target)]]


def caption(prediction: dict[str, Any]) -> str:
    """A prediction in a few words: the label, or the labels, and the best score."""
    label = ", ".join(prediction["labels"]) or "none" if "labels" in prediction else prediction["label"]
    return f"{label} {prediction['score']:.2f}"


def _neighbours(data: DataModule, rows: list[list[Any]], file: Path, title: str) -> None:
    def label(item: Any) -> int:
        return int(item[1][0]) if isinstance(item[1], Tensor) and item[1].dim() else int(item[1])

    pictures = data.illustrate(torch.stack([item[0] for row in rows for item in row]))
    texts = [f"query\nclass {label(item)}" if not place else f"neighbour {place}\nclass {label(item)}"
             for row in rows for place, item in enumerate(row)]
    right = [label(item) == label(row[0]) if place else None for row in rows for place, item in enumerate(row)]
    report.gallery(pictures, texts, file, title, right, columns=len(rows[0]))


def of_files(data: DataModule, inputs: Sequence[Tensor], texts: Sequence[str], file: Path, title: str = "",
             columns: int = 8) -> bool:
    """Show inputs of files with these texts below them; returns whether there was something to see."""
    pictures = data.illustrate(torch.stack(list(inputs))) if inputs else None
    if pictures is not None:
        report.gallery(pictures, texts, file, title, columns=columns)
    return pictures is not None
