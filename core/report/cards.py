"""The cards of methods: what a class says of itself, for people and for programs."""

from __future__ import annotations

import inspect
import re
from typing import Any

from core.report.text import aligned

SECTIONS = ("Equation", "Trains", "Merges", "Source")
DECLARED = ("identity_at_start", "mergeable", "moves_base", "needs", "inference_cost", "recommended", "stages", "mode")


def sections(doc: str) -> dict[str, str]:
    """A class's docstring taken apart: ``summary`` and what stands under each of ``SECTIONS``, lines joined."""
    found: dict[str, list[str]] = {"summary": []}
    current: str | None = "summary"
    for line in inspect.cleandoc(doc).splitlines():
        head = re.match(rf"({'|'.join(SECTIONS)}): *(.*)", line)
        if head:
            current = str(head[1]).lower()
            found[current] = [str(head[2])]
        elif current and (line.startswith(" ") or (current == "summary" and line)):
            found[current].append(line.strip())
        else:
            current = None
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def arguments(cls: type) -> list[dict[str, Any]]:
    """The constructor's arguments: ``{"name", "type", "default", "help", "common"}``; common ones are the base's."""
    from core.record import plain, signature  # start-up time

    own = inspect.signature(cls.__init__).parameters
    found = []
    for name, parameter in signature(cls).parameters.items():
        known = (argument_help(base.__doc__ or "").get(name) for base in cls.__mro__)
        annotation = parameter.annotation
        required = parameter.default is inspect.Parameter.empty
        found.append({
            "name": name, "type": "" if annotation is inspect.Parameter.empty else str(annotation),
            "required": required, "default": None if required else plain(parameter.default),
            "help": next(filter(None, known), ""), "common": name not in own and not _inherits(cls, name),
        })
    return found


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
    for line in lines[lines.index("Args:") + 1:]:
        entry = re.match(r" {4}(\w+(?:, \w+)*): *(.*)", line)
        if entry:
            names = entry[1].split(", ")
            found.update(dict.fromkeys(names, entry[2]))
        elif line.startswith(" " * 8):
            found.update({name: f"{found[name]} {line.strip()}".strip() for name in names})
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
    from core.report.taxonomy import tags_of  # start-up time

    cls = method_class(name)
    taxon, kinds = tags_of(name, cls)
    home = registry().get(name, cls.__module__)
    family = home.removeprefix("core.peft.").partition(".")[0] if home.startswith("core.peft.") else home
    return {"name": name, "family": family, "module": home, "taxon": taxon, "kinds": list(kinds),
            "status": "implemented", **sections(cls.__doc__ or ""),
            **{key: plain(getattr(cls, key, None)) for key in DECLARED}, "arguments": arguments(cls)}


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

    folders = {home.removeprefix("core.peft.").partition(".")[0] for home in registry().values()
               if home.startswith("core.peft.")}
    taxonomy.check_filters(family, kind, sorted(folders))
    found: list[dict[str, Any]] = []
    if planned:
        found = [{"name": known.name, "family": known.family, "taxon": known.family, "kinds": list(known.kinds),
                  "status": "planned", "summary": known.summary} for known in taxonomy.planned()]
        return [card for card in found if _is_wanted(card, family, kind, mergeable)]
    for name, home in registry().items():
        try:
            found.append(card_json(name))
        except Exception as error:
            if home.startswith("core."):
                raise
            found.append({"name": name, "family": home, "module": home, "taxon": "", "kinds": [],
                          "error": f"{type(error).__name__}: {error}"})
    found = [card for card in found if _is_wanted(card, family, kind, mergeable)]
    return sorted(found, key=lambda card: (not card["module"].startswith("core."), card["taxon"], card["family"],
                                           card["name"]))


def _is_wanted(card: dict[str, Any], family: str | None, kind: str | None, mergeable: bool) -> bool:
    of_family = family is None or family in (card["family"], card["taxon"])
    return of_family and (kind is None or kind in card["kinds"]) and (not mergeable or bool(card.get("mergeable")))


def methods_table(family: str | None = None, kind: str | None = None, mergeable: bool = False, planned: bool = False
                  ) -> str:
    """Every method in a line, by family: what it modifies, whether it merges, what it does. The arguments are those of
    `methods_json`."""
    header = ["method", "family", "modifies", "merges", "moves base", "lr", "what it does"]
    body = []
    for card in methods_json(family, kind, mergeable, planned):
        start = [card["name"], card["taxon"] or card["family"], ", ".join(card["kinds"]) or "-"]
        if "error" in card:
            body.append([*start, "-", "-", "-", f"cannot be imported: {card['error']}"])
        elif card["status"] == "planned":
            body.append([*start, "-", "-", "-", f"planned: {card['summary']}"])
        else:
            rate = card["recommended"]["lr"] if card.get("recommended") else None
            declared = ["yes" if card[key] else "no" for key in ("mergeable", "moves_base")]
            body.append([*start, *declared, "-" if rate is None else f"{rate:g}", card["summary"]])
    return "\n".join(aligned(header, body, left=len(header)))


def card(name: str) -> str:
    """The card of one method, for a terminal.

    Raises:
        ScionError: no method has that name; the message gives the nearest ones.
    """
    import textwrap

    found = card_json(name)
    lines = [f"{name} ({found['family']})", *textwrap.wrap(found["summary"], 100, initial_indent="  ",
                                                          subsequent_indent="  "), ""]
    facts = [(key, found[key]) for key in map(str.lower, SECTIONS) if found.get(key)]
    facts += [("family", f"{found['taxon']}; modifies {', '.join(found['kinds'])}" if found["taxon"] else ""),
              ("at start", "the identity" if found["identity_at_start"] else "changes the output"),
              ("base", "its own tensors are trained" if found["moves_base"] else "stays as it is"),
              ("inference", found["inference_cost"]),
              ("recommended", ", ".join(f"{key} {value:g}" for key, value in (found["recommended"] or {}).items())),
              ("needs", ", ".join(found["needs"] or [])), ("stages", ", ".join(found["stages"] or [])),
              ("backbone", f"{found['mode']} mode while training")]
    for key, text in facts:
        if text:
            lines += textwrap.wrap(str(text), 100, initial_indent=f"  {key:<13}", subsequent_indent=" " * 15)
    for title, common in (("arguments", False), ("arguments of every method", True)):
        chosen = [argument for argument in found["arguments"] if argument["common"] is common]
        lines += ["", f"  {title}"] if chosen else []
        for argument in chosen:
            start = argument["name"] if argument["required"] else f"{argument['name']} = {argument['default']!r}"
            lines += textwrap.wrap(f"{start}: {argument['help']}".rstrip(": "), 100, initial_indent="    ",
                                   subsequent_indent="        ")
    return "\n".join(lines)
