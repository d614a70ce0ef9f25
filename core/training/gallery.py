"""What a model says of pictures, shown: a grid of inputs with predictions and scores, or queries with their nearest
neighbours.

Data in which there is nothing to see (`DataModule.illustrate`) leave no picture.
"""

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
    if dataset is None or not len(dataset):
        return False
    first_input = dataset[0][0]
    if data.illustrate(first_input[None]) is None:  # asked of one sample, before the model runs on many
        return False
    if not tuner.task.compares:
        _draw_predictions(tuner, data, dataset, file, title)
        return True
    table = _table_of_neighbours(tuner)
    if table is None:
        return False
    rows = []
    for numbers in table:
        rows.append([dataset[int(number)] for number in numbers])
    _draw_neighbours(data, rows, file, title)
    return True


def _table_of_neighbours(tuner: FineTuner) -> Any:
    """Rows of a query's number in its data set and those of its neighbours; None where none were compared."""
    for split in ("test", "validation"):
        table = tuner.tables.get(f"{split}/neighbours")
        if table is not None:
            return table
    return None


def _draw_predictions(tuner: FineTuner, data: DataModule, dataset: Any, file: Path, title: str) -> None:
    count = min(report.MOST, len(dataset))
    # Evenly spread: data sets are often sorted by class, and the first pictures would all be of one.
    spread = torch.linspace(0, len(dataset) - 1, count).round()
    items = [dataset[int(number)] for number in spread]
    inputs = torch.stack([item[0] for item in items])
    with torch.inference_mode():
        model = tuner.eval()
        device = next(tuner.parameters()).device
        outputs = model(inputs.to(device))
    texts: list[str] = []
    right: list[bool] = []
    for (_, target), prediction in zip(items, tuner.task.predict(outputs), strict=True):
        truth = _names(target, data.classes)
        predicted = prediction["labels"] if "labels" in prediction else [prediction["label"]]
        is_right = sorted(predicted) == sorted(truth)
        text = caption(prediction)
        if not is_right:
            text += f"\nis {', '.join(truth) or 'none'}"
        right.append(is_right)
        texts.append(text)
    report.gallery(data.illustrate(inputs), texts, file, title, right)


def _names(target: Any, classes: Sequence[str]) -> list[str]:
    """The classes of a target: one for a number, those that are on for a row of several labels."""
    if isinstance(target, Tensor) and target.dim() == 1:
        return [name for name, on in zip(classes, target.tolist(), strict=True) if on >= 0.5]
    return [classes[int(target)]]


def caption(prediction: dict[str, Any]) -> str:
    """A prediction in a few words: the label, or the labels, and the best score."""
    if "labels" in prediction:
        label = ", ".join(prediction["labels"]) or "none"
    else:
        label = prediction["label"]
    return f"{label} {prediction['score']:.2f}"


def _draw_neighbours(data: DataModule, rows: list[list[Any]], file: Path, title: str) -> None:
    """A row for each query, itself first; a neighbour is right where it is of the query's class."""
    inputs = torch.stack([item[0] for row in rows for item in row])
    pictures = data.illustrate(inputs)
    texts: list[str] = []
    right: list[bool | None] = []
    for query, *neighbours in rows:
        own_class = _class_of(query)
        texts.append(f"query\nclass {own_class}")
        right.append(None)  # no frame
        for place, neighbour in enumerate(neighbours, start=1):
            found = _class_of(neighbour)
            texts.append(f"neighbour {place}\nclass {found}")
            right.append(found == own_class)
    report.gallery(pictures, texts, file, title, right, columns=len(rows[0]))


def _class_of(item: Any) -> int:
    target = item[1]
    # [class, role] where samples ask or are found (`core.tasks.embedding`).
    if isinstance(target, Tensor) and target.dim():
        return int(target[0])
    return int(target)


def of_files(data: DataModule, inputs: Sequence[Tensor], texts: Sequence[str], file: Path, title: str = "",
             columns: int = 8) -> bool:
    """Show inputs of files with these texts below them; returns whether there was something to see."""
    pictures = data.illustrate(torch.stack(list(inputs))) if inputs else None
    if pictures is not None:
        report.gallery(pictures, texts, file, title, columns=columns)
    return pictures is not None
