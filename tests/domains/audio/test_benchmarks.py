"""UrbanSound8K, Speech Commands and Fluent Speech Commands on generated trees of their documented layouts."""

from __future__ import annotations

import hashlib
import tarfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from core.config import make, points
from core.data import DataModule, labelled
from core.data.labelled import few
from core.errors import ScionError
from domains.audio import ESC50, FluentSpeechCommands, SpeechCommands, UrbanSound8K, clips, mini
from domains.audio.clips import AudioData
from tests.domains.audio.conftest import write_sound, write_tree

HOME = Path(clips.__file__).parent
BENCHMARKS: list[type[AudioData]] = [ESC50, UrbanSound8K, SpeechCommands, FluentSpeechCommands]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "reachable", lambda *_: False)


@pytest.fixture
def small_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the mini, and none of it in the cache that other tests share."""
    monkeypatch.setattr(mini, "SIZES", {which: size // 10 for which, size in mini.SIZES.items()})
    monkeypatch.setattr(mini, "split", mini.split.__wrapped__)


def urban(root: Path, takes: int = 1) -> Path:
    """Three of the ten classes in all ten folds; 44.1 kHz and stereo, as many of the slices are."""
    lines = ["slice_file_name,fsID,start,end,salience,fold,classID,class"]
    for fold in range(1, 11):
        for number, name in ((0, "air_conditioner"), (3, "dog_bark"), (8, "siren")):
            for take in range(takes):
                file = f"{1000 + fold}-{number}-0-{take}.wav"
                write_sound(root / "audio" / f"fold{fold}" / file, 0.1, 44_100, channels=2, seed=take)
                lines.append(f"{file},{1000 + fold},0.0,0.1,1,{fold},{number},{name}")
    (root / "metadata").mkdir()
    (root / "metadata" / "UrbanSound8K.csv").write_text("\n".join(lines) + "\n")
    return root


def speech(root: Path, speakers: int = 6) -> Path:
    """Two words; of each the first speaker validates and the second tests."""
    names = [[f"{word}/{speaker:08x}_nohash_0.wav" for speaker in range(speakers)] for word in ("no", "yes")]
    for name in [name for word in names for name in word]:
        write_sound(root / name)
    write_sound(root / "_background_noise_" / "white_noise.wav")
    (root / "validation_list.txt").write_text("".join(f"{word[0]}\n" for word in names))
    (root / "testing_list.txt").write_text("".join(f"{word[1]}\n" for word in names))
    (root / "LICENSE").write_text("CC BY 4.0\n")
    return root


def fluent(root: Path) -> Path:
    """Two intents of two speakers each."""
    intents = (("activate", "lamp", "none"), ("increase", "volume", "none"))
    for number, table in enumerate(("train", "valid", "test")):
        lines = [",path,speakerId,transcription,action,object,location"]
        for row, (intent, take) in enumerate((intent, take) for intent in intents for take in range(2)):
            path = f"wavs/speakers/s{number}/{row}.wav"
            write_sound(root / path, seed=row + take)
            lines.append(f'{row},{path},s{number},"Turn it, please",{",".join(intent)}')
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / f"{table}_data.csv").write_text("\n".join(lines) + "\n")
    return root


def _ready(kind: type[AudioData], **options: Any) -> Any:
    data = kind(**{"frames": 16, **options})
    data.setup()
    return data


def _names(data: Any, which: str) -> list[str]:
    table = data._listing[0]
    return [table[row].name for row in getattr(data, f"{which}_set").rows]


# ------------------------------------------------------------------------------------------------- their sets


def test_ten_folds_of_urban_sounds(tmp_path: Path, cache: str) -> None:
    root, seen = str(urban(tmp_path / "UrbanSound8K").parent), []  # the folder that the archive unpacks to is found
    for fold in range(1, 11):
        data = _ready(UrbanSound8K, root=root, fold=fold, cache=cache)
        assert data.classes == ["air_conditioner", "dog_bark", "siren"] and data.validation_set is None
        assert [len(data.train_set), len(data.test_set)] == [27, 3]
        assert not {*_names(data, "train")} & {*_names(data, "test")}
        assert all(name.startswith(f"fold{fold}/") for name in _names(data, "test"))
        seen += _names(data, "test")
    assert len(set(seen)) == 30 and data.origin["name"] == "30 clips in UrbanSound8K's layout"
    assert [data.test_set[index][1] for index in range(3)] == [0, 1, 2]  # the table's numbers have holes
    data = _ready(UrbanSound8K, root=root, fold=10, validation_fold="next", cache=cache)
    assert {name.partition("/")[0] for name in _names(data, "validation")} == {"fold1"} and len(data.train_set) == 24


def test_official_lists_of_spoken_words(tmp_path: Path, cache: str) -> None:
    data = _ready(SpeechCommands, root=str(speech(tmp_path / "root")), cache=cache)
    assert data.classes == ["no", "yes"] == data.peek()
    assert _names(data, "validation") == ["no/00000000_nohash_0.wav", "yes/00000000_nohash_0.wav"]
    assert _names(data, "test") == ["no/00000001_nohash_0.wav", "yes/00000001_nohash_0.wav"]
    assert len(_names(data, "train")) == 8 and data.train_set[0][0].shape == (16, 128)
    assert SpeechCommands.length == 100 and SpeechCommands(root=str(tmp_path / "root"), cache=cache).frames == 100


def test_intents_of_spoken_commands(tmp_path: Path, cache: str) -> None:
    root = fluent(tmp_path / "fluent_speech_commands_dataset")
    data = _ready(FluentSpeechCommands, root=str(root.parent), cache=cache)
    assert data.classes == ["activate/lamp/none", "increase/volume/none"]
    for number, which in enumerate(("train", "validation", "test")):
        assert _names(data, which) == [f"wavs/speakers/s{number}/{row}.wav" for row in range(4)]
    assert [data.test_set[index][1] for index in range(4)] == [0, 0, 1, 1]
    assert data.frames == 16 and FluentSpeechCommands.length == 400


# ------------------------------------------------------------------------------------------------- what is told


def _fails(kind: type[AudioData], words: str, **options: Any) -> None:
    with pytest.raises(ScionError, match=words) as caught:
        _ready(kind, **options)
    assert "\n" not in str(caught.value)


def test_broken_files_of_a_benchmark_stop_the_run_by_name(tmp_path: Path, cache: str) -> None:
    root = urban(tmp_path / "urban")
    broken = root / "audio" / "fold4" / "1004-3-0-0.wav"
    broken.write_text("no sound")
    _fails(UrbanSound8K, "1004-3-0-0.wav: no readable sound.*skip_bad", root=str(root), cache=cache)
    assert len(_ready(UrbanSound8K, root=str(root), cache=cache, skip_bad=True).train_set) == 26
    root = speech(tmp_path / "speech")
    (root / "yes" / "00000001_nohash_0.wav").unlink()
    _fails(SpeechCommands, "yes/00000001_nohash_0.wav: the table lists it", root=str(root), cache=cache)
    root = fluent(tmp_path / "fluent")
    (root / "wavs/speakers/s2/3.wav").write_bytes(b"")
    _fails(FluentSpeechCommands, "s2/3.wav: the sound file is empty", root=str(root), cache=cache)


def test_wrong_layouts_give_one_line(tmp_path: Path, cache: str) -> None:
    root = urban(tmp_path / "urban")
    table = root / "metadata" / "UrbanSound8K.csv"
    common: dict[str, Any] = {"root": str(root), "cache": cache}
    _fails(UrbanSound8K, "no metadata/UrbanSound8K.csv in", root=str(tmp_path))
    for options, words in (({"fold": 11}, "1 to 10"), ({"validation_fold": 1}, "is the test fold"),
                           ({"shots": 0}, "data.shots: 0")):
        _fails(UrbanSound8K, words, **common, **options)
    good = table.read_text()
    for text, words in ((good.replace("classID", "class_id"), r"no column classID \(did you mean 'class_id'"),
                        (good.replace(",4,3,", ",four,3,"), "line 12: a file name, two whole numbers"),
                        (good.replace(",3,dog_bark", ",0,dog_bark"), "target 0 is 'dog_bark' here"),
                        (good.splitlines()[0] + "\n", "no rows")):
        table.write_text(text)
        _fails(UrbanSound8K, words, **common)
    root = speech(tmp_path / "speech")
    common["root"] = str(root)
    (root / "maybe").mkdir()
    _fails(SpeechCommands, "no .wav file in the folder .*maybe", **common)
    (root / "maybe").rmdir()
    for text, words in (("house/1.wav\n", "line 1: 'house/1.wav' is no word/file.wav"), ("", "empty; one word/file"),
                        ("no/00000000_nohash_0.wav\n", "stands in validation_list.txt too")):
        (root / "testing_list.txt").write_text(text)
        _fails(SpeechCommands, words, **common)
    (root / "validation_list.txt").unlink()
    _fails(SpeechCommands, "no validation_list.txt", **common)
    root = fluent(tmp_path / "fluent")
    common["root"] = str(root)
    table = root / "data" / "test_data.csv"
    good = table.read_text()
    table.write_text(good.replace(",lamp,none", ",lamp"))
    _fails(FluentSpeechCommands, "test_data.csv, line 2: a path, an action", **common)
    table.write_text(good.replace("lamp", "radio"))
    _fails(FluentSpeechCommands, "training set holds none of activate/radio/none", **common)
    table.unlink()
    _fails(FluentSpeechCommands, "no data/test_data.csv", **common)


@pytest.mark.usefixtures("small_mini")
@pytest.mark.parametrize("kind", BENCHMARKS)
def test_without_data_the_mini_stands_in_loudly(kind: type[AudioData], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{kind.title} is not in the cache.*built-in mini"):
        assert kind(cache=str(tmp_path)).frames == 112
    with pytest.raises(ScionError, match="data.source real") as caught:
        _ready(kind, source="real", cache=str(tmp_path))
    assert kind.archive or "fluent.ai" in str(caught.value)  # what cannot be downloaded says where it is given out
    data = _ready(kind, source="mini", frames=None, shots=2)
    assert data.origin["source"] == "mini" and "2 training clips a class" in data.origin["name"]
    assert kind is ESC50 or kind.title in data.origin["name"]
    assert len(data.train_set) == 20 and len(data.test_set) == 40
    assert (data.validation_set is None) == (kind is UrbanSound8K)


@pytest.mark.parametrize("kind", [UrbanSound8K, SpeechCommands])
def test_downloads_are_checked(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {UrbanSound8K: urban, SpeechCommands: speech}[kind](tmp_path / kind.archive.folder)
    packed, cache = tmp_path / "archive.tar.gz", tmp_path / "cache"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tree, "." if not kind.archive.inside else tree.name)  # Speech Commands has no folder around it
    monkeypatch.setattr(kind, "archive", replace(kind.archive, url=packed.as_uri()))
    monkeypatch.setattr(labelled, "reachable", lambda *_: True)
    _fails(kind, f"{kind.archive.algorithm.upper()} sum is .*, not the published {kind.archive.checksum}",
           cache=str(cache))
    known = hashlib.new(kind.archive.algorithm, packed.read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "archive", replace(kind.archive, checksum=known))
    whole = len(list(tree.rglob("*-*.wav")) or list(tree.rglob("*_nohash_*.wav")))
    _fails(kind, f"{whole} clips of {kind.count} listed, 0 absent", cache=str(cache))
    assert not list((cache / "audio").iterdir())  # nothing half-done is left behind
    monkeypatch.setattr(kind, "count", whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _ready(kind, cache=str(cache)).origin == {"source": "real", "name": kind.title}
    packed.unlink()
    assert _ready(kind, cache=str(cache)).origin["source"] == "real"  # now it is there


# ------------------------------------------------------------------------------------------------- few-shot


def test_few_takes_so_many_of_each_class() -> None:
    names = [f"{index}.wav" for index in range(60)]
    labels: list[tuple[str, ...]] = [("abc"[index % 3],) for index in range(60)]
    rows = list(range(6, 60))
    first = few(rows, names, labels, 4, seed=0)
    assert Counter(labels[row] for row in first) == {("a",): 4, ("b",): 4, ("c",): 4} and set(first) <= set(rows)
    assert first == few(rows[::-1], names, labels, 4, seed=0) == sorted(first)
    assert first != few(rows, names, labels, 4, seed=1)
    assert set(first) < set(few(rows, names, labels, 7, seed=0))  # more shots contain fewer
    alone = few([row for row in rows if labels[row] == ("a",)], names, labels, 4, seed=0)
    assert set(alone) == {row for row in first if labels[row] == ("a",)}  # a class does not depend on another
    assert few(rows, names, labels, 99, seed=0) == rows
    several: list[tuple[str, ...]] = [("a", "b") if index % 2 else ("a",) for index in range(60)]
    assert len(few(rows, names, several, 3, seed=0)) == 3  # what was chosen for b counts for a


def test_shots_are_the_same_for_every_method_and_cost_no_more_than_they_use(tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = str(urban(tmp_path / "urban", takes=2)), tmp_path / "cache"
    calls: list[Path] = []
    original = clips._bank
    monkeypatch.setattr(clips, "_bank", lambda file, *rest: (calls.append(file), original(file, *rest))[1])

    def banks(**options: Any) -> torch.Tensor:
        options = {"shots": 3, "seed": 5, **options}
        data = _ready(UrbanSound8K, root=root, cache=str(cache), specaugment=False, **options)
        assert data.origin["name"].endswith(", 3 training clips a class") and len(data.test_set) == 6
        targets = [data.train_set[index][1] for index in range(len(data.train_set))]
        assert Counter(targets) == {0: 3, 1: 3, 2: 3}
        return torch.stack([data.train_set[index][0] for index in range(9)])

    first = banks()
    assert len(calls) == 9 + 6  # the training clips that were drawn, and the test set
    assert torch.equal(first, banks()) and len(calls) == 15
    assert not torch.equal(first, banks(seed=6))
    before = len(calls)
    _ready(UrbanSound8K, root=root, cache=str(cache))  # all of them
    assert len(calls) == before + 60
    assert torch.equal(first, banks()) and len(calls) == before + 60


def test_too_few_clips_for_the_shots_are_told(tmp_path: Path, cache: str) -> None:
    data = _ready(ESC50, root=str(write_tree(tmp_path / "tree")), shots=7, cache=cache)
    assert len(data.train_set) == 18
    assert data.origin["note"] == "data.shots 7: fewer training clips of class_3 (6), class_17 (6), class_40 (6)"


# ------------------------------------------------------------------------------------------------- configurations


@pytest.mark.usefixtures("small_mini")
@pytest.mark.parametrize("file", [
    pytest.param(file.name, marks=[pytest.mark.slow] if "speech" in file.name else [])  # the others' twins
    for file in sorted(HOME.glob("*.yaml"))])
def test_every_configuration_runs_on_the_mini(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    quick = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
             "--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu"]
    assert main(["run", str(HOME / file), "--data.source", "mini", "--model.backbone.name", "nano", *quick,
                 "--run_dir", str(tmp_path / "run")]) == 0
    assert "NOT A BENCHMARK RESULT: the data are a generated mini" in capsys.readouterr().out
    text = (HOME / file).read_text()
    assert f"lightning run domains/audio/{file} " in text


def commands_of(page: str) -> list[list[str]]:
    """The words behind ``lightning run`` of every command of a page, lines continued and variables put in."""
    import shlex

    found: list[list[str]] = []
    variables: dict[str, str] = {}
    for line in page.replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip()) if line.startswith("    ") else []
        if len(words) == 1 and "=" in words[0] and words[0].partition("=")[0].isupper():
            name, _, value = words[0].partition("=")
            variables[name] = value
        elif words[:2] == ["lightning", "run"]:
            words = words[: words.index("#")] if "#" in words else words
            for name, value in variables.items():
                words = [word.replace(f"${name}", value) for word in words]
            found.append(words[2:])
    return found


def test_every_command_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of README.md names keys, methods and options that there are."""
    from core.peft import PEFTMethod

    found = commands_of((HOME / "README.md").read_text())
    assert len(found) > 12
    protocols = 0
    made: set[str] = set()
    monkeypatch.chdir(tmp_path)
    for words in found:
        for key, folder in zip(words, words[1:], strict=False):
            if key == "--data.root":
                (tmp_path / folder).mkdir(exist_ok=True, parents=True)
        run = points(words[0], words[1:])
        for point in run:
            for key, base in (("data", DataModule), ("peft", PEFTMethod)):
                if str(point.config[key]) not in made:
                    make(point.config[key], key, point.domain, base)
                    made.add(str(point.config[key]))
        protocols += len({point.config["peft"]["class_path"] for point in run}) > 4
    assert protocols == 4  # the paper's table, one command a data set


def test_configurations_keep_to_the_paper() -> None:
    for file, kind in (("esc50", ESC50), ("urbansound8k", UrbanSound8K), ("speech_commands", SpeechCommands),
                       ("fluent_speech_commands", FluentSpeechCommands)):
        config = yaml.safe_load((HOME / f"{file}.yaml").read_text())
        assert config["data"]["class_path"] == kind.__name__ and config["seed_everything"] == 10
        assert config["optimizer"]["options"] == {"betas": [0.9, 0.98], "eps": 1e-6}
        assert config["lr_scheduler"] == "cosine" and config["select"] == "last"
    assert [kind.length for kind in BENCHMARKS] == [500, 400, 100, 400]
    assert [kind.count for kind in BENCHMARKS] == [2000, 8732, 105_829, 30_043]
