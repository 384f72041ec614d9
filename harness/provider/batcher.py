"""The one task that seals pools, has them quoted and releases their waiters.

It seals when the TPM is free and a pool is not empty: no timer, no fixed window. With a TPM time of L per batch and k
pools a request waits at most (k + 1) L. ::

    batcher = Batcher(keys, residency, settings.batch)
    async with asyncio.TaskGroup() as tasks:
        owner = tasks.create_task(batcher.run())
        answer = await batcher.submit(pending)

Invariants:
    1. At most one batch is with the quoter. A request that arrives meanwhile is in an open pool, never in that batch.
    2. Every call of `submit` ends: with an answer, a typed error, or its own deadline. Whatever ends `run`, every
       waiter is released.
    3. A batch has a leaf for a guest only if the residency check made for this batch says that it runs here; the
       digest of its vTPM's EK in the leaf is the one that the check gave.
    4. An error of the TPM reaches the waiters of its batch and only them; the next batch goes on.
    5. Pools, tenants and waiting requests are bounded, each with its own refusal.

Owner: `run` takes from the pools; `submit` adds to them, in one step of the same event loop.

Spec: DESIGN 3.1 (runs here), 3.4, 4.
"""

from __future__ import annotations

import asyncio
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from harness.errors import (
    BatchFailed,
    DeadlineExceeded,
    GuestNotHere,
    HarnessError,
    NotReady,
    PoolFull,
    SelectionNotAllowed,
    ShareExhausted,
    ShuttingDown,
)
from harness.provider.batch import RFC9162, PendingQuote, Pool, SealedBatch, TreeBuilder, Waiter, seal
from harness.provider.batching import Answer, BatchReport, Bounds, Quoter, Residency, SharedAnswer, Surroundings
from harness.values import AgentId

__all__ = ["Answer", "BatchReport", "Batcher", "Bounds", "Quoter", "Residency", "SharedAnswer", "Surroundings"]


class Batcher:
    """Gathers admitted requests into pools and answers each with one quote per pool.

    Args:
        quoter: makes quotes; used by `run` only.
        residency: asked once per batch.
        bounds: of pools, tenants and waiting requests; linger.
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
        self._pools: list[Pool] = []  # in the order in which they were opened
        self._answers: dict[Waiter, asyncio.Future[Answer]] = {}
        self._shares: Counter[str] = Counter()
        self._work = asyncio.Event()
        self._stopped = False
        self._batch_s = 0.0  # what the last batch took: the unit of retry_after_s
        self._begun_s: float | None = None  # of the batch in work

    @property
    def waiting(self) -> int:
        """Requests that have not been answered yet."""
        return len(self._answers)

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
        return 0.0 if self._begun_s is None else self._around.clock.monotonic() - self._begun_s

    # --- waiters ------------------------------------------------------------------------------------------------

    async def submit(self, pending: PendingQuote) -> Answer:
        """Answer to one request.

        Raises:
            SelectionNotAllowed: it asks for a PCR outside its own allowlist.
            ShareExhausted: its tenant has as many requests waiting as it may.
            PoolFull: no pool can take it.
            GuestNotHere: its guest does not run here.
            NotReady: it is not known yet which guests run here.
            BatchFailed: the TPM made no quote for its batch.
            ShuttingDown: the batcher stopped.
            DeadlineExceeded: no answer in time.

        *Cancellation:* before its batch is sealed the request leaves the pool; later its leaf stays, unanswered.
        """
        waiter, answer = self._admit(pending)
        try:
            async with asyncio.timeout(self._around.answer_s):
                return await answer
        except TimeoutError as error:
            raise DeadlineExceeded(f"no quote within {self._around.answer_s:g} s") from error
        finally:
            self._leave(waiter)

    def _admit(self, pending: PendingQuote) -> tuple[Waiter, asyncio.Future[Answer]]:
        if self._stopped:
            raise ShuttingDown("the host agent is stopping")
        if not pending.request.selection.within(pending.allowlist):
            raise SelectionNotAllowed("the mask names a PCR that this tenant may not see on this host")
        if self._shares[pending.tenant] >= self._bounds.tenant_share:
            raise ShareExhausted(
                f"tenant has {self._bounds.tenant_share} requests waiting", retry_after_s=self._retry_after_s()
            )
        pool = self._pool_for(pending)
        waiter = Waiter(pending=pending, arrived_s=self._around.clock.monotonic())
        pool.add(waiter)
        answer = self._answers[waiter] = asyncio.get_running_loop().create_future()
        self._shares[pending.tenant] += 1
        self._work.set()
        return waiter, answer

    def _pool_for(self, pending: PendingQuote) -> Pool:
        if sum(len(pool) for pool in self._pools) >= self._bounds.pool_size:
            raise PoolFull("the pools are full", retry_after_s=self._retry_after_s())
        pool = next((pool for pool in self._pools if pool.admits(pending)), None)
        if pool is None:
            if len(self._pools) >= self._bounds.max_pools:
                raise PoolFull("too many pools are open", retry_after_s=self._retry_after_s())
            pool = Pool()
            self._pools.append(pool)
        return pool

    def _leave(self, waiter: Waiter) -> None:
        del self._answers[waiter]
        tenant = waiter.pending.tenant
        self._shares[tenant] -= 1
        if not self._shares[tenant]:
            del self._shares[tenant]
        for pool in self._pools:
            pool.discard(waiter)
        self._drop_empty_pools()

    def _drop_empty_pools(self) -> None:
        self._pools = [pool for pool in self._pools if len(pool)]
        if not self._pools and not self._stopped:
            self._work.clear()

    def _retry_after_s(self) -> float:
        return max(1.0, math.ceil((len(self._pools) + 1) * self._batch_s))

    def _release(self, waiters: Iterable[Waiter], error: Callable[[], HarnessError]) -> None:
        """Ends the wait of each with an error of its own: a shared one would gather everybody's traceback."""
        for waiter in waiters:
            answer = self._answers.get(waiter)
            if answer is not None and not answer.done():
                answer.set_exception(error())

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
                if self._bounds.linger_s > 0 and not self._stopped:
                    await self._around.clock.sleep(self._bounds.linger_s)
                if self._pools and not self._stopped:
                    self._begun_s = self._around.clock.monotonic()
                    await self._serve(self._take())
                    self._begun_s = None
        finally:
            self.stop()

    def stop(self) -> None:
        """Refuses further requests and releases every waiter with ShuttingDown; `run` ends after its batch."""
        self._stopped = True
        self._work.set()
        self._release(list(self._answers), lambda: ShuttingDown("the host agent is stopping"))

    def _take(self) -> list[Waiter]:
        """Waiters of the pool that waits longest, as many as the tree may have leaves."""
        now_s = self._around.clock.monotonic()
        pool = min(self._pools, key=lambda pool: pool.waiting_since_s)
        waiters = pool.take(self._builder.limit, now_s)
        self._drop_empty_pools()
        return waiters

    async def _serve(self, waiters: list[Waiter]) -> None:
        clock = self._around.clock
        begun_s = clock.monotonic()
        members = await self._residents(waiters)
        batch = None
        tpm_quotes, outcome = 0, "nobody left"
        sealed_s = clock.monotonic()
        if members:
            batch = seal(members, builder=self._builder, rng=self._around.rng, sealed_at=clock.utcnow())
            sealed_s = clock.monotonic()
            tpm_quotes, outcome = await self._quote(batch)
        ended_s = clock.monotonic()
        self._batch_s = ended_s - begun_s
        self._around.observe(
            BatchReport(
                batch_id=batch.id if batch else "",
                requests=len(members),
                refused=len(waiters) - len(members),
                tree_size=batch.tree.size if batch else 0,
                tpm_quotes=tpm_quotes,
                waited_s=begun_s - min(waiter.arrived_s for waiter in waiters),
                sealing_s=sealed_s - begun_s,
                quote_s=ended_s - sealed_s,
                waiting=sum(len(pool) for pool in self._pools),
                outcome=outcome,
            )
        )

    async def _residents(self, waiters: list[Waiter]) -> dict[Waiter, bytes | None]:
        """Those who get a leaf, each with the digest of its vTPM's EK; the others are released."""
        agent_ids = frozenset(waiter.pending.agent_id for waiter in waiters if waiter.pending.agent_id is not None)
        found = await self._check(agent_ids) if agent_ids else {}
        members: dict[Waiter, bytes | None] = {}
        for waiter in waiters:
            answer = self._answers.get(waiter)
            if answer is None or answer.done():
                continue  # cancelled meanwhile: not sealed yet, so it has no leaf
            if waiter.pending.agent_id is None:
                members[waiter] = None
                continue
            state = found.get(waiter.pending.agent_id, GuestNotHere("the guest does not run here now"))
            if isinstance(state, bytes):
                members[waiter] = state
            else:
                self._release([waiter], functools.partial(_again, state))
        return members

    async def _check(self, agent_ids: frozenset[AgentId]) -> Mapping[AgentId, bytes | GuestNotHere | NotReady]:
        try:
            async with asyncio.timeout(self._around.residency_s):
                return await self._residency.check(agent_ids)
        except (HarnessError, TimeoutError) as error:
            # Not knowing is not absence: 503, and the tenant asks again.
            unknown = NotReady(f"which guests run here is not known: {str(error) or 'no answer in time'}")
            return dict.fromkeys(agent_ids, unknown)

    async def _quote(self, batch: SealedBatch) -> tuple[int, str]:
        """Has the batch quoted and releases its members. Number of TPM quotes, and the outcome for the report."""
        try:
            quote = await self._quoter.quote_batch(batch)
        except HarnessError as error:
            self._release(batch.members, functools.partial(_batch_failed, batch.id, error))
            if not self._quoter.usable:
                raise
            return 0, type(error).__name__
        shared = SharedAnswer(batch_id=batch.id, sealed_at=batch.sealed_at, quote=quote)
        for waiter, proof in batch.proofs().items():
            answer = self._answers.get(waiter)
            if answer is not None and not answer.done():
                answer.set_result(Answer(shared=shared, proof=proof))
        return quote.tpm_quotes, "quoted"


def _again(error: GuestNotHere | NotReady) -> HarnessError:
    if isinstance(error, NotReady):
        return NotReady(error.detail, retry_after_s=error.retry_after_s)
    return GuestNotHere(error.detail)


def _batch_failed(batch_id: str, cause: HarnessError) -> BatchFailed:
    error = BatchFailed(f"the TPM made no quote: {cause.detail}", batch_id=batch_id)
    error.__cause__ = cause
    return error
