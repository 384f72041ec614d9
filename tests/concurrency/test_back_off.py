"""Many sessions of one provider that refuses them together: they come back spread, recover, and none is left behind."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID

import pytest

from harness.errors import HarnessError, PeerUnreachable, PoolFull, ShareExhausted
from harness.protocol import QuoteRequest
from harness.tenant.plan import Timing
from harness.tenant.ports import Chance, Ports, Progress
from harness.tenant.retries import HOST, Retries
from harness.tenant.session import Session
from harness.tenant.states import ACTIVE, Event, State
from harness.values import AgentId
from tests.support.manual_time import ManualTime, settle
from tests.support.tenant_wire import Wire

SESSIONS = 500
TIMES = pytest.mark.parametrize("time", range(20))
SOMETIMES = pytest.mark.parametrize("time", range(2))


class Crowd:
    """Sessions of many guests on one host. ``refuse`` says, for each question to the provider, with what it is refused.

    All share one vTPM and one transport key, which saves making hundreds; their agent ids differ.
    """

    def __init__(self, rng: random.Random, sessions: int = SESSIONS, timing: Timing | None = None) -> None:
        self.rng = rng
        self.wire = Wire(v=None, timing=timing or Timing(quote_interval_s=60.0))
        self.time: ManualTime = self.wire.time
        self.refuse: Callable[[], HarnessError | None] = lambda: None
        self.asked: dict[AgentId, list[float]] = {}
        chance = Chance(jitter=self.rng.random)
        ports = Ports(guest=self.wire.guest, provider=self, records=self.wire.records, clock=self.time, chance=chance)
        ids = [AgentId(UUID(int=self.rng.getrandbits(128), version=4)) for _ in range(sessions)]
        plans = [replace(self.wire.plan, agent_id=agent_id) for agent_id in ids]
        self.sessions = [Session(plan, ports, Progress(state=State.SAVED)) for plan in plans]

    async def quote(self, request: QuoteRequest, *, wait_s: float) -> object:
        assert request.agent_id is not None
        self.asked.setdefault(request.agent_id, []).append(self.time.monotonic())
        error = self.refuse()
        if error is not None:
            raise error
        return await self.wire.provider.quote(request, wait_s=wait_s)

    @property
    def attempts(self) -> list[float]:
        """Moments of all questions to the provider, ascending."""
        return sorted(moment for moments in self.asked.values() for moment in moments)

    def rounds(self) -> list[int]:
        """Accepted rounds of each session."""
        return [session.progress.rounds for session in self.sessions]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All sessions run, and have asked their first questions."""
        tasks = [asyncio.get_running_loop().create_task(session.run()) for session in self.sessions]
        try:
            await settle()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


def busiest(moments: list[float], width: float) -> int:
    """Most moments in any window of this width."""
    ends = (bisect.bisect_right(moments, moment + width) for moment in moments)
    return max((end - start for start, end in enumerate(ends)), default=0)


def most_by_chance(mean: float) -> float:
    """No window of independent moments is fuller than this, but once in far more runs than there will be."""
    return mean + 6 * math.sqrt(mean)


# --- waits alone: every seed --------------------------------------------------------------------------------------


@TIMES
@pytest.mark.parametrize("retry_after_s", [1.0, 2.0, 7.0])
def test_sessions_refused_together_come_back_spread(time: int, retry_after_s: float, rng: random.Random) -> None:
    """After one common refusal the tries fill the interval behind Retry-After evenly, and none comes before it."""
    waits = []
    for _ in range(SESSIONS):
        retries = Retries(Timing())
        refusal = PoolFull("full", retry_after_s=retry_after_s)
        assert retries.after(HOST, refusal, 0.0) is Event.TRANSPORT_FAILED
        waits.append(retries.wait_s(rng.random()))
    assert min(waits) >= retry_after_s
    assert max(waits) <= 2 * retry_after_s
    assert busiest(sorted(waits), retry_after_s / 10) <= most_by_chance(SESSIONS / 10)


@TIMES
def test_repeated_refusals_spread_further(time: int, rng: random.Random) -> None:
    """Each common refusal doubles the interval up to its bound: the fifth spreads 500 tries over eight seconds."""
    waits = []
    for _ in range(SESSIONS):
        retries = Retries(Timing())
        for _ in range(5):
            retries.after(HOST, ShareExhausted("share", retry_after_s=1.0), 0.0)
        waits.append(retries.wait_s(rng.random()))
    assert min(waits) >= 1.0
    assert busiest(sorted(waits), 0.8) <= most_by_chance(SESSIONS / 10)


@TIMES
def test_without_retry_after_the_tries_are_spread_as_well(time: int, rng: random.Random) -> None:
    """A provider that went away says nothing: the waits still fill the interval, and none is zero."""
    waits = []
    for _ in range(SESSIONS):
        retries = Retries(Timing())
        for _ in range(4):
            retries.after(HOST, PeerUnreachable("gone"), 0.0)
        waits.append(retries.wait_s(rng.random()))
    assert min(waits) >= 0.25
    assert max(waits) <= 4.0
    assert busiest(sorted(waits), 0.375) <= most_by_chance(SESSIONS / 10)


# --- whole sessions -----------------------------------------------------------------------------------------------


@SOMETIMES
async def test_a_common_refusal_leads_to_no_herd(time: int, rng: random.Random) -> None:
    """500 sessions meet a full pool at one moment; all are attested within twice Retry-After, none was FAILED, and the
    provider met no wave: in no tenth of the interval more tries than chance brings together."""
    crowd = Crowd(rng)
    crowd.refuse = lambda: PoolFull("full", retry_after_s=5.0)
    async with crowd.running():
        refused = crowd.attempts
        assert len(refused) == SESSIONS
        crowd.refuse = lambda: None
        await crowd.time.advance(10.0)
        again = crowd.attempts[SESSIONS:]
        assert len(again) == SESSIONS
        assert min(again) >= refused[-1] + 5.0
        assert busiest(again, 0.5) <= most_by_chance(SESSIONS / 10)
        assert crowd.rounds() == [1] * SESSIONS


@SOMETIMES
async def test_an_overload_ends_and_nobody_is_left_behind(time: int, rng: random.Random) -> None:
    """A provider that takes 40 questions a second meets 500 at once: each session is served within a minute, none is
    FAILED, and nobody asks before Retry-After is over, or again and again."""
    crowd = Crowd(rng)
    taken: Counter[int] = Counter()

    def at_capacity() -> HarnessError | None:
        second = int(crowd.time.monotonic())
        if taken[second] < 40:
            taken[second] += 1
            return None
        return ShareExhausted("share", retry_after_s=1.0)

    crowd.refuse = at_capacity
    async with crowd.running():
        await crowd.time.advance(50.0)
        assert crowd.rounds() == [1] * SESSIONS
        assert {session.state for session in crowd.sessions} <= ACTIVE
        for moments in crowd.asked.values():
            assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(moments))
        assert max(len(moments) for moments in crowd.asked.values()) <= 12


async def test_a_short_outage_fails_nobody(rng: random.Random) -> None:
    """A provider that is away for two minutes: no session fails, and all are attested soon after it is back."""
    crowd = Crowd(rng, sessions=100)
    crowd.refuse = lambda: PeerUnreachable("away")
    async with crowd.running():
        await crowd.time.advance(120.0)
        assert {session.state for session in crowd.sessions} <= ACTIVE
        back, crowd.refuse = crowd.time.monotonic(), lambda: None
        await crowd.time.advance(30.0)
        assert all(crowd.rounds())
        assert busiest([moment for moment in crowd.attempts if moment > back], 1.0) <= most_by_chance(100 / 5)


@SOMETIMES
async def test_guests_that_start_together_do_not_stay_in_step(time: int, rng: random.Random) -> None:
    """All begin at one moment; after some rounds no tenth of the interval holds most of them."""
    crowd = Crowd(rng, sessions=40, timing=Timing(quote_interval_s=10.0))
    async with crowd.running():
        assert busiest(crowd.attempts, 0.0) == 40
        await crowd.time.advance(400.0)
        since = crowd.time.monotonic() - 9.0
        assert busiest([moment for moment in crowd.attempts if moment > since], 1.0) <= 20
        assert min(crowd.rounds()) >= 40
