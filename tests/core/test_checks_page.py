"""The page of checks is the one that the tests make."""

from __future__ import annotations

from tests import methods_table
from tests.papers.__main__ import PAGE, page


def test_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.papers"


def test_the_table_of_methods_is_current() -> None:
    assert methods_table.README.read_text(encoding="utf-8") == methods_table.page(), "run python -m tests.methods_table"
