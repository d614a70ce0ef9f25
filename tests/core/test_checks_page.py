"""The page of checks is the one that the tests make."""

from __future__ import annotations

from tests.sheets.__main__ import PAGE, page


def test_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.sheets"
