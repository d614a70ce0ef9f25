"""YAML in and out: plain values only, and no document that is larger than it looks.

What comes out of here is a dictionary, list, text, number, true, false or null. Keys are text, stand once, and numbers
are finite. Where YAML 1.1 would surprise, the text stays: dates, ``1:30`` (to it ninety) and ``010`` (to it eight).
``1e-3`` is a number.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import yaml

from core.errors import ScionError, listed, nearest
from core.files import check_regular

LARGEST = 2**16
"""Bytes of a file. Ours have a few thousand, and the parser takes its time."""
MOST_NODES = 20_000
"""Values in a document, those behind an alias counted each time."""
DEEPEST = 32
"""Levels of nesting."""
BITS = 63
"""Of a whole number, beside its sign."""
TAG = "tag:yaml.org,2002:"


class Reader(yaml.SafeLoader):
    """YAML's parser, with our view of what is a number, and a limit to nesting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ScionError(f"more than {DEEPEST} levels of nesting")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Writer(yaml.SafeDumper):
    """Quotes what `Reader` would not read as text, and writes everything out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+|0o[0-7]+)\Z")
FLOAT = re.compile(r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|"
                   r"\.(inf|Inf|INF))\Z|\.(nan|NaN|NAN)\Z")

_SURPRISING = (f"{TAG}int", f"{TAG}float", f"{TAG}timestamp")
"""Kinds whose forms in YAML 1.1 surprise; numbers have our own forms, `WHOLE` and `FLOAT`."""

# PyYAML's table says by a value's first letter which kinds it can be of; a class that has its own leaves PyYAML's alone
Reader.yaml_implicit_resolvers = {}
for _letter, _resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
    _plain = [(tag, pattern) for tag, pattern in _resolvers if tag not in _SURPRISING]
    Reader.yaml_implicit_resolvers[_letter] = _plain
for _kind in (Reader, Writer):
    _kind.add_implicit_resolver(f"{TAG}int", WHOLE, list("-+0123456789"))
    _kind.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+.0123456789"))


class Plain:
    """Makes plain values of YAML's nodes.

    Args:
        where: the file's name, or the key on the command line, for messages.
        lines: whether the message names the line as well.
    """

    def __init__(self, where: str, lines: bool) -> None:
        self.where, self.lines = where, lines
        self.count = 0
        self.open: set[int] = set()
        """The nodes around the present one."""

    def error(self, node: yaml.Node, text: str) -> ScionError:
        """An error that says where the node is."""
        if not self.where:
            return ScionError(text)
        line = f", line {node.start_mark.line + 1}" if self.lines else ""
        return ScionError(f"{self.where}{line}: {text}")

    def value(self, node: yaml.Node) -> Any:
        """The value of a node and of all below it."""
        self.count += 1
        if self.count > MOST_NODES:
            raise self.error(node, f"more than {MOST_NODES} values, with those that aliases repeat")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise self.error(node, "an anchor that contains itself")
        if len(self.open) >= DEEPEST:  # an alias can stand deeper than its anchor
            raise self.error(node, f"more than {DEEPEST} levels of nesting")
        self.open.add(id(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{TAG}seq":
            found: Any = [self.value(child) for child in node.value]
        elif isinstance(node, yaml.MappingNode) and node.tag == f"{TAG}map":
            found = self.mapping(node)
        else:
            raise self.error(node, f"the tag {node.tag.replace(TAG, '!!')!r}; a configuration has none")
        self.open.discard(id(node))
        return found

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """The value of a mapping, whose own keys count more than those that ``<<`` brings."""
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(key_node, "a key must be text, not a list or a mapping")
            key = key_node.value
            if key in lines:
                first = f", first in line {lines[key]}" if self.lines else ""
                raise self.error(key_node, f"the key {_short(key)} stands twice{first}")
            lines[key] = key_node.start_mark.line + 1
            value = self.value(value_node)
            if key_node.tag == f"{TAG}merge":
                merged = self.merge(value_node, value)
            else:
                own[key] = value
        return {**merged, **own}

    def merge(self, node: yaml.Node, value: Any) -> dict[str, Any]:
        """What ``<<`` brings: one mapping, or several, of which the first comes first."""
        parts = value if isinstance(value, list) else [value]
        found: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, dict):
                raise self.error(node, "<< merges mappings, nothing else")
            found = {**part, **found}  # in this order: what is there already stays
        return found

    def scalar(self, node: yaml.ScalarNode) -> Any:
        """The value of a node that has no parts."""
        kind = node.tag.removeprefix(TAG)
        text = node.value
        if kind in ("str", "value", "merge"):
            if "\0" in text:
                raise self.error(node, "a NUL character")
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in yaml.SafeLoader.bool_values:
            return yaml.SafeLoader.bool_values[text.lower()]
        if kind == "int" and WHOLE.match(text):
            return self.whole(node, text.replace("_", ""))
        if kind == "float" and FLOAT.match(text):
            return self.real(node, text.replace("_", ""))
        raise self.error(node, f"{_short(text)} with the tag {node.tag.replace(TAG, '!!')!r}; write the value alone")

    def whole(self, node: yaml.Node, text: str) -> int:
        # the longest that fits is written in base 2, with a sign and 0b; Python refuses to read thousands of digits
        value = int(text, 0) if len(text) <= BITS + 3 else 2**BITS
        if abs(value) >= 2**BITS:
            raise self.error(node, f"{_short(text)} is too large a number, 2^{BITS} or more")
        return value

    def real(self, node: yaml.Node, text: str) -> float:
        # Python does not read YAML's .inf and .nan
        is_special = text.lstrip("+-").startswith((".i", ".I", ".n", ".N"))
        value = math.nan if is_special else float(text)
        if not math.isfinite(value):
            raise self.error(node, f"{_short(text)} is not a finite number")
        return value


def _short(text: str) -> str:
    """Text in quotes, cut where it is long."""
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def _nodes(text: str, where: str) -> yaml.Node | None:
    """YAML's nodes, before they become values."""
    try:
        return Reader(text).get_single_node()
    except ScionError as error:
        raise ScionError(f"{where}: {error}" if where else str(error)) from None


# ------------------------------------------------------------------------------------------------- files


def read(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ScionError: the file cannot be read, or holds something else; with the line.
    """
    try:
        size = check_regular(file).stat().st_size
        if size > LARGEST:
            raise ScionError(f"{file}: {size} bytes; a configuration has {LARGEST >> 10} KiB at most")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ScionError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise ScionError(f"{file}: not a text file in UTF-8") from None
    try:
        node = _nodes(text, str(file))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or type(error).__name__
        raise ScionError(f"{file}{line}: not valid YAML ({problem})") from None
    raw = None if node is None else Plain(str(file), lines=True).value(node)
    if not isinstance(raw, dict):
        raise ScionError(f"{file}: a configuration is a mapping from keys, as model, data and peft, to values")
    return raw


def dump(value: dict[str, Any]) -> str:
    """A configuration as YAML that `read` reads as the same values."""
    return yaml.dump(value, Dumper=Writer, sort_keys=False, allow_unicode=True)


def find(config: str) -> Path:
    """A configuration on disk, or, where there is none, among the installed domains."""
    try:
        return _find(config)
    except OSError as error:
        raise ScionError(f"{_short(config)}: cannot be read ({error.strerror or error})") from None


def _find(config: str) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    homes = _domain_homes()
    installed = _installed(path, homes)
    if installed is not None:
        return installed
    if (path / "config.yaml").is_file():
        raise ScionError(f"{_short(config)}: a folder, where a file is wanted; its configuration is "
                         f"{path / 'config.yaml'}")
    if path.exists():
        check_regular(path)  # says what it is
    known = _known_configurations(homes)
    same = [name for name in known if Path(name).stem == path.stem]
    hint = f" (did you mean {' or '.join(map(repr, same))}?)" if same else nearest(config, known)
    raise ScionError(f"{_short(config)}: no such configuration{hint}; there are {listed(known, 20)}")


def _domain_homes() -> list[Path]:
    """The folders of the installed package ``domains``; a namespace package has several."""
    spec = importlib.util.find_spec("domains")
    places = spec.submodule_search_locations if spec else None
    return [Path(place) for place in places or []]


def _installed(path: Path, homes: list[Path]) -> Path | None:
    """The configuration of that name among the installed domains, with or without ``domains/`` and its ending."""
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("domains",) else path
    if not inside.name or ".." in inside.parts:  # no way out of the domains
        return None
    for home in homes:
        for candidate in (home / inside, home / inside.with_suffix(".yaml")):
            if candidate.suffix in (".yaml", ".yml") and candidate.is_file():
                return candidate
    return None


def _known_configurations(homes: list[Path]) -> list[str]:
    """The installed configurations by their names, each once."""
    found: dict[str, None] = {}
    for home in homes:
        for file in sorted(home.glob("*/*.yaml")):
            found[f"domains/{file.relative_to(home)}"] = None
    return list(found)


# ------------------------------------------------------------------------------------------------- the command line


def parse(text: str, where: str = "") -> Any:
    """A value from the command line, as YAML reads it; what is no YAML is text.

    Raises:
        ScionError: a key twice, a number that is not finite, a document that is larger than it looks.
    """
    if len(text) > LARGEST:
        raise ScionError(f"{where}: {len(text)} characters; a value has {LARGEST >> 10} Ki at most")
    if "\0" in text:
        raise ScionError(f"{where}: a NUL character")
    try:
        node = _nodes(text, where)
    except yaml.YAMLError:
        return text
    if node is not None and node.tag.startswith("!"):
        return text  # "!" and a word after it
    value = None if node is None else Plain(where, lines=False).value(node)
    if value is None and text.strip().lower() not in ("", "~", "null"):
        return text  # to YAML "#" is a remark
    if value == "" and text.strip(" \"'"):
        return text  # to YAML a lone "|" opens a block of text, and "!" a tag
    return value
