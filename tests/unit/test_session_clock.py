"""When "attested" ends: three intervals, whatever the system clock does, and across restarts; and what is shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from harness.errors import PeerUnreachable
from harness.tenant.ports import Chance, Progress
from harness.tenant.session import Session
from harness.tenant.states import State
from harness.values import HashAlg
from tests.support.manual_time import settle
from tests.support.tenant_wire import Wire

DAY_S = 86_400.0
JUMPS = pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S, 3.0, -3.0])
SILENT = [PeerUnreachable("x")] * 10_000


@contextlib.asynccontextmanager
async def running(
    wire: Wire, progress: Progress | None = None, *, start_within_s: float = 0.0
) -> AsyncIterator[Session]:
    """A session whose task runs until the end of the block."""
    session = Session(wire.plan, wire.ports, progress or Progress(state=State.SAVED), start_within_s=start_within_s)
    task = asyncio.get_running_loop().create_task(session.run())
    try:
        await settle()
        yield session
    finally:
        assert not task.done(), "the session's task ended by itself"
        task.cancel()
        await asyncio.wait({task})


@JUMPS
async def test_a_clock_that_is_set_breaks_no_session(jump_s: float) -> None:
    """Rounds go on in their interval, and after the next success the agent is attested again."""
    wire = Wire()
    async with running(wire) as session:
        assert session.attested()
        wire.time.set_wall(jump_s)
        await wire.time.advance(2.0)
        assert session.progress.rounds == 2
        assert session.progress.last_success == wire.time.now()
        assert session.attested()
        await wire.time.advance(20.0)
        assert session.progress.rounds == 12


@JUMPS
async def test_a_clock_that_is_set_keeps_nobody_attested(jump_s: float) -> None:
    """The guest is silent from now on: however the clock is set meanwhile, after three intervals it is not attested."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.script = list(SILENT)
        await wire.time.advance(5.0)
        wire.time.set_wall(jump_s)
        await wire.time.advance(1.1)
        assert not session.attested()
        for back_s in (-jump_s, -1.0, -5.0, -DAY_S):
            wire.time.set_wall(back_s)
            assert not session.attested()


async def test_a_machine_that_slept_shows_nobody_attested() -> None:
    """Suspended for an hour: the monotonic clock stood still, the wall clock did not."""
    wire = Wire()
    async with running(wire) as session:
        wire.guest.script = list(SILENT)
        wire.time.set_wall(3600.0)
        assert not session.attested()


@pytest.mark.parametrize(("age_s", "shown"), [(0.0, True), (5.9, True), (6.0, False), (DAY_S, False), (-1.0, False)])
async def test_after_a_restart_a_success_counts_for_three_intervals(age_s: float, shown: bool) -> None:
    """The stored success is shown only while it is fresh, and never when it seems to be of the future."""
    wire = Wire()
    wire.guest.gate.clear()
    stored = Progress(state=State.SAVED, rounds=3, last_success=wire.time.now() - age_s)
    async with running(wire, stored) as session:
        assert session.state is State.GET_QUOTE
        assert session.attested() is shown
        await wire.time.advance(6.1)
        assert not session.attested()


async def test_sessions_of_a_verifier_that_starts_do_not_ask_at_once() -> None:
    """The first question comes within the given time, at random; until then the agent is SAVED and not attested."""
    wire = Wire()
    wire.ports = replace(wire.ports, chance=Chance(jitter=lambda: 0.5))
    stored = Progress(state=State.SAVED, last_success=wire.time.now())
    async with running(wire, stored, start_within_s=8.0) as session:
        await wire.time.advance(3.9)
        assert (session.state, wire.guest.asked, session.attested()) == (State.SAVED, [], False)
        assert session.next_round_at() == pytest.approx(wire.time.now() + 0.1)
        await wire.time.advance(0.2)
        assert session.attested()


async def test_the_next_round_is_announced_in_todays_time() -> None:
    """None while a question is open; else now and what is left of the wait, also when the clock was set meanwhile."""
    wire = Wire()
    async with running(wire) as session:
        assert session.next_round_at() == pytest.approx(wire.time.now() + 2.0)
        wire.time.set_wall(DAY_S)
        await wire.time.advance(0.5)
        assert session.next_round_at() == pytest.approx(wire.time.now() + 1.5)
        wire.guest.gate.clear()
        await wire.time.advance(1.6)
        assert session.next_round_at() is None
    assert session.next_round_at() is None


async def test_the_newest_eight_verdicts_are_kept() -> None:
    """Each appraisal is one, oldest first; the rejection that stopped the session is the last."""
    wire = Wire()
    async with running(wire) as session:
        await wire.time.advance(2 * 4)
        verdicts = session.progress.verdicts
        assert [(each.layer, each.accepted) for each in verdicts] == [("guest", True), ("host", True)] * 4
        assert sorted(each.at for each in verdicts) == [each.at for each in verdicts]
        wire.provider.tpm.pcrs[4] = bytes(32)
        await wire.time.advance(2.0)
        last = session.progress.verdicts[-1]
        assert len(session.progress.verdicts) == 8
        assert (last.accepted, last.layer, last.failed_check, last.error) == (
            False,
            "host",
            9,
            "ReferenceValueMismatch",
        )
        assert wire.records.saved[-1].verdicts == session.progress.verdicts


@pytest.mark.parametrize("layer", ["guest", "host"])
async def test_values_of_rejected_evidence_are_seen_when_signature_and_digest_held(layer: str) -> None:
    """Check 9 fails: the values that were proven are kept, of the PCRs that were asked for only, and stored."""
    wire = Wire()
    tpm = {"guest": wire.guest.tpm, "host": wire.provider.tpm}[layer]
    tpm.pcrs[4] = bytes(range(32))
    async with running(wire) as session:
        assert (session.state, session.progress.failed_check) == (State.INVALID_QUOTE, 9)
        seen = session.progress.seen[layer]
        asked = {"guest": (0, 4, 7), "host": (0, 4)}[layer]
        assert seen.pcrs == {HashAlg.SHA256: {pcr: tpm.pcrs[pcr] for pcr in asked}}
        assert wire.records.saved[-1].seen == session.progress.seen


async def test_values_of_evidence_that_does_not_hold_are_not_seen() -> None:
    """A value is changed after signing, or the signature is not the AK's: nothing of it is kept."""
    wire = Wire()
    async with running(wire) as session:
        before = session.progress.seen
        wire.guest.script = [lambda a: replace(a, evidence=replace(a.evidence, signature=b""))]
        await wire.time.advance(2.0)
        assert session.state is State.INVALID_QUOTE
        assert session.progress.seen == before
        session.resume()
        await settle()
        wire.guest.script = [
            lambda a: replace(
                a,
                evidence=replace(
                    a.evidence, pcrs={HashAlg.SHA256: dict.fromkeys(a.evidence.pcrs[HashAlg.SHA256], bytes(32))}
                ),
            )
        ]
        await wire.time.advance(2.0)
        assert session.progress.error == "PcrDigestMismatch"
        assert bytes(32) not in session.progress.seen["guest"].pcrs[HashAlg.SHA256].values()
