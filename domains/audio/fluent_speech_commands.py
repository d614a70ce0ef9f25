"""Fluent Speech Commands: 30,043 spoken commands to a smart home, 31 intents of action, object and location.

    >>> data = FluentSpeechCommands(root="fluent_speech_commands_dataset")
    >>> data.setup()
    >>> data.classes[0], data.train_set[0][0].shape      # ("activate/lamp/none", [400, 128])

L. Lugosch et al., Speech Model Pre-training for End-to-End Spoken Language Understanding,
https://arxiv.org/abs/1904.03670; https://fluent.ai. Layout from documentation: ``data/train_data.csv``,
``valid_data.csv`` and ``test_data.csv`` (path, speakerId, transcription, action, object, location), paths relative to
the root, ``wavs/speakers/<speaker>/<clip>.wav``. No speaker is in two of the sets.
"""

from __future__ import annotations

from pathlib import Path

from core.data.folds import folder_with
from core.data.lists import at_least_two, read_csv
from core.data.sample import Parts
from core.errors import ScionError, listed
from domains.audio.clips import AudioData, Clip

TABLES = {"train": "data/train_data.csv", "validation": "data/valid_data.csv", "test": "data/test_data.csv"}
SLOTS = ("action", "object", "location")


class FluentSpeechCommands(AudioData):
    """Fluent Speech Commands by its official sets: 23,132 clips to train, 3,118 to validate, 3,793 to test.

    A class is an intent, ``action/object/location``. There is no download: the set is given out on request.
    """

    title = "Fluent Speech Commands"
    length = 400  # four seconds
    count = 30_043
    folder = "fluent_speech_commands_dataset"
    obtain = ("it is given out on request at https://fluent.ai (Fluent Speech Commands, for research): unpack it and "
              "give its folder as data.root")

    def layout(self, root: Path) -> Path:
        folder = folder_with(root, TABLES["train"], [self.folder], self.title)
        for table in TABLES.values():
            if not (folder / table).is_file():
                raise ScionError(f"data.root: no {table} in {folder}")
        return folder

    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        clips = []
        for which, table in TABLES.items():
            for line, row in enumerate(read_csv(root / table, ("path", *SLOTS)), start=2):
                if not all(row.get(column) for column in ("path", *SLOTS)):
                    raise ScionError(f"{root / table}, line {line}: a path, an action, an object and a location "
                                     f"wanted, found {listed(row.get(column) for column in ('path', *SLOTS))}")
                intent = "/".join(row[slot] for slot in SLOTS)
                clips.append(Clip(root / row["path"], row["path"], (intent,), which))
        return clips, at_least_two(sorted({clip.labels[0] for clip in clips}), f"data.root: {root}")

    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        return {which: [row for row, clip in enumerate(clips) if clip.group == which] for which in TABLES}
