r"""Anybody's sounds: a folder with a subfolder for each class, or a table of files and labels.

    >>> data = AudioFolder(root="my_sounds")                                        # my_sounds/<class>/*.wav
    >>> data = AudioFolder(root="my_sounds", table="labels.csv", separator="|")     # several labels a file
    >>> data = AudioFolder(root="recordings", label_pattern=r"^(\d)_")              # labels in the files' names

Files may have any rate, length and number of channels; only as much of each is read as is used. What cannot be read is
left out and named.
"""

from __future__ import annotations

from typing import Any

from core.data.own_files import FolderData
from core.errors import ScionError
from domains.audio.clips import AudioData, Clip


class AudioFolder(FolderData, AudioData):
    """Sounds in a folder, labelled by their subfolders, by a table, or by their names.

    Args:
        start_column: the table's column of seconds at which clips begin in longer files; null: all begin at 0.
        frames: frames of a clip (10 ms each); null is the length that nine tenths of the files fit into, at most 500.
        root, table, file_column and all others: see ``FolderData`` and ``AudioData``.
    """

    title = "AudioFolder"
    length = None
    obtain = "give the folder of your sounds as data.root"
    kind = Clip
    benchmarks = {"meta/esc50.csv": "domains/audio/esc50.yaml",
                  "testing_list.txt": "domains/audio/speech_commands.yaml",
                  "metadata/UrbanSound8K.csv": "domains/audio/urbansound8k.yaml",
                  "data/train_data.csv": "domains/audio/fluent_speech_commands.yaml"}

    def __init__(self, root: str | None = None, start_column: str | None = None, **common: Any) -> None:
        super().__init__(root, **common)
        self.columns["start"] = start_column

    def place(self, row: dict[str, str], names: dict[str, str | None], where: str) -> tuple[str, dict[str, Any]]:
        text = row.get(str(names["start"]), "0")
        try:
            start = float(text or 0)
        except ValueError:
            start = -1.0
        if not 0 <= start < float("inf"):
            raise ScionError(f"{where}: {text!r} is no start in seconds")
        return f"{start:g}" if names["start"] else "", {"start": start}
