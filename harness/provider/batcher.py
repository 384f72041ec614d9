"""The one task that seals pools, has them quoted and releases their waiters.

It seals when the TPM is free and a pool is not empty: no timer, no fixed window. With a TPM time of L per batch and k
pools a request waits at most (k + 1) L. ::

    batcher = Batcher(keys, residency, settings.batch)
    async with asyncio.TaskGroup() as tasks:
        owner = tasks.create_task(batcher.run())
        answer = await batcher.submit(pending)

Invariants:
    1. At most one batch is with the quoter. A request that arrives meanwhile is in an open pool, never in that batch.
    2. Every request that `enter` took gets one outcome, unless its caller takes it back: an answer, a typed error, or
       DeadlineExceeded at its own deadline. Whatever ends `run`, every waiter is released.
    3. A batch has a leaf for a guest only if the residency check made for this batch says that it runs here; the
       digest of its vTPM's EK in the leaf is the one that the check gave.
    4. An error of the TPM reaches the waiters of its batch and only them; the next batch goes on.
    5. Pools, tenants and waiting requests are bounded, each with its own refusal. Once the time of a batch is known, a
       request that cannot be answered while the answer is of use is refused at once.
    6. The next quote is begun before the answers of the last one go out.
    7. A waiter costs no task, no timer and no look at the other waiters.

Owner: `run` takes from the pools; `enter` adds to them, in one step of the same event loop.

Spec: DESIGN 3.1 (runs here), 3.4, 4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

from harness.errors import (
    DeadlineExceeded,
    GuestNotHere,
    HarnessError,
    NotReady,
    PoolFull,
    SelectionNotAllowed,
    ShareExhausted,
    ShuttingDown,
    WouldBeLate,
)
from harness.provider.batch import (
    RFC9162,
    Answer,
    Deliver,
    Outcome,
    PendingQuote,
    SealedBatch,
    SharedAnswer,
    TreeBuilder,
    Waiter,
    seal,
)
from harness.provider.batch_work import BatchWork, absence, failures
from harness.provider.batching import BatchReport, Bounds, Quoter, Residency, Surroundings
from harness.provider.clock import timeout
from harness.provider.deadlines import Deadlines
from harness.provider.forecast import Forecast
from harness.provider.handout import Handout
from harness.provider.pools import Pool, Pools, kind_of, sees_what_it_asks
from harness.values import AgentId

__all__ = ["Answer", "BatchReport", "Batcher", "Bounds", "Quoter", "Residency", "SharedAnswer", "Surroundings"]

_UNKNOWN_S = 1.0  # retry_after_s while it is not known how long a batch takes


class Batcher:
    """Gathers admitted requests into pools and answers each with one quote per pool.

    Args:
        quoter: makes quotes; used by `run` only.
        residency: asked once per batch.
        bounds: of pools, tenants and waiting requests; who shares a quote.
        builder: how trees are built.
        surroundings: clock, randomness, observer, deadlines.
    """

    def __init__(
        self,
        quoter: Quoter,
        residency: Residency,
        bounds: Bounds,
        *,
        builder: TreeBuilder = RFC9162,
        surroundings: Surroundings | None = None,
    ) -> None:
        self._quoter = quoter
        self._residency = residency
        self._bounds = bounds
        self._builder = builder
        self._around = surroundings or Surroundings()
        single = bounds.strategy == "single"
        self._limit = 1 if single else builder.limit  # waiters that one quote serves
        self._pause_s = bounds.window_s if bounds.strategy == "window" else bounds.linger_s
        self._pools = Pools(bounds.max_pools, together=not single)
        self._in_work: list[Waiter] = []  # of the batch in work; some may have left
        self._handout = Handout(self._give)
        self._forecast = Forecast(self._pause_s)
        self._waiting = 0
        self._shares: dict[str, int] = {}
        self._work = asyncio.Event()
        self._stopped = False
        self._deadlines = Deadlines(self._around.clock, self._waiters, self._expire)

    @property
    def waiting(self) -> int:
        """Requests that have not been answered yet."""
        return self._waiting

    @property
    def waiting_by_tenant(self) -> Mapping[str, int]:
        """The same, by tenant; those without any are left out."""
        return self._shares

    @property
    def open_pools(self) -> int:
        """Pools that wait for the TPM."""
        return len(self._pools)

    @property
    def working_s(self) -> float:
        """Seconds since the batch in work was taken; 0 between batches."""
        return self._forecast.working_s(self._around.clock.monotonic())

    # --- waiters ------------------------------------------------------------------------------------------------

    async def submit(self, pending: PendingQuote) -> Answer:
        """Answer to one request.

        Raises:
            GuestNotHere: its guest does not run here.
            NotReady: it is not known yet which guests run here.
            BatchFailed: the TPM made no quote for its batch.
            ShuttingDown: the batcher stopped.
            DeadlineExceeded: no answer in time.
            HarnessError: what `enter` raises.

        *Cancellation:* before its batch is sealed the request leaves the pool; later its leaf stays, unanswered.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

        def deliver(outcome: Outcome) -> None:
            if answer.done():
                return
            if isinstance(outcome, HarnessError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        waiter = self.enter(pending, deliver)
        try:
            return await answer
        finally:
            self.leave(waiter)

    def enter(self, pending: PendingQuote, deliver: Deliver) -> Waiter:
        """Lets a request wait; its outcome is delivered once, later, unless `leave` takes it back before.

        Args:
            pending: an admitted request.
            deliver: takes an Answer, or the error in its place (those that `submit` names).

        Raises:
            SelectionNotAllowed: it asks for a PCR outside its own allowlist.
            ShareExhausted: its tenant has as many requests waiting as it may.
            PoolFull: no pool can take it.
            WouldBeLate: no answer is to be expected within its ``wait_s``.
            ShuttingDown: the batcher stopped.
        """
        if self._stopped:
            raise ShuttingDown("the host agent is stopping")
        kind = kind_of(pending)
        if not sees_what_it_asks(kind):
            raise SelectionNotAllowed("the mask names a PCR that this tenant may not see on this host")
        share = self._shares.get(pending.tenant, 0)
        if share >= self._bounds.tenant_share:
            raise ShareExhausted(
                f"tenant has {self._bounds.tenant_share} requests waiting", retry_after_s=self._retry_after_s()
            )
        if self._pools.waiting >= self._bounds.pool_size:
            raise PoolFull("the pools are full", retry_after_s=self._retry_after_s())
        now_s = self._around.clock.monotonic()
        due_s = now_s + min(pending.wait_s, self._around.answer_s)
        waiter = Waiter(pending=pending, arrived_s=now_s, due_s=due_s, kind=kind, deliver=deliver)
        pool = self._pools.find(waiter)
        if pool is None:
            raise PoolFull("too many pools are open", retry_after_s=self._retry_after_s())
        self._refuse_late(waiter, pool)
        self._pools.add(pool, waiter)
        self._shares[pending.tenant] = share + 1
        self._waiting += 1
        self._deadlines.watch(due_s)
        self._work.set()
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Takes a request back: nothing is delivered to it any more. Does nothing when it has its outcome."""
        if waiter.deliver is None:
            return
        waiter.deliver = None
        self._waiting -= 1
        tenant = waiter.pending.tenant
        share = self._shares[tenant] - 1
        if share:
            self._shares[tenant] = share
        else:
            del self._shares[tenant]
        if waiter.pool is not None:
            self._pools.discard(waiter)
            self._rest_if_empty()

    def _rest_if_empty(self) -> None:
        if not len(self._pools) and not self._stopped:
            self._work.clear()

    def _give(self, waiter: Waiter, outcome: Outcome) -> None:
        deliver = waiter.deliver
        if deliver is not None:
            self.leave(waiter)
            deliver(outcome)

    def _refuse_late(self, waiter: Waiter, pool: Pool) -> None:
        wait_s = waiter.due_s - waiter.arrived_s
        if wait_s <= 0:
            raise WouldBeLate("no time is left for an answer", retry_after_s=self._retry_after_s())
        answer_in_s = 0.0
        for at_least in (False, True):  # the exact number only where the upper bound is too much
            quotes = self._pools.ahead(pool, waiter.pending.tenant, self._limit, at_least=at_least)
            answer_in_s = self._forecast.answer_in_s(quotes, waiter.arrived_s)
            if answer_in_s <= wait_s:
                return
        raise WouldBeLate(
            f"an answer takes about {answer_in_s:.1f} s and is of use for {wait_s:.1f} s",
            retry_after_s=max(self._forecast.batch_s, answer_in_s - wait_s),
        )

    def _retry_after_s(self) -> float:
        """Until each pool has been served once more: then there is room again."""
        now_s = self._around.clock.monotonic()
        return self._forecast.answer_in_s(max(1, len(self._pools)), now_s) or _UNKNOWN_S

    def _waiters(self) -> list[Waiter]:
        waiters = [*self._pools.waiters(), *self._in_work]
        return [waiter for waiter in waiters if waiter.deliver is not None]

    def _expire(self, waiter: Waiter) -> None:
        self._give(waiter, DeadlineExceeded(f"no quote within {waiter.due_s - waiter.arrived_s:g} s"))

    # --- the owner ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serves the pools until `stop`, or until the quoter is of no further use.

        Raises:
            HarnessError: what made the quoter unusable.

        *Cancellation:* every waiter is released with ShuttingDown.
        """
        try:
            while not self._stopped:
                await self._work.wait()
                await self._pause()
                for _ in range(self._pools.batches(self._limit) if self._bounds.strategy == "window" else 1):
                    if len(self._pools) and not self._stopped:
                        await self._serve()
        finally:
            self.stop()

    def stop(self) -> None:
        """Refuses further requests and releases every waiter with ShuttingDown; `run` ends after its batch.

        Answers that are there already still reach their waiters.
        """
        self._stopped = True
        self._work.set()
        try:
            self._handout.flush()
        finally:  # whatever is wrong with an answer or an observer
            for waiter in self._waiters():
                self._give(waiter, ShuttingDown("the host agent is stopping"))
            self._deadlines.stop()

    async def _pause(self) -> None:
        if self._pause_s > 0 and not self._stopped:
            self._forecast.pausing(self._around.clock.monotonic())
            await self._around.clock.sleep(self._pause_s)

    async def _serve(self) -> None:
        """One batch: of those whose turn it is, until their outcomes are on the way to them."""
        clock = self._around.clock
        begun_s = clock.monotonic()
        self._forecast.begun(begun_s)
        taken = self._in_work = self._pools.take(self._limit, begun_s)
        self._rest_if_empty()
        work = BatchWork(
            strategy=self._bounds.strategy,
            begun_s=begun_s,
            waited_s=begun_s - min(waiter.arrived_s for waiter in taken),
            sealed_s=begun_s,
        )
        members = await self._residents(taken)
        work.members, work.refused = len(members), len(taken) - len(members)
        work.sealed_s = clock.monotonic()
        if not members:
            self._end(work, "nobody left", iter(()))
            return
        batch = work.batch = seal(members, builder=self._builder, rng=self._around.rng, sealed_at=clock.utcnow())
        work.sealed_s = clock.monotonic()
        await self._quote(work, batch)

    async def _residents(self, waiters: list[Waiter]) -> dict[Waiter, bytes | None]:
        """Those who get a leaf, each with the digest of its vTPM's EK; the others are released."""
        agent_ids = frozenset(waiter.pending.agent_id for waiter in waiters if waiter.pending.agent_id is not None)
        found = await self._check(agent_ids) if agent_ids else {}
        members: dict[Waiter, bytes | None] = {}
        for waiter in waiters:
            if waiter.deliver is None:
                continue  # left meanwhile: not sealed yet, so it has no leaf
            agent_id = waiter.pending.agent_id
            if agent_id is None:
                members[waiter] = None
                continue
            state = found.get(agent_id)
            if isinstance(state, bytes):
                members[waiter] = state
            else:
                self._give(waiter, absence(state))
        return members

    async def _check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        try:
            async with timeout(self._around.clock, self._around.residency_s):
                return await self._residency.check(agent_ids)
        except (HarnessError, TimeoutError) as error:
            # Not knowing is not absence: 503, and the tenant asks again.
            unknown = NotReady(f"which guests run here is not known: {str(error) or 'no answer in time'}")
            return dict.fromkeys(agent_ids, unknown)

    async def _quote(self, work: BatchWork, batch: SealedBatch) -> None:
        """Has the batch quoted; its members are told from the next turn of the loop on, when the next one is begun."""
        ahead = asyncio.get_running_loop().call_soon(batch.paths)  # while the TPM works
        try:
            quote = await self._quoter.quote_batch(batch)
        except HarnessError as error:
            self._end(work, type(error).__name__, failures(batch, error))
            if not self._quoter.usable:
                raise
        else:
            batch.paths()  # made already; what a builder fails with ends `run`, where everybody is released
            work.tpm_quotes = quote.tpm_quotes
            self._end(work, "quoted", work.answers(batch, quote, self._around.clock))
        finally:
            ahead.cancel()

    def _end(self, work: BatchWork, outcome: str, outcomes: Iterator[tuple[Waiter, Outcome]]) -> None:
        self._in_work = []
        work.ended_s = self._around.clock.monotonic()
        self._forecast.ended(work.ended_s, quoted=work.tpm_quotes > 0)
        self._handout.put(outcomes, lambda: self._around.observe(work.report(outcome, self._pools.waiting)))
