"""Refusals are all counted, and told at most once a second of each tenant and kind."""

from __future__ import annotations

import json

import pytest

from harness.errors import HarnessError, NotYourGuest, ShareExhausted
from harness.provider.refusal_log import RefusalLog
from tests.support.manual_clock import ManualClock


def told(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, int, int]]:
    """Tenant, error, count and how many were not told, of each event since the last look."""
    lines = map(json.loads, capsys.readouterr().err.splitlines())
    return [(line["tenant"], line["error"], line["count"], line["not_told"]) for line in lines]


def test_a_flood_of_refusals_is_one_event_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """The first at once; the next says how many were not told; another tenant's, and another kind, is told at once."""
    clock = ManualClock()
    log = RefusalLog(clock)

    def refuse(tenant: str, error: HarnessError, times: int = 1) -> None:
        for _ in range(times):
            log.note(tenant, error)

    refuse("alice", ShareExhausted("full"), 1000)
    assert told(capsys) == [("alice", "ShareExhausted", 1, 0)]
    refuse("bob", ShareExhausted("full"))
    refuse("alice", NotYourGuest("no"))
    assert told(capsys) == [("bob", "ShareExhausted", 1001, 0), ("alice", "NotYourGuest", 1, 0)]
    clock.advance(0.75)
    refuse("alice", ShareExhausted("full"), 10)
    assert told(capsys) == []
    clock.advance(0.5)
    refuse("alice", ShareExhausted("full"), 3)
    assert told(capsys) == [("alice", "ShareExhausted", 1012, 1009)]
    assert log.counts == {"ShareExhausted": 1014, "NotYourGuest": 1}


def test_a_tenant_that_is_removed_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    """What is counted stays; the next of that name begins anew."""
    log = RefusalLog(ManualClock())
    for tenant in ("alice", "alice", "bob", "bob"):
        log.note(tenant, NotYourGuest("no"))
    log.follow({"bob"})
    assert len(told(capsys)) == 2
    log.note("bob", NotYourGuest("no"))
    log.note("alice", NotYourGuest("no"))
    assert told(capsys) == [("alice", "NotYourGuest", 6, 0)]
    assert log.counts == {"NotYourGuest": 6}
