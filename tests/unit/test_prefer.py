"""`Prefer: wait`: how long an answer is of use."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MalformedMessage
from harness.prefer import LONGEST_WAIT_S, parse_wait, prefer_wait


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], 30.0),
        ([""], 30.0),
        (["respond-async"], 30.0),
        (["return=minimal; foo=wait"], 30.0),
        (["waiting=3"], 30.0),
        (['foo="wait=3, wait=4"'], 30.0),
        (["wait=1"], 1.0),
        (["wait=7"], 7.0),
        (["wait=030"], 30.0),
        (["wait=31"], 30.0),
        (["wait=999999999"], 30.0),
        (["WAIT = 7"], 7.0),
        (['wait="7"'], 7.0),
        (["wait=7; because"], 7.0),
        (["respond-async, wait=7"], 7.0),
        (['foo="a\\", wait=3", wait=7'], 7.0),
        (['wait=7, foo="bar'], 7.0),
        (['foo="bar, wait=7'], 30.0),
        (['foo="bar\\'], 30.0),
        (["respond-async", "wait=7"], 7.0),
        (["wait=7, wait=9"], 7.0),
        (["wait=7", "wait=x"], 7.0),
    ],
)
def test_wait_is_found_among_the_preferences(values: list[str], seconds: float) -> None:
    """Absent it is 30 s, and never more; others are ignored; of several the first counts (RFC 7240, 2)."""
    assert parse_wait(values) == seconds


@pytest.mark.parametrize(
    "value",
    ["wait", "wait=", "wait=0", "wait=00", "wait=-1", "wait=1.5", "wait=1s", "wait=+1", "wait=١", "wait=1 2",
     "wait=1000000000", 'wait="', 'wait=""', "wait=0x1", "wait;x=3", "foo, wait=soon"],
)  # fmt: skip
def test_a_malformed_wait_is_refused(value: str) -> None:
    """Whoever states a deadline is not served by a guessed one."""
    with pytest.raises(MalformedMessage, match="Prefer: wait"):
        parse_wait([value])


MOST = 128 * 8190  # characters: as many header fields as aiohttp takes, each as long as it may be


@pytest.mark.parametrize("value", ['"' + '\\"' * (MOST // 2), '"\\' * (MOST // 2), 'a"' * (MOST // 2 - 1) + '"'])
def test_a_field_that_no_client_would_send_is_read_once(value: str) -> None:
    """Quotes that are never closed: looked at anew from each of them, they would hold up the event loop for hours."""
    assert parse_wait([value]) == LONGEST_WAIT_S


@given(st.lists(st.text(max_size=40), max_size=4))
def test_no_header_raises_anything_else(values: list[str]) -> None:
    """A deadline within the bounds, or the one error."""
    with contextlib.suppress(MalformedMessage):
        assert 1 <= parse_wait(values) <= LONGEST_WAIT_S


@given(st.floats(min_value=0, max_value=100))
def test_what_a_client_states_is_read_back_and_never_longer_than_it_waits(seconds: float) -> None:
    """Whole seconds, rounded down, from 1 to 30."""
    read = parse_wait([prefer_wait(seconds)])
    assert 1 <= read <= LONGEST_WAIT_S
    assert read <= max(1.0, seconds)
