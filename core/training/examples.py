"""What a model says of texts, shown: a table of test samples with prediction, score and truth, wrong ones first.

Data in which there is nothing to read (`DataModule.text_of`) leave no page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.data import DataModule
from core.data.batch import move
from core.errors import one_line
from core.files import write_atomically
from core.training.finetuner import FineTuner

MOST = 24
"""Samples on the page."""
LOOKED_AT = 10 * MOST
"""Samples among which wrong ones are looked for."""
LONGEST = 200
"""Characters of a text on the page."""


@dataclass(frozen=True)
class Example:
    """One sample with what the model says of it."""

    name: str
    text: str
    prediction: str
    score: str
    truth: str
    is_right: bool | None
    """None where nobody knows."""


def of_run(tuner: FineTuner, data: DataModule, file: Path, title: str = "") -> bool:
    """Write some of the first test set (of the validation set where no test is made), spread evenly, with what the task
    predicts for them; returns whether there was something to read.

    Of `LOOKED_AT` samples the wrong ones come first. They fill at most half of the page where there are enough right
    ones, so that it shows both.
    """
    dataset: Any = next(iter(data.test_sets.values()), None) or data.validation_set
    # The logits of all tokens of a batch would be large, and say nothing of a sample as a whole.
    if tuner.task.compares or tuner.task.reads == "logits":
        return False
    if dataset is None or not len(dataset) or data.text_of(dataset, 0) is None:
        return False
    count = min(LOOKED_AT, len(dataset))
    # Evenly spread: data sets are often sorted by class, and the first samples would all be of one.
    spread = torch.linspace(0, len(dataset) - 1, count).round().int().tolist()
    found: list[Example] = []
    for start in range(0, count, data.batch_size):
        found += _examples(tuner, data, dataset, spread[start:start + data.batch_size])
    if not found:
        return False
    text = _page(found, title)
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))
    return True


def _examples(tuner: FineTuner, data: DataModule, dataset: Any, rows: Sequence[int]) -> list[Example]:
    """These samples with what the task says of them; none where it says nothing of single samples."""
    items = [dataset[row] for row in rows]
    inputs = data.stack([item[0] for item in items])
    targets = [item[1] for item in items]
    device = next(tuner.parameters()).device
    with torch.inference_mode():
        outputs = tuner.eval()(move(inputs, device))
    said = tuner.task.predict(outputs)
    if len(said) != len(items):
        return []
    shown = tuner.task.show(rows, outputs, targets)
    found = []
    for row, prediction, target, one in zip(rows, said, targets, shown, strict=True):
        truth = tuner.task.truth(target)
        score = prediction.get("score")
        found.append(Example(
            name=data.name_of(dataset, row),
            text=data.text_of(dataset, row) or "",
            prediction=_label(prediction, one.text),
            score="" if score is None else f"{score:.2f}",
            truth="" if truth is None else ", ".join(truth) or "none",
            is_right=one.is_right))
    return found


def _label(prediction: dict[str, Any], otherwise: str) -> str:
    """The label or labels of a prediction; what the task would write below a picture where it has none."""
    if "labels" in prediction:
        return ", ".join(prediction["labels"]) or "none"
    return str(prediction["label"]) if "label" in prediction else otherwise


def _page(found: Sequence[Example], title: str) -> str:
    wrong = [example for example in found if example.is_right is False]
    others = [example for example in found if example.is_right is not False]
    room = max(MOST // 2, MOST - len(others))
    chosen = (wrong[:room] + others)[:MOST]
    note = f"{len(found)} samples were looked at"
    if any(example.is_right is not None for example in found):
        note += f", {len(wrong)} of them wrong"
    lines = [f"# {_cell(title)}", "", f"{note}; wrong ones come first.", "",
             "| | sample | text | prediction | score | truth |", "|---|---|---|---|---|---|"]
    for example in chosen:
        mark = {True: "", False: "wrong", None: "?"}[example.is_right]
        cells = [mark, example.name, example.text, example.prediction, example.score, example.truth]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as it can stand in a cell: one line, not too long, and nothing in it that ends the cell or is markup."""
    plain = one_line(text)
    if len(plain) > LONGEST:
        plain = plain[:LONGEST - 1].rstrip() + "…"
    for character in "\\|`*_<[":
        plain = plain.replace(character, f"\\{character}")
    return plain
