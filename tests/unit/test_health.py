"""Health: what a report says, to whom, and how often the checks are asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from harness.errors import NotReady, StoreError
from harness.health import DEGRADED, FAILING, KEPT_S, OK, Health, check_database


class Time:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


class Part:
    """A part of a service that can break; counts how often it was asked."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.asked = 0

    async def check(self) -> None:
        self.asked += 1
        if self.fault is not None:
            raise self.fault


async def test_all_is_well_until_a_vital_check_fails() -> None:
    """Every check is named; the failing one with its sentence; a service without checks is well."""
    assert (await Health().report(in_full=True)).status == OK
    time, good, bad = Time(), Part(), Part()
    health = Health(monotonic=time)
    health.check("database", bad.check)
    health.check("tpm", good.check)
    time.s += 5
    report = await health.report(in_full=True)
    assert report.as_json() == {"status": OK, "uptime_s": 5.0, "checks": {"database": OK, "tpm": OK}}
    bad.fault = StoreError("the disk is full")
    time.s += KEPT_S
    report = await health.report(in_full=True)
    assert (report.status, dict(report.checks)) == (FAILING, {"database": "the disk is full", "tpm": OK})
    assert report.sentence == "failing: database: the disk is full"


async def test_what_is_not_vital_degrades_only() -> None:
    """A check that is not vital, and a part that is lost, leave the service in use."""
    health, part = Health(), Part()
    part.fault = NotReady("not registered yet")
    health.check("registration", part.check, vital=False)
    assert (await health.report(in_full=True)).status == DEGRADED
    links = Health()
    links.parts("host", lambda: {"a": OK, "b": "cannot be reached"})
    assert (await links.report(in_full=True)).status == DEGRADED


async def test_who_is_not_of_the_house_learns_numbers_only() -> None:
    """Names and faults of hosts are for the service's own authority; others learn how many are lost."""
    health = Health()
    states = {"a": OK, "b": "https://10.0.0.1 cannot be reached"}
    health.parts("host", lambda: states)
    assert (await health.report(in_full=True)).checks == {"host a": OK, "host b": states["b"]}
    assert (await health.report(in_full=False)).checks == {"hosts": "1 of 2 cannot be reached"}
    states["b"] = OK
    assert (await health.report(in_full=False)).checks == {"hosts": OK}
    states.clear()
    assert (await health.report(in_full=False)).checks == {}


async def test_asking_often_costs_nothing() -> None:
    """Within a second all who ask get one report, however many ask at once; afterwards it is made anew."""
    time, part = Time(), Part()
    health = Health(monotonic=time)
    health.check("database", part.check)
    reports = await asyncio.gather(*(health.report(in_full=True) for _ in range(50)))
    assert (part.asked, {report.status for report in reports}) == (1, {OK})
    time.s += KEPT_S / 2
    await health.report(in_full=True)
    assert part.asked == 1
    time.s += KEPT_S
    await health.report(in_full=True)
    assert part.asked == 2


async def test_one_who_gives_up_does_not_spoil_it_for_the_next() -> None:
    """The caller whose question runs the checks is cancelled: the next one asks again."""
    entered, release, asked = asyncio.Event(), asyncio.Event(), 0

    async def slow() -> None:
        nonlocal asked
        asked += 1
        entered.set()
        await release.wait()

    health = Health()
    health.check("database", slow)
    first = asyncio.create_task(health.report(in_full=True))
    await entered.wait()
    second = asyncio.create_task(health.report(in_full=True))
    first.cancel()
    release.set()
    assert (await second).status == OK
    assert asked == 2


async def test_a_fault_of_ours_is_neither_shown_nor_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """A check that raises something unknown is failing with a neutral sentence; the log has the traceback."""
    health, part = Health(), Part()
    part.fault = ZeroDivisionError("a secret of the inside")
    health.check("database", part.check)
    report = await health.report(in_full=True)
    assert (report.status, report.checks["database"]) == (FAILING, "internal fault; see the service's log")
    assert "a secret of the inside" in capsys.readouterr().err


async def test_a_change_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The log hears when a check begins to fail, with the cause, and when it works again, not at each question."""
    time, part = Time(), Part()
    health = Health(monotonic=time)
    health.check("database", part.check)
    part.fault = StoreError("the database cannot be used")
    for _ in range(3):
        await health.report(in_full=True)
        time.s += KEPT_S
    part.fault = None
    for _ in range(3):
        await health.report(in_full=True)
        time.s += KEPT_S
    told = [line for line in capsys.readouterr().err.splitlines() if '"health"' in line]
    assert [('"warning"' in line, '"state": "ok"' in line) for line in told] == [(True, False), (False, True)]


async def test_the_cause_in_the_log_is_that_of_this_change(capsys: pytest.CaptureFixture[str]) -> None:
    """A check that fails in another way is not told with the cause of its last failure."""
    time, part = Time(), Part()
    health = Health(monotonic=time)
    health.check("database", part.check)
    refusal = StoreError("the database cannot be used")
    refusal.__cause__ = OSError("disk I/O error")
    for fault in (refusal, ZeroDivisionError()):
        part.fault = fault
        await health.report(in_full=True)
        time.s += KEPT_S
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if '"health"' in line]
    assert [event["cause"] for event in told] == ["disk I/O error", ""]


async def test_the_sentence_about_a_database_names_no_path() -> None:
    """What the database said goes into the log; the sentence for everybody does not name its file."""

    class Broken:
        @asynccontextmanager
        async def begin(self) -> AsyncIterator[None]:
            raise StoreError("database sqlite:////secret/place.db: disk I/O error")
            yield

    with pytest.raises(StoreError) as caught:
        await check_database(Broken())
    assert "secret" not in caught.value.detail
    assert "disk I/O error" in str(caught.value.__cause__)
