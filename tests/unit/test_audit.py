"""The operator's reason: what the audit trail takes."""

from __future__ import annotations

import pytest

from harness.audit import NOT_STATED, REASON_LIMIT, parse_reason
from harness.errors import MalformedMessage


def test_a_reason_is_kept_without_the_space_around_it() -> None:
    """The operator's words go in as they are, trimmed."""
    assert parse_reason("  kernel 6.1.12 was rolled out ") == "kernel 6.1.12 was rolled out"
    assert parse_reason("x" * REASON_LIMIT) == "x" * REASON_LIMIT


@pytest.mark.parametrize("value", [None, "", "   ", 7, ["why"], "two\nlines", "x" * (REASON_LIMIT + 1), "\x1b[2J"])
def test_an_act_without_a_usable_reason_is_refused(value: object) -> None:
    """No reason, no act."""
    with pytest.raises(MalformedMessage):
        parse_reason(value)


def test_an_interface_without_a_place_for_a_reason_says_so() -> None:
    """Keylime's calls have no reason; the entry says that none was stated, and an unusable one is still refused."""
    assert parse_reason(None, required=False) == NOT_STATED
    with pytest.raises(MalformedMessage):
        parse_reason("", required=False)
