"""When those who were refused are asked to come again."""

from __future__ import annotations

import random

import pytest

from harness.web_answer import retry_after


@pytest.mark.parametrize(
    ("wait_s", "least", "most"), [(0.0, 1, 1), (0.5, 1, 1), (1.0, 1, 2), (4.2, 5, 7), (60.0, 60, 90)]
)
def test_retry_after_is_spread_above_the_estimate(wait_s: float, least: int, most: int, rng: random.Random) -> None:
    """Whole seconds, at least one, never below the estimate, at most half as much again, rounded up."""
    values = {int(retry_after(wait_s, rng)) for _ in range(500)}
    assert least <= min(values)
    assert max(values) <= most
    assert len(values) >= most - least


def test_the_spread_is_that_of_the_random_source() -> None:
    """The same source gives the same values: nothing else goes into them."""
    first, second = random.Random(5), random.Random(5)
    assert [retry_after(30, first) for _ in range(9)] == [retry_after(30, second) for _ in range(9)]
