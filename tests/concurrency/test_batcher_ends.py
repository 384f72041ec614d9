"""The batcher when waiters give up, the TPM fails, or everything stops: nobody waits for ever."""

from __future__ import annotations

import asyncio

import pytest

from harness.errors import (
    BatchFailed,
    DeadlineExceeded,
    DeviceFault,
    DeviceUnavailable,
    HarnessError,
    ShareExhausted,
    ShuttingDown,
)
from harness.merkle import MerkleTree
from harness.provider.batch import TreeBuilder
from harness.provider.batcher import Answer
from tests.support.batching import WAIT_S, settle, within
from tests.support.bench import Bounds, NewBench, errors_of
from tests.support.pendings import a_request, agent, allow

TENANTS = ("alice", "bob", "carol")


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_cancelled_before_sealing_leaves_the_pool(bench: NewBench) -> None:
    """It has no leaf, its PCRs are not quoted, and its place is free."""
    async with bench() as made:
        await made.in_flight()
        gone, stays = made.submit(a_request(pcrs=[9])), made.submit(a_request(pcrs=[0]))
        await settle()
        gone.cancel()
        await settle()
        made.quoter.let_go()
        await within([stays])
        assert len(made.quoter.batches[1].members) == 1
        assert made.quoter.batches[1].selection == allow([0])


async def test_cancelled_during_the_residency_check_has_no_leaf(bench: NewBench) -> None:
    """The pool was taken, but nothing was sealed yet."""
    async with bench() as made:
        made.residency.states[agent(1)] = b"1" * 32
        made.residency.gate.clear()
        gone, stays = made.submit(a_request(agent_id=agent(1), pcrs=[9])), made.submit(a_request(pcrs=[0]))
        await settle()
        assert made.residency.asked
        gone.cancel()
        await settle()
        made.residency.gate.set()
        await within([stays])
        assert made.quoter.batches[0].selection == allow([0])


async def test_cancelled_during_the_quote_leaves_its_leaf(bench: NewBench) -> None:
    """The others of the batch get their answers, which verify."""
    async with bench() as made:
        await made.in_flight()
        pending = a_request("stays")
        gone, stays = made.submit(a_request("goes")), made.submit(pending)
        await settle()
        made.quoter.step()
        await made.quoter.arrival(2)
        gone.cancel()
        await settle()
        made.quoter.let_go()
        await within([stays])
        assert len(made.quoter.batches[1].members) == 2
        made.verify(stays, pending)


async def test_a_cancelled_request_that_was_alone_opens_the_way(bench: NewBench) -> None:
    """An emptied pool vanishes: the batcher seals nothing, and takes the next request."""
    async with bench() as made:
        first = await made.in_flight()
        made.submit(a_request()).cancel()
        await settle()
        made.quoter.let_go()
        await within([first])
        await settle()
        assert len(made.quoter.batches) == 1
        await within([made.submit(a_request())])


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "error", [DeviceFault("TPM_RC_FAILURE", response_code=0x101), DeviceUnavailable("connection reset")]
)
async def test_a_tpm_error_reaches_exactly_its_batch(bench: NewBench, when: str, error: HarnessError) -> None:
    """Whether the TPM had made the quote or not: all waiters of that batch are told, and the next one is quoted."""
    async with bench() as made:
        faults = made.quoter.faults_before if when == "before" else made.quoter.faults_after
        faults[2] = error
        first = await made.in_flight()
        failing = [made.submit(a_request(tenant)) for tenant in TENANTS]
        await settle()
        made.quoter.step()
        await made.quoter.arrival(2)
        spared = a_request("spared")
        task = made.submit(spared)
        made.quoter.let_go()
        await within([first, task])
        assert errors_of(failing) == [BatchFailed] * 3
        told = [failed.exception() for failed in failing]
        assert {error.batch_id for error in told if isinstance(error, BatchFailed)} == {made.quoter.batches[1].id}
        assert len({id(error) for error in told}) == 3
        made.verify(task, spared)
        assert [report.outcome for report in made.reports] == ["quoted", type(error).__name__, "quoted"]


async def test_an_unusable_tpm_stops_the_batcher_and_releases_everybody(bench: NewBench) -> None:
    """A client that was given up cannot serve a later batch: those who wait are told at once."""
    async with bench() as made:
        first = await made.in_flight()
        later = made.submit(a_request())
        await settle()
        made.quoter.usable = False
        made.quoter.faults_after[1] = DeviceUnavailable("did not answer")
        made.quoter.let_go()
        await asyncio.wait([first, later, made.owner], timeout=WAIT_S)
        assert errors_of([first, later]) == [BatchFailed, ShuttingDown]
        assert isinstance(made.owner.exception(), DeviceUnavailable)
        with pytest.raises(ShuttingDown):
            await made.batcher.submit(a_request())


async def test_a_builder_that_makes_no_proofs_ends_the_batcher_and_releases_everybody(bench: NewBench) -> None:
    """A fault of ours, in a library perhaps: those of the batch are told, and so are those behind them."""

    class NoProofs(MerkleTree):
        def paths(self) -> list[tuple[bytes, ...]]:
            raise RuntimeError("no proofs")

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the first try, while the TPM works
    async with bench(builder=TreeBuilder(name="broken", build=NoProofs, limit=64)) as made:
        made.faults = RuntimeError
        first = await made.in_flight()
        later = made.submit(a_request())
        await settle()
        made.quoter.let_go()
        await asyncio.wait([first, later, made.owner], timeout=WAIT_S)
        assert errors_of([first, later]) == [ShuttingDown, ShuttingDown]
        assert isinstance(made.owner.exception(), RuntimeError)


# --- the end ----------------------------------------------------------------------------------------------------------


async def test_stop_releases_waiters_in_flight_and_in_pools(bench: NewBench) -> None:
    """All of them end with ShuttingDown, also while the TPM is still at work; later requests are refused."""
    async with bench() as made:
        first = await made.in_flight()
        later = [made.submit(a_request(tenant)) for tenant in TENANTS]
        await settle()
        made.batcher.stop()
        await asyncio.wait([first, *later], timeout=WAIT_S)
        assert errors_of([first, *later]) == [ShuttingDown] * 4
        with pytest.raises(ShuttingDown):
            await made.batcher.submit(a_request())
        made.quoter.let_go()
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert made.owner.done()


@pytest.mark.parametrize("point", ["idle", "linger", "residency", "quote"])
async def test_cancelling_the_owner_at_any_await_releases_everybody(bench: NewBench, point: str) -> None:
    """Wherever the owner task is cancelled, nobody is left waiting."""
    async with bench(bounds=Bounds(linger_s=3600.0 if point == "linger" else 0.0)) as made:
        made.clock.frozen = True
        made.residency.states[agent(1)] = b"1" * 32
        waiting: list[asyncio.Task[Answer]] = []
        if point == "residency":
            made.residency.gate.clear()
            waiting.append(made.submit(a_request(agent_id=agent(1))))
        elif point == "quote":
            waiting.append(await made.in_flight())
        elif point == "linger":
            waiting.append(made.submit(a_request()))
        await settle()
        made.owner.cancel()
        if waiting:
            await asyncio.wait(waiting, timeout=WAIT_S)
        assert errors_of(waiting) == [ShuttingDown] * len(waiting)
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert made.owner.cancelled()


async def test_a_request_without_an_owner_ends_by_its_own_deadline(bench: NewBench) -> None:
    """Even a quote that never comes keeps nobody for ever; the place in the pool is free afterwards."""
    async with bench(answer_s=20.0, bounds=Bounds(tenant_share=1)) as made:
        stuck = await made.in_flight(a_request("alice"))
        made.clock.advance(19.9)
        await settle()
        assert not stuck.done()
        made.clock.advance(0.2)
        await asyncio.wait([stuck], timeout=WAIT_S)
        assert errors_of([stuck]) == [DeadlineExceeded]
        again = made.submit(a_request("alice"))
        await settle()
        assert not again.done() or not isinstance(again.exception(), ShareExhausted)


async def test_a_linger_gathers_more(bench: NewBench) -> None:
    """With a linger the batch takes in what came while it waited."""
    async with bench(bounds=Bounds(linger_s=0.5)) as made:
        tasks = [made.submit(a_request(tenant)) for tenant in TENANTS]
        await within(tasks)
        assert made.clock.slept == [0.5]
        assert made.quoter.tpm.quotes == 1
