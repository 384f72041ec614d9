"""Several sessions that share one host's AK: batches, answers that overtake each other, and reboots."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from harness import protocol
from harness.merkle import MerkleTree, leaf_hash
from harness.messages import encode_proof, encode_shared
from harness.protocol import QuoteRequest
from harness.tenant.plan import Timing
from harness.tenant.policy import Policy
from harness.tenant.ports import Ports, Progress
from harness.tenant.session import Session
from harness.tenant.states import State
from harness.values import AgentId
from tests.support.manual_time import settle
from tests.support.tenant_wire import REQUESTER, SHA256, VTPM_EK, FakeGuest, MemoryRecords, SoftTpm, Wire

GUESTS, ROUNDS = 4, 250


@dataclass(frozen=True, slots=True)
class Waiting:
    request: QuoteRequest
    answer: asyncio.Future[object]


class BatchingProvider:
    """One quote for everybody who waits; answers are handed out in random order, and some much later."""

    def __init__(self, wire: Wire, rng: random.Random) -> None:
        self.wire = wire
        self.rng = rng
        self.waiting: list[Waiting] = []
        self.late: list[tuple[Waiting, object]] = []
        self.sizes: list[int] = []
        self.reboots = 0.0

    async def quote(self, request: QuoteRequest, *, wait_s: float) -> object:
        waiting = Waiting(request, asyncio.get_running_loop().create_future())
        self.waiting.append(waiting)
        return await waiting.answer

    def seal(self) -> None:
        """Quotes once for all who wait; about half of the answers stay behind until a later call."""
        members, self.waiting = self.waiting, []
        tpm = self.wire.provider.tpm
        if members:
            if self.rng.random() < self.reboots:
                tpm.reboot()
            self.sizes.append(len(members))
            self.late += zip(members, self._answers(members), strict=True)
        self.rng.shuffle(self.late)
        for _ in range(len(self.late) - self.rng.randrange(GUESTS)):
            waiting, results = self.late.pop()
            if not waiting.answer.done():
                waiting.answer.set_result(results)

    def _answers(self, members: list[Waiting]) -> list[object]:
        tpm = self.wire.provider.tpm
        leaves = [
            leaf_hash(protocol.leaf_data(member.request, requester=REQUESTER, vtpm_ek=VTPM_EK)) for member in members
        ]
        tree = MerkleTree(leaves + [leaf_hash(bytes([n])) for n in range(16 - len(leaves))])
        mask = members[0].request.mask
        attest, signature, pcrs = tpm.quote(protocol.qualifying_data(tree.size, tree.root), mask)
        tpm.clock -= 4  # the next batch is one millisecond later, as the host agent guarantees at least
        shared = encode_shared(
            host_id=self.wire.provider.host_id,
            attest=attest,
            signature=signature,
            pcrs=pcrs,
            batch_id="b",
            sealed_at="2026-01-01T00:00:00Z",
        )
        return [shared | {"proof": encode_proof(tree.proof(index))} for index in range(len(members))]


@dataclass(slots=True)
class Host:
    wire: Wire
    provider: BatchingProvider
    records: MemoryRecords
    sessions: list[Session]

    async def turn(self) -> None:
        """Lets everybody go on for a while."""
        await settle(self.provider.rng.randrange(1, 6))
        self.provider.seal()
        await self.wire.time.advance(0.05)


@asynccontextmanager
async def sharing(rng: random.Random, *, strict: int = GUESTS) -> AsyncIterator[Host]:
    """Guests of one tenant on one host, each with its session; the first ``strict`` allow no reboots."""
    wire = Wire()
    records = MemoryRecords()
    records.baselines.update(wire.records.baselines)
    provider = BatchingProvider(wire, rng)
    sessions = []
    for number in range(GUESTS):
        guest = FakeGuest(SoftTpm())
        plan = replace(
            wire.plan,
            agent_id=AgentId(uuid.UUID(int=number + 1)),
            guest_ak=guest.tpm.ak,
            guest_policy=Policy.of(SHA256, {0: guest.tpm.pcrs[0]}),
            allow_reboots=number >= strict,
            timing=Timing(quote_interval_s=0.05),
        )
        ports = Ports(guest=guest, provider=provider, records=records, clock=wire.time, chance=wire.ports.chance)
        sessions.append(Session(plan, ports, Progress(state=State.SAVED)))
    tasks = [asyncio.get_running_loop().create_task(session.run()) for session in sessions]
    try:
        yield Host(wire, provider, records, sessions)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_honest_evidence_is_never_refused(rng: random.Random) -> None:
    """A thousand rounds of four guests, batched, with answers that overtake each other: no false refusal."""
    async with sharing(rng) as host:
        turns = 0
        while min(session.progress.rounds for session in host.sessions) < ROUNDS:
            await host.turn()
            turns += 1
            assert {session.progress.error for session in host.sessions} == {None}
            assert turns < 40 * ROUNDS, "rounds do not go on"
        assert max(host.provider.sizes) > 1
        assert host.records.alarms == []


async def test_the_stored_clock_never_goes_back(rng: random.Random) -> None:
    """Whatever order answers come in, the baseline that all share only rises."""
    async with sharing(rng) as host:
        seen = 0
        for _ in range(200):
            await host.turn()
            clock = host.records.baselines[host.wire.provider.tpm.ak.name].clock
            assert clock >= seen
            seen = clock


async def test_reboots_are_never_accepted_and_always_survived(rng: random.Random) -> None:
    """A host that reboots now and then: no round accepts a reboot, each starts anew, and in the end all go on."""
    async with sharing(rng, strict=0) as host:
        host.provider.reboots = 0.1
        for _ in range(300):
            await host.turn()
        host.provider.reboots = 0.0
        before = [session.progress.rounds for session in host.sessions]
        for _ in range(200):
            await host.turn()
        assert all(session.state is not State.INVALID_QUOTE for session in host.sessions)
        assert all(session.progress.rounds > done for session, done in zip(host.sessions, before, strict=True))
        assert {alarm.kind for alarm in host.records.alarms} == {"HostRebooted"}


async def test_one_strict_guest_is_not_swept_along(rng: random.Random) -> None:
    """Three guests allow reboots, the fourth does not: after a reboot it refuses, and they go on."""
    async with sharing(rng, strict=1) as host:
        strict = host.sessions[0]
        for _ in range(20):
            await host.turn()
        host.wire.provider.tpm.reboot()
        for _ in range(60):
            await host.turn()
        assert (strict.state, strict.progress.error) == (State.INVALID_QUOTE, "HostRebooted")
        for session in host.sessions[1:]:
            assert session.progress.host_baseline is not None
            assert session.progress.host_baseline.reset_count == host.wire.provider.tpm.resets


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """State changes of thousands of rounds are not printed."""
    monkeypatch.setattr("harness.events.emit", lambda *_args, **_fields: None)
