"""Fakes around the batcher: a quoter with pause points, a residency that is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TypeVar

from harness.errors import GuestNotHere, HarnessError, NotReady
from harness.provider.batch import Quote, SealedBatch
from harness.values import AgentId
from tests.support.soft_tpm import SoftTpm

T = TypeVar("T")

WAIT_S = 5.0
"""Longest that a test waits for something that is to happen."""


Turns = Callable[[], int]
"""How many turns of the loop something takes that takes no time."""


class FakeQuoter:
    """Quotes with a soft TPM, stops at a gate on request, and checks its caller.

    ``held`` closes the gate: a quote then waits until `let_go`, or `step`. ``faults_before`` and ``faults_after`` name
    the quote (the first is 1) that fails before the TPM has made it, or when it has. ``quotes`` makes them another way.
    """

    def __init__(self, tpm: SoftTpm, *, held: bool = False, turns: Turns = lambda: 0) -> None:
        self.tpm = tpm
        self.usable = True
        self.batches: list[SealedBatch] = []
        self.faults_before: dict[int, HarnessError] = {}
        self.faults_after: dict[int, HarnessError] = {}
        self.quotes: Callable[[SealedBatch], Awaitable[Quote]] | None = None
        self.asked: Callable[[SealedBatch], None] = lambda batch: None
        self._turns = turns
        self._open = not held
        self._steps = 0
        self._moved = asyncio.Event()
        self._arrived = asyncio.Event()
        self._busy = False

    async def quote_batch(self, batch: SealedBatch) -> Quote:
        assert not self._busy, "two quotes at once"
        assert batch.members, "a batch without members"
        assert batch not in self.batches, "one batch quoted twice"
        self._busy = True
        self.batches.append(batch)
        self.asked(batch)
        number = len(self.batches)
        self._arrived.set()
        try:
            await settle(self._turns())
            if number in self.faults_before:
                raise self.faults_before[number]
            await self._pass()
            quote = self.tpm.quote_batch(batch) if self.quotes is None else await self.quotes(batch)
            await settle(self._turns())
            if number in self.faults_after:
                raise self.faults_after[number]
            return quote
        finally:
            self._busy = False

    async def _pass(self) -> None:
        while not self._open and not self._steps:
            self._moved.clear()
            await self._moved.wait()
        self._steps = max(0, self._steps - 1)

    def hold(self) -> None:
        """The next quote stops before the TPM."""
        self._open, self._steps = False, 0

    def let_go(self) -> None:
        """The quote that waits, and later ones, go on."""
        self._open = True
        self._moved.set()

    def step(self) -> None:
        """The quote that waits, or is about to, goes on; the next one stops again."""
        self._open, self._steps = False, 1
        self._moved.set()

    async def arrival(self, count: int) -> None:
        """Returns when the ``count``-th quote has been asked for."""
        async with asyncio.timeout(WAIT_S):
            while len(self.batches) < count:
                self._arrived.clear()
                await self._arrived.wait()


class FakeResidency:
    """Says what the test put in; records what it was asked, and what it said."""

    def __init__(self, here: Mapping[AgentId, bytes] | None = None, *, turns: Turns = lambda: 0) -> None:
        self.states: dict[AgentId, bytes | GuestNotHere | NotReady] = dict(here or {})
        self.asked: list[frozenset[AgentId]] = []
        self.said: list[dict[AgentId, bytes | GuestNotHere | NotReady]] = []
        self.fault: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._turns = turns

    async def check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        assert agent_ids, "asked about nobody"
        self.asked.append(agent_ids)
        await settle(self._turns())
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        self.said.append({agent_id: self.states[agent_id] for agent_id in agent_ids if agent_id in self.states})
        return self.said[-1]


async def settle(rounds: int = 40) -> None:
    """Lets every task that can run do so."""
    for _ in range(rounds):
        await asyncio.sleep(0)


async def until(happened: Callable[[], bool]) -> None:
    """Lets tasks run, one turn of the loop at a time, until something has happened that needs nothing else."""
    for _ in range(10_000):
        if happened():
            return
        await asyncio.sleep(0)
    raise AssertionError("it does not happen")


async def within(awaitables: Iterable[asyncio.Task[T]]) -> list[T]:
    """Results of tasks that must end now."""
    async with asyncio.timeout(WAIT_S):
        return list(await asyncio.gather(*awaitables))
