"""The batcher: what meets in a batch, in what order, within what bounds, and who is here."""

from __future__ import annotations

import asyncio
import random

import pytest

from harness.errors import (
    GuestNotHere,
    HarnessError,
    NotReady,
    PoolFull,
    SelectionNotAllowed,
    ShareExhausted,
    StoreError,
)
from harness.provider.batch import RFC9162, PendingQuote, TreeBuilder
from harness.provider.batcher import Answer
from tests.support.batching import WAIT_S, settle, within
from tests.support.bench import Bounds, NewBench, errors_of
from tests.support.pendings import a_request, agent, allow

TENANTS = ("alice", "bob", "carol")


# --- who meets in a batch ---------------------------------------------------------------------------------------------


async def test_requests_of_three_tenants_that_arrive_during_a_quote_get_one_further_quote(bench: NewBench) -> None:
    """With one quote in flight all later arrivals share exactly one more, and each verifies its own proof."""
    async with bench() as made:
        early = a_request("early")
        first = await made.in_flight(early)
        pendings = [a_request(tenant, [0, pcr]) for tenant in TENANTS for pcr in range(1, 6)]
        tasks = [made.submit(pending) for pending in pendings]
        await settle()
        assert len(made.quoter.batches) == 1
        made.quoter.let_go()
        await within([first, *tasks])
        assert made.quoter.tpm.quotes == 2
        made.verify(first, early)
        for task, pending in zip(tasks, pendings, strict=True):
            made.verify(task, pending)
        assert len({id(task.result().shared) for task in tasks}) == 1
        assert [report.requests for report in made.reports] == [1, len(pendings)]


async def test_another_members_proof_does_not_verify(bench: NewBench) -> None:
    """The checker can fail: the proof of one request is worthless for another."""
    async with bench() as made:
        made.quoter.hold()
        await made.in_flight()
        pendings = [a_request("a"), a_request("b")]
        tasks = [made.submit(pending) for pending in pendings]
        await settle()
        made.quoter.let_go()
        await within(tasks)
        with pytest.raises(AssertionError, match="not over this request"):
            made.verify(tasks[0], pendings[1])


async def test_pcrs_that_a_member_may_not_see_make_another_pool(bench: NewBench) -> None:
    """A union outside somebody's allowlist is never quoted; both requests are served, by two quotes."""
    async with bench() as made:
        first = await made.in_flight()
        pendings = [a_request("narrow", [0], allowlist=allow([0, 1])), a_request("wide", [0, 7])]
        tasks = [made.submit(pending) for pending in pendings]
        await settle()
        made.quoter.let_go()
        await within([first, *tasks])
        assert made.quoter.tpm.quotes == 3
        for task, pending in zip(tasks, pendings, strict=True):
            made.verify(task, pending)


async def test_two_guests_of_one_tenant_share_a_batch(bench: NewBench) -> None:
    """Each leaf carries its own guest's vTPM; one quote serves both."""
    async with bench() as made:
        made.residency.states |= {agent(1): b"1" * 32, agent(2): b"2" * 32}
        first = await made.in_flight()
        pendings = [a_request("alice", agent_id=agent(number)) for number in (1, 2)]
        tasks = [made.submit(pending) for pending in pendings]
        await settle()
        made.quoter.let_go()
        await within([first, *tasks])
        for task, pending in zip(tasks, pendings, strict=True):
            made.verify(task, pending)
        assert made.residency.asked == [{agent(1), agent(2)}]
        assert made.quoter.tpm.quotes == 2


async def test_random_arrivals_all_verify(bench: NewBench, rng: random.Random) -> None:
    """Whatever arrives, leaves and is allowed, every answer verifies and shows nobody a PCR it may not see."""
    async with bench() as made:
        waiting: list[tuple[asyncio.Task[Answer], PendingQuote]] = []
        for _ in range(300):
            allowed = rng.sample(range(16), rng.randint(2, 16))
            pending = a_request(rng.choice(TENANTS), rng.sample(allowed, 2), allowlist=allow(allowed))
            waiting.append((made.submit(pending), pending))
            if rng.random() < 0.2:
                rng.choice(waiting)[0].cancel()
            await asyncio.sleep(0)
        await asyncio.wait([task for task, _ in waiting], timeout=WAIT_S)
        for task, pending in waiting:
            assert task.done()
            if not task.cancelled() and not isinstance(task.exception(), PoolFull):
                made.verify(task, pending)


# --- order ------------------------------------------------------------------------------------------------------------


async def test_the_pool_that_waits_longest_goes_first(bench: NewBench) -> None:
    """A pool is not passed by one that opened later, however many wait there."""
    async with bench() as made:
        await made.in_flight()
        made.submit(a_request("old", [0], allowlist=allow([0])))
        await settle()
        made.clock.now_s += 1
        for _ in range(5):
            made.submit(a_request("new", [7]))
        await settle()
        made.quoter.let_go()
        await within(made.tasks)
        tenants = [{waiter.pending.tenant for waiter in batch.members} for batch in made.quoter.batches]
        assert tenants == [{"early"}, {"old"}, {"new"}]


async def test_tenants_take_turns_where_a_tree_cannot_take_all(bench: NewBench) -> None:
    """A flood of one tenant leaves room for the others in the very next batch."""
    small = TreeBuilder(name="small", build=RFC9162.build, limit=16)
    async with bench(builder=small) as made:
        await made.in_flight()
        for _ in range(100):
            made.submit(a_request("flood"))
        late = [made.submit(a_request(tenant)) for tenant in ("b", "c")]
        await settle()
        made.quoter.step()
        await made.quoter.arrival(2)
        made.quoter.let_go()
        await within(late)
        served = {waiter.pending.tenant for waiter in made.quoter.batches[1].members}
        assert served == {"flood", "b", "c"}
        assert all(batch.tree.size <= 16 for batch in made.quoter.batches)
        await within(made.tasks)


# --- bounds -----------------------------------------------------------------------------------------------------------


async def test_a_request_outside_its_own_allowlist_is_refused(bench: NewBench) -> None:
    """It never reaches a pool."""
    async with bench() as made:
        with pytest.raises(SelectionNotAllowed):
            await made.batcher.submit(a_request(pcrs=[0, 9], allowlist=allow([0])))
        assert made.quoter.batches == []


async def test_a_tenant_has_a_bounded_share_and_others_still_get_in(bench: NewBench) -> None:
    """Beyond its share a tenant is refused; a place is free again when one of its requests has ended."""
    async with bench(bounds=Bounds(tenant_share=3)) as made:
        await made.in_flight()
        mine = [made.submit(a_request("flood")) for _ in range(5)]
        other = made.submit(a_request("other"))
        await settle()
        assert [task.done() for task in mine] == [False, False, False, True, True]
        refusal = mine[3].exception()
        assert isinstance(refusal, ShareExhausted)
        assert refusal.retry_after_s > 0
        mine[0].cancel()
        await settle()
        again = made.submit(a_request("flood"))
        made.quoter.let_go()
        await within([again, other])


async def test_full_pools_refuse(bench: NewBench) -> None:
    """The bound holds over all tenants and pools; it is typed and says when to come again."""
    async with bench(bounds=Bounds(pool_size=2)) as made:
        await made.in_flight()
        tasks = [made.submit(a_request(f"t{pcr}", [pcr], allowlist=allow([pcr]))) for pcr in range(3)]
        await settle()
        refusal = tasks[2].exception()
        assert isinstance(refusal, PoolFull)
        assert refusal.retry_after_s > 0
        assert not tasks[0].done()


async def test_the_number_of_pools_is_bounded(bench: NewBench) -> None:
    """Requests that can share with nobody open at most so many pools."""
    async with bench(bounds=Bounds(max_pools=3)) as made:
        await made.in_flight()
        tasks = [made.submit(a_request("t", [pcr], allowlist=allow([pcr]))) for pcr in range(4)]
        await settle()
        assert [task.done() for task in tasks] == [False, False, False, True]
        assert isinstance(tasks[3].exception(), PoolFull)
        made.quoter.let_go()
        await within(tasks[:3])


# --- residency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "error"),
    [
        pytest.param(GuestNotHere("gone"), GuestNotHere, id="not-here"),
        pytest.param(NotReady("cache not complete"), NotReady, id="not-known-yet"),
        pytest.param(None, GuestNotHere, id="not-mentioned"),
    ],
)
async def test_an_absent_guest_has_no_leaf(
    bench: NewBench, state: GuestNotHere | NotReady | None, error: type[HarnessError]
) -> None:
    """It is told so, the others of its batch are served, and nothing is signed about it."""
    async with bench() as made:
        if state is not None:
            made.residency.states[agent(1)] = state
        made.residency.states[agent(2)] = b"2" * 32
        await made.in_flight()
        absent = made.submit(a_request(agent_id=agent(1), pcrs=[5]))
        present = a_request(agent_id=agent(2), pcrs=[0])
        task = made.submit(present)
        await settle()
        made.quoter.let_go()
        await within([task])
        assert errors_of([absent]) == [error]
        made.verify(task, present)
        (member,) = made.quoter.batches[1].members
        assert member.pending is present
        assert made.quoter.batches[1].selection == allow([0]), "a PCR that only the absent guest asked for"
        assert made.reports[-1].refused == 1


async def test_a_batch_of_absent_guests_costs_no_quote(bench: NewBench) -> None:
    """Nothing is sealed for nobody, and the batcher goes on."""
    async with bench() as made:
        (absent,) = tasks = [made.submit(a_request(agent_id=agent(1)))]
        await asyncio.wait(tasks, timeout=WAIT_S)
        assert errors_of([absent]) == [GuestNotHere]
        assert made.quoter.batches == []
        await within([made.submit(a_request())])


@pytest.mark.parametrize("fault", [StoreError("journal"), None], ids=["fails", "hangs"])
async def test_not_knowing_who_is_here_is_not_absence(bench: NewBench, fault: Exception | None) -> None:
    """Guests are told to come again; host-only requests of the same batch are served."""
    async with bench() as made:
        made.residency.fault = fault
        if fault is None:
            made.residency.gate.clear()
        await made.in_flight()
        guest, host_only = made.submit(a_request(agent_id=agent(1))), made.submit(a_request())
        await settle()
        made.quoter.let_go()
        await settle()
        made.clock.advance(made.residency_s)
        await within([host_only])
        assert errors_of([guest]) == [NotReady]


async def test_residency_is_asked_at_sealing_not_at_arrival(bench: NewBench) -> None:
    """A guest that left while its request waited gets no leaf."""
    async with bench() as made:
        made.residency.states[agent(1)] = b"1" * 32
        await made.in_flight()
        task = made.submit(a_request(agent_id=agent(1)))
        await settle()
        assert made.residency.asked == []
        made.residency.states[agent(1)] = GuestNotHere("moved")
        made.quoter.let_go()
        await asyncio.wait([task], timeout=WAIT_S)
        assert errors_of([task]) == [GuestNotHere]
