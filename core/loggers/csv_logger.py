"""A table of what was logged that a resumed run goes on with."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import loggers

FILE = "metrics.csv"


class CSVLogger(loggers.CSVLogger):
    """Lightning's ``metrics.csv``, which keeps the rows of a run that was stopped.

    Lightning's begins a new table and deletes the one that is there. Here the rows before the first step that is logged
    again stay.

    Args:
        save_dir: the folder; a run gives one inside its own.
        name: of a folder in it; "" is none.
        version: of a folder in that; None is the next free number, "" none.
        prefix: of the names of what is logged.
        flush_logs_every_n_steps: steps between two writings.
    """

    def __init__(self, save_dir: str, name: str | None = "lightning_logs", version: int | str | None = None,
                 prefix: str = "", flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)
        self._before: list[dict[str, Any]] | None = None
        """The rows that were there, until the first one is logged."""

    @property
    def experiment(self) -> Any:
        """What writes the table; in the first process alone."""
        if self._experiment is not None or rank_zero_only.rank:
            return super().experiment
        self._before = _rows(Path(self.log_dir) / FILE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the present table is deleted
            writer = super().experiment
        _write(writer, self._before)  # at once: the run may be stopped before anything is logged
        return writer

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        writer = self.experiment
        before, self._before = self._before or [], None
        if step is not None and any(int(row["step"]) >= step for row in before):
            (Path(self.log_dir) / FILE).unlink(missing_ok=True)
            _write(writer, [row for row in before if int(row["step"]) < step])
        super().log_metrics(dict(metrics), step)


def _write(writer: Any, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        values = {name: value for name, value in row.items() if name != "step"}
        writer.log_metrics(values, int(row["step"]))
    writer.save()


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a table, without empty fields; none of one that is not there or is damaged."""
    found: list[dict[str, Any]] = []
    try:
        with file.open(newline="", encoding="utf-8") as table:
            for row in csv.DictReader(table):
                given = {name: value for name, value in row.items() if name and value}
                if given.get("step", "").isdigit():  # the last line may have been cut off
                    found.append(given)
    except (OSError, ValueError, csv.Error):
        return []
    return found
