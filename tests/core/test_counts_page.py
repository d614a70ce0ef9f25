"""The page of counts is the one that the tests make, and its summary's counts are ours."""

from __future__ import annotations

import pytest

from core import peft
from tests.core import test_published_counts
from tests.counts import BACKBONES, OTHERWISE, PAGE, SUMMARY, Count, key, page, tested

BEYOND = [count for count in SUMMARY if count.options is not None
          and key(count.backbone, count.method, count.options) not in tested()]
"""Those that no other test builds."""


def test_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.counts"


@pytest.mark.parametrize("count", BEYOND, ids=lambda count: f"{count.label}-{count.backbone}")
def test_summary(count: Count) -> None:
    backbone = getattr(test_published_counts, count.backbone)
    assert test_published_counts.counts_on(backbone, count.method, count.options or {})["method"] == count.count


def test_summary_agrees_with_the_other_tests() -> None:
    known = tested()
    for count in SUMMARY:
        if count.options is not None and count not in BEYOND:
            assert known[key(count.backbone, count.method, count.options)][1] == count.count, count.label
        assert (count.ours is None) == (not count.why) and count.ours != count.published


def test_methods_that_came_have_their_rows() -> None:
    """A row of a method that is in the registry has options; one without is not there yet."""
    for count in SUMMARY:
        here = count.method in peft.registry()
        assert here == (count.options is not None), f"{count.label}: give {count.method} its options in tests/counts.py"
    assert set(OTHERWISE) <= set(tested()) and all(count.backbone in BACKBONES for count in SUMMARY)
