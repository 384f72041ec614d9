"""A database that is away for a while, under sessions that go on: nothing counts that was not stored."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from harness.errors import PeerUnreachable, StoreError
from harness.tenant.plan import Timing
from harness.tenant.ports import Progress
from harness.tenant.session import Session
from harness.tenant.states import ACTIVE, Event, State
from tests.support.manual_time import settle
from tests.support.tenant_wire import Wire

LOCKED = StoreError("database is locked")


@contextlib.asynccontextmanager
async def running(wire: Wire) -> AsyncIterator[Session]:
    """A session whose task runs until the end of the block."""
    session = Session(wire.plan, wire.ports, Progress(state=State.SAVED))
    task = asyncio.get_running_loop().create_task(session.run())
    try:
        await settle()
        yield session
    finally:
        assert not task.done(), "the session's task ended by itself"
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.parametrize("away_s", [0.1, 5.0, 60.0, 3600.0])
async def test_the_loop_goes_on_by_itself_when_the_database_is_back(away_s: float) -> None:
    """However long it is away: no operator is needed, nobody is attested meanwhile, and then rounds go on."""
    wire = Wire(jitter=0.5)
    async with running(wire) as session:
        wire.records.fault = LOCKED
        await wire.time.advance(2.0 + away_s)
        assert session.state in ACTIVE
        assert not session.attested()
        wire.records.fault = None
        rounds = session.progress.rounds
        await wire.time.advance(12.0)
        assert session.attested()
        assert session.progress.rounds > rounds


async def test_what_was_not_stored_is_not_shown_as_reached() -> None:
    """The round was accepted and its record is refused: neither the count nor the time of success moves."""
    wire = Wire(v=None)
    async with running(wire) as session:
        before = session.progress
        wire.provider.on_ask = lock = _locking(wire)
        await wire.time.advance(2.0)
        assert lock.called
        assert (session.progress.rounds, session.progress.last_success) == (before.rounds, before.last_success)
        assert not session.attested()
        assert session.store_fault is LOCKED


async def test_a_success_that_could_be_stored_only_late_is_an_old_one() -> None:
    """Accepted, stored an hour later: the time of success is that of the acceptance, and nobody is attested by it."""
    wire = Wire(v=None, timing=Timing(quote_interval_s=100.0))
    wire.provider.on_ask = _locking(wire)
    async with running(wire) as session:
        accepted_at = wire.time.now()
        await wire.time.advance(3600.0)
        wire.provider.on_ask = wire.records.save_fault = None
        await wire.time.advance(10.0)
        assert session.progress.last_success == pytest.approx(accepted_at)
        assert session.progress.rounds == 1
        assert not session.attested()
        await wire.time.advance(100.0)
        assert session.attested()


async def test_v_is_not_released_on_evidence_that_aged_while_its_record_waited() -> None:
    """The record of the first success waits for longer than a round may take: a new round is made before V goes out."""
    wire = Wire(timing=Timing(round_deadline_s=10.0))
    wire.provider.on_ask = _locking(wire)
    async with running(wire) as session:
        await wire.time.advance(30.0)
        assert wire.guest.received == []
        wire.provider.on_ask = None
        wire.provider.tpm.pcrs[4] = bytes(32)
        wire.records.save_fault = None
        await wire.time.advance(20.0)
        assert wire.guest.received == []
        assert (session.state, session.progress.failed_check) == (State.INVALID_QUOTE, 9)


async def test_a_delivered_v_is_recorded_and_not_sent_again() -> None:
    """V is with the guest when the database fails: the record waits, and V is sent once."""
    wire = Wire(timing=Timing(quote_interval_s=100.0))
    sent = wire.guest.provide_v

    async def deliver(wrapped: bytes) -> None:
        await sent(wrapped)
        wire.records.fault = LOCKED

    wire.guest.provide_v = deliver  # type: ignore[method-assign]
    async with running(wire) as session:
        await wire.time.advance(30.0)
        assert not session.progress.v_released
        wire.records.fault = None
        await wire.time.advance(10.0)
        assert session.progress.v_released
        assert wire.guest.received == [wire.v]


async def test_a_finding_is_stored_once_the_database_is_back() -> None:
    """INVALID_QUOTE is shown at once; its record and its one alarm follow, and the operator can resume."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.tpm.pcrs[0], honest = bytes(32), wire.guest.tpm.pcrs[0]
        wire.records.fault = LOCKED
        await wire.time.advance(60.0)
        assert (session.state, session.progress.failed_check) == (State.INVALID_QUOTE, 9)
        assert wire.records.alarms == []
        wire.records.fault = None
        await wire.time.advance(10.0)
        assert wire.records.saved[-1].state is State.INVALID_QUOTE
        assert [alarm.kind for alarm in wire.records.alarms] == ["ReferenceValueMismatch"]
        wire.guest.tpm.pcrs[0] = honest
        session.resume()
        await settle()
        assert session.attested()


async def test_an_allowed_reboot_is_stored_once_the_database_is_back() -> None:
    """The round starts anew only after baseline and alarm are stored, together."""
    wire = Wire(allow_reboots=True, v=None)
    async with running(wire) as session:
        wire.provider.tpm.reboot()
        wire.records.fault = LOCKED
        await wire.time.advance(30.0)
        asked = len(wire.provider.asked)
        assert wire.records.alarms == []
        wire.records.fault = None
        await wire.time.advance(10.0)
        assert [alarm.kind for alarm in wire.records.alarms] == ["HostRebooted"]
        assert len(wire.provider.asked) > asked
        assert session.attested()


async def test_a_database_that_is_away_wears_out_nobodys_patience() -> None:
    """It was away for hours, and then the guest is for a minute: that minute is the guest's only."""
    wire = Wire(v=None, jitter=0.5)
    async with running(wire) as session:
        wire.records.fault = LOCKED
        await wire.time.advance(7200.0)
        wire.records.fault = None
        wire.guest.script = [PeerUnreachable("x")] * 10
        await wire.time.advance(60.0)
        assert session.attested()


async def test_a_stop_waits_for_no_database() -> None:
    """A session that waits for the database ends at once when the service stops."""
    wire = Wire()
    wire.records.fault = LOCKED
    session = Session(wire.plan, wire.ports, Progress(state=State.SAVED))
    task = asyncio.get_running_loop().create_task(session.run())
    await settle()
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert session.state is State.SAVED


async def test_a_fault_that_is_not_the_databases_still_ends_in_tenant_failed() -> None:
    """A bug in our own bookkeeping is no database that comes back."""
    wire = Wire()

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError("bug")

    wire.records.raise_clock = broken  # type: ignore[method-assign]
    async with running(wire) as session:
        assert session.state is State.TENANT_FAILED
        assert [alarm.kind for alarm in wire.records.alarms] == ["RuntimeError"]
        assert wire.guest.received == []


class _locking:  # noqa: N801 - reads as a verb
    """No progress can be stored from the moment on when the host is asked."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.called = False

    async def __call__(self) -> None:
        self.called = True
        self.wire.records.save_fault = LOCKED


async def test_every_try_that_the_database_refused_is_told_and_no_peer_is_blamed() -> None:
    """A success that cannot be stored: each try is told as a fault of ours, without a finding about a peer."""
    wire = Wire(v=None, jitter=0.5)
    told: list[tuple[str, bool]] = []

    def tell(event: Event, effects: object, finding: object, fault: StoreError | None, done: object) -> None:
        if fault is not None:
            told.append((event.name, finding is None))

    wire.ports = replace(wire.ports, told=tell)
    wire.records.save_fault = LOCKED
    async with running(wire):
        await wire.time.advance(5.0)
        assert len(told) >= 3
        assert set(told) == {("TRANSPORT_FAILED", True)}
        wire.records.save_fault = None
        await wire.time.advance(10.0)
        tries = len(told)
        await wire.time.advance(10.0)
        assert len(told) == tries


async def test_a_guests_clock_is_stored_before_a_wait_for_a_host_that_gave_no_answer() -> None:
    """Its evidence was accepted, and no success follows: the clock does not wait for one."""
    wire = Wire(v=None)
    wire.provider.script = [PeerUnreachable("away")]
    settled: list[int] = []

    async def settle_clocks() -> None:
        settled.append(len(wire.guest.asked))

    wire.records.settle = settle_clocks  # type: ignore[method-assign]
    async with running(wire) as session:
        assert session.state is State.GET_PROVIDER_QUOTE_RETRY
        assert settled == [1]
