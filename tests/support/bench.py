"""A running batcher with its fakes, and the judge of everything that it did."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from harness.errors import HarnessError
from harness.provider.batch import RFC9162, Answer, PendingQuote, Quote, SealedBatch, TreeBuilder, Waiter
from harness.provider.batcher import Batcher, BatchReport, Surroundings
from harness.values import AgentId, PcrSelection
from tests.support.answers import AnswerChecker
from tests.support.batching import WAIT_S, FakeQuoter, FakeResidency, settle
from tests.support.manual_clock import ManualClock
from tests.support.pendings import a_request
from tests.support.soft_tpm import SoftTpm

RESIDENCY_S = 2.0
_MOST_TURNS = 3
_LONG_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The default bounds."""

    pool_size: int = 65_536
    max_pools: int = 8
    tenant_share: int = 1024
    linger_s: float = 0.0
    strategy: str = "batched"
    window_s: float = 10.0


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A request that entered without a task; ``ended_s`` by the manual clock."""

    pending: PendingQuote
    entered_s: float
    pools: int = 0  # open when it had entered
    waiter: Waiter | None = None
    outcome: Answer | HarnessError | None = None
    ended_s: float = float("nan")
    left: bool = False


@dataclass(slots=True, kw_only=True)
class Bench:
    """A batcher with its fakes."""

    batcher: Batcher
    quoter: FakeQuoter
    residency: FakeResidency
    clock: ManualClock
    owner: asyncio.Task[None]
    checker: AnswerChecker
    residency_s: float = RESIDENCY_S
    faults: type[BaseException] = HarnessError  # what may have ended the owner
    reports: list[BatchReport] = field(default_factory=list)
    submitted: list[tuple[asyncio.Task[Answer], PendingQuote]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    vtpm_eks: dict[str, dict[AgentId, bytes]] = field(default_factory=dict)  # by batch: what its check said

    @property
    def tasks(self) -> list[asyncio.Task[Answer]]:
        return [task for task, _ in self.submitted]

    def submit(self, pending: PendingQuote) -> asyncio.Task[Answer]:
        task = asyncio.create_task(self.batcher.submit(pending))
        self.submitted.append((task, pending))
        return task

    def enter(self, pending: PendingQuote) -> Entry:
        """Like `submit`, without a task."""
        entry = Entry(pending=pending, entered_s=self.clock.now_s)

        def deliver(outcome: Answer | HarnessError) -> None:
            assert entry.outcome is None, "two outcomes for one request"
            assert not entry.left, "an outcome for a request that was taken back"
            entry.outcome, entry.ended_s = outcome, self.clock.now_s

        try:
            entry.waiter = self.batcher.enter(pending, deliver)
        except HarnessError as error:
            deliver(error)
        entry.pools = self.batcher.open_pools
        self.entries.append(entry)
        return entry

    def leave(self, entry: Entry) -> None:
        """Takes a request back."""
        assert entry.waiter is not None
        self.batcher.leave(entry.waiter)
        entry.left = True

    def takes(self, seconds: float) -> None:
        """From now on each quote takes so long by the manual clock."""

        async def quote(batch: SealedBatch) -> Quote:
            await self.clock.sleep(seconds)
            return self.quoter.tpm.quote_batch(batch)

        self.quoter.quotes = quote

    async def pass_time(self, seconds: float, *, step_s: float) -> None:
        """Lets time pass in steps, and after each one everything happen that can."""
        await settle()
        for _ in range(round(seconds / step_s)):
            self.clock.advance(step_s)
            await settle()

    async def in_flight(self, pending: PendingQuote | None = None) -> asyncio.Task[Answer]:
        """One request, whose quote has reached the TPM and stops there."""
        self.quoter.hold()
        task = self.submit(pending or a_request("early"))
        await self.quoter.arrival(len(self.quoter.batches) + 1)
        return task

    def sealed(self, batch: SealedBatch) -> None:
        """Called when the quote is asked for: what was said of the guests counts for this batch."""
        said = self.residency.said[-1] if self.residency.said else {}
        self.vtpm_eks[batch.id] = {agent_id: state for agent_id, state in said.items() if isinstance(state, bytes)}

    def verify(self, task: asyncio.Task[Answer], pending: PendingQuote) -> None:
        answer = task.result()
        self.checker.check(answer, pending, self.vtpm_eks[answer.shared.batch_id])

    def judge(self, limit: int) -> None:
        """Asserts what holds in every test, when everything has ended.

        1. Nobody is left waiting, and what each got is an answer or a typed error.
        2. Every answer that was delivered verifies for its request, and shows no PCR outside its tenant's allowlist.
        3. Nor would an answer of a batch have done so to a member that left: every union is inside every allowlist.
        4. Trees are filled to a power of two of at least 16, within the builder's limit.
        5. Each batch was reported once, in their order; only one whose quote was broken off with the owner may be
           missing. No more waits are reported than there are members.
        6. The owner was not ended by a fault, such as what a fake asserts of its caller.
        """
        fault = None if self.owner.cancelled() else self.owner.exception()
        assert fault is None or isinstance(fault, self.faults), repr(fault)
        assert self.batcher.waiting == 0, "somebody is left waiting"
        outcomes: list[tuple[Answer | HarnessError, PendingQuote]] = []
        for entry in self.entries:
            assert entry.left or entry.outcome is not None, "somebody was told nothing"
            if entry.outcome is not None:
                outcomes.append((entry.outcome, entry.pending))
        for task, pending in self.submitted:
            assert task.done()
            if not task.cancelled():
                error = task.exception()
                assert error is None or isinstance(error, HarnessError), repr(error)
                outcomes.append((error or task.result(), pending))
        for outcome, pending in outcomes:
            if isinstance(outcome, Answer):
                self.checker.check(outcome, pending, self.vtpm_eks[outcome.shared.batch_id])
        for batch in self.quoter.batches:
            allowlists = {member.pending.allowlist.banks for member in batch.members}
            assert all(batch.selection.within(PcrSelection(banks)) for banks in allowlists)
            assert batch.tree.size == 1 << (batch.tree.size - 1).bit_length()
            assert 16 <= batch.tree.size <= max(16, limit)
        reported = [report.batch_id for report in self.reports if report.batch_id]
        sealed = [batch.id for batch in self.quoter.batches]
        broken_off = self.owner.cancelled() or not isinstance(fault, HarnessError | None)
        assert reported == sealed or (broken_off and reported == sealed[:-1]), "a batch was not reported"
        assert all(len(report.waits_s) <= report.requests for report in self.reports)


class NewBench(Protocol):
    """`bench`, with random numbers that follow from the seed of the test."""

    def __call__(
        self, *, builder: TreeBuilder = RFC9162, answer_s: float = 30.0, bounds: Bounds = ...
    ) -> AbstractAsyncContextManager[Bench]: ...


@asynccontextmanager
async def bench(
    *,
    builder: TreeBuilder = RFC9162,
    rng: random.Random | None = None,
    answer_s: float = 30.0,
    bounds: Bounds = Bounds(),
) -> AsyncIterator[Bench]:
    """A running batcher. Afterwards no call of submit may still wait, and everything is judged.

    With ``rng`` the fakes take a random number of turns of the loop where they take no time.
    """

    def turns() -> int:
        return 0 if rng is None else rng.randint(0, _MOST_TURNS)

    quoter, residency, clock = FakeQuoter(SoftTpm(), turns=turns), FakeResidency(turns=turns), ManualClock()
    reports: list[BatchReport] = []
    around = Surroundings(
        clock=clock,
        rng=rng or random.SystemRandom(),
        observe=reports.append,
        residency_s=RESIDENCY_S,
        answer_s=answer_s,
    )
    batcher = Batcher(quoter, residency, bounds, builder=builder, surroundings=around)
    owner = asyncio.create_task(batcher.run())
    made = Bench(
        batcher=batcher,
        quoter=quoter,
        residency=residency,
        clock=clock,
        owner=owner,
        checker=AnswerChecker(quoter.tpm.ak),
        reports=reports,
    )
    quoter.asked = made.sealed
    try:
        yield made
    finally:
        batcher.stop()
        quoter.let_go()
        residency.gate.set()
        clock.frozen = False
        clock.advance(_LONG_S)
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(owner, *made.tasks, return_exceptions=True)
    made.judge(builder.limit)


def errors_of(tasks: list[asyncio.Task[Answer]]) -> list[type[BaseException] | None]:
    """Class of each task's error; None for an answer."""
    errors = [task.exception() for task in tasks]
    return [None if error is None else type(error) for error in errors]
