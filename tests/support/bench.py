"""A running batcher with its fakes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from harness.provider.batch import RFC9162, PendingQuote, TreeBuilder
from harness.provider.batcher import Answer, Batcher, BatchReport, Surroundings
from tests.support.answers import verify_answer
from tests.support.batching import WAIT_S, FakeQuoter, FakeResidency
from tests.support.manual_clock import ManualClock
from tests.support.pendings import a_request
from tests.support.soft_tpm import SoftTpm

RESIDENCY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The default bounds."""

    pool_size: int = 65_536
    max_pools: int = 8
    tenant_share: int = 1024
    linger_s: float = 0.0
    strategy: str = "batched"
    window_s: float = 10.0


@dataclass(slots=True, kw_only=True)
class Bench:
    """A batcher with its fakes."""

    batcher: Batcher
    quoter: FakeQuoter
    residency: FakeResidency
    clock: ManualClock
    owner: asyncio.Task[None]
    residency_s: float = RESIDENCY_S
    reports: list[BatchReport] = field(default_factory=list)
    tasks: list[asyncio.Task[Answer]] = field(default_factory=list)

    def submit(self, pending: PendingQuote) -> asyncio.Task[Answer]:
        task = asyncio.create_task(self.batcher.submit(pending))
        self.tasks.append(task)
        return task

    async def in_flight(self, pending: PendingQuote | None = None) -> asyncio.Task[Answer]:
        """One request, whose quote has reached the TPM and stops there."""
        self.quoter.hold()
        task = self.submit(pending or a_request("early"))
        await self.quoter.arrival(len(self.quoter.batches) + 1)
        return task

    def verify(self, task: asyncio.Task[Answer], pending: PendingQuote) -> None:
        eks = {key: value for key, value in self.residency.states.items() if isinstance(value, bytes)}
        verify_answer(task.result(), pending, self.quoter.tpm.ak, eks)


@asynccontextmanager
async def bench(
    *,
    builder: TreeBuilder = RFC9162,
    seed: random.Random | None = None,
    answer_s: float = 30.0,
    bounds: Bounds = Bounds(),
) -> AsyncIterator[Bench]:
    """A running batcher. Afterwards no call of submit may still wait."""
    quoter, residency, clock = FakeQuoter(SoftTpm()), FakeResidency(), ManualClock()
    reports: list[BatchReport] = []
    around = Surroundings(
        clock=clock,
        rng=seed or random.SystemRandom(),
        observe=reports.append,
        residency_s=RESIDENCY_S,
        answer_s=answer_s,
    )
    batcher = Batcher(quoter, residency, bounds, builder=builder, surroundings=around)
    owner = asyncio.create_task(batcher.run())
    made = Bench(batcher=batcher, quoter=quoter, residency=residency, clock=clock, owner=owner, reports=reports)
    try:
        yield made
    finally:
        batcher.stop()
        quoter.let_go()
        residency.gate.set()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(owner, *made.tasks, return_exceptions=True)


def errors_of(tasks: list[asyncio.Task[Answer]]) -> list[type[BaseException] | None]:
    """Class of each task's error; None for an answer."""
    errors = [task.exception() for task in tasks]
    return [None if error is None else type(error) for error in errors]
