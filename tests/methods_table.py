"""Writes the table of methods in README.md from their cards. ``python -m tests.methods_table``"""

from __future__ import annotations

from pathlib import Path

from core.peft import method_class, registry
from core.report import sections
from tests.papers.__main__ import paper_of

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by python -m tests.methods_table -->\n", "<!-- end of what is made -->\n"


def row(name: str, folder: str) -> str:
    """A method's line: where it is, what it is, what it trains, whether it merges, and its paper."""
    cls = method_class(name)
    card = sections(cls.__doc__ or "")
    trains = card["trains"].partition(";")[0].partition(". ")[0]
    paper = paper_of(name)
    link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() and "." in paper else paper
    merges = "yes" if cls.mergeable else "no"
    return f"| `{name}` | {folder} | {card['summary'].rstrip('.')} | {trains} | {merges} | {link} |"


def table() -> str:
    """The whole table, by group and name."""
    lines = ["| name | group | what it is | trains | merges | paper |", "|---|---|---|---|---|---|"]
    groups = {name: module.split(".")[2] for name, module in registry().items() if module.startswith("core.peft.")}
    for name in sorted(groups, key=lambda name: (groups[name], name.lower())):
        lines.append(row(name, groups[name]))
    return "\n".join(lines) + "\n"


def page() -> str:
    """README.md with the table as it is now."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
