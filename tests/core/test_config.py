"""Configurations and command lines: whatever is wrong with one is a line that says what would be right, before anything
is read, built or written; and nothing that is said gets lost."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest

from core.config import Point, points
from core.errors import ScionError

BASE = """
domain: audio
model: {backbone: AST, task: Classification}
data: {class: ESC50, source: mini, fold: 1}
peft: LoRA
optimizer: {name: AdamW, lr: 0.5, options: {betas: [0.9, 0.98]}}
lr_scheduler: {name: cosine, final: 0.1}
trainer: {max_epochs: 1}
"""


class Files:
    """Points of a configuration that a test writes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "some.yaml"

    def __call__(self, *words: str, **keys: str) -> list[Point]:
        """The points of `BASE` with whole lines written otherwise, or of a ``text``."""
        text = keys.pop("text", BASE)
        for key, value in keys.items():
            text = re.sub(rf"^{key}:.*\n", "", text, flags=re.MULTILINE) + f"{key}: {value}\n"
        self.file.write_bytes(text.encode("utf-8", "surrogateescape"))
        return points(str(self.file), list(words))

    def refused(self, *words: str, **keys: str) -> str:
        """The one line with which these are refused."""
        with pytest.raises(ScionError) as caught:
            self(*words, **keys)
        text = str(caught.value)
        assert text and len(text) < 1000
        return text


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


# ------------------------------------------------------------------------------------------------- documents


NINES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12))
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}\n" for i in range(12))


@pytest.mark.parametrize(("text", "words"), [
    ("peft: LoRA\nmodel: {}\npeft: DoRA\n", "line 3: the key 'peft' stands twice, first in line 1"),
    ("data: {class: ESC50, init: {fold: 1, fold: 2}}\n", "line 1: the key 'fold' stands twice"),
    ("a: &a [*a]\n", "an anchor that contains itself"),
    ("a: &a {b: {c: *a}}\n", "an anchor that contains itself"),
    (NINES, "more than 20000 values"),
    (MERGED, "more than 20000 values"),
    ("a: " + "[" * 5000, "more than 32 levels"),
    ("".join("  " * i + "a:\n" for i in range(60)), "more than 32 levels"),
    ("#" * 2**20, "64 KiB at most"),
    ("", "a configuration is a mapping"),
    ("- 1\n", "a configuration is a mapping"),
    ("\udcff\udcfe", "not a text file in UTF-8"),
    ("peft: \x01\n", "not valid YAML"),
    ("peft: [LoRA\n", "not valid YAML"),
    ("a: 1\n---\nb: 2\n", "not valid YAML"),
    ("peft: *nobody\n", "not valid YAML"),
    ("{[a]: 1}\n", "a key must be text"),
    ("peft: !!set {a, b}\n", "the tag '!!set'"),
    ("peft: !!binary aGVsbG8=\n", "the tag '!!binary'"),
    ("peft: !!python/object/apply:os.getpid []\n", "the tag '!!python"),
    ("peft: {<<: 3}\n", "<< merges mappings"),
    ("optimizer: {lr: .nan}\n", "'.nan' is not a finite number"),
    ("optimizer: {options: {eps: -.inf}}\n", "'-.inf' is not a finite number"),
    ("trainer: {gradient_clip_val: 1e999}\n", "not a finite number"),
    ("seed_everything: " + "9" * 6000 + "\n", "too large a number"),
    ("peft: \"a\\0b\"\n", "a NUL character"),
    ("1: 2\n", "unknown key '1'"),
])
def test_documents(files: Files, text: str, words: str) -> None:
    assert words in files.refused(text=text)


def test_values_are_those_that_stand_there(files: Files) -> None:
    """Dates, ``1:30`` and ``010`` stay text, ``1e-3`` is a number, and what is written out is read back."""
    from core.config import dump, read

    [point] = files(data="{class: ESC50, root: null, a: 2020-01-01, b: 1:30:00, c: 010, d: 1e-3, e: 1_000, on: yes}")
    arguments = {"root": None, "a": "2020-01-01", "b": "1:30:00", "c": "010", "d": 1e-3, "e": 1000, "on": True}
    assert point.config["data"]["init_args"] == arguments
    texts = {"text": ["1e-3", "1e5", "010", "0x1", "yes", "~", "2020-01-01", "<<", ".nan", "1:30", "", " ", "é\n"]}
    files.file.write_text(dump({**point.config, **texts}), encoding="utf-8")
    assert read(files.file) == {**point.config, **texts}
    [merged] = files(data="{class: ESC50, <<: [&a {fold: 2, mixup: 1}, {fold: 3, frames: 64}], fold: 4}")
    assert merged.config["data"]["init_args"] == {"fold": 4, "mixup": 1, "frames": 64}


@pytest.mark.parametrize("name", [".", "", "folder", "pipe", "a" * 300, "/dev/null", "a\0b", "../../x", "domains"])
def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScionError, match="a folder|a pipe|no such configuration|cannot be read"):
        points(name)


def test_a_file_that_may_not_be_read(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files()

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ScionError, match=r"some\.yaml: cannot be read \(Permission denied\)"):
        points(str(files.file))


# ------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(("keys", "words"), [
    ({"optimizer": "null"}, "optimizer: must be a mapping with the keys name, lr"),
    ({"optimizer": "3"}, "optimizer: must be a mapping"),
    ({"optimizer": "{lr: -1}"}, "optimizer.lr: must be a number above 0 or 'auto', not -1"),
    ({"optimizer": "{lr: 0}"}, "optimizer.lr: must be"),
    ({"optimizer": "{lr: true}"}, "optimizer.lr: must be"),
    ({"optimizer": "{weight_decay: -0.1}"}, "optimizer.weight_decay: must be a number that is not negative"),
    ({"optimizer": "{options: [1]}"}, "optimizer.options: must be a mapping, not [1]"),
    ({"optimizer": "{options: {lr: 1}}"}, "write optimizer.lr"),
    ({"optimizer": "{rate: 1}"}, "optimizer.rate: unknown key"),
    ({"lr_scheduler": "step"}, "lr_scheduler.name: must be one of 'cosine'"),
    ({"lr_scheduler": "{warmup: -1}"}, "lr_scheduler.warmup: must be"),
    ({"lr_scheduler": "{name: constant, final: 0.5}"}, "a constant rate ends as it began"),
    ({"model": "[1]"}, "model: must be a mapping with the keys backbone, task"),
    ({"model": "AST"}, "model: must be a mapping"),
    ({"model": "{task: Classification}"}, "model: must be a mapping with the key 'backbone'"),
    ({"model": "{backbone: AST, tusk: A}"}, "unknown key (did you mean 'task'?)"),
    ({"model": "{backbone: [AST]}"}, "names no class"),
    ({"peft": "[]"}, "LinearProbe"),
    ({"peft": "null"}, "names no class"),
    ({"peft": "[[LoRA]]"}, "peft[0]: "),
    ({"peft": "3"}, "names no class"),
    ({"peft": "''"}, "peft.class_path: must be the name of a class"),
    ({"peft": "LoRA LoRA"}, "peft.class_path: must be the name of a class"),
    ({"peft": "a..b"}, "peft.class_path: must be the name of a class"),
    ({"peft": "A" * 300}, "peft.class_path: must be the name of a class"),
    ({"peft": "{class: 3}"}, "peft.class_path: must be a text, not 3"),
    ({"peft": "LoRAGraft"}, "no method is called"),
    ({"peft": "{class_path: LoRA, init_args: [1]}"}, "peft.init_args: must be a mapping"),
    ({"peft": "{class_path: LoRA, rank: 16}"}, "peft: rank beside class_path"),
    ({"peft": "[{class_path: LoRA, rank: 16}]"}, "peft[0]: rank beside class_path"),
    ({"peft": "{class: LoRA, init_args: {rank: 16}}"}, "init_args belongs to class_path"),
    ({"peft": "{class: LoRA, class_path: DoRA}"}, "both class_path and class"),
    ({"peft": "{class: LoRA, on: encoder}"}, "peft.on: a run attaches its methods to the backbone"),
    ({"peft": "{class: LoRA, lr: 0.1}"}, "peft.lr: optimizer.lr is 0.5"),
    ({"data": "{class_path: ESC50, fold: 2}"}, "data: fold beside class_path"),
    ({"data": "{class: ESC50, root: nowhere}"}, "data.root: no folder nowhere"),
    ({"data": f"{{class: ESC50, root: {'a' * 5000}}}"}, "data.root: no folder"),
    ({"trainer": "[1]"}, "trainer: must be a mapping, not [1]"),
    ({"trainer": "{max_epochs: 0}"}, "trainer.max_epochs: must be a whole number of at least 1"),
    ({"trainer": "{max_epochs: '3'}"}, "trainer.max_epochs: must be"),
    ({"trainer": "{max_steps: 0}"}, "trainer.max_steps: must be"),
    ({"trainer": "{max_epochs: 1, max_time: 00:00:00:00}"}, "trainer.max_time: '00:00:00:00' leaves no time"),
    ({"trainer": "{max_epochs: 1, max_time: {hours: 0}}"}, "leaves no time to train"),
    ({"trainer": "{max_epochs: 1, max_time: {hours: -1}}"}, "leaves no time to train"),
    ({"trainer": "{max_epochs: 1, max_time: {ours: 1}}"}, "is no duration"),
    ({"trainer": "{max_epochs: 1, max_time: soon}"}, "is no duration"),
    ({"trainer": "{max_epochs: 1, max_time: {days: 1e12}}"}, "is no duration"),
    ({"trainer": "{max_time: {hours: 1}}"}, "trainer.max_epochs: give it, or max_steps"),
    ({"trainer": "{max_epochs: -1}"}, "trainer.max_epochs: give it, or max_steps"),
    ({"trainer": "{limit_train_batches: 0}"}, "trainer.limit_train_batches: must be a number above 0"),
    ({"trainer": "{limit_train_batches: 0.0}"}, "trainer.limit_train_batches: must be a number above 0"),
    ({"trainer": "{checkpoint_every_n_steps: 0}"}, "trainer.checkpoint_every_n_steps: must be a whole number"),
    ({"trainer": "{checkpoint_every_n_steps: 2, enable_checkpointing: false}"}, "write one of the two"),
    ({"trainer": "{accumulate_grad_batches: 0}"}, "trainer.accumulate_grad_batches: must be"),
    ({"trainer": "{check_val_every_n_epoch: 0}"}, "trainer.check_val_every_n_epoch: must be"),
    ({"trainer": "{limit_val_batches: 0}", "select": "best"}, "'best' is chosen by the validation set"),
    ({"seed_everything": "-1"}, "seed_everything: must be a whole number from 0 to 4294967295, not -1"),
    ({"seed_everything": "4294967296"}, "seed_everything: must be"),
    ({"seed_everything": "true"}, "seed_everything: must be a whole number, not True"),
    ({"seed_everything": "[1]"}, "seed_everything: must be"),
    ({"select": "[best]"}, "select: must be one of 'last', 'best', not ['best']"),
    ({"run_dir": "3"}, "run_dir: must be text"),
    ({"run_dir": "''"}, "run_dir: must be text"),
    ({"domain": "../audio"}, "domain: must be the name of a domain"),
    ({"domain": "nothing"}, "domain: no domain is called 'nothing'"),
    ({"stages": "[a]"}, "stages: must be"),
    ({"stages": "{}"}, "stages: must be"),
    ({"stages": "{a: LoRA}"}, "stages.a: must be a mapping with the keys"),
    ({"stages": "{a: {over: {}}}"}, "stages.a.over: unknown key"),
    ({"stages": "{a: {peft: []}}"}, "stages.a.peft"),
    ({"stages": "{a: {start: b}, b: {}}"}, "stages.a.start: 'b' is neither"),
    ({"stages": "{a: {carry: weights}}"}, "stages.a.carry: must be a list"),
    ({"stages": "{a: {carry: [all]}}"}, "stages.a.carry[0]: must be one of 'weights', 'head'"),
    ({"stages": "{a: {trainer: {max_epochs: 0}}}"}, "stages.a.trainer.max_epochs: must be"),
    ({"stages": "{a: {peft: {class: LoRA, rnak: 1}}}"}, "stages.a.peft.rnak: LoRA has no option"),
    ({"stages": "{A: {}, a: {}}"}, "one folder where capitals do not count"),
    ({"over": "[1]"}, "over: must be"),
    ({"over": "{data.fold: []}"}, "over.data.fold: must be a list of values"),
    ({"over": "{seed_everything: [0, 0.0]}"}, "--over seed_everything: the value 0.0 stands twice"),
    ({"per": "[1]"}, "per is a mapping"),
    ({"per": "{data.fold: {1: 2}}"}, "per.data.fold is a mapping from its values to settings"),
    ({"per": "{data.fold: {1: {rank: 2}}}"}, "'rank' is no setting"),
    ({"per": "{data.fold.x: {1: {peft.rank: 2}}}"}, "the configuration does not say data.fold.x"),
])
def test_shapes(files: Files, keys: dict[str, str], words: str) -> None:
    assert words in files.refused(**keys)


@pytest.mark.parametrize("name", ["../../outside", "a/b", "a.b", "a b", "", "..", "é", "a" * 65, "a\\nb"])
def test_stages_stay_in_the_folder(files: Files, name: str) -> None:
    words = files.refused(stages=f'{{"{name}": {{}}}}')
    assert "stages: the key: must be a name of letters, digits, '-' and '_'" in words
    [point] = files(stages="{first-1: {}, second_2: {trainer: {max_epochs: 2}}}")
    assert list(point.config["stages"]) == ["first-1", "second_2"]


@pytest.mark.parametrize("keys", [
    {"optimizer": "SGD"}, {"optimizer": "{}"}, {"lr_scheduler": "linear"}, {"peft": "[LoRA, BitFit]"},
    {"peft": "{class: LoRA, on: backbone}"}, {"peft": "{class_path: LoRA, init_args: null}"}, {"run_dir": "null"},
    {"stages": "null"}, {"stages": "{a: null, b: {start: base, carry: [head]}}"}, {"over": "null"}, {"per": "null"},
    {"trainer": "{max_epochs: -1, max_steps: 3}"}, {"trainer": "{max_epochs: 2, max_time: 00:01:00:00}"},
    {"trainer": "{}"}, {"over": "{data.fold: 3}"}, {"domain": "audio"},
])
def test_what_is_right(files: Files, keys: dict[str, str]) -> None:
    [point] = files(**keys)
    assert json.loads(json.dumps(point.config)) == point.config


# ------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize(("line", "words"), [
    ("--over peft=,", "a value is missing"),
    ("--over =1", "write AXIS=VALUE"),
    ("--over peft", "write AXIS=VALUE"),
    ("--over peft=", "a value is missing"),
    ("--over data.fold=1,,2", "a value is missing"),
    ("--over", "a value is missing"),
    ("--over.data.fold 1", "write --over data.fold=VALUE"),
    ("--over data.fold=1,2 --over data.fold=3", "the axis stands twice"),
    ("--over data.fold=1,2 --over data.init_args.fold=3", "the axis stands twice"),
    ("--over seed_everything=0,0,0", "the value 0 stands twice"),
    ("--over seed_everything=0,'0'", "the value '0' stands twice"),
    ("--over peft=LoRA,core.peft.LoRA", "the value 'LoRA' stands twice"),
    ("--over peft=[LoRA, BitFit],[LoRA, {class: BitFit}]", "stands twice"),
    ("--over data.mixup=1,1.0", "the value 1.0 stands twice"),
    ("--over peft=LoRA,{class_path: LoRA}", "the value 'LoRA' stands twice"),
    ("--over peft=DoRA,LoRA --over peft.LoRA.rank=2,4", "no option 'LoRA'"),
    ("--over peft.rank=2,4 --over peft.LoRA.rank=1,3", "are the same run"),
    ("--over run_dir=a,b", "run_dir is no axis"),
    ("--over per=a", "per is no axis"),
    ("--over nothing=1", "unknown key 'nothing'"),
    ("--over data.fold=1,2 --data.fold 3", "data.fold is an axis of --over as well"),
    ("--over data.fold=.nan", "not a finite number"),
    ("--peft.rank 16 --peft DoRA", "--peft.rank stands before --peft, which would undo it"),
    ("--optimizer.options.eps 1 --optimizer.name SGD", "which would undo it"),
    ("--peft+=BitFit --peft DoRA", "which would undo it"),
    ("--peft.on zzz", "peft.on: a run attaches its methods to the backbone, and not to 'zzz'"),
    ("--domain nothing", "no domain is called 'nothing'"),
    ("--domain ../x", "domain: must be the name of a domain"),
    ("--per 3", "per is a mapping"),
    ("--per {data.fold: {1: {peft.rank: 2, peft.rank: 3}}}", "--per: the key 'peft.rank' stands twice"),
    ("--per.data.fold.1 {peft.rank: 2}", "per.data.fold.1 is a mapping from its values"),
    ("--per+=1", "per is set as a whole"),
    ("--stages {a: LoRA}", "stages.a: must be a mapping"),
    ("--stages LoRA", "stages: must be"),
    ("--stages.a.peft DoRA", "no stage is called 'a'; there are none"),
    ("--stages.../x {}", "stages"),
    ("--stages.a/b {}", "not an override"),
    ("--optimizer.lr .nan", "--optimizer.lr: '.nan' is not a finite number"),
    ("--optimizer.lr nan", "optimizer.lr: must be a number above 0 or 'auto', not 'nan'"),
    ("--optimizer 3", "optimizer: must be a mapping"),
    ("--optimizer.lr.x 3", "optimizer.lr is 0.5, which has no 'x'"),
    ("--model LoRA --model.task x", "model is 'LoRA', which has no 'task'"),
    ("--peft.init_args 3", "peft.init_args: must be a mapping"),
    ("--peft.class_path 3", "peft.class_path: must be a text, not 3"),
    ("--peft.targets+=o", "says nothing of it"),
    ("--seed_everything+=1", "has 0 there, and not a list"),
    ("--seed_everything -1", "seed_everything: must be"),
    ("--trainer.max_epochs 0", "trainer.max_epochs: must be"),
    ("--trainer..x 0", "a word is missing between two dots"),
    ("--data {class: ESC50, fold: 1, fold: 2}", "--data: the key 'fold' stands twice"),
    ("--data [" + "[" * 100, "more than 32 levels"),
    ("--data {a: &a [1], b: &b [" + "*a, " * 99 + "], c: &c [" + "*b, " * 99 + "], d: [" + "*c, " * 99 + "]}",
     "more than 20000 values"),
    ("--" + "a" * 300 + " 1", "no key is that long"),
    ("--peft --peft.rank 3", "a value is missing before '--peft.rank'"),
    ("x", "'x': not an override"),
    ("--peft a.b --over peft.rank=" + ",".join(map(str, range(200))) + " --over data.fold="
     + ",".join(map(str, range(200))), "40000 runs; 5000 at most"),
])
def test_command_lines(files: Files, line: str, words: str) -> None:
    assert words in files.refused(*words_of(line))


def words_of(line: str) -> list[str]:
    """A command line split before each ``--``, and between key and value."""
    found: list[str] = []
    for part in re.split(r" (?=--)", line) if line else ():
        key, space, value = part.partition(" ")
        found += [key, value] if space else [key]
    return found


def test_nothing_is_dropped(files: Files, tmp_path: Path) -> None:
    def one(line: str, **keys: str) -> dict[str, Any]:
        [point] = files(*words_of(line), **keys)
        return point.config

    # a domain, named on the command line
    assert files(*words_of("--domain vision"))[0].domain == "vision"
    assert [point.domain for point in files(*words_of("--over domain=audio,vision"))] == ["audio", "vision"]
    # settings that go with values, likewise; before the command line's own
    per = "{data.fold: {1: {optimizer.lr: 0.25, peft.rank: 2}}}"
    assert one(f"--per {per}")["optimizer"]["lr"] == 0.25
    assert one(f"--per {per} --optimizer.lr 3")["optimizer"]["lr"] == 3
    assert one("--per.data.fold {1: {optimizer.lr: 9.0}}", per=per)["optimizer"]["lr"] == 9
    assert one("--per null", per=per)["optimizer"]["lr"] == 0.5
    assert one("", per="{peft: {LoRA: {peft.rank: 3}}}")["peft"]["init_args"] == {"rank": 3}
    # the command line's value, or axis, comes before the file's axis
    assert one("--data.fold 3", over="{data.fold: [1, 2]}")["data"]["init_args"]["fold"] == 3
    assert len(files(*words_of("--over data.fold=3,4,5"), over="{data.fold: [1, 2]}")) == 3
    # options of what an axis chooses are set on what it has chosen
    ranks = [point.config["peft"] for point in files(*words_of("--over peft=LoRA,DoRA --peft.rank 4"))]
    assert ranks == [{"class_path": name, "init_args": {"rank": 4}} for name in ("LoRA", "DoRA")]
    stacks = [point.config["peft"] for point in files(*words_of("--over peft=LoRA,DoRA --peft+=IST"))]
    assert [[method["class_path"] for method in stack] for stack in stacks] == [["LoRA", "IST"], ["DoRA", "IST"]]
    (tmp_path / "a,b").mkdir()
    assert one(f"--over data.root='{tmp_path}/a,b'")["data"]["init_args"]["root"] == f"{tmp_path}/a,b"
    # a stage starts from what the whole configuration has
    stage = one("--stages.a.optimizer.lr 2 --optimizer.weight_decay 1", stages="{a: {}}")["stages"]["a"]
    assert stage["optimizer"] == {"name": "AdamW", "lr": 2, "options": {"betas": [0.9, 0.98]}, "weight_decay": 1}
    assert one("--stages.a.peft.rank 2", stages="{a: {}}")["stages"]["a"]["peft"]["init_args"] == {"rank": 2}
    # the last word on a key holds
    assert one("--peft IST --peft LoRA --peft+=IST --peft.LoRA.rank 2")["peft"][0]["init_args"] == {"rank": 2}


@pytest.mark.parametrize(("line", "keys", "expected"), [
    ("--optimizer.name SGD", {}, {"name": "SGD", "lr": 0.5}),
    ("--optimizer.name AdamW", {}, {"name": "AdamW", "lr": 0.5, "options": {"betas": [0.9, 0.98]}}),
    ("--optimizer.name SGD --optimizer.options.momentum 0.9", {},
     {"name": "SGD", "lr": 0.5, "options": {"momentum": 0.9}}),
    ("--optimizer SGD", {}, {"name": "SGD"}),
    ("", {"per": "{data.fold: {1: {optimizer.options.momentum: 0.5, optimizer.name: SGD}}}"},
     {"name": "SGD", "lr": 0.5, "options": {"momentum": 0.5}}),
    ("--over optimizer.name=SGD --optimizer.options.momentum 0.9", {},
     {"name": "SGD", "lr": 0.5, "options": {"momentum": 0.9}}),
])
def test_options_belong_to_the_optimizer_they_are_written_for(files: Files, line: str, keys: dict[str, str],
                                                              expected: dict[str, Any]) -> None:
    [point] = files(*words_of(line), **keys)
    assert point.config["optimizer"] == expected


def test_settings_of_a_schedule_and_a_stage_follow_the_name_as_well(files: Files) -> None:
    assert files("--lr_scheduler.name", "constant")[0].config["lr_scheduler"] == {"name": "constant"}
    assert files("--lr_scheduler.name", "cosine")[0].config["lr_scheduler"] == {"name": "cosine", "final": 0.1}
    [point] = files("--stages.a.optimizer.name", "SGD", stages="{a: {}}")
    assert point.config["stages"]["a"]["optimizer"] == {"name": "SGD", "lr": 0.5}
    assert point.config["optimizer"]["options"] == {"betas": [0.9, 0.98]}


# ------------------------------------------------------------------------------------------------- names of folders


@pytest.mark.parametrize("values", [
    "data.root=/,//", "data.table=a b,a_b,a/b", "data.table=A,a", "data.table=[1],1",
    f"data.table={'x' * 300},{'x' * 301}", f"data.table={'é' * 150},{'é' * 151}", "data.table=ﬁ,fi",
])
def test_each_point_has_a_folder_of_its_own(files: Files, values: str) -> None:
    found = files("--over", values)
    names = [point.name for point in found]
    assert len({name.casefold() for name in names}) == len(found) == values.count(",") + 1
    for name in names:
        assert len(name.encode()) <= 250 and re.fullmatch(r"[\w.+=-]+-seed0", name)


def test_names_stay_as_they_were(files: Files) -> None:
    found = files("--over", "peft=LoRA,{class: LoRA, rank: 4}", "--over", "data.fold=1,2")
    assert [point.name for point in found] == ["LoRA-fold=1-seed0", "LoRA-fold=2-seed0", "LoRA_rank_4-fold=1-seed0",
                                               "LoRA_rank_4-fold=2-seed0"]


# ------------------------------------------------------------------------------------------------- before a run


@pytest.mark.parametrize(("arguments", "words"), [
    ({"max_epochs": [1]}, "trainer.max_epochs: must be"),
    ({"precision": "8"}, "trainer.precision: must be one of 64"),
    ({"accelerator": "abacus"}, "trainer.accelerator"),
    ({"strategy": "guess"}, "trainer.strategy"),
    ({"strategy": {"class_path": "os.system"}}, "trainer.strategy: must be a text"),
    ({"strategy": "ddp_spawn"}, "trainer.strategy: ddp_spawn trains in copies of this process"),
    ({"strategy": "ddp_fork_find_unused_parameters_true"}, "write ddp"),
    ({"strategy": "ddp_notebook"}, "write ddp"),
    ({"devices": 0}, "trainer.devices"),
    ({"devices": {"a": 1}}, "trainer.devices: must be"),
    ({"limit_train_batches": 2.5}, "trainer.limit_train_batches"),
    ({"val_check_interval": 0.5, "check_val_every_n_epoch": None}, "trainer.val_check_interval"),
    ({"gradient_clip_algorithm": "hope"}, "trainer.gradient_clip_algorithm"),
    ({"profiler": "nobody"}, "trainer.profiler"),
    ({"max_epoch": 1}, "no such argument (did you mean 'max_epochs'"),
    ({"logger": True}, "trainer.logger: a run sets this itself"),
    ({"default_root_dir": "x"}, "trainer.default_root_dir: a run sets this itself"),
    ({"barebones": True}, "trainer.barebones: a run sets this itself"),
    ({"max_time": {"hours": 0}, "max_epochs": 1}, "leaves no time"),
])
def test_arguments_of_the_trainer(arguments: dict[str, Any], words: str) -> None:
    from core.config import check_trainer

    with pytest.raises(ScionError) as caught:
        check_trainer(arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_trainer_is_tried_without_consequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    from core.config import check_trainer

    monkeypatch.chdir(tmp_path)
    environment, level = dict(os.environ), logging.getLogger("lightning.pytorch").level
    for arguments in ({"max_epochs": 3, "accelerator": "cpu", "deterministic": True, "benchmark": True},
                      {"strategy": "ddp", "devices": 2, "accelerator": "cpu", "max_epochs": 1},
                      {"max_epochs": 1, "max_time": "00:01:00:00", "precision": "bf16-mixed", "gradient_clip_val": 0.5},
                      {"checkpoint_every_n_steps": 5, "enable_checkpointing": True, "enable_progress_bar": False},
                      {"fast_dev_run": 2, "profiler": "simple", "limit_train_batches": 0.5}):
        check_trainer(arguments)
    check_trainer({"accelerator": "gpu", "devices": 64}, construct=False)  # for a machine that this one is not
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert dict(os.environ) == environment and logging.getLogger("lightning.pytorch").level == level
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "AdamV"}, "optimizer.name: torch.optim has no 'AdamV' (did you mean"),
    ({"name": "Optimizer"}, "torch.optim has no"),
    ({"name": "SGD", "options": {"betas": [0.9, 0.98]}}, "optimizer.options.betas: SGD has no option 'betas'"),
    ({"options": {"betas": [1.0, 0.98]}}, "AdamW refuses these settings"),
    ({"options": {"betas": 3}}, "AdamW refuses these settings"),
    ({"options": {"eps": -1}}, "AdamW refuses these settings"),
    ({"options": {"eps": "small"}}, "AdamW refuses these settings"),
    ({"name": "SGD", "options": {"momentum": -1}}, "SGD refuses these settings"),
    ({"name": "SparseAdam"}, "SparseAdam refuses these settings"),
    ({"lr": -1}, "optimizer.lr: must be"),
])
def test_settings_of_the_optimizer(settings: dict[str, Any], words: str) -> None:
    from core.config import check_optimizer
    from core.config.optimizer import OptimizerSettings

    with pytest.raises(ScionError) as caught:
        check_optimizer(settings)
    assert words in str(caught.value)
    if "lr" in settings:
        with pytest.raises(ScionError):
            OptimizerSettings(**settings)
    for good in ({}, {"name": "SGD", "options": {"momentum": 0.9, "nesterov": True}}, {"name": "Adafactor"},
                 {"lr": "auto", "options": {"fused": True}}):
        check_optimizer(good)


@pytest.mark.parametrize("words", [
    ["--trainer.precision", "8"], ["--optimizer.name", "AdamV"], ["--peft.rank", "0"], ["--peft.alpha", "-1"],
    ["--data.batch_size", "0"], ["--data.num_workers", "-1"], ["--data.seed", "-1"], ["--model.task.dropout", "1"],
    ["--model.backbone.frames", "many"], ["--model.backbone", "ESC50"], ["--peft", "os.path.join"],
    ["--peft", "os.PathLike"], ["--data", "core.data.DataModule"], ["--model.task", "Task"], ["--peft.layers", "3"],
    ["--peft", "LTSFT", "--stages", "{a: {repeat: 2}}"], ["--peft", "[LTSFT, LoFiT]"], ["--peft", "Route"],
    ["--peft", "{class: Route, methods: [3]}"], ["--peft", "{class: Route, methods: [{class_path: LoRA, rank: 3}]}"],
    ["--peft", "broken_module.Thing"], ["--peft", "leaving_module.Thing"], ["--peft", "no_such_module.Thing"],
])
def test_before_anything_is_written(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
                                    capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    (tmp_path / "broken_module.py").write_text("def")
    (tmp_path / "leaving_module.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    files(optimizer="{}")
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert main(["run", "some.yaml", *words, "--run_dir", "run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning run: ") and "unexpected" not in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("words", [
    ["--peft.rnak", "2", "run", "some.yaml"], ["run", "--peft.rnak", "2", "some.yaml"],
    ["run", "--run_dir", "x", "some.yaml", "--peft.rnak=2"], ["describe", "--peft.rnak", "2", "--json", "some.yaml"],
])
def test_words_in_any_order(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str],
                            capsys: pytest.CaptureFixture[str]) -> None:
    from core.cli import main

    monkeypatch.chdir(tmp_path)
    files()
    if words[0].startswith("--"):  # before the command, options are the program's own
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
        return
    assert main(words) == 2
    assert "peft.rnak: LoRA has no option 'rnak' (did you mean 'rank'" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "options"), [
    ("LoRA", {"alpha": float("nan")}), ("LoRA", {"alpha": 0}), ("LoRA", {"lr": float("inf")}), ("LoHa", {"alpha": -1}),
    ("LoKr", {"alpha": 0}), ("Hydra", {"scale": 0}), ("MTLoRA", {"scale": 0.0}), ("GaLore", {"scale": -1}),
    ("PST", {"alpha1": -1}), ("PST", {"beta": -1}), ("LTSFT", {"l1_dense": -1}), ("LTSFT", {"l1_sparse": -1}),
    ("IST", {"mu": -1}), ("IST", {"suppression": -1}), ("Houlsby", {"reduction": float("inf")}),
    ("DiffPruning", {"l0": float("inf")}), ("BitFit", {"lr": float("nan")}),
])
def test_numbers_that_mean_nothing(name: str, options: dict[str, float]) -> None:
    from core import peft

    with pytest.raises(ScionError) as caught:
        peft.make(name, options)
    assert next(iter(options)) in str(caught.value)


def test_numbers_that_are_not_finite_are_refused_everywhere() -> None:
    from core.tasks import Classification, Embedding
    from domains.audio import ESC50

    for cls, options in ((Classification, {"label_smoothing": float("nan")}), (Embedding, {"margin": float("inf")}),
                         (ESC50, {"mixup": float("nan")})):
        with pytest.raises(ScionError, match=r"is not a finite number|must lie in"):
            cls(**options)


def test_checkpointing_is_a_key_of_the_model(files: Files) -> None:
    """In the file as on the command line, and nothing but true or false."""
    written = "{backbone: {class_path: AST, init_args: {name: nano}}, task: Classification, checkpointing: true}"
    [point] = files(model=written)
    assert point.config["model"]["checkpointing"] is True and point.config["model"]["task"]["init_args"] == {}
    [point] = files("--model.checkpointing", "true")
    assert point.config["model"]["checkpointing"] is True
    assert "model.checkpointing: must be true or false" in files.refused(model=written.replace("true}", "3}"))
