"""The batcher at each point where its owner waits: what comes, goes, ends or fails just then."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest

from harness.errors import BatchFailed, DeadlineExceeded, DeviceUnavailable, ShuttingDown
from harness.provider.batch import Answer
from harness.provider.handout import SLICE
from tests.support.batching import WAIT_S, settle, until, within
from tests.support.bench import Bench, Bounds, Entry, NewBench
from tests.support.pendings import a_request, agent

PAUSE_S = 1.0
POINTS = ("pause", "residency", "quote")


def bench_for(bench: NewBench, point: str) -> AbstractAsyncContextManager[Bench]:
    return bench(bounds=Bounds(linger_s=PAUSE_S if point == "pause" else 0.0))


async def come_to(made: Bench, point: str, count: int = 4) -> list[Entry]:
    """Brings the owner to a point, with a batch there; gives the requests that this batch is for."""
    made.clock.frozen = True
    made.residency.states[agent(1)] = b"1" * 32
    if point == "handout":
        count += SLICE
    elif point == "residency":
        made.residency.gate.clear()
    made.quoter.hold()
    entries = [
        made.enter(a_request(f"t{number}", agent_id=agent(1) if number == 0 else None)) for number in range(count)
    ]
    await settle()
    assert len(made.residency.asked) == (point != "pause")
    assert len(made.quoter.batches) == (point in ("quote", "handout"))
    if point == "handout":
        made.quoter.let_go()
        await until(lambda: any(entry.outcome for entry in entries))
        made.quoter.hold()
        assert not all(entry.outcome for entry in entries)
    return entries


async def go_on(made: Bench) -> None:
    """Lets everything happen that waits."""
    made.quoter.let_go()
    made.residency.gate.set()
    for _ in range(3):
        await settle()
        made.clock.advance(PAUSE_S)
    await settle()


def answered(entries: list[Entry]) -> list[bool]:
    return [isinstance(entry.outcome, Answer) for entry in entries]


@pytest.mark.parametrize("point", [*POINTS, "handout"])
async def test_arrival(bench: NewBench, point: str) -> None:
    """Who comes before a batch is taken is in it; who comes later is in the next one, with an answer of its own."""
    async with bench_for(bench, point) as made:
        entries = await come_to(made, point)
        late = made.enter(a_request("late"))
        await go_on(made)
        assert all(answered([*entries, late]))
        assert len(made.quoter.batches) == (1 if point == "pause" else 2)


@pytest.mark.parametrize("point", [*POINTS, "handout"])
async def test_one_leaves(bench: NewBench, point: str) -> None:
    """It is told nothing any more, and all others get answers that verify; a leaf stays once it is sealed."""
    async with bench_for(bench, point) as made:
        entries = await come_to(made, point)
        gone = entries.pop()
        made.leave(gone)
        await go_on(made)
        assert all(answered(entries))
        assert gone.outcome is None
        assert (gone.waiter in made.quoter.batches[0].members) is (point in ("quote", "handout"))
        assert made.reports[0].waits_s == (0.0,) * len(entries) or point == "pause"


@pytest.mark.parametrize("point", POINTS)
async def test_all_leave(bench: NewBench, point: str) -> None:
    """The owner goes on: nothing is quoted for nobody, and the next request is served."""
    async with bench_for(bench, point) as made:
        for entry in await come_to(made, point):
            made.leave(entry)
        assert made.batcher.waiting == 0
        await go_on(made)
        assert len(made.quoter.batches) == (point == "quote")
        later = made.enter(a_request("later"))
        await go_on(made)
        assert answered([later]) == [True]


@pytest.mark.parametrize("point", ["idle", *POINTS, "handout"])
async def test_stop(bench: NewBench, point: str) -> None:
    """Everybody is released within the call, with an answer where there is one; nobody comes in afterwards."""
    async with bench_for(bench, point) as made:
        entries = [] if point == "idle" else await come_to(made, point)
        late = [made.enter(a_request("late"))] if point in ("quote", "handout") else []
        made.batcher.stop()
        assert made.batcher.waiting == 0
        if point == "handout":
            assert all(answered(entries))
        else:
            assert [type(entry.outcome) for entry in entries] == [ShuttingDown] * len(entries)
        assert [type(entry.outcome) for entry in late] == [ShuttingDown] * len(late)
        assert isinstance(made.enter(a_request()).outcome, ShuttingDown)
        await go_on(made)
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert made.owner.result() is None


@pytest.mark.parametrize("point", ["idle", *POINTS, "handout"])
async def test_the_owner_is_cancelled(bench: NewBench, point: str) -> None:
    """Wherever that happens nobody is left waiting, and answers that are there still go out."""
    async with bench_for(bench, point) as made:
        entries = [] if point == "idle" else await come_to(made, point)
        made.owner.cancel()
        await asyncio.wait([made.owner], timeout=WAIT_S)
        assert made.owner.cancelled()
        assert all(answered(entries)) if point == "handout" else not any(answered(entries))
        assert all(entry.outcome for entry in entries)


@pytest.mark.parametrize("point", POINTS)
async def test_a_deadline_passes(bench: NewBench, point: str) -> None:
    """Who cannot wait any longer is released then, and nobody else; the batch goes on."""
    async with bench_for(bench, point) as made:
        short = made.enter(a_request("short", wait_s=0.5))
        entries = await come_to(made, point)
        made.clock.advance(0.45)
        assert short.outcome is None
        made.clock.advance(0.2)
        assert isinstance(short.outcome, DeadlineExceeded)
        assert 0.5 <= short.ended_s - short.entered_s <= 0.65
        await go_on(made)
        assert all(answered(entries))


@pytest.mark.parametrize("point", ["residency", "quote"])
async def test_an_error_of_the_quoter_after_arrivals(bench: NewBench, point: str) -> None:
    """What came while the failing batch was in work is in the next one, which is quoted."""
    async with bench_for(bench, point) as made:
        made.quoter.faults_after[1] = DeviceUnavailable("connection reset")
        entries = await come_to(made, point)
        late = [made.enter(a_request(f"late{number}")) for number in range(3)]
        await go_on(made)
        assert [type(entry.outcome) for entry in entries] == [BatchFailed] * len(entries)
        assert all(answered(late))


async def test_a_task_that_is_cancelled_when_its_answer_is_there(bench: NewBench) -> None:
    """Delivered or not, it is counted once: the tenant's share is free afterwards."""
    async with bench(bounds=Bounds(tenant_share=1)) as made:
        first = await made.in_flight(a_request("alice"))
        made.quoter.let_go()
        await until(lambda: not made.batcher.waiting)
        first.cancel()
        await settle()
        await within([made.submit(a_request("alice"))])
        assert made.batcher.waiting == 0


async def test_a_request_that_comes_in_the_delivery_of_another(bench: NewBench) -> None:
    """A closed loop: who asks again from within its answer is in the batch after the one that has begun meanwhile."""
    async with bench() as made:
        again: list[Entry] = []
        made.batcher.enter(a_request("alice"), lambda _: again.append(made.enter(a_request("alice"))))
        await settle()
        await go_on(made)
        assert answered(again) == [True]


async def test_a_request_that_leaves_in_the_delivery_of_another(bench: NewBench) -> None:
    """A stream that breaks takes back all that it waits for, also in the middle of a batch's answers."""
    async with bench() as made:
        made.quoter.hold()
        entries: list[Entry] = []
        made.batcher.enter(a_request("alice"), lambda _: made.leave(entries[0]))
        entries += [made.enter(a_request("bob")) for _ in range(2)]
        await settle()
        made.quoter.let_go()
        await settle()
        assert answered(entries) == [False, True]
        assert made.batcher.waiting == 0
