"""``lightning methods``: the methods, as a table or one card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from core.cli.failures import says_what_failed

if TYPE_CHECKING:

    pass


@says_what_failed
def methods(name: str | None, as_json: bool, **filters: Any) -> int:
    """Print the table of all methods, or the card of one; ``filters`` are those of `core.report.methods_json`."""
    from core import report  # start-up time

    if as_json:
        print(json.dumps(report.card_json(name) if name else report.methods_json(**filters), indent=1))
    else:
        print(report.card(name) if name else report.methods_table(**filters))
    return 0
