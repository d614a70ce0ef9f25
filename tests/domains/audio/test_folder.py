"""AudioFolder: subfolders, tables and patterns; one label or several; awkward files; and what is told of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from core.cli import main
from core.errors import ScionError
from domains.audio import AudioFolder, clips, features
from domains.audio.clips import fitting
from tests.domains.audio.conftest import DATA, write_sound

CLASSES = ("bird", "frog", "rain")


@pytest.fixture(autouse=True)
def private_cache(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCION_CACHE", cache)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """What is wrong with a folder is one line."""

    def check(words: str, root: Path, **options: Any) -> None:
        with pytest.raises(ScionError, match=words) as caught:
            _ready(root, **options)
        assert "\n" not in str(caught.value)

    return check


def _ready(root: Path, **options: Any) -> Any:
    data = AudioFolder(str(root), **{"frames": 16, **options})
    data.setup()
    return data


def _sounds(root: Path, each: int = 10, classes: tuple[str, ...] = CLASSES) -> Path:
    for number, name in enumerate(classes):
        for index in range(each):
            write_sound(root / name / f"{index}.wav", seed=100 * number + index)
    return root


def _names(data: Any, which: str) -> set[str]:
    table, bad = data._listing[0], data._listing[2]
    assert not bad or which
    return {table[row].name for row in getattr(data, f"{which}_set").rows}


def _table(root: Path, *lines: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


# ------------------------------------------------------------------------------------------------- sets


def test_subfolders_are_classes_and_a_part_of_each_is_set_apart(tmp_path: Path) -> None:
    root = _sounds(tmp_path / "pond")
    data = _ready(root)
    assert data.classes == list(CLASSES) == data.peek()
    assert data.origin == {"source": "real", "name": "pond (30 clips, 3 classes)"}
    sets = {which: _names(data, which) for which in ("train", "validation", "test")}
    assert [len(names) for names in sets.values()] == [21, 3, 6] and len(set().union(*sets.values())) == 30
    for name in CLASSES:
        assert [sum(file.startswith(name) for file in names) for names in sets.values()] == [7, 1, 2]
    bank, target = data.train_set[0]
    assert bank.shape == (16, 128) and target == 0
    assert sets == {which: _names(_ready(root, seed=3), which) for which in sets}  # the run's seed has no say
    assert sets["test"] != _names(_ready(root, split_seed=1), "test")
    write_sound(root / "bird" / "new.wav", seed=999)
    assert len(_names(_ready(root), "test") ^ sets["test"]) <= 2  # a new file moves few others
    data = _ready(root, validation_share=0.0, test_share=0.5)
    assert data.validation_set is None and len(data.test_set) == 16


def test_folders_of_sets(tmp_path: Path) -> None:
    root = tmp_path / "pond"
    for name, each in (("Train", 3), ("val", 1), ("test", 2)):
        _sounds(root / name, each)
    data = _ready(root)
    assert data.classes == list(CLASSES) and [len(_names(data, which)) for which in ("train", "validation", "test")] \
        == [9, 3, 6]
    assert all(name.startswith("test/") for name in _names(data, "test"))
    # classes that happen to be called so are classes
    data = _ready(_sounds(tmp_path / "traffic", 4, ("bus", "tram", "train")))
    assert data.classes == ["bus", "train", "tram"]


def test_tables_and_their_columns(tmp_path: Path) -> None:
    root = tmp_path / "calls"
    lines = ["Path;Species;Subset;Remark"]
    for index, (name, which) in enumerate((name, which) for name in CLASSES for which in ("train", "dev", "Test")):
        write_sound(root / "audio" / f"{index}.ogg", 0.2)
        lines.append(f"audio/{index}.ogg;{name};{which};none")
    _table(root, *lines)
    data = _ready(root, table="labels.csv", label_column="Species")
    assert data.classes == list(CLASSES)
    assert _names(data, "validation") == {f"audio/{index}.ogg" for index in (1, 4, 7)}
    assert _names(_ready(root / "labels.csv", label_column="Species"), "test") == _names(data, "test")
    (root / "metadata.csv").write_text("file_name,label\n" + "".join(
        f"audio/{index}.ogg,{index // 3}{index // 3}\n" for index in range(9)))
    assert _ready(root).classes == ["00", "11", "22"]  # found by its usual name
    data = _ready(root, table="labels.csv", label_column="Species", classes=["rain", "bird"])
    assert data.classes == ["rain", "bird"] and len(data.train_set) == 2 and "frog left out" in data.origin["note"]


def test_several_labels_make_vectors(tmp_path: Path) -> None:
    root = tmp_path / "scene"
    rows = ["bird|rain", "rain", "bird | frog", "", "frog"] * 6
    for index in range(len(rows)):
        write_sound(root / f"{index}.wav", seed=index)
    _table(root, "file,tags", *(f"{index}.wav,{labels}" for index, labels in enumerate(rows)))
    data = _ready(root, table="labels.csv", separator="|")
    assert data.multilabel and data.classes == list(CLASSES) and "3 labels" in data.origin["name"]
    wanted = {f"{index}.wav": [float(name in labels) for name in CLASSES] for index, labels in enumerate(rows)}
    table = data._listing[0]
    for part in (data.train_set, data.validation_set, data.test_set):
        for index, row in enumerate(part.rows):
            assert part[index][1].tolist() == wanted[table[row].name]
    mixed = _ready(root, table="labels.csv", separator="|", mixup=0.4)
    targets = torch.stack([mixed.train_set[index][1] for index in range(len(mixed.train_set))])
    assert targets.shape[1] == 3 and ((targets > 0) & (targets < 1)).any() and (targets <= 1).all()
    few = _ready(root, table="labels.csv", separator="|", shots=2)
    counts = torch.stack([few.train_set[index][1] for index in range(len(few.train_set))]).sum(0)
    assert len(few.train_set) <= 6 and (counts >= 2).all() and len(few.test_set) == len(data.test_set)


def test_labels_and_sets_from_names(tmp_path: Path) -> None:
    root = tmp_path / "digits"
    for digit in (2, 10):
        for speaker in ("ada", "bob"):
            for take in range(3):
                write_sound(root / "recordings" / f"{digit}_{speaker}_{take}.wav", seed=take)
    write_sound(root / "hello.wav")
    data = _ready(root, label_pattern=r"(\d+)_\w+_\d\.wav$", test_pattern="_bob_", validation_pattern="_ada_2")
    assert data.classes == ["2", "10"]  # by number
    assert _names(data, "test") == {f"recordings/{d}_bob_{t}.wav" for d in (2, 10) for t in range(3)}
    assert _names(data, "validation") == {"recordings/2_ada_2.wav", "recordings/10_ada_2.wav"}
    assert len(data.train_set) == 4 and data.skipped == [f"{root}/hello.wav: data.label_pattern finds no label in its "
                                                         "name"]
    data = _ready(root, label_pattern=r"_(?P<label>ada|bob)_", test_pattern=r"_0\.wav$")
    assert data.classes == ["ada", "bob"] and len(data.test_set) == 4
    assert len(data.train_set) == 8 - len(data.validation_set) > 5  # validation is drawn where no pattern says so


@pytest.mark.data
def test_spoken_digits_by_their_published_split() -> None:
    root = DATA / "fsdd"
    if not root.is_dir():
        pytest.skip("the spoken digits are not at hand (SCION_DATA)")
    data = _ready(root, label_pattern=r"(\d)_\w+_\d+\.wav$", test_pattern=r"_[0-4]\.wav$", frames=None, shots=5)
    assert data.classes == list("0123456789") and len(data.test_set) == 200 and len(data.train_set) == 50
    assert 30 < data.frames < 80  # nine tenths of the files are shorter than 0.8 s
    targets = [data.test_set[index][1] for index in range(200)]
    assert np.bincount(targets).tolist() == [20] * 10


# ------------------------------------------------------------------------------------------------- awkward files


def test_clips_within_a_long_file_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, rate = tmp_path / "long", 8000
    tones = np.concatenate([np.sin(2 * np.pi * hertz * np.arange(rate) / rate) for hertz in (300, 600, 1200, 2400)])
    root.mkdir()
    soundfile.write(root / "tape.flac", np.tile(0.5 * tones, 30).astype(np.float32), rate)  # two minutes
    lines = [f"tape.flac,{'low' if second % 4 < 2 else 'high'},{second},{'test' if second > 12 else 'train'}"
             for second in (0, 1, 2, 3, 13, 15, 118)]
    _table(root, "file,label,from,split", *lines)
    asked: list[int] = []
    original = soundfile.SoundFile.read

    def read(self: Any, frames: int = -1, **options: Any) -> Any:
        asked.append(frames)
        return original(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    data = _ready(root, table="labels.csv", start_column="from", frames=90)
    assert len(asked) == 7 and 0 < max(asked) < 1.1 * rate  # a second of two minutes
    table = data._listing[0]
    for part in (data.train_set, data.test_set):
        for index, row in enumerate(part.rows):
            peak = int(part[index][0][10:80].mean(0).argmax())
            mel = 2595 * np.log10(1 + (300, 600, 1200, 2400)[int(table[row].start) % 4] / 700)
            assert abs(peak - 128 * mel / (2595 * np.log10(1 + 8000 / 700))) < 5
    assert len(_ready(root, table="labels.csv", start_column="from", split_column="split", frames=90).test_set) == 3
    lines = [line.rpartition(",")[0] for line in lines]
    _table(root, "file,label,from", *lines)
    with pytest.raises(ScionError, match="one file is not divided between the sets"):
        _ready(root, table="labels.csv", start_column="from")
    for copy in "bc":
        (root / f"tape {copy}.flac").write_bytes((root / "tape.flac").read_bytes())
        lines += [line.replace("tape", f"tape {copy}") for line in lines[:7]]
    _table(root, "file,label,from", *lines, "tape.flac,low,120")
    data = _ready(root, table="labels.csv", start_column="from")
    assert len(data.skipped) == 1 and "nothing is left from 120 s on" in data.skipped[0]
    assert len(_names(data, "test")) == 7 and len({name.partition("@")[0] for name in _names(data, "test")}) == 1


def test_length_that_suits_most() -> None:
    assert fitting([0.5] * 18 + [600.0]) == 49 and features.samples(49) >= 8000 > features.samples(48)
    assert fitting([600.0] * 5) == 500 and fitting([0.01]) == 16 and fitting([]) == 500


def awkward(root: Path) -> tuple[Path, list[str]]:
    """A folder as people have it; the names of what cannot be read in it."""
    for number, (name, rate, channels) in enumerate((("low", 8000, 1), ("high", 44_100, 2))):
        for index in range(12):
            write_sound(root / name / "day 1" / f"{index}.{('wav', 'flac')[index % 2]}", (0.1, 0.3)[index % 3 == 0],
                        rate, channels, seed=20 * number + index)
    soundfile.write(root / "low" / "ten minutes.wav", np.zeros(600 * 8000, np.int16), 8000)
    (root / "low" / "text.wav").write_text("this is no sound\n")
    (root / "high" / "empty.wav").touch()
    (root / "high" / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(200))
    whole = (root / "high" / "day 1" / "0.wav").read_bytes()
    (root / "high" / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (root / "high" / "notes.txt").write_text("not listed: no sound by its ending")
    (root / "low" / ".hidden.wav").write_text("")
    write_sound(root / "stray.wav")
    return root, ["stray.wav", "cut.wav", "empty.wav", "phone.m4a", "text.wav"]


def test_awkward_folder_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root, bad = awkward(tmp_path / "mess")
    asked: list[int] = []
    original = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames=-1, **options: (
        asked.append(frames), original(self, frames, **options))[1])
    assert main(["run", "domains/audio/folder.yaml", "--data.root", str(root), "--model.backbone.name", "nano",
                 "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--run_dir", "run"]) == 0
    out, err = capsys.readouterr()
    assert asked and 0 < max(asked) < 44_100  # never the ten minutes
    lines = [line.rpartition("\r")[2].lstrip() for line in err.splitlines() if "skipped " in line]
    assert len(lines) == 5 and all(any(name in line for line in lines) for name in bad)
    assert "4 of 29 files could not be read" in out
    record = json.loads(Path("run/metrics.json").read_text())
    assert record["data"]["name"] == "mess (25 clips, 2 classes)"
    assert [line.removeprefix("skipped ") for line in lines[:5]] == record["data"]["skipped"]
    assert 0 <= record["metrics"]["test"]["accuracy"] <= 1
    assert main(["predict", "run", str(root)]) == 2  # some could not be read
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 26 and "ten minutes.wav\t" in out
    assert all(any(name in line for line in err.splitlines()) for name in bad[1:])


def test_what_is_skipped_is_bounded_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _sounds(tmp_path / "pond", 5)
    for index in range(30):
        (root / "frog" / f"bad{index}.wav").touch()
    data = _ready(root)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line or "more" in line]
    assert len(lines) == 11 and lines[-1] == "... and 20 more" and len(data.skipped) == 30
    with pytest.raises(ScionError, match=r"bad0.wav.*skip_bad"):
        _ready(root, skip_bad=False)


def test_several_labels_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "scene"
    for index in range(20):
        write_sound(root / f"{index}.wav", seed=index)
    _table(root, "file,labels", *(f"{index}.wav,{('a', 'a;b', 'b;c', 'c')[index % 4]}" for index in range(20)))
    assert main(["run", "domains/audio/folder.yaml", "--data.root", str(root / "labels.csv"), "--data.separator", ";",
                 "--data.frames", "32", "--model.backbone.name", "nano", "--trainer.max_epochs", "1",
                 "--trainer.accelerator", "cpu", "--select", "best", "--run_dir", "run"]) == 0
    record = json.loads(Path("run/metrics.json").read_text())
    assert record["data"] == {"source": "real", "name": "scene (20 clips, 3 labels)"}
    assert 0 <= record["metrics"]["test"]["map"] <= 1 and "confusion" not in record["metrics"]["test"]
    capsys.readouterr()
    assert main(["predict", "run", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 20 and all(set(entry["labels"]) <= {"a", "b", "c"} for entry in found)


# ------------------------------------------------------------------------------------------------- mistakes


def test_mistakes_in_folders_give_one_line(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = _sounds(tmp_path / "pond", 4)
    fails("no folder", tmp_path / "nowhere")
    (root / "toad").mkdir()
    fails("no sound file in the folder .*toad", root)
    (root / "toad" / "a.wav").touch()
    (root / "toad" / "b.wav").touch()
    fails("training set holds none of toad .*a.wav: the sound file is empty", root)
    fails("one class only", _sounds(tmp_path / "one", 2, ("bird",)))
    flat = tmp_path / "flat"
    write_sound(flat / "a.wav")
    fails("no subfolders; wanted: one for each class", flat)
    _table(flat, "a,b")
    fails("there is labels.csv: is it data.table", flat)
    for sets, words in ((("train", "val"), "none to test"), (("test",), "none to train"),
                        (("train", "val", "valid", "test"), "two folders for one set")):
        place = tmp_path / "-".join(sets)
        for name in sets:
            _sounds(place / name, 1)
        fails(words, place)
    place = _sounds(tmp_path / "sets" / "train", 2).parent
    _sounds(place / "test", 1, ("bird",))
    (place / "test" / "bird" / "0.wav").write_text("no sound")
    fails("no readable clip in the test set", place)
    fails("none of the columns|no file", root, table="labels.csv")
    fails("of 3 classes the training set holds none of bird", _sounds(tmp_path / "pond2", 4), test_pattern="bird/",
          validation_share=0.0)


def test_a_folder_of_other_files_does_not_stop_a_run(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = _sounds(tmp_path / "pond", 4)
    (root / "notes").mkdir()
    (root / "notes" / "monday.txt").write_text("rain")
    with pytest.warns(UserWarning, match=r"folder .*notes is left out: it holds .txt and no sound file"):
        data = _ready(root)
    assert "notes" not in data.classes and "notes is left out" in data.origin["note"]
    one = _sounds(tmp_path / "one", 2, ("bird",))
    (one / "notes").mkdir()
    (one / "notes" / "monday.txt").write_text("rain")
    fails("no sound file in the folder .*notes", one)


def test_a_table_whose_files_lie_elsewhere(tmp_path: Path, fails: Callable[..., None]) -> None:
    """It says how many are gone, where it looked, and where they are; a benchmark is named."""
    root = tmp_path / "esc10"
    for index in range(4):
        write_sound(root / "audio" / f"{index}.wav", seed=index)
    (root / "meta").mkdir()
    (root / "meta" / "labels.csv").write_text("file,label\n0.wav,a\n1.wav,b\n2.wav,a\n3.wav,b\n")
    fails(r"none of the 4 files in .*labels.csv exists; they were looked for in .*esc10, .*esc10/meta, the first is "
          r"0.wav; 0.wav is in .*esc10/audio: --data.root .*esc10/audio --data.table ../meta/labels.csv", root,
          table="meta/labels.csv")
    assert len(_ready(root / "audio", table="../meta/labels.csv").classes) == 2
    (root / "meta" / "labels.csv").rename(root / "meta" / "esc50.csv")
    wanted = "lightning run domains/audio/esc50.yaml --data.root .*esc10$"
    fails(f"none of the 4 files.*{wanted}", root, table="meta/esc50.csv")
    fails(f"no sound file in the folder .*meta.*{wanted}", root)
    (root / "meta" / "esc50.csv").write_text("file,label\nx.wav,a\ny.wav,b\n")
    (root / "meta" / "esc50.csv").rename(root / "table.csv")
    fails("none of the 2 files .*, the first is x.wav$", root, table="table.csv")


def test_mistakes_in_tables_give_one_line(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = tmp_path / "calls"
    for index in range(4):
        write_sound(root / f"{index}.wav", seed=index)
    good = ["file,label,split", "0.wav,a,train", "1.wav,b,train", "2.wav,a,test", "3.wav,b,test"]
    for lines, words, options in (
            (["sound,label", "0.wav,a"], "none of the columns file, file_name.*it has sound, label", {}),
            (["file,sort", "0.wav,a"], "data.label_column: .* it has file, sort", {}),
            (good, r"no column 'lable' \(did you mean 'label'", {"label_column": "lable"}),
            (good, "no column 'from'", {"start_column": "from"}),
            ([*good, "0.wav,b,test"], "line 6: 0.wav stands in line 2 already", {}),
            ([*good, ",b,test"], "line 6: no file", {}), ([*good, "4.wav,,test"], "line 6: no label for 4.wav", {}),
            ([*good, "4.wav,a,later"], "line 6: 'later' is no set", {}),
            (good[:3], "no file is in the set test", {}), (good[:1], "no rows", {}), ([], "empty", {}),
            ([good[0], *(line.replace("b,", "a,") for line in good[1:])], "one class only", {}),
            (good, "no file is labelled 'c'; the labels are a, b", {"classes": ["a", "c"]}),
            ([*good, "gone.wav,c,train"], "training set holds none of c .*gone.wav: the table lists it", {})):
        _table(root, *lines)
        fails(words, root, table="labels.csv", **options)
    fails("no file .*labels.tsv", root, table="labels.tsv")
    _table(root, "file,label,start", "0.wav,a,soon", "1.wav,b,0")
    fails("line 2: 'soon' is no start in seconds", root, table="labels.csv", start_column="start")
    _table(root, *good)
    assert len(_ready(root, table="labels.csv").train_set) == 2


def test_mistakes_in_options_give_one_line(tmp_path: Path, fails: Callable[..., None]) -> None:
    root = _sounds(tmp_path / "pond", 4)
    for options, words in (
            ({"label_pattern": "("}, "no regular expression"), ({"label_pattern": "bird"}, "has no group"),
            ({"label_pattern": r"(\d+)_"}, "finds a label in none of 12 files, the first is bird/0.wav"),
            ({"label_pattern": "(a)", "table": "x.csv"}, "one of the two"), ({"separator": ""}, "separator: empty"),
            ({"test_pattern": "toad"}, "data.test_pattern: 'toad' finds none of 12 files"),
            ({"test_share": 0.0}, "test_share"), ({"test_share": 0.6, "validation_share": 0.4}, "something to train"),
            ({"classes": ["bird"]}, "two different names"), ({"classes": ["bird"] * 2}, "'bird' stands there twice"),
            ({"classes": ["bird", "frogs"]}, r"labelled 'frogs' \(did you mean 'frog'"), ({"shots": -1}, "data.shots"),
            ({"frames": 4}, "data.frames")):
        fails(words, root, **options)


def test_without_a_folder_the_mini_stands_in_loudly(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no folder of sound files, so this is the built-in mini.*give the folder of"):
        assert AudioFolder(cache=str(tmp_path), separator="|").frames == 112
    with pytest.raises(ScionError, match="data.source real: there is no folder of sound files; give the folder"):
        AudioFolder(source="real", cache=str(tmp_path)).setup()
    data = AudioFolder(source="mini", separator="|")
    assert data.peek() is not None and not data.multilabel  # a clip of the mini is one thing


def test_exit_code_of_a_mistake_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _sounds(tmp_path / "pond", 3, ("bird",))
    assert main(["run", "domains/audio/folder.yaml", "--data.root", str(root), "--run_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("lightning run: ") and line.count("\n") == 1 and "one class only (bird)" in line
    assert not (tmp_path / "run").exists()


def test_nothing_is_decoded_to_say_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = _sounds(tmp_path / "pond", 4)
    monkeypatch.setattr(clips, "_bank", lambda *_: pytest.fail("decoded"))
    data = AudioFolder(str(root))
    assert data.frames == 16 and data.peek() == list(CLASSES)  # clips of a tenth of a second
