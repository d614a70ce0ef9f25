"""Speech Commands v2: 105,829 spoken words of a second in 35 classes, with official validation and test lists.

    >>> data = SpeechCommands(root="speech_commands_v0.02")
    >>> data.setup()
    >>> bank, target = data.train_set[0]        # bank [100, 128], normalised; target 0 .. 34

P. Warden, Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition, https://arxiv.org/abs/1804.03209.
Layout from documentation: a folder for each word, ``_background_noise_`` (no word, left out), and
``validation_list.txt`` and ``testing_list.txt`` with a line ``word/file.wav`` for each clip; what neither lists is for
training. The lists keep the clips of a speaker together.
"""

from __future__ import annotations

from pathlib import Path

from core.data.download import Archive
from core.data.folds import folder_with
from core.data.lists import as_text, at_least_two
from core.data.sample import Parts
from core.errors import ScionError
from core.files import read_text
from domains.audio.clips import AudioData, Clip

LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


class SpeechCommands(AudioData):
    """Speech Commands v2, all 35 words, by its official lists: 84,843 clips to train, 9,981 to validate, 11,005 to
    test."""

    title = "Speech Commands v2"
    length = 100  # one second
    count = 105_829
    archive = Archive("http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz", "sha256",
                      "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58", "speech_commands_v0.02",
                      "2.4 GB", inside=False)

    def layout(self, root: Path) -> Path:
        inside = ["speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02"]  # the latter as torchaudio puts it
        folder = folder_with(root, LISTS["test"], inside, self.title)
        if not (folder / LISTS["validation"]).is_file():
            raise ScionError(f"data.root: no {LISTS['validation']} in {folder}")
        return folder

    def table(self, root: Path) -> tuple[list[Clip], list[str]]:
        words = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and folder.name[0] not in "._")
        at_least_two(words, f"data.root: {root}")
        group: dict[str, str] = {}
        for which, file in LISTS.items():
            for line, name in enumerate(_lines(root / file), start=1):
                if name.count("/") != 1 or name.partition("/")[0] not in words:
                    raise ScionError(f"{root / file}, line {line}: {name!r} is no word/file.wav with a word that has a "
                                     "folder")
                if group.setdefault(name, which) != which:
                    raise ScionError(f"{root / file}, line {line}: {name!r} stands in {LISTS['validation']} too")
        clips = []
        for word in words:
            names = {f"{word}/{file.name}" for file in (root / word).glob("*.wav")}
            if not names:
                raise ScionError(f"data.root: no .wav file in the folder {root / word}")
            names |= {name for name in group if name.startswith(f"{word}/")}  # listed and absent: told when looked at
            clips += [Clip(root / name, name, (as_text(word),), group.get(name, "train")) for name in sorted(names)]
        return clips, [as_text(word) for word in words]

    def parts(self, clips: list[Clip], bad: set[int]) -> Parts:
        return {which: [row for row, clip in enumerate(clips) if clip.group == which] for which in ("train", *LISTS)}

    def stand_ins(self) -> list[str]:
        return [f"word {number}" for number in range(35)]


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not lines:
        raise ScionError(f"{file}: empty; one word/file.wav a line wanted")
    return lines
