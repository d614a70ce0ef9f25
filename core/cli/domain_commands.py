"""Commands that domains publish, in the table ``COMMANDS`` of their ``commands.py``.

The table is read from the source, and no module of a domain is imported before one of its commands is called. It is a
literal, a list of mappings::

    COMMANDS = [
        {"name": "palette", "help": "print the mean colours", "function": "domains.colours.palette:palette",
         "arguments": [{"name": "file", "help": "a picture"}, {"name": "--count", "type": "int", "default": 3}]},
    ]

The function is called with the arguments by their names and gives an exit code, or None for 0.
"""

import argparse
import ast
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, NotRequired, TypedDict

from core.errors import ScionError, listed, nearest, one_line
from core.json_types import Rule, UnknownKey, mismatch, shown

FILE = "commands.py"
KINDS = {"text": str, "int": int, "float": float}


def _is_word(text: str) -> bool:
    """Whether ``text`` is a plain word, with hyphens within."""
    return text.replace("-", "_").isidentifier() and not text.startswith("-")


def _is_argument(text: str) -> bool:
    return _is_word(text.removeprefix("--"))


def _is_function(text: str) -> bool:
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


class Argument(TypedDict):
    """An argument in a table: a word, or an option where its name begins with ``--``."""

    name: Annotated[str, Rule(_is_argument, "a plain word, or one behind --")]
    help: NotRequired[str]
    type: NotRequired[Literal["text", "int", "float", "flag"]]
    default: NotRequired[str | int | float | bool | None]
    choices: NotRequired[list[str | int | float]]
    many: NotRequired[bool]
    required: NotRequired[bool]


class Entry(TypedDict):
    """A command in a table."""

    name: Annotated[str, Rule(_is_word, "a plain word")]
    help: str
    function: Annotated[str, Rule(_is_function, "a function, as domains.colours.palette:palette")]
    arguments: NotRequired[list[Argument]]


@dataclass(frozen=True)
class DomainCommand:
    """A command of a domain."""

    domain: str
    entry: Entry

    @property
    def name(self) -> str:
        return self.entry["name"]

    @property
    def arguments(self) -> list[Argument]:
        return self.entry.get("arguments", [])


@dataclass
class Tables:
    """What the installed domains publish."""

    domains: list[str] = field(default_factory=list)
    """Those that have a table."""
    commands: list[DomainCommand] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """A line for each table, or command in one, that is left out."""

    def of(self, domain: str) -> list[DomainCommand]:
        return [command for command in self.commands if command.domain == domain]


# ------------------------------------------------------------------------------------------------- the tables


def read_tables(core: Sequence[str]) -> Tables:
    """The tables of all installed domains. What is wrong with one of them leaves the others as they are.

    Args:
        core: names of the core's own commands, which no domain's can have.
    """
    found = Tables()
    files = _files()
    for domain, file in files.items():
        found.domains.append(domain)
        try:
            entries = _entries(file)
        except ScionError as error:
            found.problems.append(f"domains/{domain}/{FILE}: {one_line(error)}; the domain's commands are left out")
            continue
        for entry in entries:
            problem = _problem(entry["name"], domain, core, files, found)
            if problem:
                found.problems.append(problem)
            else:
                found.commands.append(DomainCommand(domain, entry))
    return found


def _problem(name: str, domain: str, core: Sequence[str], files: dict[str, Path], found: Tables) -> str:
    """Why a domain cannot have a command of this name, or an empty text."""
    here = f"domains/{domain}/{FILE}: the command {name!r}"
    if name in core:
        return f"{here} of {domain} has the name of the core's `lightning {name}`; give it another one"
    if name in files:
        return f"{here} of {domain} has the name of the domain {name}; give it another one"
    if any(command.name == name for command in found.of(domain)):
        return f"{here} stands twice; the first one is taken"
    return ""


def _files() -> dict[str, Path]:
    """The tables' files by their domains."""
    spec = importlib.util.find_spec("domains")
    found: dict[str, Path] = {}
    for home in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(home).glob(f"*/{FILE}")):
            if file.is_file() and file.parent.name.isidentifier():
                found.setdefault(file.parent.name, file)  # Python imports the first one, too
    return dict(sorted(found.items()))


def _entries(file: Path) -> list[Entry]:
    """The commands in a table, read from the source.

    Raises:
        ScionError: it is no Python, has no table, or one that is no literal or of another shape.
    """
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ScionError(f"cannot be read ({error})") from None
    node = _table_of(tree)
    if node is None:
        raise ScionError("no COMMANDS in it")
    try:
        table = _with_lists(ast.literal_eval(node))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ScionError(f"line {node.lineno}: COMMANDS is no literal; write texts and numbers, nothing that is "
                         "computed") from None
    wrong = mismatch(table, list[Entry])
    if isinstance(wrong, UnknownKey):
        raise ScionError(f"COMMANDS{wrong.place}.{wrong.key}: unknown key{nearest(wrong.key, wrong.known)}; the keys "
                         f"are {listed(wrong.known)}")
    if wrong is not None:
        raise ScionError(f"COMMANDS{wrong.place}: must be {wrong.wanted}, not {shown(wrong.value)}")
    return table


def _table_of(tree: ast.Module) -> ast.expr | None:
    """What a module assigns to ``COMMANDS``."""
    for node in tree.body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if "COMMANDS" in names:
            return node.value  # type: ignore[union-attr]
    return None


def _with_lists(value: Any) -> Any:
    """A literal with lists for its tuples."""
    if isinstance(value, dict):
        return {key: _with_lists(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_lists(one) for one in value]
    return value


def help_text(tables: Tables) -> str:
    """The commands of all domains, for ``lightning --help``."""
    width = max((len(command.name) for command in tables.commands), default=0)
    lines: list[str] = []
    for domain in tables.domains:
        for command in tables.of(domain):
            if f"  {domain}:" not in lines:
                lines.append(f"  {domain}:")
            lines.append(f"    {command.name:{width}}  {command.entry['help']}")
    return "\n".join(["commands of domains:", *lines]) if lines else ""


# ------------------------------------------------------------------------------------------------- calling one


def call(words: Sequence[str], core: Sequence[str]) -> int:
    """Call the command that the words name: ``NAME ...``, or ``DOMAIN NAME ...``.

    Raises:
        ScionError: there is none, there are several, or its arguments are wrong.
    """
    tables = read_tables(core)
    for problem in tables.problems:
        print(f"lightning: {problem}", file=sys.stderr)
    first, *rest = words
    if first in tables.domains:
        if not rest or rest[0] in ("--help", "-h"):
            print(help_text(Tables([first], tables.of(first))) or f"{first} has no commands")
            return 0
        command = _one_of(rest.pop(0), tables.of(first), f"{first} has no command", [])
    else:
        command = _one_of(first, tables.commands, "no command is called", [*core, *tables.domains])
    return _called(command, rest)


def _one_of(name: str, commands: list[DomainCommand], lacking: str, others: Sequence[str]) -> DomainCommand:
    """The command of that name."""
    fitting = [command for command in commands if command.name == name]
    if len(fitting) > 1:
        owners = [command.domain for command in fitting]
        choices = " or ".join(f"`lightning {owner} {name}`" for owner in owners)
        raise ScionError(f"{' and '.join(owners)} have a command {name!r} each; write {choices}")
    if not fitting:
        known = [*others, *dict.fromkeys(command.name for command in commands)]
        raise ScionError(f"{lacking} {name!r}{nearest(name, known)}; there are {listed(known, 40) or 'none'}")
    return fitting[0]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ScionError(f"{message}; `{self.prog} --help` shows what it takes")


def _parser(command: DomainCommand) -> OneLineParser:
    text = f"{command.entry['help']} (a command of the domain {command.domain})".replace("%", "%%")
    parser = OneLineParser(f"lightning {command.name}", description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for argument in command.arguments:
        meaning = argument.get("help", "").replace("%", "%%")  # argparse would fill it in
        options: dict[str, Any] = {key: value for key, value in argument.items() if key in ("default", "choices")}
        kind = argument.get("type", "text")
        is_option = argument["name"].startswith("--")
        if kind == "flag":
            options = {"action": "store_true"}
        else:
            options["type"] = KINDS[kind]
            if argument.get("many"):
                options["nargs"] = "*" if "default" in argument else "+"
            elif "default" in argument and not is_option:
                options["nargs"] = "?"
            if is_option:
                options["required"] = argument.get("required", False)
        parser.add_argument(argument["name"], help=meaning, **options)
    return parser


def _called(command: DomainCommand, words: list[str]) -> int:
    """Check the arguments, import the command's function, and call it."""
    options = [argument["name"] for argument in command.arguments if argument["name"].startswith("--")]
    for word in words:
        name = word.partition("=")[0]
        if word == "--":
            break
        if name.startswith("--") and name not in (*options, "--help"):
            raise ScionError(f"{name}: {command.name} has no such option{nearest(name, options)}; it has "
                             f"{listed(options) or 'none'}")
    given = vars(_parser(command).parse_args(words))
    del given["debug"]  # the command line as a whole has it
    module, _, name = command.entry["function"].partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise ScionError(f"{command.entry['function']} of domains/{command.domain}/{FILE} cannot be imported "
                         f"({type(error).__name__}: {one_line(error)})") from error
    # words with hyphens keep them in argparse where they are no options
    return function(**{name.replace("-", "_"): value for name, value in given.items()}) or 0
