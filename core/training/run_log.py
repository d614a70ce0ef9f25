"""A run's log.txt: held back until there is a folder to write it into."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import IO, Any

from core.files import open_to_append

LOGGERS = ("scion", "lightning.pytorch", "py.warnings")
QUIET = (".*does not have many workers.*", ".*LeafSpec.*", ".*isinstance.treespec.*", ".*is not a Tensor.*",
         ".*eval mode.*", ".*Total length of .*zero.*", ".*smaller than the logging interval.*",
         ".*Checkpoint directory.*", ".*Detected call of .lr_scheduler.*")
"""Warnings of Lightning and torch that say nothing to the person who started a run."""


class _Held(logging.Handler):
    """Keeps records until it has a file to write them to. A full disk must not stop a run at its log."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []
        self.file: logging.StreamHandler[IO[str]] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.file is None:
            self.kept.append(record)
        else:
            self.file.handle(record)


class RunLog:
    """Within this context our log and Python's warnings are kept, and Lightning's chatter stays off the screen."""

    def __enter__(self) -> RunLog:
        self._handler = _Held()
        self._chatter = logging.getLogger("lightning.pytorch")
        self._level, self._format = self._chatter.level, warnings.formatwarning
        for name in LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
        logging.getLogger("scion").setLevel(logging.INFO)
        self._chatter.setLevel(logging.WARNING)
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        for text in QUIET:
            warnings.filterwarnings("ignore", text)
        warnings.formatwarning = self._warning  # called for those warnings alone that are shown
        return self

    def write_to(self, file: Path) -> None:
        """Write what was kept, and all that follows, to the end of ``file``.

        Raises:
            ScionError: it is a link, or no file.
            OSError: it cannot be opened.
        """
        handler = logging.StreamHandler(open_to_append(file))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        self._handler.file = handler
        for record in self._handler.kept:
            handler.handle(record)
        self._handler.kept.clear()

    def _warning(self, message: Any, category: type[Warning], *_: Any) -> str:
        text = f"{category.__name__}: {message}"
        logging.getLogger("py.warnings").warning(text)
        return f"{text}\n"

    def __exit__(self, *error: Any) -> None:
        warnings.formatwarning = self._format
        self._filters.__exit__(*error)
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        if self._handler.file is not None:
            self._handler.file.close()
            self._handler.file.stream.close()
        self._chatter.setLevel(self._level)
