"""What a model says of pictures, shown: a grid of inputs with predictions and scores, or queries with their nearest
neighbours.

Data in which there is nothing to see (`DataModule.illustrate`) leave no picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core import report
from core.data import DataModule
from core.data.batch import move
from core.training.finetuner import FineTuner


def of_run(tuner: FineTuner, data: DataModule, file: Path, title: str = "") -> bool:
    """Show some of the first test set, spread evenly (of the validation set where no test is made): each picture with
    the prediction, its score, and the truth where that is another; where samples are compared, queries with their
    nearest neighbours. Returns whether there was something to see."""
    dataset: Any = next(iter(data.test_sets.values()), None) or data.validation_set
    if dataset is None or not len(dataset) or type(data).illustrate is DataModule.illustrate:
        return False
    first = dataset[0]
    if not isinstance(first, (tuple, list)):  # only a batch of them is inputs and targets
        return False
    if data.illustrate(data.stack([first[0]])) is None:  # asked of one sample, before the model runs on many
        return False
    if tuner.task.compares:
        table = _table_of_neighbours(tuner)
        order = data.sampler(dataset, train=False).order()  # in which the samples came, which may be by length
        rows = [[order[int(number)] for number in line] for line in ([] if table is None else table)]
        columns = len(rows[0]) if rows else 0
    else:
        count = min(report.MOST, len(dataset))
        # Evenly spread: data sets are often sorted by class, and the first pictures would all be of one.
        spread = torch.linspace(0, len(dataset) - 1, count).round()
        rows, columns = [[int(number) for number in spread]], None
    if not rows:
        return False
    _draw(tuner, data, dataset, rows, file, title, columns)
    return True


def _table_of_neighbours(tuner: FineTuner) -> Any:
    """Rows of a query's number in its data set and those of its neighbours; None where none were compared."""
    for split in ("test", "validation"):
        table = tuner.tables.get(f"{split}/neighbours")
        if table is not None:
            return table
    return None


def _draw(tuner: FineTuner, data: DataModule, dataset: Any, rows: list[list[int]], file: Path, title: str,
          columns: int | None) -> None:
    """Draw samples with what the task says of them, each group of rows by itself."""
    inputs: list[Any] = []
    texts: list[str] = []
    right: list[bool | None] = []
    for group in rows:
        items = [dataset[number] for number in group]
        batch = [item[0] for item in items]
        outputs = None if tuner.task.compares else _outputs(tuner, data.stack(batch))
        inputs += batch
        for shown in tuner.task.show(group, outputs, [item[1] for item in items]):
            texts.append(shown.text)
            right.append(shown.is_right)
    layout = {} if columns is None else {"columns": columns}
    report.gallery(data.illustrate(data.stack(inputs)), texts, file, title, right, **layout)


def _outputs(tuner: FineTuner, inputs: Any) -> Any:
    device = next(tuner.parameters()).device
    with torch.inference_mode():
        model = tuner.eval()
        return model(move(inputs, device))


def of_files(data: DataModule, inputs: Sequence[Any], texts: Sequence[str], file: Path, title: str = "",
             columns: int = 8) -> bool:
    """Show inputs of files with these texts below them; returns whether there was something to see."""
    pictures = data.illustrate(data.stack(inputs)) if inputs else None
    if pictures is not None:
        report.gallery(pictures, texts, file, title, columns=columns)
    return pictures is not None
