"""Commands that domains publish in ``domains/<name>/commands.py``: listed, called, refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.cli import main

TABLE = '''
import torch  # reading the table does not

COMMANDS = (
    {"name": "palette", "help": "print the colours of pictures", "function": "domains.colours.work:palette",
     "arguments": (
         {"name": "files", "help": "pictures", "many": True},
         {"name": "--count", "type": "int", "default": 3, "help": "how many, 100 % at most"},
         {"name": "--order", "choices": ["hue", "share"], "default": "hue"},
         {"name": "--as-json", "type": "flag", "help": "print JSON"},
     )},
    {"name": "tidy-up", "help": "tidy up", "function": "domains.colours.work:tidy",
     "arguments": [{"name": "--by", "type": "float", "required": True}, {"name": "a-word", "default": "x"}]},
    {"name": "fails", "help": "fail", "function": "domains.colours.work:fails"},
    {"name": "gone", "help": "be gone", "function": "domains.colours.nowhere:gone"},
)
'''
WORK = '''
from core.errors import ScionError


def palette(files, count, order, as_json):
    print("palette", files, count, order, as_json)


def tidy(by, a_word):
    print("tidy", by, a_word)
    return 3


def fails():
    raise ScionError("this cannot be")
'''
Add = Callable[..., Path]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Adds files of a domain, in a folder on the import path."""

    def write(domain: str, **files: str) -> Path:
        folder = tmp_path / "domains" / domain
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        return folder

    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        if name.startswith(("domains.colours", "domains.shapes")):
            del sys.modules[name]


@pytest.fixture
def colours(add: Add) -> Path:
    return add("colours", __init__="import torch\n", commands=TABLE, work=WORK)


def one(name: str, function: str = "domains.shapes.work:one") -> str:
    return f'COMMANDS = [{{"name": {name!r}, "help": "do it", "function": {function!r}}}]\n'


@pytest.mark.parametrize(("words", "wanted", "code"), [
    (["palette", "a", "b", "--count", "5"], "palette ['a', 'b'] 5 hue False", 0),
    (["palette", "--as-json", "--order=share", "a"], "palette ['a'] 3 share True", 0),
    (["colours", "palette", "a"], "palette ['a'] 3 hue False", 0),
    (["tidy-up", "--by", "-0.5"], "tidy -0.5 x", 3), (["tidy-up", "--by", "2", "word"], "tidy 2.0 word", 3)])
def test_a_command(colours: Path, words: list[str], wanted: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == code
    assert capsys.readouterr().out.strip() == wanted


def test_help_lists_it(colours: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add("shapes", commands=one("draw"))
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ""
    assert "\ncommands of domains:\n  colours:\n    palette  print the colours of pictures\n" in shown.out
    assert "\n  shapes:\n    draw     do it" in shown.out
    assert main([]) == 0 and "    palette  " in capsys.readouterr().out
    for words in (["colours"], ["colours", "--help"]):
        assert main(words) == 0
        listing = capsys.readouterr().out
        assert "palette" in listing and "draw" not in listing
    for words in (["palette", "--help"], ["colours", "palette", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        shown = capsys.readouterr()
        assert stop.value.code == 0 and "print the colours of pictures (a command of the domain colours)" in shown.out
        assert "--count" in shown.out and "how many, 100 % at most" in shown.out


@pytest.mark.parametrize(("words", "told"), [
    (["palet", "a"], "no command is called 'palet' (did you mean 'palette'"),
    (["predct", "a"], "no command is called 'predct' (did you mean 'predict'"),
    (["colour", "palette"], "no command is called 'colour' (did you mean 'colours'"),
    (["colours", "palet"], "colours has no command 'palet' (did you mean 'palette'"),
    (["palette", "a", "--cuont", "3"], "--cuont: palette has no such option (did you mean '--count'"),
    (["palette"], "the following arguments are required: files; `lightning palette --help` shows"),
    (["palette", "a", "--count", "few"], "argument --count: invalid int value: 'few'"),
    (["palette", "a", "--order", "size"], "argument --order: invalid choice: 'size'"),
    (["tidy-up"], "the following arguments are required: --by"),
    (["fails"], "lightning fails: this cannot be"), (["fails", "more"], "unrecognized arguments: more"),
    (["gone"], "domains.colours.nowhere:gone of domains/colours/commands.py cannot be imported (ModuleNotFoundError"),
    (["pal\x1b[1m\nette"], r"lightning pal\x1b[1m ette: no command is called")])
def test_what_is_wrong_is_one_line(colours: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
                                   ) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert told in shown.err and len(shown.err.splitlines()) == 1 and shown.out == ""


def test_the_core_keeps_its_names(colours: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add("shapes", commands=one("methods"), work="def one():\n    raise AssertionError\n")
    assert main(["methods", "LoRA"]) == 0
    shown = capsys.readouterr()
    assert "LoRA" in shown.out and shown.err == ""
    told = ("lightning: domains/shapes/commands.py: the command 'methods' of shapes has the name of the core's "
            "`lightning methods`; give it another one\n")
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr()
    assert shown.err == told and "shapes:" not in shown.out and "palette" in shown.out
    assert main(["shapes", "methods"]) == 2
    assert capsys.readouterr().err.startswith(told)
    add("shapes", commands=one("colours"))
    assert main(["colours", "palette", "a"]) == 0
    assert "the command 'colours' of shapes has the name of the domain colours" in capsys.readouterr().err


def test_two_domains_with_one_name(colours: Path, add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    add("shapes", commands=one("palette"), work="def one():\n    print('of shapes')\n")
    assert main(["palette", "a"]) == 2
    assert capsys.readouterr().err == ("lightning palette: colours and shapes have a command 'palette' each; write "
                                       "`lightning colours palette` or `lightning shapes palette`\n")
    assert main(["shapes", "palette"]) == 0 and main(["colours", "palette", "a"]) == 0
    assert capsys.readouterr().out == "of shapes\npalette ['a'] 3 hue False\n"


@pytest.mark.parametrize(("text", "told"), [
    ("COMMANDS = [", "cannot be read ('[' was never closed"), ("", "no COMMANDS in it"),
    ("x = 1\n", "no COMMANDS in it"),
    ("COMMANDS = make()\n", "line 1: COMMANDS is no literal"), ("COMMANDS = 3\n", "COMMANDS: must be a list"),
    ("COMMANDS: list\n", "no COMMANDS in it"),
    ('COMMANDS = [{"name": "draw", "help": "x"}]\n', "COMMANDS[0]"),
    (one("dr aw"), "COMMANDS[0].name: must be a plain word, not 'dr aw'"),
    (one("draw", "domains.shapes.work"), "COMMANDS[0].function: must be a function, as"),
    (one("draw").replace('"help"', '"hlp"'), "COMMANDS[0].hlp: unknown key (did you mean 'help'"),
    (one("draw").replace("}]", ', "arguments": [{"name": "--n", "type": "whole"}]}]'),
     "COMMANDS[0].arguments[0].type: must be one of 'text', 'int', 'float', 'flag', not 'whole'"),
    ("COMMANDS = '\0'\n", "cannot be read")])
def test_a_broken_table(colours: Path, add: Add, text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The other domains' commands, and the core's, are what they were."""
    add("shapes", commands=text)
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr()
    [line] = shown.err.splitlines()
    assert stop.value.code == 0 and "palette" in shown.out
    assert line.startswith("lightning: domains/shapes/commands.py: ") and told in line
    assert main(["palette", "a"]) == 0
    assert capsys.readouterr().out.startswith("palette")
    assert main(["methods", "LoRA"]) == 0 and capsys.readouterr().err == ""


def modules_after(code: str, *folders: Path) -> tuple[set[str], str]:
    """The modules that a new interpreter has imported for ``code``, and what it printed besides."""
    code = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('|'.join(sorted(set(sys.modules) - before)))"
    path = [*map(str, folders), *filter(None, sys.path)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True,
                          text=True, check=True)
    *printed, modules = done.stdout.splitlines()
    return set(modules.split("|")), "\n".join(printed)


def test_help_imports_nothing_heavy(colours: Path) -> None:
    call = "from core.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    modules, printed = modules_after(call, colours.parents[1])
    assert "palette" in printed and "domains.colours" not in modules
    heavy = {"torch", "numpy", "lightning", "torchmetrics", "transformers", "timm", "safetensors", "jsonargparse",
             "matplotlib"}
    assert heavy & {name.partition(".")[0] for name in modules} == set()
    rooms = {name.split(".")[1] for name in modules if name.startswith("core.")}
    assert rooms.isdisjoint({"adapters", "anatomy", "callbacks", "data", "graft", "method", "tasks", "training"})


def test_importing_the_core_costs_what_it_did() -> None:
    """Two modules of ours, and 61 of the standard library's in Python 3.11."""
    modules, _ = modules_after("import core")
    assert {name for name in modules if name.startswith("core")} == {"core", "core.former_names"}
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names | {"core"}
    assert len(modules) <= 66
