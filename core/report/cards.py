"""The cards of methods: what a class says of itself, for people and for programs."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

from core.report.text import aligned

if TYPE_CHECKING:  # start-up time
    from core.report.taxonomy import Known

SECTIONS = ("Equation", "Trains", "Merges", "Source")
DECLARED = ("identity_at_start", "mergeable", "moves_base", "needs", "inference_cost", "recommended", "stages", "mode")
BUILT_IN = "core.peft."
WIDTH = 100


def sections(doc: str) -> dict[str, str]:
    """A class's docstring taken apart: ``summary`` and the text of each of ``SECTIONS``, lines joined."""
    found: dict[str, list[str]] = {"summary": []}
    current: str | None = "summary"
    heading = re.compile(rf"({'|'.join(SECTIONS)}): *(.*)")
    for line in inspect.cleandoc(doc).splitlines():
        head = heading.match(line)
        if head:
            current = str(head[1]).lower()
            found[current] = [str(head[2])]
        elif current and (line.startswith(" ") or (current == "summary" and line)):
            found[current].append(line.strip())
        else:  # a blank line ends the summary, a line without indentation a section; ``Args`` is in neither
            current = None
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def arguments(cls: type) -> list[dict[str, Any]]:
    """The constructor's arguments: ``{"name", "type", "default", "help", "common"}``; common ones are the base's."""
    from core.record import plain, signature  # start-up time

    own = inspect.signature(cls.__init__).parameters
    found = []
    for name, parameter in signature(cls).parameters.items():
        annotation = parameter.annotation
        type_text = "" if annotation is inspect.Parameter.empty else str(annotation)
        required = parameter.default is inspect.Parameter.empty
        default = None if required else plain(parameter.default)
        found.append({
            "name": name,
            "type": type_text,
            "required": required,
            "default": default,
            "help": _inherited_help(cls, name),
            "common": name not in own and not _inherits(cls, name),
        })
    return found


def _inherited_help(cls: type, name: str) -> str:
    """What the nearest class that explains the argument says of it: a subclass need not repeat its parent's help."""
    for base in cls.__mro__:
        known = argument_help(base.__doc__ or "").get(name)
        if known:
            return known
    return ""


def _inherits(cls: type, name: str) -> bool:
    """Whether ``name`` comes from a parent method (DoRA's rank from LoRA), not from what all methods share."""
    from core.method.definition import MethodDefinition  # start-up time

    return name not in inspect.signature(MethodDefinition.__init__).parameters


def argument_help(doc: str) -> dict[str, str]:
    """What a docstring's ``Args`` say, by the arguments' names."""
    lines = inspect.cleandoc(doc).splitlines()
    if "Args:" not in lines:
        return {}
    found: dict[str, str] = {}
    names: list[str] = []
    first = lines.index("Args:") + 1
    for line in lines[first:]:
        # Names are indented by 4, as in ``    rank, alpha: the width``, what continues their text by 8.
        entry = re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith(" " * 8):
            text = line.strip()
            for name in names:
                found[name] = f"{found[name]} {text}".strip()
        elif line:
            break
    return found


def card_json(name: str) -> dict[str, Any]:
    """All that is known about a method, as JSON.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    from core.peft import method_class, registry  # start-up time
    from core.record import plain  # start-up time

    cls = method_class(name)
    taxon, kinds = cls.tags
    home = registry().get(name, cls.__module__)
    family = _folder(home) if home.startswith(BUILT_IN) else home
    found: dict[str, Any] = {
        "name": name,
        "family": family,
        "module": home,
        "taxon": taxon,
        "kinds": list(kinds),
        "status": "implemented",
    }
    found.update(sections(cls.__doc__ or ""))
    for key in DECLARED:
        found[key] = plain(getattr(cls, key, None))
    found["arguments"] = arguments(cls)
    return found


def _folder(module: str) -> str:
    """The folder of `core.peft` that a module of a built-in method is in."""
    return module.removeprefix(BUILT_IN).partition(".")[0]


def methods_json(family: str | None = None, kind: str | None = None, mergeable: bool = False, planned: bool = False
                 ) -> list[dict[str, Any]]:
    """The cards of all methods; an installed method that cannot be imported has ``error`` instead.

    Args:
        family: keeps those of a family (`core.report.taxonomy.FAMILIES`), or of a folder of `core.peft`.
        kind: keeps those that modify such things (`core.report.taxonomy.KINDS`).
        mergeable: keeps those that can be written into the weights.
        planned: gives what is known and not here instead.

    Raises:
        ScionError: no such family or kind.
    """
    from core.peft import registry  # start-up time
    from core.report import taxonomy  # start-up time

    folders = {_folder(home) for home in registry().values() if home.startswith(BUILT_IN)}
    taxonomy.check_filters(family, kind, sorted(folders))
    if planned:
        cards = [_planned_card(known) for known in taxonomy.planned()]
        return [card for card in cards if _is_chosen(card, family, kind, mergeable)]
    found: list[dict[str, Any]] = []
    for name, home in registry().items():
        card = _card_or_error(name, home)
        if _is_chosen(card, family, kind, mergeable):
            found.append(card)
    return sorted(found, key=_order)


def _planned_card(known: Known) -> dict[str, Any]:
    return {
        "name": known.name,
        "family": known.family,
        "taxon": known.family,
        "kinds": list(known.kinds),
        "status": "planned",
        "summary": known.summary,
    }


def _card_or_error(name: str, home: str) -> dict[str, Any]:
    """The card of a method; of one that another distribution brings and that fails to import, the error."""
    try:
        return card_json(name)
    except Exception as error:
        if home.startswith("core."):  # a fault in the core is ours, and no row of a table
            raise
        problem = f"{type(error).__name__}: {error}"
        return {"name": name, "family": home, "module": home, "taxon": "", "kinds": [], "error": problem}


def _order(card: dict[str, Any]) -> tuple[bool, str, str, str]:
    """Methods of the core come first, then by family and name."""
    is_foreign = not card["module"].startswith("core.")
    return is_foreign, card["taxon"], card["family"], card["name"]


def _is_chosen(card: dict[str, Any], family: str | None, kind: str | None, mergeable: bool) -> bool:
    if family is not None and family not in (card["family"], card["taxon"]):
        return False
    if kind is not None and kind not in card["kinds"]:
        return False
    return not mergeable or bool(card.get("mergeable"))


def methods_table(family: str | None = None, kind: str | None = None, mergeable: bool = False, planned: bool = False
                  ) -> str:
    """Every method in a line, by family: what it modifies, whether it merges, what it does. The arguments are those of
    `methods_json`."""
    header = ["method", "family", "modifies", "merges", "moves base", "lr", "what it does"]
    body = [_table_row(card) for card in methods_json(family, kind, mergeable, planned)]
    return "\n".join(aligned(header, body, left=len(header)))


def _table_row(card: dict[str, Any]) -> list[str]:
    family = card["taxon"] or card["family"]  # a method from outside may have no taxon
    kinds = ", ".join(card["kinds"]) or "-"
    start = [card["name"], family, kinds]
    if "error" in card:
        return [*start, "-", "-", "-", f"cannot be imported: {card['error']}"]
    if card["status"] == "planned":
        return [*start, "-", "-", "-", f"planned: {card['summary']}"]
    merges = "yes" if card["mergeable"] else "no"
    moves_base = "yes" if card["moves_base"] else "no"
    rate = card["recommended"]["lr"] if card.get("recommended") else None
    rate_text = "-" if rate is None else f"{rate:g}"
    return [*start, merges, moves_base, rate_text, card["summary"]]


def card(name: str) -> str:
    """The card of one method, for a terminal.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    found = card_json(name)
    lines = [f"{name} ({found['family']})"]
    lines += _wrapped(found["summary"], "  ", "  ")
    lines.append("")
    for key, text in _facts(found):
        if text:
            lines += _wrapped(text, f"  {key:<13}", " " * 15)
    own = [argument for argument in found["arguments"] if not argument["common"]]
    common = [argument for argument in found["arguments"] if argument["common"]]
    lines += _argument_lines("arguments", own)
    lines += _argument_lines("arguments of every method", common)
    return "\n".join(lines)


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of a card between its summary and its arguments: name and text, empty where there is nothing to say."""
    headings = [heading.lower() for heading in SECTIONS]
    facts = [(key, str(found[key])) for key in headings if found.get(key)]
    family = ""
    if found["taxon"]:
        kinds = ", ".join(found["kinds"])
        family = f"{found['taxon']}; modifies {kinds}"
    settings = found["recommended"] or {}
    recommended = [f"{key} {value:g}" for key, value in settings.items()]
    facts.append(("family", family))
    facts.append(("at start", "the identity" if found["identity_at_start"] else "changes the output"))
    facts.append(("base", "its own tensors are trained" if found["moves_base"] else "stays as it is"))
    facts.append(("inference", str(found["inference_cost"] or "")))
    facts.append(("recommended", ", ".join(recommended)))
    facts.append(("needs", ", ".join(found["needs"] or [])))
    facts.append(("stages", ", ".join(found["stages"] or [])))
    facts.append(("backbone", f"{found['mode']} mode while training"))
    return facts


def _argument_lines(title: str, arguments: list[dict[str, Any]]) -> list[str]:
    if not arguments:
        return []
    lines = ["", f"  {title}"]
    for argument in arguments:
        start = argument["name"]
        if not argument["required"]:
            start += f" = {argument['default']!r}"
        text = f"{start}: {argument['help']}".rstrip(": ")  # without help nothing follows the colon
        lines += _wrapped(text, "    ", "        ")
    return lines


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """Lines of at most ``WIDTH`` characters; ``first`` and ``others`` are their beginnings."""
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=others)
